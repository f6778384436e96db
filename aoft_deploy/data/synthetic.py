"""Small offline tasks, drawn when asked for: real digits, and scenes in the manner of VTAB.

A scene task is one function that draws an image of a given class, and one entry in ``_TASKS``.
Scenes are drawn in colour on an uneven, noisy background, three times too large, and reduced.
Angles are in degrees, lengths in pixels of the finished image.
"""

from __future__ import annotations

import colorsys
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from aoft_deploy.data.folder import ImageList, Splits
from aoft_deploy.errors import OutputError, SettingError, UnknownNameError

__all__ = ["load_task", "task_names", "write_folder"]

_SIZE = 64
_OVERSAMPLING = 3

_Rgb = tuple[int, int, int]
_Points = NDArray[np.float64]  # (..., 2), x to the right and y down
_Scene = Callable[["_Canvas", int], None]


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


def write_folder(splits: Splits, root: Path) -> None:
    """Write splits as PNG files ``root/<train|val|test>/<class>/<number>.png``.

    Raises:
        OutputError: The folder is there already, or cannot be written.
        ImageError: An image of the splits cannot be read.
    """
    if root.exists():
        raise OutputError(f"Folder {str(root)!r} is there already: remove it or name another.")
    parts = {"train": splits.train, "val": splits.val}
    if splits.test is not None:
        parts["test"] = splits.test
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=".writing-") as scratch:
            for part, images in parts.items():
                for number in range(len(images)):
                    image, label = images[number]
                    path = Path(scratch, root.name, part, splits.classes[label], f"{number:05}.png")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    image.save(path)
            Path(scratch, root.name).rename(root)
    except OSError as error:
        raise OutputError(
            f"Folder {str(root)!r} cannot be written: {error.strerror or error}."
        ) from error


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
    return np.array(grey.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC).convert("RGB"))


def _scenes(
    name: str,
    classes: tuple[str, ...],
    draw: _Scene,
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


def _scene(draw: _Scene, rng: Generator, label: int) -> NDArray[np.uint8]:
    canvas = _Canvas(rng)
    draw(canvas, label)
    return canvas.finished()


class _Canvas:
    """An uneven background, what a scene may draw on it, and the generator of all chance."""

    def __init__(self, rng: Generator) -> None:
        self.rng = rng
        self.is_dark = bool(rng.random() < 0.5)
        low, high = (0.05, 0.4) if self.is_dark else (0.75, 1.0)
        # Washed-out colours at 3 x 3 points, blended in between.
        points = [
            _rgb(rng.random(), rng.uniform(0, 0.35), rng.uniform(low, high)) for _ in range(9)
        ]
        coarse = Image.fromarray(np.array(points, dtype=np.uint8).reshape(3, 3, 3))
        blended = coarse.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)
        side = _SIZE * _OVERSAMPLING
        self.image = blended.resize((side, side), Image.Resampling.NEAREST)
        self.pen = ImageDraw.Draw(self.image)

    def ink(self) -> _Rgb:
        """A colour that stands out: light on a dark background, dark on a light one."""
        low, high = (0.75, 1.0) if self.is_dark else (0.25, 0.55)
        return _rgb(self.rng.random(), self.rng.uniform(0.4, 1), self.rng.uniform(low, high))

    def put(self, outline: _Points, centre: _Points, angle: float, colour: _Rgb) -> None:
        """Fill an outline, turned counter-clockwise and moved from the origin to ``centre``."""
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        points = outline @ np.array([(cos, -sin), (sin, cos)]) + centre
        self.pen.polygon((points * _OVERSAMPLING).ravel().tolist(), fill=colour)

    def put_shape(self, name: str, centre: _Points, radius: float, colour: _Rgb) -> None:
        """Fill one of ``_SHAPES`` at any angle."""
        self.put(_SHAPES[name] * radius, centre, self.rng.uniform(0, 360), colour)

    def scatter_strokes(self, count: int) -> None:
        """Draw short thin strokes, which belong to no class."""
        starts = self.rng.uniform(0, _SIZE, (count, 2))
        ends = starts + self.rng.uniform(-7, 7, (count, 2))
        for line in (np.hstack([starts, ends]) * _OVERSAMPLING).tolist():
            self.pen.line(line, self.ink(), _OVERSAMPLING * 3 // 4)

    def finished(self) -> NDArray[np.uint8]:
        """The reduced image with Gaussian noise, uint8 of shape (64, 64, 3)."""
        pixels = np.asarray(self.image.reduce(_OVERSAMPLING))
        noise = self.rng.standard_normal(pixels.shape, dtype=np.float32)
        noisy: NDArray[np.float32] = pixels + noise * np.float32(self.rng.uniform(2, 10))
        return noisy.clip(0, 255).astype(np.uint8)


def _rgb(hue: float, saturation: float, value: float) -> _Rgb:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _star(radii: tuple[float, ...]) -> _Points:
    """Points around the origin at equal angles and the given distances, shape (n, 2)."""
    angles = np.arange(len(radii)) * (2 * math.pi / len(radii))
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=-1)


