"""Calibration images, from which an exporter learns the ranges of activations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.exporter import Exporter
from aoft_deploy.data.images import read_image
from aoft_deploy.data.listing import image_files
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import SettingError
from aoft_deploy.export.options import VerifyOptions

__all__ = ["FEWEST", "MOST", "calibration_files", "calibration_pixels"]

FEWEST, MOST = 16, 300
"""Smallest and largest number of calibration images. If more are given, an evenly spaced subset of
the largest number is used."""


def calibration_files(exporter: Exporter, precision: str, verify: VerifyOptions) -> list[Path]:
    """Select the calibration images. The list is empty if the exporter needs none.

    Args:
        exporter: The exporter.
        precision: One of the exporter's precisions.
        verify: Files or folders of calibration images, and of verification images.

    Raises:
        SettingError: Calibration images are given but not used, or missing, or too few.
        ImageError: A folder contains no images.
    """
    learns = precision in exporter.calibrated
    if verify.calibrate and not learns:
        raise SettingError(
            f"{precision} of {exporter.name} needs no calibration images: leave `calibrate` out."
        )
    if not learns:
        return []
    if not verify.calibrate:
        raise SettingError(
            f"{precision} of {exporter.name} needs calibration images: give {FEWEST} or more "
            "training images of the task, or a folder of them, with `calibrate`."
        )
    verifying = {path.resolve() for path in image_files(verify.images)}
    calibrating = {path.resolve(): path for path in image_files(verify.calibrate)}
    files = [path for resolved, path in calibrating.items() if resolved not in verifying]
    if len(files) < FEWEST:
        raise SettingError(
            f"`calibrate` gives {len(files)} images that are not among `images`, but {FEWEST} or "
            "more are needed: give others."
        )
    count = min(MOST, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def calibration_pixels(
    files: Sequence[Path], preprocessing: Preprocessing
) -> NDArray[np.uint8] | None:
    """Read the pixels of images, uint8 [n, H, W, 3]; None without files.

    Raises:
        ImageError: A file cannot be read.
    """
    if not files:
        return None
    return np.stack([preprocessing.pixels(read_image(path)) for path in files])
