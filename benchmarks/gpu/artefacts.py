"""The artefacts that the steps need, exported on the CPU and verified as for any user."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aoft_deploy.artefacts.registry import get_exporter
from aoft_deploy.artefacts.spec import BuildOptions
from aoft_deploy.cli.train import main as train_main
from aoft_deploy.data.synthetic import load_task
from aoft_deploy.export.fleet import export_fleet
from aoft_deploy.export.merged import export_merged
from aoft_deploy.export.options import VerifyOptions
from aoft_deploy.export.publishing import Exported
from aoft_deploy.texts import one_line
from benchmarks.gpu.models import METHOD, Model, large, pictures, small, task_files
from benchmarks.gpu.run import NotMeasured, Run

__all__ = [
    "LARGE",
    "SMALL",
    "TRAINED",
    "checkpoint",
    "digits",
    "export_all",
    "train_on_digits",
    "training_words",
    "verification",
]

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "fp8")
SMALL = ("fp32", "fleet fp32", "fp32 uint8", "fp32 opset20")
TRAINED = PRECISIONS
LARGE = (*("plain fp16", "fleet fp16"), *PRECISIONS, "fp16 uint8", "fleet fp32")
"""Kinds of artefacts of each model: the small one with random updates and trained on digits, whose
decisions can agree, and the large one. ``plain`` is a linear probe, the backbone as it is."""

STORED_TASKS = 2
"""Tasks in a fleet's file; the others are added to the running fleet."""


def export_all(run: Run) -> None:
    """Export every artefact, those for the first steps first."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the GPU is measured meanwhile
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[len(cores) // 2 :])
    for name in _names():
        if run.has_artefact(name):
            continue
        start = time.time()
        with run.row(name):
            try:
                exported = _export(run, name)
            except Exception as error:
                run.publish(name, {"reason": one_line(error, 300)})
                raise
            run.publish(name, {"path": exported.path})
            run.note(
                name,
                seconds=round(time.time() - start, 1),
                bytes=exported.size,
                verified=exported.arithmetic,
                max_abs=exported.report.max_abs,
                agreement=exported.report.agreement,
                left_in_float=len(exported.left_in_float),
            )


def _names() -> Iterator[str]:
    for model, kinds in (("small", SMALL), ("digits", TRAINED), ("large", LARGE)):
        yield from (f"{model} {kind}" for kind in kinds)


def checkpoint(run: Run, name: str) -> tuple[Path, Model]:
    """The checkpoint of an artefact that is no fleet, and its backbone."""
    size, *words = name.split()
    if size == "digits":
        return train_on_digits(run), small(run)
    model = large(run) if size == "large" else small(run)
    return task_files(run, model, 1, "linear" if "plain" in words else METHOD)[0], model


def _export(run: Run, name: str) -> Exported:
    words = name.split()
    precision = next(word for word in words if word in PRECISIONS)
    known = get_exporter("onnx").precisions
    if precision not in known:
        raise NotMeasured(f"--to onnx has no {precision}, but {', '.join(known)}")
    if "fleet" in words:
        model = large(run) if words[0] == "large" else small(run)
        paths = task_files(run, model, STORED_TASKS)
        tasks = {f"t{i}": path for i, path in enumerate(paths)}
        options = _options(run, model, name, precision)
        return export_fleet(tasks, form="mixed", **options)
    path, model = checkpoint(run, name)
    options = _options(run, model, name, precision)
    return export_merged(path, uint8="uint8" in words, **options)


def _options(run: Run, model: Model, name: str, precision: str) -> dict[str, Any]:
    is_trained = name.startswith("digits")
    images, others = pictures(run, model), pictures(run, model, seed=2)
    if is_trained:
        images, others = digits(run) / "test", digits(run) / "val"
    return {
        "output": run.scratch / f"{name.replace(' ', '-')}.onnx",
        "precision": precision,
        "backbone": model.source,
        "verify": verification("onnx", precision, images, others),
        "build": BuildOptions(opset=20 if "opset20" in name else None),
    }


def verification(to: str, precision: str, images: Path, others: Path) -> VerifyOptions:
    """Images to verify with and others to calibrate with, where the exporter needs them."""
    return VerifyOptions(
        images=[images] if precision != "fp32" else [],
        calibrate=[others] if precision in get_exporter(to).calibrated else [],
        min_agreement=0.0,  # it is a figure here, not a gate
    )


def digits(run: Run) -> Path:
    """A folder of scanned digits with the parts train, val and test."""
    folder = run.scratch / "digits"
    if not folder.exists():
        draft = run.scratch / f"digits-{os.getpid()}"
        counts = (40, 20, 20) if run.dry else (1000, 200, 400)
        parts = load_task("digits", train=counts[0], val=counts[1], test=counts[2]).parts()
        for part, images in parts.items():
            for i, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
                path = draft / part / str(label) / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.asarray(image)).save(path)
        draft.rename(folder)
    return folder


def train_on_digits(run: Run) -> Path:
    """The checkpoint of the small model, trained on digits on the CPU."""
    path = run.scratch / "digits-run"
    if not (path / "model.ckpt").exists():
        code = train_main(training_words(run, path))
        if code:
            raise NotMeasured(f"aoft-train ended with {code}")
    return path / "model.ckpt"


def training_words(run: Run, out: Path) -> Sequence[str]:
    """The arguments of aoft-train for the small model on digits."""
    model = small(run)
    words = ["--data", digits(run), "--out", out, "--backbone", model.name, "--quiet"]
    words += ["--backbone-weights", model.weights] if model.weights else []
    words += ["--import", "benchmarks.gpu.models", "--method", METHOD, "--batch-size", "32"]
    return [*map(str, words), "--epochs", "1" if run.dry else "5"]
