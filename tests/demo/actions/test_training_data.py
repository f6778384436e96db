"""Pictures of a visitor's classes: kept in the session's folder, then split for a training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from aoft_demo.actions import training_data
from aoft_demo.actions.training_data import (
    MAX_PICTURES,
    Example,
    forget_pictures,
    keep_picture,
    write_pictures,
)
from aoft_demo.tasks.training_queue import Training
from aoft_deploy.data.folder import load_folder
from aoft_deploy.data.images import read_size
from aoft_deploy.errors import DataError, ImageError, SettingError


@pytest.fixture
def keep(tmp_path: Path) -> Callable[..., list[Example]]:
    """Keep pictures of one brightness each, from 0, in the session's folder ``tmp_path``."""

    def keep_some(first: int, count: int, burst: int = 0) -> list[Example]:
        examples = [Example(f"{first + i:032x}", burst) for i in range(count)]
        for i, example in enumerate(examples):
            Image.new("RGB", (8, 8), (first + i,) * 3).save(tmp_path / "upload.png")
            keep_picture(tmp_path, tmp_path / "upload.png", example.id, "upload.png")
        return examples

    return keep_some


def shades(files: Sequence[Path]) -> list[int]:
    """The brightness of pictures."""
    return [Image.open(file).getpixel((0, 0))[0] for file in files]  # type: ignore[index]


def test_the_last_pictures_of_each_burst_are_held_out(
    tmp_path: Path, keep: Callable[..., list[Example]]
) -> None:
    left = [*keep(0, 12, burst=1), *keep(12, 12, burst=2)]
    right = keep(100, 12)
    write_pictures(
        tmp_path, [("left", left), ("empty", []), (" right  side", right)], tmp_path / "d"
    )
    splits = load_folder(tmp_path / "d")
    assert splits.classes == ("left", "right side") and splits.test is not None
    parts = {name: shades(images.files()) for name, images in splits.parts().items()}
    assert parts["test"] == [10, 11, 22, 23, 105, 111]
    assert parts["val"] == [8, 9, 20, 21, 104, 110]
    assert sorted(shade for part in parts.values() for shade in part) == [
        *range(24),
        *range(100, 112),
    ]


def test_few_pictures_have_no_test(tmp_path: Path, keep: Callable[..., list[Example]]) -> None:
    classes = [("a", keep(0, 3)), ("b", keep(50, 5, burst=1)), ("c", keep(90, 30))]
    write_pictures(tmp_path, classes, tmp_path / "d")
    splits = load_folder(tmp_path / "d")
    assert splits.test is None
    assert shades(splits.val.files()) == [2, 54, 95, 101, 107, 113, 119]
    assert len(splits.train) == 38 - len(splits.val)


def test_large_pictures_are_shrunk_and_pictures_can_be_forgotten(tmp_path: Path) -> None:
    Image.new("RGB", (2000, 1000)).save(tmp_path / "large.png")
    keep_picture(tmp_path, tmp_path / "large.png", "a" * 32, "large.png")
    kept = tmp_path / "pictures" / f"{'a' * 32}.png"
    assert read_size(kept) == (320, 160)
    forget_pictures(tmp_path, ["a" * 32, "b" * 32])
    assert not kept.exists()
    with pytest.raises(SettingError, match="not the name of a picture"):
        forget_pictures(tmp_path, ["../large"])
    assert (tmp_path / "large.png").exists()


def test_an_unusable_picture_is_refused_by_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "upload.png").write_bytes(b"odd")
    with pytest.raises(ImageError, match=r"my odd\.png") as refused:
        keep_picture(tmp_path, tmp_path / "upload.png", "a" * 32, "my odd.png")
    assert "upload.png" not in str(refused.value)
    with pytest.raises(SettingError, match="not the name of a picture"):
        keep_picture(tmp_path, tmp_path / "upload.png", "../a", "a")
    monkeypatch.setattr(training_data, "MAX_PICTURES", 1)
    for i in range(training_data.MAX_CLASSES):
        (tmp_path / "pictures" / f"{i}.png").touch()
    with pytest.raises(SettingError, match="holds 4 pictures, which is the limit"):
        keep_picture(tmp_path, tmp_path / "upload.png", "a" * 32, "a")


def test_unusable_classes_are_refused(tmp_path: Path, keep: Callable[..., list[Example]]) -> None:
    good = keep(0, 4)
    many = [Example(f"{i:032x}") for i in range(MAX_PICTURES + 1)]
    for classes, error, message in (
        ([("a", good)], DataError, "needs at least two classes"),
        ([(n, good) for n in "abcde"], DataError, "has at most 4 classes"),
        ([("a", good), ("b", good[:2])], DataError, "Class 'b' has 2 pictures, but must have 3"),
        ([("a", good), ("b", many)], DataError, f"Class 'b' has {MAX_PICTURES + 1} pictures"),
        ([("a", good), (" ", good)], SettingError, "Class 2 has pictures but no name"),
        ([("a", good), ("a ", good)], SettingError, "Two classes are called 'a'"),
        ([("a", good), ("Testing", good)], SettingError, "cannot be called 'Testing'"),
        ([("a", good), ("../b", good)], SettingError, "starts with a letter"),
    ):
        with pytest.raises(error, match=message):
            write_pictures(tmp_path, classes, tmp_path / "d")
        assert not (tmp_path / "d").exists()
    forget_pictures(tmp_path, [good[3].id])
    with pytest.raises(SettingError, match="A picture of class 'a' is no longer here"):
        write_pictures(tmp_path, [("a", good), ("b", good)], tmp_path / "d")


def test_a_stopped_training_writes_no_more_pictures(
    tmp_path: Path, keep: Callable[..., list[Example]]
) -> None:
    training = Training()
    training.stop()
    with pytest.raises(SettingError, match="Training was stopped"):
        write_pictures(
            tmp_path,
            [("a", keep(0, 3)), ("b", keep(9, 3))],
            tmp_path / "d",
            training.check_not_stopped,
        )
