"""From an RGB image to a backbone's input, exactly as timm's evaluation transform does it.

This module needs no torch, so that commands start fast and a server needs neither torch nor timm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.data.normalisation import normalised
from aoft_deploy.errors import CheckpointError, ImageError, SettingError

__all__ = ["Preprocessing"]

_CROP_MODES = ("border", "center", "squash")
_INTERPOLATIONS = ("bicubic", "bilinear", "lanczos")
_MAX_RESIZED = 64_000_000  # pixels
_MAX_ASPECT_RATIO = 64  # of an image that is resized as a whole
_ALWAYS_RESIZED = 4_000_000  # pixels, up to which any image is resized as a whole


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop and normalisation of one backbone.

    The pixels are bit-identical to those of ``timm.data.create_transform(is_training=False)``.

    Attributes:
        size: Side of a square input in pixels, 1 to 4096, or ``(height, width)`` of another.
        crop_pct: Side of the crop as a fraction of the resized side, ``floor(size / crop_pct)``.
            Above 1, the image is smaller than the input and is padded to it.
        mean: Mean of each of the three channels, on the scale 0..1.
        std: Standard deviation of each channel, on the scale 0..1.
        interpolation: ``bicubic``, ``bilinear`` or ``lanczos``, always with anti-aliasing.
        crop_mode: Which edges are resized to that side: the shorter (``center``), both
            (``squash``), or the longer (``border``, padded with the mean).

    Raises:
        SettingError: A value is outside its range.
    """

    size: int | tuple[int, int]
    crop_pct: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        sides = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        if len(sides) != 2 or not all(type(n) is int and 1 <= n <= 4096 for n in sides):
            raise SettingError(
                f"`size` is {self.size!r}, but must be a whole number from 1 to 4096, or a pair of "
                "them: height and width."
            )
        if sides[0] == sides[1]:
            object.__setattr__(self, "size", sides[0])
        if not _is_number(self.crop_pct) or not 0.1 <= self.crop_pct <= 2:
            raise SettingError(
                f"`crop_pct` is {self.crop_pct!r}, but must be a number from 0.1 to 2."
            )
        if not _is_triple(self.mean):
            raise SettingError(
                f"`mean` is {self.mean!r}, but must be three numbers, one per channel."
            )
        if not _is_triple(self.std) or min(self.std) <= 0:
            raise SettingError(f"`std` is {self.std!r}, but must be three numbers above 0.")
        for name, allowed in (("interpolation", _INTERPOLATIONS), ("crop_mode", _CROP_MODES)):
            if getattr(self, name) not in allowed:
                raise SettingError(
                    f"`{name}` is {getattr(self, name)!r}, but must be one of {', '.join(allowed)}."
                )

    @classmethod
    def from_timm(cls, config: Mapping[str, Any]) -> Self:
        """Create it from the result of ``timm.data.resolve_model_data_config(model)``.

        Raises:
            SettingError: The input is not a square RGB image, or a value is outside its range.
        """
        channels, height, width = config["input_size"]
        if channels != 3:
            raise SettingError(
                f"The backbone's input has {channels} channels: use one of RGB images, with 3."
            )
        return cls(
            size=(height, width),
            crop_pct=config["crop_pct"],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            crop_mode=config["crop_mode"],
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: A key is missing or unknown, or a value is outside its range.
        """
        known = {field.name for field in fields(cls)}
        if set(data) != known:
            raise CheckpointError(
                f"Preprocessing has the keys {', '.join(sorted(data)) or 'none'}, "
                f"expected {', '.join(sorted(known))}: the file comes from another version."
            )
        lists = {key: _tuple(data[key]) for key in ("size", "mean", "std")}
        try:
            return cls(**{**data, **lists})
        except SettingError as error:
            raise CheckpointError(f"Preprocessing cannot be used: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and lists that JSON stores exactly."""
        size = list(self.size) if isinstance(self.size, tuple) else self.size
        return {**asdict(self), "size": size, "mean": list(self.mean), "std": list(self.std)}

    @property
    def height(self) -> int:
        """Of the input, in pixels."""
        return self.size[0] if isinstance(self.size, tuple) else self.size

    @property
    def width(self) -> int:
        """Of the input, in pixels."""
        return self.size[1] if isinstance(self.size, tuple) else self.size

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Convert an RGB image of any size into a normalised input.

        Returns:
            Shape ``(3, height, width)``: ``(pixels / 255 - mean) / std`` in float32.

        Raises:
            ImageError: The image is not of mode ``RGB``.
        """
        batch = normalised(self.pixels(image)[None], self.mean, self.std)
        return np.asarray(batch[0], np.float32)

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """Convert an RGB image of any size into pixels, for graphs with built-in normalisation.

        Returns:
            Shape ``(height, width, 3)``, values 0..255.

        Raises:
            ImageError: The image is not of mode ``RGB``.
        """
        if image.mode != "RGB":
            raise ImageError(f"Image has mode {image.mode!r}, expected 'RGB': use read_image.")
        resized = self._resized(image)
        # A larger image is cropped, a smaller one is padded.
        canvas = Image.new("RGB", (self.width, self.height), self._padding_colour())
        canvas.paste(
            resized, (-_start(resized.width, self.width), -_start(resized.height, self.height))
        )
        return np.array(canvas, dtype=np.uint8)

    def _resized(self, image: Image.Image) -> Image.Image:
        width, height = self._resized_size(image.width, image.height)
        resample = Image.Resampling[self.interpolation.upper()]
        largest = max(_ALWAYS_RESIZED, _MAX_ASPECT_RATIO * min(width, height) ** 2)
        if width * height <= min(largest, _MAX_RESIZED):
            return image.resize((width, height), resample)
        # Resizing a very long image would need too much memory: compute only what the crop keeps.
        # Pixels differ by at most one level of 255, because the box is rounded.
        kept = (min(width, self.width), min(height, self.height))
        left, top = max(_start(width, self.width), 0), max(_start(height, self.height), 0)
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, (left + kept[0]) * x, (top + kept[1]) * y)
        return image.resize(kept, resample, box)

    def _resized_size(self, width: int, height: int) -> tuple[int, int]:
        across, down = (
            max(math.floor(side / self.crop_pct), 1) for side in (self.width, self.height)
        )
        if self.crop_mode == "squash":
            return across, down
        if self.crop_mode == "center" and across == down:
            if width <= height:
                return across, int(across * height / width)
            return int(across * width / height), across
        ratios = width / across, height / down
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return max(round(width / ratio), 1), max(round(height / ratio), 1)

    def _padding_colour(self) -> tuple[int, int, int]:
        if self.crop_mode != "border":
            return 0, 0, 0
        red, green, blue = (round(255 * value) for value in self.mean)
        return red, green, blue


def _start(length: int, size: int) -> int:
    """Start of a centred window of ``size`` on an edge of ``length``; negative if it is wider.

    Both roundings follow torchvision.
    """
    return -((size - length) // 2) if size > length else round((length - size) / 2)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_triple(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(map(_is_number, value))


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
