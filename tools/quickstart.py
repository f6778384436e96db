"""Train on scanned digits, export a verified, merged ONNX model, and report measurements.

    make quickstart        (or: python tools/quickstart.py [--out DIR] [--epochs N])

The script runs the public commands and says what each does. It then compares the exported model
with the trained one and with the backbone alone, and names three commands to go on with.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy import load
from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.prediction import load_classifier
from aoft_deploy.artefacts.registry import get_exporter
from aoft_deploy.artefacts.spec import ExportSpec, InputSpec
from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.cli import export as export_command
from aoft_deploy.cli import predict as predict_command
from aoft_deploy.cli import train as train_command
from aoft_deploy.data.splits import ImageList
from aoft_deploy.data.synthetic import load_task
from aoft_deploy.tuning.backbones.backbone import create_backbone

TASK, METHOD, BACKBONE = "digits", "aoft-lora-star", "aoft_vit_nano"
OUT = Path("runs/quickstart")

TRAINING = f"""
1. Fine-tune {BACKBONE}, a small backbone that comes with this package, on 1,000 scanned digits.
   AOFT* ({METHOD}) trains vectors that generate low-rank changes (rank 64) of four linear maps
   in each block: q and v of the attention, fc1 and fc2 of the MLP. The backbone stays frozen."""

EXPORT = """
2. Fold the trained changes into the backbone's weights, and write an ONNX file. The file appears
   only if its answers are those of the trained model."""

PREDICTION = """
3. Classify five test images with the file, without PyTorch: 7-0.png shows a 7."""

MEANING = """\
  unmerged: the trained model, with its changes beside the frozen weights; merged: the ONNX file.
  max |Δlogit| is the largest difference between their outputs, top-1 agreement the share of images
  with the same top class. The merged model takes as long as the backbone alone."""

NEXT = """
Next, to copy:
  # serve the model, and ask it from another terminal
  {bin}/aoft-serve {out}/model.onnx
  curl --data-binary @{picture} http://127.0.0.1:8000/v2/models/model/classify
  # train on your own photographs: FOLDER has a folder for each class; the backbone is downloaded,
  # 0.4 GB
  {bin}/aoft-train --data FOLDER --backbone vit_base_patch16_224.augreg_in21k --out runs/mine
  # see many tasks on one backbone in a browser
  {bin}/python -m pip install --editable '.[demo]' && {bin}/aoft-demo"""


def command(
    purpose: str, program: Callable[[Sequence[str]], int], name: str, *arguments: object
) -> None:
    """Print what a command is for and the command, and run it."""
    words = [str(argument) for argument in arguments]
    print(f"{purpose}\n$ {name} {' '.join(words)}", flush=True)
    if program(words):
        raise SystemExit(1)


def test_inputs(
    checkpoint: Path, images: ImageList
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The preprocessed test images and their labels."""
    prepare = read_checkpoint(checkpoint).preprocessing
    pairs = [images[i] for i in range(len(images))]
    return np.stack([prepare(image) for image, _ in pairs]), np.array([label for _, label in pairs])


def latencies(
    runs: Sequence[Callable[[NDArray[np.float32]], object]], batch: NDArray[np.float32]
) -> list[float]:
    """Median milliseconds of each, timed alternately."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(60):
        for run, durations in zip(runs, times, strict=True):
            start = time.perf_counter()
            run(batch)
            durations.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(durations[10:]) for durations in times]


def save_pictures(images: ImageList, folder: Path, count: int = 5) -> list[Path]:
    """Write some test images as files named by their class."""
    folder.mkdir(parents=True)
    paths = []
    for i in range(count):
        image, label = images[i]
        assert isinstance(image, Image.Image)
        paths.append(folder / f"{label}-{i}.png")
        image.save(paths[-1])
    return paths


def plain_backbone(path: Path, classes: int, size: int) -> None:
    """Export the backbone without training, with the same exporter."""
    model, _ = create_backbone(BACKBONE, num_classes=classes)
    half = (0.5, 0.5, 0.5)
    get_exporter("onnx").export(
        model, path, ExportSpec(InputSpec(size, size, False, half, half), {})
    )


def report(out: Path, images: ImageList) -> list[tuple[str, str]]:
    """The measurements, one row each."""
    checkpoint, artefact, plain = out / "model.ckpt", out / "model.onnx", out / "plain.onnx"
    x, labels = test_inputs(checkpoint, images)
    tuned, merged = load(checkpoint), load_classifier(artefact).engine
    plain_backbone(plain, tuned.num_classes, x.shape[-1])
    untrained = get_exporter("onnx").load(plain, EngineOptions())
    with torch.inference_mode():
        before = tuned(torch.from_numpy(x)).numpy()
    after = merged.run(x)
    speed = latencies([merged.run, untrained.run], x[:1])
    trained = {n: p.numel() for n, p in tuned.trained().items()}
    head = sum(count for name, count in trained.items() if name.startswith("head."))
    frozen = sum(p.numel() for p in tuned.parameters() if not p.requires_grad)
    return [
        ("trained parameters", f"{sum(trained.values()) - head:,} + {head:,} in the classifier"),
        ("frozen backbone", f"{frozen:,} parameters"),
        ("checkpoint", f"{checkpoint.stat().st_size / 1024:.0f} KiB"),
        (
            f"test accuracy, unmerged ({len(labels)} images)",
            f"{(before.argmax(1) == labels).mean():.2%}",
        ),
        ("test accuracy, merged ONNX", f"{(after.argmax(1) == labels).mean():.2%}"),
        ("max |Δlogit|", f"{np.abs(after - before).max():.1e}"),
        ("top-1 agreement", f"{(after.argmax(1) == before.argmax(1)).mean():.2%}"),
        ("latency merged / plain backbone", f"{speed[0]:.2f} / {speed[1]:.2f} ms, batch 1"),
    ]


def main() -> None:
    """Train, export, predict, report, and say how to go on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help=f"a new folder ({OUT})")
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    out: Path = options.out
    start = time.perf_counter()
    if out == OUT:
        shutil.rmtree(out, ignore_errors=True)
    elif out.exists():
        parser.error(f"{out} exists: give another --out")
    method = ("--method", METHOD, "--rank", 64, "--targets", "q", "v", "fc1", "fc2")
    arguments = ("--data", TASK, *method, "--epochs", options.epochs, "--out", out)
    command(TRAINING, train_command.main, "aoft-train", *arguments)
    command(EXPORT, export_command.main, "aoft-export", "--merge", out / "model.ckpt")
    test = load_task(TASK).test
    assert test is not None
    pictures = save_pictures(test, out / "pictures")
    command(PREDICTION, predict_command.main, "aoft-predict", out / "model.onnx", *pictures)
    rows = report(out, test)
    print(f"\n{METHOD} on {TASK}, {BACKBONE}, {time.perf_counter() - start:.0f} s in all")
    for name, value in rows:
        print(f"  {name:44}{value}")
    print(MEANING)
    programs = os.path.relpath(Path(sys.executable).parent)
    print(NEXT.format(bin=programs, out=out, picture=pictures[0]))


if __name__ == "__main__":
    main()
