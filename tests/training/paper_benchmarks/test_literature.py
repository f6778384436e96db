from __future__ import annotations

from statistics import fmean

import pytest

from aoft_deploy.training.paper_benchmarks.literature import PUBLISHED, PublishedRow, mean_of_groups
from aoft_deploy.training.paper_benchmarks.tasks import BENCHMARKS, FGVC, VTAB

ROWS = [(BENCHMARKS[name], row) for name, rows in PUBLISHED.items() for row in rows]
WITH_COLUMNS = [(benchmark, row) for benchmark, row in ROWS if row.tasks]


def row(benchmark: str, method: str) -> PublishedRow:
    """The row of a method with the main backbone."""
    return next(r for r in PUBLISHED[benchmark] if r.method == method and "B/16" in r.backbone)


def test_every_benchmark_has_rows_with_a_source_and_a_number() -> None:
    assert PUBLISHED.keys() == BENCHMARKS.keys()
    for _, each in ROWS:
        assert each.source
        assert each.mean_tasks is not None or each.mean_groups is not None
    assert len({(b.name, r.method, r.backbone) for b, r in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    ("benchmark", "each"), WITH_COLUMNS, ids=lambda value: getattr(value, "method", "")
)
def test_printed_averages_agree_with_their_columns(benchmark: object, each: PublishedRow) -> None:
    # Columns have one decimal; two FGVC means differ from their columns by up to 0.2.
    assert benchmark in (VTAB, FGVC)
    tolerance = 0.06 if benchmark is VTAB else 0.25
    assert len(each.tasks) == (19 if benchmark is VTAB else 5)
    if each.mean_tasks is not None:
        assert fmean(each.tasks) == pytest.approx(each.mean_tasks, abs=tolerance)
    if each.mean_groups is not None:
        assert mean_of_groups(VTAB, each.tasks) == pytest.approx(each.mean_groups, abs=tolerance)


def test_the_mean_of_groups_is_that_of_the_papers_group_columns() -> None:
    columns = row("vtab", "RLRR").tasks
    means = [fmean(part) for part in (columns[:7], columns[7:11], columns[11:])]
    assert means == pytest.approx([82.7, 85.8, 61.8], abs=0.06)  # as printed in the RLRR paper
    assert mean_of_groups(VTAB, columns) == pytest.approx(76.75, abs=0.01)
    assert mean_of_groups(VTAB, row("vtab", "RLRR*").tasks) == pytest.approx(77.5, abs=0.05)


def test_without_columns_or_groups_there_is_no_mean_of_groups() -> None:
    assert mean_of_groups(VTAB, ()) is None
    assert mean_of_groups(FGVC, (1.0, 2.0, 3.0, 4.0, 5.0)) is None


def test_the_two_averages_are_not_mixed_up() -> None:
    assert (row("vtab", "LoRA").mean_tasks, row("vtab", "LoRA").mean_groups) == (72.3, 74.5)
    for each in PUBLISHED["vtab"]:
        groups = each.mean_groups or mean_of_groups(VTAB, each.tasks)
        if each.mean_tasks is not None and groups is not None:
            assert 1.5 < groups - each.mean_tasks < 5


@pytest.mark.parametrize(
    ("method", "benchmark", "mean"),
    [
        ("RLRR", "vtab", 74.5),
        ("RLRR*", "vtab", 75.1),
        ("LoRA+AOFT†", "vtab", 74.1),
        ("Adapter+AOFT*", "vtab", 72.7),
        ("SSF", "vtab", 73.1),
        ("Full fine-tuning", "vtab", 65.6),
        ("Linear", "vtab", 52.9),
        ("RLRR", "fgvc", 90.4),
        ("LoRA+AOFT", "fgvc", 89.9),
    ],
)
def test_rows_have_the_printed_means(method: str, benchmark: str, mean: float) -> None:
    assert row(benchmark, method).mean_tasks == mean
