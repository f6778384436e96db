"""A session: its tasks in the shared fleet, and what remains when it ends."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aoft_demo.actions.classify import classify
from aoft_demo.tasks.session import MAX_REMOVED, MAX_TASKS, ON_AT_FIRST, Session, task_name
from aoft_demo.tasks.shared_fleet import BUNDLED, SharedFleet, bundled_checkpoints
from aoft_deploy.errors import CheckpointError, SettingError, UnknownNameError

PICTURE = BUNDLED / "star.jpg"


@pytest.mark.parametrize("text", ["", " ", "../x", "a/b", "x" * 41, ".hidden", "a\0b", "<b>"])
def test_invalid_names_are_refused(text: str) -> None:
    with pytest.raises(SettingError, match="A task's name has 1 to 40"):
        task_name(text)


def test_the_number_of_added_tasks_is_limited(session: Session) -> None:
    for number in range(MAX_TASKS):
        session.add(BUNDLED / "shape.ckpt", f"task {number}")
    with pytest.raises(SettingError, match=f"You have added {MAX_TASKS} tasks, which is the limit"):
        session.add(BUNDLED / "shape.ckpt", "one more")


def test_unusable_checkpoints_are_refused(
    session: Session, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="was trained on backbone weights"):
        session.add(make_checkpoint("aoft-lora-star"), "other")
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes((BUNDLED / "shape.ckpt").read_bytes()[:20_000])
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        session.add(cut, "cut")
    assert session.tasks.keys() == session.shared.tasks.keys()


def test_a_task_whose_copy_cannot_be_written_is_not_in_the_fleet(session: Session) -> None:
    before = set(session.shared.fleet.names)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as on a full disk
    try:
        with pytest.raises(OSError, match="too large"):
            session.add(BUNDLED / "shape.ckpt", "mine")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(session.folder.iterdir())
    assert set(session.shared.fleet.names) == before
    assert session.tasks.keys() == session.shared.tasks.keys()


def test_a_training_reserves_the_name_of_its_task(session: Session) -> None:
    with session.training(" mine ") as training:
        for again in (
            lambda: session.add(BUNDLED / "shape.ckpt", "mine"),
            start_training(session),
        ):
            with pytest.raises(SettingError, match="A task 'mine' is being trained"):
                again()
        name, task = session.add_trained(training, BUNDLED / "shape.ckpt")
        assert (name, task.origin) == ("mine", "trained") and session.tasks["mine"] is task
    with pytest.raises(SettingError, match="There is a task 'mine' already"):
        start_training(session)()
    session.remove("mine")
    session.add(BUNDLED / "shape.ckpt", "mine")


def start_training(session: Session) -> Callable[[], None]:
    """A function that starts a training of the task ``mine``, which must be refused."""

    def start() -> None:
        with session.training("mine"):
            raise AssertionError("two trainings have the same name")

    return start


def test_an_ended_session_adds_nothing(session: Session) -> None:
    before = set(session.shared.fleet.names)
    with session.training("learnt") as training:
        session.end()
        assert training.stopped
        with pytest.raises(SettingError, match="Training was stopped"):
            session.add_trained(training, BUNDLED / "shape.ckpt")
    with pytest.raises(SettingError, match="This page has ended: reload it"):
        session.add(BUNDLED / "shape.ckpt", "mine")
    assert set(session.shared.fleet.names) == before
    assert not session.folder.exists()


def test_a_task_that_is_removed_while_in_use_is_reported_by_its_own_name(
    session: Session,
) -> None:
    fleet = session.shared.fleet
    size = fleet.preprocessing.height
    session.add(BUNDLED / "shape.ckpt", "mine")
    with (
        pytest.raises(UnknownNameError, match=r"Unknown task 'mine'\. Known: colour") as refusal,
        session.using("mine") as task,
    ):
        session.remove("mine")
        fleet.predict(np.zeros((1, 3, size, size), np.float32), [task.key])
    assert session.folder.name not in str(refusal.value)
    session.add(BUNDLED / "shape.ckpt", "mine")
    with (
        pytest.raises(CheckpointError, match="Task 'mine' was replaced in the meantime: try"),
        session.using("mine") as task,
    ):
        session.remove("mine")
        session.add(BUNDLED / "colour.ckpt", "mine")
        fleet.predict(np.zeros((1, 3, size, size), np.float32), [task.key])
    with pytest.raises(ZeroDivisionError), session.using("shape"):
        _ = 1 / 0


def test_labels_and_logits_are_of_the_same_version_while_a_task_is_replaced(
    session: Session,
) -> None:
    versions = {}
    for name in ("shape", "colour"):
        versions[name] = dict(classify(session, PICTURE, [name], top=20).predictions[name])
    session.add(BUNDLED / "shape.ckpt", "mine")
    ended = threading.Event()

    def exchange() -> None:
        for i in range(60):
            session.remove("mine")
            session.add(BUNDLED / f"{('colour', 'shape')[i % 2]}.ckpt", "mine")
        ended.set()

    replacing = threading.Thread(target=exchange)
    replacing.start()
    answered = 0
    while not ended.is_set() or not answered:
        try:
            answer = dict(classify(session, PICTURE, ["mine"], top=20).predictions["mine"])
        except (UnknownNameError, CheckpointError) as error:
            assert str(error).startswith(("Unknown task 'mine'.", "Task 'mine' was replaced"))
            continue
        answered += 1
        assert any(answer == pytest.approx(version, abs=1e-5) for version in versions.values())
    replacing.join()


def test_a_removed_task_comes_back_at_its_place(session: Session) -> None:
    checkpoint = bundled_checkpoints()[0]
    first, *others = session.tasks
    task = session.add(checkpoint, "mine")
    session.switch("mine", False)
    session.remove("mine")
    session.remove(first)
    assert session.removed == first and task.key not in session.shared.fleet
    assert session.restore() == first and list(session.tasks) == [first, *others]
    session.add(checkpoint, "mine")  # takes the name, but not the switch
    assert "mine" in session.on
    assert session.restore() == "mine 2" and session.removed is None
    assert task.key in session.shared.fleet and "mine 2" not in session.on and "mine" in session.on
    with pytest.raises(SettingError, match="No task was removed"):
        session.restore()
    for _ in range(MAX_REMOVED + 1):
        session.remove("mine 2")
        session.add(checkpoint, "mine 2")
    assert len(list(session.folder.glob("*/*.ckpt"))) == MAX_REMOVED + 2  # the oldest is deleted


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("pets", "pets"),
        ("<b>pets</b>", "b pets b"),
        ("..", "task"),
        ("x" * 60, "x" * 34),
        ("тест 1", "тест 1"),
    ],
)
def test_a_files_name_becomes_a_valid_and_free_name(
    session: Session, wanted: str, name: str
) -> None:
    assert session.free_name(wanted) == name == task_name(name)
    session.add(bundled_checkpoints()[0], name)
    assert session.free_name(wanted) == f"{name} 2" == task_name(f"{name} 2")


def test_what_a_visitor_changes_makes_the_session_old(session: Session) -> None:
    name = next(iter(session.tasks))
    assert session.is_new
    session.switch(name, False)
    assert not session.is_new and name not in session.on
    session.switch(name, True)
    assert session.is_new and name in session.on
    session.picture = PICTURE
    assert not session.is_new
    session.picture = None
    session.add(bundled_checkpoints()[0], "mine")
    session.remove("mine")
    assert not session.is_new and session.removed == "mine"  # Undo must survive a reload
    with pytest.raises(UnknownNameError):
        session.switch("nothing", True)


def test_only_the_first_tasks_are_on_at_first(session: Session, shared: SharedFleet) -> None:
    many = {f"task {n}": shared.tasks["shape"] for n in range(ON_AT_FIRST + 2)}
    new = Session(replace(shared, tasks=many), "many", session.folder, 0.0)
    assert new.on == list(many)[:ON_AT_FIRST] and new.is_new


def test_files_of_initial_tasks_are_never_deleted(session: Session, tmp_path: Path) -> None:
    """The files of the tasks that all sessions share are not the session's own."""
    file = tmp_path / "task" / "model.ckpt"
    file.parent.mkdir()
    file.touch()
    shared = session.tasks["shape"]
    names = [f"task {number}" for number in range(MAX_REMOVED + 1)]
    session.tasks = {name: replace(shared, checkpoint=file) for name in names}
    for name in names:
        session.remove(name)
    assert file.exists() and shared.key in session.shared.fleet


def test_running_trainings_and_tasks_that_come_back_count_against_the_limit(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aoft_demo.tasks.session.MAX_TASKS", 2)
    session.add(BUNDLED / "shape.ckpt", "one")
    with session.training("two"):
        with pytest.raises(SettingError, match="You have added 2 tasks, which is the limit"):
            session.add(BUNDLED / "shape.ckpt", "three")
        assert session.free_name("two") == "two 2"
    session.remove("one")
    for name in ("three", "four"):
        session.add(BUNDLED / "shape.ckpt", name)
    with pytest.raises(SettingError, match="You have added 2 tasks, which is the limit"):
        session.restore()
    session.remove("four")
    assert session.restore() == "four" and session.removed == "one"  # nothing was lost


def test_an_ended_session_leaves_no_trained_task_in_the_fleet(session: Session) -> None:
    before = set(session.shared.fleet.names)
    session.add(BUNDLED / "shape.ckpt", "removed")
    session.remove("removed")
    with session.training("taught") as training:
        session.add_trained(training, BUNDLED / "shape.ckpt")
    assert set(session.shared.fleet.names) != before
    session.end()
    assert set(session.shared.fleet.names) == before
    with pytest.raises(SettingError, match="No task was removed"):
        session.restore()
