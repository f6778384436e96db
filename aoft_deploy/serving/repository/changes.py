"""Which files are to be opened or let go, by what looks at them saw. No clock, no disk, no server.

A file is opened once two looks in a row found it the same, and let go once two looks in a row did
not find it. What could not be opened is tried again when it or anything else has changed, and else
after a while that doubles each time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["MOST_SECONDS", "Changes", "Follower", "Look"]

MOST_SECONDS = 60.0
"""Longest time after which what could not be opened is tried again."""


class Look(NamedTuple):
    """What one look at the files saw.

    Attributes:
        marks: A mark by name of each that is there: another one when something was written.
        unseen: Names that may be there, but cannot be looked at.
        complete: Whether it could be seen what is not there.
    """

    marks: Mapping[str, object]
    unseen: frozenset[str] = frozenset()
    complete: bool = True


class Changes(NamedTuple):
    """What is to be done after a look, in the order of its names.

    Attributes:
        opened: Names to open, or to exchange for what their files hold now.
        gone: Names whose files are gone.
    """

    opened: list[str]
    gone: list[str]


@dataclass
class _Entry:
    """What is known of a name."""

    seen: object = None  # mark of the look before
    tried: object = None  # mark of the last try to open it
    failed: bool = False
    again: float = math.inf  # when a failure is tried again
    wait: float = 0.0
    changes: int = 0  # of the others, at the last try
    missed: bool = False  # whether the look before did not find it


@dataclass
class Follower:
    """Remembers looks and what came of opening. Not thread-safe.

    Attributes:
        seconds: After which a first failure is tried again.
    """

    seconds: float
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _changes: int = 0

    def looked(self, look: Look, now: float, *, settled: bool = False) -> Changes:
        """Take a look over.

        Args:
            look: What it saw.
            now: Seconds of any clock that does not go back.
            settled: Whether files are taken as they are, without a second look.
        """
        due = []
        for name, mark in look.marks.items():
            entry = self._entries.setdefault(name, _Entry())
            entry.missed = False
            steady, entry.seen = settled or entry.seen == mark, mark
            if steady and mark != entry.tried:
                self._changes += 1
                due.append(name)
            elif steady and entry.failed and (entry.changes != self._changes or now >= entry.again):
                due.append(name)
        return Changes(due, self._gone(look))

    def _gone(self, look: Look) -> list[str]:
        gone = []
        for name, entry in list(self._entries.items()):
            if name in look.marks or name in look.unseen or not look.complete:
                continue
            entry.seen = None
            if entry.missed:
                del self._entries[name]
                self._changes += 1
                gone.append(name)
            entry.missed = True
        return gone

    def opening(self, name: str, mark: object) -> None:
        """A name is about to be opened, with its files as the mark says."""
        entry = self._entries.setdefault(name, _Entry())
        if mark != entry.tried:
            entry.wait = 0.0
        entry.tried = mark

    def opened(self, name: str) -> None:
        """It was opened: others that need it are tried again."""
        entry = self._entries.setdefault(name, _Entry())
        entry.failed, entry.wait, entry.again = False, 0.0, math.inf
        self._changes += 1

    def failed(self, name: str, now: float) -> None:
        """It could not be opened."""
        entry = self._entries.setdefault(name, _Entry())
        entry.wait = min(2 * entry.wait or self.seconds, MOST_SECONDS)
        entry.failed, entry.again, entry.changes = True, now + entry.wait, self._changes

    def closed(self, name: str) -> None:
        """It was let go by a client: it is not opened before its files change."""
        entry = self._entries.setdefault(name, _Entry())
        entry.failed = False
        self._changes += 1
