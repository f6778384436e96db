"""Labelled images in folders: loading them as splits, and writing splits as folders."""

from __future__ import annotations

import difflib
import filecmp
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aoft_deploy.data.folder_structure import ClassFolders, quoted, read_image_folder
from aoft_deploy.data.splits import ImageList, Splits, check_seed
from aoft_deploy.errors import DataError, OutputError, SettingError
from aoft_deploy.file_signatures import file_kind

__all__ = ["check_outside", "cut_parts", "load_folder", "write_folder"]

_ARCHIVES = ("zip", "archive", "cut", "tar", "gzip", "bzip2", "xz", "zstd", "7z", "rar")


def load_folder(
    root: Path, *, seed: int = 0, val_fraction: float = 0.1, test_fraction: float = 0.1
) -> Splits:
    """Load ``root/train/<class>/…`` with ``root/val`` and ``root/test``, or ``root/<class>/…``.

    Parts are recognised by their usual names in any case, such as ``Training``, ``valid``, ``dev``
    and ``Test_set``. A missing ``val`` is split off from ``train``; ``test`` is optional. Without
    ``train``, each class is split by the given fractions, with at least one image in each part; a
    class with fewer images is in ``train``, and with two also in ``val``. The split of a class
    depends only on the seed, the class name and the file names of the class. Class folders are
    searched recursively, and links are followed once. ``Splits.notes`` lists what is not used, and
    what may not be meant. Images are not read yet; see
    :func:`aoft_deploy.training.image_check.readable`.

    Args:
        root: The folder.
        seed: Seed of a split that has to be made, from 0.
        val_fraction: Fraction of each class that becomes ``val``, in (0, 1).
        test_fraction: Fraction of each class that becomes ``test``, in [0, 1); 0 for none.

    Raises:
        DataError: The folder does not exist, or has no classes or only one; a class has no images
            or is missing in ``train``; no class has enough images to split; or it is unclear
            whether the sub-folders are parts or classes.
        SettingError: A fraction or the seed is outside its range.
    """
    if not 0 < val_fraction < 1 or not 0 <= test_fraction < 1 - val_fraction:
        raise SettingError(
            f"`val_fraction` is {val_fraction} and `test_fraction` is {test_fraction}, but the "
            "first must be above 0, the second from 0, and their sum below 1."
        )
    check_seed(seed)
    if not root.is_dir():
        raise DataError(f"Data folder {str(root)!r} {_instead(root)}")
    try:
        found = read_image_folder(root)
    except OSError as error:
        raise DataError(
            f"Data folder {str(root)!r} cannot be listed: {error.strerror or error} "
            f"({error.filename!r})."
        ) from error
    train, notes = found.parts["train"], list(found.notes)
    _check_train(train, root, notes)
    classes = tuple(sorted(train))
    origins = {part: f"from {folder}" for part, folder in found.folders.items() if folder != "."}
    parts = dict(found.parts)
    if "val" not in parts:
        source = "each class" if found.folders["train"] == "." else found.folders["train"]
        fractions = {"val": val_fraction, "test": 0 if "test" in parts else test_fraction}
        fractions = {part: fraction for part, fraction in fractions.items() if fraction}
        parts |= cut_parts(train, fractions, seed)
        origins["train"] = f"the rest of {source}"
        for part, fraction in fractions.items():
            reason = "" if source == "each class" else f": there is no folder {part}"
            origins[part] = f"{fraction:.0%} of {source}, split off with seed {seed}{reason}"
    lists = {part: _listed(folder, classes, part) for part, folder in parts.items()}
    for part in ("val", "test"):
        missing = [name for name in classes if part in parts and not parts[part].get(name)]
        if missing:
            notes.append(f"{part} has no images of class {quoted(missing)}")
        if part in found.parts:
            notes += _copies(found.parts[part], train, part)
    return Splits(
        lists["train"], lists["val"], lists.get("test"), classes, str(root), origins, tuple(notes)
    )


def check_outside(splits: Splits, out: Path) -> None:
    """Refuse an output folder that would count as a class the next time the splits are loaded.

    Args:
        splits: Result of ``load_folder``.
        out: The output folder.

    Raises:
        OutputError: ``out`` lies beside or below the class folders.
    """
    beside = {folder.parent.resolve() for folder in {path.parent for path in splits.train.files()}}
    found = next((folder for folder in out.resolve().parents if folder in beside), None)
    if found is not None:
        raise OutputError(
            f"{out} lies among the class folders of {found} and would count as a class next time: "
            "give a folder outside as `out`."
        )


