"""Images a second of ``aoft-train`` on the bundled backbone, of one or more source trees.

Each run is the command in a process of its own, as a user starts it. The trees take turns, in the
opposite order every other round. A figure is that of the last epoch of a run, which the command
writes into metrics.jsonl; the table has the median over the rounds, and the median of the ratios
to the last tree, such as a checkout of an older version.

    git worktree add ../before v0.1 --detach
    python benchmarks/tuning/training_run.py --trees . ../before --out FILE
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from aoft_deploy.artefacts.machine import machine


def images_per_second(tree: Path, options: argparse.Namespace) -> float:
    """Images a second of the last epoch of one run."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--data", "digits", "--out", f"{folder}/run", "--quiet"]
        for name in ("epochs", "method", "precision", "augment"):
            arguments += [f"--{name}", str(getattr(options, name))]
        if options.img_size:
            arguments += ["--img-size", str(options.img_size)]
        subprocess.run(
            [sys.executable, "-m", "aoft_deploy.cli.train", *arguments],
            env={**os.environ, "PYTHONPATH": str(tree.resolve())},
            stdout=subprocess.DEVNULL,
            check=True,
            cwd=folder,
        )
        lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
    speeds = [json.loads(line).get("images_per_second") for line in lines]
    return float([speed for speed in speeds if speed is not None][-1])


def main() -> None:
    """Measure, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trees", type=Path, nargs="+", default=[Path()])
    parser.add_argument("--method", default="aoft-lora-star")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="fp32")
    parser.add_argument("--augment", default="none")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    speeds: list[list[float]] = [[] for _ in options.trees]
    for turn in range(options.rounds):
        order = list(enumerate(options.trees))
        for i, tree in reversed(order) if turn % 2 else order:
            speeds[i].append(images_per_second(tree, options))
    rows = [
        {
            "images_per_second": statistics.median(found),
            "ratio": statistics.median(a / b for a, b in zip(found, speeds[-1], strict=True)),
            "all": found,
        }
        for found in speeds
    ]
    print(f"{'tree':30}{'images/s':>10}{'x last':>9}")
    for tree, row in zip(options.trees, rows, strict=True):
        print(f"{tree!s:30}{row['images_per_second']:10.1f}{row['ratio']:9.3f}")
    if options.out:
        names = ("method", "precision", "augment", "epochs", "img_size", "rounds")
        report = {
            "command": "python benchmarks/tuning/training_run.py " + " ".join(sys.argv[1:]),
            "machine": {**machine(torch.get_num_threads()), "torch": torch.__version__},
            "settings": {name: getattr(options, name) for name in names},
            "trees": rows,
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
