"""All sessions: by the page that is open, and by the key that a browser tab keeps."""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import SharedFleet
from aoft_demo.tasks.training_queue import TrainingQueue
from aoft_deploy.errors import SettingError

__all__ = ["GRACE", "IDLE", "MAX_SESSIONS", "SessionRegistry"]

IDLE = 3600.0
"""Seconds without a request after which a session ends."""

GRACE = 300.0
"""Seconds after which a session ends whose pages were all closed; a reload takes less."""

MAX_SESSIONS = 256
"""Sessions at a time."""

KEY = re.compile(r"[0-9a-f]{32}")
"""128 random bits, which the browser tab keeps."""


class SessionRegistry:
    """All sessions. Safe to use from any thread.

    A page is one load of the page in a browser tab. A tab's key names its session: it is attached
    to the page that is loaded next. A duplicated tab has the same key and so the same session.

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
        self._pages: dict[str, Session] = {}
        self._kept: dict[str, Session] = {}
        self._left: dict[Session, float] = {}
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions())

    def get(self, page: str | None) -> Session:
        """The session of a page, created if there is none. Idle sessions end.

        Raises:
            SettingError: The registry is closed, or there are too many sessions.
        """
        return self._session(page or "", None)

    def attach(self, page: str | None, key: object) -> Session:
        """The session of a page that has just been loaded: that of its tab's key, or a new one.

        A key that no tab makes is ignored.

        Raises:
            SettingError: The registry is closed, or there are too many sessions.
        """
        valid = key if isinstance(key, str) and KEY.fullmatch(key) else None
        return self._session(page or "", valid)

    def leave(self, page: str | None) -> None:
        """A page was closed: its session ends in a while, or at once if no key can find it.

        Its trainings stop at once, since no page follows them any more.
        """
        with self._lock:
            session = self._pages.pop(page or "", None)
            if session is None or session in self._pages.values():
                return
            if session in self._kept.values():
                self._left[session] = self._clock()
                self._start_timer()
                end = session.stop_trainings
            else:
                end = session.end
        end()

    def sweep(self) -> None:
        """End the sessions that are idle, and those whose pages were closed a while ago."""
        now = self._clock()
        with self._lock:
            ending = [session for session in self._sessions() if self._is_over(session, now)]
            self._forget(ending)
        for session in ending:
            session.end()

    def close(self) -> None:
        """End all sessions and create no new ones."""
        with self._lock:
            self._closed = True
            sessions = self._sessions()
            self._forget(sessions)
            if self._timer is not None:
                self._timer.cancel()
        for session in sessions:
            session.end()
        self.queue.trainers.close()

    def _session(self, page: str, key: str | None) -> Session:
        self.sweep()
        with self._lock:
            if self._closed:
                raise SettingError("The demo has ended: start it again.")
            before = self._pages.get(page)
            session = (self._kept.get(key) if key else None) or before
            ending = [] if session else self._make_room()
            session = session or self._new()
            if key:
                self._kept.setdefault(key, session)
            self._pages[page] = session
            self._left.pop(session, None)
            session.last_active = self._clock()
            if before is not None and before not in (session, *self._sessions()):
                ending.append(before)
        for other in ending:
            other.end()
        return session

    def _new(self) -> Session:
        folder = Path(tempfile.mkdtemp(prefix="session-", dir=self.shared.folder))
        return Session(self.shared, folder.name, folder, self._clock())

    def _make_room(self) -> list[Session]:
        """Forget the session that was left first if there is no room for another one.

        Returns:
            The sessions to end.

        Raises:
            SettingError: All of them have open pages.
        """
        if len(self._sessions()) < MAX_SESSIONS:
            return []
        if not self._left:
            raise SettingError("The demo has as many visitors as it can take: try again later.")
        first = min(self._left, key=self._left.__getitem__)
        self._forget([first])
        return [first]

    def _sessions(self) -> list[Session]:
        return list(dict.fromkeys([*self._pages.values(), *self._kept.values()]))

    def _is_over(self, session: Session, now: float) -> bool:
        left = self._left.get(session)
        return now - session.last_active > IDLE or (left is not None and now - left > GRACE)

    def _forget(self, sessions: list[Session]) -> None:
        for known in (self._pages, self._kept):
            for key in [key for key, session in known.items() if session in sessions]:
                del known[key]
        for session in sessions:
            self._left.pop(session, None)

    def _start_timer(self) -> None:
        """Sweep after the grace time, also if there are no more requests."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(GRACE + 1, self.sweep)
        self._timer.daemon = True
        self._timer.start()
