"""The tasks of VTAB-1k and FGVC: groups, class counts and sizes. Light to import."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aoft_deploy.errors import UnknownNameError

if TYPE_CHECKING:
    from aoft_deploy.data.splits import Splits

__all__ = ["BENCHMARKS", "FGVC", "VTAB", "Benchmark", "BenchmarkTask", "deviations", "find_task"]


@dataclass(frozen=True)
class BenchmarkTask:
    """One data set of a benchmark.

    Attributes:
        name: Name of its folder.
        group: Group in which it is averaged.
        classes: Number of classes.
        train: Number of training images while settings are chosen.
        val: Number of validation images, which settings are chosen by.
        test: Number of test images.
    """

    name: str
    group: str
    classes: int
    train: int
    val: int
    test: int


@dataclass(frozen=True)
class Benchmark:
    """A set of tasks over which results are averaged.

    Attributes:
        name: Name in commands, such as ``vtab``.
        title: Name in papers, such as ``VTAB-1k``.
        tasks: The tasks, in the order of the columns in papers.
    """

    name: str
    title: str
    tasks: tuple[BenchmarkTask, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the tasks' groups, in the order of the tasks."""
        return tuple(dict.fromkeys(task.group for task in self.tasks))

    def task(self, name: str) -> BenchmarkTask:
        """The task called ``name``.

        Raises:
            UnknownNameError: The benchmark has no such task.
        """
        tasks = {task.name: task for task in self.tasks}
        if name not in tasks:
            raise UnknownNameError(f"task of {self.name}", name, tasks)
        return tasks[name]

    def chosen(self, names: Iterable[str] | None) -> tuple[BenchmarkTask, ...]:
        """The tasks with these names, in the order of the benchmark; None for all.

        Raises:
            UnknownNameError: The benchmark has no such task.
        """
        if names is None:
            return self.tasks
        wanted = {self.task(name) for name in names}
        return tuple(task for task in self.tasks if task in wanted)


def _vtab(name: str, group: str, classes: int, test: int) -> BenchmarkTask:
    return BenchmarkTask(name, group, classes, train=800, val=200, test=test)


VTAB = Benchmark(
    "vtab",
    "VTAB-1k",
    (
        _vtab("cifar", "natural", 100, 10000),
        _vtab("caltech101", "natural", 102, 6084),
        _vtab("dtd", "natural", 47, 1880),
        _vtab("oxford_flowers102", "natural", 102, 6149),
        _vtab("oxford_iiit_pet", "natural", 37, 3669),
        _vtab("svhn", "natural", 10, 26032),
        _vtab("sun397", "natural", 397, 21750),
        _vtab("patch_camelyon", "specialized", 2, 32768),
        _vtab("eurosat", "specialized", 10, 5400),
        _vtab("resisc45", "specialized", 45, 6300),
        _vtab("diabetic_retinopathy", "specialized", 5, 42670),
        _vtab("clevr_count", "structured", 8, 15000),
        _vtab("clevr_dist", "structured", 6, 15000),
        _vtab("dmlab", "structured", 6, 22735),
        _vtab("kitti", "structured", 4, 711),
        _vtab("dsprites_loc", "structured", 16, 73728),
        _vtab("dsprites_ori", "structured", 16, 73728),
        _vtab("smallnorb_azi", "structured", 18, 12150),
        _vtab("smallnorb_ele", "structured", 9, 12150),
    ),
)
"""arXiv 1910.04867, with the list files of the NOAH code (github.com/ZhangYuanhan-AI/NOAH)."""

FGVC = Benchmark(
    "fgvc",
    "FGVC",
    (
        BenchmarkTask("CUB_200_2011", "fine-grained", 200, 5394, 600, 5794),
        BenchmarkTask("NABirds", "fine-grained", 555, 21536, 2393, 24633),
        BenchmarkTask("OxfordFlowers", "fine-grained", 102, 1020, 1020, 6149),
        BenchmarkTask("StanfordDogs", "fine-grained", 120, 10800, 1200, 8580),
        BenchmarkTask("StanfordCars", "fine-grained", 196, 7329, 815, 8041),
    ),
)
"""Five fine-grained data sets, split as in the VPT code (github.com/KMnP/vpt)."""

BENCHMARKS = {benchmark.name: benchmark for benchmark in (VTAB, FGVC)}
"""Benchmarks by name."""


def find_task(full_name: str) -> tuple[Benchmark, BenchmarkTask]:
    """The task of a name such as ``vtab/cifar``, and its benchmark.

    Raises:
        UnknownNameError: No benchmark has such a task.
    """
    known = {f"{b.name}/{task.name}": (b, task) for b in BENCHMARKS.values() for task in b.tasks}
    if full_name not in known:
        raise UnknownNameError("task of a benchmark", full_name, known)
    return known[full_name]


def deviations(task: BenchmarkTask, splits: Splits) -> tuple[str, ...]:
    """Phrases on how given images differ from the benchmark's; empty if they do not."""
    parts = {"train": splits.train, "val": splits.val, "test": splits.test}
    found = []
    for part, images in parts.items():
        count, expected = len(images or ()), getattr(task, part)
        if count != expected:
            found.append(f"{part} has {count:,} images instead of {expected:,}")
    seen = {label for images in parts.values() if images is not None for label in images.labels}
    if len(seen) != task.classes:
        found.append(f"{len(seen):,} classes have images instead of {task.classes:,}")
    return tuple(found)
