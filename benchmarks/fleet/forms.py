"""Two forms of an RLRR fleet: a second product with every weight, or folding one task at a time.

In a mixed batch, RLRR needs a second product for each sample. Folding needs a pass over the weights
for each task of the batch, and then runs that task's samples like a merged model. Which form is
faster depends on the number of samples per task in a batch; this script finds the crossing point.
All variants take turns.

    python benchmarks/fleet/forms.py --out benchmarks/results/fleet_forms.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fleet import session, write_tasks

from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.export.fleet import export_fleet
from aoft_deploy.export.merged import export_merged
from aoft_deploy.fleet.fleet import Fleet
from aoft_deploy.processors import processors


def main() -> None:
    """Measure both forms, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--method", default="rlrr")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.tasks = [options.batch]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tasks, weights = write_tasks(options, folder), folder / "backbone.safetensors"
        merged = session(
            export_merged(
                tasks[0], folder / "merged.onnx", backbone=BackboneSource(weights=weights)
            ).path,
            options,
        )
        fleets = {
            form: Fleet(
                export_fleet(
                    tasks[:2],
                    folder / f"{form}.onnx",
                    form=form,
                    backbone=BackboneSource(weights=weights),
                ).path,
                threads=options.threads,
            )
            for form in ("mixed", "folded")
        }
        for fleet in fleets.values():
            for path in tasks[2:]:
                fleet.add(path)
        side = fleets["mixed"].preprocessing.height
        rng = np.random.default_rng(0)
        images = rng.normal(size=(options.batch, 3, side, side)).astype(np.float32)
        variants: dict[str, Callable[[], Any]] = {
            "merged": lambda: merged.run(None, {"pixel_values": images}),
            "mixed": lambda: fleets["mixed"].predict(
                images, [f"t{i}" for i in range(options.batch)]
            ),
        }
        each = 1
        while each <= options.batch:
            names = [f"t{i // each}" for i in range(options.batch)]
            variants[f"folded, {each} of a task"] = lambda names=names: fleets["folded"].predict(
                images, names
            )
            each *= 2
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(options.rounds + 1):
            for name, run in variants.items():
                start = time.perf_counter()
                run()
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    rows = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in rows.items():
        print(f"{name:22}{median:8.3f} s {rows['merged'] / median:7.3f} of merged")
    if options.out:
        settings = {k: v for k, v in vars(options).items() if k not in ("out", "tasks")}
        options.out.write_text(json.dumps({"where": settings, "seconds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
