"""Many tasks in one batch, compared with all other ways to serve many tasks.

All variants take turns in one run, so that other work of the machine affects them alike. The output
is the median time of one batch, compared with a single task's merged model in the same runtime:

* ``merged``       one task's merged model in ONNX Runtime: the upper bound
* ``fleet``        this package's fleet in ONNX Runtime, the images spread over the tasks
* ``merged int8``, ``fleet int8``: the same with the shared weights in 8 bits
* ``merged openvino int8``, ``fleet openvino int8``: in OpenVINO, calibrated with noise
* ``sessions``     a session of a merged model for each task, one image after the other
* ``LoraAdapter``  ONNX Runtime's own adapters (rank 8), switched before each image
* ``torch merged``, ``torch fleet``, ``PEFT`` (rank 8 on qkv, ``adapter_names``) in PyTorch

Then the cost of a task: its bytes, the time to add it from disk, and the time to open a session.

    python benchmarks/fleet/fleet.py --batches 1 8 16 32 --tasks 1 8 16 64
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import peft
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.export.fleet import export_fleet
from aoft_deploy.export.merged import export_merged
from aoft_deploy.export.options import VerifyOptions
from aoft_deploy.fleet.fleet import Fleet
from aoft_deploy.processors import processors
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.backbone import create_backbone
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.multitask import MixedModel
from aoft_deploy.tuning.task_layout import Layout, classifier_rows
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_exporters.graph.attention_lowering import ATTENTION_OPSET, lower
from aoft_exporters.graph.tracing import trace

CLASSES = 10
HALF = (0.5, 0.5, 0.5)
VARIANTS = (
    "merged",
    "fleet",
    "merged int8",
    "fleet int8",
    "merged openvino int8",
    "fleet openvino int8",
    "sessions",
    "LoraAdapter",
    "torch merged",
    "torch fleet",
    "PEFT",
)


@dataclass(frozen=True)
class Case:
    """Number of images in a batch, and of tasks among which they are spread evenly."""

    batch: int
    tasks: int

    def names(self) -> list[str]:
        """Task of each image."""
        return [f"t{i % self.tasks}" for i in range(self.batch)]


def tuned_model(options: argparse.Namespace, folder: Path) -> TunedModel:
    """A backbone with random weights and the method's updates; writes the weights to the folder."""
    weights = folder / "backbone.safetensors"
    if not weights.exists():
        torch.manual_seed(0)
        save_file(timm.create_model(options.model, num_classes=1).state_dict(), weights)
    model, identity = create_backbone(options.model, num_classes=CLASSES, weights=weights)
    return attach(model, options.method, backbone=identity)


def randomise(tuned: TunedModel, seed: int) -> None:
    """Replace the model's task by a random one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.trained().values():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))


def write_tasks(options: argparse.Namespace, folder: Path) -> list[Path]:
    """Checkpoints of random tasks."""
    tuned, paths = tuned_model(options, folder), []
    size = timm.get_pretrained_cfg(options.model).input_size[-1]  # type: ignore[union-attr]
    for i in range(max(2, *options.tasks)):
        randomise(tuned, i)
        paths.append(folder / f"t{i}.ckpt")
        names = [f"class {j}" for j in range(CLASSES)]
        save(tuned, paths[-1], classes=names, preprocessing=Preprocessing(size, 0.9, HALF, HALF))
    return paths


def session(path: Path | bytes, options: argparse.Namespace) -> Any:
    """An ONNX Runtime session with the requested number of threads."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = options.threads
    return onnxruntime.InferenceSession(path, settings, ["CPUExecutionProvider"])


def peft_model(options: argparse.Namespace, adapters: int) -> Any:
    """PEFT with a LoRA and a head for each task."""
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"], modules_to_save=["head"])
    base = timm.create_model(options.model, num_classes=CLASSES)
    model = peft.get_peft_model(base, config, adapter_name="t0")
    for i in range(1, adapters):
        model.add_adapter(f"t{i}", config)
    return model.eval()


def adapter_session(options: argparse.Namespace, folder: Path) -> tuple[Any, list[Any]]:
    """A graph with LoRA matrices and head as adapter inputs of ONNX Runtime, and two adapters."""
    base = peft_model(options, 1).base_model.model
    side = timm.get_pretrained_cfg(options.model).input_size[-1]  # type: ignore[union-attr]
    proto = trace(base, {"pixel_values": (torch.zeros(2, 3, side, side), "batch")}).proto
    lower(proto, ATTENTION_OPSET)
    replaced = [i for i in proto.graph.initializer if "lora" in i.name or "head" in i.name]
    for tensor in replaced:
        shape = list(tensor.dims)
        value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, shape)
        proto.graph.input.append(value)
    adapters = []
    for i in range(2):
        file, found = onnxruntime.AdapterFormat(), {}
        for tensor in replaced:
            values = np.random.default_rng(i).normal(size=list(tensor.dims)).astype(np.float32)
            found[tensor.name] = onnxruntime.OrtValue.ortvalue_from_numpy(values)
        file.set_parameters(found)
        file.export_adapter(str(folder / f"{i}.onnx_adapter"))
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(folder / f"{i}.onnx_adapter"))
        adapters.append(adapter)
    return session(proto.SerializeToString(), options), adapters


