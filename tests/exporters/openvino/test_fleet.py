"""Fleets in OpenVINO folders, with fixed and with live tasks."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.opening import open_checkpoint
from aoft_deploy.cli.export import main
from aoft_deploy.cli.predict import main as predict
from aoft_deploy.data.images import read_image
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import ArtefactError, SettingError
from aoft_deploy.fleet.fleet import Fleet

METHODS = ("aoft-lora-star", "rlrr", "aoft-vpt")


@pytest.fixture(scope="module", params=METHODS)
def tasks(
    request: pytest.FixtureRequest,
    make_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Path]:
    """Three tasks of one method."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    paths = [folder / f"{name}.ckpt" for name in ("cats", "dogs", "日")]
    for seed, path in enumerate(paths):
        path.write_bytes(make_checkpoint(request.param, seed=seed).read_bytes())
    return paths


def export(tasks: list[Path], backbone_weights: Path, *more: object) -> Path:
    output = tasks[0].with_name(f"fleet-{len(list(tasks[0].parent.iterdir()))}.openvino")
    options = ["--fleet", *tasks, "--to", "openvino", "--backbone-weights", backbone_weights]
    assert main([str(option) for option in [*options, *more, "-o", output]]) == 0
    return output


@pytest.fixture(scope="module")
def fleet(tasks: list[Path], backbone_weights: Path) -> Path:
    return export(tasks, backbone_weights)


def images(count: int) -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(count, 3, 16, 16)).astype(np.float32)


def unmerged(task: Path, weights: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    tuned, _ = open_checkpoint(task, BackboneSource(weights=weights))
    with torch.no_grad():
        logits: NDArray[np.float32] = tuned(torch.from_numpy(x)).numpy()
    return logits


def test_each_image_gets_the_logits_of_its_own_tasks_unmerged_model(
    fleet: Path, tasks: list[Path], backbone_weights: Path
) -> None:
    x, task = images(7), np.array([2, 0, 1, 1, 0, 2, 2])
    engine = load_artefact(fleet, EngineOptions(threads=1))
    assert engine.takes_tasks and engine.device == "cpu"
    logits = engine.run(x, task)
    expected = [unmerged(path, backbone_weights, x) for path in tasks]
    for i, own in enumerate(task):
        np.testing.assert_allclose(logits[i], expected[own][i], atol=2e-5, rtol=0)
        assert np.abs(logits[i] - expected[(own + 1) % 3][i]).max() > 1e-3
    manifest = json.loads(fleet.with_name(fleet.name + ".json").read_text("utf-8"))
    assert manifest["verification"]["max_abs"] < 5e-5
    assert [entry["name"] for entry in manifest["tasks"]] == ["cats", "dogs", "日"]


def test_a_live_fleet_opens_the_folder(
    fleet: Path, tasks: list[Path], backbone_weights: Path, tmp_path: Path
) -> None:
    x = images(4)
    live = Fleet(fleet, threads=1)
    assert list(live.tasks) == ["cats", "dogs", "日"]
    with pytest.raises(SettingError, match="runs artefacts on the CPU, not on 'cuda': leave `dev"):
        Fleet(fleet, device="cuda")
    live.remove("dogs")
    assert live.add(tasks[1], "again") == "again"
    answers = live.predict(x, ["again", "cats", "again", "日"])
    for i, own in enumerate([1, 0, 1, 2]):
        expected = unmerged(tasks[own], backbone_weights, x)[i]
        np.testing.assert_allclose(answers[i].logits, expected, atol=2e-5, rtol=0)


def test_concurrent_threads_get_their_own_logits(fleet: Path) -> None:
    engine = load_artefact(fleet, EngineOptions(threads=1))
    x = images(3)
    expected = [engine.run(x, np.full(3, task)) for task in range(3)]
    wrong: list[int] = []

    def ask(task: int) -> None:
        for _ in range(10):
            if not np.array_equal(engine.run(x, np.full(3, task)), expected[task]):
                wrong.append(task)

    threads = [threading.Thread(target=ask, args=(task,)) for task in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("task", "message"),
    [(None, "needs a task for each image"), (np.array([3]), "give one from 0 to 2")],
)
def test_invalid_tasks_are_refused(fleet: Path, task: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        load_artefact(fleet).run(images(1), task)


def test_int8_keeps_the_task_parameters_in_float32(
    make_checkpoint: Callable[..., Path],
    make_picture: Callable[..., Image.Image],
    backbone_weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, judged = tmp_path / "learn", tmp_path / "judge"
    for at, count in ((folder, 24), (judged, 12)):
        at.mkdir()
        for i in range(count):
            make_picture(24, 24, seed=1000 * count + i).save(at / f"{i}.png")
    tasks = [tmp_path / f"{name}.ckpt" for name in ("a", "b")]
    for seed, path in enumerate(tasks):
        path.write_bytes(make_checkpoint("aoft-lora-star", seed=seed).read_bytes())
    options = ["--precision", "int8", "--calibrate", folder, "--images", judged]
    output = export(tasks, backbone_weights, *options, "--min-agreement", "0.8")
    out, err = capsys.readouterr()
    assert "agreement" in out and "━" not in out + err
    half = (0.5, 0.5, 0.5)
    prepare = Preprocessing(16, 0.9, half, half)
    x = np.stack([prepare(read_image(judged / f"{i}.png")) for i in range(6)])
    engine = load_artefact(output)
    assert engine.info["precision"] == "int8"
    for task, path in enumerate(tasks):
        expected = unmerged(path, backbone_weights, x)
        quantised = engine.run(x, np.full(6, task))[:, : expected.shape[1]]
        assert 0 < np.abs(quantised - expected).max() < 0.1 * np.ptp(expected)
    core: Any = importlib.import_module("openvino").Core()
    nodes = core.read_model(output / "openvino_model.xml").get_ops()
    inputs = {n.get_friendly_name(): n for n in nodes if n.get_type_name() == "Parameter"}
    pending, reached = [inputs["bank"]], set[str]()
    while pending:
        node = pending.pop()
        for target in node.output(0).get_target_inputs():
            consumer = target.get_node()
            if consumer.get_type_name() in ("MatMul", "Add"):
                continue
            assert consumer.get_type_name() != "FakeQuantize"
            if consumer.get_friendly_name() not in reached:
                reached.add(consumer.get_friendly_name())
                pending.append(consumer)
    assert predict([str(output), "--task", "b", str(judged / "0.png")]) == 0


def test_a_fleet_without_its_tables_is_refused(fleet: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken.openvino"
    shutil.copytree(fleet, broken)
    (broken / "tasks.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(ArtefactError, match=r"tasks\.safetensors"):
        load_artefact(broken)
    (broken / "tasks.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"tasks\.safetensors"):
        load_artefact(broken)
    with pytest.raises(ArtefactError, match="is no fleet"):
        Fleet(broken)


def test_an_artefact_with_fixed_tasks_is_no_live_fleet(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="is no fleet whose tasks can change"):
        Fleet(tmp_path / "model.safetensors")
