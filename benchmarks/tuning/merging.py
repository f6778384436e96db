"""Time to merge ViT-B/16, compared with PEFT's merge_and_unload on the same sites.

Our merge sums in float64 and checks that the result is finite; it returns a new model and keeps the
tuned one, or consumes it with ``in_place``. PEFT merges in place and without a check by default; it
is timed that way, with its finiteness check, and with a copy that keeps the tuned model usable.
Measurements alternate.

    python benchmarks/tuning/merging.py --out benchmarks/results/merging.json
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import psutil
import timm
import torch
from torch import nn

from aoft_deploy import attach, merge


def peft_model(base: nn.Module) -> peft.PeftModel:
    """LoRA r = 8 on the fused qkv layers, the finest targets of PEFT on a timm model."""
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"], init_lora_weights=False)
    return peft.get_peft_model(copy.deepcopy(base), config)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = timm.create_model(options.model, num_classes=100).eval()
    methods = ("aoft-lora", "aoft-lora-star", "lora", "rlrr")
    tuned = {m: attach(copy.deepcopy(base), m) for m in methods}
    times: dict[str, list[float]] = {}
    for turn in range(options.rounds + 1):
        models = [peft_model(base) for _ in range(3)]
        own = copy.deepcopy(tuned)
        row = {
            "peft merge_and_unload": seconds(models[0].merge_and_unload),
            "peft safe_merge": seconds(lambda m=models[1]: m.merge_and_unload(safe_merge=True)),
            "peft copy and merge": seconds(lambda m=models[2]: copy.deepcopy(m).merge_and_unload()),
            **{f"{m}, new model": seconds(lambda m=m: merge(tuned[m])) for m in methods},
            **{f"{m}, in place": seconds(partial(merge, own[m], in_place=True)) for m in methods},
        }
        if turn:
            for name, value in row.items():
                times.setdefault(name, []).append(value)
    medians = {name: statistics.median(values) for name, values in times.items()}
    reference = medians["peft merge_and_unload"]
    result = {n: {"seconds": s, "ratio": s / reference} for n, s in medians.items()}
    print(f"{'variant':28}{'seconds':>9}{'x PEFT':>9}")
    for name, row in result.items():
        print(f"{name:28}{row['seconds']:9.3f}{row['ratio']:9.2f}")
    if options.out:
        report = {
            "command": "python benchmarks/tuning/merging.py " + " ".join(sys.argv[1:]),
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "cores": psutil.cpu_count(logical=False),
                "isa": torch.backends.cpu.get_cpu_capability(),
                "torch": torch.__version__,
                "peft": peft.__version__,
            },
            "variants": result,
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
