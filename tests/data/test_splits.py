from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_folders import faulty, fill
from PIL import Image

from aoft_deploy.data.folder import load_folder
from aoft_deploy.data.sources import load_data
from aoft_deploy.data.splits import ImageList, find_faults, named_faults
from aoft_deploy.errors import DataError, ImageError


def test_an_item_is_an_rgb_image_and_its_label(parted: Path) -> None:
    splits = load_folder(parted)
    image, label = splits.train[4]
    assert (image.mode, image.size, label) == ("RGB", (3, 2), 1)
    assert len(splits.train) == 6


def test_arrays_can_be_images() -> None:
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    image, label = ImageList([pixels], [7])[0]
    assert (image.size, label) == ((3, 2), 7)
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_splits_are_ordered_by_class_and_can_be_pickled(parted: Path) -> None:
    splits = load_folder(parted)
    assert [splits.val[i][1] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert pickle.loads(pickle.dumps(splits)) == splits


def test_a_part_without_some_files_keeps_its_other_images(parted: Path) -> None:
    splits = load_folder(parted)
    gone = [splits.train.images[1], splits.val.images[0], *splits.val.images[4:]]
    left = splits.without([path for path in gone if isinstance(path, Path)])
    assert list(left.train.images) == [splits.train.images[i] for i in (0, 2, 3, 4, 5)]
    assert list(left.val.labels) == [0, 0, 1]
    assert left.test == splits.test
    arrays = ImageList([np.zeros((2, 2, 3), np.uint8)], [0])
    assert replace(splits, test=arrays).without([Path("x")]).test is not None


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("train/dog/*", "No image of class 'dog' in train can"), ("test/*/*", "No image in test can")],
)
def test_leaving_out_a_whole_class_or_part_is_refused(
    parted: Path, pattern: str, message: str
) -> None:
    with pytest.raises(DataError, match=f"^{message} be used: add some"):
        load_folder(parted).without(list(parted.glob(pattern)))


def test_an_unreadable_file_is_reported_on_access(parted: Path) -> None:
    (parted / "train" / "cat" / "000.png").write_bytes(b"-")
    splits = load_folder(parted)
    assert splits.train[1][1] == 0
    with pytest.raises(ImageError, match=r"train/cat/000\.png': it is of no allowed format"):
        splits.train[0]


def test_the_check_accepts_sound_files_and_arrays(parted: Path) -> None:
    assert not faulty(load_folder(parted).train)
    assert not faulty(ImageList([np.zeros((2, 2, 3), np.uint8)], [0]))


def test_the_first_five_faults_are_named(flat: Path) -> None:
    for number in range(2, 9):
        (flat / "cat" / f"{number:03}.png").write_bytes(b"")
    faults = find_faults(sorted((flat / "cat").iterdir()), whole=False)
    text = named_faults(faults)
    assert text.startswith("Cannot read image '") and "002.png': it is empty; " in text
    assert text.endswith("006.png': it is empty; and 2 more")


def test_the_summary_gives_numbers_and_origins(flat: Path) -> None:
    origin = "(10% of each class, split off with seed 3)"
    assert load_folder(flat, seed=3).summary() == [
        ("data", f"{flat}: 50 images of 2 classes (cat, dog)"),
        ("train", "40 images, 16 to 24 of a class (the rest of each class)"),
        ("val", f"5 images, 2 to 3 of a class {origin}"),
        ("test", f"5 images, 2 to 3 of a class {origin}"),
    ]
    data = "digits, a built-in task: 1,797 images of 10 classes (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)"
    assert load_data("digits").summary()[0] == ("data", data)


def test_the_summary_names_folders_and_missing_parts(parted: Path) -> None:
    (parted / "test").rename(parted / ".test")
    (parted / "val").rename(parted / "Validation")
    for number in range(20):
        fill(parted / "train" / f"x{number:02}", 1)
    data, train, val = (phrase for _, phrase in load_folder(parted).summary())
    assert data.endswith(f" 22 classes (cat, dog, {', '.join(f'x{n:02}' for n in range(8))}, …)")
    assert train == "26 images, 1 to 3 of a class (from train)"
    assert val == "6 images, 0 to 3 of a class (from Validation)"
    (parted / "Validation").rename(parted / ".val")
    origin = "10% of train, split off with seed 0: there is no folder val"
    assert load_folder(parted).summary()[2] == ("val", f"2 images, 0 to 1 of a class ({origin})")


def test_decoding_finds_faults_that_headers_hide(parted: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    cats = parted / "train" / "cat"
    for path in cats.iterdir():
        path.unlink()
    contents: dict[str, bytes] = {}
    for number, format in enumerate(("JPEG", "PNG", "WEBP", "GIF")):
        path = cats / f"cut {number}.{format.lower()}"
        Image.fromarray(noise).save(path, format)
        contents[path.name] = path.read_bytes()
        path.write_bytes(contents[path.name][: len(contents[path.name]) // 2])
    whole = contents["cut 0.jpeg"]
    (cats / "zeros.jpg").write_bytes(whole[: len(whole) // 2] + bytes(len(whole) // 2))
    png = bytearray(contents["cut 1.png"])
    png[len(png) // 2] ^= 0xFF
    (cats / "bit.png").write_bytes(bytes(png))
    (cats / "sound.jpg").write_bytes(whole)
    (cats / "sound padded.jpg").write_bytes(whole + bytes(512))
    train = load_folder(parted).train
    assert faulty(train) == ["cut 2.webp"]  # a WebP's header has its length
    cut = ["cut 0.jpeg", "cut 1.png", "cut 2.webp", "cut 3.gif"]
    assert faulty(train, whole=True) == ["bit.png", *cut, "zeros.jpg"]


def test_every_file_is_checked_however_many_there_are(
    flat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aoft_deploy.data.splits._QUEUED_FILES", 3)
    paths = sorted(flat.rglob("*.png"))
    for path in paths[::7]:
        path.write_bytes(b"")
    looked: list[int] = []
    faults = find_faults(paths, whole=True, tick=lambda: looked.append(1))
    assert len(faults) == 8
    assert [path for path, _ in faults] == paths[::7]
    assert all(str(path) in fault for path, fault in faults)
    assert len(looked) == len(paths) == 50
