"""A TensorRT engine on the GPU: recorded CUDA graphs, pinned buffers, streams of its own.

CUDA comes through torch, which is a requirement of this project anyway and brings its libraries:
one context and one allocator in the process, whatever else runs there.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.inputs import check_batch
from aoft_deploy.errors import ArtefactError, SettingError
from aoft_exporters.tensorrt.library import Library
from aoft_exporters.tensorrt.metadata import Metadata

__all__ = ["TensorrtEngine"]


class TensorrtEngine:
    """A plan on this machine's GPU.

    Many threads may call ``run`` at once; as many batches as there are lanes are computed at once.

    Attributes:
        info: Metadata stored beside the plan.
        batches: Smallest, usual and largest batch.
        device: ``cuda:0`` …

    Args:
        plan: The serialised engine, of a source that is trusted.
        metadata: What it takes.
        library: The TensorRT that built it.
        index: Number of the GPU.
        lanes: Batches that are computed at once.
        cuda_graphs: Whether each size of batch is recorded once and replayed.

    Raises:
        ArtefactError: TensorRT does not take the plan, with its reason.
    """

    def __init__(
        self,
        plan: bytes,
        metadata: Metadata,
        library: Library,
        *,
        index: int = 0,
        lanes: int = 1,
        cuda_graphs: bool = True,
    ) -> None:
        import torch

        library.log.errors.clear()
        self.info: Mapping[str, str] = metadata.info
        self.batches, self.device = metadata.batches, f"cuda:{index}"
        self._metadata = metadata
        self._idle: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        with torch.cuda.device(index):
            self._runtime = library.module.Runtime(library.log)
            engine = self._runtime.deserialize_cuda_engine(plan)
            if engine is None:
                reason = " ".join(library.log.errors)[:200]
                raise ArtefactError(f"TensorRT does not take the engine ({reason}).")
            for _ in range(lanes):
                self._idle.put(_Lane(library, engine, metadata, cuda_graphs))

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
            images: The batch, in the engine's own input form.
            task: A fleet's task for each image, int64 [batch].

        Raises:
            SettingError: Another type, shape or size of batch than the engine was built for, a
                fleet without tasks, a single model with them, or a task outside the fleet.
        """
        import torch

        feed = checked(self._metadata, images, task)
        lane = self._idle.get()
        try:
            with torch.cuda.device(self.device):
                return lane.run(feed)
        finally:
            self._idle.put(lane)


def checked(
    metadata: Metadata, images: NDArray[Any], task: NDArray[np.int64] | None
) -> dict[str, NDArray[Any]]:
    """The inputs by name, if an engine takes them.

    Raises:
        SettingError: It does not, with what it takes.
    """
    name, takes = next(iter(metadata.inputs.items()))
    tasks = metadata.sample.tasks if "task" in metadata.inputs else None
    check_batch(images, task, takes=takes, tasks=tasks)
    least, _, most = metadata.batches
    if not least <= len(images) <= most:
        raise SettingError(
            f"This engine was built for batches of {least} to {most} images, but got "
            f"{len(images)}: split the batch, or export with other `batches`."
        )
    feed = {name: np.ascontiguousarray(images)}
    if task is not None:
        feed["task"] = np.ascontiguousarray(task, np.int64)
    return feed


class _Lane:
    """Buffers for the largest batch in host and device memory, a stream, and what was recorded."""

    def __init__(
        self, library: Library, engine: Any, metadata: Metadata, cuda_graphs: bool
    ) -> None:
        import torch

        self._trt, self._engine, self._record = library.module, engine, cuda_graphs
        self._rtx = library.name == "tensorrt-rtx"
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        most = metadata.batches[2]
        self._device, self._host = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        buffers = {**metadata.inputs, "logits": ("float32", (metadata.classes,))}
        for name, (kind, shape) in buffers.items():
            dtype = getattr(torch, kind)
            self._device[name] = torch.zeros(most, *shape, dtype=dtype, device="cuda")
            self._host[name] = torch.zeros(most, *shape, dtype=dtype, pin_memory=True)
        size = max(1, engine.device_memory_size_v2)
        self._scratch = torch.empty(size, dtype=torch.uint8, device="cuda")
        self._contexts = dict[int, Any]()
        self._graphs = dict[int, torch.cuda.CUDAGraph]()
        torch.cuda.synchronize()

    def run(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Copy in, compute, copy out, in this lane's stream alone."""
        import torch

        size = len(next(iter(feed.values())))
        for name, values in feed.items():
            self._host[name][:size].copy_(torch.from_numpy(values))
        with torch.cuda.stream(self._stream):
            for name in feed:
                self._device[name][:size].copy_(self._host[name][:size], non_blocking=True)
            self._compute(size)
            logits = self._host["logits"][:size]
            logits.copy_(self._device["logits"][:size], non_blocking=True)
        self._stream.synchronize()
        return logits.numpy().copy()

    def _compute(self, size: int) -> None:
        """Replay the batch's graph; the first time, compute it and record."""
        import torch

        graph = self._graphs.get(size)
        if graph is not None:
            graph.replay()
            return
        context = self._context(size)
        self._enqueue(context)
        if self._record and not self._rtx:  # RTX records by itself, around what it still compiles
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._enqueue(context)
            self._graphs[size] = graph

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError("TensorRT could not run the engine.")

    def _context(self, size: int) -> Any:
        """One for each size of batch, as recording asks for; they share the scratch memory."""
        if size not in self._contexts:
            context = self._engine.create_execution_context(self._strategy())
            context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
            for name, buffer in self._device.items():
                context.set_tensor_address(name, buffer.data_ptr())
                if name != "logits":
                    context.set_input_shape(name, (size, *buffer.shape[1:]))
            self._contexts[size] = context
        return self._contexts[size]

    def _strategy(self) -> Any:
        """That memory is ours; of RTX also that it records CUDA graphs."""
        ours = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._rtx:
            return ours
        options = self._engine.create_runtime_config()
        options.set_execution_context_allocation_strategy(ours)
        if self._record:
            options.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return options
