from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from image_folders import fill, names, pixels

from aoft_deploy.data.folder import check_outside, load_folder, write_folder
from aoft_deploy.data.sources import load_data
from aoft_deploy.data.splits import ImageList, Splits
from aoft_deploy.data.synthetic import load_task
from aoft_deploy.errors import DataError, ImageError, OutputError, SettingError


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_existing_parts_are_used(parted: Path, val: str) -> None:
    (parted / "val").rename(parted / val)
    (parted / "annotations").mkdir()
    splits = load_folder(parted)
    assert splits.classes == ("cat", "dog")
    for images in (splits.train, splits.val, splits.test):
        assert names(images) == [f"{n}/{i:03}.png" for n in ("cat", "dog") for i in range(3)]
    assert f"/{val}/" in str(splits.val.images[0])


def test_the_test_part_is_optional(parted: Path) -> None:
    (parted / "test").rename(parted / ".test")
    assert load_folder(parted).test is None


def test_without_val_it_is_split_off_from_train(parted: Path) -> None:
    (parted / "val").rename(parted / ".val")
    splits = load_folder(parted)
    assert (len(splits.train), len(splits.val)) == (4, 2)
    assert not set(names(splits.train)) & set(names(splits.val))
    assert splits.test is not None and len(splits.test) == 6


def test_class_folders_are_split_by_fractions(flat: Path) -> None:
    splits = load_folder(flat, val_fraction=0.2, test_fraction=0.1)
    assert splits.test is not None
    for images, cats, dogs in ((splits.train, 14, 21), (splits.val, 4, 6), (splits.test, 2, 3)):
        assert list(images.labels) == [0] * cats + [1] * dogs
    everything = names(splits.train) + names(splits.val) + names(splits.test)
    assert len(everything) == len(set(everything)) == 50


def test_the_split_depends_on_the_seed_and_not_on_the_order_on_disk(flat: Path) -> None:
    first = load_folder(flat, seed=1)
    assert load_folder(flat, seed=1) == first
    assert names(load_folder(flat, seed=2).val) != names(first.val)
    ordered = os.listdir(flat / "cat")
    for name in reversed(ordered):  # change the order on disk
        (flat / "cat" / name).rename(flat / "cat" / f"{name}.tmp")
    for name in ordered:
        (flat / "cat" / f"{name}.tmp").rename(flat / "cat" / name)
    assert load_folder(flat, seed=1) == first


def test_another_class_does_not_change_the_split_of_the_first(flat: Path) -> None:
    before = load_folder(flat)
    fill(flat / "ant", 10)
    after = load_folder(flat)
    assert [name for name in names(after.val) if "ant" not in name] == names(before.val)


@pytest.mark.parametrize("count", range(3, 12))
@pytest.mark.parametrize("shares", [(0.1, 0.1), (0.9, 0.05), (0.05, 0.9), (0.5, 0.49)])
def test_each_part_has_an_image_of_each_class(
    tmp_path: Path, count: int, shares: tuple[float, float]
) -> None:
    for name in ("a", "b"):
        fill(tmp_path / name, count)
    splits = load_folder(tmp_path, val_fraction=shares[0], test_fraction=shares[1])
    for images in (splits.train, splits.val, splits.test):
        assert images is not None and set(images.labels) == {0, 1}


def test_a_fraction_of_zero_makes_no_test_part(flat: Path) -> None:
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
    (note,) = splits.notes
    assert note.startswith("Sub-folders of class folders, such as 'cat/indoors/asleep', are not")


def test_one_folder_of_images_within_each_class_folder_is_no_reason_for_a_note(
    tmp_path: Path,
) -> None:
    for name in ("cat", "dog"):
        fill(tmp_path / name / "images", 4)
    assert not load_folder(tmp_path).notes


def test_a_folder_that_does_not_exist_is_refused_with_a_similar_one(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"photoes' does not exist; did you mean '.*/photos'.$"):
        load_folder(tmp_path / "photoes")
    with pytest.raises(DataError, match="other' does not exist: check the path"):
        load_folder(tmp_path / "other")


def test_a_file_in_place_of_a_folder_is_refused_by_what_it_is(tmp_path: Path) -> None:
    fill(tmp_path / "cat", 1)
    for name, format in (("a.zip", "zip"), ("a.tar", "tar"), ("a.tgz", "gztar")):
        made = shutil.make_archive(str(tmp_path / "made"), format, tmp_path / "cat")
        Path(made).rename(tmp_path / name)
        with pytest.raises(DataError, match=rf"{name}' is an archive: unpack it"):
            load_folder(tmp_path / name)
    with pytest.raises(DataError, match=r"000.png' is one image: give the folder"):
        load_folder(tmp_path / "cat" / "000.png")
    (tmp_path / "labels.csv").write_text("000.png,cat")
    for path in (tmp_path / "labels.csv", Path("/dev/null")):
        with pytest.raises(DataError, match=f"{path.name}' is a file, and lists of images are not"):
            load_folder(path)


def test_copies_of_training_images_in_other_parts_are_told(parted: Path) -> None:
    assert not load_folder(parted).notes
    for number in (0, 2):
        copied = parted / "train" / "cat" / f"{number:03}.png"
        shutil.copyfile(copied, parted / "test" / "cat" / copied.name)
    (parted / "val" / "cat" / "001.png").unlink()
    (parted / "val" / "cat" / "001.png").symlink_to("nowhere")
    note = "2 of 6 images of test are also in train: its accuracy misleads"
    assert load_folder(parted).notes == (note,)


