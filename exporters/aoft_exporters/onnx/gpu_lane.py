"""A lane of an ONNX file on a GPU: it computes one batch at a time, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.buckets import bucket_of
from aoft_deploy.artefacts.gpu_recording import RECORDING
from aoft_exporters.onnx.inputs import OnnxInputs
from aoft_exporters.onnx.sessions import device_index, library

__all__ = ["GpuLane", "LaneThread"]

_UNRECORDED = -1
"""ONNX Runtime's number for runs that are not recorded."""


@dataclass(frozen=True)
class _Bucket:
    """A batch size with its buffers on the device.

    Attributes:
        size: Number of rows.
        inputs: ONNX Runtime's values of this batch size, by the names of the inputs.
        logits: The value that receives the logits, float32 [batch, classes].
        binding: Binds a run to these values.
        options: Options of the run, with the number of its recording.
    """

    size: int
    inputs: Mapping[str, Any]
    logits: Any
    binding: Any
    options: Any


class GpuLane:
    """A session with buffers on the device, and a recorded run for each of some batch sizes.

    ONNX Runtime records a run as a CUDA graph and replays it in later runs. It keeps the recordings
    by thread, and records and replays with one stream: so a lane has a session of its own, and
    belongs to the thread that made it.

    Args:
        session: A session that was opened with ``recorded``.
        inputs: The file's inputs.
        device: ``cuda`` or ``cuda:1`` …; ``cpu`` computes the same without recording.

    Attributes:
        session: The session.
        inputs: The file's inputs.

    Raises:
        ArtefactError: The file takes images of any size.
    """

    def __init__(self, session: Any, inputs: OnnxInputs, device: str) -> None:
        self.session, self.inputs = session, inputs
        self._device = device.partition(":")[0], device_index(device)
        self._classes = self._measured_classes()
        self._buckets: dict[int, _Bucket] = {}

    @property
    def sizes(self) -> tuple[int, ...]:
        """The recorded batch sizes, in rising order."""
        return tuple(sorted(self._buckets))

    def record(self, size: int) -> None:
        """Allocate and record a batch size.

        Raises:
            Exception: ONNX Runtime failed, for example since the device's memory is full.
        """
        logits = self._value(np.float32, (size, self._classes))
        inputs, binding = self._bound(size)
        binding.bind_ortvalue_output("logits", logits)
        options = _run_options(size)
        self.session.run_with_iobinding(binding, options)
        self._buckets[size] = _Bucket(size, inputs, logits, binding, options)

    def run(self, feed: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Logits of a batch, float32 [batch, classes].

        Args:
            feed: The inputs by name, at most as many rows as the largest recorded size.
        """
        rows = len(next(iter(feed.values())))
        bucket = self._buckets[bucket_of(self.sizes, rows)]
        for name, values in feed.items():
            bucket.inputs[name].update_inplace(_padded(values, bucket.size))
        self.session.run_with_iobinding(bucket.binding, bucket.options)
        return np.array(bucket.logits.numpy()[:rows])  # on the CPU, numpy() is a view

    def _measured_classes(self) -> int:
        """Number of columns of the logits, which a graph does not always state."""
        _, binding = self._bound(1)
        binding.bind_output("logits", *self._device)
        self.session.run_with_iobinding(binding, _run_options(_UNRECORDED))
        return int(binding.get_outputs()[0].shape()[1])

    def _bound(self, size: int) -> tuple[dict[str, Any], Any]:
        """Zeros for the inputs of a batch size, and a binding that reads them."""
        binding, inputs = self.session.io_binding(), {}
        for name, (dtype, shape) in self.inputs.rows().items():
            inputs[name] = self._value(dtype, (size, *shape))
            inputs[name].update_inplace(np.zeros((size, *shape), dtype))
            binding.bind_ortvalue_input(name, inputs[name])
        return inputs, binding

    def _value(self, dtype: type[Any], shape: tuple[int, ...]) -> Any:
        """Memory on the device."""
        kind, index = self._device
        return library().OrtValue.ortvalue_from_shape_and_type(shape, dtype, kind, index)


def _run_options(number: int) -> Any:
    """Options of a run that is recorded, and replayed later, under a number."""
    options = library().RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options


def _padded(values: NDArray[Any], size: int) -> NDArray[Any]:
    """Rows up to a batch size; the further ones repeat the last, which changes no maximum."""
    missing = size - len(values)
    return np.concatenate([values, values[-1:].repeat(missing, axis=0)]) if missing else values


class LaneThread:
    """A thread that makes a lane and makes all its calls.

    The thread is a daemon: a GPU that hangs does not keep the process from ending.

    Args:
        make: Makes the lane.

    Raises:
        Exception: ``make`` raised it.
    """

    def __init__(self, make: Callable[[], GpuLane]) -> None:
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        made: Future[Any] = Future()
        threading.Thread(target=_work, args=(self._calls, make, made), daemon=True).start()
        made.result()

    def call(self, function: Callable[[GpuLane], Any]) -> Any:
        """Call a function in the thread, and return its result.

        Raises:
            Exception: The function raised it.
        """
        answer: Future[Any] = Future()
        self._calls.put((function, answer))
        return answer.result()

    def close(self) -> None:
        """End the thread after the calls so far, and free the lane's memory on the device."""
        self._calls.put(None)


_Call = tuple[Callable[[GpuLane], Any], Future[Any]]


def _work(calls: SimpleQueue[_Call | None], make: Callable[[], GpuLane], made: Future[Any]) -> None:
    """Make a lane, answer calls, and free the lane while no other thread records."""
    try:
        lane = make()
    except BaseException as error:
        made.set_exception(error)
        return
    made.set_result(None)
    while (call := calls.get()) is not None:
        function, answer = call
        try:
            answer.set_result(function(lane))
        except BaseException as error:
            answer.set_exception(error)
        del call, function, answer  # they may hold the caller's arrays
    with RECORDING.apart():
        del lane
