"""An artefact opened for serving: its engine behind a batcher, warm, with all that is known of it.

The one place where the server opens engines.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from aoft_deploy.artefacts.onnx_metadata import read_metadata
from aoft_deploy.artefacts.prediction import check_classes
from aoft_deploy.artefacts.protocols import Engine
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import CheckpointError, SettingError
from aoft_deploy.fleet.fleet import Fleet
from aoft_deploy.serving.batching.batcher import Batcher, Run
from aoft_deploy.serving.protocol.tensors import DTYPES, Tensor
from aoft_deploy.serving.settings import Settings

__all__ = ["Artefact", "open_artefact"]


@dataclass(frozen=True, eq=False)
class Artefact:
    """What one file or folder serves.

    Attributes:
        name: In metrics, and of the model where it is a merged one.
        path: Where it came from.
        tensor: Its input.
        prepare: From an upright RGB image to one sample of the input.
        size: Side of that sample in pixels.
        batcher: Its queue and engine.
        preprocessing: What ``prepare`` does.
        classes: Of a merged model, in the order of the logits.
        fleet: Of a fleet, whose tasks are models.
    """

    name: str
    path: Path
    tensor: Tensor
    prepare: Callable[[Image], NDArray[Any]]
    size: int
    batcher: Batcher
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    fleet: Fleet | None


def open_artefact(
    name: str,
    path: Path,
    settings: Settings,
    observe: Callable[[str, int, float], object] | None = None,
) -> Artefact:
    """Open, run once at batch size 1 and at the largest, and check what it answers.

    Args:
        name: As the attribute.
        path: What aoft-export wrote.
        settings: Of the server.
        observe: Told name, rows and seconds of every batch.

    Raises:
        CheckpointError: It is damaged, names files outside, or answers nonsense.
        SettingError: It is a fleet, and an engine or a device is asked for.
        MissingExtraError: Its engine's package is not installed.
    """
    info = read_metadata(path) if path.suffix == ".onnx" else None
    engine = None
    if info is None or "tasks" not in info:
        asked = {"engine": settings.engine, "device": settings.device}
        engine = load_artefact(path, threads=settings.threads, **asked)
    fleet: Fleet | None = None
    if engine is None or engine.takes_tasks:
        engine = None
        if settings.engine is not None or settings.device not in (None, "cpu"):
            raise SettingError(
                f"{path} is a fleet, which runs on the CPU in the engine that it was exported for: "
                "leave --engine and --device out."
            )
        fleet = Fleet(path, store=settings.store, budget=settings.budget, threads=settings.threads)
        preprocessing, pixels, stop = fleet.preprocessing, False, None
        run: Run = partial(fleet.predict, rows=settings.max_batch)
        classes: tuple[str, ...] = ()
        tasks = [next(iter(fleet.tasks))]
        width = len(fleet.classes(tasks[0]))
    else:
        preprocessing, classes = _described(path, engine.info)
        pixels, stop = engine.takes_pixels, getattr(engine, "stop", None)
        run = partial(_answers, engine, classes, settings.max_batch)
        tasks, width = [""], len(classes)
    size = preprocessing.size
    tensor = (
        Tensor("image", "UINT8", (size, size, 3))
        if pixels
        else Tensor("pixel_values", "FP32", (3, size, size))
    )
    _warm_up(path, run, tensor, tasks, width, settings.max_batch)
    batcher = Batcher(
        run,
        max_rows=settings.max_batch,
        max_wait=settings.max_wait,
        capacity=settings.queue,
        engine_seconds=settings.engine_timeout,
        stop=cast("Callable[[], object] | None", stop),
        observe=None if observe is None else lambda rows, seconds: observe(name, rows, seconds),
    )
    prepare = preprocessing.pixels if pixels else preprocessing
    return Artefact(name, path, tensor, prepare, size, batcher, preprocessing, classes, fleet)


def _described(path: Path, info: Any) -> tuple[Preprocessing, tuple[str, ...]]:
    try:
        preprocessing = Preprocessing.from_dict(json.loads(info["preprocessing"]))
        classes = tuple(map(str, json.loads(info["classes"])))
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} names no classes and preprocessing: it was not written by aoft-export."
        ) from error
    check_classes(classes, str(path))
    return preprocessing, classes


def _answers(
    engine: Engine, classes: Sequence[str], rows: int, images: NDArray[Any], tasks: Sequence[str]
) -> Iterator[tuple[NDArray[np.float32], Sequence[str]]]:
    """Logits of a merged model's samples, so many rows at a time, and its classes."""
    for start in range(0, len(images), rows):
        for logits in engine.run(images[start : start + rows]):
            yield logits, classes


def _warm_up(
    path: Path, run: Run, tensor: Tensor, tasks: list[str], width: int, largest: int
) -> None:
    for rows in sorted({1, largest}):
        batch = np.zeros((rows, *tensor.shape), DTYPES[tensor.datatype])
        try:
            logits = np.stack([each for each, _ in run(batch, tasks * rows)])
        except Exception as error:  # runtimes raise classes of their own, all Exception
            reason = " ".join(str(error).split())[:160]
            raise CheckpointError(f"{path} does not run ({reason}).") from error
        if logits.shape != (rows, width) or not np.isfinite(logits).all():
            raise CheckpointError(
                f"{path} answers with shape {logits.shape} or not finitely for {rows} samples of "
                f"{width} classes: it was not written by aoft-export."
            )
