"""A race with the bundled skills: its stages, answers, weights and limits."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import to_array

from aoft_demo.actions import race as race_module
from aoft_demo.actions.race import LANES, MAX_SKILLS, raced_skills, run_race
from aoft_demo.actions.race_contestants import Batch, Contestant, mixed_batch
from aoft_demo.actions.race_following import follow_race
from aoft_demo.actions.race_models import model_path
from aoft_demo.actions.race_queue import Race, RaceQueue, RaceStoppedError
from aoft_demo.actions.race_stages import Preparing, Stage, Standing, Waiting
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.tasks.shared_fleet import SharedFleet, checkpoint_of, task_bytes
from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.checkpoints.opening import load
from aoft_deploy.data.images import read_image
from aoft_deploy.errors import ImageError, SettingError
from aoft_deploy.tuning.merging import merge


@pytest.fixture
def two_skills(session: Session) -> Session:
    """A session with two skills: one of its own, and one that the demo started with."""
    first, second, *others = session.tasks
    checkpoint = checkpoint_of(session.task(first), first)
    for name in (first, *others):
        session.remove(name)
    session.add(checkpoint, "mine")
    assert list(session.tasks) == [second, "mine"]
    return session


def finished(stages: list[Stage]) -> Standing:
    last = stages[-1]
    assert isinstance(last, Standing) and last.finished
    return last


@pytest.mark.slow
def test_a_race_compares_answers_and_weights(two_skills: Session) -> None:
    session, shared = two_skills, two_skills.shared
    pictures = list(shared.examples[:3])
    stages: list[Stage] = list(run_race(session, pictures, 4, Race(session)))
    result = finished(stages)

    steps = [stage.done for stage in stages if isinstance(stage, Preparing)]
    assert steps == list(range(5))
    bundled = next(name for name in session.tasks if name != "mine")
    assert result.skills == ("mine", bundled)  # the visitor's own first
    assert (result.per_skill, result.asked, result.pictures, result.own_skills) == (4, 4, 8, 2)
    assert tuple(lane.key for lane in result.lanes) == LANES
    rounds = {len(lane.laps.seconds) for lane in result.lanes}
    assert len(rounds) == 1 and rounds.pop() >= 1
    assert all(min(lane.laps.seconds) > 0 for lane in result.lanes)

    # The answers are those of separately merged models in float64.
    largest, found = 0.0, []
    for name in result.skills:
        file = checkpoint_of(session.task(name), name)
        model = merge(load(file)).double().eval()
        pixels = np.stack([shared.fleet.preprocessing(read_image(path)) for path in pictures])
        with torch.inference_mode():
            expected = model(torch.from_numpy(pixels).double()).numpy()
        answers = shared.fleet.predict(pixels, [session.task(name).key] * len(pictures))
        found.append(np.abs(np.stack([a.logits for a in answers]) - expected).max())
        largest = max(largest, float(np.abs(expected).max()))
    assert result.agreement is not None
    assert result.agreement.agreeing == 8
    assert result.agreement.largest == pytest.approx(largest, rel=1e-4)
    assert 0 < result.agreement.difference < 1e-4 and max(found) < 1e-4

    # Each contestant counts all weights that it holds.
    mixed, separate, peft = result.lanes
    own = sum(task_bytes(shared.fleet, session.task(name).classes) for name in result.skills)
    assert mixed.weights == shared.backbone_bytes + own
    files = [model_path(session, session.task(name)) for name in result.skills]
    arrays = [to_array(x) for file in files for x in onnx.load(file).graph.initializer]
    assert separate.weights == sum(array.nbytes for array in arrays)
    assert separate.weights > 1.9 * shared.backbone_bytes > peft.weights > mixed.weights / 1.5
    assert [file.parent.parent for file in files] == [session.folder, shared.folder]

    # A second race uses the models again, and deletes those that it does not need.
    before = [file.stat().st_mtime_ns for file in files]
    session.remove("mine")
    again = finished(list(run_race(session, pictures, 1, Race(session))))
    assert again.skills == (bundled,) and again.pictures == 1
    assert not files[0].exists() and files[1].stat().st_mtime_ns == before[1]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the merged models, whose export takes seconds."""

    def none(*arguments: object) -> Iterator[Preparing]:
        yield Preparing("Making a separate model", 1, 4)
        raise SettingError("no models here")

    monkeypatch.setattr(race_module, "_separate", none)


def without_checkpoints(session: Session) -> Session:
    """The session of a fleet whose file alone is known."""
    session.tasks = {name: replace(task, checkpoint=None) for name, task in session.tasks.items()}
    return session


