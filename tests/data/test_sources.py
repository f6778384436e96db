from __future__ import annotations

from pathlib import Path

import pytest
from image_folders import fill

from aoft_deploy.data.folder import load_folder
from aoft_deploy.data.sources import load_data
from aoft_deploy.errors import DataError, UnknownNameError


def test_data_is_a_task_or_a_folder(flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_data(str(flat), seed=3) == load_folder(flat, seed=3)
    assert load_data("digits").classes == tuple("0123456789")
    fill(flat / "digits" / "one", 3)
    fill(flat / "digits" / "two", 3)
    monkeypatch.chdir(flat)
    assert load_data("digits").classes == tuple("0123456789")
    assert load_data("./digits").classes == ("one", "two")


def test_an_unknown_name_is_refused_with_the_known_tasks_and_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UnknownNameError, match=r"Unknown folder or task 'digts'\. Did you mean digi"
    ):
        load_data("digts")
    with pytest.raises(DataError, match="/digits' does not exist: check the path"):
        load_data(str(tmp_path / "digits"))
    (tmp_path / "my photos").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownNameError, match=r"Did you mean my photos\? Known: .*digits, my ph"):
        load_data("my-photos")
