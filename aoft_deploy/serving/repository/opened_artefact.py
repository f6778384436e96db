"""An artefact opened for serving: its warmed-up engines, its batcher and its metadata.

This is the only module of the server that opens engines. With several devices, each gets a replica.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import Engine, EngineOptions
from aoft_deploy.artefacts.manifest import unchanged, verified_batches
from aoft_deploy.artefacts.onnx_metadata import read_metadata
from aoft_deploy.artefacts.registry import exporters_of, load_artefact
from aoft_deploy.artefacts.spec import InputSpec
from aoft_deploy.classes import Classes
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import ArtefactError, SettingError
from aoft_deploy.fleet.fleet import Fleet
from aoft_deploy.fleet.replicas import FleetReplicas
from aoft_deploy.memory import keeping_large_blocks
from aoft_deploy.serving.batching.batcher import Batcher
from aoft_deploy.serving.batching.worker import Replica, Run
from aoft_deploy.serving.protocol.tensors import DTYPES, Tensor
from aoft_deploy.serving.settings import Settings, device_name
from aoft_deploy.texts import one_line

__all__ = ["Artefact", "open_artefact"]

GPU_LANES = 2
"""Batches that a GPU computes at once by default: one is copied while the other is computed."""


ON_CPU = 2
"""Size of the batch that a CPU runs at the start, unless other sizes are known to work."""


@dataclass(frozen=True, eq=False)
class Artefact:
    """One open artefact.

    Attributes:
        name: Its name in metrics; for a merged model also the model's name.
        path: The file or folder.
        platform: Name of its format in the protocol.
        tensor: Its input.
        prepare: Converts an upright RGB image to one sample of the input.
        devices: Number of lanes of its replica on each device, by name: ``cpu``, ``cuda:0`` …
        batcher: Its queue and engines.
        preprocessing: The preprocessing that ``prepare`` applies.
        classes: Classes of a merged model, in the order of its logits; empty for a fleet.
        fleet: The replicas of the fleet, whose tasks are the models; None for a merged model.
    """

    name: str
    path: Path
    platform: str
    tensor: Tensor
    prepare: Callable[[Image], NDArray[Any]]
    devices: dict[str, int]
    batcher: Batcher
    preprocessing: Preprocessing
    classes: Classes
    fleet: FleetReplicas | None


def open_artefact(
    name: str,
    path: Path,
    settings: Settings,
    observe: Callable[[str, int, float], object] | None = None,
) -> Artefact:
    """Open an artefact on each device, run all its lanes, and check the answers.

    Each lane of a GPU runs batches of 1 and of the maximum size, for which it takes memory and may
    choose or record kernels. A CPU does neither for a size: its first batch of 16 takes no longer
    than the next. So there the server is ready after one image, which shows that the engine
    computes. That its batch size is free was verified at the export, if the manifest says so;
    otherwise, a batch of 2 shows it.

    Args:
        name: As the attribute.
        path: The artefact that aoft-export wrote.
        settings: The server's settings.
        observe: Called with name, rows and seconds of every batch.

    Raises:
        ArtefactError: It is damaged, refers to other files, or gives malformed answers.
        SettingError: It is a fleet, but the settings choose an engine, or it does not run on a
            device.
        MissingExtraError: Its engine's package is not installed.
    """
    with unchanged(path), keeping_large_blocks():  # all replicas are of one version
        options = _options(path, settings)
        info = read_metadata(path) if path.suffix == ".onnx" else None
        engines: list[Engine] = []
        if info is None or "tasks" not in info:
            engines = [load_artefact(path, options[0])]
        fleet: FleetReplicas | None = None
        if not engines or engines[0].takes_tasks:
            engines = []
            fleet = _open_fleet(path, settings, options)
        else:
            engines += [load_artefact(path, each) for each in options[1:]]
        on_cpu = 1 if len(set(verified_batches(path))) > 1 else min(ON_CPU, settings.max_batch)
    if fleet is not None:
        preprocessing, pixels, classes = fleet.preprocessing, False, Classes(())
        runs: list[Run] = [partial(each.predict, rows=settings.max_batch) for each in fleet.fleets]
        stops: list[Any] = [None for _ in runs]
        names = [device_name(each.device or "cpu") for each in options]
        tasks = [next(iter(fleet.tasks))]
        width = len(fleet.classes(tasks[0]))
    else:
        described = ArtefactInfo(engines[0].info, str(path))
        preprocessing, classes = described.preprocessing, described.classes
        pixels = engines[0].takes_pixels
        runs = [partial(_run_merged, each, classes, settings.max_batch) for each in engines]
        stops = [getattr(each, "stop", None) for each in engines]
        names = [each.device for each in engines]
        tasks, width = [""], len(classes)
    lanes = [each.lanes for each in options]
    replicas = [Replica(*each) for each in zip(runs, lanes, stops, strict=True)]
    spec = InputSpec.of(preprocessing, pixels)
    tensor = Tensor(spec.name, "UINT8" if pixels else "FP32", spec.shape)
    for device, replica in zip(names, replicas, strict=True):
        where = f"{path} on {device}" if len(names) > 1 else str(path)
        sizes = {on_cpu} if device == "cpu" else {1, settings.max_batch}
        _warm_up(where, replica, tensor, tasks, width, sorted(sizes))
    batcher = Batcher(
        replicas,
        max_rows=settings.max_batch,
        max_wait=settings.max_wait,
        capacity=settings.queue,
        engine_seconds=settings.engine_timeout,
        observe=None if observe is None else lambda rows, seconds: observe(name, rows, seconds),
    )
    prepare = preprocessing.pixels if pixels else preprocessing
    platform, devices = next(exporters_of(path)).platform, dict(zip(names, lanes, strict=True))
    return Artefact(
        name, path, platform, tensor, prepare, devices, batcher, preprocessing, classes, fleet
    )


def _options(path: Path, settings: Settings) -> list[EngineOptions]:
    """The options of the engine on each device."""
    exporter = next(exporters_of(path), None)
    built_for_gpu = exporter is not None and exporter.usual_device(path) == "cuda"
    devices: Sequence[str | None] = settings.device or [None]
    return [
        EngineOptions(
            settings.engine,
            settings.threads,
            device,
            settings.lanes or (GPU_LANES if _is_gpu(device, built_for_gpu) else 1),
        )
        for device in devices
    ]


def _is_gpu(device: str | None, built_for_gpu: bool) -> bool:
    """Whether a device, or None for the engine's choice, is an NVIDIA GPU."""
    return built_for_gpu if device is None else device_name(device).startswith("cuda:")


