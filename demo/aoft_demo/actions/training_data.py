"""Pictures of a visitor's classes: kept in the session's folder, then split for a training."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aoft_demo.actions.pictures import read_picture
from aoft_demo.tasks.session import task_name
from aoft_deploy.data.folder_structure import part_of
from aoft_deploy.errors import DataError, ImageError, SettingError

__all__ = [
    "MAX_CLASSES",
    "MAX_PICTURES",
    "MIN_PICTURES",
    "Example",
    "forget_pictures",
    "keep_picture",
    "write_pictures",
]

MIN_PICTURES, MAX_PICTURES = 3, 200
"""Pictures of each class."""

MAX_CLASSES = 4

STORED = 320
"""Longest side of a kept picture in pixels."""

HELD_OUT = 6
"""One in so many pictures of a class is for validation, and as many for the test."""

ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Example:
    """A picture of a class.

    Attributes:
        id: Its name in the session's folder.
        burst: Number of the camera burst that it is from, whose pictures resemble each other; 0 for
            a picture on its own.
    """

    id: str
    burst: int = 0


def keep_picture(session_folder: Path, file: Path, id: str, name: str) -> None:
    """Keep an uploaded picture in a session's folder until the session ends.

    Args:
        session_folder: The session's folder.
        file: The uploaded file.
        id: The picture's name from now on, 32 hexadecimal digits.
        name: The visitor's name for the file, for messages.

    Raises:
        SettingError: The name is not of this form, or the session has too many pictures.
        ImageError: The picture cannot be read.
    """
    target, limit = _path(session_folder, id), MAX_CLASSES * MAX_PICTURES
    target.parent.mkdir(exist_ok=True)
    if sum(1 for _ in target.parent.iterdir()) >= limit:
        raise SettingError(f"This page holds {limit} pictures, which is the limit: remove some.")
    try:
        image = read_picture(file, STORED).image
    except ImageError as error:
        raise ImageError(str(error).replace(file.name, name)) from error
    image.thumbnail((STORED, STORED))
    image.save(target, compress_level=1)


def forget_pictures(session_folder: Path, ids: Iterable[str]) -> None:
    """Delete pictures of a session; unknown ones are ignored.

    Raises:
        SettingError: A name is not of the form that ``keep_picture`` takes.
    """
    for id in ids:
        _path(session_folder, id).unlink(missing_ok=True)


def write_pictures(
    session_folder: Path,
    classes: Sequence[tuple[str, Sequence[Example]]],
    root: Path,
    before_each: Callable[[], None] = lambda: None,
) -> None:
    """Write the folders ``train``, ``val`` and ``test``, each with a subfolder for each class.

    The last pictures of each camera burst are held out, since neighbours in a burst are almost
    equal. Pictures on their own are held out at even distances. There is no ``test`` if a class has
    too few pictures for it.

    Args:
        session_folder: Folder of the session that keeps the pictures.
        classes: Name and pictures of each class; a class without pictures is left out.
        root: The folder to create.
        before_each: Called before each picture is written; may raise to stop the writing.

    Raises:
        SettingError: A class has no name, two have the same, the names look like parts of a data
            set, such as train and test, or a picture is not in the session's folder.
        DataError: There are fewer than two classes, or a class has too few or too many pictures.
    """
    checked = _checked([(name, examples) for name, examples in classes if examples])
    tested = all(len(examples) >= HELD_OUT for examples in checked.values())
    for name, examples in checked.items():
        for part, chosen in _split(examples, tested).items():
            (root / part / name).mkdir(parents=True)
            for number, example in enumerate(chosen):
                before_each()
                try:
                    shutil.copyfile(
                        _path(session_folder, example.id), root / part / name / f"{number:03}.png"
                    )
                except FileNotFoundError as error:
                    raise SettingError(
                        f"A picture of class {name!r} is no longer here, since this page was idle "
                        "for too long: reload the page and add the pictures again."
                    ) from error


def _path(session_folder: Path, id: str) -> Path:
    if not ID.fullmatch(id):
        raise SettingError("This is not the name of a picture.")
    return session_folder / "pictures" / f"{id}.png"


def _split(examples: Sequence[Example], tested: bool) -> dict[str, list[Example]]:
    """Pictures of a class by part; each part has at least one."""
    held_out = max(len(examples) // HELD_OUT, 1)
    sizes = {"test": held_out, "val": held_out} if tested else {"val": held_out}
    rest, parts = list(examples), {}
    for part, size in sizes.items():
        parts[part] = _last_of_bursts(rest, size)
        rest = [example for example in rest if example not in parts[part]]
    return {"train": rest, **parts}


def _last_of_bursts(examples: Sequence[Example], size: int) -> list[Example]:
    """The last pictures of each burst, and evenly spaced ones of those on their own."""
    bursts: dict[int, list[Example]] = {}
    for example in examples:
        bursts.setdefault(example.burst, []).append(example)
    chosen: list[Example] = []
    seen = 0
    for burst, members in bursts.items():
        before, seen = seen, seen + len(members)
        share = seen * size // len(examples) - before * size // len(examples)
        if burst:
            chosen += members[len(members) - share :]
        else:
            chosen += [members[(i + 1) * len(members) // share - 1] for i in range(share)]
    return chosen


def _checked(
    classes: Sequence[tuple[str, Sequence[Example]]],
) -> Mapping[str, Sequence[Example]]:
    """Pictures by the names of their classes."""
    names = [_class_name(name, number) for number, (name, _) in enumerate(classes, 1)]
    for name in names:
        if names.count(name) > 1:
            raise SettingError(f"Two classes are called {name!r}: rename one.")
        if part_of(name):
            raise SettingError(f"A class cannot be called {name!r}: choose another name.")
    if len(names) < 2:
        raise DataError("A skill needs at least two classes: add pictures of each.")
    if len(names) > MAX_CLASSES:
        raise DataError(f"A skill has at most {MAX_CLASSES} classes here.")
    for name, (_, examples) in zip(names, classes, strict=True):
        if not MIN_PICTURES <= len(examples) <= MAX_PICTURES:
            raise DataError(
                f"Class {name!r} has {len(examples)} pictures, but must have {MIN_PICTURES} to "
                f"{MAX_PICTURES}: add or remove some."
            )
    return {name: examples for name, (_, examples) in zip(names, classes, strict=True)}


def _class_name(text: str, number: int) -> str:
    if not text.strip():
        raise SettingError(f"Class {number} has pictures but no name: type one.")
    return task_name(text)
