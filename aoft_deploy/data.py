"""Labelled images: folders of them, and the splits that training works on."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.errors import DataError, ImageError, SettingError, UnknownNameError
from aoft_deploy.images import read_image, read_size, walk_images

__all__ = ["ImageList", "Splits", "check_images", "cut_parts", "load_data", "load_folder"]

_VAL_NAMES = ("val", "valid", "validation")
_SPLIT_NAMES = {"train", "test", *_VAL_NAMES}

_Folder = dict[str, list[Path]]  # class name to its images


@dataclass(frozen=True)
class ImageList:
    """Images with their labels, usable as a torch data set.

    Attributes:
        images: Paths, read when asked for, or uint8 arrays of shape ``(height, width, 3)``.
        labels: The index of each image's class.
    """

    images: Sequence[Path | NDArray[np.uint8]]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image of mode ``RGB`` and label; an unreadable file is an ``ImageError``."""
        image = self.images[index]
        rgb = read_image(image) if isinstance(image, Path) else Image.fromarray(image)
        return rgb, self.labels[index]


@dataclass(frozen=True)
class Splits:
    """A data set for training: what to fit, what to choose by, and what to report.

    Attributes:
        train: Images to fit.
        val: Images to choose settings and epochs by.
        test: Images to report on once, or None.
        classes: Class names in the order of the labels; those of folders are sorted.
    """

    train: ImageList
    val: ImageList
    test: ImageList | None
    classes: tuple[str, ...]


def load_data(source: str, *, seed: int = 0) -> Splits:
    """Load what a user names: an offline task, or an image folder.

    Args:
        source: A name of :func:`aoft_deploy.tasks.task_names`, or else a path. To use a folder
            that bears the name of a task, write it as ``./name``.
        seed: Seed of the task, or of the split where the folder has none.

    Raises:
        UnknownNameError: Neither a task nor a path that exists.
        DataError: As for :func:`load_folder`.
    """
    from aoft_deploy import tasks  # which builds on this module

    if source in tasks.task_names():
        return tasks.load_task(source, seed=seed)
    if not Path(source).exists():
        raise UnknownNameError("folder or task", source, tasks.task_names())
    return load_folder(Path(source), seed=seed)


def load_folder(
    root: Path, *, seed: int = 0, val_fraction: float = 0.1, test_fraction: float = 0.1
) -> Splits:
    """Load ``root/train/<class>/…`` with ``root/val`` and ``root/test``, or ``root/<class>/…``.

    ``val`` may also be called ``valid`` or ``validation``, and is cut from ``train`` where it is
    absent; ``test`` may be absent. Without ``train``, each class is split by its share, at least
    one image to a part. Which image goes where depends on the seed, the class name and the file
    names of that class only. Class folders are searched to the bottom, links followed once;
    files of other suffixes and hidden ones are passed over. Images are read later:
    :func:`check_images`.

    Args:
        root: The folder.
        seed: Seed of the split, where one has to be made, from 0.
        val_fraction: Share of each class that is cut off as ``val``, in (0, 1).
        test_fraction: Share of each class that is cut off as ``test``, in [0, 1); 0 for none.

    Raises:
        DataError: No such folder, no classes or only one, a class without images or with too
            few to split, or a class that is missing in ``train``.
        SettingError: A share or the seed outside its range.
    """
    if not 0 < val_fraction < 1 or not 0 <= test_fraction < 1 - val_fraction:
        raise SettingError(
            f"Shares are val {val_fraction} and test {test_fraction}: "
            "use val above 0, test from 0, and less than 1 together."
        )
    if seed < 0:
        raise SettingError(f"Seed is {seed}: use a whole number from 0.")
    if not root.is_dir():
        raise DataError(f"Data folder {str(root)!r} is not a folder: give one that exists.")
    try:
        parts = _read_parts(root)
    except OSError as error:
        raise DataError(
            f"Data folder {str(root)!r} cannot be listed: {error.strerror or error}."
        ) from error
    _check_train(parts["train"], root)
    classes = tuple(sorted(parts["train"]))
    if "val" not in parts:
        shares = {"val": val_fraction, "test": 0 if "test" in parts else test_fraction}
        parts |= cut_parts(parts["train"], {k: v for k, v in shares.items() if v}, seed)
    lists = {part: _listed(folder, classes, part) for part, folder in parts.items()}
    return Splits(lists["train"], lists["val"], lists.get("test"), classes)


