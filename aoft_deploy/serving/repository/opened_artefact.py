"""An artefact opened for serving: its warmed-up engine, its batcher and its metadata.

This is the only module of the server that opens engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import Engine, EngineOptions
from aoft_deploy.artefacts.onnx_metadata import read_metadata
from aoft_deploy.artefacts.registry import exporters_of, load_artefact
from aoft_deploy.artefacts.spec import InputSpec
from aoft_deploy.classes import Classes
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import ArtefactError, SettingError
from aoft_deploy.fleet.fleet import Fleet
from aoft_deploy.serving.batching.batcher import Batcher
from aoft_deploy.serving.batching.worker import Replica, Run
from aoft_deploy.serving.protocol.tensors import DTYPES, Tensor
from aoft_deploy.serving.settings import Settings
from aoft_deploy.texts import one_line

__all__ = ["Artefact", "open_artefact"]


@dataclass(frozen=True, eq=False)
class Artefact:
    """One open artefact.

    Attributes:
        name: Its name in metrics; for a merged model also the model's name.
        path: The file or folder.
        platform: Name of its format in the protocol.
        tensor: Its input.
        prepare: Converts an upright RGB image to one sample of the input.
        batcher: Its queue and engine.
        preprocessing: The preprocessing that ``prepare`` applies.
        classes: Classes of a merged model, in the order of its logits; empty for a fleet.
        fleet: The fleet, whose tasks are the models; None for a merged model.
    """

    name: str
    path: Path
    platform: str
    tensor: Tensor
    prepare: Callable[[Image], NDArray[Any]]
    batcher: Batcher
    preprocessing: Preprocessing
    classes: Classes
    fleet: Fleet | None


def open_artefact(
    name: str,
    path: Path,
    settings: Settings,
    observe: Callable[[str, int, float], object] | None = None,
) -> Artefact:
    """Open an artefact, run it with batches of 1 and of the maximum size, and check the answers.

    Args:
        name: As the attribute.
        path: The artefact that aoft-export wrote.
        settings: The server's settings.
        observe: Called with name, rows and seconds of every batch.

    Raises:
        ArtefactError: It is damaged, refers to other files, or gives malformed answers.
        SettingError: It is a fleet, but the settings choose an engine or a device.
        MissingExtraError: Its engine's package is not installed.
    """
    info = read_metadata(path) if path.suffix == ".onnx" else None
    engine = None
    if info is None or "tasks" not in info:
        options = EngineOptions(settings.engine, settings.threads, settings.device)
        engine = load_artefact(path, options)
    fleet: Fleet | None = None
    if engine is None or engine.takes_tasks:
        engine = None
        if settings.engine is not None or settings.device not in (None, "cpu"):
            raise SettingError(
                f"{path} is a fleet, which runs on the CPU in the engine that it was exported for: "
                "leave `engine` and `device` out."
            )
        fleet = Fleet(path, store=settings.store, budget=settings.budget, threads=settings.threads)
        preprocessing, pixels, stop = fleet.preprocessing, False, None
        run: Run = partial(fleet.predict, rows=settings.max_batch)
        classes = Classes(())
        tasks = [next(iter(fleet.tasks))]
        width = len(fleet.classes(tasks[0]))
    else:
        described = ArtefactInfo(engine.info, str(path))
        preprocessing, classes = described.preprocessing, described.classes
        pixels, stop = engine.takes_pixels, getattr(engine, "stop", None)
        run = partial(_run_merged, engine, classes, settings.max_batch)
        tasks, width = [""], len(classes)
    spec = InputSpec.of(preprocessing, pixels)
    tensor = Tensor(spec.name, "UINT8" if pixels else "FP32", spec.shape)
    _warm_up(path, run, tensor, tasks, width, settings.max_batch)
    batcher = Batcher(
        [Replica(run, stop=cast("Callable[[], object] | None", stop))],
        max_rows=settings.max_batch,
        max_wait=settings.max_wait,
        capacity=settings.queue,
        engine_seconds=settings.engine_timeout,
        observe=None if observe is None else lambda rows, seconds: observe(name, rows, seconds),
    )
    prepare = preprocessing.pixels if pixels else preprocessing
    platform = exporters_of(path)[0].platform
    return Artefact(name, path, platform, tensor, prepare, batcher, preprocessing, classes, fleet)


def _run_merged(
    engine: Engine, classes: Classes, rows: int, images: NDArray[Any], tasks: Sequence[str]
) -> Iterator[tuple[NDArray[np.float32], Classes]]:
    """Logits and classes of each sample of a merged model, computed ``rows`` at a time."""
    for start in range(0, len(images), rows):
        for logits in engine.run(images[start : start + rows]):
            yield logits, classes


def _warm_up(
    path: Path, run: Run, tensor: Tensor, tasks: list[str], width: int, max_rows: int
) -> None:
    for rows in sorted({1, max_rows}):
        batch = np.zeros((rows, *tensor.shape), DTYPES[tensor.datatype])
        try:
            logits = np.stack([logits for logits, _ in run(batch, tasks * rows)])
        except Exception as error:  # each runtime has its own exceptions
            reason = one_line(error, 160)
            raise ArtefactError(f"{path} does not run ({reason}).") from error
        if logits.shape != (rows, width) or not np.isfinite(logits).all():
            raise ArtefactError(
                f"{path} gives logits of shape {logits.shape}, or not finite ones, for {rows} "
                f"samples of {width} classes: it was not written by aoft-export."
            )
