from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from aoft_deploy.data.splits import ImageList, find_faults
from aoft_deploy.errors import DataError, SettingError, UnknownNameError
from aoft_deploy.training.paper_benchmarks import fgvc
from aoft_deploy.training.paper_benchmarks.fgvc import load_fgvc
from aoft_deploy.training.paper_benchmarks.tasks import FGVC, Benchmark, deviations

Write = Callable[..., Path]


def parents(images: ImageList | None) -> list[str]:
    """Name of each image's folder, which is the class id in these tests."""
    assert images is not None
    return [Path(str(image)).parent.name for image in images.images]


def test_there_are_five_data_sets_with_the_published_sizes() -> None:
    assert {t.name: (t.classes, t.train, t.val, t.test) for t in FGVC.tasks} == {
        "CUB_200_2011": (200, 5394, 600, 5794),
        "NABirds": (555, 21536, 2393, 24633),
        "OxfordFlowers": (102, 1020, 1020, 6149),
        "StanfordDogs": (120, 10800, 1200, 8580),
        "StanfordCars": (196, 7329, 815, 8041),
    }
    assert sum(task.classes for task in FGVC.tasks) == 1173  # a mean head of 0.1804 M at width 768


def test_labels_are_assigned_over_all_files_together(tmp_path: Path, write_fgvc: Write) -> None:
    write_fgvc(tmp_path, "StanfordCars", train=[7, 3, 11], val=[11, 7], test=[11, 3, 20])
    splits = load_fgvc(tmp_path, "StanfordCars", any_size=True)
    assert splits.classes == ("3", "7", "11", "20")
    for images in (splits.train, splits.val, splits.test):
        assert images is not None
        assert [splits.classes[label] for label in images.labels] == parents(images)
        assert not find_faults(images.files(), whole=True)
    assert list(splits.val.labels) == [2, 1]  # numbered by this file alone, they would be 1 and 0


def test_ids_may_be_strings(tmp_path: Path, write_fgvc: Write) -> None:
    write_fgvc(tmp_path, "NABirds", "images", train=["b", "a"], val=["a"], test=["c", "b"])
    splits = load_fgvc(tmp_path, "NABirds", any_size=True)
    assert splits.classes == ("a", "b", "c")
    assert list(splits.train.labels) == [1, 0]


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("CUB_200_2011", "images"),
        ("NABirds", "images"),
        ("OxfordFlowers", ""),
        ("StanfordCars", ""),
        ("StanfordDogs", ""),
        ("StanfordDogs", "Images"),
    ],
)
def test_images_are_found_where_the_published_code_expects_them(
    tmp_path: Path, write_fgvc: Write, name: str, images: str
) -> None:
    folder = write_fgvc(tmp_path, name, images, train=[0, 1], val=[1], test=[0])
    splits = load_fgvc(tmp_path, name, any_size=True)
    assert splits.train.images[0] == folder / images / "0/train0.jpg"


def test_a_tenth_of_trainval_becomes_val(tmp_path: Path, write_fgvc: Write) -> None:
    ids = [5, 9, 2] * 20
    write_fgvc(tmp_path, "OxfordFlowers", trainval=ids, test=[2, 5, 9])
    splits = load_fgvc(tmp_path, "OxfordFlowers", seed=1, any_size=True)
    assert (len(splits.train), len(splits.val)) == (54, 6)
    assert sorted([*parents(splits.train), *parents(splits.val)]) == sorted(map(str, ids))
    assert not set(map(str, splits.train.images)) & set(map(str, splits.val.images))
    for images in (splits.train, splits.val):
        assert [splits.classes[label] for label in images.labels] == parents(images)
    assert load_fgvc(tmp_path, "OxfordFlowers", seed=1, any_size=True) == splits
    assert load_fgvc(tmp_path, "OxfordFlowers", seed=2, any_size=True) != splits


def test_train_and_val_take_precedence_over_trainval(tmp_path: Path, write_fgvc: Write) -> None:
    folder = write_fgvc(tmp_path, "OxfordFlowers", train=[0, 1], val=[1], test=[0])
    (folder / "trainval.json").write_text("{}")
    assert len(load_fgvc(tmp_path, "OxfordFlowers", any_size=True).val) == 1


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Benchmark:
    """A small benchmark: 6 train, 3 val, 3 test images, 3 classes."""
    task = replace(FGVC.task("OxfordFlowers"), classes=3, train=6, val=3, test=3)
    benchmark = Benchmark("fgvc", "FGVC", (task,))
    monkeypatch.setattr(fgvc, "FGVC", benchmark)
    return benchmark


