"""Train the tasks that come with aoft-demo, and write their example pictures.

    python tools/demo_tasks.py [--out demo/aoft_demo/bundled] [--tasks NAME …] [--epochs N]

It writes ``NAME.ckpt`` and two pictures for each offline task, and ``lora_angles.json``: the angles
of a LoRA on digits, which the demo shows next to AOFT's. The output is reproducible bit for bit on
the same machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from PIL import Image

from aoft_deploy.data.splits import Splits
from aoft_deploy.data.synthetic import load_task, task_names
from aoft_deploy.files import write_json
from aoft_deploy.training.analysis.quantities import analyse_file
from aoft_deploy.training.run import train
from aoft_deploy.training.settings import RunOptions, TrainingSettings

SETTINGS = {"rank": 64, "targets": ["q", "v"]}
"""Checkpoints have about 35 KB; more targets would triple them for little accuracy."""

TASKS = tuple(name for name in task_names() if name != "position")
"""The offline tasks without position, which so few parameters learn to only 25 % accuracy."""

EXAMPLES = 2


def save_examples(splits: Splits, name: str, folder: Path) -> None:
    """Write test images of different classes as ``NAME-CLASS.png``."""
    assert splits.test is not None
    step = len(splits.classes) // EXAMPLES
    wanted = [2 + step * i if step > 2 else step * i for i in range(EXAMPLES)]
    for label in wanted:
        index = list(splits.test.labels).index(label)
        image, _ = splits.test[index]
        assert isinstance(image, Image.Image)
        image.save(folder / f"{name}-{splits.classes[label]}.png", optimize=True)


def train_task(splits: Splits, method: str, epochs: int, target: Path, **values: object) -> float:
    """Fine-tune the bundled backbone on a task; return the test accuracy."""
    settings = TrainingSettings(method=method, method_settings=values, epochs=epochs)
    with tempfile.TemporaryDirectory() as folder:
        result = train(splits, Path(folder), settings, RunOptions(progress=True))
        target.write_bytes(result.checkpoint.read_bytes())
    assert result.test_accuracy is not None
    return result.test_accuracy


def save_lora_angles(images: int, epochs: int, folder: Path) -> None:
    """Write the angles between the columns of the matrices of a trained LoRA."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, splits = Path(scratch, "lora.ckpt"), load_task("digits", train=images)
        accuracy = train_task(splits, "lora", epochs, checkpoint, rank=64, targets=["q", "v"])
        angles = analyse_file(checkpoint)["angles"]
    kept = {kind: angles[kind] for kind in ("down", "up")}
    for figures in kept.values():
        del figures["random_counts"]
    about = {"task": "digits", "method": "lora", "rank": 64, "epochs": epochs}
    write_json(folder / "lora_angles.json", {**about, "accuracy": accuracy, "angles": kept})


def main() -> None:
    """Train, write the pictures, and print the accuracy of each task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo/aoft_demo/bundled"))
    parser.add_argument("--tasks", nargs="*", default=TASKS, metavar="NAME")
    parser.add_argument("--images", type=int, default=1000, help="training images of each task")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--no-lora", action="store_true", help="do not write lora_angles.json")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.tasks:
        checkpoint = options.out / f"{name}.ckpt"
        splits = load_task(name, train=options.images)
        accuracy = train_task(splits, "aoft-lora-star", options.epochs, checkpoint, **SETTINGS)
        save_examples(splits, name, options.out)
        print(json.dumps({"task": name, "test": accuracy, "bytes": checkpoint.stat().st_size}))
    if not options.no_lora:
        save_lora_angles(options.images, options.epochs, options.out)


if __name__ == "__main__":
    main()
