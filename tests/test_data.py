from __future__ import annotations

import itertools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aoft_deploy.data import ImageList, check_images, load_data, load_folder
from aoft_deploy.errors import DataError, ImageError, SettingError, UnknownNameError


def fill(folder: Path, count: int, first: int = 0) -> None:
    """Put ``count`` small images of different colours into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        Image.new("RGB", (3, 2), (number, 0, 0)).save(folder / f"{number:03}.png")


def names(images: ImageList | None) -> list[str]:
    assert images is not None
    return ["/".join(Path(str(path)).parts[-2:]) for path in images.images]


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for name, count in (("cat", 20), ("dog", 30)):
        fill(tmp_path / name, count)
    return tmp_path


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    for part, name in itertools.product(("train", "val", "test"), ("cat", "dog")):
        fill(tmp_path / part / name, 3)
    return tmp_path


def test_an_item_is_an_rgb_image_and_its_label(ready: Path) -> None:
    splits = load_folder(ready)
    image, label = splits.train[4]
    assert (image.mode, image.size, label) == ("RGB", (3, 2), 1)
    assert len(splits.train) == 6


def test_arrays_serve_as_images() -> None:
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    image, label = ImageList([pixels], [7])[0]
    assert (image.size, label) == ((3, 2), 7)
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_splits_are_in_the_order_of_the_classes_and_survive_pickling(ready: Path) -> None:
    splits = load_folder(ready)
    assert [splits.val[i][1] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert pickle.loads(pickle.dumps(splits)) == splits


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_parts_that_stand_ready_are_taken(ready: Path, val: str) -> None:
    (ready / "val").rename(ready / val)
    (ready / "annotations").mkdir()
    splits = load_folder(ready)
    assert splits.classes == ("cat", "dog")
    for images in (splits.train, splits.val, splits.test):
        assert names(images) == [f"{n}/{i:03}.png" for n in ("cat", "dog") for i in range(3)]
    assert f"/{val}/" in str(splits.val.images[0])


def test_without_test_there_is_none(ready: Path) -> None:
    (ready / "test").rename(ready / ".test")
    assert load_folder(ready).test is None


def test_without_val_it_is_cut_from_train(ready: Path) -> None:
    (ready / "val").rename(ready / ".val")
    splits = load_folder(ready)
    assert (len(splits.train), len(splits.val)) == (4, 2)
    assert not set(names(splits.train)) & set(names(splits.val))
    assert splits.test is not None and len(splits.test) == 6


def test_class_folders_are_split_by_share(flat: Path) -> None:
    splits = load_folder(flat, val_fraction=0.2, test_fraction=0.1)
    assert splits.test is not None
    for images, cats, dogs in ((splits.train, 14, 21), (splits.val, 4, 6), (splits.test, 2, 3)):
        assert list(images.labels) == [0] * cats + [1] * dogs
    everything = names(splits.train) + names(splits.val) + names(splits.test)
    assert len(everything) == len(set(everything)) == 50


def test_the_split_depends_on_the_seed_alone(flat: Path) -> None:
    first = load_folder(flat, seed=1)
    assert load_folder(flat, seed=1) == first
    assert load_folder(flat, seed=2) != first
    ordered = os.listdir(flat / "cat")
    for name in reversed(ordered):  # a new order on the disk
        (flat / "cat" / name).rename(flat / "cat" / f"{name}.tmp")
    for name in ordered:
        (flat / "cat" / f"{name}.tmp").rename(flat / "cat" / name)
    assert load_folder(flat, seed=1) == first


def test_another_class_leaves_the_split_of_the_first_as_it_was(flat: Path) -> None:
    before = load_folder(flat)
    fill(flat / "ant", 10)
    after = load_folder(flat)
    assert [name for name in names(after.val) if "ant" not in name] == names(before.val)


@pytest.mark.parametrize("count", range(3, 12))
@pytest.mark.parametrize("shares", [(0.1, 0.1), (0.9, 0.05), (0.05, 0.9), (0.5, 0.49)])
def test_each_part_keeps_an_image_of_each_class(
    tmp_path: Path, count: int, shares: tuple[float, float]
) -> None:
    for name in ("a", "b"):
        fill(tmp_path / name, count)
    splits = load_folder(tmp_path, val_fraction=shares[0], test_fraction=shares[1])
    for images in (splits.train, splits.val, splits.test):
        assert images is not None and set(images.labels) == {0, 1}


def test_a_share_of_zero_makes_no_test_part(flat: Path) -> None:
    splits = load_folder(flat, test_fraction=0)
    assert splits.test is None
    assert (len(splits.train), len(splits.val)) == (45, 5)


def test_folders_within_class_folders_are_searched(tmp_path: Path) -> None:
    fill(tmp_path / "cat" / "indoors" / "asleep", 4)
    fill(tmp_path / "cat", 4, first=10)
    fill(tmp_path / "dog", 4)
    splits = load_folder(tmp_path)
    assert splits.test is not None
    assert [len(images) for images in (splits.train, splits.val, splits.test)] == [8, 2, 2]


def test_what_is_no_image_is_passed_over(ready: Path) -> None:
    cats = ready / "train" / "cat"
    for name in ("Thumbs.db", ".DS_Store", "._000.png", ".hidden.jpg", "notes.txt", "no_suffix"):
        (cats / name).write_bytes(b"-")
    fill(cats / ".cache", 2)
    (ready / "train" / ".ipynb_checkpoints").mkdir()
    (ready / "train" / "readme.md").touch()
    Image.new("RGB", (1, 1)).save(cats / "LOUD.JPG", "JPEG")
    splits = load_folder(ready)
    assert names(splits.train)[:4] == [*(f"cat/{i:03}.png" for i in range(3)), "cat/LOUD.JPG"]
    assert splits.classes == ("cat", "dog")


def test_links_are_followed_once(ready: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    fill(elsewhere, 2, first=50)
    cats = ready / "train" / "cat"
    for link, target in (
        ("more", elsewhere),
        ("again", elsewhere),
        ("self", cats),
        ("up", ready),
        ("000-copy.png", cats / "000.png"),
    ):
        (cats / link).symlink_to(target)
    found = names(load_folder(ready).train)
    assert len([name for name in found if name.startswith(("more", "again"))]) == 2
    assert len([name for name in found if name.startswith("cat/")]) == 4
    assert len(found) == 4 + 2 + 3


def test_a_class_named_train_is_a_class(flat: Path) -> None:
    fill(flat / "train", 10)
    assert load_folder(flat).classes == ("cat", "dog", "train")


def test_a_folder_that_does_not_exist_or_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("none", "file"):
        with pytest.raises(DataError, match=f"Data folder '.*{name}' is not a folder: give one"):
            load_folder(tmp_path / name)


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    with pytest.raises(DataError, match="has no class folders: put each class's images into"):
        load_folder(tmp_path)


def test_parts_without_train_are_refused(ready: Path) -> None:
    (ready / "train").rename(ready / ".train")
    with pytest.raises(DataError, match="has test, val but no train/<class>: add it"):
        load_folder(ready)


def test_an_empty_class_folder_is_named(flat: Path) -> None:
    (flat / "eel").mkdir()
    with pytest.raises(DataError, match=r"No images for training in class folder 'eel': add some"):
        load_folder(flat)
    for number in range(6):
        (flat / f"empty{number}").mkdir()
    with pytest.raises(DataError, match=r"'eel', 'empty0', .*'empty3', …: add some"):
        load_folder(flat)


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "cat", 9)
    with pytest.raises(DataError, match="has one class, 'cat': use at least 2"):
        load_folder(tmp_path)


def test_a_class_too_small_to_split_is_named(flat: Path) -> None:
    fill(flat / "eel", 2)
    message = r"Class 'eel' has too few images \(2\) to split into train and val and test: add"
    with pytest.raises(DataError, match=message):
        load_folder(flat)
    assert load_folder(flat, test_fraction=0).classes == ("cat", "dog", "eel")


def test_a_class_that_train_lacks_is_named_with_its_likeness(ready: Path) -> None:
    (ready / "val" / "dog").rename(ready / "val" / "dogs")
    with pytest.raises(
        DataError, match=r"Class 'dogs' of val is not in train; did you mean 'dog'\?"
    ):
        load_folder(ready)
    (ready / "val" / "dogs").rename(ready / "val" / "x")
    with pytest.raises(DataError, match="Class 'x' of val is not in train: add it there or remov"):
        load_folder(ready)


def test_a_part_without_images_is_named(ready: Path) -> None:
    for path in (ready / "test").rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="part test has no images: add some or remove it"):
        load_folder(ready)


def test_a_class_without_images_outside_train_is_allowed(ready: Path) -> None:
    for path in (ready / "val" / "cat").iterdir():
        path.unlink()
    assert set(load_folder(ready).val.labels) == {1}


def test_a_folder_that_cannot_be_listed_is_refused(ready: Path) -> None:
    loop = ready / "train" / "cat" / "loop"
    loop.symlink_to(loop)
    with pytest.raises(DataError, match=r"Data folder '.*' cannot be listed: .*symbolic links"):
        load_folder(ready)


@pytest.mark.parametrize("shares", [(0, 0.1), (1, 0), (0.5, 0.5), (0.1, -0.1), (float("nan"), 0)])
def test_shares_outside_their_range_are_refused(flat: Path, shares: tuple[float, float]) -> None:
    with pytest.raises(SettingError, match="use val above 0, test from 0, and less than 1 togeth"):
        load_folder(flat, val_fraction=shares[0], test_fraction=shares[1])


def test_a_negative_seed_is_refused(flat: Path) -> None:
    with pytest.raises(SettingError, match="Seed is -1: use a whole number from 0"):
        load_folder(flat, seed=-1)


def test_a_file_that_cannot_be_read_is_named_when_asked_for(ready: Path) -> None:
    (ready / "train" / "cat" / "000.png").write_bytes(b"-")
    splits = load_folder(ready)
    assert splits.train[1][1] == 0
    with pytest.raises(ImageError, match=r"train/cat/000\.png': it is of no allowed format"):
        splits.train[0]


def test_checking_passes_sound_files_and_arrays(ready: Path) -> None:
    check_images(load_folder(ready).train)
    check_images(ImageList([np.zeros((2, 2, 3), np.uint8)], [0]))


def test_checking_names_the_first_five_faults(flat: Path) -> None:
    for number in range(2, 9):
        (flat / "cat" / f"{number:03}.png").write_bytes(b"")
    paths = sorted((flat / "cat").iterdir())
    message = (
        r"^7 of 20 images cannot be used: Cannot read image '.*002\.png': it is empty; "
        r".*006\.png': it is empty; and 2 more\.$"
    )
    with pytest.raises(DataError, match=message):
        check_images(ImageList(paths, [0] * 20))


def test_data_is_a_task_or_a_folder(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_data(str(flat), seed=3) == load_folder(flat, seed=3)
    assert load_data("digits").classes == tuple("0123456789")
    fill(flat / "digits" / "one", 3)
    fill(flat / "digits" / "two", 3)
    monkeypatch.chdir(flat)
    assert load_data("digits").classes == tuple("0123456789")
    assert load_data("./digits").classes == ("one", "two")


def test_data_that_is_neither_is_refused_with_the_known_tasks(tmp_path: Path) -> None:
    with pytest.raises(
        UnknownNameError, match=r"Unknown folder or task 'digts'\. Did you mean digi"
    ):
        load_data("digts")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is not a folder"):
        load_data(str(tmp_path / "file"))
