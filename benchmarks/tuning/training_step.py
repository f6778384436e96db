"""Time and peak memory of a fine-tuning step, compared with PEFT's LoRA on the same sites.

Each variant runs in its own process, and all import the same packages. The parent requests one step
from each in turn, in the opposite order every other round, so that changes of the machine's speed
affect all variants alike. Time is the median over rounds. Memory is the peak resident set of the
process, and how far that is above the resident set before the first step, which libraries and
weights take. A file of results keeps its other batches and precisions, so a long table can be
measured in several commands.

    python benchmarks/tuning/training_step.py --batch 4 8 16 --precision fp32 bf16 --out FILE
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import timm
import torch
from torch import nn

from aoft_deploy import attach
from aoft_deploy.artefacts.machine import gemm_peaks, machine

VARIANTS = {
    "peft-lora-8": None,
    "aoft-lora-8": ("aoft-lora", 8),
    "aoft-lora-64": ("aoft-lora", 64),
    "aoft-lora-star-8": ("aoft-lora-star", 8),
    "lora-8": ("lora", 8),
    "aoft-lora-8-checkpointing": ("aoft-lora", 8),
    "rlrr": ("rlrr", 1),
    "linear": ("linear", 0),
}


def build(variant: str, model: nn.Module) -> nn.Module:
    """The trainable model of a variant."""
    chosen = VARIANTS[variant]
    if chosen is None:
        config = peft.LoraConfig(
            r=8, lora_alpha=8, target_modules=["qkv"], modules_to_save=["head"]
        )
        return peft.get_peft_model(model, config)
    method, rank = chosen
    tuned = attach(model, method, **({"rank": rank} if rank else {}))
    tuned.checkpointing = variant.endswith("checkpointing")
    return tuned


def stepper(variant: str, options: argparse.Namespace) -> Callable[[], float]:
    """A function that does one training step and returns its seconds."""
    torch.manual_seed(0)
    model = build(variant, timm.create_model(options.model, num_classes=100)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3)
    side = timm.get_pretrained_cfg(options.model).input_size[-1]  # type: ignore[union-attr]
    (batch,), (precision,) = options.batch, options.precision
    images = torch.randn(batch, 3, side, side)
    labels = torch.randint(0, 100, (batch,))
    bf16 = precision == "bf16"

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    return step


def serve(variant: str, options: argparse.Namespace) -> None:
    """Do one step for each line on stdin."""
    step = stepper(variant, options)
    start = resident("VmRSS")
    for _ in sys.stdin:
        seconds = step()
        print(json.dumps([seconds, resident("VmHWM"), start]), flush=True)


def resident(name: str) -> float:
    """MiB of this process's resident set: ``VmRSS`` now, ``VmHWM`` at its peak."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def measure(options: argparse.Namespace, batch: int, precision: str) -> dict[str, dict[str, Any]]:
    """Median seconds and peak MiB of every variant, and their ratios to PEFT's."""
    arguments = [f"--model={options.model}", f"--batch={batch}", f"--precision={precision}"]
    workers = {
        v: subprocess.Popen(
            [sys.executable, __file__, "--serve", v, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for v in dict.fromkeys(["peft-lora-8", *options.variants])  # the reference of the ratios
    }
    seconds: dict[str, list[float]] = {v: [] for v in workers}
    peak, start = dict[str, float](), dict[str, float]()
    for turn in range(options.rounds + 1):
        order = list(workers.items())
        for variant, worker in reversed(order) if turn % 2 else order:
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            duration, peak[variant], start[variant] = json.loads(worker.stdout.readline())
            if turn:
                seconds[variant].append(duration)
    for worker in workers.values():
        worker.communicate()
    base = seconds["peft-lora-8"]
    above = {v: peak[v] - start[v] for v in workers}
    return {
        v: {
            "seconds": statistics.median(times),
            "time_ratio": statistics.median(a / b for a, b in zip(times, base, strict=True)),
            "all_seconds": times,
            "peak_mib": peak[v],
            "memory_ratio": peak[v] / peak["peft-lora-8"],
            "above_start_mib": above[v],
            "above_start_ratio": above[v] / above["peft-lora-8"],
        }
        for v, times in seconds.items()
    }


def main() -> None:
    """Measure, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--precision", choices=["bf16", "fp32"], nargs="+", default=["bf16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options)
    runs: dict[str, Any] = {}
    if options.out and options.out.exists():
        runs = json.loads(options.out.read_text())["runs"]
    for precision in options.precision:
        for batch in options.batch:
            result = measure(options, batch, precision)
            print(f"{f'{precision}, batch {batch}':26}{'s/step':>9}{'x PEFT':>9}", end="")
            print(f"{'peak MiB':>10}{'x PEFT':>9}{'above':>8}{'x PEFT':>9}")
            for name, row in result.items():
                print(
                    f"{name:26}{row['seconds']:9.3f}{row['time_ratio']:9.3f}"
                    f"{row['peak_mib']:10.0f}{row['memory_ratio']:9.3f}"
                    f"{row['above_start_mib']:8.0f}{row['above_start_ratio']:9.3f}",
                    flush=True,
                )
            runs[f"{precision}, batch {batch}"] = {"rounds": options.rounds, "variants": result}
    if options.out:
        versions = {"torch": torch.__version__, "peft": peft.__version__}
        report = {
            "command": "python benchmarks/tuning/training_step.py " + " ".join(sys.argv[1:]),
            "machine": {
                **machine(torch.get_num_threads()),
                **versions,
                "isa": torch.backends.cpu.get_cpu_capability(),
                "operations_per_second": gemm_peaks(),
            },
            "model": options.model,
            "runs": dict(sorted(runs.items())),
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
