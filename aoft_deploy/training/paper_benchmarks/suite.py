"""A whole benchmark: every task with every seed, each in its own folder, and the table of them."""

from __future__ import annotations

import sys
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
    strict: bool = True,
    **options: Any,
) -> Summary:
    """Run tasks of a benchmark by their recipes, seed after seed.

    A run stands in ``out/TASK/seed-N``. A finished one is not repeated, an interrupted one goes
    on. After each, ``table.md`` and ``results.json`` in ``out`` have all finished ones.

    Args:
        name: ``vtab`` or ``fgvc``.
        root: Folder of the benchmark.
        out: Folder for the results.
        seeds: Number of seeds, which count from 0.
        tasks: Names of the tasks; None takes all.
        given: Values of ``TrainingSettings`` but the seed, such as the method, that win over the
            recipes'.
        strict: Refuse other sizes than the benchmark's.
        **options: ``workers``, ``progress``, ``tensorboard`` and ``trust_images`` of ``train``.

    Raises:
        UnknownNameError: No such benchmark or task.
        DataError: A task's images cannot be used; all are looked at before the first run.
        SettingError: A setting outside its range, or a run in ``out`` had others.
        AoftError: As for ``run_recipe``.
    """
    if name not in BENCHMARKS:
        raise UnknownNameError("benchmark", name, BENCHMARKS)
    if seeds < 1:
        raise SettingError(f"seeds is {seeds}: use a whole number from 1.")
    benchmark = BENCHMARKS[name]
    plan = {
        out / task.name / f"seed-{seed}": get_recipe(
            f"{name}/{task.name}", {**(given or {}), "seed": seed}
        )
        for seed in range(seeds)
        for task in benchmark.chosen(tasks)
    }
    outcomes = _finished(plan, root, strict)
    summary = Summary(benchmark, tuple(outcomes.values()), len(plan))
    if outcomes:
        _write(summary, out)
    for folder in [folder for folder in plan if folder not in outcomes]:
        splits = load_splits(plan[folder], root, strict=strict)
        outcomes[folder] = run_recipe(plan[folder], splits, folder, resume=True, **options)
        in_order = tuple(outcomes[each] for each in plan if each in outcomes)
        summary = replace(summary, outcomes=in_order)
        _write(summary, out)
        if options.get("progress"):
            _tell(summary, outcomes[folder])
    return summary


def _finished(plan: Mapping[Path, Recipe], root: Path, strict: bool) -> dict[Path, Outcome]:
    """The runs that need not be repeated; looks at the images of all, so that none fails late."""
    outcomes = {}
    for folder, recipe in plan.items():
        splits = load_splits(recipe, root, strict=strict)
        if (folder / RECORD).exists():
            outcomes[folder] = run_recipe(recipe, splits, folder, resume=True)
    return outcomes


def _write(summary: Summary, out: Path) -> None:
    if PartialState().is_main_process:
        write_json(out / RESULTS, summary.to_dict())
        with replacing(out / TABLE) as temporary:
            temporary.write_text(markdown(summary), "utf-8")


def _tell(summary: Summary, last: Outcome) -> None:
    if PartialState().is_main_process:
        done = f"{len(summary.outcomes)} of {summary.wanted} runs"
        print(f"{last.task}, seed {last.seed}: {last.test_accuracy:.2%} ({done})", file=sys.stderr)
