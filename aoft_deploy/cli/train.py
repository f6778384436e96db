"""aoft-train: fine-tune a backbone on a folder of images, or on the papers' benchmarks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.cli.command import run
from aoft_deploy.cli.train_options import check_usage, given_settings, parser
from aoft_deploy.training.settings import RunOptions, TrainingSettings

if TYPE_CHECKING:
    from aoft_deploy.training.paper_benchmarks.report import Summary
    from aoft_deploy.training.paper_benchmarks.task_run import Outcome
    from aoft_deploy.training.run import Result

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``aoft-train --help``."""
    p = parser()
    return run(p, partial(_train, p), argv)


def _train(p: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    settings = given_settings(options)
    check_usage(p, options, settings)

    from accelerate.state import PartialState

    try:
        if options.suite:
            lines = _suite_lines(_run_suite(options, settings), options.out)
        elif options.recipe:
            lines = _recipe_lines(_run_recipe(options, settings), options.out)
        else:
            lines = _lines(_run_plain(options, settings))
    except KeyboardInterrupt:
        how = "run the same command again" if options.suite else "add --resume"
        print(f"Finished epochs are in {options.out}. To continue, {how}.", file=sys.stderr)
        raise
    if PartialState().is_main_process:
        width = max(18, *(len(name) + 2 for name, _ in lines))
        for name, value in lines:
            print(f"{name:<{width}}{value}")


def _run_options(options: argparse.Namespace) -> RunOptions:
    return RunOptions(
        resume=options.resume,
        workers=options.workers,
        progress=not options.quiet,
        tensorboard=options.tensorboard,
        trust_images=options.trust_images,
    )


def _run_plain(options: argparse.Namespace, given: Mapping[str, Any]) -> Result:
    settings = TrainingSettings(**given)

    from accelerate.state import PartialState

    from aoft_deploy.data.sources import load_data
    from aoft_deploy.training.run import train

    splits = load_data(options.data, seed=settings.seed)
    if PartialState().is_main_process:
        for sentence in splits.skipped:
            print(f"note: {sentence}.", file=sys.stderr)
    return train(splits, options.out, settings, _run_options(options))


def _run_recipe(options: argparse.Namespace, given: Mapping[str, Any]) -> Outcome:
    from aoft_deploy.training.paper_benchmarks.recipes import get_recipe
    from aoft_deploy.training.paper_benchmarks.task_run import load_splits, run_recipe

    recipe = get_recipe(options.recipe, given)
    splits = load_splits(recipe, Path(options.data), any_size=options.any_size)
    return run_recipe(recipe, splits, options.out, _run_options(options))


def _run_suite(options: argparse.Namespace, given: Mapping[str, Any]) -> Summary:
    from aoft_deploy.training.paper_benchmarks.suite import run_suite

    return run_suite(
        options.suite,
        Path(options.data),
        options.out,
        seeds=options.seeds or 3,
        tasks=options.tasks,
        given=given,
        any_size=options.any_size,
        options=_run_options(options),
    )


def _lines(result: Result) -> list[tuple[str, str]]:
    return [
        ("method", result.method),
        ("trained parameters", f"{result.update_parameters:,} + {result.head_parameters:,} (head)"),
        ("chosen epoch", f"{result.best_epoch} of {result.epochs}"),
        ("val accuracy", _percent(result.val_accuracy)),
        ("test accuracy", _percent(result.test_accuracy)),
        ("seconds", f"{result.seconds:.1f}"),
        ("checkpoint", f"{result.checkpoint} ({result.checkpoint_bytes:,} bytes)"),
    ]


def _recipe_lines(outcome: Outcome, out: Path) -> list[tuple[str, str]]:
    update, head = outcome.update_parameters, outcome.head_parameters
    return [
        ("task", outcome.task),
        ("method", outcome.method),
        ("trained parameters", f"{update:,} + {head:,} (head)"),
        ("chosen rate", f"{outcome.lr:g}"),
        ("chosen epoch", str(outcome.epoch)),
        ("val accuracy", f"{_percent(outcome.val_accuracy)} of the chosen rate and epoch"),
        ("test accuracy", f"{_percent(outcome.test_accuracy)} after training on train and val"),
        *(("deviation", deviation) for deviation in outcome.deviations),
        ("seconds", f"{outcome.seconds:.1f}"),
        ("checkpoint", str(out / "model.ckpt")),
    ]


def _suite_lines(summary: Summary, out: Path) -> list[tuple[str, str]]:
    means = [(summary.tasks_name, summary.mean_tasks), (summary.groups_name, summary.mean_groups)]
    changed = sorted({o.task for o in summary.outcomes if o.deviations})
    return [
        *((name, f"{mean:.2f}%") for name, mean in means if mean is not None),
        ("runs", f"{len(summary.outcomes)} of {summary.wanted}"),
        *[("other sizes", ", ".join(changed))][: len(changed)],
        ("table", str(out / "table.md")),
    ]


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.2%}"


if __name__ == "__main__":
    raise SystemExit(main())
