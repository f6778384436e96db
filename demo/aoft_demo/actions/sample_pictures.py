"""Pictures on which an exported task is checked: the examples, and parts of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from aoft_demo.actions.pictures import read_picture

__all__ = ["COUNT", "write_sample_pictures"]

COUNT = 25
"""Pictures that are written at most."""

PARTS = (
    (0.0, 0.0, 1.0, 1.0),
    (0.0, 0.0, 0.7, 0.7),
    (0.3, 0.0, 1.0, 0.7),
    (0.0, 0.3, 0.7, 1.0),
    (0.3, 0.3, 1.0, 1.0),
    (0.15, 0.15, 0.85, 0.85),
)
"""Left, top, right and bottom of each part, as shares of the picture's sides."""


def write_sample_pictures(examples: Sequence[Path], folder: Path, size: int) -> int:
    """Write whole examples first, then parts of them, as PNG files.

    Args:
        examples: The example pictures.
        folder: Folder to create.
        size: Side of the model's input in pixels; the pictures are at most four times as long.

    Returns:
        The number of pictures; 0 if there are no examples, and then there is no folder.

    Raises:
        ImageError: An example is damaged or has too many pixels.
    """
    wanted = [(path, part) for part in PARTS for path in examples][:COUNT]
    if wanted:
        folder.mkdir(parents=True)
    for number, (path, part) in enumerate(wanted):
        _part(path, part, size).save(folder / f"{number:02}.png")
    return len(wanted)


def _part(path: Path, part: tuple[float, float, float, float], size: int) -> Image.Image:
    image = read_picture(path, size).image
    width, height = image.size
    left, top, right, bottom = part
    box = (round(left * width), round(top * height), round(right * width), round(bottom * height))
    cut = image.crop(box) if box[2] > box[0] and box[3] > box[1] else image
    cut.thumbnail((4 * size, 4 * size))
    return cut
