from __future__ import annotations

import os
from pathlib import Path

import pytest
from image_folders import fill, fill_classes, names

from aoft_deploy.data.folder import load_folder
from aoft_deploy.errors import DataError


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
def test_parts_are_recognised_by_their_usual_names(
    tmp_path: Path, train: str, val: str | None, test: str
) -> None:
    for part, count in ((train, 10), (val, 3), (test, 2)):
        if part is not None:
            fill_classes(tmp_path, part, count)
    splits = load_folder(tmp_path)
    assert splits.classes == ("ant", "bee", "cow")
    assert (len(splits.train), len(splits.val)) == ((30, 9) if val else (27, 3))
    assert splits.test is not None and len(splits.test) == 6
    assert not splits.notes
    for images, folder in ((splits.train, train), (splits.val, val or train), (splits.test, test)):
        assert {Path(str(path)).parts[-3] for path in images.images} == {folder}


@pytest.mark.parametrize("names", [("val", "valid"), ("dev", "Validation"), ("test", "Testing")])
def test_two_folders_for_one_part_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for part in ("train", *names):
        fill_classes(tmp_path, part)
    first, second = sorted(names)
    with pytest.raises(DataError, match=f"'{first}', '{second}', which all stand for .*: keep one"):
        load_folder(tmp_path)


def test_eval_beside_val_and_test_is_refused(tmp_path: Path) -> None:
    for part in ("train", "val", "test", "eval"):
        fill_classes(tmp_path, part)
    with pytest.raises(DataError, match="'test', 'eval', which all stand for test: keep one"):
        load_folder(tmp_path)


@pytest.mark.parametrize("name", ["Test", "train", "valid", "Development"])
def test_one_class_may_have_the_name_of_a_part(flat: Path, name: str) -> None:
    fill(flat / name, 10)
    assert load_folder(flat).classes == tuple(sorted(("cat", "dog", name)))


def test_parts_without_classes_are_refused_under_any_name(tmp_path: Path) -> None:
    for part in ("Training", "Testing"):
        fill(tmp_path / part, 9)
    with pytest.raises(DataError, match="has Testing, Training but no train/<class>: add it"):
        load_folder(tmp_path)
    fill(tmp_path / "sample", 9)
    with pytest.raises(DataError, match=r"'Testing', 'Training' in '.*' look like parts"):
        load_folder(tmp_path)


@pytest.mark.parametrize("depth", ["", "seg_train"])
def test_names_that_contain_parts_are_refused(tmp_path: Path, depth: str) -> None:
    for part in ("seg_train", "seg_test", "seg_pred"):
        fill_classes(tmp_path / part, depth or ".")
    message = (
        "'seg_test', 'seg_train' in '.*' look like parts of a data set, not like classes: name"
    )
    with pytest.raises(DataError, match=message):
        load_folder(tmp_path)


def test_flat_folders_named_after_class_and_part_are_refused(tmp_path: Path) -> None:
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
        fill_classes(tmp_path / where, fold)
    with pytest.raises(DataError, match="same sub-folders 'ant', 'bee', 'cow': if these are the c"):
        load_folder(tmp_path)


@pytest.mark.parametrize("second", [("ant", "bee"), ("ant",)])
def test_parts_in_another_language_are_refused(tmp_path: Path, second: tuple[str, ...]) -> None:
    fill_classes(tmp_path, "Entrenamiento")
    for name in second:
        fill(tmp_path / "Prueba" / name, 3)
    with pytest.raises(DataError, match=r"same sub-folders 'ant'.* name the folders above"):
        load_folder(tmp_path)


def test_two_parts_among_classes_are_refused(flat: Path) -> None:
    for part in ("val", "test"):
        fill(flat / part, 9)
    with pytest.raises(DataError, match=r"'test', 'val' in .* look like parts of a data set"):
        load_folder(flat)


def test_one_common_sub_folder_may_hold_the_images(tmp_path: Path) -> None:
    for name in ("n01443537", "n01629819"):  # as in Tiny ImageNet
        fill(tmp_path / "train" / name / "images", 8)
        (tmp_path / "train" / name / f"{name}_boxes.txt").touch()
    splits = load_folder(tmp_path)
    assert splits.classes == ("n01443537", "n01629819")
    assert splits.notes == ("2 files with other suffixes skipped (.txt 2)",)


@pytest.mark.parametrize("beside", [(), ("docs",)])
def test_a_data_set_one_level_deeper_is_suggested(tmp_path: Path, beside: tuple[str, ...]) -> None:
    for part in ("train", "test"):
        fill_classes(tmp_path / "dataset", part)
    for name in beside:
        fill(tmp_path / name, 3)
    with pytest.raises(
        DataError, match=r"'dataset' in .* the parts 'test', 'train': give '.*/data"
    ):
        load_folder(tmp_path)
    fill_classes(tmp_path / "single" / "all", ".")
    with pytest.raises(
        DataError, match=r"one class, 'all': .* or give the folder that holds the cl"
    ):
        load_folder(tmp_path / "single")


def test_folders_beside_train_are_reported(parted: Path) -> None:
    fill(parted / "unlabelled", 3)
    fill_classes(parted, "holdout")
    splits = load_folder(parted)
    assert splits.notes == ("Folders 'holdout', 'unlabelled' skipped",)
    assert splits.classes == ("cat", "dog")


