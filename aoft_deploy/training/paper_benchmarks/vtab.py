"""VTAB-1k in the layout of the NOAH and SSF code: each task has four list files and its images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from aoft_deploy.data.splits import ImageList, Splits
from aoft_deploy.errors import DataError
from aoft_deploy.training.paper_benchmarks.image_lists import (
    Entry,
    check_once,
    check_size,
    image_path,
    read_text,
)
from aoft_deploy.training.paper_benchmarks.tasks import VTAB, BenchmarkTask

__all__ = ["load_vtab"]

FILES = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
ALL = "train800val200.txt"


def load_vtab(root: Path, name: str, *, any_size: bool = False) -> Splits:
    """Load a task from ``root/name/{train800,val200,train800val200,test}.txt``.

    A line is a path relative to ``root/name`` and a label from 0, separated by white space. The
    1,000 images of a final run are those of ``train800`` and ``val200``; ``train800val200`` lists
    copies of the same images in the published data, so only its labels are compared.

    Args:
        root: Folder of the benchmark.
        name: A task of ``VTAB``.
        any_size: Accept lists of other lengths than in the benchmark, classes without images, and
            a ``train800val200`` that is missing or has other labels than the two lists together.

    Returns:
        Splits in the order of the lists; classes are the labels as text.

    Raises:
        UnknownNameError: The benchmark has no such task.
        DataError: A list cannot be read or has another size; a line has another form, a label
            that is no class, or a path that leads out of the folder or is not a file; or an image
            is listed twice.
    """
    task = VTAB.task(name)
    folder = root / name
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} with VTAB-1k's {name}: put it there.")
    lists = {part: _read_list(folder, file, task) for part, file in FILES.items()}
    check_once(entry for entries in lists.values() for entry in entries)
    if not any_size:
        _check_sizes(folder, lists, task)
    train, val, test = (
        ImageList([path for _, path, _ in entries], [label for _, _, label in entries])
        for entries in lists.values()
    )
    return Splits(train, val, test, tuple(map(str, range(task.classes))), str(folder))


def _read_list(folder: Path, file: str, task: BenchmarkTask) -> list[Entry]:
    entries = []
    for number, line in enumerate(read_text(folder / file).splitlines(), 1):
        where = f"{folder / file}, line {number},"
        words = line.rsplit(maxsplit=1)
        if len(words) != 2:
            raise DataError(f"{where} is {line!r}: write a path and a label.")
        entries.append((where, image_path(folder, words[0], where), _label(words[1], task, where)))
    if not entries:
        raise DataError(f"{folder / file} lists no images: add some.")
    return entries


def _label(text: str, task: BenchmarkTask, where: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) >= task.classes:
        raise DataError(
            f"{where} has the label {text!r}: use a whole number from 0 to {task.classes - 1}."
        )
    return int(text)


def _check_sizes(folder: Path, lists: dict[str, list[Entry]], task: BenchmarkTask) -> None:
    for part, file in FILES.items():
        check_size(folder / file, len(lists[part]), getattr(task, part))
    missing = set(range(task.classes)) - {label for each in lists.values() for _, _, label in each}
    if missing:
        raise DataError(
            f"{folder} has no image of class {min(missing)}, but {task.name} has {task.classes} "
            "classes: complete it, or accept other sizes with `any_size=True`."
        )
    together = Counter(label for part in ("train", "val") for _, _, label in lists[part])
    if Counter(label for _, _, label in _read_list(folder, ALL, task)) != together:
        raise DataError(
            f"{folder / ALL} has other labels than {FILES['train']} and {FILES['val']} together: "
            "the lists come from different copies, so download them again."
        )
