"""The steps of every export: check, write a draft, open it, verify it, and publish it.

A merged model and a fleet differ in what they write, how their answers are compared, and what the
manifest says of them; that is a ``Subject``. Everything else is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import Engine
from aoft_deploy.artefacts.exporter import Exporter
from aoft_deploy.artefacts.manifest import artefact_size, manifest_path
from aoft_deploy.artefacts.spec import BuildOptions, Calibration, ExportSpec, InputSpec
from aoft_deploy.artefacts.verification import Bar, Report
from aoft_deploy.data.images import read_image
from aoft_deploy.data.listing import image_files
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import OutputError
from aoft_deploy.export.calibration import calibration_files, calibration_pixels
from aoft_deploy.export.options import VerifyOptions, bar_for, check_build
from aoft_deploy.export.publishing import (
    Exported,
    check_output,
    provenance,
    publish,
    versions,
)
from aoft_deploy.export.verifying import (
    arithmetic_of,
    on_device,
    runs_to_judge,
    verification_pixels,
)
from aoft_deploy.files import writable_folder
from aoft_deploy.texts import one_line

__all__ = ["Request", "Subject", "export_verified"]


class Subject(Protocol):
    """What is exported."""

    @property
    def info(self) -> ArtefactInfo:
        """What the artefact says of itself."""

    def write(self, draft: Path, spec: ExportSpec) -> None:
        """Let the exporter write it."""

    def open(self, draft: Path) -> Engine:
        """Open what was written."""

    def verify(
        self, engine: Engine, pixels: NDArray[np.uint8], spec: ExportSpec, bar: Bar
    ) -> Report:
        """Compare an engine's answers to images with the unmerged models'."""

    def manifest(self, spec: ExportSpec) -> dict[str, Any]:
        """The manifest's entries on the subject."""


@dataclass(frozen=True)
class Request:
    """An export's choices, checked against the exporter before anything is loaded.

    Attributes:
        exporter: Writes the artefact.
        output: The artefact's path.
        precision: One of the exporter's.
        verify: What to verify with.
        build: Further choices of the exporter.
        command: The command line, for the manifest.
        bar: What the artefact must reach.
        calibration: Files to learn ranges of activations from.
        pictures: Real images to verify with.
    """

    exporter: Exporter
    output: Path
    precision: str
    verify: VerifyOptions
    build: BuildOptions
    command: Sequence[str]
    bar: Bar
    calibration: Sequence[Path]
    pictures: Sequence[Image]

    @classmethod
    def checked(
        cls,
        exporter: Exporter,
        output: Path,
        inputs: Sequence[Path],
        *,
        precision: str,
        verify: VerifyOptions,
        build: BuildOptions,
        command: Sequence[str],
    ) -> Self:
        """Check all choices, and read the images.

        Args:
            exporter: As the attribute.
            output: As the attribute.
            inputs: Files that the export reads besides images.
            precision: As the attribute.
            verify: As the attribute.
            build: As the attribute.
            command: As the attribute.

        Raises:
            AoftError: A choice that the exporter does not have, a path that the artefact cannot
                take, or an image that cannot be read.
        """
        bar = bar_for(exporter, precision, verify)
        check_build(exporter, build)
        calibration = calibration_files(exporter, precision, verify)
        check_output(exporter, output, [*inputs, *verify.images, *verify.calibrate])
        pictures = [read_image(path) for path in image_files(verify.images)]
        return cls(exporter, output, precision, verify, build, command, bar, calibration, pictures)

    def pixels(self, preprocessing: Preprocessing) -> NDArray[np.uint8]:
        """The images to verify with, uint8 [n, H, W, 3]."""
        return verification_pixels(preprocessing, self.pictures, self.precision)


def export_verified(
    request: Request, subject: Subject, pixels: NDArray[np.uint8], uint8: bool = False
) -> Exported:
    """Write, open, verify and publish an artefact; where any step fails, no file is left.

    Args:
        request: The choices.
        subject: What is exported.
        pixels: The images to verify with, uint8 [n, H, W, 3].
        uint8: Whether the artefact takes pixels and normalises them itself.

    Raises:
        AoftError: The artefact cannot be written, or its answers differ.
    """
    exporter, output, precision = request.exporter, request.output, request.precision
    spec = _spec(request, subject, pixels, uint8)
    with writable_folder(output.parent) as folder:
        draft = folder / output.name
        try:
            subject.write(draft, spec)
        except OutputError:
            raise
        except (OSError, RuntimeError) as error:
            raise OutputError(f"The artefact could not be written ({one_line(error)}).") from error
        engine = subject.open(draft)
        left = ArtefactInfo(engine.info).left_in_float
        arithmetic = arithmetic_of(exporter, draft, precision)
        for judge, judged in runs_to_judge(exporter, draft, engine, precision, pixels):
            report = subject.verify(judge, judged, spec, request.bar)
        manifest = {
            **provenance(draft, exporter.name, request.command),
            **subject.manifest(spec),
            **_learnt(request, left),
            "verification": {
                **report.to_dict(),
                "real_images": len(request.pictures),
                "arithmetic": arithmetic,
                **on_device(exporter, draft, precision),
            },
            "versions": versions(),
        }
        size = artefact_size(draft)
        publish(draft, output, manifest)
    device = exporter.device_name(output, precision)
    return Exported(output, manifest_path(output), report, size, device, arithmetic, left)


def _spec(request: Request, subject: Subject, pixels: NDArray[np.uint8], uint8: bool) -> ExportSpec:
    preprocessing = subject.info.preprocessing
    ranges = calibration_pixels(request.calibration, preprocessing)
    return ExportSpec(
        InputSpec.of(preprocessing, uint8),
        subject.info.texts,
        request.precision,
        None if ranges is None else Calibration(ranges, request.verify.min_agreement),
        None if request.precision == "fp32" else pixels,
        request.build,
    )


def _learnt(request: Request, left: Sequence[str]) -> dict[str, Any]:
    """The manifest's entries on calibration, and on products that stay in float32."""
    if request.calibration:
        calibration = {"images": len(request.calibration), "left_in_float": list(left)}
        return {"calibration": calibration}
    return {"left_in_float": list(left)} if left else {}
