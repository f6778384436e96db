from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from image_folders import faulty, fill, names
from PIL import Image

from aoft_deploy.data.folder import load_folder
from aoft_deploy.data.listing import IMAGE_SUFFIXES, describe_skipped, image_files
from aoft_deploy.data.splits import ImageList
from aoft_deploy.errors import DataError, ImageError


def test_images_of_a_folder_are_found_and_other_files_are_counted(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpe", "sub/c.JPG", "__MACOSX/d.png", ".hidden/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (3, 2)).save(tmp_path / name, "PNG")
    for name in ("a.heic", "sub/b.HEIC", "notes.txt", ".f.txt"):
        (tmp_path / name).touch()
    skipped = Counter[str]()
    found = [str(path.relative_to(tmp_path)) for path in image_files([tmp_path], skipped)]
    assert found == ["a.jpe", "b.png", "sub/c.JPG"]
    assert describe_skipped(skipped) == "3 files with other suffixes skipped (.heic 2, .txt 1)"
    assert describe_skipped(Counter()) == ""


def test_a_folder_without_images_is_refused_with_its_skipped_files(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=rf"There are no images in the folder {tmp_path}\.$"):
        image_files([tmp_path])
    (tmp_path / "a.heic").touch()
    with pytest.raises(ImageError, match=r": 1 file with another suffix skipped \(\.heic 1\)\.$"):
        image_files([tmp_path])


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ImageError, match=r"cannot be listed: .*symbolic links"):
        image_files([tmp_path])


def test_suffixes_are_lower_case_and_belong_to_allowed_formats() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".ppm"} <= IMAGE_SUFFIXES
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in IMAGE_SUFFIXES)
    assert not {".eps", ".psd", ".ico"} & IMAGE_SUFFIXES


def test_files_that_are_no_images_are_skipped(parted: Path) -> None:
    cats = parted / "train" / "cat"
    for name in ("Thumbs.db", ".DS_Store", "._000.png", ".hidden.jpg", "notes.txt", "no_suffix"):
        (cats / name).write_bytes(b"-")
    fill(cats / ".cache", 2)
    (parted / "train" / ".ipynb_checkpoints").mkdir()
    (parted / "train" / "readme.md").touch()
    Image.new("RGB", (1, 1)).save(cats / "LOUD.JPG", "JPEG")
    splits = load_folder(parted)
    assert names(splits.train)[:4] == [*(f"cat/{i:03}.png" for i in range(3)), "cat/LOUD.JPG"]
    assert splits.classes == ("cat", "dog")


def test_files_with_other_suffixes_are_counted(parted: Path) -> None:
    for number in range(12):
        (parted / "train" / "cat" / f"{number}.HEIC").write_bytes(b"-")
    (parted / "val" / "dog" / "list.txt").touch()
    note = "13 files with other suffixes skipped (.heic 12, .txt 1)"
    assert load_folder(parted).notes == (note,)


def test_a_class_with_only_other_suffixes_is_refused_with_their_number(flat: Path) -> None:
    for path in [*(flat / "cat").iterdir()]:
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(
        DataError, match=r"class folder 'cat': .* \(20 files with other suffixes skip"
    ):
        load_folder(flat)


@pytest.mark.parametrize("suffix", [".jpe", ".JPE", ".jif", ".pjpeg", ".apng", ".mpo", ""])
def test_files_with_unusual_or_no_suffixes_are_images(flat: Path, suffix: str) -> None:
    for number, format in enumerate(("JPEG", "PNG", "GIF", "WEBP")):
        image = Image.new("RGB", (3, 2))
        image.save(flat / "cat" / f"photo {number}{suffix}", format)
    splits = load_folder(flat)
    assert splits.test is not None
    assert len(splits.train) + len(splits.val) + len(splits.test) == 54
    assert not splits.notes
    for images in (splits.train, splits.val, splits.test):
        assert not faulty(images, whole=True)


def test_text_without_a_suffix_is_no_image(flat: Path) -> None:
    for name, text in (("BMW", "BM is a brand"), ("P2", "P2 is a class"), ("riff", "RIFF...")):
        (flat / "cat" / name).write_text(text)
    assert load_folder(flat).notes == ("3 files with other suffixes skipped (no suffix 3)",)


def test_pipes_are_no_images_and_broken_links_are_faults(flat: Path) -> None:
    os.mkfifo(flat / "cat" / "pipe.png")
    (flat / "cat" / "dead.png").symlink_to(flat / "nowhere.png")
    splits = load_folder(flat)
    assert splits.test is not None
    paths = [*splits.train.images, *splits.val.images, *splits.test.images]
    assert not any(Path(str(path)).name == "pipe.png" for path in paths)
    assert faulty(ImageList(paths, [0] * len(paths))) == ["dead.png"]
