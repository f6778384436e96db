from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from image_folders import check_images, fill
from PIL import Image

from aoft_deploy.data.folder import load_folder
from aoft_deploy.data.sources import load_data
from aoft_deploy.data.splits import ImageList, find_faults
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


def test_an_unreadable_file_is_reported_on_access(parted: Path) -> None:
    (parted / "train" / "cat" / "000.png").write_bytes(b"-")
    splits = load_folder(parted)
    assert splits.train[1][1] == 0
    with pytest.raises(ImageError, match=r"train/cat/000\.png': it is of no allowed format"):
        splits.train[0]


def test_the_check_accepts_sound_files_and_arrays(parted: Path) -> None:
    check_images(load_folder(parted).train)
    check_images(ImageList([np.zeros((2, 2, 3), np.uint8)], [0]))


def test_the_check_names_the_first_five_faults(flat: Path) -> None:
    for number in range(2, 9):
        (flat / "cat" / f"{number:03}.png").write_bytes(b"")
    paths = sorted((flat / "cat").iterdir())
    message = (
        r"^7 of 20 images cannot be used: Cannot read image '.*002\.png': it is empty; "
        r".*006\.png': it is empty; and 2 more\.$"
    )
    with pytest.raises(DataError, match=message):
        check_images(ImageList(paths, [0] * 20))


def test_the_summary_gives_numbers_and_origins(flat: Path) -> None:
    assert load_folder(flat, seed=3).summary() == [
        "2 classes: cat, dog",
        "images: train 40 (the rest of each class), val 5 (split off with seed 3), "
        "test 5 (split off with seed 3)",
    ]
    assert load_data("digits").summary()[1] == "images: train 1,000, val 200, test 597"


def test_the_summary_names_folders_and_missing_parts(parted: Path) -> None:
    (parted / "test").rename(parted / ".test")
    (parted / "val").rename(parted / "Validation")
    for number in range(20):
        fill(parted / "train" / f"x{number:02}", 1)
    first, second = load_folder(parted).summary()
    assert first == f"22 classes: cat, dog, {', '.join(f'x{n:02}' for n in range(8))}, …"
    assert second == "images: train 26 (from train), val 6 (from Validation), test none"


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
    with pytest.raises(DataError, match=r"^1 of 11 images"):  # a WebP's header has its length
        check_images(train)
    message = r"^6 of 11 images cannot be used: .*bit\.png.*; and 1 more\.$"
    with pytest.raises(DataError, match=message):
        check_images(train, whole=True)


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
    assert all(str(path) in fault for path, fault in zip(paths[::7], faults, strict=True))
    assert len(looked) == len(paths) == 50
