"""Outcomes of a benchmark: averages, and tables that compare them with published results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from aoft_deploy.training.paper_benchmarks.literature import PUBLISHED, PublishedRow, mean_of_groups
from aoft_deploy.training.paper_benchmarks.tasks import Benchmark, BenchmarkTask

if TYPE_CHECKING:
    from aoft_deploy.training.paper_benchmarks.task_run import Outcome

__all__ = ["Summary", "markdown"]


@dataclass(frozen=True)
class Summary:
    """Averages over tasks and seeds; test accuracies in percent.

    Attributes:
        benchmark: The benchmark.
        outcomes: The finished runs, all with the same method and backbone.
        wanted: Number of requested runs.
    """

    benchmark: Benchmark
    outcomes: tuple[Outcome, ...]
    wanted: int

    def of_task(self, task: BenchmarkTask) -> list[float]:
        """Test accuracy of each finished run of a task."""
        name = f"{self.benchmark.name}/{task.name}"
        return [100 * outcome.test_accuracy for outcome in self.outcomes if outcome.task == name]

    @property
    def columns(self) -> dict[str, float]:
        """Mean over the seeds, for each task with a finished run."""
        found = {task.name: self.of_task(task) for task in self.benchmark.tasks}
        return {name: fmean(values) for name, values in found.items() if values}

    @property
    def mean_tasks(self) -> float | None:
        """Mean over the tasks with a finished run; None if there are none."""
        return fmean(self.columns.values()) if self.columns else None

    @property
    def mean_groups(self) -> float | None:
        """Mean of the group means; None unless every task has a finished run."""
        columns = tuple(self.columns.values())
        is_complete = len(columns) == len(self.benchmark.tasks)
        return mean_of_groups(self.benchmark, columns) if is_complete else None

    @property
    def tasks_name(self) -> str:
        """Label of ``mean_tasks``."""
        count, total = len(self.columns), len(self.benchmark.tasks)
        return f"mean of {total} tasks" if count == total else f"mean of {count} of {total} tasks"

    @property
    def groups_name(self) -> str:
        """Label of ``mean_groups``."""
        return f"mean of {len(self.benchmark.groups)} group means"

    def millions(self, *, with_head: bool) -> float | None:
        """Trained parameters in millions, averaged over the tasks with a finished run."""
        counts = {
            o.task: o.update_parameters + with_head * o.head_parameters for o in self.outcomes
        }
        return fmean(counts.values()) / 1e6 if counts else None

    def to_dict(self) -> dict[str, Any]:
        """JSON form; the averages have their labels as keys."""
        tasks = {}
        for task in self.benchmark.tasks:
            if values := self.of_task(task):
                tasks[task.name] = {"mean": fmean(values), "sd": _sd(values), "runs": len(values)}
        means = {self.tasks_name: self.mean_tasks}
        if len(self.benchmark.groups) > 1:
            means[self.groups_name] = self.mean_groups
        return {
            "benchmark": self.benchmark.name,
            "runs": {"finished": len(self.outcomes), "wanted": self.wanted},
            "test_accuracy": tasks,
            **means,
            "parameters_millions": {
                "without_head": self.millions(with_head=False),
                "with_head": self.millions(with_head=True),
            },
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }


def markdown(summary: Summary) -> str:
    """Markdown with a table of tasks, a table of averages, and deviations from the benchmark."""
    parts = [
        f"# {summary.benchmark.title}",
        f"{len(summary.outcomes)} of {summary.wanted} runs are finished. Test accuracy in percent, "
        "± standard deviation over seeds. Learning rate and epoch were chosen on the validation "
        "images, and each run was tested once; the released RLRR code reports the best test "
        "accuracy of all epochs.",
        "## Tasks",
        _table(_task_rows(summary)),
        "## Averages",
        "As printed by the sources; ~ marks averages computed from their columns. M is millions of "
        "trained parameters.",
        _table(_average_rows(summary)),
    ]
    notes = dict.fromkeys(f"* {o.task}: {n}" for o in summary.outcomes for n in o.deviations)
    if notes:
        parts += ["## Deviations from the benchmark", "\n".join(notes)]
    return "\n\n".join(parts) + "\n"


def _task_rows(summary: Summary) -> list[list[str]]:
    published = [
        row for row in PUBLISHED[summary.benchmark.name] if row.tasks and "B/16" in row.backbone
    ]
    rows = [["task", "group", "runs", _ours(summary), *(row.method for row in published)]]
    for index, task in enumerate(summary.benchmark.tasks):
        values = summary.of_task(task)
        theirs = [f"{row.tasks[index]:.1f}" for row in published]
        rows.append([task.name, task.group, str(len(values)), _with_sd(values), *theirs])
    return rows


def _average_rows(summary: Summary) -> list[list[str]]:
    benchmark, has_groups = summary.benchmark, len(summary.benchmark.groups) > 1
    all_tasks = f"mean of {len(benchmark.tasks)} tasks"
    heads = ["M without head", "M with head", "M, head not stated"]
    averages = [all_tasks, summary.groups_name] if has_groups else [all_tasks]
    note = "" if summary.tasks_name == all_tasks else f" ({len(summary.columns)} tasks only)"
    ours = [_number(summary.mean_tasks) + note, _number(summary.mean_groups)][: len(averages)]
    sizes = [summary.millions(with_head=with_head) for with_head in (False, True)]
    backbone = summary.outcomes[0].backbone if summary.outcomes else ""
    rows = [
        ["method", "backbone", *averages, *heads, "source"],
        [_ours(summary), backbone, *ours, *(_number(s, 4) for s in sizes), "", "measured"],
    ]
    for row in PUBLISHED[benchmark.name]:
        means = _published_means(benchmark, row)[: len(averages)]
        counts = [_number(n, 2) for n in (row.without_head, row.with_head, row.unstated)]
        rows.append([row.method, row.backbone, *means, *counts, row.source])
    return rows


def _published_means(benchmark: Benchmark, row: PublishedRow) -> list[str]:
    """Both averages as printed, or else computed from the columns and marked with a ~."""
    computed = fmean(row.tasks) if row.tasks else None, mean_of_groups(benchmark, row.tasks)
    cells = []
    for printed, value in zip((row.mean_tasks, row.mean_groups), computed, strict=True):
        use_computed = printed is None and value is not None
        cells.append(f"~{_number(value)}" if use_computed else _number(printed))
    return cells


def _ours(summary: Summary) -> str:
    return f"{summary.outcomes[0].method}, ours" if summary.outcomes else "ours"


def _sd(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _with_sd(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = _sd(values)
    return f"{fmean(values):.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _table(rows: list[list[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])