class Rivals:
    """All variants; each part is created when it is first used.

    Args:
        options: The command's.
        folder: Scratch space.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.checkpoints = write_tasks(options, folder)
        self.weights = folder / "backbone.safetensors"
        self.merged_file = self.exported("merged.onnx")
        self.adding: list[float] = []
        self.fleet = self.filled(self.exported_fleet("fleet.onnx"), self.adding)
        self.side = self.fleet.preprocessing.height
        loaded = [session(self.merged_file, options) for _ in range(2)]  # the first one warms up
        gc.collect()
        before, start = resident(), time.perf_counter()
        loaded.append(session(self.merged_file, options))
        self.session_seconds = time.perf_counter() - start
        gc.collect()
        self.session_bytes = resident() - before
        self.merged = loaded[0]
        self.task_bytes = 4 * (
            Layout(self.tuned.updates).row_length + classifier_rows(self.tuned).numel()
        )

    def exported(self, name: str, **how: Any) -> Path:
        """The first task's merged model."""
        output = self.folder / name
        return export_merged(
            self.checkpoints[0], output, backbone=BackboneSource(weights=self.weights), **how
        ).path

    def exported_fleet(self, name: str, **how: Any) -> Path:
        """A fleet of the first two tasks."""
        output = self.folder / name
        return export_fleet(
            self.checkpoints[:2], output, backbone=BackboneSource(weights=self.weights), **how
        ).path

    def filled(self, path: Path, seconds: list[float]) -> Fleet:
        """A fleet with the other tasks added; appends the time of each addition."""
        fleet = Fleet(path, threads=self.options.threads)
        for checkpoint in self.checkpoints[2:]:
            start = time.perf_counter()
            fleet.add(checkpoint)
            seconds.append(time.perf_counter() - start)
        return fleet

    @cached_property
    def noise(self) -> list[Path]:
        """Images for calibration, after one for verification."""
        folder = self.folder / "noise"
        folder.mkdir()
        rng = np.random.default_rng(0)
        paths = [folder / f"{i}.png" for i in range(1 + self.options.calibration)]
        for path in paths:
            Image.fromarray(rng.integers(0, 256, (self.side, self.side, 3), np.uint8)).save(path)
        return paths

    @property
    def in_int8(self) -> dict[str, Any]:
        """Options for an 8-bit artefact, measured for its speed and not for its answers."""
        return {"precision": "int8", "verify": VerifyOptions(self.noise[:1], min_agreement=0.0)}

    @cached_property
    def merged_int8(self) -> Any:
        """ONNX Runtime's, in 8 bits."""
        return session(self.exported("merged.int8.onnx", **self.in_int8), self.options)

    @cached_property
    def fleet_int8(self) -> Fleet:
        """ONNX Runtime's, in 8 bits."""
        return self.filled(self.exported_fleet("fleet.int8.onnx", **self.in_int8), [])

    @cached_property
    def merged_openvino(self) -> Any:
        """OpenVINO's, in 8 bits."""
        verify = VerifyOptions(self.noise[:1], self.noise[1:], min_agreement=0.0)
        how = {"to": "openvino", "precision": "int8", "verify": verify}
        path = self.exported("merged.openvino", **how)
        return load_artefact(path, EngineOptions(threads=self.options.threads))

    @cached_property
    def fleet_openvino(self) -> Fleet:
        """OpenVINO's, in 8 bits."""
        verify = VerifyOptions(self.noise[:1], self.noise[1:], min_agreement=0.0)
        how = {"to": "openvino", "precision": "int8", "verify": verify}
        return self.filled(self.exported_fleet("fleet.openvino", **how), [])

    @cached_property
    def lora(self) -> tuple[Any, list[Any]]:
        """A session and two adapters for it."""
        return adapter_session(self.options, self.folder)

    @cached_property
    def tuned(self) -> TunedModel:
        """The method on the backbone, in PyTorch."""
        return tuned_model(self.options, self.folder)

    @cached_property
    def torch_merged(self) -> Any:
        """The merged model in PyTorch."""
        return merge(self.tuned)

    @cached_property
    def torch_fleet(self) -> tuple[Any, dict[str, torch.Tensor]]:
        """The model of mixed batches in PyTorch, and its tables."""
        rows, heads, layout = [], [], Layout(self.tuned.updates)
        for i in range(max(2, *self.options.tasks)):
            randomise(self.tuned, i)
            rows.append(layout.row(self.tuned.trained()))
            heads.append(classifier_rows(self.tuned))
        tables = {
            "bank": torch.stack(rows),
            "heads": torch.cat(heads),
            "first": CLASSES * torch.arange(len(rows)),
            "count": torch.full((len(rows),), CLASSES),
            "columns": torch.arange(CLASSES),
        }
        return MixedModel(self.tuned), tables

    @cached_property
    def peft(self) -> Any:
        """PEFT, with an adapter for each task."""
        return peft_model(self.options, max(self.options.tasks))

    def variants(self, case: Case, images: NDArray[np.float32]) -> dict[str, Callable[[], Any]]:
        """The functions that run one batch, by variant."""
        names, pixels = case.names(), torch.from_numpy(images)
        task = torch.arange(case.batch) % case.tasks

        def one_by_one() -> None:
            for i in range(len(images)):
                self.merged.run(None, {"pixel_values": images[i : i + 1]})

        def switched() -> None:
            session, adapters = self.lora
            for i in range(len(images)):
                run = onnxruntime.RunOptions()
                run.add_active_adapter(adapters[i % 2])
                session.run(None, {"pixel_values": images[i : i + 1]}, run)

        def mixed_in_torch() -> None:
            model, tables = self.torch_fleet
            model(pixels, task, **tables)

        return {
            "merged": lambda: self.merged.run(None, {"pixel_values": images}),
            "fleet": lambda: self.fleet.predict(images, names),
            "merged int8": lambda: self.merged_int8.run(None, {"pixel_values": images}),
            "fleet int8": lambda: self.fleet_int8.predict(images, names),
            "merged openvino int8": lambda: self.merged_openvino.run(images),
            "fleet openvino int8": lambda: self.fleet_openvino.predict(images, names),
            "sessions": one_by_one,
            "LoraAdapter": switched,
            "torch merged": lambda: self.torch_merged(pixels),
            "torch fleet": mixed_in_torch,
            "PEFT": lambda: self.peft(pixels, adapter_names=names),
        }


