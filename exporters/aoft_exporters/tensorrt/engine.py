"""Run a TensorRT plan on a GPU with CUDA graphs, pinned buffers and its own streams.

CUDA is used through torch, so the process has one CUDA context and one allocator.
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

    Many threads may call ``run`` at once; each lane computes one batch at a time.

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
        cuda_graphs: Whether a CUDA graph is recorded for each batch size and replayed.

    Raises:
        ArtefactError: TensorRT cannot load the plan.
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
                raise ArtefactError(f"TensorRT cannot load the engine ({reason}).")
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
            images: The batch in the engine's input form.
            task: A fleet's task for each image, int64 [batch].

        Raises:
            SettingError: The type, shape or batch size does not fit the engine, a fleet is run
                without tasks, a single model with them, or a task is outside the fleet.
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
    """Check a batch and return the inputs by name.

    Raises:
        SettingError: The engine does not accept the batch.
    """
    name, expected = next(iter(metadata.inputs.items()))
    tasks = metadata.sample.tasks if "task" in metadata.inputs else None
    check_batch(images, task, takes=expected, tasks=tasks)
    smallest, _, largest = metadata.batches
    if not smallest <= len(images) <= largest:
        raise SettingError(
            f"This engine was built for batches of {smallest} to {largest} images, but got "
            f"{len(images)}: split the batch, or export with other `batches`."
        )
    feed = {name: np.ascontiguousarray(images)}
    if task is not None:
        feed["task"] = np.ascontiguousarray(task, np.int64)
    return feed


class _Lane:
    """A stream with buffers for the largest batch, execution contexts and CUDA graphs."""

    def __init__(
        self, library: Library, engine: Any, metadata: Metadata, cuda_graphs: bool
    ) -> None:
        import torch

        self._trt, self._engine, self._record = library.module, engine, cuda_graphs
        self._rtx = library.name == "tensorrt-rtx"
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        largest = metadata.batches[2]
        self._device, self._host = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        buffers = {**metadata.inputs, "logits": ("float32", (metadata.classes,))}
        for name, (kind, shape) in buffers.items():
            dtype = getattr(torch, kind)
            self._device[name] = torch.zeros(largest, *shape, dtype=dtype, device="cuda")
            self._host[name] = torch.zeros(largest, *shape, dtype=dtype, pin_memory=True)
        size = max(1, engine.device_memory_size_v2)
        self._scratch = torch.empty(size, dtype=torch.uint8, device="cuda")
        self._contexts = dict[int, Any]()
        self._graphs = dict[int, torch.cuda.CUDAGraph]()
        torch.cuda.synchronize()

    def run(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Copy the inputs, compute and copy the logits back, on this lane's stream."""
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
        """Replay the CUDA graph of a batch size; the first time, compute and record it."""
        import torch

        graph = self._graphs.get(size)
        if graph is not None:
            graph.replay()
            return
        context = self._context(size)
        self._enqueue(context)
        if self._record and not self._rtx:  # TensorRT-RTX records by itself
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._enqueue(context)
            self._graphs[size] = graph

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError("TensorRT could not run the engine.")

    def _context(self, size: int) -> Any:
        """The execution context of a batch size. All contexts share the scratch memory."""
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
        """Options of a context: user-managed memory, and CUDA graphs in TensorRT-RTX."""
        user_managed = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self._rtx:
            return user_managed
        options = self._engine.create_runtime_config()
        options.set_execution_context_allocation_strategy(user_managed)
        if self._record:
            options.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return options
