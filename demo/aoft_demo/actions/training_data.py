"""Folders of training pictures: synthetic or uploaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from aoft_demo.actions.pictures import read_picture
from aoft_demo.tasks.session import task_name
from aoft_deploy.data.folder import write_folder
from aoft_deploy.data.folder_structure import part_of
from aoft_deploy.data.synthetic import load_task
from aoft_deploy.errors import DataError, SettingError

__all__ = ["MAX_PICTURES", "MIN_PICTURES", "write_synthetic_task", "write_uploaded_pictures"]

MIN_PICTURES, MAX_PICTURES = 3, 200
"""Pictures of each class."""

STORED = 512
"""Longest side of a stored picture in pixels."""


def write_synthetic_task(name: str, images: int, seed: int, root: Path) -> None:
    """Write the pictures of a synthetic task.

    Args:
        name: Name of the task.
        images: Number of training pictures.
        seed: Seed of the pictures.
        root: The folder to create.

    Raises:
        UnknownNameError: There is no such task.
    """
    held_out = max(images // 5, 30)
    write_folder(load_task(name, seed=seed, train=images, val=held_out, test=held_out), root)


def write_uploaded_pictures(
    groups: Sequence[tuple[str, Sequence[Path]]],
    root: Path,
    before_each: Callable[[], None] = lambda: None,
) -> None:
    """Write uploaded pictures, a subfolder for each class.

    Args:
        groups: Name and pictures of each class; a group with neither is left out.
        root: The folder to create.
        before_each: Called before each picture is read; may raise to stop the writing.

    Raises:
        SettingError: A class has no name, two have the same, or the names look like parts of a
            data set, such as train and test.
        DataError: There are fewer than two classes, or a class has too few or too many pictures.
        ImageError: A picture cannot be read.
    """
    classes = _checked([(name, files) for name, files in groups if name.strip() or files])
    for name, files in classes.items():
        (root / name).mkdir(parents=True)
        for number, file in enumerate(files):
            before_each()
            image = read_picture(file, STORED).image
            image.thumbnail((STORED, STORED))
            image.save(root / name / f"{number:03}.png")


def _checked(groups: Sequence[tuple[str, Sequence[Path]]]) -> dict[str, Sequence[Path]]:
    """Pictures by the names of their classes."""
    names = [_class_name(name, number) for number, (name, _) in enumerate(groups, 1)]
    for name in names:
        if names.count(name) > 1:
            raise SettingError(f"Two classes are called {name!r}: rename one.")
    parts = {part_of(name): name for name in names if part_of(name)}
    if len(parts) > 1:
        raise SettingError(
            f"Classes called {' and '.join(map(repr, parts.values()))} look like parts of a data "
            "set: rename them, or upload the pictures of each class together."
        )
    if len(groups) < 2:
        raise DataError("A task needs at least two classes: name them and add pictures of each.")
    classes = {name: files for name, (_, files) in zip(names, groups, strict=True)}
    for name, files in classes.items():
        if not MIN_PICTURES <= len(files) <= MAX_PICTURES:
            raise DataError(
                f"Class {name!r} has {len(files)} pictures, but must have {MIN_PICTURES} to "
                f"{MAX_PICTURES}: add or remove some."
            )
    return classes


def _class_name(text: str, number: int) -> str:
    if not text.strip():
        raise SettingError(f"Class {number} has pictures but no name: type one.")
    return task_name(text)