def resident() -> int:
    """Resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def timed(
    rivals: Rivals, cases: list[Case], options: argparse.Namespace
) -> dict[Case, dict[str, list[float]]]:
    """Measure every variant in every case in turn; return seconds."""
    side = rivals.side
    work = []
    for case in cases:
        rng = np.random.default_rng(0)
        images = rng.normal(size=(case.batch, 3, side, side)).astype(np.float32)
        chosen = rivals.variants(case, images)
        if options.variants:
            chosen = {name: chosen[name] for name in options.variants}
        if case.tasks > 1:  # the others do not depend on the number of tasks
            fixed = ("sessions", "LoraAdapter")
            if any(c.batch == case.batch and c.tasks < case.tasks for c in cases):
                chosen = {
                    name: run
                    for name, run in chosen.items()
                    if name not in fixed and "merged" not in name
                }
        work += [(case, name, run) for name, run in chosen.items()]
    seconds: dict[Case, dict[str, list[float]]] = {case: {} for case in cases}
    with torch.inference_mode():
        for _, _, run in work:
            run()
        for turn in range(options.rounds):
            for case, name, run in work if turn % 2 == 0 else work[::-1]:
                start = time.perf_counter()
                run()
                seconds[case].setdefault(name, []).append(time.perf_counter() - start)
    return seconds


def table(seconds: dict[Case, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Medians, and each variant's throughput against its runtime's merged model."""
    rows = []
    merged = {
        (case.batch, name): times
        for case, found in seconds.items()
        for name, times in found.items()
        if "merged" in name
    }
    for case, found in seconds.items():
        for name, times in found.items():
            runtime = "torch merged" if name.startswith("torch") or name == "PEFT" else "merged"
            if "int8" in name:
                runtime = name.replace("fleet", "merged")
            limit = merged.get((case.batch, runtime))
            ratios = [a / b for a, b in zip(limit or [], times, strict=False)]
            rows.append(
                {
                    "batch": case.batch,
                    "tasks": case.tasks,
                    "variant": name,
                    "seconds": statistics.median(times),
                    "images per second": case.batch / statistics.median(times),
                    "of merged": statistics.median(ratios) if ratios else None,
                }
            )
    return rows


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--method", default="aoft-lora-star")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calibration", type=int, default=32, help="images for openvino int8")
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        rivals = Rivals(options, Path(scratch))
        cases = [Case(b, t) for b in options.batches for t in options.tasks]
        rows = table(timed(rivals, cases, options))
        size = rivals.checkpoints[0].stat().st_size
        cost = {
            "checkpoint bytes": size,
            "resident bytes of a task": rivals.task_bytes + 16,
            "seconds to add a task": statistics.median(rivals.adding or [float("nan")]),
            "resident bytes of a session": rivals.session_bytes,
            "seconds to load a session": rivals.session_seconds,
        }
    print(f"{'batch':>5}{'tasks':>6}  {'variant':21}{'seconds':>9}{'img/s':>8}{'of merged':>11}")
    for row in rows:
        ratio = f"{row['of merged']:11.3f}" if row["of merged"] else ""
        print(
            f"{row['batch']:5}{row['tasks']:6}  {row['variant']:21}{row['seconds']:9.3f}"
            f"{row['images per second']:8.2f}{ratio}"
        )
    for what, value in cost.items():
        print(f"{what}: {value:,.4g}" if value < 1 else f"{what}: {value:,.0f}")
    if options.out:
        where = {
            "machine": platform.processor() or platform.machine(),
            "threads": options.threads,
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
            "peft": peft.__version__,
            "model": options.model,
            "method": options.method,
            "rounds": options.rounds,
        }
        report = {"where": where, "cost": cost, "rows": rows}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
