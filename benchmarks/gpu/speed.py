"""Speed of artefacts and fleets as users load them, beside ONNX Runtime alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import Engine, EngineOptions
from aoft_deploy.artefacts.registry import exporter_names, get_exporter, load_artefact
from aoft_deploy.artefacts.spec import BuildOptions
from aoft_deploy.artefacts.timing import inputs_for
from aoft_deploy.errors import SettingError
from aoft_deploy.export.merged import export_merged
from aoft_deploy.texts import one_line
from benchmarks.gpu.answers import open_fleet
from benchmarks.gpu.artefacts import LARGE, PRECISIONS, verification
from benchmarks.gpu.models import CLASSES, large, pictures, task_files
from benchmarks.gpu.run import NotMeasured, Run
from benchmarks.gpu.timing import Subject, Variant, note_speeds

__all__ = ["aoti", "engines", "fleets", "onnxruntime_alone", "tensorrt"]


def engines(run: Run) -> None:
    """Artefacts in every precision, plain and merged, from NumPy arrays to NumPy arrays."""
    opened: dict[Subject, Engine] = {}
    for kind in (kind for kind in LARGE if "fleet" not in kind):
        with run.row(f"ONNX Runtime, {kind}"):
            path = run.artefact(f"large {kind}")
            opened[_subject("ONNX Runtime", kind)] = load_artefact(path, _options(run))
    for batch in run.batches:
        note_speeds(run, batch, {who: _variant(engine, batch) for who, engine in opened.items()})


def onnxruntime_alone(run: Run) -> None:
    """The same files in ONNX Runtime without this project.

    Once from NumPy arrays, and once with buffers on the GPU and recorded as a CUDA graph.
    """
    for precision in PRECISIONS:
        with run.row(f"ONNX Runtime alone, {precision}"):
            path = run.artefact(f"large {precision}")
            for batch in run.batches:
                variants = {
                    Subject("ONNX Runtime alone", "merged", precision): _session(run, path, batch),
                    Subject("ONNX Runtime alone", "merged", precision, "GPU"): _recorded(
                        run, path, batch
                    ),
                }
                note_speeds(run, batch, variants)


def _subject(runtime: str, kind: str) -> Subject:
    words = kind.split()
    precision = next(word for word in words if word in PRECISIONS)
    images = "NumPy uint8" if "uint8" in words else "NumPy"
    return Subject(runtime, "plain" if "plain" in words else "merged", precision, images)


def _options(run: Run) -> EngineOptions:
    return EngineOptions(device=run.device)


def _variant(engine: Engine, batch: int) -> Variant:
    """An engine's ``run``, and its own measurement of the GPU's time if it has one."""
    side = ArtefactInfo(engine.info).preprocessing.height
    inputs = inputs_for(engine, batch, (side, side))
    measure = getattr(engine, "device_seconds", None)
    on_device = None if measure is None else partial(measure, *inputs)
    return Variant(partial(engine.run, *inputs), on_device, events=False)


def _opened(run: Run, path: Path, **options: str) -> Any:
    """A session of ONNX Runtime on the device."""
    onnxruntime: Any = import_module("onnxruntime")

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.enable_mem_pattern = "enable_cuda_graph" not in options
    chosen = ("CPUExecutionProvider", {}) if run.dry else ("CUDAExecutionProvider", options)
    try:
        session = onnxruntime.InferenceSession(path, settings, [chosen], enable_fallback=0)
    except Exception as error:  # ONNX Runtime raises its own classes, all Exception
        if run.dry:
            raise NotMeasured(f"a CPU does not run it ({one_line(error, 120)})") from error
        raise
    if session.get_providers()[0] != chosen[0]:  # it falls back to the CPU by itself
        raise RuntimeError(f"ONNX Runtime did not start {chosen[0]}: see log.txt")
    return session


def _tf32(path: Path) -> dict[str, str]:
    return {"use_tf32": str(int("tf32" in path.name))}


def _session(run: Run, path: Path, batch: int) -> Variant:
    session = _opened(run, path, **_tf32(path))
    feed = {"pixel_values": large(run).inputs(batch)}
    return Variant(partial(session.run, ["logits"], feed), events=False)


def _recorded(run: Run, path: Path, batch: int) -> Variant:
    """Every run waits for the GPU, so the clock gives the GPU's time and a launch."""
    onnxruntime: Any = import_module("onnxruntime")

    search = {"cudnn_conv_algo_search": "HEURISTIC", "enable_cuda_graph": "1"}
    session = _opened(run, path, **search, **_tf32(path))
    kind = "cpu" if run.dry else "cuda"
    binding = session.io_binding()
    images = onnxruntime.OrtValue.ortvalue_from_numpy(large(run).inputs(batch), kind, 0)
    logits = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
        [batch, CLASSES], np.float32, kind, 0
    )
    binding.bind_ortvalue_input("pixel_values", images)
    binding.bind_ortvalue_output("logits", logits)
    return Variant(partial(session.run_with_iobinding, binding), events=False)


def fleets(run: Run) -> None:
    """A mixed batch of 64 tasks beside the merged model of one task, both as users call them."""
    model, count = large(run), 6 if run.dry else 64
    for precision in ("fp16", "fp32"):
        with run.row(f"fleet, {precision}"):
            served = open_fleet(run, f"large fleet {precision}", model, count)
            merged = load_artefact(run.artefact(f"large {precision}"), _options(run))
            for batch in run.batches:
                images = model.inputs(batch)
                calls: dict[str, Callable[[], object]] = {
                    "merged": partial(merged.run, images),
                    "1 task": partial(served.predict, images, ["t0"] * batch),
                    f"{count} tasks": partial(
                        served.predict, images, [f"t{i % count}" for i in range(batch)]
                    ),
                }
                variants = {
                    Subject("fleet", name, precision): Variant(call, events=False)
                    for name, call in calls.items()
                }
                note_speeds(run, batch, variants)


def tensorrt(run: Run) -> None:
    """TensorRT, where the installed one builds for this GPU."""
    _built_here(
        run, "tensorrt", BuildOptions(batches=(1, min(32, run.batches[-1]), run.batches[-1]))
    )


def aoti(run: Run) -> None:
    """PyTorch's ahead-of-time compiler."""
    _built_here(run, "aoti", BuildOptions())


def _built_here(run: Run, to: str, build: BuildOptions) -> None:
    """Export on this machine, the fastest precisions first, then time."""
    if to not in exporter_names():
        raise NotMeasured(f"there is no exporter {to}")
    model, exporter = large(run), get_exporter(to)
    images, others = pictures(run, model), pictures(run, model, seed=2)
    able = [each for each in ("bf16", "fp16", "fp8", "tf32", "fp32") if each in exporter.precisions]
    for precision in able[-1:] if run.dry else able:
        with run.row(f"{to}, {precision}"):
            if run.left < 30:
                raise NotMeasured("no time was left to build it")
            try:
                exported = export_merged(
                    task_files(run, model, 1)[0],
                    run.scratch / f"large-{precision}{exporter.suffix}",
                    to=to,
                    precision=precision,
                    backbone=model.source,
                    verify=verification(to, precision, images, others),
                    build=build,
                )
            except SettingError as reason:  # the library does not serve this GPU
                raise NotMeasured(str(reason)) from reason
            engine = load_artefact(exported.path, _options(run))
            for batch in run.batches:
                note_speeds(run, batch, {Subject(to, "merged", precision): _variant(engine, batch)})
