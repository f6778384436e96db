"""The steps of every export: check the options, write a draft, open it, verify it, publish it.

A ``Subject`` is a merged model or a fleet. It knows how to write itself, how to compare answers,
and its manifest entries. The other steps are the same for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import Engine
from aoft_deploy.artefacts.exporter import Exporter
from aoft_deploy.artefacts.manifest import artefact_size, manifest_path
from aoft_deploy.artefacts.spec import BuildOptions, Calibration, ExportSpec, InputSpec
from aoft_deploy.artefacts.verification import BATCH_SIZES, Bar, Report
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.data.images import read_image
from aoft_deploy.data.listing import image_files
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import CheckpointError, OutputError
from aoft_deploy.export.calibration import calibration_files, calibration_pixels
from aoft_deploy.export.float_layers import lower_float_layers
from aoft_deploy.export.gpu_verification import verify_on_gpu
from aoft_deploy.export.options import VerifyOptions, bar_for, check_build
from aoft_deploy.export.output_paths import check_output
from aoft_deploy.export.publishing import Exported, provenance, publish, versions
from aoft_deploy.export.verifying import (
    arithmetic_of,
    on_device,
    runs_to_judge,
    verification_pixels,
)
from aoft_deploy.files import writable_folder
from aoft_deploy.texts import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Request", "Subject", "export_verified"]


class Subject(Protocol):
    """The model or fleet to export."""

    @property
    def info(self) -> ArtefactInfo:
        """Metadata to store in the artefact."""

    def write(self, draft: Path, spec: ExportSpec) -> None:
        """Write the artefact to ``draft`` with the exporter."""

    def open(self, draft: Path) -> Engine:
        """Load the written artefact for verification."""

    def verify(
        self,
        engine: Engine,
        pixels: NDArray[np.uint8],
        spec: ExportSpec,
        bar: Bar,
        batch_sizes: Sequence[int],
    ) -> Report:
        """Compare an engine's logits with those of the unmerged models.

        Args:
            engine: Runs the artefact.
            pixels: All verification images or the first of them, uint8 [n, H, W, 3].
            spec: Input form.
            bar: Acceptance criteria.
            batch_sizes: Batch sizes; see ``verification.verify``.
        """

    def manifest(self, spec: ExportSpec) -> dict[str, Any]:
        """Entries for the manifest."""


@dataclass
class Request:
    """The options of an export. They are checked before anything is loaded.

    Attributes:
        exporter: The exporter.
        output: Path of the artefact.
        checkpoints: The checkpoints to export. Like all other inputs, they are never replaced.
        backbone: The backbone's name and weights, if they are not the checkpoints' and timm's.
        precision: One of the exporter's precisions.
        verify: Images and criteria for verification and calibration.
        build: Options of individual exporters.
        overwrite: Whether an existing artefact at ``output`` is replaced.
        command: The command line, for the manifest.
        verified: Names of artefacts that were verified at all batch sizes, by the digest of their
            graphs. The export adds its own.
        bar: Acceptance criteria for the artefact.
        calibration: Files of the calibration images.
        pictures: Real images for verification.

    Raises:
        AoftError: The exporter does not support an option, the output path is invalid or taken, or
            an input is missing or an image cannot be read.
    """

    exporter: Exporter
    output: Path
    checkpoints: Sequence[Path]
    backbone: BackboneSource
    precision: str
    verify: VerifyOptions
    build: BuildOptions
    overwrite: bool
    command: Sequence[str]
    verified: dict[str, str] = field(default_factory=dict)
    bar: Bar = field(init=False)
    calibration: Sequence[Path] = field(init=False)
    pictures: Sequence[Image] = field(init=False)

    def __post_init__(self) -> None:
        self.bar = bar_for(self.exporter, self.precision, self.verify)
        check_build(self.exporter, self.build)
        self.calibration = calibration_files(self.exporter, self.precision, self.verify)
        for path in self.checkpoints:
            if not path.exists():
                raise CheckpointError(f"There is no file {path}.")
        self.check_output()
        self.pictures = [read_image(path) for path in image_files(self.verify.images)]

    def check_output(self) -> None:
        """Check the output path: before the export, and again before the artefact is published."""
        inputs = [*self.checkpoints, *self.verify.images, *self.verify.calibrate]
        inputs += [self.backbone.weights] if self.backbone.weights else []
        check_output(self.exporter, self.output, inputs, self.overwrite)

    def pixels(self, preprocessing: Preprocessing) -> NDArray[np.uint8]:
        """The verification images, uint8 [n, H, W, 3]."""
        return verification_pixels(preprocessing, self.pictures, self.precision)


def export_verified(
    request: Request, subject: Subject, pixels: NDArray[np.uint8], uint8: bool = False
) -> Exported:
    """Write, open, verify and publish an artefact. If a step fails, no file is left.

    Args:
        request: The checked options.
        subject: The model or fleet to export.
        pixels: The verification images, uint8 [n, H, W, 3].
        uint8: Whether the artefact takes uint8 pixels and normalises them itself.

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
        info = ArtefactInfo(engine.info)
        arithmetic = arithmetic_of(exporter, draft, precision)
        graph = _graph(request, draft)
        is_known = graph in request.verified
        pixels = pixels[:2] if is_known else pixels

        def verify(opened: Engine, images: NDArray[np.uint8]) -> Report:
            batch_sizes = (2,) if is_known else BATCH_SIZES
            return subject.verify(opened, images, spec, request.bar, batch_sizes)

        for run_engine, images in runs_to_judge(exporter, draft, engine, precision, pixels):
            report = verify(run_engine, images)
        report = replace(report, same_graph_as=request.verified.get(graph))

        def verify_all(opened: Engine) -> Report:
            return verify(opened, pixels)

        lowered = lower_float_layers(exporter, draft, info, report, verify_all)
        if lowered is not None:
            report = lowered.report
            arithmetic += f", float layers in {lowered.precision}"
        gpu = verify_on_gpu(exporter, draft, verify_all)
        device = exporter.device_name(draft, precision) or (gpu.verified_on if gpu else None)
        manifest = {
            **provenance(draft, exporter, request.command),
            **subject.manifest(spec),
            **_calibration_entries(request, info.left_in_float),
            "verification": {
                **report.to_dict(),
                "real_images": len(request.pictures),
                "arithmetic": arithmetic,
                **on_device(exporter, precision, device),
                **(lowered.to_dict() if lowered else {}),
                **({"gpu": gpu.to_dict()} if gpu else {}),
            },
            "versions": versions(),
        }
        size = artefact_size(draft)
        request.check_output()  # something may have appeared there in the meantime
        publish(draft, output, manifest)
        if graph:
            request.verified.setdefault(graph, output.name)
    manifest_file = manifest_path(output)
    return Exported(
        output, manifest_file, report, size, device, arithmetic, info.left_in_float, gpu
    )


def _graph(request: Request, draft: Path) -> str:
    """Digest of the draft's graph, if the export may rely on another artefact with the same one.

    It is empty if the exporter has none, below fp32, where a graph depends on the weights, and if
    real images were given, all of which are compared.
    """
    digest = request.exporter.graph_digest
    if digest is None or request.precision != "fp32" or request.pictures:
        return ""
    return digest(draft)


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


def _calibration_entries(request: Request, left_in_float: Sequence[str]) -> dict[str, Any]:
    """Manifest entries for the calibration, and for products that stay in a higher precision."""
    names = list(left_in_float)
    if request.calibration:
        return {"calibration": {"images": len(request.calibration), "left_in_float": names}}
    return {"left_in_float": names} if names else {}
