"""A race between ways to answer pictures of many skills, measured on this machine.

Three contestants take turns: one mixed batch of the fleet, a merged model for each skill one after
the other, and the mixed batch of PEFT.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aoft_demo.actions.pictures import read_picture
from aoft_demo.actions.race_contestants import (
    Batch,
    Contestant,
    lora_rank,
    mixed_batch,
    onnx_bytes,
    peft_batch,
    separate_models,
)
from aoft_demo.actions.race_models import merged_models
from aoft_demo.actions.race_queue import Race
from aoft_demo.actions.race_stages import Agreement, Lane, Preparing, Standing
from aoft_demo.actions.race_timing import laps_in_turn
from aoft_demo.tasks.session import NO_TASK, Session, own_first
from aoft_demo.tasks.shared_fleet import Task, task_bytes
from aoft_deploy.artefacts.engine import Engine, EngineOptions
from aoft_deploy.artefacts.machine import machine
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.errors import AoftError, SettingError

__all__ = ["LANES", "MAX_SKILLS", "PER_SKILL", "raced_skills", "run_race"]

LANES = ("mixed", "separate", "peft")
"""The contestants: one pass, a model for each skill, and PEFT."""

MAX_SKILLS = 16
"""Skills that take part in a race at most."""

MAX_MODELS = 2_000_000_000
"""Bytes of all merged models of a race at most."""

PER_SKILL = (1, 4, 8)
"""Choices for the pictures of each skill."""

LONGEST_PASS = 2.5
"""Seconds of one pass above which each skill gets fewer pictures."""

REST = 0.02
"""Seconds before each run, in which the threads of the contestant before fall asleep."""

Clock = Callable[[], float]
"""Time in seconds."""


def raced_skills(session: Session) -> list[str]:
    """Names of the skills that take part: the visitor's own first, and those with a checkpoint.

    If no skill has a checkpoint, all take part without separate models.

    Raises:
        SettingError: There is no skill.
    """
    tasks = own_first(session.tasks)
    if not tasks:
        raise SettingError(NO_TASK)
    with_file = [name for name, task in tasks.items() if task.checkpoint is not None]
    room = max(1, MAX_MODELS // max(1, session.shared.backbone_bytes))
    return (with_file or list(tasks))[: min(MAX_SKILLS, room)]


def run_race(
    session: Session,
    pictures: Sequence[Path],
    per_skill: int,
    race: Race,
    clock: Clock = time.perf_counter,
) -> Iterator[Preparing | Standing]:
    """Prepare the contestants and let them run in turn; yield what is new.

    Args:
        session: The visitor's session.
        pictures: Files of pictures; those that the batch has no room for are not read.
        per_skill: Pictures for each skill, one of ``PER_SKILL``.
        race: The race, which may be stopped.
        clock: Time in seconds.

    Raises:
        AoftError: The race was stopped, has no skill or picture, or cannot be prepared.
    """
    if per_skill not in PER_SKILL:
        raise SettingError(f"Choose {', '.join(map(str, PER_SKILL))} pictures for each skill.")
    if not pictures:
        raise SettingError("There is no picture: choose one on the tab Ask first.")
    names = raced_skills(session)
    steps = len(names) + 3
    with ExitStack() as stack:
        tasks = [stack.enter_context(session.using(name)) for name in names]
        yield Preparing("Reading the pictures", 0, steps)
        rows = _rows(session, pictures[: len(names) * per_skill])
        count = _affordable(session, tasks, rows, per_skill, clock)
        batch = Batch.of(rows, len(names), count)
        entered, absent = {"mixed": _mixed(session, tasks, batch)}, {}
        if tasks[0].checkpoint is None:
            absent["separate"] = "The skills' checkpoints are needed to make separate models."
        else:
            entered["separate"] = yield from _separate(session, names, batch, race)
        yield Preparing("Opening PEFT", steps - 2, steps)
        race.check_not_stopped()
        try:
            entered["peft"] = _peft(session, tasks, batch)
        except AoftError as error:
            absent["peft"] = str(error)
        except ValueError:
            absent["peft"] = "PEFT cannot change the layers of this backbone."
        yield Preparing("Warming up", steps - 1, steps)
        standing = Standing(
            skills=tuple(names),
            own_skills=len(session.tasks),
            per_skill=count,
            asked=per_skill,
            lanes=tuple(
                Lane(key, weights=entered[key].weights)
                if key in entered
                else Lane(key, absent=absent[key])
                for key in LANES
            ),
            agreement=_warm_up(entered, batch, tasks, race),
            rank=lora_rank(session.shared.fleet.kind.settings),
            processor=machine(None)["processor"],
            threads=session.shared.threads,
        )
        runs = [contestant.run for contestant in entered.values()]
        for laps in laps_in_turn(runs, clock, lambda: race.pause(REST)):
            by_key = dict(zip(entered, laps, strict=True))
            lanes = (replace(lane, laps=by_key.get(lane.key, lane.laps)) for lane in standing.lanes)
            standing = replace(standing, lanes=tuple(lanes))
            yield standing
        yield replace(standing, finished=True)


def _rows(session: Session, files: Sequence[Path]) -> NDArray[np.float32]:
    """The pictures as the fleet takes them, float32 (pictures, 3, H, W)."""
    preprocessing = session.shared.fleet.preprocessing
    side = max(preprocessing.height, preprocessing.width)
    return np.stack([preprocessing(read_picture(file, side).image) for file in files])


def _affordable(
    session: Session,
    tasks: Sequence[Task],
    rows: NDArray[np.float32],
    asked: int,
    clock: Clock,
) -> int:
    """Pictures for each skill such that a pass takes at most ``LONGEST_PASS``; at least 1."""
    contestant = _mixed(session, tasks, Batch.of(rows, len(tasks), 1))
    contestant.run()
    start = clock()
    contestant.run()
    seconds = clock() - start
    fitting = [count for count in PER_SKILL if count <= asked and count * seconds <= LONGEST_PASS]
    return max(fitting, default=1)


def _mixed(session: Session, tasks: Sequence[Task], batch: Batch) -> Contestant:
    shared = session.shared
    weights = sum(task_bytes(shared.fleet, task.classes) for task in tasks)
    keys = [task.key for task in tasks]
    return mixed_batch(shared.fleet, keys, batch, shared.backbone_bytes + weights)


def _separate(
    session: Session, names: Sequence[str], batch: Batch, race: Race
) -> Generator[Preparing, None, Contestant]:
    """Export and open the merged models; yield what is being done."""
    engines: list[Engine] = []
    weights, models = 0, merged_models(session, names)
    for i, name in enumerate(names):
        yield Preparing(f"Making a separate model of “{name}”", 1 + i, len(names) + 3)
        race.check_not_stopped()
        path = next(models)
        engines.append(load_artefact(path, EngineOptions(threads=session.shared.threads)))
        weights += onnx_bytes(path)
    return separate_models(engines, weights, batch)


def _peft(session: Session, tasks: Sequence[Task], batch: Batch) -> Contestant:
    shared, classes = session.shared, max(len(task.classes) for task in tasks)
    return peft_batch(shared.fleet.kind, shared.weights, classes, batch, shared.threads)


def _warm_up(
    entered: Mapping[str, Contestant], batch: Batch, tasks: Sequence[Task], race: Race
) -> Agreement | None:
    """Let each contestant run once, and compare the first two, if there are two."""
    rows = {}
    for key, contestant in entered.items():
        race.check_not_stopped()
        rows[key] = contestant.run()
    if "separate" not in rows:
        return None
    pairs = list(zip(rows["mixed"], rows["separate"], batch.skill, strict=True))
    alike = [tasks[i].classes.agreeing(mixed[None], apart[None]) for mixed, apart, i in pairs]
    return Agreement(
        largest=max(float(np.abs(apart).max()) for _, apart, _ in pairs),
        difference=max(float(np.abs(mixed - apart).max()) for mixed, apart, _ in pairs),
        agreeing=sum(bool(decision.all()) for decision in alike),
    )
