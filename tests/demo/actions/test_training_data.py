"""Folders of training pictures: synthetic or uploaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from aoft_demo.actions.training_data import (
    MAX_PICTURES,
    MIN_PICTURES,
    write_synthetic_task,
    write_uploaded_pictures,
)
from aoft_demo.tasks.training_queue import Training
from aoft_deploy.data.folder import load_folder
from aoft_deploy.data.images import read_size
from aoft_deploy.errors import DataError, ImageError, SettingError, UnknownNameError


def pictures(
    folder: Path, make: Callable[..., Image.Image], count: int = MIN_PICTURES
) -> list[Path]:
    """Small pictures of random colours in a new folder."""
    folder.mkdir()
    for i in range(count):
        make(40, 30, seed=i).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def test_uploaded_pictures_become_a_folder_per_class(
    tmp_path: Path, make_picture: Callable[..., Image.Image]
) -> None:
    files = pictures(tmp_path / "up", make_picture, 4)
    write_uploaded_pictures([("red", files), ("", []), (" two  words", files)], tmp_path / "data")
    splits = load_folder(tmp_path / "data")
    assert splits.classes == ("red", "two words")
    assert len(splits.train) == 4 and len(splits.val) == 2


def test_large_pictures_are_resized(tmp_path: Path) -> None:
    Image.new("RGB", (2000, 1000)).save(tmp_path / "large.png")
    files = [tmp_path / "large.png"] * MIN_PICTURES
    write_uploaded_pictures([("a", files), ("b", files)], tmp_path / "data")
    assert read_size(tmp_path / "data" / "a" / "000.png") == (512, 256)


def test_unusable_pictures_are_refused(
    tmp_path: Path, make_picture: Callable[..., Image.Image]
) -> None:
    files, data = pictures(tmp_path / "up", make_picture), tmp_path / "data"
    with pytest.raises(DataError, match="needs at least two classes"):
        write_uploaded_pictures([("a", files)], data)
    with pytest.raises(DataError, match="Class 'b' has 2 pictures, but must have 3 to 200"):
        write_uploaded_pictures([("a", files), ("b", files[:2])], data)
    with pytest.raises(DataError, match=f"Class 'b' has {MAX_PICTURES + 1} pictures"):
        write_uploaded_pictures([("a", files), ("b", files[:1] * (MAX_PICTURES + 1))], data)
    with pytest.raises(SettingError, match="Class 2 has pictures but no name"):
        write_uploaded_pictures([("a", files), (" ", files)], data)
    with pytest.raises(SettingError, match="Two classes are called 'a'"):
        write_uploaded_pictures([("a", files), ("a ", files)], data)
    with pytest.raises(SettingError, match="'Train' and 'Testing' look like parts of a data set"):
        write_uploaded_pictures([("Train", files), ("Testing", files)], data)
    odd = tmp_path / "odd.png"
    odd.write_bytes(b"odd")
    with pytest.raises(ImageError, match=r"odd\.png"):
        write_uploaded_pictures([("a", files), ("b", [*files[:2], odd])], data)


def test_a_synthetic_task_is_that_of_the_library(tmp_path: Path) -> None:
    write_synthetic_task("shape", 30, 0, tmp_path / "data")
    splits = load_folder(tmp_path / "data")
    assert len(splits.train) == 30 and "triangle" in splits.classes
    with pytest.raises(UnknownNameError, match="task 'shapes'"):
        write_synthetic_task("shapes", 30, 0, tmp_path / "other")


def test_a_stopped_training_reads_no_more_pictures(tmp_path: Path) -> None:
    training = Training()
    training.stop()
    unreadable = [tmp_path] * MIN_PICTURES
    groups = [("a", unreadable), ("b", unreadable)]
    with pytest.raises(SettingError, match="Training was stopped"):
        write_uploaded_pictures(groups, tmp_path / "data", training.check_not_stopped)
