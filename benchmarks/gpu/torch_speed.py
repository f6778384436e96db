"""Speed in PyTorch: the rivals of the artefacts, and what merging costs there: nothing."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from aoft_deploy.tuning.merging import merge
from benchmarks.gpu.models import large, plain, tuned
from benchmarks.gpu.run import NotMeasured, Run
from benchmarks.gpu.speed import note_speeds
from benchmarks.gpu.timing import Variant, interleaved

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
        modules = {
            f"PyTorch, {kind}, {precision}": copy.deepcopy(module).to(run.device, dtype)
            for kind, module in kinds.items()
        }
        for batch in run.batches:
            images = torch.from_numpy(model.inputs(batch)).to(run.device, dtype)
            with _tf32(precision == "tf32"):
                variants = {n: Variant(_inference(m, images)) for n, m in modules.items()}
                note_speeds(run, interleaved(run, variants), batch)


def compiled(run: Run) -> None:
    """``torch.compile`` of the merged model with CUDA graphs and fixed shapes."""
    model = large(run)
    merged = merge(tuned(model))
    for precision in ("bf16", "fp16"):
        module = copy.deepcopy(merged).to(run.device, TYPES[precision])
        for batch in sorted(run.batches, reverse=True):
            name = f"torch.compile, merged, {precision}"
            with run.row(f"{name}, batch {batch}"):
                if run.left < 30:
                    raise NotMeasured("no time was left to compile it")
                images = torch.from_numpy(model.inputs(batch)).to(run.device, TYPES[precision])
                torch.compiler.reset()
                how = {"backend": "eager"} if run.dry else {"mode": "reduce-overhead"}
                fast = torch.compile(module, dynamic=False, **how)
                start = time.time()
                run_once = _inference(fast, images)
                run_once()
                run.note(f"{name}, batch {batch}", compile_seconds=round(time.time() - start, 1))
                note_speeds(run, interleaved(run, {name: Variant(run_once)}), batch)


def peft_mixed(run: Run) -> None:
    """PEFT's mixed batch: a LoRA of rank 8 for each of 64 tasks, chosen by ``adapter_names``."""
    import peft

    model, count = large(run), 6 if run.dry else 64
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"])
    mixed = peft.get_peft_model(plain(model), config, adapter_name="t0")
    for i in range(1, count):
        mixed.add_adapter(f"t{i}", config)
    mixed = mixed.eval().to(run.device, torch.float16 if not run.dry else torch.float32)
    dtype = next(mixed.parameters()).dtype
    for batch in run.batches:
        images = torch.from_numpy(model.inputs(batch)).to(run.device, dtype)
        names = [f"t{i % count}" for i in range(batch)]
        precision = "fp32" if run.dry else "fp16"
        variants = {
            f"PEFT, {count} tasks, {precision}": Variant(
                _inference(mixed, images, adapter_names=names)
            )
        }
        note_speeds(run, interleaved(run, variants), batch)


def _inference(module: Callable[..., Any], images: Tensor, **words: Any) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return module(images, **words)

    return run


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in products and convolutions."""
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    for flag in flags:
        flag.allow_tf32 = allowed
    try:
        yield
    finally:
        for flag in flags:
            flag.allow_tf32 = False
