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
from benchmarks.gpu.steps import STEPS, Step
from benchmarks.gpu.table import write_table

EXPORTS = Step("exports", 600, "artefacts:export_all", artefacts=False)
"""Exports the artefacts on the CPU, beside the first steps."""

LEAST = 10
"""Seconds that must be left for another step to begin."""


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Check and measure the project on this machine's first NVIDIA GPU.",
    )
    options.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the results, a new one"
    )
    options.add_argument(
        "--only",
        nargs="+",
        default=[step.name for step in STEPS],
        choices=[step.name for step in STEPS],
        metavar="STEP",
        help=f"run only these steps: {', '.join(step.name for step in STEPS)}",
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
    """Run the chosen steps.

    Returns:
        0; 1 if a step or a check failed. Figures that this machine cannot give are no failure.
    """
    options = parser().parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    if (options.out / "results.jsonl").exists():
        parser().error(f"{options.out} has results of an earlier run: choose another --out")
    until = time.time() + options.seconds
    with tempfile.TemporaryDirectory(prefix="gpu-") as temporary:
        scratch = (options.scratch or Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        _prepare_environment(scratch, options.dry)
        chosen = [step for step in STEPS if step.name in options.only]
        exports = None
        if any(step.artefacts for step in chosen):
            exports = start(EXPORTS, _run(EXPORTS, options, scratch, until))
        for step in chosen:
            run = _run(step, options, scratch, until)
            if run.left < LEAST:
                run.note(step.name, not_measured="no time was left for this step")
                continue
            end(start(step, run), run)
            _show(options.out, step.name)
        if exports is not None:
            end(exports, _run(EXPORTS, options, scratch, until), wait=False)
            _show(options.out, EXPORTS.name)
    failed = write_table(options.out)
    print((options.out / "table.md").read_text("utf-8"))
    return 1 if failed else 0


def _prepare_environment(scratch: Path, dry: bool) -> None:
    """Set what all steps and the commands that they start inherit."""
    os.environ |= {"AOFT_CACHE_DIR": str(scratch / "graphs"), "HF_HUB_OFFLINE": "1"}
    if dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    root = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    )


def _run(step: Step, options: argparse.Namespace, scratch: Path, until: float) -> Run:
    seconds = min(step.seconds, until - time.time())
    return Run(step.name, options.out.resolve(), scratch, options.dry, time.time() + seconds)


def _show(out: Path, step: str) -> None:
    """Print the rows of a step."""
    results = out / "results.jsonl"
    for line in results.read_text("utf-8").splitlines() if results.exists() else []:
        if json.loads(line)["step"] == step:
            print(line[:400], flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
