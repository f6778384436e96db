from __future__ import annotations

import re
from statistics import fmean, stdev

import numpy as np
import pytest

from aoft_deploy.training.paper_benchmarks.literature import PUBLISHED
from aoft_deploy.training.paper_benchmarks.report import Summary, markdown
from aoft_deploy.training.paper_benchmarks.task_run import Outcome
from aoft_deploy.training.paper_benchmarks.tasks import FGVC, VTAB, Benchmark

RNG = np.random.default_rng(0)


def outcome(task: str, seed: int, accuracy: float, head: int = 100) -> Outcome:
    return Outcome(
        task=task,
        method="rlrr",
        backbone="vit",
        seed=seed,
        lr=0.1,
        epoch=3,
        val_accuracy=0.5,
        test_accuracy=accuracy,
        update_parameters=2_000_000,
        head_parameters=head,
        deviations=(),
        seconds=1.0,
    )


def summary(benchmark: Benchmark, seeds: int = 2) -> tuple[Summary, np.ndarray]:
    """A finished suite, and its accuracies in percent, (seeds, tasks)."""
    values = RNG.uniform(0.2, 0.9, (seeds, len(benchmark.tasks)))
    outcomes = tuple(
        outcome(f"{benchmark.name}/{task.name}", seed, values[seed, i], head=769 * task.classes)
        for seed in range(seeds)
        for i, task in enumerate(benchmark.tasks)
    )
    return Summary(benchmark, outcomes, len(outcomes)), 100 * values


def cells(text: str, start: str) -> list[str]:
    """Cells of the first row that starts with ``start``."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_both_averages_of_vtab_are_labelled_and_correct() -> None:
    made, values = summary(VTAB, seeds=3)
    columns = values.mean(axis=0)
    groups = [columns[:7].mean(), columns[7:11].mean(), columns[11:].mean()]
    assert made.mean_tasks == pytest.approx(columns.mean())
    assert made.mean_groups == pytest.approx(np.mean(groups))
    found = made.to_dict()
    assert found["mean of 19 tasks"] == made.mean_tasks
    assert found["mean of 3 group means"] == made.mean_groups
    assert found["runs"] == {"finished": 57, "wanted": 57}


def test_each_task_has_its_mean_and_sample_deviation() -> None:
    made, values = summary(VTAB, seeds=3)
    for i, task in enumerate(VTAB.tasks):
        found = made.to_dict()["test_accuracy"][task.name]
        assert found["runs"] == 3
        assert found["mean"] == pytest.approx(fmean(values[:, i]))
        assert found["sd"] == pytest.approx(stdev(values[:, i]))
        row = cells(markdown(made), task.name)
        assert row[1:4] == [task.group, "3", f"{found['mean']:.1f} ± {found['sd']:.1f}"]


def test_one_seed_has_no_deviation() -> None:
    made, values = summary(VTAB, seeds=1)
    assert made.to_dict()["test_accuracy"]["cifar"]["sd"] is None
    assert cells(markdown(made), "cifar")[3] == f"{values[0, 0]:.1f}"


def test_an_average_over_some_tasks_states_their_number() -> None:
    whole, values = summary(VTAB, seeds=1)
    part = Summary(VTAB, whole.outcomes[:5], 19)
    found = part.to_dict()
    assert "mean of 19 tasks" not in found
    assert found["mean of 5 of 19 tasks"] == pytest.approx(values[0, :5].mean())
    assert found["mean of 3 group means"] is None
    row = cells(markdown(part), "rlrr, ours")
    assert row[2:4] == [f"{values[0, :5].mean():.1f} (5 tasks only)", ""]
    assert "5 of 19 runs are finished" in markdown(part)


def test_without_a_run_there_are_no_numbers() -> None:
    nothing = Summary(VTAB, (), 19)
    assert nothing.mean_tasks is None
    assert nothing.millions(with_head=True) is None
    assert cells(markdown(nothing), "cifar")[2:4] == ["0", ""]


def test_parameters_are_counted_with_and_without_the_classifier() -> None:
    made, _ = summary(VTAB)
    assert made.millions(with_head=False) == pytest.approx(2.0)
    assert made.millions(with_head=True) == pytest.approx(2 + 769 * 940 / 19 / 1e6)
    row = cells(markdown(made), "rlrr, ours")
    assert row[4:7] == ["2.0000", "2.0380", ""]


def test_published_rows_are_in_the_column_of_their_average() -> None:
    text = markdown(summary(VTAB)[0])
    head = cells(text, "method")
    assert head[2:4] == ["mean of 19 tasks", "mean of 3 group means"]
    assert cells(text, "LoRA")[2:7] == ["72.3", "74.5", "0.29", "", ""]
    assert cells(text, "RLRR")[2:7] == ["74.5", "~76.8", "", "0.33", ""]
    assert cells(text, "GLoRA")[2:4] == ["", "78.0"]
    assert cells(text, "SSF")[2:4] == ["73.1", ""]
    assert cells(text, r"LoRA+AOFT†")[2:4] == ["74.1", ""]
    assert cells(text, "LoRA_mul+VPT_add+PACE")[2:4] == ["~76.9", "79.0"]
    for row in PUBLISHED["vtab"]:
        assert row.source in text


def test_published_columns_are_in_the_row_of_their_task() -> None:
    text = markdown(summary(VTAB)[0])
    assert cells(text, "task")[4:7] == ["RLRR", "RLRR*", "HTA"]
    assert cells(text, "cifar")[4:7] == ["75.6", "76.7", "76.6"]
    assert cells(text, "smallnorb_ele")[4:7] == ["43.6", "41.7", "47.3"]


def test_fgvc_has_one_average() -> None:
    made, values = summary(FGVC)
    text = markdown(made)
    assert made.mean_groups is None
    assert cells(text, "method")[2:4] == ["mean of 5 tasks", "M without head"]
    assert cells(text, "rlrr, ours")[2] == f"{values.mean():.1f}"
    assert cells(text, "RLRR")[2:5] == ["90.4", "", "0.47"]
    assert made.to_dict()["mean of 5 tasks"] == pytest.approx(values.mean())
    assert not [key for key in made.to_dict() if "group" in key]


@pytest.mark.parametrize("benchmark", [VTAB, FGVC])
def test_every_row_of_a_table_has_as_many_cells_as_its_head(benchmark: Benchmark) -> None:
    tables = re.findall(r"(?:^\|.*\n)+", markdown(summary(benchmark)[0]), re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_deviations_are_listed_once_for_each_task() -> None:
    made, _ = summary(FGVC)
    few = "train has 4 images instead of 5,394"
    outcomes = [Outcome(**{**vars(o), "deviations": (few,)}) for o in made.outcomes[:1] * 2]
    text = markdown(Summary(FGVC, tuple(outcomes), 2))
    assert text.count(f"* fgvc/CUB_200_2011: {few}\n") == 1
    assert "Deviations" not in markdown(made)