def test_the_sizes_of_the_benchmark_are_accepted(
    tmp_path: Path, write_fgvc: Write, small: Benchmark
) -> None:
    folder = write_fgvc(tmp_path, "OxfordFlowers", train=[1, 2, 3] * 2, val=[1, 2, 3], test=[3] * 3)
    splits = load_fgvc(tmp_path, "OxfordFlowers")
    assert deviations(small.tasks[0], splits) == ()
    ids = json.loads((folder / "train.json").read_text()) | json.loads(
        (folder / "val.json").read_text()
    )
    (folder / "train.json").unlink()
    (folder / "trainval.json").write_text(json.dumps(ids))
    assert deviations(small.tasks[0], load_fgvc(tmp_path, "OxfordFlowers")) == ()


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"train": [1, 2], "val": [1, 2, 3], "test": [3] * 3}, r"train\.json lists 2 .* 6: comple"),
        ({"train": [1, 2, 3] * 2, "val": [1], "test": [3] * 3}, r"val\.json lists 1 .* 3: comple"),
        ({"trainval": [1, 2, 3] * 4, "test": [3] * 3}, r"trainval\.json lists 12 .* 9: comple"),
        (
            {"train": [1, 2] * 3, "val": [1, 2, 2], "test": [2] * 3},
            "have 2 classes instead of the benchmark's 3: complete them, .*`any_size=True`",
        ),
    ],
)
def test_another_size_than_in_the_benchmark_is_refused(
    tmp_path: Path,
    write_fgvc: Write,
    small: Benchmark,
    lists: dict[str, list[int]],
    message: str,
) -> None:
    write_fgvc(tmp_path, "OxfordFlowers", **lists)
    with pytest.raises(DataError, match=message):
        load_fgvc(tmp_path, "OxfordFlowers")
    splits = load_fgvc(tmp_path, "OxfordFlowers", any_size=True)
    assert deviations(small.tasks[0], splits)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", r"val\.json is not an object of images and class ids"),
        ("{}", r"val\.json is not an object of images and class ids"),
        ('{"0/val0.jpg": 1', r"val\.json is not valid JSON \("),
        ("[" * 100_000, r"val\.json is not valid JSON \("),
        ('{"0/val0.jpg": 1.5}', r"val\.json gives '0/val0\.jpg' the class id 1\.5: use a number"),
        ('{"0/val0.jpg": true}', r"val\.json gives '0/val0\.jpg' the class id True: use a number"),
        ('{"0/val0.jpg": "1"}', "have numbers and texts as class ids: use one kind"),
        ('{"a": 1, "a": 2}', r"val\.json names 'a' twice: list each image once"),
        ('{"none.jpg": 1}', r"val\.json names 'none\.jpg', but .* has no such file: add it"),
        ('{"../x.jpg": 1}', r"val\.json names '\.\./x\.jpg', which leads out of"),
        ('{"/x.jpg": 1}', r"val\.json names '/x\.jpg', which leads out of"),
        (
            '{"0/train0.jpg": 0}',
            r"val\.json names 'train0\.jpg', which .*train\.json already l",
        ),
    ],
)
def test_a_bad_list_is_named(tmp_path: Path, write_fgvc: Write, text: str, message: str) -> None:
    folder = write_fgvc(tmp_path, "StanfordCars", train=[0, 1], val=[0, 1], test=[0, 1])
    (folder / "val.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_fgvc(tmp_path, "StanfordCars", any_size=True)
    assert "\n" not in str(caught.value)


def test_missing_parts_are_named(tmp_path: Path, write_fgvc: Write) -> None:
    with pytest.raises(
        DataError, match=r"There is no folder .*NABirds with FGVC's NABirds: put it"
    ):
        load_fgvc(tmp_path, "NABirds")
    folder = write_fgvc(tmp_path, "StanfordCars", train=[0, 1], test=[0, 1])
    with pytest.raises(DataError, match=r"Cannot read the list .*val\.json: No such file"):
        load_fgvc(tmp_path, "StanfordCars", any_size=True)
    (folder / "train.json").rename(folder / "trainval.json")
    with pytest.raises(DataError, match="No class has two images to split into train and val"):
        load_fgvc(tmp_path, "StanfordCars", any_size=True)
    with pytest.raises(UnknownNameError, match="Unknown task of fgvc 'Birds'"):
        load_fgvc(tmp_path, "Birds")
    with pytest.raises(SettingError, match="`seed` is -1, but must be a whole number from 0"):
        load_fgvc(tmp_path, "StanfordCars", seed=-1)
