"""Small data sets in the layouts of the papers' benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["write_fgvc", "write_vtab"]


def write_vtab(
    root: Path, name: str, train: int = 8, val: int = 6, test: int = 6, classes: int = 2
) -> Path:
    """Write a task in VTAB's layout.

    Args:
        root: Folder of all tasks.
        name: Name of the task.
        train: Number of pictures in train800.
        val: Number of pictures in val200.
        test: Number of pictures in test.
        classes: Number of classes.

    Returns:
        The task's folder.
    """
    sizes = {"train800": train, "val200": val, "test": test}
    lists = {
        part: [(f"images/{part}/{i:06}.jpg", i % classes) for i in range(count)]
        for part, count in sizes.items()
    }
    both = [label for part in ("train800", "val200") for _, label in lists[part]]
    lists["train800val200"] = [
        (f"images/train800val200/{i:06}.jpg", label) for i, label in enumerate(both)
    ]
    for number, (part, entries) in enumerate(lists.items()):
        for i, (image, label) in enumerate(entries):
            _write_coloured(root / name / image, label, 1000 * number + i)
        text = "".join(f"{image} {label}\n" for image, label in entries)
        (root / name / f"{part}.txt").write_text(text)
    return root / name


def write_fgvc(root: Path, name: str, images: str = "", **parts: Sequence[int | str]) -> Path:
    """Write a data set in VPT's layout of FGVC.

    Args:
        root: Folder of all data sets.
        name: Name of the data set.
        images: Folder of the pictures, relative to the data set's.
        parts: Class ids of the pictures of each part, such as ``train``.

    Returns:
        The data set's folder.
    """
    for part, ids in parts.items():
        entries = {f"{value}/{part}{i}.jpg": value for i, value in enumerate(ids)}
        for i, (image, value) in enumerate(entries.items()):
            label = len(str(value)) + ord(str(value)[-1])
            _write_coloured(root / name / images / image, label, i)
        (root / name / f"{part}.json").write_text(json.dumps(entries))
    return root / name


def _write_coloured(path: Path, label: int, number: int) -> None:
    """Write a small JPEG whose hue depends on its class."""
    rng = np.random.default_rng([label, number])
    base = np.array([40 + 60 * (label % 4), 200 - 60 * (label % 4), 30 * (label % 7)])
    noisy = base + rng.normal(0, 15, (10, 12, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path)
