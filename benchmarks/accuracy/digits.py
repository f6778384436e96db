"""Value of fine-tuning the bundled backbone: digits with 1,000 training images.

The script compares linear probes on random and on the bundled weights, and fine-tuning methods on
the bundled weights, with the default settings of aoft-train and several seeds. The epoch is chosen
on the validation images; the result is the accuracy on the 597 test images.

    python benchmarks/accuracy/digits.py --out benchmarks/results/digits.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

import aoft_deploy.tuning.backbones.bundled  # noqa: F401  (registers aoft_vit_nano with timm)
from aoft_deploy.data.synthetic import load_task
from aoft_deploy.training.run import train
from aoft_deploy.training.settings import TrainingSettings

WIDE = {"rank": 64, "targets": ["q", "v", "fc1", "fc2"]}

RUNS: dict[str, tuple[str, dict[str, object], bool]] = {
    "linear, random weights": ("linear", {}, True),
    "linear": ("linear", {}, False),
    "lora": ("lora", {}, False),
    "aoft-lora": ("aoft-lora", {}, False),
    "aoft-lora-star": ("aoft-lora-star", {}, False),
    "aoft-lora-star, wide": ("aoft-lora-star", WIDE, False),
    "rlrr": ("rlrr", {}, False),
}
"""Method, its settings, and whether the backbone's weights are random."""


def main() -> None:
    """Train all runs, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="digits")
    parser.add_argument("--images", type=int, default=1000, help="training images")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        torch.manual_seed(0)
        random = folder / "random.safetensors"
        save_file(timm.create_model("aoft_vit_nano", num_classes=0).state_dict(), random)
        for name in options.runs:
            method, method_settings, is_random = RUNS[name]
            results = [
                train(
                    load_task(options.task, seed=seed, train=options.images),
                    folder / f"{name}-{seed}",
                    TrainingSettings(
                        method=method,
                        method_settings=method_settings,
                        epochs=options.epochs,
                        seed=seed,
                        backbone_weights=random if is_random else None,
                    ),
                )
                for seed in range(options.seeds)
            ]
            accuracies = [r.test_accuracy for r in results if r.test_accuracy is not None]
            rows[name] = {
                "accuracies": accuracies,
                "mean": statistics.mean(accuracies),
                "update_parameters": results[0].update_parameters,
                "checkpoint_bytes": results[0].checkpoint_bytes,
                "seconds": statistics.median(r.seconds for r in results),
            }
            listed = ", ".join(f"{a:.2%}" for a in accuracies)
            print(f"{name:24}{statistics.mean(accuracies):8.2%}  ({listed})", flush=True)
    if options.out:
        settings = {k: getattr(options, k) for k in ("task", "images", "epochs", "seeds")}
        options.out.write_text(json.dumps({**settings, "runs": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
