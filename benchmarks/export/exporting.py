"""Time the first export of a backbone and the export of further tasks.

Each round starts with an empty graph cache and exports tasks of one ViT with random weights.
``command`` runs ``aoft-export`` for each of two tasks. ``within`` exports three tasks in one
process, without the time to start Python and import torch, timm and onnx. Figures are medians.

    python benchmarks/export/exporting.py --out benchmarks/results/exporting.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from aoft_deploy.artefacts.machine import machine
from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.processors import processors
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.backbone import create_backbone

WITHIN = """
import json, sys, time
from pathlib import Path
import onnxruntime, torch, timm, onnx
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.export.merged import export_merged
backbone = BackboneSource(weights=Path(sys.argv[1]))
seconds = []
for task in sys.argv[2:]:
    start = time.perf_counter()
    export_merged(Path(task), backbone=backbone, overwrite=True)
    seconds.append(time.perf_counter() - start)
print(json.dumps(seconds))
"""


def tasks(model: str, folder: Path) -> tuple[Path, list[Path]]:
    """A file of random backbone weights and three checkpoints on it."""
    torch.manual_seed(0)
    weights = folder / "backbone.safetensors"
    save_file(timm.create_model(model, num_classes=0).state_dict(), weights)
    half = (0.5, 0.5, 0.5)
    paths = []
    for name in ("first", "second", "third"):
        backbone, identity = create_backbone(model, num_classes=20, weights=weights)
        size = int(backbone.pretrained_cfg["input_size"][-1])  # type: ignore[index]
        tuned = attach(backbone, "aoft-lora-star", backbone=identity)
        with torch.no_grad():
            for parameter in tuned.trained().values():
                parameter.add_(0.02 * torch.randn_like(parameter))
        paths.append(folder / f"{name}.ckpt")
        classes = [f"c{i}" for i in range(20)]
        save(tuned, paths[-1], classes=classes, preprocessing=Preprocessing(size, 0.9, half, half))
    return weights, paths


def main() -> None:
    """Time the exports, print the figures and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"command first": [], "command further": []}
    seconds |= {"within first": [], "within further": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights, paths = tasks(options.model, folder)
        for turn in range(options.rounds):
            environment = {**os.environ, "AOFT_CACHE_DIR": str(folder / f"command{turn}")}
            for path, kind in zip(paths[:2], ("first", "further"), strict=True):
                command = [sys.executable, "-m", "aoft_deploy.cli.export", "--merge", str(path)]
                start = time.perf_counter()
                subprocess.run(
                    [*command, "--backbone-weights", str(weights), "--overwrite"],
                    env=environment,
                    check=True,
                    capture_output=True,
                )
                seconds[f"command {kind}"].append(time.perf_counter() - start)
            environment["AOFT_CACHE_DIR"] = str(folder / f"within{turn}")
            done = subprocess.run(
                [sys.executable, "-c", WITHIN, str(weights), *map(str, paths)],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            )
            first, *further = json.loads(done.stdout.splitlines()[-1])
            seconds["within first"].append(first)
            seconds["within further"] += further
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result: dict[str, Any] = {"machine": machine(processors()), "model": options.model}
    result |= {"medians": medians, "seconds": seconds}
    for kind in ("command", "within"):
        first, further = medians[f"{kind} first"], medians[f"{kind} further"]
        print(f"{kind}: first {first:.1f} s, further {further:.1f} s, {further / first:.0%}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
