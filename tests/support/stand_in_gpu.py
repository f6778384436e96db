"""A stand-in for GPUs: ONNX artefacts with the suffix ``.standin`` run on any device's name.

The answers are ONNX Runtime's on the CPU. The exporter is found by its entry point, as any other.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.serving.settings import device_name
from aoft_exporters.onnx.exporter import EXPORTER as ONNX

__all__ = ["EXPORTER", "MEET", "install"]

MEET = 77.0
"""First value of images whose batches wait until ``STAND_IN_BATCHES`` of them are running."""

_meeting = threading.Barrier(int(os.environ.get("STAND_IN_BATCHES", "1")))


def install(folder: Path) -> Path:
    """Make a folder that declares the exporter; it must be on the path of Python's modules."""
    about = folder / "stand_in_gpu-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: stand-in-gpu\nVersion: 1\n")
    entry = "standin = stand_in_gpu:EXPORTER\n"
    (about / "entry_points.txt").write_text(f"[aoft_deploy.exporters]\n{entry}")
    return folder


def note(*words: object) -> None:
    """Append a line to the file that ``STAND_IN_LOG`` names."""
    with open(os.environ["STAND_IN_LOG"], "a") as file:
        file.write(" ".join(map(str, words)) + "\n")


class OnDevice:
    """An engine that claims to run on a device, and refuses more batches at once than lanes.

    Its first batches, one for each lane, must run at once: the server warms up all lanes.
    """

    def __init__(self, kind: str, load: Callable[[Path, EngineOptions], Any], *given: Any) -> None:
        path, options = given
        self.device = device_name(options.device or "cuda")
        self._kind, self._engine = kind, load(path, EngineOptions(threads=options.threads))
        self._lanes = threading.Semaphore(options.lanes)
        self._first, self._runs = threading.Barrier(options.lanes), count()
        self._cold = options.lanes
        note("load", kind, path.name, self.device, f"lanes={options.lanes}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, images: Any, *rest: Any) -> Any:
        """Logits, after waiting for other batches where the images ask for it."""
        if not self._lanes.acquire(blocking=False):
            raise RuntimeError("more batches at once than lanes")
        try:
            if next(self._runs) < self._cold:
                self._first.wait(60)
            if images[0].flat[0] == MEET:
                _meeting.wait(60)
            note("run", self._kind, self.device, len(images))
            return self._engine.run(images, *rest)
        finally:
            self._lanes.release()


def _load(path: Path, options: EngineOptions) -> Any:
    return OnDevice("merged", ONNX.load, path, options)


def _load_fleet(path: Path, options: EngineOptions) -> Any:
    assert ONNX.fleet is not None and ONNX.fleet.load is not None
    return OnDevice("fleet", ONNX.fleet.load, path, options)


assert ONNX.fleet is not None
EXPORTER = replace(
    ONNX,
    name="standin",
    suffix=".standin",
    load=_load,
    fleet=replace(ONNX.fleet, load=_load_fleet),
)
