"""From a checkpoint to a verified artefact with its manifest.

Fold, export, run what was exported, compare with the unmerged model, and only then let the artefact
and ``<artefact>.json`` appear under their names.
"""

from __future__ import annotations

import functools
import json
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import nn

from aoft_deploy.artefacts.manifest import artefact_digest, artefact_files, manifest_path
from aoft_deploy.artefacts.prediction import check_classes
from aoft_deploy.artefacts.protocols import (
    DeviceExporter,
    EmulatedExporter,
    Engine,
    Exporter,
    FolderExporter,
    OpsetExporter,
    RangedExporter,
    TunedExporter,
)
from aoft_deploy.artefacts.registry import get_exporter
from aoft_deploy.artefacts.spec import Recipe
from aoft_deploy.artefacts.verification import BATCH_SIZES, Bar, Report, random_pixels, verify
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import Checkpoint
from aoft_deploy.checkpoints.opening import open_checkpoint
from aoft_deploy.checkpoints.peft_adapter import FILES
from aoft_deploy.data.images import read_image
from aoft_deploy.data.listing import image_files
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import CheckpointError, OutputError, SettingError, UnknownNameError
from aoft_deploy.export.calibration import calibration_files, calibration_pixels
from aoft_deploy.export.flops import flops_per_image
from aoft_deploy.files import json_text, settle, writable_folder
from aoft_deploy.tuning.backbones.identity import difference
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = [
    "MIN_AGREEMENT",
    "Exported",
    "arithmetic_of",
    "artefact_size",
    "bar_for",
    "built_for",
    "check_output",
    "check_output_folder",
    "device_of",
    "export_merged",
    "flops",
    "judges",
    "learnt_from",
    "left_in_float",
    "logits",
    "normalised",
    "on_device",
    "provenance",
    "publish",
    "verifiable",
    "verification_pixels",
    "versions",
    "within",
]

MIN_AGREEMENT = 0.99
"""Share of images whose top class a low-precision artefact must keep."""

