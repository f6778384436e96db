"""Speed in PyTorch, the rival of the artefacts."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from aoft_deploy.tuning.merging import merge
from benchmarks.gpu.models import large, plain, tuned
from benchmarks.gpu.run import NotMeasured, Run
from benchmarks.gpu.timing import Subject, Variant, note_speeds

__all__ = ["compiled", "eager", "peft_mixed"]

TYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def eager(run: Run) -> None:
    """The plain backbone and the merged model, in eager mode."""
    model = large(run)
    kinds = {"plain": plain(model), "merged": merge(tuned(model))}
    for precision, dtype in TYPES.items():
        modules: dict[Subject, nn.Module] = {
            Subject("PyTorch", kind, precision, "GPU"): copy.deepcopy(module).to(run.device, dtype)
            for kind, module in kinds.items()
        }
        for batch in run.batches:
            images = torch.from_numpy(model.inputs(batch)).to(run.device, dtype)
            with _float32_as(precision):
                variants = {who: Variant(_inference(m, images)) for who, m in modules.items()}
                note_speeds(run, batch, variants)


def compiled(run: Run) -> None:
    """``torch.compile`` of the merged model, with CUDA graphs and fixed shapes."""
    model = large(run)
    merged = merge(tuned(model))
    for precision in ("bf16", "fp16"):
        module = copy.deepcopy(merged).to(run.device, TYPES[precision])
        for batch in sorted(run.batches, reverse=True):
            with run.row(f"torch.compile, {precision}, batch {batch}"):
                if run.left < 30:
                    raise NotMeasured("no time was left to compile it")
                pixels = model.inputs(batch)
                images = torch.from_numpy(pixels).to(run.device, TYPES[precision])
                torch.compiler.reset()
                how: dict[str, Any] = {"mode": "reduce-overhead"}
                if run.dry:
                    how = {"backend": "eager"}  # a compiler would take most of a dry run
                fast = torch.compile(module, dynamic=False, **how)
                start = time.time()
                _inference(fast, images)()
                seconds = round(time.time() - start, 1)
                run.note(f"torch.compile, {precision}, batch {batch}", compile_seconds=seconds)
                who = Subject("torch.compile", "merged", precision, "GPU")
                variants = {
                    who: Variant(_inference(fast, images)),
                    who._replace(images="NumPy"): Variant(_from_numpy(fast, pixels, images)),
                }
                note_speeds(run, batch, variants)


def peft_mixed(run: Run) -> None:
    """PEFT's mixed batch: a LoRA of rank 8 for each of 64 tasks, chosen by ``adapter_names``."""
    import peft

    model, count = large(run), 6 if run.dry else 64
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"])
    mixed = peft.get_peft_model(plain(model), config, adapter_name="t0")
    for i in range(1, count):
        mixed.add_adapter(f"t{i}", config)
    mixed = mixed.eval().to(run.device)
    for precision in ("fp32", "fp16"):
        mixed = mixed.to(TYPES[precision])
        for batch in run.batches:
            images = torch.from_numpy(model.inputs(batch)).to(run.device, TYPES[precision])
            names = [f"t{i % count}" for i in range(batch)]
            call = _inference(mixed, images, adapter_names=names)
            who = Subject("PEFT", f"{count} tasks", precision, "GPU")
            with _float32_as(precision):
                note_speeds(run, batch, {who: Variant(call)})


def _inference(module: Callable[..., Any], images: Tensor, **words: Any) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return module(images, **words)

    return run


def _from_numpy(
    module: Callable[..., Any], pixels: NDArray[np.float32], like: Tensor
) -> Callable[[], Any]:
    """The same with the copies to the device and back."""

    def run() -> Any:
        with torch.inference_mode():
            return module(torch.from_numpy(pixels).to(like)).float().cpu().numpy()

    return run


@contextmanager
def _float32_as(precision: str) -> Iterator[None]:
    """Allow TF32 in products and convolutions for ``tf32`` only."""
    flags: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    for flag in flags:
        flag.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        for flag in flags:
            flag.allow_tf32 = False
