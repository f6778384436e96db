"""More tasks than memory: the cost of a fleet's store, of its paging and of its memory.

Tasks have the size of those of a timm model: ``save`` writes their checkpoints, and ``pack`` writes
a file of --tasks of them. Then, without running the model, the script measures

* adding: a task from a checkpoint that is not in the system's cache;
* memory: the growth of the process with --resident tasks read from the packed file;
* switching: a request for a task that is in memory;
* paging: requests of one task each, whose popularity follows Zipf's law (the probability of the
  k-th most popular task is proportional to k ** -exponent), for several budgets. Popular tasks are
  in memory at the start; --warm-up requests are not counted. Every read goes to the disk: the
  system's cache is dropped after each. "best" is the hit rate of the most popular tasks alone.

The scratch folder needs the size of all tasks (18 GB at the defaults) and is removed at the end.

    python benchmarks/fleet/paging.py --out benchmarks/results/fleet_paging.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from aoft_deploy.fleet.name_index import NameIndex
from aoft_deploy.fleet.packed_tasks import PackedTasks, pack
from aoft_deploy.fleet.resident_tasks import ResidentTasks
from aoft_deploy.fleet.tables import TaskTables
from aoft_deploy.fleet.task import TaskKind, TaskParameters, read_task


class Generated:
    """Copies of one task, each with its number at both ends of its row and classifier."""

    def __init__(self, kind: TaskKind, task: TaskParameters, count: int) -> None:
        self.kind, self.task = kind, task
        self.names = NameIndex.of(f"task-{i:06}" for i in range(count))

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(self, name: str) -> TaskParameters:
        """Parameters of a task, for the protocol ``TaskStore``."""
        row, head = self.task.row.copy(), self.task.head.copy()
        row[[0, -1]] = head[[0, -1], [0, -1]] = int(name[5:])
        return TaskParameters(row, head, self.task.classes)


class FromDisk(PackedTasks):
    """A packed file that the system does not keep in its cache."""

    def read(self, name: str) -> TaskParameters:
        """Parameters of a task, read from the disk."""
        task = super().read(name)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        return task


def checkpoints(model: str, classes: int, folder: Path, count: int) -> tuple[list[Path], TaskKind]:
    """Checkpoints of random tasks on a timm model with random weights, and their kind."""
    import timm
    import torch

    from aoft_deploy.checkpoints.checkpoint import save
    from aoft_deploy.data.preprocessing import Preprocessing
    from aoft_deploy.tuning.attaching import attach
    from aoft_deploy.tuning.backbones.identity import Backbone
    from aoft_deploy.tuning.task_layout import Layout

    module = timm.create_model(model, num_classes=classes)
    identity = Backbone(model, digest="d" * 64, origin="timm", args={})
    tuned = attach(module, "aoft-lora-star", backbone=identity)
    preprocessing = Preprocessing.from_timm(timm.data.resolve_model_data_config(module))
    paths = []
    for i in range(count):
        with torch.no_grad():
            for parameter in tuned.trained().values():
                parameter.copy_(torch.randn_like(parameter))
        paths.append(folder / f"task{i}.ckpt")
        save(tuned, paths[-1], classes=range(classes), preprocessing=preprocessing)  # type: ignore
    order, width = tuple(Layout(tuned.updates).order()), tuned.backbone.num_features
    described = json.loads(json.dumps([tuned.settings, preprocessing.to_dict()]))
    return paths, TaskKind("d" * 64, tuned.method, *described, order, width)  # type: ignore


def milliseconds(times: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(times, [50, 99]).tolist()
    return {"p50": 1e3 * p50, "p99": 1e3 * p99, "max": 1e3 * max(times)}


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def adding(paths: list[Path], kind: TaskKind) -> dict[str, float]:
    tasks = ResidentTasks(TaskTables(kind.row_length, kind.width, 2**30))
    times = []
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        times.append(timed(lambda p=path: tasks.add(p.stem, read_task(p, kind))))
    return milliseconds(times)


def holding(tasks: ResidentTasks, tables: TaskTables, name: str) -> float:
    """Hold a task, and check that its parameters are its own; return the seconds until then."""
    start = time.perf_counter()
    with tasks.holding([name]) as slots:
        seconds = time.perf_counter() - start
        slot = slots[name].slot
        row, first = tables.bank[slot], int(tables.first[slot])
        head = tables.heads[first : first + int(tables.count[slot])]
        assert {row[0], row[-1], head[0, 0], head[-1, -1]} == {float(name[5:])}
    return seconds


def memory_and_switching(
    store: PackedTasks, count: int, requests: int, checkpoint: int
) -> dict[str, Any]:
    kind = store.kind
    before = resident_bytes()
    tables = TaskTables(kind.row_length, kind.width, 2**36)
    tasks = ResidentTasks(tables, store)
    for i in range(count):
        holding(tasks, tables, store.names[i])
    grown = resident_bytes() - before
    chosen = np.random.default_rng(0).integers(0, count, requests)
    times = [holding(tasks, tables, store.names[i]) for i in chosen.tolist()]
    assert tasks.residency.hits == requests
    return {
        "tasks": count,
        "bytes": grown,
        "bytes_per_task_over_checkpoint": grown / count / checkpoint,
        "switching_ms": milliseconds(times),
    }


def paging(
    store: PackedTasks, exponent: float, budget: int, warm_up: int, requests: int
) -> dict[str, Any]:
    kind, count = store.kind, len(store.names)
    tables = TaskTables(kind.row_length, kind.width, budget)
    tasks = ResidentTasks(tables, store)
    rng = np.random.default_rng(1)
    weights = np.arange(1, count + 1) ** -exponent
    weights /= weights.sum()
    order = rng.permutation(count)
    with_room = min(budget // tables.size(len(store.read(store.names[0]).classes)), count)
    for i in order[:with_room][::-1].tolist():
        holding(tasks, tables, store.names[i])
    asked = order[np.searchsorted(weights.cumsum(), rng.random(warm_up + requests))].tolist()
    for i in asked[:warm_up]:
        holding(tasks, tables, store.names[i])
    start, memory, times, missed = tasks.residency, resident_bytes(), [], []
    for i in asked[warm_up:]:
        misses = tasks.residency.misses
        times.append(holding(tasks, tables, store.names[i]))
        if tasks.residency.misses > misses:
            missed.append(times[-1])
    end = tasks.residency
    return {
        "exponent": exponent,
        "budget": budget,
        "tasks_in_memory": end.tasks,
        "hit_rate": (end.hits - start.hits) / requests,
        "best": float(weights[:with_room].sum()),
        "evictions": end.evictions - start.evictions,
        "request_ms": milliseconds(times),
        "miss_ms": milliseconds(missed) if missed else None,
        "mean_ms": 1e3 * float(np.mean(times)),
        "growth_bytes": resident_bytes() - memory,
    }


def measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    paths, kind = checkpoints(options.model, options.classes, folder, options.checkpoints)
    size, task = paths[0].stat().st_size, read_task(paths[0], kind)
    needed, free = options.tasks * size, shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        sys.exit(
            f"{options.tasks} tasks take {needed / 1e9:.1f} GB, but {folder} has "
            f"{free / 1e9:.1f} GB free: give a smaller --tasks, or another --scratch."
        )
    result: dict[str, Any] = {"checkpoint_bytes": size, "adding_ms": adding(paths, kind)}
    print(f"adding from disk, ms: {result['adding_ms']}", flush=True)
    packed = folder / "tasks.pack"
    generated = Generated(kind, task, options.tasks)
    result["packing_seconds"] = timed(lambda: pack(generated, packed))
    before = resident_bytes()
    opening = [timed(lambda: PackedTasks(packed, kind)) for _ in range(5)]
    store = FromDisk(packed, kind)
    result["opening"] = {
        "seconds": sorted(opening)[2],
        "bytes": resident_bytes() - before,
        "unknown_name_seconds": timed(lambda: store.names.closest("task-0314")),
    }
    print(f"packing {result['packing_seconds']:.0f} s, opening {result['opening']}", flush=True)
    found = memory_and_switching(store, options.resident, options.requests, size)
    result["memory"] = found
    print(f"memory: {found}", flush=True)
    print(f"{'exponent':>8}{'budget':>9}{'tasks':>8}{'hits':>8}{'best':>8}"
          f"{'p50 ms':>9}{'p99 ms':>9}{'miss p50':>9}{'p99':>8}{'mean':>8}")  # fmt: skip
    result["paging"] = []
    for exponent in options.exponents:
        for gigabytes in options.budgets:
            row = paging(store, exponent, int(1e9 * gigabytes), options.warm_up, options.requests)
            result["paging"].append(row)
            miss = row["miss_ms"] or {"p50": 0.0, "p99": 0.0}
            print(f"{exponent:8.1f}{gigabytes:6.2f} GB{row['tasks_in_memory']:8}"
                  f"{row['hit_rate']:8.3f}{row['best']:8.3f}{row['request_ms']['p50']:9.3f}"
                  f"{row['request_ms']['p99']:9.2f}{miss['p50']:9.2f}{miss['p99']:8.2f}"
                  f"{row['mean_ms']:8.2f}", flush=True)  # fmt: skip
    return result


def main() -> None:
    """Measure, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--resident", type=int, default=10_000)
    parser.add_argument("--checkpoints", type=int, default=200)
    parser.add_argument("--exponents", type=float, nargs="+", default=[0.8, 1.0, 1.2])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 1, 3], metavar="GB")
    parser.add_argument("--warm-up", type=int, default=5000)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--scratch", type=Path, help="where the tasks may lie for the time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        result = measured(options, Path(folder))
    if options.out:
        report = {
            "command": "python benchmarks/fleet/paging.py " + " ".join(sys.argv[1:]),
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "cores": psutil.cpu_count(logical=False),
                "memory": psutil.virtual_memory().total,
                "python": platform.python_version(),
                "numpy": np.__version__,
            },
            **result,
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
