"""FGVC in the layout of the VPT and RLRR code: JSON files that map images to class ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aoft_deploy.data.folder import cut_parts
from aoft_deploy.data.splits import ImageList, Splits, check_seed
from aoft_deploy.errors import DataError
from aoft_deploy.training.paper_benchmarks.image_lists import (
    Entry,
    check_once,
    check_size,
    image_path,
    read_text,
)
from aoft_deploy.training.paper_benchmarks.tasks import FGVC, BenchmarkTask

__all__ = ["load_fgvc"]

FOLDERS = {
    "CUB_200_2011": ("images",),
    "NABirds": ("images",),
    "StanfordDogs": ("", "Images"),
}
"""Folders of the images within a data set's folder; other data sets have them in the folder itself.
For StanfordDogs, the RLRR code expects them there too, and the VPT code in ``Images``."""

VAL_SHARE = 0.1

_Ids = dict[str, int | str]  # image to class id


def load_fgvc(root: Path, name: str, *, seed: int = 0, any_size: bool = False) -> Splits:
    """Load a data set from ``root/name/{train,val,test}.json``, or ``{trainval,test}.json``.

    Each file is a JSON object from image paths to class ids. The sorted ids of all files become
    the labels, from 0. (The published code numbers the ids of each file separately, which mixes up
    classes if a file lacks one.) Without ``train``, ``trainval`` is read; a tenth of each class, at
    least one image of two, becomes ``val``, which differs from VPT's split.

    Args:
        root: Folder of the benchmark.
        name: A task of ``FGVC``.
        seed: Seed of the split of ``trainval``, from 0.
        any_size: Accept other numbers of images and classes than in the benchmark.

    Returns:
        Splits in the order of the files; classes are the ids as text.

    Raises:
        UnknownNameError: The benchmark has no such data set.
        DataError: A file cannot be read, is no such object, or has another size; a path leads out
            of the folder or is not a file; or an image is listed twice.
        SettingError: The seed is negative.
    """
    task = FGVC.task(name)
    folder = root / name
    check_seed(seed)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} with FGVC's {name}: put it there.")
    parts = ["train", "val", "test"]
    if not (folder / "train.json").exists() and (folder / "trainval.json").exists():
        parts = ["trainval", "test"]
    files = {part: _read_ids(folder / f"{part}.json") for part in parts}
    ids = _sorted_ids(folder, files)
    if not any_size:
        _check_sizes(folder, files, len(ids), task)
    lists = _located(folder, files, ids, task)
    if "trainval" in lists:
        lists |= _split_trainval(lists.pop("trainval"), ids, seed)
    classes = tuple(map(str, ids))
    return Splits(lists["train"], lists["val"], lists["test"], classes, str(folder))


def _read_ids(path: Path) -> _Ids:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise DataError(f"{path} names {key!r} twice: list each image once.")
            found[key] = value
        return found

    try:
        ids = json.loads(read_text(path), object_pairs_hook=without_duplicates)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}): download it again.") from error
    if not isinstance(ids, dict) or not ids:
        raise DataError(f"{path} is not an object of images and class ids: download it again.")
    for image, value in ids.items():
        if type(value) not in (int, str):
            raise DataError(f"{path} gives {image!r} the class id {value!r}: use a number or text.")
    return ids


def _sorted_ids(folder: Path, files: dict[str, _Ids]) -> list[int | str]:
    ids = {value for file in files.values() for value in file.values()}
    numbers = [value for value in ids if isinstance(value, int)]
    texts = [value for value in ids if isinstance(value, str)]
    if numbers and texts:
        raise DataError(f"The lists in {folder} have numbers and texts as class ids: use one kind.")
    return [*sorted(numbers), *sorted(texts)]


def _check_sizes(folder: Path, files: dict[str, _Ids], classes: int, task: BenchmarkTask) -> None:
    sizes = {"train": task.train, "val": task.val, "test": task.test}
    sizes["trainval"] = task.train + task.val
    for part, file in files.items():
        check_size(folder / f"{part}.json", len(file), sizes[part])
    if classes != task.classes:
        raise DataError(
            f"The lists in {folder} have {classes:,} classes instead of the benchmark's "
            f"{task.classes:,}: complete them, or accept other sizes with `any_size=True`."
        )


def _located(
    folder: Path, files: dict[str, _Ids], ids: list[int | str], task: BenchmarkTask
) -> dict[str, ImageList]:
    labels = {value: label for label, value in enumerate(ids)}
    images = _image_folder(folder, next(iter(files["test"])), task)
    entries: dict[str, list[Entry]] = {}
    for part, file in files.items():
        where = str(folder / f"{part}.json")
        entries[part] = [
            (where, image_path(images, name, where), labels[value]) for name, value in file.items()
        ]
    check_once(entry for each in entries.values() for entry in each)
    return {
        part: ImageList([path for _, path, _ in each], [label for _, _, label in each])
        for part, each in entries.items()
    }


def _image_folder(folder: Path, image: str, task: BenchmarkTask) -> Path:
    """The first possible folder that holds the image, or else the first possible one."""
    candidates = [folder / name for name in FOLDERS.get(task.name, ("",))]
    return next((each for each in candidates if (each / image).is_file()), candidates[0])


def _split_trainval(images: ImageList, ids: list[int | str], seed: int) -> dict[str, ImageList]:
    """Split off a tenth of each class as val; return train and val."""
    labels = {str(value): label for label, value in enumerate(ids)}
    folders: dict[str, list[Path]] = {}
    for image, label in zip(images.images, images.labels, strict=True):
        folders.setdefault(str(ids[label]), []).append(Path(str(image)))
    return {
        part: ImageList(
            [path for paths in folder.values() for path in paths],
            [labels[name] for name, paths in folder.items() for _ in paths],
        )
        for part, folder in cut_parts(folders, {"val": VAL_SHARE}, seed).items()
    }
