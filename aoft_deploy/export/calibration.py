"""Images that an exporter learns ranges of activations from, never those it is judged on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.protocols import CalibratedExporter, Exporter
from aoft_deploy.data.images import read_image
from aoft_deploy.data.listing import image_files
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import SettingError

__all__ = ["FEWEST", "MOST", "calibration_files", "calibration_pixels"]

FEWEST, MOST = 16, 300
"""Images to calibrate with; of more, so many are taken, spread evenly."""


def calibration_files(
    exporter: Exporter,
    to: str,
    precision: str,
    sources: Sequence[Path],
    judged: Sequence[Path] = (),
) -> list[Path]:
    """Files to calibrate with; none where the exporter learns nothing from images.

    Args:
        exporter: The exporter.
        to: Its name.
        precision: One of its ``PRECISIONS``.
        sources: Files, or folders of images.
        judged: Files and folders whose images are judged on, and so left out.

    Raises:
        SettingError: Images where they are not used, none where they are needed, or too few.
        ImageError: A folder holds no images.
    """
    learns = isinstance(exporter, CalibratedExporter) and precision in exporter.CALIBRATED
    if sources and not learns:
        raise SettingError(
            f"--precision {precision} of --to {to} learns nothing from images: leave --calibrate "
            "out."
        )
    if not learns:
        return []
    if not sources:
        raise SettingError(
            f"--precision {precision} of --to {to} learns its ranges from images: give {FEWEST} or "
            "more of the task's training images, or a folder of them, with --calibrate."
        )
    apart = {path.resolve() for path in image_files(judged)}
    given = list({path.resolve(): path for path in image_files(sources)}.items())
    files = [path for resolved, path in given if resolved not in apart]
    if len(files) < FEWEST:
        raise SettingError(
            f"--calibrate gives {len(files)} images that are not among --images, but {FEWEST} or "
            "more are needed: give others."
        )
    taken = min(MOST, len(files))
    return [files[i * len(files) // taken] for i in range(taken)]


def calibration_pixels(
    files: Sequence[Path], preprocessing: Preprocessing
) -> NDArray[np.uint8] | None:
    """The images' pixels, uint8 [n, H, W, 3]; None without files.

    Raises:
        ImageError: A file cannot be read.
    """
    if not files:
        return None
    return np.stack([preprocessing.pixels(read_image(path)) for path in files])
