"""Time one merged model in every CPU engine and precision, and the usual alternatives.

One interleaved run times the same ViT as written by torch's exporter (the baseline of all ratios)
and by timm's, both in ONNX Runtime; in PyTorch, eager and compiled; as PEFT's unmerged LoRA; as the
plain backbone of our exporter; and as our merged artefacts. Figures are medians. Weights and images
are random, so only speed is measured, not accuracy. Each engine runs in a subprocess: see
aoft_deploy/artefacts/isolation.py.

    python benchmarks/export/engines.py --out benchmarks/results/engines.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx as onnx_library
import torch
import torch_engines
from torch import nn

from aoft_deploy.artefacts.engine import Engine, EngineOptions
from aoft_deploy.artefacts.exporter import Exporter
from aoft_deploy.artefacts.isolation import SubprocessEngine
from aoft_deploy.artefacts.machine import gemm_peaks, machine
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.artefacts.spec import BuildOptions, Calibration, ExportSpec, InputSpec
from aoft_deploy.artefacts.timing import Subject, interleaved, trusted_peaks
from aoft_deploy.artefacts.verification import random_pixels
from aoft_deploy.export.flops import flops_per_image
from aoft_deploy.processors import processors
from aoft_deploy.tuning.multitask import MixedModel
from aoft_exporters.onnx.engine import OnnxEngine
from aoft_exporters.onnx.exporter import EXPORTER as ONNX
from aoft_exporters.openvino.exporter import EXPORTER as OPENVINO

HALF = (0.5, 0.5, 0.5)
Load = Callable[[], Engine]


class Variants:
    """Creates the variants that are timed."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.plain, self.merged = torch_engines.models(options.model, options.method)
        self.size = int(self.plain.pretrained_cfg["input_size"][-1])

    def stock(self) -> Load:
        """The output of ``torch.onnx.export``, in ONNX Runtime."""
        path = self.folder / "stock.onnx"
        with _quiet():
            torch.onnx.export(
                self.merged,
                (torch.zeros(2, 3, self.size, self.size),),
                path,
                input_names=["pixel_values"],
                output_names=["logits"],
                dynamic_shapes=({0: "batch"},),
                external_data=False,
            )
        return partial(OnnxEngine, path, self.options.threads)

    def timm(self) -> Load:
        """The output of timm's exporter with its defaults (TorchScript), in ONNX Runtime."""
        from timm.utils.onnx import onnx_export

        path = self.folder / "timm.onnx"
        with _quiet():
            onnx_export(
                self.merged,
                str(path),
                example_input=torch.zeros(2, 3, self.size, self.size),
                input_names=["pixel_values"],
                output_names=["logits"],
                check=False,
            )
        return partial(OnnxEngine, path, self.options.threads)

    def torch(self, make: Callable[[str, str, int], Engine]) -> Load:
        """A variant of ``torch_engines``."""
        return partial(make, self.options.model, self.options.method, self.options.threads)

    def ours(
        self, exporter: Exporter, precision: str, model: nn.Module | None = None, **build: Any
    ) -> Load:
        """An artefact of our exporters."""
        calibrated = precision in exporter.calibrated
        pixels = random_pixels(self.options.calibration, self.size, seed=1) if calibrated else None
        spec = ExportSpec(
            InputSpec(self.size, self.size, False, HALF, HALF),
            {},
            precision,
            calibration=None if pixels is None else Calibration(pixels),
            build=BuildOptions(**build),
        )
        name = f"{len(list(self.folder.iterdir()))}{exporter.suffix}"
        exporter.export(model or self.merged, self.folder / name, spec)
        return self._loading(exporter, precision, self.folder / name)

    def fleet(self, exporter: Exporter, precision: str) -> Load:
        """A fleet of random tasks, whose images take turns."""
        tuned = torch_engines.tuned_model(self.options.model, self.options.method)
        tables, model = torch_engines.random_tasks(tuned), MixedModel(tuned)
        calibrated = precision in exporter.calibrated
        pixels = random_pixels(self.options.calibration, self.size, seed=1) if calibrated else None
        spec = ExportSpec(
            InputSpec(self.size, self.size, False, HALF, HALF),
            {"tasks": torch_engines.task_list(), "precision": precision},
            precision,
            calibration=None if pixels is None else Calibration(pixels),
        )
        assert exporter.fleet is not None
        path = self.folder / f"{len(list(self.folder.iterdir()))}{exporter.suffix}"
        exporter.fleet.export(model, path, spec, tables)
        return self._loading(exporter, precision, path)

    def _loading(self, exporter: Exporter, precision: str, path: Path) -> Load:
        """Loads an artefact, whose float layers are in the precision that an export states."""
        layers = exporter.float_layers
        if layers is not None and precision in layers.precisions:
            if layers.is_faster(flops_per_image(self.merged, self.size) or 0):
                layers.state(path, layers.lower)
        return partial(load_artefact, path, EngineOptions(threads=self.options.threads))

    def nodes(self) -> dict[str, int]:
        """Number of nodes of each ONNX file."""
        return {
            path.name: len(onnx_library.load(path, load_external_data=False).graph.node)
            for path in sorted(self.folder.glob("*.onnx"))
        }


