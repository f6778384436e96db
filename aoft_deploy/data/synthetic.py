"""Small offline tasks: real scanned digits, and drawn scenes similar to tasks of VTAB.

A scene task is one function in ``scenes`` that draws an image of a given class, and one entry in
``_TASKS``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.data.scenes import (
    ANGLES,
    HUES,
    IMAGE_SIDE,
    SHAPE_NAMES,
    Canvas,
    Scene,
    colour_scene,
    count_scene,
    orientation_scene,
    position_scene,
    shape_scene,
)
from aoft_deploy.data.splits import ImageList, Splits, check_seed
from aoft_deploy.errors import SettingError, UnknownNameError, optional_imports

__all__ = ["load_task", "task_names"]


class _Task(Protocol):
    def __call__(self, *, seed: int, train: int, val: int, test: int | None) -> Splits: ...


def task_names() -> tuple[str, ...]:
    """Names of the offline tasks, sorted."""
    return tuple(sorted(_TASKS))


def load_task(
    name: str, *, seed: int = 0, train: int = 1000, val: int = 200, test: int | None = None
) -> Splits:
    """Create an offline task; the same arguments give the same pixels.

    Args:
        name: One of :func:`task_names`.
        seed: Seed of the scenes, or of the order of the digits, from 0.
        train: Number of training images, from 1.
        val: Number of validation images, from 1.
        test: Number of test images; 0 for none. None for 1,000 scenes or all remaining digits.

    Returns:
        Splits of uint8 images of shape ``(64, 64, 3)``; scenes cycle through the classes.

    Raises:
        UnknownNameError: No such task.
        SettingError: A number is outside its range, or exceeds the 1,797 digits that exist.
    """
    if name not in _TASKS:
        raise UnknownNameError("task", name, _TASKS)
    for what, number, least in (("train", train, 1), ("val", val, 1), ("test", test, 0)):
        if number is not None and number < least:
            raise SettingError(f"`{what}` is {number}, but must be a whole number from {least}.")
    check_seed(seed)
    splits = _TASKS[name](seed=seed, train=train, val=val, test=test)
    return replace(splits, source=f"{name}, a built-in task")


def _digits(*, seed: int, train: int, val: int, test: int | None) -> Splits:
    """Scanned digits of 8 x 8 pixels (UCI optdigits, from scikit-learn), enlarged."""
    with optional_imports():
        from sklearn.datasets import load_digits  # takes a second to import

    data = load_digits()
    total = len(data.target)
    test = max(total - train - val, 0) if test is None else test
    if train + val + test > total:
        raise SettingError(
            f"Task digits has {total:,} images, but {train:,} + {val:,} + {test:,} were requested: "
            "reduce `train`, `val` or `test`."
        )
    order = np.random.default_rng(seed).permutation(total)
    lists = []
    for part in np.split(order, np.cumsum([train, val, test]))[:3]:
        images = [_enlarged(data.images[i]) for i in part]
        lists.append(ImageList(images, [int(data.target[i]) for i in part]))
    return Splits(lists[0], lists[1], lists[2] if test else None, tuple("0123456789"))


def _enlarged(digit: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Ink 0..16 of shape (8, 8) to grey of shape (64, 64, 3)."""
    grey = Image.fromarray((digit * (255 / 16)).round().astype(np.uint8))
    return np.array(grey.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC).convert("RGB"))


def _scenes(
    name: str,
    classes: tuple[str, ...],
    draw: Scene,
    *,
    seed: int,
    train: int,
    val: int,
    test: int | None,
) -> Splits:
    lists = []
    for part, count in enumerate((train, val, 1000 if test is None else test)):
        # Each part has its own generator, so that the length of one does not change another.
        rng = np.random.default_rng([seed, part, *name.encode()])
        labels = [i % len(classes) for i in range(count)]
        lists.append(ImageList([_scene(draw, rng, label) for label in labels], labels))
    return Splits(lists[0], lists[1], lists[2] if lists[2].labels else None, classes)


def _scene(draw: Scene, rng: Generator, label: int) -> NDArray[np.uint8]:
    canvas = Canvas(rng)
    draw(canvas, label)
    return canvas.finished()


_CELL_NAMES = tuple(f"row{row}-column{column}" for row in "1234" for column in "1234")
_TASKS: dict[str, _Task] = {
    "colour": partial(_scenes, "colour", tuple(sorted(HUES)), colour_scene),
    "count": partial(_scenes, "count", tuple("12345678"), count_scene),
    "digits": _digits,
    "orientation": partial(
        _scenes, "orientation", tuple(f"{angle:03}" for angle in ANGLES), orientation_scene
    ),
    "position": partial(_scenes, "position", _CELL_NAMES, position_scene),
    "shape": partial(_scenes, "shape", SHAPE_NAMES, shape_scene),
}
