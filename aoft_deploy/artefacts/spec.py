"""Specification of an export: the inputs that an exporter gets besides the model."""

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
    """Format of an artefact's input images.

    Attributes:
        height: Height in pixels.
        width: Width in pixels.
        uint8: Whether the input is uint8 pixels [batch, H, W, 3] instead of normalised float32
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
        """The input format that matches a preprocessing."""
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
        """Shape of one image, without the batch."""
        return (self.height, self.width, 3) if self.uint8 else (3, self.height, self.width)

    def zeros(self, batch: int) -> NDArray[Any]:
        """A batch of zeros."""
        return np.zeros((batch, *self.shape), self.dtype)

    def prepare(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """Convert pixels, uint8 [batch, H, W, 3], to the artefact's input."""
        return pixels if self.uint8 else normalised(pixels, self.mean, self.std)

    def to_dict(self) -> dict[str, Any]:
        """JSON values for the manifest."""
        return {"name": self.name, "type": self.dtype, "shape": ["batch", *self.shape]}


@dataclass(frozen=True)
class BuildOptions:
    """Options of individual exporters for building a graph or an engine.

    Attributes:
        batches: Smallest, usual and largest batch size, for artefacts that are built for a range;
            None means 1, 8 and 32.
        compute_capability: Compute capability of the target GPU, such as ``8.9``; None means this
            machine's GPU.
        opset: ONNX opset; None means the exporter's default.
        refittable: Whether the weights of the artefact can be replaced later.
        refit: An existing artefact of the same graph, whose weights are replaced instead of
            building a new engine. If that is not possible, a new engine is built.
    """

    batches: tuple[int, int, int] | None = None
    compute_capability: str | None = None
    opset: int | None = None
    refittable: bool = False
    refit: Path | None = None

    @property
    def batch_range(self) -> tuple[int, int, int]:
        """Smallest, usual and largest batch size."""
        return self.batches or (1, 8, 32)


@dataclass(frozen=True)
class Calibration:
    """Images that determine the ranges of activations.

    Attributes:
        pixels: uint8 [n, H, W, 3].
        min_agreement: Smallest allowed agreement on the images, see ``Comparison.agreement``, for
            exporters that can trade speed for accuracy.
    """

    pixels: NDArray[np.uint8] = field(repr=False, compare=False)
    min_agreement: float = 0.0


@dataclass(frozen=True)
class ExportSpec:
    """The inputs of an exporter besides the model.

    Attributes:
        input: Format of the input images.
        metadata: Metadata to store in the artefact, if its format allows; see ``ArtefactInfo``.
        precision: One of the exporter's ``precisions``.
        calibration: Calibration images; None if the precision needs none.
        judged: Images that verify a precision below fp32, uint8 [n, H, W, 3]. An exporter keeps an
            operation in float32 if its values on these images exceed the range of the precision.
            None at fp32.
        build: Options of individual exporters.
    """

    input: InputSpec
    metadata: Mapping[str, str]
    precision: str = "fp32"
    calibration: Calibration | None = None
    judged: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)
    build: BuildOptions = BuildOptions()
