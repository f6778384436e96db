"""A fleet under stress: threads check every answer while tasks are added, removed and paged.

On a small backbone, the answers of the merged model of each of --tasks tasks are computed first.
Then --threads threads send batches of --batch samples with tasks drawn at random from a packed
file, with a budget for a tenth of them, while one thread adds, removes and replaces tasks. An
answer is right if it is within 1e-4 of the answer of the merged model of a task that had the name
at some moment of the request. A request is lost if it gets no answer, or if a name that existed
during the whole request is reported as unknown. The output: wrong answers, lost requests, pagings,
and the memory of the process after half of the time and at the end.

    python benchmarks/fleet/stress.py --requests 100000
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import timm
import torch
from safetensors.torch import save_file

import aoft_deploy.tuning.backbones.bundled  # noqa: F401  (registers aoft_vit_nano with timm)
from aoft_deploy import attach, create_backbone, merge, save
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import UnknownNameError
from aoft_deploy.export.fleet import export_fleet
from aoft_deploy.fleet.checkpoint_folder import CheckpointFolder
from aoft_deploy.fleet.fleet import Fleet
from aoft_deploy.fleet.packed_tasks import pack

SMALL: dict[str, Any] = {"img_size": 16, "depth": 1, "embed_dim": 32, "num_heads": 2}
HALF = (0.5, 0.5, 0.5)


def prepared(folder: Path, count: int, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Write tasks of two to nine classes; return the merged models' answers, (images, classes)."""
    weights, answers = folder / "backbone.safetensors", {}
    save_file(timm.create_model("aoft_vit_nano", num_classes=0, **SMALL).state_dict(), weights)
    for i in range(count):
        classes = 2 + i % 8
        model, identity = create_backbone(
            "aoft_vit_nano", num_classes=classes, weights=weights, **SMALL
        )
        tuned = attach(model, "aoft-lora-star", backbone=identity)
        with torch.no_grad():
            for parameter in tuned.trained().values():
                parameter.add_(0.2 * torch.randn_like(parameter))
        names = [f"c{j}" for j in range(classes)]
        path = folder / "tasks" / f"task-{i:03}.ckpt"
        save(tuned, path, classes=names, preprocessing=Preprocessing(16, 1.0, HALF, HALF))
        with torch.inference_mode():
            answers[path.stem] = merge(tuned)(images).numpy()
    export_fleet(
        [folder / "tasks" / "task-000.ckpt"],
        folder / "fleet.onnx",
        backbone=BackboneSource(weights=weights),
    )
    return answers


class Meaning(NamedTuple):
    """A name's task: certainly between ``seen`` and ``going``, possibly shortly before or after."""

    task: str
    begin: float
    seen: float = math.inf
    going: float = math.inf
    end: float = math.inf


class Stress:
    """Concurrent requests and changes, and their results."""

    def __init__(
        self, fleet: Fleet, answers: dict[str, np.ndarray], images: np.ndarray, folder: Path
    ) -> None:
        self.fleet, self.answers, self.images, self.folder = fleet, answers, images, folder
        self.names, self.given = list(answers), [f"given-{i}" for i in range(4)]
        self.meant: dict[str, list[Meaning]] = {name: [] for name in self.given}
        self.counts: Counter[str] = Counter()
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.memory: list[int] = []

    def change(self) -> None:
        """Add and remove tasks; each name gets another task's parameters every time."""
        rng = np.random.default_rng(7)
        while not self.stop.is_set():
            name, task = str(rng.choice(self.given)), str(rng.choice(self.names))
            spans = self.meant[name]
            if spans and spans[-1].end == math.inf:
                spans[-1] = spans[-1]._replace(going=time.monotonic())
                self.fleet.remove(name)
                spans[-1] = spans[-1]._replace(end=time.monotonic())
            else:
                del spans[:-50]
                spans.append(Meaning(task, time.monotonic()))
                self.fleet.add(self.folder / f"{task}.ckpt", name)
                spans[-1] = spans[-1]._replace(seen=time.monotonic())
            self.counts["changes"] += 1

    def ask(self, worker: int, requests: int, batch: int) -> None:
        """Send requests and check their answers."""
        rng, found = np.random.default_rng(worker), Counter[str]()
        for turn in range(requests):
            names = rng.choice(self.names, batch).tolist()
            if turn % 2:
                names[-1] = str(rng.choice(self.given))
            chosen = rng.integers(0, len(self.images), batch)
            start = time.monotonic()
            try:
                answers = self.fleet.predict(self.images[chosen], names)
            except UnknownNameError:
                found["unknown"] += 1
                end = time.monotonic()
                found["lost"] += any(
                    span.seen <= start and span.going >= end
                    for span in list(self.meant.get(names[-1], []))
                )
                names[-1] = names[0]
                answers = self.fleet.predict(self.images[chosen], names)
            end = time.monotonic()
            for answer, name, image in zip(answers, names, chosen.tolist(), strict=True):
                found["wrong"] += not self.right(answer.logits, name, image, start, end)
                found["checked"] += 1
            found["served"] += 1
            if worker == 0 and turn % max(requests // 20, 1) == 0:
                self.memory.append(psutil.Process().memory_info().rss)
        with self.lock:
            self.counts.update(found)

    def right(self, answer: np.ndarray, name: str, image: int, start: float, end: float) -> bool:
        """Whether an answer is that of a task which had the name at some moment of the request."""
        spans = list(self.meant.get(name, [Meaning(name, start)]))
        options = [span.task for span in spans if span.begin <= end and span.end >= start]
        own = (self.answers[task][image] for task in options)
        return any(a.shape == answer.shape and np.abs(a - answer).max() < 1e-4 for a in own)


def main() -> None:
    """Run, print the results, and exit with 1 if an answer was wrong or a request was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--batch", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(16, 3, 16, 16)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        answers = prepared(folder, options.tasks, images)
        kind = Fleet(folder / "fleet.onnx").kind
        pack(CheckpointFolder(folder / "tasks", kind), folder / "tasks.pack")
        budget = (folder / "tasks.pack").stat().st_size // 10
        fleet = Fleet(folder / "fleet.onnx", store=folder / "tasks.pack", budget=budget, threads=1)
        stress = Stress(fleet, answers, images.numpy(), folder / "tasks")
        each, start = options.requests // options.threads, time.perf_counter()
        changer = threading.Thread(target=stress.change)
        changer.start()
        workers = [
            threading.Thread(target=stress.ask, args=(i, each, options.batch))
            for i in range(options.threads)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        stress.stop.set()
        changer.join()
    half = len(stress.memory) // 2
    result = {
        "command": "python benchmarks/fleet/stress.py " + " ".join(sys.argv[1:]),
        "seconds": time.perf_counter() - start,
        "requests": each * options.threads,
        **{
            key: stress.counts[key]
            for key in ("served", "checked", "wrong", "lost", "unknown", "changes")
        },
        **vars(fleet.residency),
        "memory_first_half": max(stress.memory[1:half]),
        "memory_second_half": max(stress.memory[half:]),
    }
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    lost = result["lost"] + result["requests"] - result["served"]
    sys.exit(int(result["wrong"] > 0 or lost > 0))


if __name__ == "__main__":
    main()
