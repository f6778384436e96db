"""Task names derived from the paths of checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from aoft_deploy.checkpoints.names import task_name, unique_task_names
from aoft_deploy.errors import SettingError


def test_a_task_is_named_after_its_file_or_the_folder_of_model_ckpt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert task_name(Path("runs/pets.ckpt")) == "pets"
    assert task_name(Path("runs/pets v1.0.ckpt")) == "pets v1.0"
    assert task_name(tmp_path / "pets" / "model.ckpt") == "pets"
    monkeypatch.chdir(tmp_path)
    assert task_name(Path("model.ckpt")) == tmp_path.name


def test_two_checkpoints_of_the_same_task_name_are_refused() -> None:
    paths = [Path("a/cats.ckpt"), Path("a/dogs/model.ckpt")]
    assert unique_task_names(paths) == ["cats", "dogs"]
    with pytest.raises(SettingError, match="Two tasks are called 'cats': rename one's file, or"):
        unique_task_names([*paths, Path("b/cats.ckpt")])
