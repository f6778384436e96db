"""Time to merge ViT-B/16, compared with PEFT's merge_and_unload on the same sites.

Our merge sums in float64 and checks that the result is finite; it returns a new model and keeps the
tuned one, or consumes it with ``in_place``. PEFT merges in place and without a check by default; it
is timed that way, with its finiteness check, and with a copy that keeps the tuned model usable.
RLRR of rank 1 changes every linear layer, so it is compared with LoRA of rank 1 on all of them.
``x checked`` is the time relative to PEFT's checked merge of the same layers. Measurements
alternate.

For RLRR, the least traffic of a merge is reported too: every weight is read and written once. Its
share of the measured bandwidth of a copy is 1 where a merge takes as long as copying the weights.

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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import peft
import psutil
import timm
import torch
from torch import nn

from aoft_deploy import attach, merge

EVERY_LAYER = "PEFT, every layer"

LINEAR = ("qkv", "attn.proj", "fc1", "fc2")
"""Names of the linear layers of a block."""


def peft_model(base: nn.Module, targets: Sequence[str] = ("qkv",), rank: int = 8) -> peft.PeftModel:
    """LoRA on layers; the fused qkv layers are the finest targets of PEFT on a timm model."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights=False
    )
    return peft.get_peft_model(copy.deepcopy(base), config)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def traffic(base: nn.Module) -> tuple[int, float]:
    """Bytes of reading and writing the linear layers' weights, and the seconds of copying them."""
    weights = [
        p for n, p in base.named_parameters() if n.endswith(tuple(f"{x}.weight" for x in LINEAR))
    ]
    copies = [p.detach().clone() for p in weights]

    def copying() -> None:
        for copied, weight in zip(copies, weights, strict=True):
            copied.copy_(weight.detach())

    moved = 2 * sum(p.numel() * p.element_size() for p in weights)
    return moved, statistics.median(seconds(copying) for _ in range(9))


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
        wide = [peft_model(base, LINEAR, rank=1) for _ in range(2)]
        own = copy.deepcopy(tuned)
        row = {
            "peft merge_and_unload": seconds(models[0].merge_and_unload),
            "peft safe_merge": seconds(lambda m=models[1]: m.merge_and_unload(safe_merge=True)),
            "peft copy and merge": seconds(lambda m=models[2]: copy.deepcopy(m).merge_and_unload()),
            EVERY_LAYER: seconds(wide[0].merge_and_unload),
            f"{EVERY_LAYER}, safe_merge": seconds(
                lambda m=wide[1]: m.merge_and_unload(safe_merge=True)
            ),
            **{f"{m}, new model": seconds(lambda m=m: merge(tuned[m])) for m in methods},
            **{f"{m}, in place": seconds(partial(merge, own[m], in_place=True)) for m in methods},
        }
        if turn:
            for name, value in row.items():
                times.setdefault(name, []).append(value)
    medians = {name: statistics.median(values) for name, values in times.items()}
    reference = medians["peft merge_and_unload"]
    moved, copying = traffic(base)
    result: dict[str, dict[str, float]] = {}
    for name, value in medians.items():
        wide_layers = name.startswith(("rlrr", EVERY_LAYER))
        checked = medians[f"{EVERY_LAYER}, safe_merge" if wide_layers else "peft safe_merge"]
        result[name] = {"seconds": value, "ratio": value / reference, "checked": value / checked}
        if name.startswith("rlrr"):
            result[name]["share_of_copy"] = copying / value
    print(f"{'variant':32}{'seconds':>9}{'x PEFT':>9}{'x checked':>11}")
    for name, row in result.items():
        print(f"{name:32}{row['seconds']:9.3f}{row['ratio']:9.2f}{row['checked']:11.2f}")
    print(f"copying the linear weights: {moved / 1e6:.0f} MB, {moved / copying / 1e9:.1f} GB/s")
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
            "copy": {"bytes": moved, "seconds": copying},
            "variants": result,
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
