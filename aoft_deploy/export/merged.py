"""Export one checkpoint as a verified artefact of the merged model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import Engine
from aoft_deploy.artefacts.exporter import Exporter
from aoft_deploy.artefacts.manifest import artefact_digest
from aoft_deploy.artefacts.registry import get_exporter
from aoft_deploy.artefacts.spec import BuildOptions, ExportSpec
from aoft_deploy.artefacts.verification import Bar, Report, Run, verify
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.file_format import checkpoint_file
from aoft_deploy.classes import check_classes
from aoft_deploy.data.normalisation import normalised
from aoft_deploy.errors import SettingError, optional_imports
from aoft_deploy.export.options import VerifyOptions
from aoft_deploy.export.output_paths import artefact_path, beside
from aoft_deploy.export.pipeline import Request, export_verified
from aoft_deploy.export.publishing import Exported
from aoft_deploy.export.sources import Source, source_of
from aoft_deploy.export.verifying import answers, logits, open_draft, remembered

if TYPE_CHECKING:
    from torch import nn

    from aoft_deploy.checkpoints.checkpoint import Checkpoint
    from aoft_deploy.checkpoints.shared_backbone import SharedBackbone
    from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = ["describe_model", "export_each", "export_merged"]


@optional_imports()
def export_merged(
    checkpoint: str | Path | TunedModel,
    output: str | Path | None = None,
    *,
    to: str = "onnx",
    precision: str = "fp32",
    uint8: bool = False,
    backbone: BackboneSource = BackboneSource(),
    verify: VerifyOptions = VerifyOptions(),
    build: BuildOptions = BuildOptions(),
    overwrite: bool = False,
    command: Sequence[str] = (),
) -> Exported:
    """Merge a checkpoint into its backbone, export the result, and verify it.

    Args:
        checkpoint: A ``model.ckpt`` or the run's folder, a published RLRR .pth file, a PEFT LoRA
            folder, or a model in memory, which is not changed.
        output: Path of the artefact; None means beside the checkpoint, as ``model.onnx`` or, below
            fp32, ``model-int8.onnx``.
        to: Name of an exporter.
        precision: One of the exporter's precisions.
        uint8: Whether the artefact takes uint8 pixels and normalises them itself.
        backbone: The backbone's name and weights, if they are not the checkpoint's and timm's.
        verify: Images for verification and calibration.
        build: Options of ONNX graphs and TensorRT engines.
        overwrite: Replace an existing artefact at ``output``.
        command: The command line, for the manifest.

    Returns:
        The paths of artefact and manifest, and the verification results.

    Raises:
        AoftError: The input is invalid, or the answers differ. No file is left.
    """
    exporter = get_exporter(to)
    with source_of(checkpoint) as source:
        request = Request(
            exporter,
            _default_output(source, exporter, precision) if output is None else Path(output),
            [source.path],
            backbone,
            precision=precision,
            verify=verify,
            build=build,
            overwrite=overwrite,
            command=command,
        )
        return _export(source, request, uint8)


@optional_imports()
def export_each(
    checkpoints: Sequence[str | Path],
    *,
    to: str = "onnx",
    precision: str = "fp32",
    uint8: bool = False,
    backbone: BackboneSource = BackboneSource(),
    verify: VerifyOptions = VerifyOptions(),
    build: BuildOptions = BuildOptions(),
    overwrite: bool = False,
    command: Sequence[str] = (),
) -> Iterator[Exported]:
    """Export several checkpoints, each by itself as ``export_merged`` does.

    All options and paths are checked before the first export. Tasks of one backbone share its
    weights, which are read, checked and hashed once.

    Args:
        checkpoints: Checkpoints as for ``export_merged``. Each artefact gets its default path,
            beside its checkpoint.
        to: As for ``export_merged``, as are the others.
        precision: One of the exporter's precisions.
        uint8: Whether the artefacts take uint8 pixels.
        backbone: The backbone's name and weights, if they are not the checkpoints' and timm's.
        verify: Images for verification and calibration.
        build: Options of ONNX graphs and TensorRT engines.
        overwrite: Replace existing artefacts.
        command: The command line, for the manifests.

    Returns:
        An iterator that makes the exports, one at a time.

    Raises:
        AoftError: An input is invalid, two artefacts would have the same path, or the answers of
            one differ. The artefacts before it stay.
    """
    exporter = get_exporter(to)
    sources = [Source(checkpoint_file(path)) for path in checkpoints]
    outputs = [_default_output(source, exporter, precision) for source in sources]
    for output in outputs:
        if outputs.count(output) > 1:
            raise SettingError(f"{output} would be written twice: give each checkpoint once.")
    requests = [
        Request(
            exporter,
            output,
            [each.path for each in sources],
            backbone,
            precision=precision,
            verify=verify,
            build=build,
            overwrite=overwrite,
            command=command,
        )
        for output in outputs
    ]
    return _exports(sources, requests, uint8)


def _exports(
    sources: Sequence[Source], requests: Sequence[Request], uint8: bool
) -> Iterator[Exported]:
    """Export each source as its request says."""
    with optional_imports():
        from aoft_deploy.checkpoints.shared_backbone import SharedBackbone  # imports torch

        shared = SharedBackbone()
    for source, request in zip(sources, requests, strict=True):
        with optional_imports():
            exported = _export(source, request, uint8, shared)
        yield exported


def _export(
    source: Source, request: Request, uint8: bool, shared: SharedBackbone | None = None
) -> Exported:
    """Export a source as its request says."""
    tuned, task = source.open(request.backbone, shared)
    check_classes(task.classes, str(source.path))
    pixels = request.pixels(task.preprocessing)
    subject = _Merged(
        request.exporter, source.path, request.backbone, tuned, task, request.precision
    )
    return export_verified(request, subject, pixels, uint8)


def _default_output(source: Source, exporter: Exporter, precision: str) -> Path:
    if source.model is not None:
        raise SettingError("A model in memory has no folder: give the artefact's path as `output`.")
    return artefact_path(beside(source.path), exporter, precision)


@dataclass
class _Merged:
    """A checkpoint's merged model, or its unmerged model for exporters of the updates alone."""

    exporter: Exporter
    checkpoint: Path
    backbone: BackboneSource
    tuned: TunedModel
    task: Checkpoint
    precision: str
    model: nn.Module = field(init=False)
    info: ArtefactInfo = field(init=False)
    reference: Run = field(init=False)

    def __post_init__(self) -> None:
        from aoft_deploy.export.flops import flops_text
        from aoft_deploy.tuning.merging import merge

        is_merged = self.exporter.updates is None
        self.model = merge(self.tuned) if is_merged else self.tuned
        self.info = describe_model(self.tuned, self.task).having(
            precision=self.precision,
            flops=flops_text(self.model, self.task.preprocessing) if is_merged else None,
        )
        mean, std = self.task.preprocessing.mean, self.task.preprocessing.std
        self.reference = remembered(lambda batch: logits(self.tuned, normalised(batch, mean, std)))

    def write(self, draft: Path, spec: ExportSpec) -> None:
        self.exporter.export(self.model, draft, spec)

    def open(self, draft: Path) -> Engine:
        if self.exporter.updates is not None:
            return self.exporter.updates.load(draft, self.backbone.weights)
        return open_draft(self.exporter, draft, self.precision)

    def verify(
        self, engine: Engine, pixels: NDArray[np.uint8], spec: ExportSpec, bar: Bar
    ) -> Report:
        return verify(
            self.reference,
            lambda batch: answers(engine, batch, spec),
            pixels,
            bar=bar,
            classes=self.task.classes,
        )

    def manifest(self, spec: ExportSpec) -> dict[str, Any]:
        from aoft_deploy.checkpoints.peft_adapter import FILES
        from aoft_deploy.tuning.backbones.identity import difference

        return {
            "checkpoint": {
                "name": self.checkpoint.resolve().name,
                "sha256": artefact_digest(self.checkpoint, FILES),
            },
            "method": self.tuned.method,
            "settings": self.tuned.settings,
            "backbone": self.tuned.identity.to_dict(),
            "forced": bool(difference(self.tuned.identity, self.task.backbone)),
            "precision": spec.precision,
            "input": spec.input.to_dict(),
            "classes": list(self.task.classes),
            "activation": self.task.classes.activation,
            "preprocessing": self.task.preprocessing.to_dict(),
        }


def describe_model(tuned: TunedModel, task: Checkpoint) -> ArtefactInfo:
    """Metadata of an artefact for a task's model."""
    return ArtefactInfo.of_model(
        task.classes,
        task.preprocessing,
        tuned.method,
        tuned.settings,
        tuned.identity.to_dict(),
    )
