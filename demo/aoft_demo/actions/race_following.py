"""A race in a thread of its own, so that a stop takes effect at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from aoft_demo.actions.race import run_race
from aoft_demo.actions.race_queue import RaceQueue
from aoft_demo.actions.race_stages import Stage, Waiting
from aoft_demo.tasks.session import Session

__all__ = ["follow_race"]


def follow_race(
    races: RaceQueue, session: Session, pictures: Sequence[Path], per_skill: int
) -> Iterator[Stage]:
    """Wait for earlier races, and run one in a thread; yield what is new.

    A stop ends the iteration at once. A step that has begun ends in the background, and the next
    race waits for it.

    Args:
        races: The races of all visitors.
        session: The visitor's session.
        pictures: Files of pictures.
        per_skill: Pictures for each skill, one of ``PER_SKILL``.

    Raises:
        AoftError: The race was stopped, has no skill or picture, or cannot be prepared.
    """
    race = races.enter(session)
    news: queue.SimpleQueue[Stage | Exception | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            ahead = 0
            while count := races.ahead(race):
                if count != ahead:
                    news.put(Waiting(ahead := count))
                race.pause(0.1)
            for stage in run_race(session, pictures, per_skill, race):
                news.put(stage)
        except Exception as error:
            news.put(error)
        finally:
            races.leave(race)
            news.put(None)

    threading.Thread(target=work, name="race", daemon=True).start()
    try:
        while True:
            race.check_not_stopped()
            try:
                stage = news.get(timeout=0.1)
            except queue.Empty:
                continue
            if stage is None:
                return
            if isinstance(stage, Exception):
                raise stage
            yield stage
    finally:
        race.stop()
