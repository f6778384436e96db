"""Training in the page, without the page."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aoft_demo.actions.train import EFFORTS, LEAST, MOST, plan, run, write_pictures, write_task
from aoft_demo.tasks.shared_fleet import Stage, open_stage
from aoft_demo.tasks.training_queue import MOST_WAITING, Line, Training
from aoft_deploy.cli.train_options import parser
from aoft_deploy.data.folder import load_folder
from aoft_deploy.data.images import read_size
from aoft_deploy.errors import DataError, ImageError, SettingError, UnknownNameError


@pytest.fixture(scope="module")
def stage(
    fleet_artefact: Path,
    fleet_tasks: dict[str, Path],
    backbone_weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Stage:
    folder = tmp_path_factory.mktemp("stage")
    return open_stage([fleet_artefact], folder, weights=backbone_weights, threads=1)


def pictures(folder: Path, make: Callable[..., Image.Image], count: int = LEAST) -> list[Path]:
    folder.mkdir()
    for i in range(count):
        make(40, 30, seed=i).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def test_uploaded_pictures_become_a_folder_of_classes(
    tmp_path: Path, make_picture: Callable[..., Image.Image]
) -> None:
    files = pictures(tmp_path / "up", make_picture, 4)
    write_pictures([("red", files), ("", []), (" two  words", files)], tmp_path / "data")
    splits = load_folder(tmp_path / "data")
    assert splits.classes == ("red", "two words")
    assert len(splits.train) == 4 and len(splits.val) == 2


def test_large_pictures_are_stored_smaller(tmp_path: Path) -> None:
    Image.new("RGB", (2000, 1000)).save(tmp_path / "large.png")
    files = [tmp_path / "large.png"] * LEAST
    write_pictures([("a", files), ("b", files)], tmp_path / "data")
    assert read_size(tmp_path / "data" / "a" / "000.png") == (512, 256)


def test_pictures_that_cannot_train_a_task_are_refused(
    tmp_path: Path, make_picture: Callable[..., Image.Image]
) -> None:
    files, data = pictures(tmp_path / "up", make_picture), tmp_path / "data"
    with pytest.raises(DataError, match="needs two classes"):
        write_pictures([("a", files)], data)
    with pytest.raises(DataError, match="Class 'b' has 2 pictures: give 3 to 200"):
        write_pictures([("a", files), ("b", files[:2])], data)
    with pytest.raises(DataError, match=f"Class 'b' has {MOST + 1} pictures"):
        write_pictures([("a", files), ("b", files[:1] * (MOST + 1))], data)
    with pytest.raises(SettingError, match="Class 2 has pictures but no name"):
        write_pictures([("a", files), (" ", files)], data)
    with pytest.raises(SettingError, match="Two classes are called 'a'"):
        write_pictures([("a", files), ("a ", files)], data)
    with pytest.raises(SettingError, match="'Train' and 'Testing' look like parts of a data set"):
        write_pictures([("Train", files), ("Testing", files)], data)
    odd = tmp_path / "odd.png"
    odd.write_bytes(b"odd")
    with pytest.raises(ImageError, match=r"odd\.png"):
        write_pictures([("a", files), ("b", [*files[:2], odd])], data)


def test_a_drawn_task_is_that_of_the_library(tmp_path: Path) -> None:
    write_task("shape", 30, 0, tmp_path / "data")
    splits = load_folder(tmp_path / "data")
    assert len(splits.train) == 30 and "triangle" in splits.classes
    with pytest.raises(UnknownNameError, match="task 'shapes'"):
        write_task("shapes", 30, 0, tmp_path / "other")


def test_the_command_is_one_that_anyone_could_type(stage: Stage, tmp_path: Path) -> None:
    write_task("shape", 60, 0, tmp_path / "data")
    words, epochs = plan(stage, tmp_path / "data", tmp_path / "run", "normal")
    options = parser().parse_args(words)
    assert dict(options.set) == dict(stage.fleet.kind.settings)
    assert options.method == stage.fleet.kind.method and options.img_size == 16
    assert options.epochs == epochs == 40 and options.batch_size == 8
    write_task("shape", 500, 0, tmp_path / "many")
    words, epochs = plan(stage, tmp_path / "many", tmp_path / "run", "quick")
    assert epochs == EFFORTS["quick"] / 500


def test_a_fleet_without_its_manifest_cannot_be_added_to(
    fleet_artefact: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "fleet.onnx"
    alone.write_bytes(fleet_artefact.read_bytes())
    stage = open_stage([alone], tmp_path, threads=1)
    with pytest.raises(SettingError, match="The fleet's manifest is missing"):
        plan(stage, tmp_path, tmp_path / "run", "quick")


def test_a_training_that_fails_says_why(tmp_path: Path) -> None:
    arguments = ["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]
    with pytest.raises(SettingError, match="Training failed: Unknown folder or task"):
        list(run(arguments, tmp_path / "run", 3, Training()))


def test_a_training_can_be_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    original = subprocess.Popen

    def popen(*arguments: Any, **more: Any) -> subprocess.Popen[bytes]:
        started.append(original(*arguments, **more))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    write_task("shape", 60, 0, tmp_path / "data")
    arguments = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    training = Training()
    steps = run(arguments, tmp_path / "run", 20, training)
    assert next(steps).lines == ()
    training.stop()
    assert started[0].poll() is not None  # before anyone asks for the next step
    with pytest.raises(SettingError, match="Training was stopped; nothing was added"):
        list(steps)
    assert started[0].poll() is not None


def test_a_training_that_nobody_follows_ends_too(tmp_path: Path) -> None:
    write_task("shape", 60, 0, tmp_path / "data")
    arguments = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    training = Training()
    steps: Any = run(arguments, tmp_path / "run", 20, training)
    next(steps)
    steps.close()  # as Gradio lets go of a visitor who has left
    assert training.stopped and training.wait(0) is not None


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)"])
print(child.pid, file=open(sys.argv[1], "w"), flush=True)
time.sleep(999)
"""


