"""The races of all visitors, one at a time, and how to stop one."""

from __future__ import annotations

import threading

from aoft_demo.tasks.session import Session
from aoft_deploy.errors import SettingError

__all__ = ["MAX_WAITING", "Race", "RaceQueue", "RaceStoppedError"]

MAX_WAITING = 12
"""Races that may wait; each one blocks a thread."""


class RaceStoppedError(SettingError):
    """The race was stopped, or its session has ended."""


class Race:
    """A visitor's race, from the click on. Any thread may stop it.

    Args:
        session: The visitor's session.

    Attributes:
        session: The visitor's session.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._stopped = threading.Event()

    @property
    def stopped(self) -> bool:
        """Whether the race was stopped, or its session has ended."""
        return self._stopped.is_set() or self.session.ended

    def stop(self) -> None:
        """Stop the race; a step that runs in a thread ends by itself."""
        self._stopped.set()

    def check_not_stopped(self) -> None:
        """Raise an error if the race was stopped.

        Raises:
            RaceStoppedError: It was stopped.
        """
        if self.stopped:
            raise RaceStoppedError("You stopped the race. Press Start for another one.")

    def pause(self, seconds: float) -> None:
        """Wait, or until the race is stopped.

        Raises:
            RaceStoppedError: It was stopped.
        """
        self._stopped.wait(seconds)
        self.check_not_stopped()


class RaceQueue:
    """The order in which races run. Safe to use from any thread."""

    def __init__(self) -> None:
        self._races: list[Race] = []
        self._lock = threading.Lock()

    def enter(self, session: Session) -> Race:
        """A new race at the end of the queue.

        Raises:
            SettingError: The session has a race already, or the queue is full.
        """
        with self._lock:
            if any(race.session is session and not race.stopped for race in self._races):
                raise SettingError("Your race is running already: wait for it, or stop it.")
            if len(self._races) > MAX_WAITING:
                raise SettingError(f"{MAX_WAITING} races are waiting: try again later.")
            race = Race(session)
            self._races.append(race)
        return race

    def leave(self, race: Race) -> None:
        """Take a race out of the queue when it has ended."""
        with self._lock:
            self._races = [other for other in self._races if other is not race]

    def ahead(self, race: Race) -> int:
        """Number of races that must end before this one starts.

        A stopped race counts as long as its present step runs, since it still uses the processor.
        """
        with self._lock:
            return self._races.index(race)

    def stop(self, session: Session) -> None:
        """Stop the session's race, if there is one."""
        with self._lock:
            for race in self._races:
                if race.session is session:
                    race.stop()