PACKAGES = tuple(
    "aoft-deploy torch timm onnx onnxscript onnxruntime openvino nncf tensorrt tensorrt-rtx "
    "numpy".split()
)


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        path: The artefact, a file or a folder.
        manifest: Its manifest, beside it.
        report: What the verification found.
        size: Bytes of the artefact.
        device: Name of the device that the artefact was verified on; None where this machine lacks
            it, and its graph was verified instead.
        arithmetic: Which arithmetic the figures are of.
        left_in_float: Products that stay in float32 because low precision does not hold them.
    """

    path: Path
    manifest: Path
    report: Report
    size: int
    device: str | None = "CPU"
    arithmetic: str = ""
    left_in_float: tuple[str, ...] = ()


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
    precision: str = "fp32",
    calibrate: Sequence[Path] = (),
    min_agreement: float = MIN_AGREEMENT,
    batches: tuple[int, int, int] | None = None,
    compute_capability: str | None = None,
    refittable: bool = False,
    refit: Path | None = None,
    opset: int | None = None,
    command: Sequence[str] = (),
) -> Exported:
    """Merge a checkpoint into its backbone and export the result, verified.

    Args:
        checkpoint: A ``model.ckpt``, a published RLRR .pth, or a PEFT LoRA folder.
        output: The artefact; None puts it beside the checkpoint.
        to: Name of an exporter.
        uint8: Let the artefact take pixels and normalise them itself.
        backbone: timm name to use instead of the checkpoint's.
        weights: File with the backbone's weights; None takes timm's own.
        force: Accept other backbone weights than those trained on; the manifest says so.
        images: Real images, or folders of them, to verify with beside the built-in ones; below
            fp32 to verify with alone.
        precision: One of the exporter's ``PRECISIONS``.
        calibrate: Real images, or folders of them, to learn ranges of activations from, where the
            precision needs them; those that are among ``images`` are left out.
        min_agreement: Below fp32, least share of images with the unmerged model's top class.
        batches: Smallest, usual and largest batch, where the artefact is built for a range.
        compute_capability: Of the GPU to build for, such as ``8.9``; None is this machine's.
        refittable: Let the engine be given other weights later.
        refit: An engine of the same graph to give the weights to, where possible; one that cannot
            take them is built anew.
        opset: Of ONNX, where the exporter writes several; None is its own choice.
        command: The command line, for the manifest.

    Returns:
        Where the artefact and its manifest stand, and the figures.

    Raises:
        AoftError: Anything wrong with the input, or answers that differ; no file is left then.
    """
    exporter = get_exporter(to)
    if not checkpoint.is_file() and not checkpoint.is_dir():
        raise CheckpointError(f"There is no file {checkpoint}.")
    bar = bar_for(exporter, to, precision, min_agreement, images)
    built = built_for(exporter, to, batches, compute_capability, opset)
    if (refittable or refit) and not isinstance(exporter, DeviceExporter):
        raise SettingError(f"--to {to} builds no engine: leave --refittable and --refit out.")
    built |= {"refittable": refittable, "refit": refit}
    learnt = calibration_files(exporter, to, precision, calibrate, images)
    source = checkpoint if checkpoint.name.strip(".") else checkpoint.resolve()  # "." or ".."
    output = output or source.parent / f"{source.stem}{exporter.SUFFIX}"
    if isinstance(exporter, FolderExporter):
        check_output_folder(output)
    else:
        inputs = [checkpoint, *([weights] if weights else []), *images, *calibrate]
        check_output(output, exporter.SUFFIX, inputs)
    pictures = [read_image(path) for path in image_files(images)]
    tuned, task = open_checkpoint(checkpoint, BackboneSource(backbone, weights, force))
    check_classes(task.classes, str(checkpoint))
    preprocessing = task.preprocessing
    pixels = verification_pixels(preprocessing, pictures, precision)
    alone = isinstance(exporter, TunedExporter)
    model: nn.Module = tuned if alone else merge(tuned)
    metadata = {
        **_metadata(tuned, task),
        "precision": precision,
        **({} if alone else flops(model, preprocessing.size)),
    }
    mean, std = preprocessing.mean, preprocessing.std
    ranges = calibration_pixels(learnt, preprocessing)
    built["min_agreement"] = min_agreement if learnt else 0.0
    built["judged"] = None if precision == "fp32" else pixels
    recipe = Recipe(preprocessing.size, uint8, mean, std, metadata, precision, ranges, **built)
    with writable_folder(output.parent) as folder:
        draft = folder / output.name
        engine = _exported(model, exporter, draft, recipe, weights)
        left = left_in_float(engine)
        arithmetic = arithmetic_of(exporter, draft, precision)
        for judge, judged in judges(exporter, draft, engine, precision, pixels):
            report = verify(
                lambda batch: logits(tuned, normalised(batch, preprocessing)),
                functools.partial(_answers, judge, recipe=recipe, preprocessing=preprocessing),
                judged,
                bar=bar,
            )
        manifest = {
            **provenance(draft, to, command),
            "checkpoint": {
                "name": checkpoint.resolve().name,
                "sha256": artefact_digest(checkpoint, FILES),
            },
            **_contents(tuned, task, recipe),
            **learnt_from(learnt, left),
            "verification": {
                **report.to_dict(),
                "real_images": len(pictures),
                "arithmetic": arithmetic,
                **on_device(exporter, draft, precision),
            },
            "versions": versions(),
        }
        size = artefact_size(draft)
        publish(draft, output, manifest)
    device = device_of(exporter, output, precision)
    return Exported(output, manifest_path(output), report, size, device, arithmetic, left)


def bar_for(
    exporter: Exporter, to: str, precision: str, min_agreement: float, images: Sequence[Path]
) -> Bar:
    """What an artefact of a precision must reach.

    Raises:
        UnknownNameError: The exporter does not write the precision.
        SettingError: Below fp32 without images, or a share outside 0 to 1.
    """
    if precision not in exporter.PRECISIONS:
        raise UnknownNameError(f"precision of --to {to}", precision, exporter.PRECISIONS)
    if not 0 <= min_agreement <= 1:
        raise SettingError(f"--min-agreement is {min_agreement}, but is a share from 0 to 1.")
    if precision == "fp32":
        return Bar(exporter.TOLERANCE)
    if not images:
        raise SettingError(
            f"--precision {precision} is judged by its answers about real images: give some of "
            "the task's, or a folder of them, with --images."
        )
    return Bar(float("inf"), min_agreement)


def built_for(
    exporter: Exporter,
    to: str,
    batches: tuple[int, int, int] | None,
    compute_capability: str | None,
    opset: int | None,
) -> dict[str, Any]:
    """What a recipe says of the batches and the GPU to build for, and of ONNX's opset.

    Raises:
        SettingError: It is said of an exporter that builds for none, or the batches do not grow,
            or the exporter does not write that opset.
    """
    if opset is not None:
        opsets = exporter.OPSETS if isinstance(exporter, OpsetExporter) else ()
        if opset not in opsets:
            known = f"take {' or '.join(map(str, opsets))}" if opsets else "leave it out"
            raise SettingError(f"--opset {opset} is nothing that --to {to} writes: {known}.")
        return {"opset": opset, **built_for(exporter, to, batches, compute_capability, None)}
    if batches is None and compute_capability is None:
        return {}
    if batches is not None and not isinstance(exporter, RangedExporter):
        raise SettingError(f"--to {to} takes any batch: leave --batches out.")
    if compute_capability is not None and not isinstance(exporter, DeviceExporter):
        raise SettingError(f"--to {to} builds for no GPU: leave --compute-capability out.")
    least, usual, most = batches = batches or Recipe.batches
    if not 1 <= least <= usual <= most:
        raise SettingError(
            f"--batches {least} {usual} {most} are the smallest, usual and largest batch: give "
            "three numbers from 1 up that do not fall."
        )
    return {"batches": batches, "compute_capability": compute_capability}


def emulates(exporter: Exporter, precision: str) -> bool:
    """Whether no runtime on the CPU computes in a precision as the artefact's device does."""
    return isinstance(exporter, EmulatedExporter) and precision in exporter.EMULATED


