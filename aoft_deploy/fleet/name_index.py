"""A sorted index of many task names, stored as bytes without a Python object for each name."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.errors import SettingError

__all__ = ["NameIndex"]


class NameIndex(Sequence[str]):
    """Sorted names.

    Attributes:
        text: All names one after another, UTF-8.
        ends: End of each name in ``text``, int64 (names,).

    Args:
        text: As the attribute.
        ends: As the attribute.
    """

    def __init__(self, text: bytes, ends: NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        """Sort names and build their index.

        Raises:
            SettingError: A name occurs twice.
        """
        encoded = sorted(_encode(name) for name in names)
        for name, following in pairwise(encoded):
            if name == following:
                raise SettingError(f"Two tasks are called {_decode(name)!r}: rename one.")
        return cls(b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return _decode(self._bytes(range(len(self))[index]))

    def __contains__(self, name: Any) -> bool:
        return isinstance(name, str) and self.find(name) is not None

    def find(self, name: str) -> int | None:
        """Index of a name, found in logarithmic time; None if it is missing."""
        encoded = _encode(name)
        place = bisect_left(range(len(self)), encoded, key=self._bytes)
        return place if place < len(self) and self._bytes(place) == encoded else None

    def closest(
        self, name: str, count: int = 32, without: Collection[str] = frozenset()
    ) -> list[str]:
        """Names that share the most pairs of adjacent bytes with a name, best first.

        This fast preselection (about 10 ms for 100,000 names) precedes an exact comparison.

        Args:
            name: The name that was requested.
            count: Maximum number of names.
            without: Names to leave out.
        """
        pairs = np.zeros(2**16, bool)
        pairs[_pairs(_encode(name))] = True
        shared = np.zeros(len(self.text) + 1, np.int64)  # shared pairs before each byte
        if len(self.text) > 1:
            matches = pairs[_pairs(self.text)]
            matches[self.ends[:-1] - 1] = False  # a pair across two names
            np.cumsum(matches, out=shared[1:-1])
            shared[-1] = shared[-2]
        starts = np.concatenate([[0], self.ends[:-1]])
        total = np.maximum(self.ends - starts + len(_encode(name)) - 2, 1)
        similarity = 2 * (shared[self.ends] - shared[starts]) / total
        found: list[str] = []
        for place in np.argsort(-similarity, kind="stable").tolist():
            if len(found) == count:
                break
            if self[place] not in without:
                found.append(self[place])
        return found

    def _bytes(self, place: int) -> bytes:
        return self.text[int(self.ends[place - 1]) if place else 0 : int(self.ends[place])]


def _pairs(text: bytes) -> NDArray[np.intp]:
    """Each pair of adjacent bytes as an integer below 2**16."""
    values = np.frombuffer(text, np.uint8).astype(np.intp)
    return values[:-1] * 256 + values[1:]


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
