"""The merged models of a race: where they are kept, and when they are deleted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from aoft_demo.actions.race_models import merged_models, model_path
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.tasks.shared_fleet import bundled_checkpoints

CHECKPOINT = bundled_checkpoints()[0]


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints that are exported from now on; each model has its checkpoint's path."""
    done: list[Path] = []

    def export(checkpoint: Path, output: Path, **options: Any) -> None:
        done.append(checkpoint)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(str(checkpoint))
        output.with_name(f"{output.name}.json").touch()

    monkeypatch.setattr("aoft_deploy.export.merged.export_merged", export)
    return done


def race(session: Session, *names: str) -> dict[str, str]:
    """The checkpoint of each skill's model."""
    paths = merged_models(session, names)
    return {name: path.read_text() for name, path in zip(names, paths, strict=True)}


def test_models_are_kept_where_their_skills_belong_and_go_with_them(
    sessions: SessionRegistry, exported: list[Path]
) -> None:
    ours, theirs = sessions.get("ours"), sessions.get("theirs")
    shutil.rmtree(ours.shared.folder / "race", ignore_errors=True)  # models of other tests
    built_in, second = list(ours.tasks)[:2]
    for session in (ours, theirs):
        session.add(CHECKPOINT, "mine")  # has the classes of a built-in skill
    names = (built_in, "mine", second)
    expected = {name: str(ours.tasks[name].checkpoint) for name in names}
    assert race(ours, *names) == expected == race(ours, *names)
    assert len(exported) == 3  # the second race finds the models
    race(theirs, "mine", built_in)
    assert len(exported) == 4  # all visitors share those of the built-in skills
    theirs.add(CHECKPOINT, "twin")
    twins = {name: str(theirs.tasks[name].checkpoint) for name in ("mine", "twin", built_in)}
    assert race(theirs, *twins) == twins and len(exported) == 5

    files = [model_path(ours, ours.task(name)) for name in names]
    assert [file.parent.parent for file in files] == [
        ours.shared.folder,
        ours.folder,
        ours.shared.folder,
    ]
    assert [file.is_file() for file in files] == [True, True, False]  # not raced: deleted
    assert sorted(path.name for path in files[0].parent.iterdir()) == [
        files[0].name,
        f"{files[0].name}.json",
    ]
    ours.end()
    assert [file.is_file() for file in files] == [True, False, False]


def test_a_session_that_ends_during_an_export_leaves_nothing(
    session: Session, exported: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    session.add(CHECKPOINT, "mine")

    def export(checkpoint: Path, output: Path, **options: Any) -> None:
        session.end()
        output.parent.mkdir(parents=True)
        output.touch()

    monkeypatch.setattr("aoft_deploy.export.merged.export_merged", export)
    list(merged_models(session, ["mine"]))
    assert not session.folder.exists()