def device_of(exporter: Exporter, artefact: Path, precision: str) -> str | None:
    """Where this machine runs an artefact in its own precision; None if nowhere."""
    if emulates(exporter, precision):
        return None
    return exporter.device(artefact) if isinstance(exporter, DeviceExporter) else "CPU"


def on_device(exporter: Exporter, draft: Path, precision: str) -> dict[str, Any]:
    """For a manifest, where the CPU may not be the device: whether the artefact ran, and where."""
    if not isinstance(exporter, DeviceExporter) and not emulates(exporter, precision):
        return {}
    return {"verified_on_device": device_of(exporter, draft, precision) or False}


def arithmetic_of(exporter: Exporter, draft: Path, precision: str) -> str:
    """In words, which arithmetic gives the answers that an artefact is judged by."""
    device = device_of(exporter, draft, precision)
    if device is not None:
        return f"{precision} by {exporter.ENGINES[0]} on {device}"
    if precision == "fp32":
        return "fp32 by onnxruntime on CPU"
    return f"{precision} emulated in float32, every result rounded, by onnxruntime on CPU"


def judges(
    exporter: Exporter,
    draft: Path,
    engine: Engine,
    precision: str,
    pixels: NDArray[np.uint8],
) -> Iterable[tuple[Engine, NDArray[np.uint8]]]:
    """What must answer as the unmerged model does, and about which images; the figures last."""
    if isinstance(exporter, EmulatedExporter) and precision in exporter.EMULATED:
        yield engine, pixels[: max(BATCH_SIZES)]  # the file opens and answers
        engine = exporter.emulation(draft)
    yield engine, pixels


def verifiable(exporter: Exporter, draft: Path) -> Engine:
    """The artefact, or where this machine lacks its device the graph that it was built from."""
    if not isinstance(exporter, DeviceExporter):
        return exporter.load(draft)
    engine = exporter.load(draft) if exporter.device(draft) else exporter.stand_in(draft)
    (draft / exporter.BETWEEN).unlink()
    return engine


def left_in_float(engine: Engine) -> tuple[str, ...]:
    """Products of a low-precision artefact that stay in float32, by name."""
    return tuple(json.loads(engine.info.get("left_in_float", "[]")))


def learnt_from(images: Sequence[Path], left: Sequence[str]) -> dict[str, Any]:
    """For a manifest: from how many images ranges were learnt, and which layers have none."""
    if images:
        return {"calibration": {"images": len(images), "left_in_float": list(left)}}
    return {"left_in_float": list(left)} if left else {}


def flops(model: nn.Module, size: int) -> dict[str, str]:
    """The arithmetic of an image, for metadata; empty where it is not known."""
    count = flops_per_image(model, size)
    return {} if count is None else {"flops": str(count)}


def verification_pixels(
    preprocessing: Preprocessing, pictures: Sequence[Image], precision: str
) -> NDArray[np.uint8]:
    """Images to verify with, uint8 [n, H, W, 3]: built-in ones first, at fp32 alone."""
    built_in = max(BATCH_SIZES) if precision == "fp32" else 0
    parts = [random_pixels(built_in, preprocessing.size)] if built_in else []
    if pictures:
        parts.append(np.stack([preprocessing.pixels(image) for image in pictures]))
    return np.concatenate(parts)


