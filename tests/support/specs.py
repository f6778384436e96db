"""Export specifications in one call, for tests of exporters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.spec import BuildOptions, Calibration, ExportSpec, InputSpec

Triple = tuple[float, ...]


def export_spec(
    size: int | tuple[int, int],
    uint8: bool,
    mean: Triple,
    std: Triple,
    metadata: Mapping[str, str],
    precision: str = "fp32",
    pixels: NDArray[np.uint8] | None = None,
    *,
    min_agreement: float = 0.0,
    judged: NDArray[np.uint8] | None = None,
    **build: Any,
) -> ExportSpec:
    """An ``ExportSpec``; a single size is a square, and ``pixels`` are calibrated with."""
    height, width = (size, size) if isinstance(size, int) else size
    (r, g, b), (x, y, z) = mean, std
    calibration = None if pixels is None else Calibration(pixels, min_agreement)
    images = InputSpec(height, width, uint8, (r, g, b), (x, y, z))
    return ExportSpec(images, metadata, precision, calibration, judged, BuildOptions(**build))


def with_build(spec: ExportSpec, **build: Any) -> ExportSpec:
    """The specification with other build options."""
    return replace(spec, build=replace(spec.build, **build))