def test_a_class_called_train_with_sub_folders_is_not_mistaken_for_the_part(
    tmp_path: Path,
) -> None:
    for name in ("bus/red", "car/red", "train/steam", "train/diesel"):
        fill(tmp_path / name, 4)
    message = "'train' with sub-folders, and beside it 'bus', 'car' with images: move these away if"
    with pytest.raises(DataError, match=message):
        load_folder(tmp_path)


def test_system_folders_are_no_classes(parted: Path, flat: Path) -> None:
    for folder in (parted, parted / "train", parted / "train" / "cat"):
        for name in ("__MACOSX", "@eaDir", "$RECYCLE.BIN", ".Trash"):
            fill(folder / name / "cat", 2)
        (folder / ".DS_Store").touch()
        (folder / "._000.png").write_bytes(b"\x00\x05\x16\x07")
    for name in ("cat", "dog"):
        (parted / name).rename(parted.parent / f"{parted.name} {name}")
    splits = load_folder(parted)
    assert splits.classes == ("cat", "dog")
    assert len(splits.train) == 6
    assert not splits.notes


def test_an_unlabelled_test_part_is_skipped_and_an_unlabelled_val_is_refused(parted: Path) -> None:
    for part in ("val", "test"):
        for path in [*(parted / part).rglob("*.png")]:
            path.rename(parted / part / f"{path.parent.name}-{path.name}")
        for name in ("cat", "dog"):
            (parted / part / name).rmdir()
    with pytest.raises(DataError, match="has images in 'val' but no class folders there: put each"):
        load_folder(parted)
    for path in (parted / "val").iterdir():
        path.unlink()
    (parted / "val").rmdir()
    splits = load_folder(parted)
    assert splits.notes == (f"6 images outside of class folders skipped (in '{parted}/test')",)
    assert splits.test is not None
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [2, 2, 2]


@pytest.mark.parametrize("where", [".", "train", "test"])
def test_images_beside_class_folders_are_reported(parted: Path, where: str) -> None:
    fill(parted / where, 1)
    note = f"1 image outside of class folders skipped (in {str(parted / where)!r})"
    assert load_folder(parted).notes == (note,)


def test_classes_that_a_part_lacks_are_reported(parted: Path) -> None:
    for path in [*(parted / "val" / "cat").iterdir()]:
        path.unlink()
    assert load_folder(parted).notes == ("val has no images of class 'cat'",)


def test_two_links_to_one_folder_are_refused(flat: Path) -> None:
    (flat / "tiger").symlink_to(flat / "cat")
    with pytest.raises(
        DataError, match=r"'cat', 'tiger' in .* are the same folder: remove one link"
    ):
        load_folder(flat)


def test_a_part_that_is_a_link_to_another_is_refused(parted: Path) -> None:
    (parted / "val").rename(parted / ".val")
    (parted / "val").symlink_to(parted / "train")
    with pytest.raises(DataError, match=r"'train', 'val' in .* are the same folder"):
        load_folder(parted)


def test_a_class_in_another_case_in_val_is_refused_with_the_similar_one(parted: Path) -> None:
    (parted / "val" / "cat").rename(parted / "val" / "Cat")
    with pytest.raises(DataError, match=r"'Cat' of val is not in train; did you mean 'cat'\?"):
        load_folder(parted)


def test_both_unicode_forms_of_a_name_are_the_same_class(parted: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"  # as written by Linux and by macOS
    for part, name in (("train", composed), ("val", decomposed), ("test", decomposed)):
        (parted / part / "cat").rename(parted / part / name)
    splits = load_folder(parted)
    assert splits.classes == (composed, "dog")
    assert list(splits.val.labels) == [0, 0, 0, 1, 1, 1]
    (parted / "train" / decomposed).mkdir()
    with pytest.raises(DataError, match="'café', in different Unicode forms: rename one"):
        load_folder(parted)


def test_a_class_name_that_is_not_utf_8_is_refused(flat: Path) -> None:
    (flat / "cat").rename(flat / os.fsdecode(b"caf\xe9"))
    with pytest.raises(DataError, match=r"class folder 'caf\\udce9' in '.*' is not UTF-8: rename"):
        load_folder(flat)


def test_a_class_named_train_is_a_class(flat: Path) -> None:
    fill(flat / "train", 10)
    assert load_folder(flat).classes == ("cat", "dog", "train")


def test_parts_without_train_are_refused(parted: Path) -> None:
    (parted / "train").rename(parted / ".train")
    with pytest.raises(DataError, match="has test, val but no train/<class>: add it"):
        load_folder(parted)


def test_links_are_followed_once(parted: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    fill(elsewhere, 2, first=50)
    cats = parted / "train" / "cat"
    for link, target in (
        ("more", elsewhere),
        ("again", elsewhere),
        ("self", cats),
        ("up", parted),
        ("000-copy.png", cats / "000.png"),
    ):
        (cats / link).symlink_to(target)
    found = names(load_folder(parted).train)
    assert len([name for name in found if name.startswith(("more", "again"))]) == 2
    assert len([name for name in found if name.startswith("cat/")]) == 4
    assert len(found) == 4 + 2 + 3
