"""What an exporter is asked to write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    pass

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """What an exporter needs to know beside the model.

    Attributes:
        size: Side of the square input, in pixels.
        uint8: Whether the artefact takes pixels, uint8 [batch, H, W, 3], instead of normalised
            float32 [batch, 3, H, W].
        mean: Mean of each channel, on the scale 0..1.
        std: Standard deviation of each channel, on the scale 0..1.
        metadata: Text values to store in the artefact where the format can.
        precision: One of the exporter's ``PRECISIONS``.
        calibration: Images to learn ranges of activations from, uint8 [n, H, W, 3]; None where the
            exporter learns none.
        batches: Smallest, usual and largest batch, for artefacts that are built for a range.
        compute_capability: Of the GPU that the artefact is for, such as ``8.9``; None is this
            machine's.
        refittable: Whether the artefact may be given other weights later.
        refit: An artefact of the same graph to give these weights to, instead of building.
        opset: Of ONNX; None is the exporter's own choice.
        min_agreement: Share of ``calibration`` that must keep its top class, for exporters that
            can give up some speed for it.
        judged: Images that answers below fp32 are judged on, uint8 [n, H, W, 3]: an exporter keeps
            in float32 what leaves the precision's range on them. None where nothing is judged.
    """

    size: int
    uint8: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    metadata: Mapping[str, str]
    precision: str = "fp32"
    calibration: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)
    batches: tuple[int, int, int] = (1, 8, 32)
    compute_capability: str | None = None
    refittable: bool = False
    refit: Path | None = None
    opset: int | None = None
    min_agreement: float = 0.0
    judged: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)
