"""Counters, histograms and gauges in the text format of Prometheus. Used in one event loop."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Counter", "Histogram", "exposition", "gauge"]

Labels = tuple[str, ...]


class Counter:
    """A value for each combination of labels, which never decreases.

    Args:
        name: Name of the metric.
        help: What it counts.
        labels: Names of the labels.
    """

    def __init__(self, name: str, help: str, labels: Labels = ()) -> None:
        self.name, self.help, self.labels = name, help, labels
        self.values: dict[Labels, float] = {}

    def add(self, *labels: str, amount: float = 1) -> None:
        """Increase the value of these labels."""
        self.values[labels] = self.values.get(labels, 0) + amount

    def lines(self) -> Iterable[str]:
        """Lines of the text format."""
        yield from _head(self.name, self.help, "counter")
        for labels, value in self.values.items():
            yield f"{self.name}{_braces(self.labels, labels)} {value:.10g}"


class Histogram:
    """The number of values up to each bound, for each combination of labels.

    Args:
        name: Name of the metric.
        help: What is observed.
        labels: Names of the labels.
        bounds: Upper bounds, ascending.
    """

    def __init__(self, name: str, help: str, labels: Labels, bounds: Iterable[float]) -> None:
        self.name, self.help, self.labels = name, help, labels
        self._bounds = tuple(bounds)
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}

    def observe(self, value: float, *labels: str) -> None:
        """Count a value."""
        counts = self._counts.get(labels)
        if counts is None:
            counts = self._counts[labels] = [0] * (len(self._bounds) + 1)
            self._sums[labels] = 0.0
        counts[bisect_left(self._bounds, value)] += 1
        self._sums[labels] += value

    def lines(self) -> Iterable[str]:
        """Lines of the text format."""
        yield from _head(self.name, self.help, "histogram")
        names = (*self.labels, "le")
        for labels, counts in self._counts.items():
            total = 0
            for bound, count in zip((*self._bounds, "+Inf"), counts, strict=True):
                total += count
                yield f"{self.name}_bucket{_braces(names, (*labels, str(bound)))} {total}"
            own = _braces(self.labels, labels)
            yield f"{self.name}_sum{own} {self._sums[labels]:.10g}"
            yield f"{self.name}_count{own} {total}"


def gauge(name: str, help: str, labels: Labels, values: Mapping[Any, float]) -> Iterable[str]:
    """Lines of a metric that may increase and decrease."""
    yield from _head(name, help, "gauge")
    for key, value in values.items():
        yield f"{name}{_braces(labels, key)} {value:.10g}"


def exposition(parts: Iterable[Iterable[str]]) -> str:
    """The whole text of a scrape."""
    return "".join(f"{line}\n" for lines in parts for line in lines)


def _head(name: str, help: str, kind: str) -> Iterable[str]:
    yield f"# HELP {name} {help}"
    yield f"# TYPE {name} {kind}"


def _braces(names: Labels, values: Labels) -> str:
    if not names:
        return ""
    pairs = (f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))
    return "{" + ",".join(pairs) + "}"


def _escaped(value: str) -> str:
    text = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return text.encode("utf-8", "replace").decode()