def test_an_output_folder_among_the_class_folders_is_refused(parted: Path) -> None:
    splits = load_folder(parted / "train")
    for out in (parted / "train" / "runs", parted / "train" / "cat" / "run"):
        with pytest.raises(
            OutputError, match=rf"{out} lies among the class folders of .*/train an"
        ):
            check_outside(splits, out)
    check_outside(load_folder(parted), parted / "runs")
    check_outside(load_data("digits"), parted)


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    with pytest.raises(DataError, match="has no class folders: put each class's images into"):
        load_folder(tmp_path)


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


def test_a_class_too_small_to_split_is_in_train_and_then_in_val(flat: Path) -> None:
    before = load_folder(flat)
    fill(flat / "eel", 2)
    fill(flat / "fly", 1)
    splits = load_folder(flat)
    assert splits.notes == (
        "val has no images of class 'fly'",
        "test has no images of class 'eel', 'fly'",
    )
    assert [list(images.labels).count(2) for images in splits.parts().values()] == [1, 1, 0]
    assert [list(images.labels).count(3) for images in splits.parts().values()] == [1, 0, 0]
    assert splits.val.images[: len(before.val)] == before.val.images


def test_without_a_class_of_two_or_three_images_there_is_no_val_or_test(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        fill(tmp_path / name, 1)
    with pytest.raises(DataError, match="No class has two images to split into train and val and"):
        load_folder(tmp_path)
    fill(tmp_path / "dog", 2)
    splits = load_folder(tmp_path)
    assert (names(splits.train)[0], len(splits.train), len(splits.val)) == ("cat/000.png", 2, 1)
    assert splits.test is None


def test_a_class_missing_in_train_is_named_with_a_similar_one(parted: Path) -> None:
    (parted / "val" / "dog").rename(parted / "val" / "dogs")
    with pytest.raises(
        DataError, match=r"Class 'dogs' of val is not in train; did you mean 'dog'\?"
    ):
        load_folder(parted)
    (parted / "val" / "dogs").rename(parted / "val" / "x")
    with pytest.raises(DataError, match="Class 'x' of val is not in train: add it there or remov"):
        load_folder(parted)


def test_a_part_without_images_is_named(parted: Path) -> None:
    for path in (parted / "test").rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="part test has no images: add some or remove it"):
        load_folder(parted)


def test_a_class_without_images_outside_train_is_allowed(parted: Path) -> None:
    for path in (parted / "val" / "cat").iterdir():
        path.unlink()
    assert set(load_folder(parted).val.labels) == {1}


def test_a_folder_that_cannot_be_listed_is_refused(parted: Path) -> None:
    loop = parted / "train" / "cat" / "loop"
    loop.symlink_to(loop)
    message = r"Data folder '.*' cannot be listed: .*symbolic links \('.*train/cat/loop'\)"
    with pytest.raises(DataError, match=message):
        load_folder(parted)


@pytest.mark.parametrize("shares", [(0, 0.1), (1, 0), (0.5, 0.5), (0.1, -0.1), (float("nan"), 0)])
def test_fractions_outside_their_range_are_refused(flat: Path, shares: tuple[float, float]) -> None:
    with pytest.raises(
        SettingError, match="but the first must be above 0, the second from 0, and their"
    ):
        load_folder(flat, val_fraction=shares[0], test_fraction=shares[1])


def test_a_negative_seed_is_refused(flat: Path) -> None:
    with pytest.raises(SettingError, match="`seed` is -1, but must be a whole number from 0"):
        load_folder(flat, seed=-1)


def test_each_class_has_its_own_permutation(tmp_path: Path) -> None:
    for name in ("cat", "dog", "eel"):
        fill(tmp_path / name, 40)
    val = names(load_folder(tmp_path, val_fraction=0.3).val)
    chosen = {name: [n[4:] for n in val if n.startswith(name)] for name in ("cat", "dog", "eel")}
    assert len({tuple(files) for files in chosen.values()}) == 3
    fill(tmp_path / "cat", 5, first=40)  # changes only the split of this class
    (tmp_path / "dog" / "039.png").unlink()
    after = names(load_folder(tmp_path, val_fraction=0.3).val)
    assert [n for n in after if n.startswith("eel")] == [n for n in val if n.startswith("eel")]


def small_task() -> Splits:
    return load_task("shape", train=40, val=20, test=20)


def test_a_written_task_reads_back_the_same(tmp_path: Path) -> None:
    splits = small_task()
    write_folder(splits, tmp_path / "new" / "shapes")
    back = load_folder(tmp_path / "new" / "shapes")
    assert back.classes == splits.classes
    for ours, theirs in (
        (splits.train, back.train),
        (splits.val, back.val),
        (splits.test, back.test),
    ):
        assert ours is not None
        order = np.argsort(ours.labels, kind="stable")
        np.testing.assert_array_equal(np.array(pixels(theirs)), np.array(pixels(ours))[order])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["shapes"]


def test_a_task_without_a_test_part_is_written_without_one(tmp_path: Path) -> None:
    write_folder(load_task("shape", train=6, val=6, test=0), tmp_path / "shapes")
    assert sorted(path.name for path in (tmp_path / "shapes").iterdir()) == ["train", "val"]


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already: remove it or name another"):
        write_folder(small_task(), tmp_path)


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"Folder '.*file/shapes' cannot be written: "):
        write_folder(small_task(), tmp_path / "file" / "shapes")


def test_a_write_that_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    images = ImageList([np.zeros((4, 4, 3), np.uint8), tmp_path / "missing.png"], [0, 1])
    with pytest.raises(ImageError, match=r"missing\.png"):
        write_folder(Splits(images, images, None, ("a", "b")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
