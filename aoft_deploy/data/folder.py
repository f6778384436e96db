"""Labelled images: folders of them, and the splits that training works on."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aoft_deploy.data.folder_structure import ClassFolders, quoted, read_image_folder
from aoft_deploy.data.images import read_image, read_size
from aoft_deploy.errors import DataError, ImageError, SettingError, UnknownNameError
from aoft_deploy.processors import processors

__all__ = [
    "ImageList",
    "Splits",
    "cut_parts",
    "find_faults",
    "image_paths",
    "load_data",
    "load_folder",
    "refuse_faults",
]

_NAMED = 10  # classes that a summary names
_AT_ONCE = 1024  # files that wait for a thread


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
        origins: Where each part comes from, a phrase; empty where that is plain.
        passed_over: What lies beside the images and is not used, a sentence each.
    """

    train: ImageList
    val: ImageList
    test: ImageList | None
    classes: tuple[str, ...]
    origins: Mapping[str, str] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()

    def summary(self) -> list[str]:
        """Lines that say which classes there are, and how many images each part has from where."""
        more = ", …" if len(self.classes) > _NAMED else ""
        phrases = []
        for part in ("train", "val", "test"):
            images: ImageList | None = getattr(self, part)
            count = "none" if images is None else f"{len(images):,}"
            origin = f" ({self.origins[part]})" if part in self.origins else ""
            phrases.append(f"{part} {count}{origin}")
        return [
            f"{len(self.classes):,} classes: {', '.join(self.classes[:_NAMED])}{more}",
            f"images: {', '.join(phrases)}",
        ]


def load_data(source: str, *, seed: int = 0) -> Splits:
    """Load what a user names: an offline task, or an image folder.

    Args:
        source: A name of :func:`aoft_deploy.data.task_names`, or else a path. To use a folder
            that bears the name of a task, write it as ``./name``.
        seed: Seed of the task, or of the split where the folder has none.

    Raises:
        UnknownNameError: Neither a task nor a path that exists.
        DataError: As for :func:`load_folder`.
    """
    from aoft_deploy.data import synthetic  # which builds on this module

    if source in synthetic.task_names():
        return synthetic.load_task(source, seed=seed)
    if not Path(source).exists():
        raise UnknownNameError("folder or task", source, synthetic.task_names())
    return load_folder(Path(source), seed=seed)


def load_folder(
    root: Path, *, seed: int = 0, val_fraction: float = 0.1, test_fraction: float = 0.1
) -> Splits:
    """Load ``root/train/<class>/…`` with ``root/val`` and ``root/test``, or ``root/<class>/…``.

    Parts are known by their usual names in any case, such as ``Training``, ``valid``, ``dev`` and
    ``Test_set``. ``val`` is cut from ``train`` where it is absent; ``test`` may be absent. Without
    ``train``, each class is split by its share, at least one image to a part. Which image goes
    where depends on the seed, the class name and the file names of that class only. Class folders
    are searched to the bottom, links followed once. What is passed over stands in the result.
    Images are read later: :func:`aoft_deploy.training.run.check_splits`.

    Args:
        root: The folder.
        seed: Seed of the split, where one has to be made, from 0.
        val_fraction: Share of each class that is cut off as ``val``, in (0, 1).
        test_fraction: Share of each class that is cut off as ``test``, in [0, 1); 0 for none.

    Raises:
        DataError: No such folder, no classes or only one, a class without images or with too
            few to split, a class that is missing in ``train``, or folders of which it cannot be
            told whether they are parts or classes.
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
        found = read_image_folder(root)
    except OSError as error:
        raise DataError(
            f"Data folder {str(root)!r} cannot be listed: {error.strerror or error} "
            f"({error.filename!r})."
        ) from error
    train, passed_over = found.parts["train"], list(found.passed_over)
    _check_train(train, root, passed_over)
    classes = tuple(sorted(train))
    origins = {part: f"in {folder}" for part, folder in found.folders.items() if folder != "."}
    parts = dict(found.parts)
    if "val" not in parts:
        shares = {"val": val_fraction, "test": 0 if "test" in parts else test_fraction}
        cut = cut_parts(train, {k: v for k, v in shares.items() if v}, seed)
        source = origins.get("train", "in each class")
        origins |= {part: f"cut with seed {seed}" for part in cut}
        origins["train"] = f"left {source}"
        parts |= cut
    lists = {part: _listed(folder, classes, part) for part, folder in parts.items()}
    for part in ("val", "test"):
        missing = [name for name in classes if part in parts and not parts[part].get(name)]
        if missing:
            passed_over.append(f"{part} has no images of class {quoted(missing)}")
    return Splits(
        lists["train"], lists["val"], lists.get("test"), classes, origins, tuple(passed_over)
    )


def image_paths(split: ImageList) -> list[Path]:
    """The images of a split that are files, each once."""
    return list(dict.fromkeys(image for image in split.images if isinstance(image, Path)))


def find_faults(
    paths: Sequence[Path], *, whole: bool, tick: Callable[[], object] = lambda: None
) -> list[str]:
    """Sentences about the files that cannot be used, in the order of the files.

    Args:
        paths: The files, which are read in threads.
        whole: Decode the pixels too; else the headers alone are read.
        tick: Called after each file.
    """

    def fault(path: Path) -> str | None:
        try:
            (read_image if whole else read_size)(path)
        except ImageError as error:
            return str(error)
        return None

    faults = []
    with ThreadPoolExecutor(max_workers=min(8, processors())) as pool:
        for start in range(0, len(paths), _AT_ONCE):
            for found in pool.map(fault, paths[start : start + _AT_ONCE]):
                tick()
                if found:
                    faults.append(found)
    return faults


def refuse_faults(faults: Sequence[str], total: int) -> None:
    """Refuse images that cannot be used.

    Raises:
        DataError: There are some; the first five are named.
    """
    if faults:
        first = "; ".join(fault.rstrip(".") for fault in faults[:5])
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError(f"{len(faults)} of {total} images cannot be used: {first}{more}.")


def _check_train(train: ClassFolders, root: Path, passed_over: Sequence[str]) -> None:
    if not train:
        raise DataError(
            f"Data folder {str(root)!r} has no class folders: "
            "put each class's images into a folder named after the class."
        )
    if len(train) == 1:
        (name,) = train
        raise DataError(
            f"Data folder {str(root)!r} has one class, {name!r}: use at least 2, "
            "or give the folder that holds the class folders."
        )
    empty = [name for name, images in train.items() if not images]
    if empty:
        told = f" ({'; '.join(passed_over)})" if passed_over else ""
        raise DataError(
            f"No images for training in class folder {quoted(empty)}: add some or remove it{told}."
        )


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
    parts: dict[str, ClassFolders] = {part: {} for part in ("train", *shares)}
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


def _listed(folder: ClassFolders, classes: tuple[str, ...], part: str) -> ImageList:
    foreign = sorted(name for name in folder if name not in classes)
    if foreign:
        close = difflib.get_close_matches(foreign[0], classes, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ": add it there or remove it here."
        raise DataError(f"Class {quoted(foreign)} of {part} is not in train{hint}")
    pairs = [(path, label) for label, name in enumerate(classes) for path in folder.get(name, ())]
    if not pairs:
        raise DataError(f"Data folder's part {part} has no images: add some or remove it.")
    return ImageList([path for path, _ in pairs], [label for _, label in pairs])
