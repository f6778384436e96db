"""PEFT LoRA folders, trained and saved by PEFT itself."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import VIT, X, base_model, randomised
from safetensors.torch import load_file, save_file
from torch import Tensor


@pytest.fixture(scope="session")
def peft() -> Any:
    return importlib.import_module("peft")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write the weights of a backbone, without a classifier, to a file."""
    folder = tmp_path_factory.mktemp("weights")

    def write(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        state = base_model(name).state_dict()
        save_file({n: t for n, t in state.items() if not n.startswith("head.")}, path)
        return path

    return write


@pytest.fixture(scope="session")
def adapted(peft: Any) -> Callable[..., Tensor]:
    """Save a randomised PEFT adapter with the given LoraConfig fields, and return its logits."""

    def make(folder: Path, name: str = VIT, half: bool = False, **config: Any) -> Tensor:
        config = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv"], **config}
        config = {"modules_to_save": ["head"], **config}
        model = base_model(name)
        with torch.inference_mode():
            before = model(X)
        model = peft.get_peft_model(model, peft.LoraConfig(**config))
        randomised(model, seed=2, spread=0.15, only="lora_")
        randomised(model, seed=3, spread=0.2, only="modules_to_save")
        if half:
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16().float()
        model.eval()
        model.save_pretrained(folder)
        if half:
            path = folder / "adapter_model.safetensors"
            save_file({n: t.bfloat16() for n, t in load_file(path).items()}, path)
            model = peft.PeftModel.from_pretrained(base_model(name), folder).eval()
        with torch.inference_mode():
            logits: Tensor = model(X)
        assert (logits - before).abs().max() > 0.1
        return logits

    return make


@pytest.fixture(scope="module")
def saved(adapted: Callable[..., Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that PEFT saved; tests damage copies of it."""
    folder = tmp_path_factory.mktemp("saved") / "a"
    adapted(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "a"))
