"""Speed of artefacts and fleets as users load them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import Engine, EngineOptions
from aoft_deploy.artefacts.registry import exporter_names, get_exporter, load_artefact
from aoft_deploy.artefacts.spec import BuildOptions
from aoft_deploy.artefacts.timing import inputs_for
from aoft_deploy.export.merged import export_merged
from aoft_deploy.export.options import VerifyOptions
from benchmarks.gpu.answers import open_fleet
from benchmarks.gpu.artefacts import LARGE, PRECISIONS
from benchmarks.gpu.models import large, pictures, task_files
from benchmarks.gpu.run import NotMeasured, Run
from benchmarks.gpu.timing import Timing, Variant, interleaved

__all__ = ["aoti", "engines", "fleets", "note_speeds", "tensorrt"]


def engines(run: Run) -> None:
    """ONNX Runtime in every precision, plain and merged, beside its session as it comes."""
    opened: dict[str, Engine] = {}
    for kind in (kind for kind in LARGE if "fleet" not in kind):
        with run.row(f"ONNX Runtime, {kind}"):
            path = run.artefact(f"large {kind}")
            opened[f"ONNX Runtime, {kind}"] = load_artefact(path, _options(run))
    for batch in run.batches:
        variants = {name: _variant(run, engine, batch) for name, engine in opened.items()}
        for kind in ("fp32", "fp16"):
            name = f"ONNX Runtime's own session, {kind}"
            with run.row(name):
                variants[name] = _session(run, run.artefact(f"large {kind}"), batch)
        note_speeds(run, interleaved(run, variants), batch)


def _options(run: Run) -> EngineOptions:
    return EngineOptions(device=run.device)


def _variant(run: Run, engine: Engine, batch: int) -> Variant:
    """An engine's ``run``, from NumPy arrays to NumPy arrays."""
    side = ArtefactInfo(engine.info).preprocessing.height
    return Variant(partial(engine.run, *inputs_for(engine, batch, (side, side))), events=False)


def _session(run: Run, path: Path, batch: int) -> Variant:
    """A session with the provider's defaults, but without TF32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    provider: tuple[str, Mapping[str, str]] = ("CUDAExecutionProvider", {"use_tf32": "0"})
    if run.dry:
        provider = ("CPUExecutionProvider", {})
    session = onnxruntime.InferenceSession(path, options, [provider])
    feed = {"pixel_values": large(run).inputs(batch)}
    return Variant(partial(session.run, ["logits"], feed), events=False)


def note_speeds(run: Run, timings: Mapping[str, Timing], batch: int) -> None:
    """Write a row for each variant, named ``RUNTIME, WORDS``, of which one is a precision."""
    for name, timing in timings.items():
        words = name.replace(",", "").split()
        run.note(
            name,
            kind="speed",
            precision=next((word for word in words if word in PRECISIONS), None),
            batch=batch,
            ms=timing.ms,
            device_ms=timing.device_ms,
            images_per_second=1e3 * batch / (timing.device_ms or timing.ms),
        )


def fleets(run: Run) -> None:
    """A mixed batch of 64 tasks beside the merged model of one task, both as users call them."""
    model, count = large(run), 6 if run.dry else 64
    for precision in ("fp16", "fp32"):
        with run.row(f"fleet, {precision}"):
            served = open_fleet(run, f"large fleet {precision}", model, count)
            merged = load_artefact(run.artefact(f"large {precision}"), _options(run))
            for batch in run.batches:
                images = model.inputs(batch)
                tasks = [f"t{i % count}" for i in range(batch)]
                variants: dict[str, Callable[[], Any]] = {
                    f"merged, {precision}": partial(merged.run, images),
                    f"fleet of {count} tasks, {precision}": partial(served.predict, images, tasks),
                    f"fleet, one task, {precision}": partial(
                        served.predict, images, ["t0"] * batch
                    ),
                }
                timed = {name: Variant(call, events=False) for name, call in variants.items()}
                note_speeds(run, interleaved(run, timed), batch)


def tensorrt(run: Run) -> None:
    """TensorRT, where the installed one builds for this GPU."""
    _built_here(run, "tensorrt", BuildOptions(batches=(1, 32, max(run.batches))))


def aoti(run: Run) -> None:
    """PyTorch's ahead-of-time compiler."""
    _built_here(run, "aoti", BuildOptions())


def _built_here(run: Run, to: str, build: BuildOptions) -> None:
    """Export on this machine, then time."""
    if to not in exporter_names():
        raise NotMeasured(f"there is no exporter {to}")
    model = large(run)
    for precision in get_exporter(to).precisions:
        if precision not in PRECISIONS:
            continue
        name = f"{to}, {precision}"
        with run.row(name):
            images = [pictures(run, model, 16)] if precision != "fp32" else []
            calibrate = images if precision in get_exporter(to).calibrated else []
            output = run.scratch / f"large-{precision}{get_exporter(to).suffix}"
            exported = export_merged(
                task_files(run, model, 1)[0],
                output,
                to=to,
                precision=precision,
                backbone=model.source,
                verify=VerifyOptions(images, calibrate, 0.0),
                build=build,
            )
            engine = load_artefact(exported.path, _options(run))
            for batch in run.batches:
                timings = interleaved(run, {name: _variant(run, engine, batch)})
                note_speeds(run, timings, batch)
