"""Answers on the device: artefacts, fleets and lanes against the unmerged models in float64."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import Engine, EngineOptions
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.artefacts.spec import InputSpec
from aoft_deploy.checkpoints.opening import load
from aoft_deploy.fleet.fleet import Fleet
from benchmarks.gpu.artefacts import LARGE, SMALL, TRAINED, checkpoint, digits
from benchmarks.gpu.models import METHOD, Model, attached, exact, large, small, task_files
from benchmarks.gpu.run import Run

__all__ = ["ALLOWED", "fleet", "lanes", "parity"]

ALLOWED = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 2e-2, "bf16": 0.1, "fp8": 0.3}
"""Largest difference of two logits, for logits up to 1; it scales with the largest logit above."""

AGREEMENT = 0.99
"""Smallest share of test images of the trained model with the same top class."""


def parity(run: Run) -> None:
    """Every artefact gives the unmerged model's answers, and its nodes run on the device."""
    for size, kinds in (("small", SMALL), ("digits", TRAINED), ("large", LARGE)):
        for kind in (kind for kind in kinds if "fleet" not in kind):
            with run.row(f"{size} {kind}"):
                _compare(run, f"{size} {kind}")


def _compare(run: Run, name: str) -> None:
    engine = load_artefact(run.artefact(name), EngineOptions(device=run.device))
    path, model = checkpoint(run, name)
    tuned = load(path, weights=model.weights)
    is_trained = name.startswith("digits")
    pixels = _test_images(run, tuned.preprocessing) if is_trained else model.pixels(8)
    spec = InputSpec.of(tuned.preprocessing, engine.takes_pixels)
    normal = InputSpec.of(tuned.preprocessing)
    expected = exact(tuned, normal.prepare(pixels), run.device)
    error, limit = 0.0, ALLOWED[ArtefactInfo(engine.info).precision]
    for batch in (1, 3, 8):
        answers = _in_batches(engine, spec.prepare(pixels), batch if not is_trained else 32)
        error = max(error, _error(answers, expected))
    agreement = float((answers.argmax(1) == expected.argmax(1)).mean())
    run.note(
        name,
        kind="parity",
        error=error,
        allowed=limit,
        passed=error <= limit and (agreement >= AGREEMENT or not is_trained),
        agreement=agreement if is_trained else None,
        images=len(pixels),
        device=engine.device,
        placement=json.loads(engine.info.get("placement", "null")),
    )


def _test_images(run: Run, preprocessing: Any) -> NDArray[np.uint8]:
    files = sorted((digits(run) / "test").glob("*/*.png"))
    return np.stack([preprocessing.pixels(Image.open(file)) for file in files])


def _in_batches(engine: Engine, inputs: NDArray[Any], batch: int) -> NDArray[np.float32]:
    pieces = [engine.run(inputs[i : i + batch]) for i in range(0, len(inputs), batch)]
    return np.concatenate(pieces)


def _error(answers: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest difference, relative to the largest logit if that is above 1."""
    return float(np.abs(answers - expected).max() / max(1.0, np.abs(expected).max()))


def fleet(run: Run) -> None:
    """A mixed batch of 64 tasks gives each task's answers, also after tasks were replaced."""
    for name in ("small fleet fp32", "large fleet fp32", "large fleet fp16"):
        with run.row(name):
            model = large(run) if name.startswith("large") else small(run)
            _compare_fleet(run, name, model, checked=8 if name.startswith("large") else 64)


def _compare_fleet(run: Run, name: str, model: Model, checked: int) -> None:
    count = 6 if run.dry else 64
    files = task_files(run, model, count)
    served = open_fleet(run, name, model, count)
    names = [f"t{i}" for i in range(count)]
    images = model.inputs(count)
    answers = served.predict(images, names)
    chosen = range(0, count, max(1, count // checked))
    expected = _each_by_its_task(run, model, files, images, chosen)
    got = np.stack([answers[i].logits for i in chosen])
    served.add(files[1], "t2", replace=True)
    served.remove("t3")
    again = served.predict(images[2:3], ["t2"])[0].logits
    other = _each_by_its_task(run, model, files[1:2], images[2:3], [0])
    error = max(_error(got, expected), _error(again[None], other))
    limit = ALLOWED[name.split()[-1]]
    row = f"{name}, {count} tasks in one batch"
    passed = error <= limit and "t3" not in served
    run.note(row, kind="parity", error=error, allowed=limit, passed=passed, compared=len(chosen))


def open_fleet(run: Run, name: str, model: Model, count: int) -> Fleet:
    """A running fleet of this many tasks, all but those of its file added live."""
    served = Fleet(run.artefact(name), device=run.device)
    for i, file in enumerate(task_files(run, model, count)):
        if f"t{i}" not in served:
            served.add(file, f"t{i}")
    return served


def _each_by_its_task(
    run: Run,
    model: Model,
    files: Sequence[Any],
    images: NDArray[np.float32],
    chosen: Sequence[int],
) -> NDArray[np.float64]:
    """Logits of each chosen image by the unmerged model of the task at its position."""
    from aoft_deploy.checkpoints.checkpoint import read_checkpoint

    tuned, rows = attached(model, METHOD), []
    for i in chosen:
        tuned.load_trained(read_checkpoint(files[i]).tensors)
        rows.append(exact(tuned, images[i : i + 1], run.device)[0])
    return np.stack(rows)


def lanes(run: Run) -> None:
    """Sixteen threads on one engine get the answers that each batch has alone."""
    model = small(run)
    batches = [model.inputs(1 + i % 8, seed=i) for i in range(16)]
    path = run.artefact("small fp32")
    for count in (1, 2, 4):
        with run.row(f"{count} lanes"):
            engine = load_artefact(path, EngineOptions(device=run.device, lanes=count))
            alone = [engine.run(batch) for batch in batches]
            start = time.perf_counter()
            with ThreadPoolExecutor(16) as pool:
                together = list(pool.map(engine.run, batches * (1 if run.dry else 16)))
            seconds = time.perf_counter() - start
            error = max(_error(one, alone[i % 16]) for i, one in enumerate(together))
            images = sum(len(one) for one in together)
            run.note(
                f"{count} lanes",
                kind="parity",
                error=error,
                allowed=ALLOWED["fp32"],
                passed=error <= ALLOWED["fp32"],
                images_per_second=images / seconds,
                batches=len(together),
            )
