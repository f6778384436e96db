from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from aoft_deploy.data.splits import ImageList, find_faults
from aoft_deploy.errors import DataError, UnknownNameError
from aoft_deploy.training.paper_benchmarks.tasks import FGVC, VTAB, deviations, find_task
from aoft_deploy.training.paper_benchmarks.vtab import load_vtab


@pytest.fixture
def kitti(tmp_path: Path, write_vtab: Callable[..., Path]) -> Path:
    """A small kitti: four classes; eight, six and six images."""
    return write_vtab(tmp_path, "kitti", classes=4)


def change(path: Path, line: int, text: str) -> None:
    """Replace a line of a list, counted from 1."""
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    path.write_text("".join(f"{each}\n" for each in lines))


def test_there_are_19_tasks_in_3_groups_with_the_published_sizes() -> None:
    assert len(VTAB.tasks) == 19
    groups = {group: sum(t.group == group for t in VTAB.tasks) for group in VTAB.groups}
    assert groups == {"natural": 7, "specialized": 4, "structured": 8}
    assert sum(task.classes for task in VTAB.tasks) == 940  # a mean head of 0.0380 M at width 768
    assert {(task.train, task.val) for task in VTAB.tasks} == {(800, 200)}
    assert {t.name: t.test for t in VTAB.tasks} == {
        "cifar": 10000,
        "caltech101": 6084,
        "dtd": 1880,
        "oxford_flowers102": 6149,
        "oxford_iiit_pet": 3669,
        "svhn": 26032,
        "sun397": 21750,
        "patch_camelyon": 32768,
        "eurosat": 5400,
        "resisc45": 6300,
        "diabetic_retinopathy": 42670,
        "clevr_count": 15000,
        "clevr_dist": 15000,
        "dmlab": 22735,
        "kitti": 711,
        "dsprites_loc": 73728,
        "dsprites_ori": 73728,
        "smallnorb_azi": 12150,
        "smallnorb_ele": 12150,
    }


def test_tasks_are_found_by_name_and_keep_their_order() -> None:
    assert find_task("vtab/cifar") == (VTAB, VTAB.tasks[0])
    assert find_task("fgvc/NABirds")[0] is FGVC
    assert [task.name for task in VTAB.chosen(["kitti", "cifar"])] == ["cifar", "kitti"]
    assert VTAB.chosen(None) == VTAB.tasks
    with pytest.raises(
        UnknownNameError, match=r"Unknown task of vtab 'cifer'. Did you mean cifar?"
    ):
        VTAB.chosen(["cifer"])
    with pytest.raises(
        UnknownNameError, match=r"Unknown task of a benchmark 'vtab/cifer'. Did you"
    ):
        find_task("vtab/cifer")


def test_lists_become_splits_in_their_order(kitti: Path) -> None:
    splits = load_vtab(kitti.parent, "kitti", any_size=True)
    assert splits.classes == ("0", "1", "2", "3")
    assert list(splits.train.labels) == [0, 1, 2, 3, 0, 1, 2, 3]
    assert splits.train.images[2] == kitti / "images/train800/000002.jpg"
    assert splits.test is not None
    assert (len(splits.val), len(splits.test)) == (6, 6)
    assert not find_faults(splits.val.files(), whole=True)
    image, label = splits.val[5]
    assert (image.mode, label) == ("RGB", 1)


def test_differences_from_the_benchmark_are_reported(kitti: Path) -> None:
    splits = load_vtab(kitti.parent, "kitti", any_size=True)
    assert deviations(VTAB.task("kitti"), splits) == (
        "train has 8 images instead of 800",
        "val has 6 images instead of 200",
        "test has 6 images instead of 711",
    )
    assert deviations(VTAB.task("svhn"), splits)[-1] == "4 classes have images instead of 10"


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, write_vtab: Callable[..., Path]
) -> Callable[[Path], Path]:
    """Kitti in its full size, with links to one image; copied on each call."""
    model = tmp_path_factory.mktemp("whole") / "kitti"
    small = write_vtab(tmp_path_factory.mktemp("small"), "kitti", classes=4)
    picture = small / "images/test/000000.jpg"
    sizes = {"train800": 800, "val200": 200, "train800val200": 1000, "test": 711}
    for part, count in sizes.items():
        (model / "images" / part).mkdir(parents=True)
        for i in range(count):
            (model / f"images/{part}/{i}.jpg").symlink_to(picture)
        text = "".join(f"images/{part}/{i}.jpg {i % 4}\n" for i in range(count))
        (model / f"{part}.txt").write_text(text)

    def copied(root: Path) -> Path:
        shutil.copytree(model, root / "kitti", symlinks=True)
        return root / "kitti"

    return copied


