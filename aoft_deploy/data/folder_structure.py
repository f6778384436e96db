"""The structure of a data folder: which sub-folders are parts, and which are classes."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aoft_deploy.data.listing import IMAGE_SUFFIXES, describe_skipped, is_system_folder, walk_images
from aoft_deploy.errors import DataError

__all__ = ["ClassFolders", "ImageFolder", "part_of", "quoted", "read_image_folder"]

ClassFolders = dict[str, list[Path]]
"""Class name to its images."""

_WORDS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "devel", "development"),
    "test": ("test", "testing", "tst"),
    "eval": ("eval", "evaluation"),  # val or test, whichever has no folder
}
_PARTS = {word: part for part, words in _WORDS.items() for word in words}
_FILLERS = ("set", "data", "dataset", "images", "image", "imgs", "img", "split", "folder", "part")


@dataclass(frozen=True)
class ImageFolder:
    """Contents of a data folder.

    Attributes:
        parts: Classes of ``train``, and of ``val`` and ``test`` if they exist.
        folders: Folder name of each part; ``.`` if the root holds the classes.
        notes: A sentence, without its full stop, on each thing in the folder that is not used, or
            that may not be meant.
    """

    parts: Mapping[str, ClassFolders]
    folders: Mapping[str, str]
    notes: tuple[str, ...]


def part_of(name: str) -> str | None:
    """The part that a folder name means: ``train``, ``val``, ``test`` or ``eval``; None for others.

    Case, digits, separators and words such as ``images`` and ``set`` are ignored.
    """
    words = _words(name)
    return _PARTS.get(words[0]) if len(words) == 1 else None


def _part_in(name: str) -> str | None:
    """The part that a name contains as one of several words, such as ``seg_train``."""
    return next((_PARTS[word] for word in _words(name) if word in _PARTS), None)


def _words(name: str) -> list[str]:
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = []
    for word in re.findall(r"[^\W\d_]+", spaced.casefold()):
        bare = next((b for f in _FILLERS if (b := word.removesuffix(f)) in _PARTS), word)
        if bare not in _FILLERS:
            words.append(bare)
    return words


def read_image_folder(root: Path) -> ImageFolder:
    """Find ``root/train/<class>/…`` with ``val`` and ``test``, or ``root/<class>/…``.

    Raises:
        DataError: Two folders stand for the same part, a part has no class folders, or it is
            unclear which folders are parts and which are classes.
        OSError: A folder cannot be listed.
    """
    folders = _subfolders(root)
    skipped_files = Counter[str]()
    if not any(part_of(name) == "train" and _subfolders(path) for name, path in folders.items()):
        _check_no_part(root, folders)
        _check_class_folders(root, folders)
        notes = _loose_images(root)
        parts = {"train": _read_classes(root, folders, skipped_files, notes)}
        return ImageFolder(parts, {"train": "."}, _with_files(notes, skipped_files))
    named = _named_parts(root, folders)
    unused = [name for name in folders if name not in named.values()]
    _check_siblings(root, folders, named, unused)
    notes = _loose_images(root)
    if unused:
        notes.append(f"{'Folder' if len(unused) == 1 else 'Folders'} {quoted(unused)} skipped")
    parts = {}
    for part, name in list(named.items()):
        classes = _subfolders(folders[name])
        loose = _loose_images(folders[name])
        if not classes and loose:
            if part == "val":
                raise DataError(
                    f"Data folder {str(root)!r} has images in {name!r} but no class folders there: "
                    "put each class's images into a folder named after the class."
                )
            del named[part]  # a test folder often holds unlabelled images
        else:
            _check_class_folders(folders[name], classes)
            parts[part] = _read_classes(folders[name], classes, skipped_files, notes)
        notes += loose
    return ImageFolder(parts, named, _with_files(notes, skipped_files))


def _with_files(notes: Sequence[str], skipped_files: Counter[str]) -> tuple[str, ...]:
    """The notes, and one on the skipped files if there are any."""
    note = describe_skipped(skipped_files)
    return (*notes, note) if note else tuple(notes)


def _subfolders(folder: Path) -> dict[str, Path]:
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not is_system_folder(e.name))
    return {name: folder / name for name in names}


def _loose_images(folder: Path) -> list[str]:
    """A note on images outside of the class folders; an empty list if there are none."""
    with os.scandir(folder) as entries:
        suffixes = [Path(e.name).suffix.lower() for e in entries if not e.name.startswith(".")]
    count = sum(suffix in IMAGE_SUFFIXES for suffix in suffixes)
    images = "1 image" if count == 1 else f"{count:,} images"
    return [f"{images} outside of class folders skipped (in {str(folder)!r})"] if count else []


def _check_no_part(root: Path, folders: Mapping[str, Path]) -> None:
    """Refuse a folder whose sub-folders are all parts, but that has no ``train`` with classes."""
    if folders and all(map(part_of, folders)):
        raise DataError(
            f"Data folder {str(root)!r} has {', '.join(folders)} but no train/<class>: add it."
        )


def _named_parts(root: Path, folders: Mapping[str, Path]) -> dict[str, str]:
    """Folder name of each part."""
    found: dict[str, list[str]] = {}
    for name in folders:
        found.setdefault(part_of(name) or "", []).append(name)
    found.pop("", None)
    if "eval" in found:
        role = "val" if "test" in found and "val" not in found else "test"
        found.setdefault(role, []).extend(found.pop("eval"))
    for part, names in found.items():
        if len(names) > 1:
            raise DataError(
                f"Data folder {str(root)!r} has {quoted(names)}, which all stand for {part}: "
                "keep one of them, and rename or move the rest."
            )
    named: dict[str, str] = {
        part: found[part][0] for part in ("train", "val", "test") if part in found
    }
    _check_targets(root, {name: folders[name] for name in named.values()})
    return named


def _check_targets(root: Path, folders: Mapping[str, Path]) -> None:
    """Refuse two links to one folder: its images would have two labels, or be in two parts."""
    names: dict[Path, str] = {}
    for name, path in folders.items():
        other = names.setdefault(path.resolve(), name)
        if other != name:
            raise DataError(
                f"{quoted([other, name])} in {str(root)!r} are the same folder: remove one link."
            )


def _check_siblings(
    root: Path, folders: Mapping[str, Path], named: Mapping[str, str], unused: list[str]
) -> None:
    """Refuse a class called ``train`` beside other classes, whose images would be skipped."""
    classes = _subfolders(folders[named["train"]]).keys()
    rivals = [
        name
        for name in unused
        if not classes & _subfolders(folders[name]).keys()
        and next(walk_images(folders[name], set()), None)
    ]
    if len(rivals) > 1 and len(named) == 1:
        raise DataError(
            f"Data folder {str(root)!r} has {named['train']!r} with sub-folders, and beside it "
            f"{quoted(rivals)} with images: move these away if {named['train']!r} is the training "
            "part, or move its images out of the sub-folders if it is a class."
        )


def _check_class_folders(parent: Path, folders: Mapping[str, Path]) -> None:
    """Refuse sub-folders that look like parts, or that hold parts or classes themselves."""
    hints = {name: hint for name in folders if (hint := _part_in(name))}
    clear = {part for name in folders if (part := part_of(name))}
    if len(clear) > 1 or ("train" in hints.values() and len(set(hints.values())) > 1):
        raise DataError(
            f"Folders {quoted(hints)} in {str(parent)!r} look like parts of a data set, not like "
            "classes: name them train, val and test, each with one folder per class."
        )
    below = {name: _subfolders(path).keys() for name, path in folders.items()}
    if len(below) > 1:
        _check_common(parent, [{name.casefold() for name in names} for names in below.values()])
    for name, names in below.items():
        parts = {part for each in names if (part := part_of(each))}
        if "train" in parts and len(parts) > 1:
            raise DataError(
                f"Folder {name!r} in {str(parent)!r} has the parts {quoted(names)}: "
                f"give {str(folders[name])!r} as the data folder."
            )


def _check_common(parent: Path, below: list[set[str]]) -> None:
    """Refuse sub-folders that all class folders share."""
    common = sorted(set.intersection(*below))
    if any(map(part_of, common)):
        raise DataError(
            f"Every class folder in {str(parent)!r} has the same sub-folders {quoted(common)}: "
            "put the parts above the classes, as in train/<class> and test/<class>."
        )
    if common and len(set.union(*below)) > 1:  # a single common sub-folder just holds the images
        raise DataError(
            f"Every class folder in {str(parent)!r} has the same sub-folders {quoted(common)}: if "
            "these are the classes, name the folders above them train, val and test; if not, move "
            "their images up into the class folders."
        )


def _read_classes(
    folder: Path, folders: Mapping[str, Path], skipped_files: Counter[str], notes: list[str]
) -> ClassFolders:
    """Images of each class. Class names are normalised to Unicode's composed form (NFC).

    A class with images in several folders adds to the notes: these may be the classes.
    """
    _check_targets(folder, folders)
    above = {folder.resolve(), *folder.resolve().parents}
    classes: ClassFolders = {}
    nested = ""
    for name, path in folders.items():
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"The name of the class folder {name!r} in {str(folder)!r} is not UTF-8: rename it."
            ) from error
        composed = unicodedata.normalize("NFC", name)
        if composed in classes:
            raise DataError(
                f"Two class folders in {str(folder)!r} are called {composed!r}, in different "
                "Unicode forms: rename one."
            )
        images = classes[composed] = list(walk_images(path, set(above), skipped_files))
        holders = sorted({str(image.parent.relative_to(folder)) for image in images})
        if len(holders) > 1:
            nested = nested or holders[-1]
    if nested:
        notes.append(
            f"Sub-folders of class folders, such as {nested!r}, are not classes of their own: "
            "their images belong to the class above"
        )
    return classes


def quoted(names: Iterable[str]) -> str:
    """Up to five quoted names for a message; an ellipsis stands for the rest."""
    listed = list(names)
    return ", ".join(map(repr, listed[:5])) + (", …" if len(listed) > 5 else "")