def test_a_process_that_does_not_listen_is_ended_with_its_children(tmp_path: Path) -> None:
    training, told = Training(), tmp_path / "child"
    training.start([sys.executable, "-c", STUBBORN, str(told)], tmp_path / "log")
    while not (told.is_file() and told.read_text().strip()):
        assert training.wait(0.05) is None
    child = int(told.read_text())
    training.stop()
    assert training.wait(0) == -9
    status, end = Path(f"/proc/{child}/status"), time.monotonic() + 60
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < end  # nothing else would end it
        time.sleep(0.01)


def test_what_was_stopped_before_its_turn_does_not_start(tmp_path: Path) -> None:
    training = Training()
    training.stop()
    with pytest.raises(SettingError, match="Training was stopped; nothing was added"):
        training.start([sys.executable, "-c", "open('started', 'w')"], tmp_path / "log")
    with pytest.raises(SettingError, match="Training was stopped"):
        write_pictures([("a", [tmp_path] * 3), ("b", [tmp_path] * 3)], tmp_path, training.go_on)


def test_trainings_take_turns_and_those_that_were_stopped_hold_up_nobody() -> None:
    line, one, two, three = Line(), Training(), Training(), Training()
    with line.place(one):
        assert line.is_first(one)
        with line.place(two), line.place(three):
            assert [line.is_first(t) for t in (one, two, three)] == [True, False, False]
            two.stop()
            one.stop()  # its visitor has left, and nobody asks for its next step
            assert line.is_first(three)
    with line.place(one), line.place(Training()):
        pass


def test_the_line_has_an_end() -> None:
    from contextlib import ExitStack

    line = Line()
    with ExitStack() as places:
        for _ in range(MOST_WAITING + 1):
            places.enter_context(line.place(Training()))
        with pytest.raises(SettingError, match=f"{MOST_WAITING} trainings are waiting"):
            places.enter_context(line.place(Training()))
    with line.place(Training()):
        pass
