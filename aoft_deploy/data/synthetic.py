"""Small offline tasks, drawn when asked for: real digits, and scenes in the manner of VTAB.

A scene task is one function that draws an image of a given class, and one entry in ``_TASKS``.
Scenes are drawn in colour on an uneven, noisy background, three times too large, and reduced.
Angles are in degrees, lengths in pixels of the finished image.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.data.scenes import (
    ANGLES,
    HUES,
    SHAPE_NAMES,
    SIZE,
    Canvas,
    Scene,
    colour_scene,
    count_scene,
    orientation_scene,
    position_scene,
    shape_scene,
)
from aoft_deploy.data.splits import ImageList, Splits
from aoft_deploy.errors import SettingError, UnknownNameError

__all__ = ["load_task", "task_names"]


class _Task(Protocol):
    def __call__(self, *, seed: int, train: int, val: int, test: int | None) -> Splits: ...


def task_names() -> tuple[str, ...]:
    """Names of the offline tasks, sorted."""
    return tuple(sorted(_TASKS))


def load_task(
    name: str, *, seed: int = 0, train: int = 1000, val: int = 200, test: int | None = None
) -> Splits:
    """Make an offline task; the same arguments give the same pixels.

    Args:
        name: One of :func:`task_names`.
        seed: Seed of the scenes, or of the digits' shuffling, from 0.
        train: Number of training images, from 1.
        val: Number of validation images, from 1.
        test: Number of test images; 0 for none, None for 1000 scenes or all remaining digits.

    Returns:
        Splits of uint8 images of shape ``(64, 64, 3)``; the classes of scenes take turns.

    Raises:
        UnknownNameError: No such task.
        SettingError: A number outside its range, or more digits than the 1,797 that exist.
    """
    if name not in _TASKS:
        raise UnknownNameError("task", name, _TASKS)
    for what, number, least in (("train", train, 1), ("val", val, 1), ("test", test, 0)):
        if number is not None and number < least:
            raise SettingError(f"Task size {what} is {number}: use a whole number from {least}.")
    if seed < 0:
        raise SettingError(f"Seed is {seed}: use a whole number from 0.")
    return _TASKS[name](seed=seed, train=train, val=val, test=test)


def _digits(*, seed: int, train: int, val: int, test: int | None) -> Splits:
    """Scanned digits of 8 x 8 pixels (UCI optdigits, as scikit-learn ships them), enlarged."""
    from sklearn.datasets import load_digits  # takes a second to import

    data = load_digits()
    total = len(data.target)
    test = max(total - train - val, 0) if test is None else test
    if train + val + test > total:
        raise SettingError(
            f"Task digits has {total:,} images, asked for {train:,} + {val:,} + {test:,}: "
            "use smaller train, val or test."
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
    return np.array(grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB"))


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
        # A generator for each part: a longer training set leaves the test set as it is.
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
