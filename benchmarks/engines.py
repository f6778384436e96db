"""One merged model in every engine and precision that the CPU offers, in one interleaved run.

All artefacts are of the same merged model and take turns on the same batches, so that the machine's
other work hits them alike. Medians of the time of a batch, as images a second, and the median ratio
to ONNX Runtime fp32 of the same round. Random weights and images: for the speed, not the answers.

    python benchmarks/engines.py --out benchmarks/results/engines.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray

from aoft_deploy.backbone import identify
from aoft_deploy.engines import Engine, Recipe
from aoft_deploy.export import normalised
from aoft_deploy.tuned import attach, merge
from aoft_deploy.verification import random_pixels
from aoft_exporters import onnx, openvino

VARIANTS: dict[str, tuple[Any, str]] = {
    "onnxruntime fp32": (onnx, "fp32"),
    "onnxruntime int8": (onnx, "int8"),
    "openvino fp32": (openvino, "fp32"),
    "openvino bf16": (openvino, "bf16"),
    "openvino int8": (openvino, "int8"),
}
FIRST = next(iter(VARIANTS))
HALF = (0.5, 0.5, 0.5)


def engines(options: argparse.Namespace, recipe: Recipe, folder: Path) -> dict[str, Engine]:
    """Write the asked artefacts and open them."""
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=100)
    merged = merge(attach(model, options.method, backbone=identify(model)).eval())
    opened = {}
    for name in options.variants:
        exporter, precision = VARIANTS[name]
        path = folder / f"{precision}{exporter.SUFFIX}"
        learns = precision in getattr(exporter, "CALIBRATED", ())
        pixels = random_pixels(options.calibration, recipe.size, seed=1) if learns else None
        form = Recipe(recipe.size, False, HALF, HALF, {}, precision, pixels)
        exporter.export(merged, path, form)
        opened[name] = exporter.load(path, threads=options.threads)
    return opened


def timed(
    opened: dict[str, Engine], images: NDArray[np.float32], options: argparse.Namespace
) -> dict[int, dict[str, list[float]]]:
    """Seconds of each round, by batch size and variant; every other round in reverse order."""
    work = [(batch, name) for batch in options.batches for name in opened]
    seconds: dict[int, dict[str, list[float]]] = {
        batch: {name: [] for name in opened} for batch in options.batches
    }
    for batch, name in work:
        opened[name].run(images[:batch])  # warms up
    for turn in range(options.rounds):
        for batch, name in work if turn % 2 == 0 else work[::-1]:
            start = time.perf_counter()
            opened[name].run(images[:batch])
            seconds[batch][name].append(time.perf_counter() - start)
    return seconds


def table(seconds: dict[int, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Medians, with the ratio of throughput to the first variant's of the same round."""
    rows = []
    for batch, found in seconds.items():
        for name, times in found.items():
            ratios = [a / b for a, b in zip(found[FIRST], times, strict=True)]
            median = statistics.median(times)
            rows.append(
                {
                    "batch": batch,
                    "variant": name,
                    "seconds": median,
                    "images per second": batch / median,
                    "ratio": statistics.median(ratios),
                    "lowest and highest ratio": [min(ratios), max(ratios)],
                }
            )
    return rows


def main() -> None:
    """Time, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--method", default="aoft-lora-star")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    variants = [name for name in VARIANTS if name != "openvino bf16"]
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=variants)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--calibration", type=int, default=32, help="images for openvino int8")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.variants = list(dict.fromkeys([FIRST, *options.variants]))
    size = timm.get_pretrained_cfg(options.model).input_size[-1]  # type: ignore[union-attr]
    recipe = Recipe(size, False, HALF, HALF, {})
    with tempfile.TemporaryDirectory() as scratch:
        opened = engines(options, recipe, Path(scratch))
        images = normalised(random_pixels(max(options.batches), size), recipe)
        rows = table(timed(opened, images, options))
    print(f"{'batch':>5}  {'variant':18}{'seconds':>9}{'img/s':>8}{'ratio':>7}")
    for row in rows:
        print(
            f"{row['batch']:5}  {row['variant']:18}{row['seconds']:9.3f}"
            f"{row['images per second']:8.2f}{row['ratio']:7.2f}"
        )
    if options.out:
        packages = ("torch", "timm", "onnxruntime", "openvino", "nncf")
        where = {
            "machine": platform.processor() or platform.machine(),
            "threads": options.threads,
            **{package: version(package) for package in packages},
            "model": options.model,
            "method": options.method,
            "rounds": options.rounds,
        }
        options.out.write_text(json.dumps({"where": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
