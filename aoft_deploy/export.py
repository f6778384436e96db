"""From a checkpoint to a verified artefact with its manifest.

Fold, export, run what was exported, compare with the unmerged model, and only then let the artefact
and ``<artefact>.json`` appear under their names.
"""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from aoft_deploy.checkpoint import Checkpoint, open_checkpoint
from aoft_deploy.engines import Engine, Exporter, Recipe, get_exporter
from aoft_deploy.errors import CheckpointError, OutputError
from aoft_deploy.files import file_digest, json_text, settle, writable_folder
from aoft_deploy.images import read_image
from aoft_deploy.preprocessing import Preprocessing
from aoft_deploy.tuned import TunedModel, merge
from aoft_deploy.verification import BATCH_SIZES, Report, random_pixels, verify

__all__ = ["Exported", "export_merged", "manifest_path"]

PACKAGES = ("aoft-deploy", "torch", "timm", "onnx", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        path: The artefact.
        manifest: Its manifest, beside it.
        report: What the verification found.
        size: Bytes of the artefact.
    """

    path: Path
    manifest: Path
    report: Report
    size: int


def manifest_path(artefact: Path) -> Path:
    """Where an artefact's manifest stands: ``<artefact>.json``."""
    return artefact.with_name(artefact.name + ".json")


def export_merged(
    checkpoint: Path,
    output: Path | None = None,
    *,
    to: str = "onnx",
    uint8: bool = False,
    backbone: str | None = None,
    weights: Path | None = None,
    force: bool = False,
    images: Sequence[Path] = (),
    command: Sequence[str] = (),
) -> Exported:
    """Merge a checkpoint into its backbone and export the result, verified.

    Args:
        checkpoint: A ``model.ckpt``, or a published RLRR .pth.
        output: The artefact; None puts it beside the checkpoint.
        to: Name of an exporter.
        uint8: Let the artefact take pixels and normalise them itself.
        backbone: timm name to use instead of the checkpoint's.
        weights: File with the backbone's weights; None takes timm's own.
        force: Accept other backbone weights than those trained on; the manifest says so.
        images: Real images to verify with, beside the built-in ones.
        command: The command line, for the manifest.

    Returns:
        Where the artefact and its manifest stand, and the figures.

    Raises:
        AoftError: Anything wrong with the input, or answers that differ; no file is left then.
    """
    exporter = get_exporter(to)
    if not checkpoint.is_file():
        raise CheckpointError(f"There is no file {checkpoint}.")
    output = output or checkpoint.parent / f"{checkpoint.stem}{exporter.SUFFIX}"
    _check_output(output, exporter.SUFFIX, [checkpoint, *([weights] if weights else []), *images])
    pictures = [read_image(path) for path in images]
    tuned, task = open_checkpoint(checkpoint, backbone=backbone, weights=weights, force=force)
    preprocessing = task.preprocessing
    pixels = random_pixels(max(BATCH_SIZES), preprocessing.size)
    if pictures:
        pixels = np.concatenate([pixels, [preprocessing.pixels(image) for image in pictures]])
    recipe = Recipe(
        preprocessing.size, uint8, preprocessing.mean, preprocessing.std, _metadata(tuned, task)
    )
    with writable_folder(output.parent) as folder:
        draft, draft_manifest = folder / output.name, folder / manifest_path(output).name
        report = _export_verified(tuned, exporter, draft, recipe, pixels, preprocessing)
        manifest = {
            **_provenance(draft, checkpoint, to, command),
            **_contents(tuned, task, recipe),
            "verification": {**report.to_dict(), "real_images": len(pictures)},
            "versions": _versions(),
        }
        size = draft.stat().st_size
        try:
            draft_manifest.write_text(json_text(manifest, indent=2) + "\n", "utf-8")
            _publish(draft, output, draft_manifest)
        except OSError as error:
            raise OutputError(f"Cannot write {output}: {error.strerror or error}.") from error
    return Exported(output, manifest_path(output), report, size)


def _provenance(draft: Path, checkpoint: Path, to: str, command: Sequence[str]) -> dict[str, Any]:
    """Which file the manifest is of, and how it came to be."""
    return {
        "artefact": draft.name,
        "sha256": file_digest(draft),
        "bytes": draft.stat().st_size,
        "exporter": to,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "checkpoint": {"name": checkpoint.name, "sha256": file_digest(checkpoint)},
    }


def _contents(tuned: TunedModel, task: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """What the artefact computes, from what it was made, and what it takes."""
    return {
        "method": tuned.method,
        "settings": tuned.settings,
        "backbone": tuned.identity.to_dict(),
        "forced": tuned.identity.digest != task.backbone.digest,
        "input": _input_form(recipe),
        "classes": list(task.classes),
        "preprocessing": task.preprocessing.to_dict(),
    }


def _check_output(output: Path, suffix: str, inputs: Sequence[Path]) -> None:
    if output.is_dir():
        raise OutputError(f"{output} is a folder: name a file with -o.")
    if output.suffix != suffix:
        raise OutputError(f"{output} does not end in {suffix}: name such a file with -o.")
    for path in (output, manifest_path(output)):
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} exists and is no file: name another with -o.")
        if any(path.exists() and source.exists() and path.samefile(source) for source in inputs):
            raise OutputError(f"{path} is an input of this export: name another file with -o.")


def _publish(draft: Path, output: Path, draft_manifest: Path) -> None:
    """Give both files their names; the artefact is never there without its manifest."""
    manifest = manifest_path(output)
    settle(draft)
    settle(draft_manifest)
    draft_manifest.replace(manifest)
    try:
        draft.replace(output)
    except BaseException:
        manifest.unlink()
        raise


def _export_verified(
    tuned: TunedModel,
    exporter: Exporter,
    draft: Path,
    recipe: Recipe,
    pixels: NDArray[np.uint8],
    preprocessing: Preprocessing,
) -> Report:
    try:
        exporter.export(merge(tuned), draft, recipe)
    except (OSError, RuntimeError) as error:
        if isinstance(error, OutputError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise OutputError(f"The export could not be written ({reason}).") from error
    engine = exporter.load(draft)
    return verify(
        lambda batch: _logits(tuned, _normalised(batch, preprocessing)),
        lambda batch: _answers(engine, batch, recipe.uint8, preprocessing),
        pixels,
        tolerance=exporter.TOLERANCE,
    )


def _logits(model: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.from_numpy(inputs)).numpy()
    return logits


def _answers(
    engine: Engine, batch: NDArray[np.uint8], uint8: bool, preprocessing: Preprocessing
) -> NDArray[np.float32]:
    return engine.run(batch if uint8 else _normalised(batch, preprocessing))


def _normalised(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """uint8 [batch, H, W, 3] → float32 [batch, 3, H, W]."""
    mean, std = (np.array(v, np.float32) for v in (preprocessing.mean, preprocessing.std))
    scaled = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def _metadata(tuned: TunedModel, task: Checkpoint) -> dict[str, str]:
    """What stands in the artefact itself; texts, the structured ones as JSON."""
    return {
        "format": "aoft-deploy/1",
        "classes": json_text(list(task.classes)),
        "preprocessing": json.dumps(task.preprocessing.to_dict()),
        "method": tuned.method,
        "settings": json.dumps(tuned.settings),
        "backbone": json.dumps(tuned.identity.to_dict()),
    }


def _input_form(recipe: Recipe) -> Mapping[str, Any]:
    side = recipe.size
    if recipe.uint8:
        return {"name": "image", "type": "uint8", "shape": ["batch", side, side, 3]}
    return {"name": "pixel_values", "type": "float32", "shape": ["batch", 3, side, side]}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
