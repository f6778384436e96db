"""Which files to open or close, decided from a sequence of scans. No clock, disk or server.

A file is opened once two scans in a row found it the same, and closed once two scans in a row did
not find it. A file that failed to open is retried when it or any other file has changed, and
otherwise after a delay that doubles each time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["MAX_SECONDS", "ChangeTracker", "Changes", "Observation"]

MAX_SECONDS = 60.0
"""Maximum delay before a file that failed to open is retried."""


class Observation(NamedTuple):
    """What one scan saw of the files.

    Attributes:
        marks: The state of each file by name; a write changes the mark.
        unreadable: Names whose files could not be examined.
        complete: Whether a missing name means that there is no file.
    """

    marks: Mapping[str, object]
    unreadable: frozenset[str] = frozenset()
    complete: bool = True


class Changes(NamedTuple):
    """What to do after a scan.

    Attributes:
        opened: Names to open or to reload.
        gone: Names whose files were removed.
    """

    opened: list[str]
    gone: list[str]


@dataclass
class _Entry:
    """The state of a name."""

    seen: object = None  # mark of the last scan
    tried: object = None  # mark of the last attempt to open it
    failed: bool = False
    retry_at: float = math.inf
    delay: float = 0.0  # before the next retry
    changes: int = 0  # count of changes at the last attempt
    missed: bool = False  # whether the last scan did not find it


@dataclass
class ChangeTracker:
    """Keeps the history of scans and of attempts to open. Not thread-safe.

    Attributes:
        seconds: Delay before the first retry.
    """

    seconds: float
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _changes: int = 0

    def observe(self, observation: Observation, now: float, *, settled: bool = False) -> Changes:
        """Take in a scan.

        Args:
            observation: What it saw.
            now: Time in seconds of a monotonic clock.
            settled: Whether files are opened without a second scan.
        """
        due = []
        for name, mark in observation.marks.items():
            entry = self._entries.setdefault(name, _Entry())
            entry.missed = False
            steady, entry.seen = settled or entry.seen == mark, mark
            if steady and mark != entry.tried:
                self._changes += 1
                due.append(name)
            elif steady and entry.failed and self._is_retry_due(entry, now):
                due.append(name)
        return Changes(due, self._gone(observation))

    def opening(self, name: str, mark: object) -> None:
        """Note that a name is about to be opened, with its files in the state of the mark."""
        entry = self._entries.setdefault(name, _Entry())
        if mark != entry.tried:
            entry.delay = 0.0
        entry.tried = mark

    def opened(self, name: str) -> None:
        """Note that a name was opened. Others may depend on it and are retried."""
        entry = self._entries.setdefault(name, _Entry())
        entry.failed, entry.delay, entry.retry_at = False, 0.0, math.inf
        self._changes += 1

    def failed(self, name: str, now: float) -> None:
        """Note that a name failed to open."""
        entry = self._entries.setdefault(name, _Entry())
        entry.delay = min(2 * entry.delay or self.seconds, MAX_SECONDS)
        entry.failed, entry.retry_at, entry.changes = True, now + entry.delay, self._changes

    def closed(self, name: str) -> None:
        """Note that a client closed a name: it is not opened before its files change."""
        entry = self._entries.setdefault(name, _Entry())
        entry.failed = False
        self._changes += 1

    def _is_retry_due(self, entry: _Entry, now: float) -> bool:
        return entry.changes != self._changes or now >= entry.retry_at

    def _gone(self, observation: Observation) -> list[str]:
        gone = []
        for name, entry in list(self._entries.items()):
            present = name in observation.marks or name in observation.unreadable
            if present or not observation.complete:
                continue
            entry.seen = None
            if entry.missed:
                del self._entries[name]
                self._changes += 1
                gone.append(name)
            entry.missed = True
        return gone
