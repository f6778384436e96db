from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.data.folder import load_folder, write_folder
from aoft_deploy.data.synthetic import load_task
from aoft_deploy.errors import DataError, SettingError
from aoft_deploy.training.image_check import find_unreadable, leave_out
from aoft_deploy.training.reporting import Reporter
from aoft_deploy.training.run import train
from aoft_deploy.training.settings import RunOptions, TrainingSettings

SMALL = TrainingSettings(img_size=16, epochs=1, precision="fp32", method="linear")
SKIP = RunOptions(skip_unreadable=True, progress=True)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Photographs of which one of each part cannot be read."""
    write_folder(load_task("shape", train=18, val=12, test=12), tmp_path / "photos")
    for part in ("train", "val", "test"):
        path = tmp_path / "photos" / part / "star" / "00004.png"
        path.write_bytes(path.read_bytes()[:-40])
    return tmp_path / "photos"


def test_unreadable_images_are_left_out_counted_and_listed(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = damaged.with_name("run")
    result = train(load_folder(damaged), out, SMALL, SKIP)
    printed = capsys.readouterr().err
    assert printed.count("Cannot read image") == result.left_out == 3
    assert f"3 unreadable images, listed in {out / 'unreadable.json'}" in printed
    assert "17 images, 2 to 3 of a class" in printed
    names = {f"{part}/star/00004.png" for part in ("train", "val", "test")}
    assert json.loads((out / "unreadable.json").read_text()).keys() == names
    training = read_checkpoint(result.checkpoint).training
    assert (training["images"], training["left_out"]) == (17, 3)
    for path in damaged.rglob("00004.png"):
        if path.parent.name == "star":
            path.unlink()
    train(load_folder(damaged), damaged.with_name("clean"), SMALL)
    clean = read_checkpoint(damaged.with_name("clean") / "model.ckpt").tensors
    assert all(clean[n].equal(t) for n, t in read_checkpoint(result.checkpoint).tensors.items())


def test_a_resumed_run_leaves_out_the_same_images_wherever_they_are(damaged: Path) -> None:
    out, settings = damaged.with_name("run"), replace(SMALL, epochs=2)
    train(load_folder(damaged), out, settings, SKIP)
    state = out / "resume.safetensors"
    for moved in ("elsewhere", "and again"):
        data = damaged.with_name(moved)
        shutil.copytree(damaged, data)
        result = train(load_folder(data), out, settings, RunOptions(resume=True))
        assert result.left_out == 3
    repaired = damaged / "val" / "star" / "00004.png"
    shutil.copyfile(damaged / "val" / "star" / "00010.png", repaired)
    assert train(load_folder(damaged), out, settings, RunOptions(resume=True)).left_out == 3
    state.unlink()
    train(load_folder(damaged), out, settings, replace(SKIP, overwrite=True))
    assert len(json.loads((out / "unreadable.json").read_text())) == 2


def test_sound_images_leave_no_list(tmp_path: Path) -> None:
    write_folder(load_task("shape", train=12, val=6, test=0), tmp_path / "photos")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "unreadable.json").write_text('{"old": "it is empty"}')
    assert train(load_folder(tmp_path / "photos"), tmp_path / "run", SMALL, SKIP).left_out == 0
    assert not (tmp_path / "run" / "unreadable.json").exists()


def test_a_part_or_class_without_readable_images_is_an_error(damaged: Path) -> None:
    for path in (damaged / "train" / "star").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="No image of class 'star' in train can be used: add some"):
        train(load_folder(damaged), damaged.with_name("run"), SMALL, SKIP)
    assert not damaged.with_name("run").exists()


def test_only_some_of_many_faults_are_printed(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in damaged.rglob("*.png"):
        path.write_bytes(b"")
    splits = load_folder(damaged)
    with pytest.raises(
        DataError, match=r"^42 of 42 images cannot be used: .*; and 37 more; repair"
    ):
        find_unreadable(splits, RunOptions(), Reporter(True))
    assert capsys.readouterr().err.count("it is empty") == 20
    faults = find_unreadable(splits, SKIP, Reporter(False))
    assert len(faults) == 42
    with pytest.raises(DataError, match="No image of class 'circle' in train"):
        leave_out(splits, faults)


def test_options_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(SettingError, match="`skip_unreadable=True` decodes every image"):
        RunOptions(skip_unreadable=True, trust_images=True)
    with pytest.raises(SettingError, match="`overwrite=True` replaces it: give one of them"):
        RunOptions(resume=True, overwrite=True)
