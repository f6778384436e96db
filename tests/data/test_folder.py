from __future__ import annotations

import itertools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aoft_deploy.data.folder import image_paths, load_folder
from aoft_deploy.data.sources import load_data
from aoft_deploy.data.splits import ImageList, find_faults, refuse_faults
from aoft_deploy.errors import DataError, ImageError, SettingError, UnknownNameError


def fill(folder: Path, count: int, first: int = 0) -> None:
    """Put ``count`` small images of different colours into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        Image.new("RGB", (3, 2), (number, 0, 0)).save(folder / f"{number:03}.png")


def check_images(split: ImageList, *, whole: bool = False) -> None:
    paths = image_paths(split)
    refuse_faults(find_faults(paths, whole=whole), len(paths))


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
    assert names(load_folder(flat, seed=2).val) != names(first.val)
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
    message = r"Data folder '.*' cannot be listed: .*symbolic links \('.*train/cat/loop'\)"
    with pytest.raises(DataError, match=message):
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


# Parts under other names


def three(root: Path, part: str, count: int = 4) -> None:
    for name in ("ant", "bee", "cow"):
        fill(root / part / name, count)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Training", None, "Testing"),
        ("Train", "Val", "Test"),
        ("train", "Validation", "Test"),
        ("TRAIN", None, "TEST"),
        ("train", "dev", "eval"),
        ("train", "eval", "test"),
        ("train", None, "evaluation"),
        ("trainset", "valset", "testset"),
        ("train2017", "val2017", "test2017"),
        ("Training_Images", "valid images", "test-data"),
        ("TrainImages", "DevSet", "TestSplit"),
    ],
)
def test_parts_are_known_by_their_usual_names(
    tmp_path: Path, train: str, val: str | None, test: str
) -> None:
    for part, count in ((train, 10), (val, 3), (test, 2)):
        if part is not None:
            three(tmp_path, part, count)
    splits = load_folder(tmp_path)
    assert splits.classes == ("ant", "bee", "cow")
    assert (len(splits.train), len(splits.val)) == ((30, 9) if val else (27, 3))
    assert splits.test is not None and len(splits.test) == 6
    assert not splits.passed_over
    for images, folder in ((splits.train, train), (splits.val, val or train), (splits.test, test)):
        assert {Path(str(path)).parts[-3] for path in images.images} == {folder}


@pytest.mark.parametrize("names", [("val", "valid"), ("dev", "Validation"), ("test", "Testing")])
def test_two_folders_for_one_part_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for part in ("train", *names):
        three(tmp_path, part)
    first, second = sorted(names)
    with pytest.raises(DataError, match=f"'{first}', '{second}', which all stand for .*: keep one"):
        load_folder(tmp_path)


def test_eval_beside_val_and_test_is_refused(tmp_path: Path) -> None:
    for part in ("train", "val", "test", "eval"):
        three(tmp_path, part)
    with pytest.raises(DataError, match="'test', 'eval', which all stand for test: keep one"):
        load_folder(tmp_path)


@pytest.mark.parametrize("name", ["Test", "train", "valid", "Development"])
def test_one_class_may_bear_the_name_of_a_part(flat: Path, name: str) -> None:
    fill(flat / name, 10)
    assert load_folder(flat).classes == tuple(sorted(("cat", "dog", name)))


def test_parts_without_classes_are_refused_whatever_their_names(tmp_path: Path) -> None:
    for part in ("Training", "Testing"):
        fill(tmp_path / part, 9)
    with pytest.raises(DataError, match="has Testing, Training but no train/<class>: add it"):
        load_folder(tmp_path)
    fill(tmp_path / "sample", 9)
    with pytest.raises(DataError, match=r"'Testing', 'Training' in '.*' look like parts"):
        load_folder(tmp_path)


@pytest.mark.parametrize("depth", ["", "seg_train"])
def test_names_that_speak_of_parts_are_refused(tmp_path: Path, depth: str) -> None:
    for part in ("seg_train", "seg_test", "seg_pred"):
        three(tmp_path / part, depth or ".")
    message = (
        "'seg_test', 'seg_train' in '.*' look like parts of a data set, not like classes: name"
    )
    with pytest.raises(DataError, match=message):
        load_folder(tmp_path)


def test_flat_folders_of_a_class_and_a_part_each_are_refused(tmp_path: Path) -> None:
    for name in ("cats_train", "cats_test", "dogs_train", "dogs_test"):
        fill(tmp_path / name, 5)
    with pytest.raises(DataError, match=r"'cats_test', .* look like parts of a data set"):
        load_folder(tmp_path)


def test_parts_below_the_classes_are_refused(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        for part in ("Train", "Test"):
            fill(tmp_path / name / part, 5)
    message = "class folder in .* the same sub-folders 'test', 'train': put the parts above the cla"
    with pytest.raises(DataError, match=message):
        load_folder(tmp_path)


@pytest.mark.parametrize("where", [".", "train"])
def test_the_same_folders_in_every_class_folder_are_refused(tmp_path: Path, where: str) -> None:
    for fold in ("fold 1", "fold 2"):
        three(tmp_path / where, fold)
    with pytest.raises(DataError, match="same sub-folders 'ant', 'bee', 'cow': if these are the c"):
        load_folder(tmp_path)


@pytest.mark.parametrize("second", [("ant", "bee"), ("ant",)])
def test_parts_in_another_language_are_refused(tmp_path: Path, second: tuple[str, ...]) -> None:
    three(tmp_path, "Entrenamiento")
    for name in second:
        fill(tmp_path / "Prueba" / name, 3)
    with pytest.raises(DataError, match=r"same sub-folders 'ant'.* name the folders above"):
        load_folder(tmp_path)


def test_two_parts_among_classes_are_refused(flat: Path) -> None:
    for part in ("val", "test"):
        fill(flat / part, 9)
    with pytest.raises(DataError, match=r"'test', 'val' in .* look like parts of a data set"):
        load_folder(flat)


def test_one_common_folder_is_a_place_for_images(tmp_path: Path) -> None:
    for name in ("n01443537", "n01629819"):  # as Tiny ImageNet has them
        fill(tmp_path / "train" / name / "images", 8)
        (tmp_path / "train" / name / f"{name}_boxes.txt").touch()
    splits = load_folder(tmp_path)
    assert splits.classes == ("n01443537", "n01629819")
    assert splits.passed_over == ("2 files of other suffixes passed over (.txt 2)",)


@pytest.mark.parametrize("beside", [(), ("docs",)])
def test_a_data_set_one_level_deeper_is_named(tmp_path: Path, beside: tuple[str, ...]) -> None:
    for part in ("train", "test"):
        three(tmp_path / "dataset", part)
    for name in beside:
        fill(tmp_path / name, 3)
    with pytest.raises(
        DataError, match=r"'dataset' in .* the parts 'test', 'train': give '.*/data"
    ):
        load_folder(tmp_path)
    three(tmp_path / "single" / "all", ".")
    with pytest.raises(
        DataError, match=r"one class, 'all': .* or give the folder that holds the cl"
    ):
        load_folder(tmp_path / "single")


def test_folders_beside_train_are_named(ready: Path) -> None:
    fill(ready / "unlabelled", 3)
    three(ready, "holdout")
    splits = load_folder(ready)
    assert splits.passed_over == ("Folders 'holdout', 'unlabelled' passed over",)
    assert splits.classes == ("cat", "dog")


def test_a_class_called_train_with_folders_in_it_is_not_taken_for_the_part(
    tmp_path: Path,
) -> None:
    for name in ("bus/red", "car/red", "train/steam", "train/diesel"):
        fill(tmp_path / name, 4)
    message = "'train' with sub-folders, and beside it 'bus', 'car' with images: move these away if"
    with pytest.raises(DataError, match=message):
        load_folder(tmp_path)


def test_what_systems_leave_behind_is_no_class(ready: Path, flat: Path) -> None:
    for folder in (ready, ready / "train", ready / "train" / "cat"):
        for name in ("__MACOSX", "@eaDir", "$RECYCLE.BIN", ".Trash"):
            fill(folder / name / "cat", 2)
        (folder / ".DS_Store").touch()
        (folder / "._000.png").write_bytes(b"\x00\x05\x16\x07")
    for name in ("cat", "dog"):
        (ready / name).rename(ready.parent / f"{ready.name} {name}")
    splits = load_folder(ready)
    assert splits.classes == ("cat", "dog")
    assert len(splits.train) == 6
    assert not splits.passed_over


def test_a_test_part_without_labels_is_told_and_one_for_validation_is_refused(ready: Path) -> None:
    for part in ("val", "test"):
        for path in [*(ready / part).rglob("*.png")]:
            path.rename(ready / part / f"{path.parent.name}-{path.name}")
        for name in ("cat", "dog"):
            (ready / part / name).rmdir()
    with pytest.raises(DataError, match="has images in 'val' but no class folders there: put each"):
        load_folder(ready)
    for path in (ready / "val").iterdir():
        path.unlink()
    (ready / "val").rmdir()
    splits = load_folder(ready)
    assert splits.passed_over == (f"6 images in no class folder passed over (in '{ready}/test')",)
    assert splits.test is not None
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [2, 2, 2]


@pytest.mark.parametrize("where", [".", "train", "test"])
def test_images_beside_class_folders_are_told(ready: Path, where: str) -> None:
    fill(ready / where, 1)
    told = f"1 image in no class folder passed over (in {str(ready / where)!r})"
    assert load_folder(ready).passed_over == (told,)


def test_classes_that_a_part_lacks_are_told(ready: Path) -> None:
    for path in [*(ready / "val" / "cat").iterdir()]:
        path.unlink()
    assert load_folder(ready).passed_over == ("val has no images of class 'cat'",)


def test_two_links_to_one_folder_are_refused(flat: Path) -> None:
    (flat / "tiger").symlink_to(flat / "cat")
    with pytest.raises(
        DataError, match=r"'cat', 'tiger' in .* are the same folder: remove one link"
    ):
        load_folder(flat)


def test_a_part_that_is_a_link_to_another_is_refused(ready: Path) -> None:
    (ready / "val").rename(ready / ".val")
    (ready / "val").symlink_to(ready / "train")
    with pytest.raises(DataError, match=r"'train', 'val' in .* are the same folder"):
        load_folder(ready)


def test_a_class_of_other_case_in_val_is_refused_with_its_likeness(ready: Path) -> None:
    (ready / "val" / "cat").rename(ready / "val" / "Cat")
    with pytest.raises(DataError, match=r"'Cat' of val is not in train; did you mean 'cat'\?"):
        load_folder(ready)


def test_names_are_the_same_class_in_either_unicode_form(ready: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"  # as Linux and as macOS write it
    for part, name in (("train", composed), ("val", decomposed), ("test", decomposed)):
        (ready / part / "cat").rename(ready / part / name)
    splits = load_folder(ready)
    assert splits.classes == (composed, "dog")
    assert list(splits.val.labels) == [0, 0, 0, 1, 1, 1]
    (ready / "train" / decomposed).mkdir()
    with pytest.raises(DataError, match="'café', in different Unicode forms: rename one"):
        load_folder(ready)


def test_a_class_name_that_is_not_utf_8_is_refused(flat: Path) -> None:
    (flat / "cat").rename(flat / os.fsdecode(b"caf\xe9"))
    with pytest.raises(DataError, match=r"class folder 'caf\\udce9' in '.*' is not UTF-8: rename"):
        load_folder(flat)


# What counts as an image


def test_files_of_other_suffixes_are_counted(ready: Path) -> None:
    for number in range(12):
        (ready / "train" / "cat" / f"{number}.HEIC").write_bytes(b"-")
    (ready / "val" / "dog" / "list.txt").touch()
    told = "13 files of other suffixes passed over (.heic 12, .txt 1)"
    assert load_folder(ready).passed_over == (told,)


def test_a_class_of_other_suffixes_is_refused_with_their_number(flat: Path) -> None:
    for path in [*(flat / "cat").iterdir()]:
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(
        DataError, match=r"class folder 'cat': .* \(20 files of other suffixes pass"
    ):
        load_folder(flat)


@pytest.mark.parametrize("suffix", [".jpe", ".JPE", ".jif", ".pjpeg", ".apng", ".mpo", ""])
def test_unusual_suffixes_and_none_are_images(flat: Path, suffix: str) -> None:
    for number, format in enumerate(("JPEG", "PNG", "GIF", "WEBP")):
        image = Image.new("RGB", (3, 2))
        image.save(flat / "cat" / f"photo {number}{suffix}", format)
    splits = load_folder(flat)
    assert splits.test is not None
    assert len(splits.train) + len(splits.val) + len(splits.test) == 54
    assert not splits.passed_over
    for images in (splits.train, splits.val, splits.test):
        check_images(images, whole=True)


def test_text_without_a_suffix_is_no_image(flat: Path) -> None:
    for name, text in (("BMW", "BM is a brand"), ("P2", "P2 is a class"), ("riff", "RIFF...")):
        (flat / "cat" / name).write_text(text)
    assert load_folder(flat).passed_over == ("3 files of other suffixes passed over (no suffix 3)",)


def test_pipes_are_no_images_and_dead_links_are_faults(flat: Path) -> None:
    os.mkfifo(flat / "cat" / "pipe.png")
    (flat / "cat" / "dead.png").symlink_to(flat / "nowhere.png")
    splits = load_folder(flat)
    assert splits.test is not None
    paths = [*splits.train.images, *splits.val.images, *splits.test.images]
    assert not any(Path(str(path)).name == "pipe.png" for path in paths)
    with pytest.raises(DataError, match=r"dead\.png': no such file or directory"):
        check_images(ImageList(paths, [0] * len(paths)))


# How it is split


def test_each_class_has_a_permutation_of_its_own(tmp_path: Path) -> None:
    for name in ("cat", "dog", "eel"):
        fill(tmp_path / name, 40)
    val = names(load_folder(tmp_path, val_fraction=0.3).val)
    chosen = {name: [n[4:] for n in val if n.startswith(name)] for name in ("cat", "dog", "eel")}
    assert len({tuple(files) for files in chosen.values()}) == 3
    fill(tmp_path / "cat", 5, first=40)  # changes that class's split alone
    (tmp_path / "dog" / "039.png").unlink()
    after = names(load_folder(tmp_path, val_fraction=0.3).val)
    assert [n for n in after if n.startswith("eel")] == [n for n in val if n.startswith("eel")]


def test_the_summary_says_what_there_is_and_where_it_comes_from(flat: Path) -> None:
    assert load_folder(flat, seed=3).summary() == [
        "2 classes: cat, dog",
        "images: train 40 (left in each class), val 5 (cut with seed 3), test 5 (cut with seed 3)",
    ]
    assert load_data("digits").summary()[1] == "images: train 1,000, val 200, test 597"


def test_the_summary_names_ready_parts_and_missing_ones(ready: Path) -> None:
    (ready / "test").rename(ready / ".test")
    (ready / "val").rename(ready / "Validation")
    for number in range(20):
        fill(ready / "train" / f"x{number:02}", 1)
    first, second = load_folder(ready).summary()
    assert first == f"22 classes: cat, dog, {', '.join(f'x{n:02}' for n in range(8))}, …"
    assert second == "images: train 26 (in train), val 6 (in Validation), test none"


# Faults of images


def test_decoding_finds_what_headers_hide(ready: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    cats = ready / "train" / "cat"
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
    train = load_folder(ready).train
    with pytest.raises(DataError, match=r"^1 of 11 images"):  # a WebP's header has its length
        check_images(train)
    message = r"^6 of 11 images cannot be used: .*bit\.png.*; and 1 more\.$"
    with pytest.raises(DataError, match=message):
        check_images(train, whole=True)


def test_every_file_is_looked_at_however_many_there_are(
    flat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aoft_deploy.data.splits._AT_ONCE", 3)
    paths = sorted(flat.rglob("*.png"))
    for path in paths[::7]:
        path.write_bytes(b"")
    looked: list[int] = []
    faults = find_faults(paths, whole=True, tick=lambda: looked.append(1))
    assert len(faults) == 8
    assert all(str(path) in fault for path, fault in zip(paths[::7], faults, strict=True))
    assert len(looked) == len(paths) == 50
