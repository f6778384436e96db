"""Training with aoft-train in a subprocess."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from aoft_demo.actions.train import EFFORTS, run_training, training_arguments
from aoft_demo.actions.training_data import write_synthetic_task
from aoft_demo.tasks.shared_fleet import SharedFleet, open_shared_fleet
from aoft_demo.tasks.training_queue import Training
from aoft_deploy.cli.train_options import parser
from aoft_deploy.errors import SettingError


@pytest.fixture(scope="module")
def shared(  # of random weights, in place of the bundled tasks
    fleet_artefact: Path,
    fleet_tasks: dict[str, Path],
    backbone_weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> SharedFleet:
    folder = tmp_path_factory.mktemp("shared")
    return open_shared_fleet([fleet_artefact], folder, weights=backbone_weights, threads=1)


def test_the_arguments_match_the_fleet_and_the_number_of_pictures(
    shared: SharedFleet, tmp_path: Path
) -> None:
    write_synthetic_task("shape", 60, 0, tmp_path / "data")
    arguments, epochs = training_arguments(shared, tmp_path / "data", tmp_path / "run", "normal")
    options = parser().parse_args(arguments)
    assert dict(options.set) == dict(shared.fleet.kind.settings)
    assert options.method == shared.fleet.kind.method and options.img_size == 16
    assert options.epochs == epochs == 40 and options.batch_size == 8
    write_synthetic_task("shape", 500, 0, tmp_path / "many")
    arguments, epochs = training_arguments(shared, tmp_path / "many", tmp_path / "run", "quick")
    assert epochs == EFFORTS["quick"] / 500


def test_a_fleet_without_a_manifest_cannot_be_trained_for(
    fleet_artefact: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "fleet.onnx"
    alone.write_bytes(fleet_artefact.read_bytes())
    shared = open_shared_fleet([alone], tmp_path, threads=1)
    with pytest.raises(SettingError, match="The fleet's manifest is missing"):
        training_arguments(shared, tmp_path, tmp_path / "run", "quick")


def test_a_failed_training_reports_the_commands_error(tmp_path: Path) -> None:
    arguments = ["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]
    with pytest.raises(SettingError, match=r"Training failed: Data folder .* does not exist"):
        list(run_training(arguments, tmp_path / "run", 3, Training()))


def test_a_running_training_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    original = subprocess.Popen

    def popen(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(original(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    write_synthetic_task("shape", 60, 0, tmp_path / "data")
    arguments = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    training = Training()
    steps = run_training(arguments, tmp_path / "run", 20, training)
    assert next(steps).lines == ()
    training.stop()
    assert started[0].poll() is not None  # before the next step is requested
    with pytest.raises(SettingError, match="Training was stopped; nothing was added"):
        list(steps)
    assert started[0].poll() is not None


def test_a_training_ends_when_its_iterator_is_closed(tmp_path: Path) -> None:
    write_synthetic_task("shape", 60, 0, tmp_path / "data")
    arguments = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    training = Training()
    steps: Any = run_training(arguments, tmp_path / "run", 20, training)
    next(steps)
    steps.close()  # as Gradio does when the browser disconnects
    assert training.stopped and training.wait(0) is not None
