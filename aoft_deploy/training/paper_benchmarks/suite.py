"""A whole benchmark: every task with every seed, each in its own folder, and the results table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.state import PartialState

from aoft_deploy.errors import SettingError, UnknownNameError
from aoft_deploy.files import replacing, write_json
from aoft_deploy.training.paper_benchmarks.recipes import Recipe, get_recipe
from aoft_deploy.training.paper_benchmarks.report import Summary, markdown
from aoft_deploy.training.paper_benchmarks.task_run import RECORD, Outcome, load_splits, run_recipe
from aoft_deploy.training.paper_benchmarks.tasks import BENCHMARKS
from aoft_deploy.training.reporting import Reporter
from aoft_deploy.training.settings import RunOptions

__all__ = ["RESULTS", "TABLE", "run_suite"]

TABLE, RESULTS = "table.md", "results.json"


def run_suite(
    name: str,
    root: Path,
    out: Path,
    *,
    seeds: int = 3,
    tasks: Sequence[str] | None = None,
    given: Mapping[str, Any] | None = None,
    any_size: bool = False,
    options: RunOptions | None = None,
) -> Summary:
    """Run tasks of a benchmark by their recipes, one seed after the other.

    Each run has the folder ``out/TASK/seed-N``. Finished runs are not repeated, and interrupted
    ones are resumed, unless ``options.overwrite`` starts all of them anew. After each run,
    ``table.md`` and ``results.json`` in ``out`` are updated.

    Args:
        name: ``vtab`` or ``fgvc``.
        root: Folder of the benchmark.
        out: Folder for the results.
        seeds: Number of seeds, counted from 0.
        tasks: Names of the tasks; None for all.
        given: Values of ``TrainingSettings`` except the seed, such as the method, that override
            the recipes.
        any_size: Accept other numbers of images than in the benchmark.
        options: How to execute the runs. None for the defaults.

    Raises:
        UnknownNameError: No such benchmark or task.
        DataError: The images of a task cannot be used; all lists are read before the first run.
        SettingError: A setting is outside its range, or a run in ``out`` has other settings.
        AoftError: As for ``run_recipe``.
    """
    if name not in BENCHMARKS:
        raise UnknownNameError("benchmark", name, BENCHMARKS)
    if seeds < 1:
        raise SettingError(f"`seeds` is {seeds}, but must be a whole number from 1.")
    options = options or RunOptions()
    options = replace(options, resume=not options.overwrite)
    reporter = Reporter(options.progress and PartialState().is_main_process)
    benchmark = BENCHMARKS[name]
    plan = {
        out / task.name / f"seed-{seed}": get_recipe(
            f"{name}/{task.name}", {**(given or {}), "seed": seed}
        )
        for seed in range(seeds)
        for task in benchmark.chosen(tasks)
    }
    outcomes = _finished(plan, root, any_size, options)
    summary = Summary(benchmark, tuple(outcomes.values()), len(plan))
    if outcomes:
        _write(summary, out)
    for folder in [folder for folder in plan if folder not in outcomes]:
        splits = load_splits(plan[folder], root, any_size=any_size)
        outcomes[folder] = run_recipe(plan[folder], splits, folder, options)
        in_order = tuple(outcomes[each] for each in plan if each in outcomes)
        summary = replace(summary, outcomes=in_order)
        _write(summary, out)
        done = f"{len(summary.outcomes)} of {summary.wanted} runs"
        last = outcomes[folder]
        reporter.say(f"{last.task}, seed {last.seed}: {last.test_accuracy:.2%} ({done})")
    return summary


def _finished(
    plan: Mapping[Path, Recipe], root: Path, any_size: bool, options: RunOptions
) -> dict[Path, Outcome]:
    """Outcomes of the finished runs; reads the lists of all runs, so that none fails late."""
    outcomes = {}
    for folder, recipe in plan.items():
        splits = load_splits(recipe, root, any_size=any_size)
        if options.resume and (folder / RECORD).exists():
            outcomes[folder] = run_recipe(recipe, splits, folder, options)
    return outcomes


def _write(summary: Summary, out: Path) -> None:
    if PartialState().is_main_process:
        write_json(out / RESULTS, summary.to_dict())
        with replacing(out / TABLE) as temporary:
            temporary.write_text(markdown(summary), "utf-8")
