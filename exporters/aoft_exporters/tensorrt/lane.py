"""A lane of a TensorRT engine: it computes one batch at a time on a CUDA stream of its own.

CUDA is used through torch, so the process has one CUDA context and one allocator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.buckets import bucket_of
from aoft_exporters.tensorrt.library import Library
from aoft_exporters.tensorrt.metadata import Metadata

__all__ = ["Lane", "context_maker"]


class Lane:
    """A stream, buffers for the largest batch, and a recorded computation for each bucket.

    Everything is allocated and recorded here, so ``run`` allocates nothing on the GPU. The caller
    holds ``GPU_SETUP`` and has made the GPU current.

    Args:
        library: The TensorRT that built the engine.
        engine: TensorRT's engine.
        new_context: Result of ``context_maker`` for the engine.
        metadata: Metadata of the plan.
        buckets: Batch sizes to record, in rising order.

    Raises:
        RuntimeError: TensorRT or CUDA reported an error.
    """

    def __init__(
        self,
        library: Library,
        engine: Any,
        new_context: Callable[[], Any],
        metadata: Metadata,
        buckets: Sequence[int],
    ) -> None:
        import torch

        self._log, self._rtx = library.log, library.name == "tensorrt-rtx"
        self._new_context, self._buckets = new_context, buckets
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._device, self._host = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        buffers = {**metadata.inputs, "logits": ("float32", (metadata.classes,))}
        with torch.cuda.stream(self._stream):  # the buffers' zeros are written in this stream
            for name, (kind, shape) in buffers.items():
                size, dtype = (buckets[-1], *shape), getattr(torch, kind)
                self._device[name] = torch.zeros(size, dtype=dtype, device="cuda")
                self._host[name] = torch.zeros(size, dtype=dtype, pin_memory=True)
            scratch = max(1, engine.device_memory_size_v2)
            self._scratch = torch.empty(scratch, dtype=torch.uint8, device="cuda")
            self._contexts = {size: self._context(size) for size in buckets}
            self._compute = {size: self._recorded(size) for size in buckets}
        self._stream.synchronize()

    def run(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Logits of a batch, float32 [batch, classes].

        Args:
            feed: The inputs by name, at most as many rows as the last bucket.
        """
        import torch

        rows = self._fill(feed)
        with torch.cuda.stream(self._stream):
            self._submit(feed, rows)
        self._stream.synchronize()
        logits: NDArray[np.float32] = self._host["logits"][:rows].numpy().copy()
        return logits

    def device_seconds(self, feed: Mapping[str, NDArray[Any]]) -> float:
        """Seconds between two events on the stream, around the copies and kernels of a batch."""
        import torch

        rows = self._fill(feed)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            start.record()
            self._submit(feed, rows)
            end.record()
        self._stream.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def _fill(self, feed: Mapping[str, NDArray[Any]]) -> int:
        """Copy the inputs into the pinned buffers, and return the number of rows."""
        import torch

        rows = len(next(iter(feed.values())))
        for name, values in feed.items():
            self._host[name][:rows].copy_(torch.from_numpy(values))
        return rows

    def _submit(self, feed: Mapping[str, NDArray[Any]], rows: int) -> None:
        """Queue the copies and the computation of the batch's bucket on the stream.

        The bucket's further rows keep what earlier batches left there. Rows do not depend on each
        other, and only the batch's own logits are copied back.
        """
        for name in feed:
            self._device[name][:rows].copy_(self._host[name][:rows], non_blocking=True)
        self._compute[bucket_of(self._buckets, rows)]()
        self._host["logits"][:rows].copy_(self._device["logits"][:rows], non_blocking=True)

    def _recorded(self, size: int) -> Callable[[], None]:
        """Function that queues the computation of a bucket, after a first run of it.

        ``torch.cuda.graph`` is not used: it synchronises the device and frees cached memory, which
        waits for the other lanes.
        """
        import torch

        enqueue = partial(self._enqueue, self._contexts[size])
        enqueue()
        if self._rtx:  # it compiles in the first run, and records by itself
            enqueue()
            return enqueue
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            enqueue()
        finally:
            graph.capture_end()
        return graph.replay

    def _enqueue(self, context: Any) -> None:
        self._check(context.execute_async_v3(self._stream.cuda_stream), "run the engine")

    def _context(self, size: int) -> Any:
        """The execution context of a bucket. All contexts share the scratch memory."""
        context = self._new_context()
        self._check(context is not None, "create an execution context")
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        for name, buffer in self._device.items():
            found = context.set_tensor_address(name, buffer.data_ptr())
            self._check(found, f"set the address of {name}")
            if name != "logits":
                fits = context.set_input_shape(name, (size, *buffer.shape[1:]))
                self._check(fits, f"set the shape of {name} for a batch of {size}")
        return context

    def _check(self, done: bool, step: str) -> None:
        if not done:
            raise RuntimeError(f"TensorRT cannot {step} ({self._log.reason()}).")


def context_maker(library: Library, engine: Any) -> Callable[[], Any]:
    """Function that creates an execution context whose scratch memory the caller provides.

    TensorRT-RTX compiles kernels for a context's shapes and records CUDA graphs by itself. It
    compiles eagerly, so that the kernels whose logits are checked when an engine is loaded are
    those that answer requests, and shares what it compiled among the contexts.
    """
    trt, caches = library.module, list[Any]()
    user_managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if library.name != "tensorrt-rtx":
        return partial(engine.create_execution_context, user_managed)

    def new_context() -> Any:
        options = engine.create_runtime_config()
        options.set_execution_context_allocation_strategy(user_managed)
        options.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        options.dynamic_shapes_kernel_specialization_strategy = eager
        if not caches:
            caches.append(options.create_runtime_cache())
        options.set_runtime_cache(caches[0])
        return engine.create_execution_context(options)

    return new_context