_CIRCLE = _star((1,) * 40)
_SHAPES = {  # outlines within the unit circle
    "circle": _CIRCLE,
    "cross": _star((0.37, 1, 1) * 4),
    "ring": np.concatenate([_CIRCLE, _CIRCLE[:1], _CIRCLE[:1] * 0.55, _CIRCLE[::-1] * 0.55]),
    "square": _star((1,) * 4),
    "star": _star((1, 0.4) * 5),
    "triangle": _star((1,) * 3),
}
_NAMES = tuple(sorted(_SHAPES))
_BAR = np.array([(-1.0, -1), (1, -1), (1, 1), (-1, 1)])
_ANGLES = range(0, 180, 15)
_HUES = {  # degrees on the colour circle
    "blue": 230,
    "cyan": 180,
    "green": 120,
    "magenta": 310,
    "orange": 28,
    "purple": 270,
    "red": 0,
    "yellow": 56,
}


def _any(rng: Generator, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]


def _shape_scene(canvas: _Canvas, label: int) -> None:
    """One shape of any place, size, angle and colour."""
    canvas.scatter_strokes(12)
    radius = canvas.rng.uniform(10, 20)
    centre = canvas.rng.uniform(radius, _SIZE - radius, 2)
    canvas.put_shape(_NAMES[label], centre, radius, canvas.ink())


def _count_scene(canvas: _Canvas, label: int) -> None:
    """One to eight shapes that do not touch."""
    canvas.scatter_strokes(8)
    spots: list[_Points] = []
    while len(spots) <= label:
        spot = canvas.rng.uniform(7, _SIZE - 7, 2)
        if all(math.dist(spot, other) > 13 for other in spots):
            spots.append(spot)
    for spot in spots:
        radius = canvas.rng.uniform(4.5, 6)
        canvas.put_shape(_any(canvas.rng, _NAMES), spot, radius, canvas.ink())


def _orientation_scene(canvas: _Canvas, label: int) -> None:
    """One long bar, ellipse or diamond within 4 degrees of its class's angle, among dots."""
    rng = canvas.rng
    canvas.scatter_strokes(12)
    for _ in range(6):
        canvas.put_shape("circle", rng.uniform(0, _SIZE, 2), rng.uniform(1.5, 3), canvas.ink())
    half = rng.uniform(15, 26)
    extent = np.array([half, half * rng.uniform(0.15, 0.28)])
    outline = (_BAR, _CIRCLE, _SHAPES["square"])[int(rng.integers(3))] * extent
    angle = _ANGLES[label] + rng.uniform(-4, 4)
    canvas.put(outline, rng.uniform(half, _SIZE - half, 2), angle, canvas.ink())


def _position_scene(canvas: _Canvas, label: int) -> None:
    """A star in one of 4 x 4 cells, and other shapes in some of the rest."""
    rng = canvas.rng
    canvas.scatter_strokes(8)
    others = [cell for cell in rng.permutation(16)[:7].tolist() if cell != label]
    for cell in (label, *others):
        name = "star" if cell == label else _any(rng, ("circle", "ring", "square", "triangle"))
        centre = np.array([cell % 4, cell // 4]) * 16 + rng.uniform(6.5, 9.5, 2)
        canvas.put_shape(name, centre, rng.uniform(5.5, 7), canvas.ink())


def _colour_scene(canvas: _Canvas, label: int) -> None:
    """One large shape of the hue, among small shapes of any other."""
    rng = canvas.rng
    canvas.scatter_strokes(8)
    for _ in range(6):
        spot, radius = rng.uniform(0, _SIZE, 2), rng.uniform(2, 4)
        canvas.put_shape(_any(rng, _NAMES), spot, radius, canvas.ink())
    hue = (_HUES[sorted(_HUES)[label]] + rng.uniform(-5, 5)) / 360 % 1
    radius = rng.uniform(12, 22)
    centre = rng.uniform(radius, _SIZE - radius, 2)
    colour = _rgb(hue, rng.uniform(0.7, 1), rng.uniform(0.65, 1))
    canvas.put_shape(_any(rng, _NAMES), centre, radius, colour)


_CELL_NAMES = tuple(f"row{row}-column{column}" for row in "1234" for column in "1234")
_TASKS: dict[str, _Task] = {
    "colour": partial(_scenes, "colour", tuple(sorted(_HUES)), _colour_scene),
    "count": partial(_scenes, "count", tuple("12345678"), _count_scene),
    "digits": _digits,
    "orientation": partial(
        _scenes, "orientation", tuple(f"{angle:03}" for angle in _ANGLES), _orientation_scene
    ),
    "position": partial(_scenes, "position", _CELL_NAMES, _position_scene),
    "shape": partial(_scenes, "shape", _NAMES, _shape_scene),
}