def _open_fleet(path: Path, settings: Settings, options: Sequence[EngineOptions]) -> FleetReplicas:
    if settings.engine is not None:
        raise SettingError(
            f"{path} is a fleet, which runs in the engine that it was exported for: leave `engine` "
            "out."
        )
    return FleetReplicas(
        [
            Fleet(
                path,
                store=settings.store,
                budget=settings.budget,
                threads=each.threads,
                device=each.device,
                lanes=each.lanes,
            )
            for each in options
        ]
    )


def _run_merged(
    engine: Engine, classes: Classes, rows: int, images: NDArray[Any], tasks: Sequence[str]
) -> Iterator[tuple[NDArray[np.float32], Classes]]:
    """Logits and classes of each sample of a merged model, computed ``rows`` at a time."""
    for start in range(0, len(images), rows):
        for logits in engine.run(images[start : start + rows]):
            yield logits, classes


def _warm_up(
    path: str,
    replica: Replica,
    tensor: Tensor,
    tasks: list[str],
    width: int,
    sizes: Sequence[int],
) -> None:
    """Run every lane of a replica with a batch of each size."""
    for rows in sizes:
        batch = np.zeros((rows, *tensor.shape), DTYPES[tensor.datatype])
        run = partial(_check_answers, path, replica.run, batch, tasks * rows, width)
        _run_at_once(run, replica.lanes)


def _check_answers(path: str, run: Run, batch: NDArray[Any], tasks: list[str], width: int) -> None:
    try:
        logits = np.stack([logits for logits, _ in run(batch, tasks)])
    except Exception as error:  # each runtime has its own exceptions
        raise ArtefactError(f"{path} does not run ({one_line(error, 160)}).") from error
    if logits.shape != (len(batch), width) or not np.isfinite(logits).all():
        raise ArtefactError(
            f"{path} gives logits of shape {logits.shape}, or not finite ones, for {len(batch)} "
            f"samples of {width} classes: it was not written by aoft-export."
        )


def _run_at_once(function: Callable[[], None], times: int) -> None:
    """Run a function several times at once, in this thread and in daemon threads.

    Raises:
        Exception: Whatever the function raises.
    """
    start, errors = threading.Barrier(times), list[Exception]()

    def run() -> None:
        start.wait()
        try:
            function()
        except Exception as error:
            errors.append(error)

    others = [threading.Thread(target=run, daemon=True) for _ in range(times - 1)]
    for thread in others:
        thread.start()
    run()
    for thread in others:
        thread.join()
    if errors:
        raise errors[0]
