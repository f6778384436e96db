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
from aoft_deploy.artefacts.verification import BATCH_SIZES, Bar, Report, verify
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
from aoft_deploy.export.verifying import answers, logits, open_draft

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
    weights, which are read, checked and hashed once. If two artefacts in fp32 differ in the values
    of their weights alone, the second is verified with one batch of two images, or with all real
    images: what the batch size changes belongs to the graph, and the first showed it.

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
    verified = dict[str, str]()
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
            verified=verified,
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
    subject = _Merged(request, source.path, tuned, task, pixels, owned=shared is None)
    return export_verified(request, subject, pixels, uint8)


def _default_output(source: Source, exporter: Exporter, precision: str) -> Path:
    if source.model is not None:
        raise SettingError("A model in memory has no folder: give the artefact's path as `output`.")
    return artefact_path(beside(source.path), exporter, precision)


@dataclass
class _Merged:
    """A checkpoint's merged model, or its unmerged model for exporters of the updates alone.

    Attributes:
        request: The options of the export.
        checkpoint: The checkpoint's path.
        tuned: The unmerged model. If it is owned, the updates are merged in place, so its answers
            are computed before.
        task: The checkpoint.
        pixels: The verification images, uint8 [n, H, W, 3].
        owned: Whether no other model has the same weights.
        model: The model to export, until it is written.
        expected: The unmerged model's logits for the first images, float32 [up to n, classes].
        info: Metadata of the artefact.
    """

    request: Request
    checkpoint: Path
    tuned: TunedModel
    task: Checkpoint
    pixels: NDArray[np.uint8]
    owned: bool
    model: nn.Module | None = field(init=False)
    expected: NDArray[np.float32] = field(init=False)
    info: ArtefactInfo = field(init=False)

    def __post_init__(self) -> None:
        from aoft_deploy.export.flops import flops_text
        from aoft_deploy.tuning.merging import merge

        flops, self.model = None, self.tuned
        self.expected = np.empty((0, len(self.task.classes)), np.float32)
        if self.request.exporter.updates is None:
            if self.owned:
                self._expect(len(self.pixels))
            self.model = merge(self.tuned, in_place=self.owned)
            flops = flops_text(self.model, self.task.preprocessing)
        self.info = describe_model(self.tuned, self.task).having(
            precision=self.request.precision, flops=flops
        )

    def _expect(self, count: int) -> NDArray[np.float32]:
        """The unmerged model's logits for the first images, float32 [count, classes]."""
        if len(self.expected) < count:
            prepared, size = self.task.preprocessing, max(BATCH_SIZES)
            batches = (self.pixels[i : min(i + size, count)] for i in range(0, count, size))
            inputs = (normalised(batch, prepared.mean, prepared.std) for batch in batches)
            self.expected = np.concatenate([logits(self.tuned, batch) for batch in inputs])
        return self.expected[:count]

    def write(self, draft: Path, spec: ExportSpec) -> None:
        self.request.exporter.export(self.model, draft, spec)
        self.model = None  # it would take memory while the artefact is verified

    def open(self, draft: Path) -> Engine:
        exporter = self.request.exporter
        if exporter.updates is not None:
            return exporter.updates.load(draft, self.request.backbone.weights)
        return open_draft(exporter, draft, self.request.precision)

    def verify(
        self,
        engine: Engine,
        pixels: NDArray[np.uint8],
        spec: ExportSpec,
        bar: Bar,
        batch_sizes: Sequence[int],
    ) -> Report:
        return verify(
            self._expect(len(pixels)),
            lambda batch: answers(engine, batch, spec),
            pixels,
            bar=bar,
            classes=self.task.classes,
            batch_sizes=batch_sizes,
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
