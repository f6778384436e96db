"""Run a PyTorch model, on a CPU or in several lanes of a GPU."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.gpu_recording import RECORDING
from aoft_deploy.artefacts.inputs import check_batch
from aoft_deploy.errors import ArtefactError, SettingError
from aoft_deploy.float32_products import float32_products

__all__ = ["DTYPES", "Lanes", "TorchEngine", "dtype_of", "torch_device"]

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""PyTorch's type of weights and activations for each precision."""


def dtype_of(info: ArtefactInfo) -> str:
    """PyTorch's type for an artefact's precision.

    Raises:
        ArtefactError: The precision is not known.
    """
    if info.precision not in DTYPES:
        raise ArtefactError(
            f"{info.owner} is in the precision {info.precision!r}, but must be in one of "
            f"{', '.join(DTYPES)}: upgrade aoft-deploy."
        )
    return DTYPES[info.precision]


def torch_device(options: EngineOptions) -> Any:
    """PyTorch's device of a name, after a value was placed on it.

    Args:
        options: ``device`` is PyTorch's name; None is the CPU.

    Raises:
        SettingError: The device does not exist.
    """
    import torch

    try:
        device = torch.device(options.device or "cpu")
        placed: torch.device = torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: built without CUDA
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise SettingError(
            f"PyTorch cannot use the device {options.device!r} ({reason})."
        ) from error
    return placed


class TorchEngine:
    """A PyTorch model that computes logits. Float32 products are never computed in TF32.

    Attributes:
        info: Metadata of the artefact.
        device: ``cpu``, ``cuda:0`` …
        takes_pixels: False; inputs are normalised.
        takes_tasks: False.

    Args:
        model: Computes logits from images on the device, both float; many threads may call it.
        info: Metadata of the artefact.
        options: Threads and lanes. The number of threads applies to the whole process.
        device: The model's device.
        dtype: Type of the model's input, such as ``float32``.
        size: Height and width of an image; None is any.
    """

    takes_pixels = False
    takes_tasks = False

    def __init__(
        self,
        model: Callable[[Any], Any],
        info: Mapping[str, str],
        options: EngineOptions,
        device: Any,
        dtype: str = "float32",
        size: tuple[int | None, int | None] = (None, None),
    ) -> None:
        import torch

        self.info = info
        self.device = "cpu" if device.type == "cpu" else f"{device.type}:{device.index or 0}"
        threads = options.cpu_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        self._torch, self._model = torch, model
        self._dtype, self._size = getattr(torch, dtype), size
        self._lanes = Lanes(self._logits, device, options.lanes) if device.type == "cuda" else None

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits of normalised images, float32 [batch, 3, H, W]; see ``Engine``."""
        check_batch(images, task, takes=(np.float32, (3, *self._size)), tasks=None)
        batch = self._torch.from_numpy(np.ascontiguousarray(images))
        with self._torch.inference_mode():
            if self._lanes is not None:
                return self._lanes.run(batch)
            logits: NDArray[np.float32] = self._logits(batch.to(self.device)).cpu().numpy()
        return logits

    def _logits(self, images: Any) -> Any:
        """Logits on the device in float32, of images on the device in float32."""
        with float32_products():
            return self._model(images.to(self._dtype)).float()


class Lanes:
    """Streams of a GPU. Each computes one batch at a time; further batches wait for a free one.

    Copies go through page-locked memory, so the host neither waits for them nor for the GPU before
    the whole batch is queued.

    Args:
        compute: Computes a tensor on the GPU from one on the GPU.
        device: The GPU.
        count: Number of streams.
    """

    def __init__(self, compute: Callable[[Any], Any], device: Any, count: int) -> None:
        import torch

        self._torch, self._compute, self._device = torch, compute, device
        torch.cuda.synchronize(device)  # the weights are complete before another stream reads them
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]

    def run(self, batch: Any) -> NDArray[Any]:
        """Compute a batch in the next free stream, from host memory to host memory."""
        stream = self._idle.get()
        try:
            with RECORDING.apart():
                with self._torch.cuda.stream(stream):
                    inputs = batch.pin_memory().to(self._device, non_blocking=True)
                    results = self._compute(inputs).to("cpu", non_blocking=True)  # page-locked too
                stream.synchronize()
        finally:
            self._idle.put(stream)
        answers: NDArray[Any] = results.numpy()
        return answers
