"""Training: gradients against float64, runs that repeat bit for bit, and the speed of a step."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from aoft_deploy.cli.train import main as train_main
from aoft_deploy.tuning.methods import method_names
from aoft_deploy.tuning.tuned_model import TunedModel
from benchmarks.gpu.artefacts import training_words
from benchmarks.gpu.models import CLASSES, large, plain, small, tuned
from benchmarks.gpu.run import Run
from benchmarks.gpu.timing import Variant, interleaved

__all__ = ["gradients", "same_bits", "speed"]

ALLOWED = {"fp32": 1e-4, "bf16": 0.1}
"""Largest relative error of a gradient, over all trained parameters together."""


def gradients(run: Run) -> None:
    """Gradients of every method on the device, in fp32 and bf16, against float64 on the CPU."""
    torch.backends.cudnn.allow_tf32 = False
    model = small(run)
    images = torch.from_numpy(model.inputs(8))
    labels = torch.randint(0, CLASSES, (8,), generator=torch.Generator().manual_seed(1))
    for method in method_names():
        with run.row(method):
            made = tuned(model, method)
            expected = _gradient(made.double(), images.double(), labels, nullcontext())
            made = made.float().to(run.device)
            inputs, targets = images.to(run.device), labels.to(run.device)
            for precision in ALLOWED:
                kind = torch.device(run.device).type
                with_bf16 = torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16")
                got = _gradient(made, inputs, targets, with_bf16)
                error = float((got - expected).norm() / expected.norm())
                run.note(
                    f"{method} {precision}",
                    error=error,
                    allowed=ALLOWED[precision],
                    passed=error <= ALLOWED[precision],
                )


def _gradient(
    made: TunedModel, images: Tensor, labels: Tensor, arithmetic: AbstractContextManager[Any]
) -> Tensor:
    """All gradients of a step in one vector, float64 on the CPU."""
    made.zero_grad()
    with arithmetic:
        logits = made(images)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss: Any = F.cross_entropy(wide, labels)
    loss.backward()
    found = [p.grad for _, p in sorted(made.trained().items()) if p.grad is not None]
    return torch.cat([grad.double().cpu().flatten() for grad in found])


def same_bits(run: Run) -> None:
    """aoft-train on the device, twice, gives the same checkpoint and the same metrics."""
    outs = [run.scratch / f"run-{i}" for i in range(2)]
    for out in outs:
        _train(training_words(run, out))
    first, second = (load_file(out / "model.ckpt") for out in outs)
    lines = [_metrics(out) for out in outs]
    equal = first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    run.note(
        "aoft-train twice",
        passed=equal and lines[0] == lines[1],
        tensors=len(first),
        accuracy=lines[0][-1].get("val_accuracy"),
    )


def _train(words: Sequence[str]) -> None:
    """Run aoft-train in a process of its own, forked before this one has started CUDA."""
    process = multiprocessing.get_context("fork").Process(target=_main, args=(words,))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"aoft-train ended with {process.exitcode}: see log.txt")


def _main(words: Sequence[str]) -> None:
    raise SystemExit(train_main(words))


def _metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without its times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_second")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def speed(run: Run) -> None:
    """A step in bf16: ours beside PEFT's LoRA of the same rank on the same layers."""
    model, batch = large(run), 4 if run.dry else 64
    images = torch.from_numpy(model.inputs(batch)).to(run.device)
    labels = torch.randint(0, CLASSES, (batch,), device=run.device)
    makers: dict[str, Callable[[], nn.Module]] = {
        "PEFT LoRA": lambda: _peft_lora(plain(model)),
        "aoft-lora": lambda: tuned(model, "aoft-lora", rank=8),
        "aoft-lora-star": lambda: tuned(model, "aoft-lora-star", rank=8),
        "lora": lambda: tuned(model, "lora", rank=8),
        "rlrr": lambda: tuned(model, "rlrr"),
        "linear": lambda: tuned(model, "linear"),
    }
    steps, memory = {}, {}
    for name, make in makers.items():
        with run.row(name):
            step = _step(make().to(run.device).train(), images, labels)
            memory[name] = _peak_mib(step, run)
            steps[name] = Variant(step)
    for name, timing in interleaved(run, steps).items():
        run.note(
            name,
            kind="training step",
            precision="bf16",
            batch=batch,
            ms=timing.ms,
            device_ms=timing.device_ms,
            peak_mib=memory[name],
        )


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16):
            loss: Any = F.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def _peak_mib(step: Callable[[], object], run: Run) -> float | None:
    """Memory that a step takes beside the model; None on a CPU."""
    if run.dry:
        return None
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _peft_lora(model: nn.Module) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"], modules_to_save=["head"])
    made: nn.Module = peft.get_peft_model(model, config)
    return made
