"""Train on scanned digits, export a verified, merged ONNX model, and report measurements.

    make quickstart        (or: python tools/quickstart.py [--out DIR] [--epochs N])

The script uses the public commands: it trains AOFT* on the bundled backbone, exports the merged
model and classifies image files with it. It then compares the merged model with the unmerged model
and with the plain backbone.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
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


def command(program: Callable[[Sequence[str]], int], name: str, *arguments: object) -> None:
    """Print a command and run it."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ {name} {' '.join(words)}", flush=True)
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
        paths.append(folder / f"a-{label}-{i}.png")
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
    """Train, export, predict, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    out: Path = options.out
    start = time.perf_counter()
    if out.exists():
        shutil.rmtree(out)
    method = ("--method", METHOD, "--rank", 64, "--targets", "q", "v", "fc1", "fc2")
    arguments = ("--data", TASK, *method, "--epochs", options.epochs, "--out", out)
    command(train_command.main, "aoft-train", *arguments)
    command(export_command.main, "aoft-export", "--merge", out / "model.ckpt")
    test = load_task(TASK).test
    assert test is not None
    pictures = save_pictures(test, out / "pictures")
    command(predict_command.main, "aoft-predict", out / "model.onnx", *pictures)
    rows = report(out, test)
    print(f"\n{METHOD} on {TASK}, {BACKBONE}, {time.perf_counter() - start:.0f} s in all")
    for name, value in rows:
        print(f"  {name:44}{value}")


if __name__ == "__main__":
    main()