def check_images(split: ImageList) -> None:
    """Open the header of every file of a split, so that training need not fail later.

    Raises:
        DataError: Some cannot be used; the first five are named.
    """
    paths = [image for image in split.images if isinstance(image, Path)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        faults = [fault for fault in pool.map(_fault, paths) if fault]
    if faults:
        first = "; ".join(fault.rstrip(".") for fault in faults[:5])
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError(f"{len(faults)} of {len(paths)} images cannot be used: {first}{more}.")


def _fault(path: Path) -> str | None:
    try:
        read_size(path)
    except ImageError as error:
        return str(error)
    return None


def _read_parts(root: Path) -> dict[str, _Folder]:
    """The parts that stand ready on the disk; ``train`` alone where there is no layout."""
    folders = _subfolders(root)
    if "train" not in folders or not _subfolders(folders["train"]):
        if folders and set(folders) <= _SPLIT_NAMES:
            raise DataError(
                f"Data folder {str(root)!r} has {', '.join(folders)} but no train/<class>: add it."
            )
        return {"train": _read_classes(root)}
    parts: dict[str, _Folder] = {}
    for part, names in (("train", ("train",)), ("val", _VAL_NAMES), ("test", ("test",))):
        for name in [name for name in names if name in folders][:1]:
            parts[part] = _read_classes(folders[name])
    return parts


def _subfolders(folder: Path) -> dict[str, Path]:
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    return {name: folder / name for name in names}


def _read_classes(folder: Path) -> _Folder:
    above = {folder.resolve(), *folder.resolve().parents}
    return {name: list(walk_images(path, set(above))) for name, path in _subfolders(folder).items()}


def _check_train(train: _Folder, root: Path) -> None:
    if not train:
        raise DataError(
            f"Data folder {str(root)!r} has no class folders: "
            "put each class's images into a folder named after the class."
        )
    empty = [name for name, images in train.items() if not images]
    if empty:
        names = ", ".join(repr(name) for name in empty[:5]) + (", …" if len(empty) > 5 else "")
        raise DataError(f"No images for training in class folder {names}: add some or remove it.")
    if len(train) == 1:
        raise DataError(f"Data folder {str(root)!r} has one class, {min(train)!r}: use at least 2.")


def cut_parts(
    train: dict[str, list[Path]], shares: dict[str, float], seed: int
) -> dict[str, dict[str, list[Path]]]:
    """Take ``shares`` of each class away; what is left stands as ``train`` in the result.

    Args:
        train: Images of each class.
        shares: Part and its share, above 0; each part gets at least one image of each class.
        seed: Seed of the split, from 0.

    Raises:
        DataError: A class has too few images.
    """
    parts: dict[str, _Folder] = {part: {} for part in ("train", *shares)}
    for name, images in train.items():
        if len(images) <= len(shares):
            raise DataError(
                f"Class {name!r} has too few images ({len(images)}) to split into "
                f"{' and '.join(parts)}: add images, or make the folders train and val yourself."
            )
        # A generator for each class: other classes do not influence its split.
        order = np.random.default_rng([seed, *os.fsencode(name)]).permutation(len(images))
        rest = [images[i] for i in order]
        for waiting, (part, share) in zip(range(len(shares), 0, -1), shares.items(), strict=True):
            # At least one image here, one for each part that still waits, one for train.
            count = min(max(int(share * len(images)), 1), len(rest) - waiting)
            parts[part][name], rest = sorted(rest[:count]), rest[count:]
        parts["train"][name] = sorted(rest)
    return parts


def _listed(folder: _Folder, classes: tuple[str, ...], part: str) -> ImageList:
    foreign = sorted(name for name in folder if name not in classes)
    if foreign:
        close = difflib.get_close_matches(foreign[0], classes, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ": add it there or remove it here."
        names = ", ".join(repr(name) for name in foreign[:5]) + (", …" if len(foreign) > 5 else "")
        raise DataError(f"Class {names} of {part} is not in train{hint}")
    pairs = [(path, label) for label, name in enumerate(classes) for path in folder.get(name, ())]
    if not pairs:
        raise DataError(f"Data folder's part {part} has no images: add some or remove it.")
    return ImageList([path for path, _ in pairs], [label for _, label in pairs])
