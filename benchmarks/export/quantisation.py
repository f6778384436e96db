"""Compare ways to quantise a model: speed and size of a large one, accuracy kept by small ones.

The large model has random weights, so besides its speed only the error of its logits is measured.
The small models are the bundled backbone, fine-tuned on offline tasks of this package; their
accuracy on the test images is compared with that of the same model in fp32. All engines of a
batch size take turns in one run, each in a process of its own; figures are medians.

    python benchmarks/export/quantisation.py --folder artefacts --out \
        benchmarks/results/quantisation-MACHINE.json

With ``--folder``, what was exported before is used again, so that a machine can be quiet while the
speed is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import quantisers
import torch_engines
from numpy.typing import NDArray
from torch import nn

import aoft_deploy.tuning.backbones.bundled  # noqa: F401  (registers aoft_vit_nano with timm)
from aoft_deploy.artefacts.isolation import SubprocessEngine
from aoft_deploy.artefacts.machine import gemm_peaks, machine
from aoft_deploy.artefacts.manifest import artefact_size
from aoft_deploy.artefacts.registry import get_exporter
from aoft_deploy.artefacts.spec import Calibration, ExportSpec, InputSpec
from aoft_deploy.artefacts.timing import Subject, interleaved
from aoft_deploy.artefacts.verification import random_pixels
from aoft_deploy.checkpoints.opening import open_checkpoint
from aoft_deploy.data.synthetic import load_task, task_names
from aoft_deploy.processors import processors
from aoft_deploy.training.run import train
from aoft_deploy.training.settings import TrainingSettings
from aoft_deploy.tuning.merging import merge
from aoft_exporters.graph.attention_lowering import ATTENTION_OPSET
from aoft_exporters.graph.models import plain_graph

HALF = (0.5, 0.5, 0.5)
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Source:
    """A model in evaluation mode, and its images.

    Attributes:
        model: The merged model.
        input: Form of its inputs.
        calibration: Images to learn ranges from, uint8 [n, H, W, 3].
        test: Images to judge it on, uint8 [n, H, W, 3].
        labels: Index of the right class of each test image; empty for random weights.
        folder: Folder of its artefacts.
    """

    model: nn.Module
    input: InputSpec
    calibration: Pixels
    test: Pixels
    labels: Sequence[int]
    folder: Path

    def spec(self, precision: str) -> ExportSpec:
        """What the exporters are asked for."""
        return ExportSpec(self.input, {}, precision, calibration=Calibration(self.calibration))

    def feeds(self) -> Iterator[dict[str, NDArray[Any]]]:
        """The calibration images as inputs of a graph, each a batch of one."""
        for i in range(len(self.calibration)):
            yield {"pixel_values": self.input.prepare(self.calibration[i : i + 1])}

    def graph(self) -> Any:
        """The model as an ONNX graph in float32, with maps of their own for q, k and v."""
        return plain_graph(self.model, self.spec("fp32"), opset=ATTENTION_OPSET, separate=True)


def artefact(to: str, precision: str, float_layers: str = "") -> Callable[[Source, Path], Path]:
    """An artefact of an exporter, with its float layers in a stated precision."""

    def write(source: Source, path: Path) -> Path:
        exporter = get_exporter(to)
        path = path.with_name(path.name + exporter.suffix)
        if not path.exists():
            exporter.export(source.model, path, source.spec(precision))
            if float_layers:
                assert exporter.float_layers is not None
                exporter.float_layers.state(path, float_layers)
        return path

    return write


def rewritten(rewrite: Callable[[Source], Any]) -> Callable[[Source, Path], Path]:
    """An ONNX file with a graph that a function returns."""

    def write(source: Source, path: Path) -> Path:
        path = path.with_name(path.name + ".onnx")
        if not path.exists():
            onnx.save(rewrite(source), path)
        return path

    return write


def _smoothed(source: Source) -> Any:
    return quantisers.smoothed(source.graph(), [*source.feeds()])


VARIANTS: dict[str, Callable[[Source, Path], Path]] = {
    "ONNX Runtime fp32": artefact("onnx", "fp32"),
    "ONNX Runtime int8, dynamic": artefact("onnx", "int8"),
    "ONNX Runtime int8, dynamic, SmoothQuant": rewritten(
        lambda source: quantisers.dynamic(_smoothed(source))
    ),
    "ONNX Runtime int8, static": rewritten(
        lambda source: quantisers.static(source.graph(), [*source.feeds()])
    ),
    "ONNX Runtime int8, static, SmoothQuant": rewritten(
        lambda source: quantisers.static(_smoothed(source), [*source.feeds()])
    ),
    "ONNX Runtime 8-bit weights": rewritten(
        lambda source: quantisers.weights_only(source.graph(), 8)
    ),
    "ONNX Runtime 4-bit weights": rewritten(
        lambda source: quantisers.weights_only(source.graph(), 4)
    ),
    "OpenVINO fp32": artefact("openvino", "fp32"),
    "OpenVINO bf16": artefact("openvino", "bf16"),
    "OpenVINO int8": artefact("openvino", "int8"),
    "OpenVINO int8, float layers in bf16": artefact("openvino", "int8", "bf16"),
    "PyTorch compiled fp32": artefact("aoti", "fp32"),
    "PyTorch compiled bf16": artefact("aoti", "bf16"),
}
"""How each artefact is written; those of the product by its exporters."""

FIRST = next(iter(VARIANTS))

COMPILED = tuple(name for name in VARIANTS if name.startswith("PyTorch"))
"""Only the large model is compiled, which takes a minute; its error tells of the accuracy."""


def large(options: argparse.Namespace, folder: Path) -> Source:
    """The model whose speed is measured, with random weights."""
    plain, merged = torch_engines.models(options.model, options.method)
    size = int(plain.pretrained_cfg["input_size"][-1])
    pixels = random_pixels(2 * options.calibration, size, seed=1)
    calibration, test = np.split(pixels, 2)
    form = InputSpec(size, size, False, HALF, HALF)
    return Source(merged, form, calibration, test[:16], (), folder / options.model)


def small(task: str, options: argparse.Namespace, folder: Path) -> Source:
    """The bundled backbone, fine-tuned on a task."""
    splits = load_task(task, train=options.images)
    checkpoint = folder / task / "run" / "model.ckpt"
    if not checkpoint.exists():
        settings = TrainingSettings(epochs=options.epochs, precision="fp32")
        checkpoint = train(splits, checkpoint.parent, settings).checkpoint
    tuned, stored = open_checkpoint(checkpoint)
    preprocessing = stored.preprocessing
    assert splits.test is not None

    def pixels(images: Any, count: int) -> Pixels:
        return np.stack([preprocessing.pixels(images[i][0]) for i in range(count)])

    return Source(
        merge(tuned),
        InputSpec.of(preprocessing),
        pixels(splits.train, min(options.calibration, len(splits.train))),
        pixels(splits.test, len(splits.test)),
        splits.test.labels,
        folder / task,
    )


def written(source: Source, names: Sequence[str]) -> dict[str, Path]:
    """The artefacts of a model by the names of the variants."""
    source.folder.mkdir(parents=True, exist_ok=True)
    return {
        name: VARIANTS[name](source, source.folder / re.sub(r"\W+", "-", name)) for name in names
    }


def answers(source: Source, path: Path, threads: int) -> NDArray[np.float32]:
    """Logits of the test images, (images, classes), in batches of 16."""
    engine, inputs = quantisers.load(path, threads), source.input.prepare(source.test)
    return np.concatenate([engine.run(inputs[i : i + 16]) for i in range(0, len(inputs), 16)])


def error(logits: NDArray[np.float32], exact: NDArray[np.float32]) -> float | None:
    """Root mean square of the differences, relative to the spread of an image's logits.

    None if a logit is not finite.
    """
    if not np.isfinite(logits).all():
        return None
    differences = logits - exact
    differences = differences - differences.mean(1, keepdims=True)
    spread = exact - exact.mean(1, keepdims=True)
    return float(np.sqrt(np.square(differences).mean() / np.square(spread).mean()))


def judged(
    source: Source, paths: dict[str, Path], threads: int
) -> dict[str, dict[str, float | None]]:
    """Error, and for a trained model accuracy and agreement, of each variant against the first."""
    found: dict[str, dict[str, float | None]] = {}
    logits = {name: answers(source, path, threads) for name, path in paths.items()}
    for name, own in logits.items():
        found[name] = {"error": error(own, logits[FIRST])}
        if source.labels:
            found[name]["accuracy"] = float((own.argmax(1) == np.array(source.labels)).mean())
            found[name]["agreement"] = float((own.argmax(1) == logits[FIRST].argmax(1)).mean())
    return found


def main() -> None:
    """Write and compare the variants, print the figures and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--method", default="aoft-lora-star")
    parser.add_argument("--tasks", nargs="*", choices=task_names(), default=["digits", "shape"])
    parser.add_argument("--images", type=int, default=1000, help="training images of a task")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--calibration", type=int, default=32, help="images to learn ranges from")
    parser.add_argument("--folder", type=Path, help="keep the artefacts here for later runs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = list(dict.fromkeys([FIRST, *options.variants]))
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        folder = options.folder or Path(scratch)
        tasks = {}
        for task in options.tasks:
            source = small(task, options, folder)
            uncompiled = [name for name in names if name not in COMPILED]
            tasks[task] = judged(source, written(source, uncompiled), options.threads)
        source = large(options, folder)
        paths = written(source, names)
        errors = judged(source, paths, options.threads)
        subjects = [
            Subject(
                name,
                stack.enter_context(
                    SubprocessEngine(partial(quantisers.load, path, options.threads))
                ),
                None,
                "",
            )
            for name, path in paths.items()
        ]
        side = source.input.height
        timings = interleaved(subjects, options.batches, (side, side), options.rounds)
        rows = [
            {
                "name": name,
                "bytes": artefact_size(paths[name]),
                "error": errors[name]["error"],
                "ratios": {t.batch: t.ratio for t in timings if t.subject.name == name},
                "seconds": {t.batch: t.median for t in timings if t.subject.name == name},
                "tasks": {task: found[name] for task, found in tasks.items() if name in found},
            }
            for name in names
        ]
    for row in rows:
        ratios = " ".join(f"{ratio:.2f}" for ratio in row["ratios"].values())
        kept = " ".join(f"{found['accuracy']:.1%}" for found in row["tasks"].values())
        print(f"{row['name']:42}{ratios:>12}  {row['bytes'] / 1e6:6.1f} MB  {kept}", flush=True)
    if options.out:
        packages = ("torch", "timm", "onnxruntime", "openvino", "nncf")
        results = {
            "machine": machine(options.threads),
            "versions": {package: version(package) for package in packages},
            "model": options.model,
            "method": options.method,
            "gemm_peaks": gemm_peaks(options.threads),
            "rows": rows,
        }
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
