"""Which artefacts are still timed, and in how many lanes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aoft_deploy.artefacts.timing import Subject, Timing
from aoft_deploy.export.race_timing import beaten, lane_counts, timed


def timings(*subjects: dict[int, list[float]]) -> list[Timing]:
    """Timings of subjects from their ratios in each round, by batch size."""
    engine: Any = None
    return [
        Timing(Subject(str(index), engine, None, "fp32"), batch, (), tuple(subject[batch]))
        for batch in subjects[0]
        for index, subject in enumerate(subjects)
    ]


FIRST = {1: [1.0, 1.0], 8: [1.0, 1.0]}


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        # slower at both batch sizes, in every round
        ([{1: [2.0, 2.1], 8: [1.5, 1.6]}, {1: [1.1, 1.2], 8: [0.7, 0.8]}], {2}),
        # faster at batch 8, so it may be offered
        ([{1: [2.0, 2.1], 8: [1.5, 1.6]}, {1: [0.5, 0.5], 8: [1.7, 1.8]}], set()),
        # the ranges overlap at batch 1
        ([{1: [1.5, 3.1], 8: [1.5, 1.6]}, {1: [1.1, 1.6], 8: [0.7, 0.8]}], set()),
        # within a tenth, which noise can reverse
        ([{1: [2.0, 2.0], 8: [1.6, 1.6]}, {1: [1.9, 1.9], 8: [1.5, 1.5]}], set()),
        # the faster one is slower than the first at batch 8, so it cannot be chosen
        ([{1: [3.0, 3.0], 8: [0.9, 0.9]}, {1: [1.2, 1.2], 8: [0.5, 0.5]}], set()),
        # beaten by the first one itself
        ([{1: [0.5, 0.6], 8: [0.5, 0.6]}], {1}),
        ([], set()),
    ],
)
def test_only_what_is_clearly_slower_everywhere_is_beaten(
    others: list[dict[int, list[float]]], expected: set[int]
) -> None:
    assert beaten(timings(FIRST, *others)) == expected
    one_round = [{b: ratios[:1] for b, ratios in each.items()} for each in (FIRST, *others)]
    assert beaten(timings(*one_round)) == set()


def test_lanes_double_up_to_the_number_of_processors() -> None:
    counts = {n: lane_counts(n) for n in (1, 2, 3, 6, 8)}
    assert counts == {1: [1], 2: [1, 2], 3: [1, 2, 3], 6: [1, 2, 4, 6], 8: [1, 2, 4, 8]}


def test_the_best_number_of_lanes_counts_and_only_for_throughput(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = {1: 1.0, 2: 1.7}
    seen: list[list[tuple[str, int]]] = []

    def interleaved(
        subjects: list[Subject], batches: list[int], *_: Any, **__: Any
    ) -> list[Timing]:
        seen.append([(each.name, each.lanes) for each in subjects])
        return [Timing(s, b, (), (fast[s.lanes],)) for b in batches for s in subjects]

    monkeypatch.setattr("aoft_deploy.export.race_timing.interleaved", interleaved)
    monkeypatch.setattr("aoft_deploy.export.race_timing.processors", lambda: 2)
    found = timed({"a": artefact}, [4], "throughput")["a"]
    assert (found.ratios, found.lanes) == ({4: 1.7}, 2)
    found = timed({"a": artefact}, [4], "latency")["a"]
    assert (found.ratios, found.lanes) == ({4: 1.0}, 1)
    assert seen == [[("a", 1), ("a", 2)], [("a", 1)]]