def provenance(draft: Path, to: str, command: Sequence[str]) -> dict[str, Any]:
    """Which file the manifest is of, and how it came to be."""
    return {
        "artefact": draft.name,
        "sha256": artefact_digest(draft),
        "bytes": artefact_size(draft),
        "exporter": to,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
    }


def artefact_size(artefact: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(path.stat().st_size for path in artefact_files(artefact))


def _contents(tuned: TunedModel, task: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """What the artefact computes, from what it was made, and what it takes."""
    return {
        "method": tuned.method,
        "settings": tuned.settings,
        "backbone": tuned.identity.to_dict(),
        "forced": bool(difference(tuned.identity, task.backbone)),
        "precision": recipe.precision,
        "input": _input_form(recipe),
        "classes": list(task.classes),
        "preprocessing": task.preprocessing.to_dict(),
    }


def check_output(output: Path, suffix: str, inputs: Sequence[Path]) -> None:
    """Refuse a path that an artefact of one file cannot take."""
    if output.is_dir():
        raise OutputError(f"{output} is a folder: name a file with -o.")
    if output.suffix != suffix:
        raise OutputError(f"{output} does not end in {suffix}: name such a file with -o.")
    for path in (output, manifest_path(output)):
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} exists and is no file: name another with -o.")
        if any(path.exists() and source.exists() and path.samefile(source) for source in inputs):
            raise OutputError(f"{path} is an input of this export: name another file with -o.")


def check_output_folder(output: Path) -> None:
    """Refuse a path that an artefact of a folder cannot take."""
    if output.name in ("", "..") or output.is_symlink():
        raise OutputError(f"{output} cannot become a folder: name a new one with -o.")
    manifest = manifest_path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} exists and is no empty folder: name a new one with -o.")
    if manifest.exists() and not manifest.is_file():
        raise OutputError(f"{manifest} exists and is no file: name another folder with -o.")


def publish(draft: Path, output: Path, contents: Mapping[str, Any]) -> None:
    """Write the manifest and give both their names, or leave neither.

    Raises:
        OutputError: A file cannot be written or renamed.
    """
    draft_manifest = draft.with_name(manifest_path(output).name)
    try:
        draft_manifest.write_text(json_text(contents, indent=2) + "\n", "utf-8")
        _name(draft, output, draft_manifest)
    except OSError as error:
        raise OutputError(f"Cannot write {output}: {error.strerror or error}.") from error


def _name(draft: Path, output: Path, draft_manifest: Path) -> None:
    """Give both files their names; the artefact is never there without its manifest."""
    manifest = manifest_path(output)
    for path in (*artefact_files(draft), draft_manifest):
        settle(path)
    draft_manifest.replace(manifest)
    try:
        draft.replace(output)
    except BaseException:
        manifest.unlink()
        raise


def _exported(
    model: nn.Module, exporter: Exporter, draft: Path, recipe: Recipe, weights: Path | None
) -> Engine:
    """Write the artefact, and open what was written."""
    alone = exporter if isinstance(exporter, TunedExporter) else None
    try:
        exporter.export(model, draft, recipe)
    except (OSError, RuntimeError) as error:
        if isinstance(error, OutputError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise OutputError(f"The export could not be written ({reason}).") from error
    return alone.load(draft, weights=weights) if alone else verifiable(exporter, draft)


def logits(model: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """A model's logits of normalised inputs, (batch, classes)."""
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.from_numpy(inputs)).numpy()
    return logits


def _answers(
    engine: Engine, batch: NDArray[np.uint8], recipe: Recipe, preprocessing: Preprocessing
) -> NDArray[np.float32]:
    inputs = batch if recipe.uint8 else normalised(batch, preprocessing)
    pieces = [engine.run(inputs[i])[:count] for i, count in within(len(batch), recipe.batches)]
    return np.concatenate(pieces)


def within(size: int, batches: tuple[int, int, int]) -> Iterable[tuple[NDArray[np.int64], int]]:
    """A batch in pieces that an artefact takes: indices, and how many of their answers count.

    The last piece is filled up with its first image where it is too small.
    """
    least, _, most = batches
    for start in range(0, size, most):
        piece = np.arange(start, min(start + most, size))
        filled = np.pad(piece, (0, max(0, least - len(piece))), constant_values=start)
        yield filled, len(piece)


def normalised(
    pixels: NDArray[np.uint8], preprocessing: Preprocessing | Recipe
) -> NDArray[np.float32]:
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


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that an export depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