VARIANTS: dict[str, tuple[str, Callable[[Variants], Load]]] = {
    "torch.onnx.export, ONNX Runtime": ("fp32", Variants.stock),
    "timm's export, ONNX Runtime": ("fp32", Variants.timm),
    "PyTorch": ("fp32", lambda v: v.torch(torch_engines.pytorch)),
    "torch.compile": ("fp32", lambda v: v.torch(torch_engines.compiled)),
    "PEFT, unmerged": ("fp32", lambda v: v.torch(torch_engines.peft)),
    "onnxruntime fp32, plain backbone": ("fp32", lambda v: v.ours(ONNX, "fp32", v.plain)),
    "onnxruntime fp32": ("fp32", lambda v: v.ours(ONNX, "fp32")),
    "onnxruntime fp32, opset 20": ("fp32", lambda v: v.ours(ONNX, "fp32", opset=20)),
    "onnxruntime int8": ("int8", lambda v: v.ours(ONNX, "int8")),
    "openvino fp32": ("fp32", lambda v: v.ours(OPENVINO, "fp32")),
    "openvino bf16": ("bf16", lambda v: v.ours(OPENVINO, "bf16")),
    "openvino int8": ("int8", lambda v: v.ours(OPENVINO, "int8")),
    "PEFT, 16 tasks mixed": ("fp32", lambda v: v.torch(torch_engines.peft_mixed)),
    "onnxruntime fp32, 16 tasks mixed": ("fp32", lambda v: v.fleet(ONNX, "fp32")),
    "onnxruntime int8, 16 tasks mixed": ("int8", lambda v: v.fleet(ONNX, "int8")),
    "openvino fp32, 16 tasks mixed": ("fp32", lambda v: v.fleet(OPENVINO, "fp32")),
    "openvino int8, 16 tasks mixed": ("int8", lambda v: v.fleet(OPENVINO, "int8")),
}
FIRST = next(iter(VARIANTS))
OPTIONAL = ("torch.compile", "openvino bf16")
"""Not run by default: they need a compiler, or a processor with bf16."""


@contextlib.contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    """Time the variants, print the figures and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--method", default="aoft-lora-star")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    default = [name for name in VARIANTS if name not in OPTIONAL]
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=default)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--calibration", type=int, default=32, help="images for openvino int8")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        variants = Variants(options, Path(scratch))
        flops = flops_per_image(variants.merged, variants.size)
        loads = {
            name: VARIANTS[name][1](variants) for name in dict.fromkeys([FIRST, *options.variants])
        }
        nodes, size = variants.nodes(), variants.size
        del variants
        peaks = gemm_peaks(options.threads)
        with contextlib.ExitStack() as stack:
            subjects = [
                Subject(name, stack.enter_context(SubprocessEngine(load)), flops, VARIANTS[name][0])
                for name, load in loads.items()
            ]
            timings = interleaved(subjects, options.batches, (size, size), options.rounds)
        after = gemm_peaks(options.threads)
        measured = {n: max(peaks.get(n, 0.0), after.get(n, 0.0)) for n in peaks | after}
        peaks = trusted_peaks(measured, timings)
    print(f"{'batch':>5}  {'variant':34}{'ms':>9}{'img/s':>8}{'ratio':>7}  of the peak")
    for timing in timings:
        share = timing.share(peaks)
        text = "" if share is None else f"{share:6.0%} {timing.subject.precision}"
        print(
            f"{timing.batch:5}  {timing.subject.name:34}{timing.median * 1e3:9.1f}"
            f"{timing.throughput:8.2f}{timing.ratio:7.2f}  {text}"
        )
    print(f"nodes {nodes}; peak GOP/s { {n: round(p / 1e9) for n, p in measured.items()} }")
    if options.out:
        packages = ("torch", "timm", "onnxruntime", "openvino", "nncf", "peft")
        results = {
            "machine": machine(options.threads),
            "versions": {package: version(package) for package in packages},
            "model": options.model,
            "method": options.method,
            "nodes": nodes,
            "gemm_peaks": measured,
            "rows": [timing.to_dict(peaks) for timing in timings],
        }
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
