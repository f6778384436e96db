"""Time commands from their start to their first useful act.

Timed are: Python itself; ``aoft-export --help``; ``aoft-predict`` on one image, with a small and
with a large model; ``aoft-serve`` until it is ready, with a merged model and with a fleet and a
store of tasks; ``aoft-train`` on the bundled backbone until its first step. Models have random
weights. ``--before`` names an earlier checkout, whose commands take turns with this one's, on the
same artefacts. Each command runs once before the first round.

    python benchmarks/export/starting.py --out benchmarks/results/starting.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from measured import Measured, environment, medians, run
from PIL import Image
from safetensors.torch import save_file

from aoft_deploy.artefacts.machine import machine
from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.processors import processors
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.backbone import create_backbone

CLI = "aoft_deploy.cli."

Commands = dict[str, tuple[list[object], str]]

FIRST_STEP = """
import os, sys
from aoft_deploy.cli.train import main
def start():
    from aoft_deploy.training.learner import Learner
    Learner._backward = lambda *given, **options: os._exit(0)
import aoft_deploy.cli.train as command
body = command._run_plain
command._run_plain = lambda *given: (start(), body(*given))[1]
main(sys.argv[1:])
sys.exit("no step")
"""


def tasks(model: str, count: int, folder: Path) -> tuple[Path, Path]:
    """A file of random backbone weights, and a folder of checkpoints on it."""
    torch.manual_seed(0)
    weights, store = folder / f"{model}.safetensors", folder / f"{model}-tasks"
    store.mkdir()
    save_file(timm.create_model(model, num_classes=0).state_dict(), weights)
    backbone, identity = create_backbone(model, num_classes=10, weights=weights)
    size, half = int(backbone.pretrained_cfg["input_size"][-1]), (0.5, 0.5, 0.5)  # type: ignore[index]
    tuned = attach(backbone, "aoft-lora-star", backbone=identity)
    for i in range(count):
        with torch.no_grad():
            for parameter in tuned.trained().values():
                parameter.copy_(0.02 * torch.randn_like(parameter))
        save(tuned, store / f"task{i}.ckpt", preprocessing=Preprocessing(size, 0.9, half, half))
    return weights, store


def images(folder: Path) -> tuple[Path, Path]:
    """A picture, and a labelled folder to train on."""
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        for split in ("train", "val"):
            place = folder / "images" / split / label
            place.mkdir(parents=True, exist_ok=True)
            for i in range(8):
                pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return place / "0.png", folder / "images"


def artefacts(model: str, count: int, folder: Path, given: dict[str, str]) -> tuple[Path, Path]:
    """A merged model and a fleet of one task, beside its store, unless they are there."""
    merged, fleet = folder / f"{model}.onnx", folder / f"{model}-fleet.onnx"
    if not merged.exists():
        weights, store = tasks(model, count, folder)
        for kind, target in (("--merge", merged), ("--fleet", fleet)):
            words = ["-m", f"{CLI}export", kind, store / "task0.ckpt", "-o", target]
            run([*words, "--backbone-weights", weights], given)
    return merged, fleet


def commands(options: argparse.Namespace, folder: Path, given: dict[str, str]) -> Commands:
    """Each timed command with the line that it is timed to; empty means its end."""
    small, _ = artefacts(options.small, 1, folder, given)
    merged, fleet = artefacts(options.model, options.tasks, folder, given)
    picture, data = images(folder)
    serve = ["-m", f"{CLI}serve", "--port", 0]
    train = ["--data", data, "--out", folder / "run", "--overwrite", "--quiet"]
    store = folder / f"{options.model}-tasks"
    return {
        "python": (["-c", ""], ""),
        "export --help": (["-m", f"{CLI}export", "--help"], ""),
        "predict": (["-m", f"{CLI}predict", small, picture], ""),
        "predict, large": (["-m", f"{CLI}predict", merged, picture], ""),
        "serve merged": ([*serve, merged], '"ready"'),
        "serve fleet": ([*serve, fleet, "--store", store], '"ready"'),
        "train to first step": (["-c", FIRST_STEP, *train], ""),
    }


def main() -> None:
    """Time the commands, print the figures and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="model to serve")
    parser.add_argument("--small", default="vit_tiny_patch16_224", help="model to predict with")
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path, help="an earlier checkout to compare with")
    parser.add_argument("--made", type=Path, help="folder for the artefacts, to use them again")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs = dict[str, list[Measured]]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sides = {"now": environment(folder / "now")}
        if options.before:
            sides["before"] = environment(folder / "before", options.before)
        made = folder if options.made is None else options.made.resolve()
        timed = commands(options, made, sides["now"])
        for turn in range(options.rounds + 1):
            for name, (words, until) in timed.items():
                for side, given in sides.items():
                    measured = run(words, given, until)
                    if turn:
                        runs.setdefault(f"{name}, {side}", []).append(measured)
    result: dict[str, Any] = {
        "machine": machine(processors()),
        **{key: getattr(options, key) for key in ("model", "small", "tasks", "rounds")},
        "medians": {name: medians(found) for name, found in runs.items()},
        "runs": runs,
    }
    print(result["machine"])
    for name, found in result["medians"].items():
        print(
            f"{name}: {found['seconds']:.2f} s, {found['cpu']:.2f} s of CPU, {found['peak']:.0f} MB"
        )
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
