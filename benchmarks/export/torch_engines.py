"""PyTorch engines for ``engines``: functions that a subprocess can import by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import nn

from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.identity import identify
from aoft_deploy.tuning.merging import merge

CLASSES = 100


class TorchModule:
    """A PyTorch module as an engine."""

    device, takes_pixels, takes_tasks = "cpu", False, False
    info: Mapping[str, str] = {}

    def __init__(self, model: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.model = model

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits of a batch."""
        with torch.inference_mode():
            logits: NDArray[np.float32] = self.model(torch.from_numpy(images)).numpy()
        return logits


def models(name: str, method: str) -> tuple[nn.Module, nn.Module]:
    """A plain backbone with random weights and a merged model on it, from a fixed seed."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=CLASSES).eval()
    backbone = copy.deepcopy(plain)
    return plain, merge(attach(backbone, method, backbone=identify(backbone)).eval())


def pytorch(name: str, method: str, threads: int) -> TorchModule:
    """The merged model in eager mode."""
    torch.set_num_threads(threads)
    return TorchModule(models(name, method)[1])


def compiled(name: str, method: str, threads: int) -> TorchModule:
    """The merged model with ``torch.compile``."""
    torch.set_num_threads(threads)
    return TorchModule(torch.compile(models(name, method)[1], dynamic=False))


def peft(name: str, method: str, threads: int) -> TorchModule:
    """PEFT's unmerged LoRA of rank 8; ``method`` is not used."""
    import peft as library

    torch.set_num_threads(threads)
    config = library.LoraConfig(r=8, target_modules=["qkv"], modules_to_save=["head"])
    return TorchModule(library.get_peft_model(models(name, method)[0], config).eval())
