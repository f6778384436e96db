"""What an exporter is asked to write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.data.normalisation import normalised

if TYPE_CHECKING:
    from aoft_deploy.data.preprocessing import Preprocessing

__all__ = ["BuildOptions", "Calibration", "ExportSpec", "InputSpec"]


@dataclass(frozen=True)
class InputSpec:
    """The images that an artefact takes.

    Attributes:
        height: In pixels.
        width: In pixels.
        uint8: Whether it takes pixels, uint8 [batch, H, W, 3], instead of normalised float32
            [batch, 3, H, W].
        mean: Mean of each channel, on the scale 0..1.
        std: Standard deviation of each channel, on the scale 0..1.
    """

    height: int
    width: int
    uint8: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, preprocessing: Preprocessing, uint8: bool = False) -> Self:
        """The input of a model whose images are prepared so."""
        height, width = preprocessing.height, preprocessing.width
        return cls(height, width, uint8, preprocessing.mean, preprocessing.std)

    @property
    def name(self) -> str:
        """Name of the graph's input."""
        return "image" if self.uint8 else "pixel_values"

    @property
    def dtype(self) -> str:
        """``uint8`` or ``float32``."""
        return "uint8" if self.uint8 else "float32"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image, without the batch."""
        return (self.height, self.width, 3) if self.uint8 else (3, self.height, self.width)

    def zeros(self, batch: int) -> NDArray[Any]:
        """A batch of zeros."""
        return np.zeros((batch, *self.shape), self.dtype)

    def prepare(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """A batch as the artefact takes it.

        Args:
            pixels: uint8 [batch, H, W, 3].
        """
        return pixels if self.uint8 else normalised(pixels, self.mean, self.std)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, as they stand in a manifest."""
        return {"name": self.name, "type": self.dtype, "shape": ["batch", *self.shape]}


@dataclass(frozen=True)
class BuildOptions:
    """How an engine or graph is built, where the exporter gives a choice.

    Attributes:
        batches: Smallest, usual and largest batch, for artefacts that are built for a range; None
            is 1, 8 and 32.
        compute_capability: Of the GPU that the artefact is for, such as ``8.9``; None is this
            machine's.
        opset: Of ONNX; None is the exporter's own choice.
        refittable: Whether the artefact can be given other weights later.
        refit: An artefact of the same graph to give these weights to, instead of building; one
            that cannot take them is built anew.
    """

    batches: tuple[int, int, int] | None = None
    compute_capability: str | None = None
    opset: int | None = None
    refittable: bool = False
    refit: Path | None = None

    @property
    def batch_range(self) -> tuple[int, int, int]:
        """Smallest, usual and largest batch."""
        return self.batches or (1, 8, 32)


@dataclass(frozen=True)
class Calibration:
    """Images to learn the ranges of activations from.

    Attributes:
        pixels: uint8 [n, H, W, 3].
        min_agreement: Share of the images that must keep their top class, for exporters that can
            trade speed for it.
    """

    pixels: NDArray[np.uint8] = field(repr=False, compare=False)
    min_agreement: float = 0.0


@dataclass(frozen=True)
class ExportSpec:
    """What an exporter needs besides the model.

    Attributes:
        input: The images that the artefact takes.
        metadata: Texts to store in the artefact where the format can; ``ArtefactInfo`` makes them.
        precision: One of the exporter's ``precisions``.
        calibration: None where the exporter learns nothing from images.
        judged: Images that a precision below fp32 is judged on, uint8 [n, H, W, 3]: an exporter
            keeps in float32 what leaves the precision's range on them. None where nothing is
            judged.
        build: Further choices.
    """

    input: InputSpec
    metadata: Mapping[str, str]
    precision: str = "fp32"
    calibration: Calibration | None = None
    judged: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)
    build: BuildOptions = BuildOptions()
