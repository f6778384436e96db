"""All sessions, by the keys that Gradio gives them."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import SharedFleet
from aoft_demo.tasks.training_queue import TrainingQueue
from aoft_deploy.errors import SettingError

__all__ = ["IDLE", "SessionRegistry"]

IDLE = 3600.0
"""Seconds without a request after which a session ends."""


class SessionRegistry:
    """All sessions. Safe to use from any thread.

    Args:
        shared: The fleet that the sessions share.
        clock: Time in seconds.

    Attributes:
        shared: The fleet that the sessions share.
        queue: The queue of all sessions' trainings.
    """

    def __init__(self, shared: SharedFleet, clock: Callable[[], float] = time.monotonic) -> None:
        self.shared, self._clock = shared, clock
        self.queue = TrainingQueue()
        self._closed = False
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: str | None) -> Session:
        """The session of a key, created if there is none. Idle sessions end.

        Raises:
            SettingError: The registry is closed.
        """
        key, now = key or "", self._clock()
        with self._lock:
            if self._closed:
                raise SettingError("The demo has ended: start it again.")
            idle = [k for k, s in self._sessions.items() if now - s.last_active > IDLE and k != key]
            ending = [self._sessions.pop(k) for k in idle]
            if key not in self._sessions:
                folder = Path(tempfile.mkdtemp(prefix="session-", dir=self.shared.folder))
                self._sessions[key] = Session(self.shared, folder.name, folder, now)
            session = self._sessions[key]
            session.last_active = now
        for other in ending:
            other.end()
        return session

    def end(self, key: str | None) -> None:
        """End a session; an unknown key is ignored."""
        with self._lock:
            session = self._sessions.pop(key or "", None)
        if session is not None:
            session.end()

    def close(self) -> None:
        """End all sessions and create no new ones."""
        with self._lock:
            self._closed = True
            sessions, self._sessions = list(self._sessions.values()), {}
        for session in sessions:
            session.end()
        self.queue.trainers.close()
