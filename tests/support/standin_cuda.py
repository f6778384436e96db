"""Stand-ins for torch's CUDA and for TensorRT on a machine without a GPU.

Device memory is host memory. Streams queue work and do it when they are synchronised, so a missing
synchronisation shows in the answers. What CUDA forbids while a graph is recorded raises here.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

Work = Callable[[], object]
COPY, KERNEL = 1, 10
"""Milliseconds of a copy and of a kernel on the clock of events."""


class Cuda:
    """The stand-in for torch's CUDA.

    Attributes:
        calls: Names of the calls that may not run beside a recording, in order.
        recorded: Called while a stream is recorded.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls = list[str]()
        self.recorded: Work = lambda: None
        self.now = 0.0
        self.memory = dict[int, torch.Tensor]()
        self.streams = dict[int, Stream]()
        self.recording: Stream | None = None
        self._handles = itertools.count(1)
        self._local = threading.local()
        self._default = Stream(self)
        self._copy = torch.Tensor.copy_
        for name in ("zeros", "empty"):
            patch.setattr(torch, name, self._allocating(getattr(torch, name)))
        cuda = self

        def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
            if non_blocking:
                cuda.current.queue(lambda: cuda._copy(target, source), COPY)
                return target
            return cuda._copy(target, source)

        patch.setattr(torch.Tensor, "copy_", copy)
        patch.setattr(torch.cuda, "Stream", lambda: Stream(self))
        patch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))
        patch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        patch.setattr(torch.cuda, "graph", self._graph)
        patch.setattr(torch.cuda, "stream", self._in_stream)
        patch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
        patch.setattr(torch.cuda, "synchronize", self.synchronize)

    @property
    def current(self) -> Stream:
        """The thread's current stream."""
        stream: Stream = getattr(self._local, "stream", None) or self._default
        return stream

    def add(self, stream: Stream) -> int:
        """Register a stream and return its handle."""
        handle = next(self._handles)
        self.streams[handle] = stream
        return handle

    def alone(self, call: str) -> None:
        """Raise if a stream is recorded: the call may not run beside it."""
        self.calls.append(call)
        if self.recording is not None:
            raise RuntimeError(f"{call} while a CUDA graph is recorded")

    def synchronize(self) -> None:
        """Wait for the device."""
        self.alone("synchronize")
        for stream in list(self.streams.values()):
            stream.synchronize()

    def _allocating(self, make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*size: Any, device: Any = None, pin_memory: bool = False, **kind: Any) -> Any:
            if device is None and not pin_memory:
                return make(*size, **kind)
            self.alone("allocate")
            tensor = make(*size, **kind)
            self.memory[tensor.data_ptr()] = tensor
            return tensor

        return allocate

    @contextlib.contextmanager
    def _in_stream(self, stream: Stream) -> Iterator[None]:
        before = getattr(self._local, "stream", None)
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before

    @contextlib.contextmanager
    def _graph(self, graph: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        """As ``torch.cuda.graph``: it synchronises the device and frees cached memory first."""
        self.synchronize()
        self.alone("free")
        with self._in_stream(stream):
            graph.capture_begin(capture_error_mode=capture_error_mode)
            try:
                yield
            finally:
                graph.capture_end()


class Stream:
    """A stream: work is done when it is synchronised."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.cuda_stream = cuda.add(self)
        self.graph: Graph | None = None
        self.work = list[tuple[Work, float]]()

    def queue(self, work: Work, milliseconds: float) -> None:
        """Add work; while the stream is recorded, to the graph."""
        (self.work if self.graph is None else self.graph.work).append((work, milliseconds))

    def synchronize(self) -> None:
        """Do the queued work."""
        if self.graph is not None:
            raise RuntimeError("a stream is synchronised while it is recorded")
        work, self.work = self.work, []
        for step, milliseconds in work:
            step()
            self.cuda.now += milliseconds


class Graph:
    """A CUDA graph."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.work = list[tuple[Work, float]]()

    def capture_begin(self, capture_error_mode: str = "global") -> None:
        """Record the current stream."""
        stream = self.cuda.current
        if stream.work:
            raise RuntimeError("the stream still has work to do")
        self.cuda.alone("record")
        self.cuda.recording, stream.graph = stream, self

    def capture_end(self) -> None:
        """End the recording."""
        self.cuda.recorded()
        self.cuda.recording = self.cuda.current.graph = None

    def replay(self) -> None:
        """Queue the recorded work."""
        for step, milliseconds in self.work:
            self.cuda.current.queue(step, milliseconds)


class Event:
    """A CUDA event."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.at: float | None = None
        self._stream: Stream | None = None

    def record(self) -> None:
        """Take the time when the current stream comes to this point."""

        def take() -> None:
            self.at = self.cuda.now

        self._stream = self.cuda.current
        self._stream.queue(take, 0)

    def synchronize(self) -> None:
        """Wait until the stream has come to the event."""
        assert self._stream is not None
        self._stream.synchronize()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds until another event."""
        assert self.at is not None and end.at is not None
        return end.at - self.at


class Context:
    """An execution context of TensorRT; a method named in ``failing`` reports a failure."""

    def __init__(self, engine: Engine, records: bool) -> None:
        self._engine, self._records = engine, records
        self._address = dict[str, int]()
        self._rows, self._ran = 0, 0

    def set_device_memory(self, memory: int, size: int) -> None:
        """Set the scratch memory."""
        assert self._engine._cuda.memory[memory].numel() == size >= 256

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Set the address of an input or output."""
        self._address[name] = memory
        return "set_tensor_address" not in self._engine._failing

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Set the shape of an input."""
        self._rows = shape[0]
        return "set_input_shape" not in self._engine._failing

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Queue the computation; the first run comes before a recording."""
        cuda = self._engine._cuda
        stream = cuda.streams[stream_handle]
        if "execute_async_v3" in self._engine._failing or (stream.graph and not self._ran):
            return False
        self._ran += 1
        if self._records and self._ran < 3:
            cuda.alone("record")
        rows = {name: cuda.memory[at][: self._rows] for name, at in self._address.items()}
        logits = rows.pop("logits")

        def kernel() -> None:
            cuda._copy(logits, self._engine._compute(**rows))

        stream.queue(kernel, KERNEL)
        return True


class Engine:
    """An engine of TensorRT that computes a function of its inputs' rows."""

    device_memory_size_v2 = 1024

    def __init__(self, cuda: Cuda, compute: Callable[..., torch.Tensor], failing: str) -> None:
        self._cuda, self._compute, self._failing = cuda, compute, failing
        self._contexts = 0

    def create_execution_context(self, strategy: Any) -> Context | None:
        """A context; TensorRT-RTX's takes the options of ``create_runtime_config``."""
        self._contexts += 1
        if "create_execution_context" in self._failing:
            return None
        return Context(self, records=hasattr(strategy, "cuda_graph_strategy"))

    def create_runtime_config(self) -> Any:
        """Options of TensorRT-RTX."""
        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            create_runtime_cache=object,
            set_runtime_cache=lambda cache: True,
        )


class TensorRT:
    """The module: a runtime for one engine; all other names are those of the real module."""

    def __init__(self, engine: Engine | None) -> None:
        self._engine = engine

    def Runtime(self, log: Any) -> Any:
        """The runtime."""
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: self._engine)

    def __getattr__(self, name: str) -> Any:
        import tensorrt_rtx

        return getattr(tensorrt_rtx, name)
