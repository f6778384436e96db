"""aoft-train: fine-tune a backbone on a folder of images, or on the papers' benchmarks."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.cli.command import run
from aoft_deploy.cli.train_options import TASKS, check_usage, given_settings, parser
from aoft_deploy.training.settings import RunOptions, TrainingSettings

if TYPE_CHECKING:
    from aoft_deploy.data.splits import Splits

__all__ = ["main", "parser"]

Rows = list[tuple[str, str]]

DEMO_BACKBONE = """\
note: Without --backbone, aoft_vit_nano is trained, a small demo model for 64 x 64 pixels. For \
photographs, choose a pre-trained one, such as --backbone vit_base_patch16_224.augreg_in21k, which \
is downloaded from the Hugging Face Hub; without a network, give its file as --backbone-weights."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``aoft-train --help``."""
    p = parser()
    return run(p, partial(_train, p), argv)


def _train(p: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    settings = given_settings(options)
    check_usage(p, options, settings)

    from accelerate.state import PartialState

    from aoft_deploy.memory import keep_large_blocks

    keep_large_blocks()  # each step needs what the last one freed
    runs = _run_suite if options.suite else _run_recipe if options.recipe else _run_plain
    try:
        rows, splits = runs(options, settings)
    except KeyboardInterrupt:
        if any(options.out.rglob("resume.safetensors")):
            how = "run the same command again" if options.suite else "add --resume"
            print(f"Finished epochs are in {options.out}. To continue, {how}.", file=sys.stderr)
        raise
    if PartialState().is_main_process:
        width = max(18, *(len(name) + 2 for name, _ in rows))
        for name, value in rows:
            print(f"{name:<{width}}{value}", flush=True)
        if splits is not None and not options.quiet:
            print("\nNext:", *_next_commands(options, splits), sep="\n  ", file=sys.stderr)


def _run_options(options: argparse.Namespace) -> RunOptions:
    names = {field.name for field in fields(RunOptions)} - {"progress"}
    given = {name: getattr(options, name) for name in names}
    return RunOptions(progress=not options.quiet, **given)


def _run_plain(options: argparse.Namespace, given: Mapping[str, Any]) -> tuple[Rows, Splits]:
    settings, how = TrainingSettings(**given), _run_options(options)

    from accelerate.state import PartialState

    from aoft_deploy.data.folder import check_outside
    from aoft_deploy.data.sources import load_data
    from aoft_deploy.training.run import train

    splits = load_data(options.data, seed=settings.seed)
    check_outside(splits, options.out)
    if PartialState().is_main_process:
        if "backbone" not in given and options.data not in TASKS:
            print(DEMO_BACKBONE, file=sys.stderr)
        for sentence in splits.notes:
            print(f"note: {sentence}.", file=sys.stderr)
    result = train(splits, options.out, settings, how)
    file = options.out / "unreadable.json"
    left_out = [("left out", f"{result.left_out:,} unreadable, see {file}")]
    return [
        ("method", result.method),
        ("trained parameters", f"{result.update_parameters:,} + {result.head_parameters:,} (head)"),
        ("chosen epoch", f"{result.best_epoch} of {result.epochs}"),
        ("val accuracy", _percent(result.val_accuracy)),
        ("test accuracy", _percent(result.test_accuracy)),
        *(left_out if result.left_out else []),
        ("seconds", f"{result.seconds:.1f}"),
        ("checkpoint", f"{result.checkpoint} ({result.checkpoint_bytes:,} bytes)"),
    ], splits


def _run_recipe(options: argparse.Namespace, given: Mapping[str, Any]) -> tuple[Rows, Splits]:
    from aoft_deploy.training.paper_benchmarks.recipes import get_recipe
    from aoft_deploy.training.paper_benchmarks.task_run import load_splits, run_recipe

    recipe = get_recipe(options.recipe, given)
    splits = load_splits(recipe, Path(options.data), any_size=options.any_size)
    outcome = run_recipe(recipe, splits, options.out, _run_options(options))
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
        ("checkpoint", str(options.out / "model.ckpt")),
    ], splits


def _run_suite(options: argparse.Namespace, given: Mapping[str, Any]) -> tuple[Rows, None]:
    from aoft_deploy.training.paper_benchmarks.suite import run_suite

    summary = run_suite(
        options.suite,
        Path(options.data),
        options.out,
        seeds=options.seeds or 3,
        tasks=options.tasks,
        given=given,
        any_size=options.any_size,
        options=_run_options(options),
    )
    means = [(summary.tasks_name, summary.mean_tasks), (summary.groups_name, summary.mean_groups)]
    changed = sorted({o.task for o in summary.outcomes if o.deviations})
    return [
        *((name, f"{mean:.2f}%") for name, mean in means if mean is not None),
        ("runs", f"{len(summary.outcomes)} of {summary.wanted}"),
        *[("other sizes", ", ".join(changed))][: len(changed)],
        ("table", str(options.out / "table.md")),
    ], None


def _next_commands(options: argparse.Namespace, splits: Splits) -> list[str]:
    """Commands that export, try and serve the trained model, quoted for the shell."""
    from aoft_deploy.training.image_check import leave_out
    from aoft_deploy.training.run_folder import RunFolder

    splits = leave_out(splits, RunFolder(options.out).left_out())
    weights = getattr(options, "backbone_weights", None)
    artefact, images = options.out / "model.onnx", splits.test or splits.val
    picture = images.images[-1] if images.files() else "IMAGE"
    export: list[object] = ["aoft-export", "--merge", options.out / "model.ckpt"]
    export += ["--backbone-weights", weights] if weights else []
    for module in getattr(options, "import", ()):
        export += ["--import", module]
    export += ["--overwrite"] if artefact.exists() else []
    commands = export, ["aoft-predict", artefact, picture], ["aoft-serve", artefact]
    return [shlex.join(map(str, command)) for command in commands]


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.2%}"


if __name__ == "__main__":
    raise SystemExit(main())
