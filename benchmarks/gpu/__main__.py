"""Run the steps, each in a process of its own, and write the table of their results."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.processes import end, start
from benchmarks.gpu.run import Run
from benchmarks.gpu.steps import EXPORTS, STEPS, Step
from benchmarks.gpu.table import write_table

__all__ = ["main", "run_steps"]

DRY_FACTOR = 3
"""How much longer a step may take on a CPU, which compiles and exports on few cores."""

LEAST = 10
"""Seconds that must be left for another step to begin."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Check and measure the project on this machine's first NVIDIA GPU.",
    )
    names = [step.name for step in STEPS]
    options.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the results, a new one"
    )
    options.add_argument(
        "--only",
        nargs="+",
        default=names,
        choices=names,
        metavar="STEP",
        help=f"run only these steps: {', '.join(names)}",
    )
    options.add_argument(
        "--seconds", type=float, default=600, metavar="N", help="time for all steps (default: 600)"
    )
    options.add_argument(
        "--scratch",
        type=Path,
        metavar="DIR",
        help="keep checkpoints and artefacts here for another run (default: a temporary folder)",
    )
    options.add_argument(
        "--dry", action="store_true", help="run every step on the CPU with a tiny model"
    )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen steps and write the table.

    Returns:
        0; 1 if a step or a check failed. What this machine cannot measure is no failure.
    """
    options = parser().parse_args(argv)
    out: Path = options.out.resolve()
    if (out / "results.jsonl").exists():
        parser().error(f"{options.out} has results of an earlier run: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    chosen = [step for step in STEPS if step.name in options.only]
    with tempfile.TemporaryDirectory(prefix="gpu-") as temporary:
        scratch: Path = (options.scratch or Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        exports = bool(options.scratch) or any(step.artefacts for step in chosen)
        run_steps(chosen, out, scratch, options.dry, options.seconds, exports=exports)
    failed = write_table(out)
    print((out / "table.md").read_text("utf-8"))
    return 1 if failed else 0


def run_steps(
    steps: Sequence[Step],
    out: Path,
    scratch: Path,
    dry: bool,
    seconds: float,
    *,
    exports: bool,
) -> None:
    """Run steps one after the other, and print the rows of each.

    Args:
        steps: The steps.
        out: Folder of the results.
        scratch: Folder of checkpoints and artefacts.
        dry: Whether to run on the CPU with a tiny model.
        seconds: Time for all steps.
        exports: Whether to export the artefacts beside the first steps. Those that no step waits
            for are finished too.
    """
    _set_environment(scratch, dry)
    until = time.time() + seconds

    def run_of(step: Step) -> Run:
        budget = step.seconds * (DRY_FACTOR if dry else 1)
        return Run(step.name, out, scratch, dry, min(time.time() + budget, until))

    exporting = run_of(EXPORTS)
    exporter = start(EXPORTS, exporting) if exports else None
    for step in steps:
        run = run_of(step)
        if run.left < LEAST:
            run.note(step.name, not_measured="no time was left for this step")
        else:
            end(start(step, run), run)
        _print_rows(out, step)
    if exporter is not None:
        end(exporter, exporting)
        _print_rows(out, EXPORTS)


def _set_environment(scratch: Path, dry: bool) -> None:
    """Set what all steps and the commands that they start inherit."""
    root, given = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
    os.environ |= {
        "AOFT_CACHE_DIR": str(scratch / "graphs"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([root, given] if given else [root]),
    }
    if dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _print_rows(out: Path, step: Step) -> None:
    for line in (out / "results.jsonl").read_text("utf-8").splitlines():
        if json.loads(line)["step"] == step.name:
            print(line[:400], flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
