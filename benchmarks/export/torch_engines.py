"""PyTorch engines for ``engines``: functions that a subprocess can import by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import nn

from aoft_deploy.artefacts.engine import FleetTables
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.identity import identify
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.task_layout import Layout, classifier_rows
from aoft_deploy.tuning.tuned_model import TunedModel

CLASSES, TASKS = 100, 16


class TorchModule:
    """A PyTorch module as an engine."""

    device, takes_pixels = "cpu", False

    def __init__(self, model: Callable[..., torch.Tensor], *, takes_tasks: bool = False) -> None:
        self.model, self.takes_tasks = model, takes_tasks
        self.info: Mapping[str, str] = {"tasks": task_list()} if takes_tasks else {}

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits of a batch."""
        names = {} if task is None else {"adapter_names": [f"t{i}" for i in task]}
        with torch.inference_mode():
            logits: NDArray[np.float32] = self.model(torch.from_numpy(images), **names).numpy()
        return logits


def task_list() -> str:
    """The metadata ``tasks`` of a fleet of ``TASKS`` tasks."""
    names = [f"class {i}" for i in range(CLASSES)]
    return json.dumps([{"name": f"t{i}", "classes": names} for i in range(TASKS)])


def tuned_model(name: str, method: str) -> TunedModel:
    """A tuned model on a backbone with random weights, from a fixed seed."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=CLASSES).eval()
    return attach(backbone, method, backbone=identify(backbone)).eval()


def random_tasks(tuned: TunedModel, seed: int = 0) -> FleetTables:
    """Tables of ``TASKS`` random tasks for a fleet's graph."""
    rng = np.random.default_rng(seed)
    first = CLASSES * np.arange(TASKS, dtype=np.int64)
    return FleetTables(
        bank=0.01 * rng.standard_normal((TASKS, Layout(tuned.updates).row_length), np.float32),
        heads=np.tile(classifier_rows(tuned).detach().numpy(), (TASKS, 1)),
        first=first,
        count=np.full(TASKS, CLASSES, np.int64),
        columns=np.arange(CLASSES, dtype=np.int64),
    )


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


def peft_mixed(name: str, method: str, threads: int) -> TorchModule:
    """PEFT's batch of mixed adapters: LoRA of rank 8 for ``TASKS`` tasks, each with a head."""
    import peft as library

    torch.set_num_threads(threads)
    config = library.LoraConfig(r=8, target_modules=["qkv"], modules_to_save=["head"])
    model = library.get_peft_model(models(name, method)[0], config, adapter_name="t0")
    for i in range(1, TASKS):
        model.add_adapter(f"t{i}", config)
    return TorchModule(model.eval(), takes_tasks=True)
