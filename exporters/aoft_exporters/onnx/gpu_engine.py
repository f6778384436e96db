"""Run ONNX files with ONNX Runtime on a GPU, in recorded batch sizes."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.buckets import bucket_sizes
from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.gpu_recording import GPU_SETUP, RECORDING
from aoft_deploy.artefacts.onnx_metadata import checked_metadata
from aoft_deploy.errors import AoftError
from aoft_exporters.onnx.gpu_lane import GpuLane, LaneThread
from aoft_exporters.onnx.inputs import OnnxFile, OnnxInputs
from aoft_exporters.onnx.placement import placement_texts
from aoft_exporters.onnx.sessions import device_index, reason, refusal, session

__all__ = ["LARGEST_BUCKET", "OnnxGpuEngine"]

LARGEST_BUCKET = 64
"""Largest batch that is computed at once; larger ones are computed in parts."""

_MEMORY_IS_FULL = re.compile("Failed to allocate memory|out of memory", re.IGNORECASE)


class OnnxGpuEngine(OnnxFile):
    """An ONNX file on a GPU: buffers on the device, and a recorded run for each bucket.

    When it is loaded, each lane records batches of 1, 2, 4 … up to ``LARGEST_BUCKET`` images, or
    as many as the device's memory holds. A batch is padded to the next of these, and a larger one
    is computed in parts. So no request waits for a first run of its size, and memory does not grow.

    Attributes:
        info: Metadata of the file, and where its nodes are computed; see ``placement_texts``.
        device: ``cuda:0`` …

    Args:
        path: The file.
        options: Device, lanes, and CPU threads of the few operators that compute shapes. Each lane
            holds the weights.

    Raises:
        ArtefactError: The file is missing, refers to other files, or cannot be read.
        SettingError: The device does not exist or does not start, or the CPU would compute some of
            the file's layers.
        MissingExtraError: ONNX Runtime for GPUs is not installed.
    """

    def __init__(self, path: Path, options: EngineOptions) -> None:
        info = checked_metadata(path)
        device = options.device or "cuda"
        make = partial(_lane, path, info, device, options.threads)
        lanes = list[LaneThread]()
        weakref.finalize(self, _close, lanes).atexit = False
        self._free: SimpleQueue[LaneThread] = SimpleQueue()
        for _ in range(options.lanes):
            lanes.append(LaneThread(make))
            self._free.put(lanes[-1])
        self._largest = min(lane.call(lambda lane: lane.sizes[-1]) for lane in lanes)
        opened = lanes[0].call(lambda lane: (lane.inputs, placement_texts(lane.session)))
        self._inputs, placement = opened
        self.info: Mapping[str, str] = {**info, **placement}
        self._path, self.device = path, f"cuda:{device_index(device)}"

    def _run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        feed = self._inputs.feed(images, task)
        parts = [
            self._part({name: rows[start : start + self._largest] for name, rows in feed.items()})
            for start in range(0, len(images), self._largest)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _part(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Logits of at most as many rows as the largest bucket, from the next free lane."""
        lane = self._free.get()
        try:
            logits: NDArray[np.float32] = lane.call(partial(_computed, feed))
        except Exception as error:  # ONNX Runtime raises its own classes, all Exception
            raise AoftError(
                f"{self._path} could not be computed on {self.device} ({reason(error)})."
            ) from error
        finally:
            self._free.put(lane)
        return logits


def _lane(path: Path, info: Mapping[str, str], device: str, threads: int | None) -> GpuLane:
    """Open the file in the calling thread and record all batch sizes that fit into memory.

    Raises:
        AoftError: As for ``session``, or a recording failed.
    """
    tf32 = info.get("precision") == "tf32"
    with GPU_SETUP:
        opened = session(path, threads, device, path, tf32=tf32, recorded=True)
        inputs = OnnxInputs.of(opened, info, path)
        try:
            with RECORDING.apart():
                lane = GpuLane(opened, inputs, device)
            for size in reversed(bucket_sizes(1, LARGEST_BUCKET)):  # they share the memory
                _record(lane, size)
        except AoftError:
            raise
        except Exception as error:  # ONNX Runtime raises its own classes, all Exception
            raise refusal(error, device, path) from error
    return lane


def _record(lane: GpuLane, size: int) -> None:
    """Record a batch size, or leave it out if the device's memory is full."""
    try:
        with RECORDING.alone():
            lane.record(size)
    except Exception as error:  # ONNX Runtime raises its own classes, all Exception
        if size == 1 or not _MEMORY_IS_FULL.search(str(error)):
            raise


def _computed(feed: Mapping[str, NDArray[Any]], lane: GpuLane) -> NDArray[np.float32]:
    with RECORDING.apart():
        return lane.run(feed)


def _close(lanes: list[LaneThread]) -> None:
    for lane in lanes:
        lane.close()
