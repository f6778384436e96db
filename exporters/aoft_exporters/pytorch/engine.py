"""Run a plain timm model in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.inputs import check_batch
from aoft_deploy.errors import SettingError
from aoft_deploy.processors import limited

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TorchEngine"]


class TorchEngine:
    """A PyTorch model in evaluation mode.

    Attributes:
        info: Metadata of the artefact.
        device: ``cpu``, ``cuda:0`` …
        takes_pixels: False; inputs are normalised.
        takes_tasks: False.

    Args:
        model: The model; it is moved to the device.
        info: Metadata of the artefact.
        options: ``threads`` applies to the whole process; None keeps the current number. ``device``
            is PyTorch's name; None is the CPU.

    Raises:
        SettingError: The device does not exist.
    """

    takes_pixels = False
    takes_tasks = False

    def __init__(self, model: nn.Module, info: Mapping[str, str], options: EngineOptions) -> None:
        import torch

        self.info = info
        try:
            torch_device = torch.device(options.device or "cpu")
            self._model = model.to(torch_device).eval()
        except (RuntimeError, AssertionError) as error:  # AssertionError: built without CUDA
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise SettingError(
                f"PyTorch cannot use the device {options.device!r} ({reason})."
            ) from error
        index = f":{torch_device.index or 0}" if torch_device.type != "cpu" else ""
        self.device = f"{torch_device.type}{index}"
        threads = options.threads or limited()
        if threads is not None:
            torch.set_num_threads(threads)
        self._torch = torch

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits of normalised images, float32 [batch, 3, H, W]; see ``Engine``."""
        check_batch(images, task, takes=(np.float32, (3, None, None)), tasks=None)
        with self._torch.inference_mode():
            inputs = self._torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
            logits: NDArray[np.float32] = self._model(inputs).float().cpu().numpy()
        return logits
