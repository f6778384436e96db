"""Open and run a draft of an artefact for its verification."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.engine import Engine, EngineOptions
from aoft_deploy.artefacts.exporter import Exporter
from aoft_deploy.artefacts.spec import ExportSpec
from aoft_deploy.artefacts.verification import BATCH_SIZES, Run, random_pixels
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.float32_products import float32_products

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

__all__ = [
    "answers",
    "arithmetic_of",
    "batch_pieces",
    "logits",
    "on_device",
    "open_draft",
    "remembered",
    "runs_to_judge",
    "verification_pixels",
]


def verification_pixels(
    preprocessing: Preprocessing, pictures: Sequence[Image], precision: str
) -> NDArray[np.uint8]:
    """Verification images, uint8 [n, H, W, 3]: at fp32 the built-in images, then the real ones."""
    parts = []
    if precision == "fp32":
        height, width = preprocessing.height, preprocessing.width
        parts.append(random_pixels(max(BATCH_SIZES), height, width))
    if pictures:
        parts.append(np.stack([preprocessing.pixels(image) for image in pictures]))
    return np.concatenate(parts)


def open_draft(exporter: Exporter, draft: Path, precision: str) -> Engine:
    """Load the artefact, or what stands for it if this machine lacks its device."""
    if exporter.emulation is not None and precision in exporter.emulation.gpu_only:
        return exporter.emulation.load(draft)
    if exporter.device is None:
        return exporter.load(draft, EngineOptions())
    if exporter.device.name(draft):
        engine = exporter.load(draft, EngineOptions())
    else:
        engine = exporter.device.load_intermediate(draft)
    (draft / exporter.device.intermediate).unlink()
    return engine


def runs_to_judge(
    exporter: Exporter,
    draft: Path,
    engine: Engine,
    precision: str,
    pixels: NDArray[np.uint8],
) -> Iterable[tuple[Engine, NDArray[np.uint8]]]:
    """Engines to verify, each with its images. The report of the last one is kept."""
    emulation = exporter.emulation
    if emulation is not None and precision in set(emulation.precisions) - set(emulation.gpu_only):
        yield engine, pixels[: max(BATCH_SIZES)]  # the file itself must load and run
        engine = emulation.load(draft)
    yield engine, pixels


def arithmetic_of(exporter: Exporter, draft: Path, precision: str) -> str:
    """Describe the precision, runtime and device of the verification."""
    device = exporter.device_name(draft, precision)
    if device is not None:
        return f"{precision} by {exporter.engines[0]} on {device}"
    if precision == "fp32":
        return "fp32 by onnxruntime on CPU"
    rounded = "every factor of a product" if precision == "tf32" else "every result"
    return f"{precision} emulated in float32, {rounded} rounded, by onnxruntime on CPU"


def on_device(exporter: Exporter, precision: str, device: str | None) -> dict[str, Any]:
    """Manifest entry for the device; empty if every machine has it.

    Args:
        exporter: The exporter.
        precision: Precision of the artefact.
        device: Name of the device that ran the artefact in its precision; None without one.
    """
    if exporter.device is None and not exporter.emulates(precision):
        return {}
    return {"verified_on_device": device or False}


def remembered(run: Run) -> Run:
    """A function that computes the logits of each batch of pixels once."""
    known: dict[bytes, NDArray[np.float32]] = {}

    def recall(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        key = hashlib.sha256(pixels.tobytes()).digest()
        if key not in known:
            known[key] = run(pixels)
        return known[key]

    return recall


def logits(model: nn.Module, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """A model's logits for normalised inputs, (batch, classes)."""
    import torch

    with torch.inference_mode(), float32_products():
        result: NDArray[np.float32] = model(torch.from_numpy(inputs)).numpy()
    return result


def answers(engine: Engine, pixels: NDArray[np.uint8], spec: ExportSpec) -> NDArray[np.float32]:
    """An artefact's logits for pixels, uint8 [batch, H, W, 3], in supported batch sizes."""
    inputs = spec.input.prepare(pixels)
    pieces = batch_pieces(len(pixels), spec.build.batch_range)
    return np.concatenate([engine.run(inputs[rows])[:count] for rows, count in pieces])


def batch_pieces(
    size: int, batches: tuple[int, int, int]
) -> Iterable[tuple[NDArray[np.int64], int]]:
    """Split a batch into pieces of supported sizes: row indices, and the number of valid answers.

    If the last piece is too small, it is padded with its first row.
    """
    smallest, _, largest = batches
    for start in range(0, size, largest):
        piece = np.arange(start, min(start + largest, size))
        padded = np.pad(piece, (0, max(0, smallest - len(piece))), constant_values=start)
        yield padded, len(piece)