def cut_parts(
    train: ClassFolders, fractions: dict[str, float], seed: int
) -> dict[str, ClassFolders]:
    """Split each class into parts; the rest becomes ``train``.

    Args:
        train: Images of each class.
        fractions: Name and fraction, above 0, of each other part; each part gets at least one
            image of each class. A class with too few images is in ``train`` and the first parts.
        seed: Seed of the split, from 0.

    Returns:
        The parts that have images.

    Raises:
        DataError: No class has two images.
    """
    parts: dict[str, ClassFolders] = {part: {} for part in ("train", *fractions)}
    for name, images in train.items():
        served = dict(list(fractions.items())[: max(len(images) - 1, 0)])
        # Each class has its own generator, so that other classes do not influence its split.
        order = np.random.default_rng([seed, *os.fsencode(name)]).permutation(len(images))
        rest = [images[i] for i in order]
        for done, (part, fraction) in enumerate(served.items()):
            # At least one image for this part, for each part after it, and for train.
            needed = len(served) - done
            count = min(max(int(fraction * len(images)), 1), len(rest) - needed)
            parts[part][name], rest = sorted(rest[:count]), rest[count:]
        parts["train"][name] = sorted(rest)
    if max(map(len, train.values()), default=0) < 2:
        raise DataError(
            f"No class has two images to split into {' and '.join(parts)}: add images, or create "
            "the folders train and val yourself."
        )
    return {part: classes for part, classes in parts.items() if classes}


def write_folder(splits: Splits, root: Path) -> None:
    """Write splits as PNG files ``root/<train|val|test>/<class>/<number>.png``.

    Raises:
        OutputError: The folder exists already, or cannot be written.
        ImageError: An image of the splits cannot be read.
    """
    if root.exists():
        raise OutputError(f"Folder {str(root)!r} exists already: remove it or name another.")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=".writing-") as scratch:
            for part, images in splits.parts().items():
                for number in range(len(images)):
                    image, label = images[number]
                    path = Path(scratch, root.name, part, splits.classes[label], f"{number:05}.png")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    image.save(path)
            Path(scratch, root.name).rename(root)
    except OSError as error:
        raise OutputError(
            f"Folder {str(root)!r} cannot be written: {error.strerror or error}."
        ) from error


def _instead(path: Path) -> str:
    """The end of a sentence: what a path is that should be a data folder, and what to do."""
    if not path.exists():
        beside = [p.name for p in path.parent.glob("*") if p.is_dir()]
        close = difflib.get_close_matches(path.name, beside, n=1)
        hint = (
            f"; did you mean {str(path.with_name(close[0]))!r}?" if close else ": check the path."
        )
        return f"does not exist{hint}"
    kind = file_kind(path) if path.is_file() else ""
    if kind in _ARCHIVES:
        return "is an archive: unpack it, and give the folder that holds the class folders."
    if kind == "picture":
        return "is one image: give the folder that holds one folder of images per class."
    return (
        "is a file, and lists of images are not read: put each class's images into a folder named "
        "after the class, and give the folder above."
    )


def _check_train(train: ClassFolders, root: Path, notes: Sequence[str]) -> None:
    """Refuse fewer than two classes, and classes without images."""
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
        note = f" ({'; '.join(notes)})" if notes else ""
        raise DataError(
            f"No images for training in class folder {quoted(empty)}: add some, as JPEG, PNG, "
            f"WebP, BMP, GIF or TIFF, or remove it{note}."
        )


def _copies(folder: ClassFolders, train: ClassFolders, part: str) -> list[str]:
    """A note on files of a part that ``train`` has too, under the same class and name."""

    def is_copy(path: Path, other: Path | None) -> bool:
        try:
            return other is not None and filecmp.cmp(path, other, shallow=False)
        except OSError:  # reported when all images are read
            return False

    trained = {(name, path.name): path for name, paths in train.items() for path in paths}
    files = [(path, trained.get((name, path.name))) for name in folder for path in folder[name]]
    count = sum(is_copy(path, other) for path, other in files)
    if not count:
        return []
    return [
        f"{count:,} of {len(files):,} images of {part} are also in train: its accuracy misleads"
    ]


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