def test_the_complete_benchmark_is_accepted_without_deviations(
    whole: Callable[[Path], Path], tmp_path: Path
) -> None:
    whole(tmp_path)
    splits = load_vtab(tmp_path, "kitti")
    assert deviations(VTAB.task("kitti"), splits) == ()
    assert len(splits.train) + len(splits.val) == 1000


def test_another_size_than_in_the_benchmark_is_refused(
    whole: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = whole(tmp_path)
    for file in ("train800.txt", "val200.txt", "test.txt"):
        before = (folder / file).read_text()
        (folder / file).write_text(before[: before.rindex("images")])
        message = (
            rf"{file} lists \d+ images instead of the benchmark's \d+: complete.*`any_size=True`"
        )
        with pytest.raises(DataError, match=message):
            load_vtab(tmp_path, "kitti")
        (folder / file).write_text(before)


def test_a_class_without_images_is_refused(whole: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = whole(tmp_path)
    for file in folder.glob("*.txt"):
        file.write_text(file.read_text().replace(".jpg 3\n", ".jpg 2\n"))
    with pytest.raises(DataError, match="no image of class 3, but kitti has 4 classes: complete"):
        load_vtab(tmp_path, "kitti")
    assert deviations(VTAB.task("kitti"), load_vtab(tmp_path, "kitti", any_size=True)) == (
        "3 classes have images instead of 4",
    )


def test_a_combined_list_from_another_source_is_refused(
    whole: Callable[[Path], Path], tmp_path: Path
) -> None:
    folder = whole(tmp_path)
    change(folder / "train800val200.txt", 1, "images/train800val200/0.jpg 1")
    with pytest.raises(DataError, match=r"train800val200\.txt has other labels than train800\.txt"):
        load_vtab(tmp_path, "kitti")
    (folder / "train800val200.txt").unlink()
    with pytest.raises(
        DataError, match=r"Cannot read the list .*train800val200\.txt: No such file"
    ):
        load_vtab(tmp_path, "kitti")
    load_vtab(tmp_path, "kitti", any_size=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/val200/000001.jpg", "is 'images/val200/000001.jpg': write a path and a label"),
        ("", "is '': write a path and a label"),
        ("images/val200/000001.jpg x", "has the label 'x': use a whole number from 0 to 3"),
        ("images/val200/000001.jpg 4", "has the label '4': use a whole number from 0 to 3"),
        ("images/val200/000001.jpg -1", "has the label '-1': use a whole number from 0 to 3"),
        ("images/val200/000001.jpg ²", "has the label '²': use a whole number from 0 to 3"),
        ("images/val200/none.jpg 1", "names 'images/val200/none.jpg', but .* has no such file"),
        ("images 1", "names 'images', but .* has no such file"),
        ("a\0b 1", "has no such file"),
        ("../kitti/images/val200/000001.jpg 1", "which leads out of .*: use a path inside"),
        ("/etc/hostname 1", "names '/etc/hostname', which leads out of"),
    ],
)
@pytest.mark.parametrize("any_size", [False, True])
def test_a_bad_line_is_named_with_its_list(
    kitti: Path, line: str, message: str, any_size: bool
) -> None:
    change(kitti / "val200.txt", 2, line)
    with pytest.raises(DataError, match=rf"val200\.txt, line 2, .*{message}") as caught:
        load_vtab(kitti.parent, "kitti", any_size=any_size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["val200.txt", "test.txt"])
def test_an_image_that_is_listed_twice_is_refused(kitti: Path, file: str) -> None:
    change(kitti / file, 3, "images/val200/000000.jpg 1")
    message = rf"{file}, line 3, names '000000\.jpg', which .*val200\.txt, line 1, already l"
    with pytest.raises(DataError, match=message):
        load_vtab(kitti.parent, "kitti", any_size=True)


def test_a_path_may_contain_blanks(kitti: Path) -> None:
    (kitti / "images/val200/000001.jpg").rename(kitti / "images/val200/one image.jpg")
    change(kitti / "val200.txt", 2, "images/val200/one image.jpg\t1")
    val = load_vtab(kitti.parent, "kitti", any_size=True).val
    assert isinstance(val, ImageList) and str(val.images[1]).endswith("one image.jpg")


def test_missing_and_unreadable_parts_are_named(kitti: Path) -> None:
    with pytest.raises(
        DataError, match=r"There is no folder .*dtd with VTAB-1k's dtd: put it ther"
    ):
        load_vtab(kitti.parent, "dtd")
    (kitti / "test.txt").write_text("")
    with pytest.raises(DataError, match=r"test\.txt lists no images: add some"):
        load_vtab(kitti.parent, "kitti", any_size=True)
    (kitti / "test.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"Cannot read the list .*test\.txt: it is not UTF-8 text"):
        load_vtab(kitti.parent, "kitti", any_size=True)
    with pytest.raises(UnknownNameError, match="Unknown task of vtab 'kity'"):
        load_vtab(kitti.parent, "kity")