def test_a_race_without_checkpoints_and_without_peft(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    race = Race(session)
    pictures = list(session.shared.examples)
    result = finished(list(run_race(without_checkpoints(session), pictures, 1, race)))
    mixed, separate, peft = result.lanes
    assert mixed.laps.seconds and not mixed.absent and result.agreement is None
    assert separate.absent == "The skills' checkpoints are needed to make separate models."
    assert peft.absent == "peft is not installed: run pip install 'aoft-deploy[peft]'."
    assert not separate.laps.seconds and not peft.laps.seconds


def test_a_slow_machine_gets_fewer_pictures(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    ticks = iter(range(10**6))

    def clock(step: float) -> Callable[[], float]:
        return lambda: step * next(ticks)

    raced: list[int] = []

    def recorded(fleet: object, keys: object, batch: Batch, weights: int) -> Contestant:
        raced.append(len(batch.skill))
        return mixed_batch(fleet, keys, batch, weights)  # type: ignore[arg-type]

    monkeypatch.setattr(race_module, "mixed_batch", recorded)
    without_checkpoints(session)
    pictures = list(session.shared.examples)
    for step, asked, given in ((0.3, 8, 8), (0.5, 8, 4), (2.0, 4, 1), (60.0, 1, 1)):
        stages: list[Stage] = list(run_race(session, pictures, asked, Race(session), clock(step)))
        result = finished(stages)
        assert (result.asked, result.per_skill) == (asked, given)
        assert result.lanes[0].laps.median == pytest.approx(step)
        assert raced[-1] == given * len(session.tasks)


def test_invalid_choices_are_refused(session: Session, tmp_path: Path) -> None:
    race, pictures = Race(session), list(session.shared.examples)
    for count in (0, 2, 10**9, "4", None):
        with pytest.raises(SettingError, match="Choose 1, 4, 8 pictures"):
            next(run_race(session, pictures, count, race))  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="no picture: choose one on the tab Ask"):
        next(run_race(session, [], 1, race))
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no picture")
    with pytest.raises(ImageError):
        list(run_race(session, [damaged], 1, race))
    for name in list(session.tasks):
        session.remove(name)
    with pytest.raises(SettingError, match="no skill: add one on the tab Skills"):
        next(run_race(session, pictures, 1, race))


def test_the_number_of_skills_is_limited(
    session: Session, shared: SharedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = names = list(session.tasks)
    assert raced_skills(session) == names
    own = {f"own {n}": replace(session.tasks[first], origin="added") for n in range(MAX_SKILLS + 4)}
    monkeypatch.setattr(session, "tasks", {**session.tasks, **own})
    assert raced_skills(session) == list(own)[:MAX_SKILLS]
    monkeypatch.setattr(session, "shared", replace(shared, backbone_bytes=900_000_000))
    assert raced_skills(session) == ["own 0", "own 1"]
    monkeypatch.setattr(session, "shared", replace(shared, backbone_bytes=9_000_000_000))
    assert raced_skills(session) == ["own 0"]
    session.tasks["own 0"] = replace(session.tasks["own 0"], checkpoint=None)
    assert raced_skills(session) == ["own 1"]


def test_a_stop_ends_a_race_at_once_and_lets_the_next_one_run(
    sessions: SessionRegistry, quick: None
) -> None:
    races, mine, other = RaceQueue(), sessions.get("a"), sessions.get("b")
    pictures = list(mine.shared.examples)
    blocking = races.enter(sessions.get("c"))
    race, next_one = (follow_race(races, who, pictures, 1) for who in (mine, other))
    assert (next(race), next(next_one)) == (Waiting(1), Waiting(2))
    races.stop(mine)
    with pytest.raises(RaceStoppedError):
        next(race)
    assert next(next_one) == Waiting(1)
    races.leave(blocking)
    assert isinstance(next(next_one), Preparing)
    with pytest.raises(SettingError, match="no models here"):
        list(next_one)


def test_a_page_that_is_closed_stops_its_race(sessions: SessionRegistry) -> None:
    races = RaceQueue()
    blocking = races.enter(sessions.get("a"))
    race = follow_race(races, sessions.get("b"), list(sessions.shared.examples), 1)
    assert next(race) == Waiting(1)
    (waiting,) = (each for each in races._races if each is not blocking)
    race.close()  # type: ignore[attr-defined]
    assert waiting.stopped


def test_a_race_that_has_ended_lets_the_next_one_run(
    sessions: SessionRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*arguments: object) -> Iterator[Preparing]:
        yield Preparing("a", 0, 1)

    monkeypatch.setattr("aoft_demo.actions.race_following.run_race", short)
    races = RaceQueue()
    assert list(follow_race(races, sessions.get("a"), [], 1)) == [Preparing("a", 0, 1)]
    assert races.ahead(races.enter(sessions.get("b"))) == 0


def test_a_stop_does_not_wait_for_the_present_step(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def slow(*arguments: object) -> Iterator[Preparing]:
        yield Preparing("a", 0, 2)
        ended.wait(20)
        yield Preparing("b", 1, 2)

    monkeypatch.setattr("aoft_demo.actions.race_following.run_race", slow)
    races = RaceQueue()
    race = follow_race(races, session, [], 1)
    assert next(race) == Preparing("a", 0, 2)
    races.stop(session)
    with pytest.raises(RaceStoppedError):
        next(race)
    ended.set()


def test_each_contestant_gets_its_own_laps(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    names = list(session.tasks)

    def contestant(seconds: float, weights: int) -> Contestant:
        def run() -> list[np.ndarray]:
            now[0] += seconds
            return [np.zeros(len(session.tasks[name].classes), np.float32) for name in names]

        return Contestant(run, weights)

    def separate(*arguments: object) -> Iterator[Preparing]:
        yield Preparing("Making a separate model", 1, 4)
        return contestant(2.0, 20)  # type: ignore[return-value]

    monkeypatch.setattr(race_module, "_mixed", lambda *_: contestant(1.0, 10))
    monkeypatch.setattr(race_module, "_separate", separate)
    monkeypatch.setattr(race_module, "_peft", lambda *_: contestant(3.0, 30))
    pictures = list(session.shared.examples)
    stages: list[Stage] = list(run_race(session, pictures, 1, Race(session), lambda: now[0]))
    result = finished(stages)
    shown = [(lane.key, lane.laps.seconds, lane.weights) for lane in result.lanes]
    assert shown == [
        ("mixed", (1.0,), 10),
        ("separate", (2.0,), 20),
        ("peft", (3.0,), 30),
    ]
    told = [stage for stage in stages if isinstance(stage, Standing)]
    assert [sum(bool(x.laps.seconds) for x in stage.lanes) for stage in told] == [1, 2, 3, 3]
    assert [stage.finished for stage in told] == [False, False, False, True]


def test_the_warm_up_compares_one_pass_with_the_separate_models(session: Session) -> None:
    first, second = (session.tasks[name] for name in list(session.tasks)[:2])
    logits = [np.arange(len(task.classes), dtype=np.float32) for task in (first, second, first)]
    others = [row.copy() for row in logits]
    others[1][-1] += 0.5
    others[2][0] += 9.0  # another decision
    batch = Batch(np.zeros((3, 3, 1, 1), np.float32), (0, 1, 0), 2)
    ran: list[str] = []

    def contestant(name: str, rows: list[np.ndarray]) -> Contestant:
        return Contestant(lambda: ran.append(name) or rows, 0)  # type: ignore[func-returns-value]

    entered = {"mixed": contestant("mixed", logits), "separate": contestant("separate", others)}
    entered["peft"] = contestant("peft", logits)
    agreement = race_module._warm_up(entered, batch, [first, second], Race(session))
    assert ran == ["mixed", "separate", "peft"] and agreement is not None
    assert (agreement.agreeing, agreement.difference, agreement.largest) == (2, 9.0, 9.0)
    del entered["separate"]
    assert race_module._warm_up(entered, batch, [first, second], Race(session)) is None


def test_all_contestants_have_the_same_threads(
    session: Session, shared: SharedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int | None] = []

    def load_one(path: Path, options: EngineOptions) -> None:
        given.append(options.threads)

    def peft(kind: object, weights: object, classes: int, batch: object, threads: int) -> None:
        given.extend([classes, threads])

    for name, stand_in in (
        ("merged_models", lambda *_: iter([Path("a.onnx")])),
        ("load_artefact", load_one),
        ("onnx_bytes", lambda _: 1),
        ("separate_models", lambda *_: None),
        ("peft_batch", peft),
    ):
        monkeypatch.setattr(race_module, name, stand_in)
    monkeypatch.setattr(session, "shared", replace(shared, threads=3))
    batch = Batch(np.zeros((1, 3, 1, 1), np.float32), (0,), 1)
    list(race_module._separate(session, ["a"], batch, Race(session)))
    tasks = list(session.tasks.values())
    race_module._peft(session, tasks, batch)
    assert given == [3, max(len(task.classes) for task in tasks), 3]
