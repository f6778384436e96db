"""How labelled images lie on the disk: which folders are parts, and which are classes."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
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
    "eval": ("eval", "evaluation"),  # of the two others the one that has no folder
}
_PARTS = {word: part for part, words in _WORDS.items() for word in words}
_FILLERS = ("set", "data", "dataset", "images", "image", "imgs", "img", "split", "folder", "part")


@dataclass(frozen=True)
class ImageFolder:
    """What a folder holds.

    Attributes:
        parts: Classes of ``train``, and of ``val`` and ``test`` where these stand ready.
        folders: The folder of each part, relative to the root; ``.`` where classes have no part.
        passed_over: What lies there and is not used, a sentence each without its full stop.
    """

    parts: Mapping[str, ClassFolders]
    folders: Mapping[str, str]
    passed_over: tuple[str, ...]


def part_of(name: str) -> str | None:
    """The part that a folder's name stands for: ``train``, ``val``, ``test`` or ``eval``.

    Case, digits, separators and words such as ``images`` and ``set`` do not matter.
    """
    words = _words(name)
    return _PARTS.get(words[0]) if len(words) == 1 else None


def _hint_of(name: str) -> str | None:
    """The part that a name speaks of beside other words, such as ``seg_train``."""
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
        DataError: Two folders stand for one part, folders of parts have no classes below them, or
            it cannot be told which folders are parts and which are classes.
        OSError: A folder cannot be listed.
    """
    folders = _subfolders(root)
    others = Counter[str]()
    if not any(part_of(name) == "train" and _subfolders(path) for name, path in folders.items()):
        _check_no_part(root, folders)
        _check_class_folders(root, folders)
        told = _loose_images(root)
        parts = {"train": _read_classes(root, folders, others)}
        return ImageFolder(parts, {"train": "."}, (*told, *_told(others)))
    named = _named_parts(root, folders)
    beside = [name for name in folders if name not in named.values()]
    _check_siblings(root, folders, named, beside)
    told = _loose_images(root)
    if beside:
        told.append(f"{'Folder' if len(beside) == 1 else 'Folders'} {quoted(beside)} passed over")
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
            del named[part]  # pictures without labels are often called test
        else:
            _check_class_folders(folders[name], classes)
            parts[part] = _read_classes(folders[name], classes, others)
        told += loose
    return ImageFolder(parts, named, (*told, *_told(others)))


def _told(others: Counter[str]) -> list[str]:
    told = describe_skipped(others)
    return [told] if told else []


def _subfolders(folder: Path) -> dict[str, Path]:
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not is_system_folder(e.name))
    return {name: folder / name for name in names}


def _loose_images(folder: Path) -> list[str]:
    """A sentence about images that lie beside class folders, where there are any."""
    with os.scandir(folder) as entries:
        suffixes = [Path(e.name).suffix.lower() for e in entries if not e.name.startswith(".")]
    count = sum(suffix in IMAGE_SUFFIXES for suffix in suffixes)
    images = "1 image" if count == 1 else f"{count:,} images"
    return [f"{images} in no class folder passed over (in {str(folder)!r})"] if count else []


def _check_no_part(root: Path, folders: Mapping[str, Path]) -> None:
    """Refuse folders of parts where there is no ``train`` with classes."""
    if folders and all(map(part_of, folders)):
        raise DataError(
            f"Data folder {str(root)!r} has {', '.join(folders)} but no train/<class>: add it."
        )


def _named_parts(root: Path, folders: Mapping[str, Path]) -> dict[str, str]:
    """The folder's name of each part."""
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
    """Refuse two names of one folder: its images would have two labels, or stand in two parts."""
    names: dict[Path, str] = {}
    for name, path in folders.items():
        other = names.setdefault(path.resolve(), name)
        if other != name:
            raise DataError(
                f"{quoted([other, name])} in {str(root)!r} are the same folder: remove one link."
            )


def _check_siblings(
    root: Path, folders: Mapping[str, Path], named: Mapping[str, str], beside: list[str]
) -> None:
    """Refuse a class called ``train`` among others whose images would be passed over."""
    classes = _subfolders(folders[named["train"]]).keys()
    rivals = [
        name
        for name in beside
        if not classes & _subfolders(folders[name]).keys()
        and next(walk_images(folders[name], set()), None)
    ]
    if len(rivals) > 1 and len(named) == 1:
        raise DataError(
            f"Data folder {str(root)!r} has {named['train']!r} with sub-folders, and beside it "
            f"{quoted(rivals)} with images: move these away if {named['train']!r} is the part to "
            "train on, or move its images out of the sub-folders if it is a class."
        )


def _check_class_folders(above: Path, folders: Mapping[str, Path]) -> None:
    """Refuse what are no class folders: parts under other names, and one level too many."""
    hints = {name: hint for name in folders if (hint := _hint_of(name))}
    clear = {part for name in folders if (part := part_of(name))}
    if len(clear) > 1 or ("train" in hints.values() and len(set(hints.values())) > 1):
        raise DataError(
            f"Folders {quoted(hints)} in {str(above)!r} look like parts of a data set, not like "
            "classes: name them train, val and test, each with one folder per class."
        )
    below = {name: _subfolders(path).keys() for name, path in folders.items()}
    if len(below) > 1:
        _check_common(above, [{name.casefold() for name in names} for names in below.values()])
    for name, names in below.items():
        parts = {part for each in names if (part := part_of(each))}
        if "train" in parts and len(parts) > 1:
            raise DataError(
                f"Folder {name!r} in {str(above)!r} has the parts {quoted(names)}: "
                f"give {str(folders[name])!r} as the data folder."
            )


def _check_common(above: Path, below: list[set[str]]) -> None:
    """Refuse sub-folders that every class folder has."""
    common = sorted(set.intersection(*below))
    if any(map(part_of, common)):
        raise DataError(
            f"Every class folder in {str(above)!r} has the same sub-folders {quoted(common)}: "
            "put the parts above the classes, as in train/<class> and test/<class>."
        )
    if common and len(set.union(*below)) > 1:  # one alone is a place for images
        raise DataError(
            f"Every class folder in {str(above)!r} has the same sub-folders {quoted(common)}: if "
            "these are the classes, name the folders above them train, val and test; if not, move "
            "their images up into the class folders."
        )


def _read_classes(folder: Path, folders: Mapping[str, Path], others: Counter[str]) -> ClassFolders:
    """Images of each class. Names are in Unicode's composed form, whatever the disk's is."""
    _check_targets(folder, folders)
    above = {folder.resolve(), *folder.resolve().parents}
    classes: ClassFolders = {}
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
        classes[composed] = list(walk_images(path, set(above), others))
    return classes


def quoted(names: Iterable[str]) -> str:
    """Up to five names for a message, and a mark where there are more."""
    listed = list(names)
    return ", ".join(map(repr, listed[:5])) + (", …" if len(listed) > 5 else "")
