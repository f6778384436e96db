"""Training with aoft-train in a subprocess."""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from teaching import shades

from aoft_demo.actions import train
from aoft_demo.actions.train import Plan, TrainingProgress, run_training, training_plan
from aoft_demo.tasks.shared_fleet import SharedFleet, open_shared_fleet
from aoft_demo.tasks.trainers import Trainers
from aoft_demo.tasks.training_queue import Training
from aoft_demo.trainer import NICENESS
from aoft_demo.views.teach.cards import progress_card, result_card
from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.cli.train_options import given_settings, parser
from aoft_deploy.errors import SettingError
from aoft_deploy.processors import processors
from aoft_deploy.training.settings import TrainingSettings

psutil: Any = importlib.import_module("psutil")  # its types are partial


@pytest.fixture(scope="module")
def tiny(  # of random weights, in place of the bundled tasks
    fleet_artefact: Path,
    fleet_tasks: dict[str, Path],
    backbone_weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> SharedFleet:
    folder = tmp_path_factory.mktemp("shared")
    return open_shared_fleet([fleet_artefact], folder, weights=backbone_weights, threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for part, first, count in (("train", 0, 16), ("val", 5, 4), ("test", 9, 4)):
        for name, shade in (("dark", 20), ("light", 200)):
            folder = root / part / name
            folder.mkdir(parents=True)
            shades(folder, shade + first, count)
    return root


@pytest.fixture
def trainers() -> Iterator[Trainers]:
    started = Trainers()
    yield started
    started.close()


def test_the_plan_matches_the_fleet_and_its_arguments_say_the_same(
    tiny: SharedFleet, data: Path
) -> None:
    plan = training_plan(tiny, data)
    assert plan.settings.backbone_weights == tiny.weights
    assert (plan.train, plan.val, plan.test) == (32, 8, 8)
    assert plan.settings.augment == "affine"  # a mirrored left hand is a right hand
    assert plan.settings.method == tiny.fleet.kind.method and plan.settings.img_size == 16
    options = parser().parse_args(plan.arguments(data, Path("out")))
    assert TrainingSettings(**given_settings(options)) == plan.settings


def test_a_fleet_without_a_manifest_cannot_be_trained_for(
    fleet_artefact: Path, data: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "fleet.onnx"
    alone.write_bytes(fleet_artefact.read_bytes())
    shared = open_shared_fleet([alone], tmp_path, threads=1)
    with pytest.raises(SettingError, match="The fleet's manifest is missing"):
        training_plan(shared, data)


@pytest.mark.slow
def test_a_training_is_polite_foretells_its_end_and_can_be_repeated_with_the_code(
    shared: SharedFleet,
    data: Path,
    tmp_path: Path,
    trainers: Trainers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, training = short(training_plan(shared, data)), Training()
    steps = run_training(plan, data, tmp_path / "run", training, trainers)
    reports = [next(steps)]
    process = psutil.Process(training._process.pid)  # type: ignore[union-attr]
    assert process.environ()["OMP_NUM_THREADS"] == str(max(processors() // 2, 1))
    while not reports[-1].lines:
        reports.append(next(steps))
    assert process.nice() == psutil.Process().nice() + NICENESS
    assert os.sched_getscheduler(process.pid) == os.SCHED_BATCH
    reports += steps
    assert training.wait(0) == 0
    *running, end = reports
    assert reports[0].left is None and "Starting<" in progress_card("a", reports[0])
    known = [report.left for report in running if report.lines]
    assert all(left is not None and left >= 0 for left in known)
    assert end.left == 0 and len(end.lines) == plan.settings.epochs
    assert trainers.startup is not None and 0 < trainers.startup < end.seconds
    assert end.checkpoint is not None
    assert read_checkpoint(end.checkpoint).training["settings"]["augment"] == "affine"

    html = result_card("shades", end)
    python = code(html, "Python")
    (tmp_path / "pictures").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    exec(python, {})
    ours, theirs = (
        read_checkpoint(path) for path in (end.checkpoint, tmp_path / "shades" / "model.ckpt")
    )
    assert ours.classes == theirs.classes == ("dark", "light")
    for name, tensor in ours.tensors.items():
        np.testing.assert_allclose(tensor, theirs.tensors[name], atol=1e-4)
    comment, command = code(html, "Shell").splitlines()
    assert comment.startswith("# ")
    program, *arguments = shlex.split(command)
    assert program == "aoft-train"
    given = TrainingSettings(**given_settings(parser().parse_args(arguments)))
    assert given == plan.settings


def short(plan: Plan) -> Plan:
    """The plan with few epochs."""
    return replace(plan, settings=replace(plan.settings, epochs=4))


def code(html: str, language: str) -> str:
    """The code of a language in a card."""
    block = html.partition(f"<figcaption>{language}")[2].partition("</pre>")[0]
    return unescape(block.rpartition('<pre tabindex="0">')[2])


@pytest.mark.slow
def test_a_training_that_is_stopped_fails_or_is_left_ends_its_process(
    shared: SharedFleet, data: Path, tmp_path: Path, trainers: Trainers
) -> None:
    plan = training_plan(shared, data)
    for action in ("stop", "close", "fail"):
        trainers.prepare()
        (tmp_path / action).mkdir()
        training, out = Training(), tmp_path / action / "run"
        place = tmp_path / "nowhere" if action == "fail" else data
        steps: Any = run_training(plan, place, out, training, trainers)
        if action == "fail":
            with pytest.raises(SettingError, match=r"Training failed: Data folder .* not exist"):
                list(steps)
            continue
        assert next(steps).lines == ()
        assert training.wait(0) is None
        if action == "close":
            steps.close()  # as Gradio does when the browser disconnects
        else:
            training.stop()
            assert training.wait(0) is not None  # before the next step is requested
            with pytest.raises(SettingError, match="Training was stopped; nothing was added"):
                list(steps)
        assert training.stopped and training.wait(0) is not None


def test_the_time_left_follows_the_latest_epochs_and_is_never_negative() -> None:
    plan = Plan(TrainingSettings(epochs=10), 8, 5, 0)

    def card(seconds: list[float], left: float | None) -> str:
        lines = tuple({"train_accuracy": 0.5, "val_accuracy": 0.6, "seconds": s} for s in seconds)
        return progress_card("<b>", TrainingProgress(plan, lines, None, None, 9.0, left))

    assert "Starting (about 6 s)" in card([], 5.2)
    assert "Starting (about 1 s)" in card([], 0)
    assert "Learning &lt;b&gt;: about 25 s left" in card([1.0], 21.5)
    assert "about 1 s left" in card([1.0], 0)
    assert "about 2 minutes left" in card([1.0], 100)
    assert "finishing" in card([1.0] * 10, 0)
    assert "Best so far: right on 3 of 5 pictures kept aside." in card([1.0], 4)
    assert 'aria-valuenow="10"' in card([1.0], 4)


@pytest.mark.parametrize(
    ("pictures", "epochs", "batch"), [(6, 40, 8), (23, 40, 8), (60, 20, 16), (1000, 6, 32)]
)
def test_a_training_is_short_for_many_pictures_and_long_for_few(
    tiny: SharedFleet, monkeypatch: pytest.MonkeyPatch, pictures: int, epochs: int, batch: int
) -> None:
    splits = SimpleNamespace(train=range(pictures), val=range(4), test=None)
    monkeypatch.setattr(train, "load_folder", lambda folder: splits)
    plan = training_plan(tiny, Path())
    assert (plan.settings.epochs, plan.settings.batch_size) == (epochs, batch)
    assert (plan.train, plan.val, plan.test) == (pictures, 4, 0)


def test_the_rest_is_estimated_from_the_latest_epochs() -> None:
    def left(seconds: list[float], epochs: int, since: float) -> float | None:
        return train._seconds_left([{"seconds": x} for x in seconds], epochs, since)

    assert left([], 10, 3.0) is None
    assert left([9.0, 1.0, 1.0, 1.0, 1.0, 1.0], 10, 0.0) == pytest.approx(4)  # 4 epochs of 1 s
    assert left([1.0, 1.0], 10, 0.75) == pytest.approx(7.25)
    assert left([1.0, 1.0], 10, 3.0) == pytest.approx(21)  # each is as slow as the present one
    assert left([1.0] * 10, 10, 2.0) == 0


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert train._metrics(metrics) == []
    metrics.write_text('{"lr": 1}\n{"lr": 2}\n{"l')
    assert train._metrics(metrics) == [{"lr": 1}, {"lr": 2}]
    assert train._reason("a\nerror: one.\nerror: two.\nb") == "Training failed: two."
    assert "ended unexpectedly" in train._reason("Killed")
