"""Run a TensorRT plan on a GPU with CUDA graphs, pinned buffers and its own streams."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.buckets import bucket_sizes
from aoft_deploy.artefacts.gpu_recording import GPU_SETUP
from aoft_deploy.artefacts.inputs import check_batch
from aoft_deploy.errors import ArtefactError, SettingError
from aoft_deploy.texts import one_line
from aoft_exporters.tensorrt.lane import Lane, context_maker
from aoft_exporters.tensorrt.library import Library
from aoft_exporters.tensorrt.metadata import Metadata

__all__ = ["TensorrtEngine"]


class TensorrtEngine:
    """A plan on this machine's GPU.

    Many threads may call ``run`` at once; each lane computes one batch at a time. A batch is padded
    to the next bucket: a power of two times the smallest batch, the usual or the largest one. All
    buckets are recorded while the engine is loaded.

    Attributes:
        info: Metadata stored beside the plan.
        batches: Smallest, usual and largest batch.
        device: ``cuda:0`` …

    Args:
        plan: The serialised engine; it is native code and must come from a trusted source.
        metadata: Metadata of the plan.
        library: The TensorRT that built it.
        index: Index of the GPU.
        lanes: Number of batches computed in parallel.

    Raises:
        ArtefactError: TensorRT cannot load or run the plan.
        SettingError: The GPU has too little memory for the lanes.
    """

    def __init__(
        self, plan: bytes, metadata: Metadata, library: Library, *, index: int = 0, lanes: int = 1
    ) -> None:
        import torch

        library.log.errors.clear()
        self.info: Mapping[str, str] = metadata.info
        self.batches, self.device = metadata.batches, f"cuda:{index}"
        self._metadata = metadata
        self._idle: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        smallest, usual, largest = metadata.batches
        buckets = sorted({*bucket_sizes(smallest, largest), usual})
        with GPU_SETUP, torch.cuda.device(index):
            self._runtime = library.module.Runtime(library.log)
            engine = self._runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise ArtefactError(f"TensorRT cannot load the engine ({library.log.reason()}).")
            new_context = context_maker(library, engine)
            try:
                for _ in range(lanes):
                    self._idle.put(Lane(library, engine, new_context, metadata, buckets))
            except torch.OutOfMemoryError as error:
                raise SettingError(
                    f"{self.device} has too little free memory for {lanes} times a batch of "
                    f"{largest}: choose fewer `lanes`, or export with smaller `batches`."
                ) from error
            except RuntimeError as error:
                raise ArtefactError(one_line(error)) from error

    @property
    def takes_pixels(self) -> bool:
        """Whether the input is uint8 [batch, H, W, 3]."""
        return "image" in self._metadata.inputs

    @property
    def takes_tasks(self) -> bool:
        """Whether the engine is a fleet's, which needs a task for each image."""
        return "task" in self._metadata.inputs

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits of a batch, float32 [batch, classes].

        Args:
            images: The batch in the engine's input form.
            task: A fleet's task for each image, int64 [batch].

        Raises:
            SettingError: The type, shape or batch size does not fit the engine, a fleet is run
                without tasks, a single model with them, or a task is outside the fleet.
        """
        feed = checked(self._metadata, images, task)
        with self._lane() as lane:
            return lane.run(feed)

    def device_seconds(self, images: NDArray[Any], task: NDArray[np.int64] | None = None) -> float:
        """Seconds that the GPU takes for a batch's copies and kernels; see ``run``."""
        feed = checked(self._metadata, images, task)
        with self._lane() as lane:
            return lane.device_seconds(feed)

    @contextlib.contextmanager
    def _lane(self) -> Iterator[Lane]:
        """Context manager: an idle lane, on the engine's GPU."""
        import torch

        lane = self._idle.get()
        try:
            with torch.cuda.device(self.device):
                yield lane
        finally:
            self._idle.put(lane)


def checked(
    metadata: Metadata, images: NDArray[Any], task: NDArray[np.int64] | None
) -> dict[str, NDArray[Any]]:
    """Check a batch and return the inputs by name.

    Raises:
        SettingError: The engine does not accept the batch.
    """
    name, expected = next(iter(metadata.inputs.items()))
    tasks = metadata.sample.tasks if "task" in metadata.inputs else None
    check_batch(images, task, takes=expected, tasks=tasks)
    largest = metadata.batches[2]
    if len(images) > largest:
        raise SettingError(
            f"This engine was built for batches of up to {largest} images, but got {len(images)}: "
            "split the batch, or export with other `batches`."
        )
    feed = {name: np.ascontiguousarray(images)}
    if task is not None:
        feed["task"] = np.ascontiguousarray(task, np.int64)
    return feed
