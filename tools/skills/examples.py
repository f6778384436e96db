"""The example pictures of the demo: photographs, drawings and an object of the test part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image
from skills.drawings import street
from skills.objects import Thing, scene
from skills.photographs import PHOTOGRAPHS, Photographs
from skills.pictures import finished

__all__ = ["save_examples"]

SIDE = 384
"""Width and height of an example in pixels."""

CROPS = {
    "cat": ("chelsea.png", (85, 0, 385, 300), "a cat", "The face of a tabby cat, seen from near."),
    "temple": (
        *("china.jpg", (40, 0, 440, 400), "a temple by a lake"),
        "A temple of three storeys above trees, with a lake and hills behind it.",
    ),
    "rocket": (
        *("rocket.jpg", (105, 0, 505, 400), "a rocket at night"),
        "A white rocket stands between lit masts before a dark blue sky.",
    ),
    "boats": (
        *("nagasaki-boats", (60, 0, 540, 480), "boats, an old photo"),
        "A sailing boat and houseboats on a river, in black and white.",
    ),
}
"""The photograph, its square part (left, top, right, bottom), caption and description of each."""


def save_examples(photographs: Photographs, folder: Path) -> list[dict[str, str]]:
    """Write the six pictures and ``PICTURES.md``; their file names, captions and descriptions."""
    by_name = {photo.name: photo for photo in PHOTOGRAPHS}
    examples, licences = [], []
    for name, (source, box, caption, alt) in CROPS.items():
        image = photographs.image(by_name[source]).crop(box)
        file = f"{name}.jpg"
        image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(
            folder / file, quality=60, optimize=True
        )
        examples.append({"file": file, "caption": caption, "alt": alt})
        package = f"{by_name[source].package}, part, resized"
        licences.append(f"| `{file}` | `{source}` of {package} | {by_name[source].licence} |")
    street(np.random.default_rng(STREET), SIDE).save(folder / "street.png", optimize=True)
    _star(np.random.default_rng(STAR)).save(folder / "star.jpg", quality=80, optimize=True)
    examples += [
        {
            "file": "street.png",
            "caption": "a drawn street",
            "alt": "A drawing of houses with pointed roofs and many windows in a row.",
        },
        {
            "file": "star.jpg",
            "caption": "one yellow star",
            "alt": "A yellow star with five points on a plain ground.",
        },
    ]
    licences += [
        f"| `{file}` | drawn by `tools/demo_skills.py` | Apache-2.0 |"
        for file in ("street.png", "star.jpg")
    ]
    (folder / "PICTURES.md").write_text(TEXT + "\n".join(licences) + "\n", "utf-8")
    return examples


STREET, STAR = 5, 2
"""Seeds of the drawn examples."""

TEXT = """# Example pictures

`tools/demo_skills.py` makes these pictures. No skill was trained on the same photograph or on the
same kind of drawing.

| file | from | licence |
|---|---|---|
"""


def _star(rng: Generator) -> Image.Image:
    thing = Thing(colour="yellow", shape="star", size="large", place="centre")
    return Image.fromarray(finished(scene(rng, thing, SIDE)))
