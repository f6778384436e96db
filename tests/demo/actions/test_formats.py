"""Formats of a task, and why some cannot work here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aoft_demo.actions.formats import (
    CHECKPOINT,
    DEFAULT,
    format_called,
    formats_of,
    usual_formats,
)
from aoft_demo.tasks.session import Session
from aoft_demo.tasks.session_registry import SessionRegistry
from aoft_demo.tasks.shared_fleet import SharedFleet, Task, open_shared_fleet
from aoft_deploy.artefacts.registry import exporter_names, get_exporter
from aoft_deploy.errors import CheckpointError, SettingError, UnknownNameError

formats_module = importlib.import_module("aoft_demo.actions.formats")


def test_every_exporter_is_offered_and_the_usual_one_also_small_and_for_pixels(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = formats_of(session, next(iter(session.tasks)))
    assert {each.to for each in found} == {*exporter_names(), ""}
    assert [each.key for each in found][:3] == [DEFAULT, f"{DEFAULT}-int8", f"{DEFAULT}-uint8"]
    assert found[-1].key == CHECKPOINT and len({each.key for each in found}) == len(found)
    for each in found:
        if each.to:
            exporter = get_exporter(each.to)
            assert each.precision in exporter.precisions
            assert ("NVIDIA" in each.refusal) is (exporter.device is not None)
    assert not any(each.refusal for each in found[:3])


def test_a_device_of_this_machine_is_not_refused(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not any(each.refusal for each in formats_of(session, next(iter(session.tasks))))


def test_a_missing_runtime_and_missing_pictures_are_said(
    shared: SharedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> object:
        return None if name == "onnxruntime" else object()

    monkeypatch.setattr(formats_module, "find_spec", find)
    refusals = {each.key: each.refusal for each in usual_formats(shared)}
    assert refusals[DEFAULT].endswith("missing: pip install 'aoft-deploy[cpu]'")
    assert refusals["timm"] == ""
    monkeypatch.undo()
    refusals = {e.key: e.refusal for e in usual_formats(replace(shared, examples=[]))}
    assert "the demo has none" in refusals[f"{DEFAULT}-int8"] and refusals[DEFAULT] == ""


def test_a_method_without_low_rank_updates_is_refused_where_only_those_fit(
    make_checkpoint: Callable[..., Path], backbone_weights: Path, tmp_path: Path
) -> None:
    shared = open_shared_fleet([make_checkpoint("ssf")], tmp_path, weights=backbone_weights)
    sessions = SessionRegistry(shared)
    try:
        session = sessions.get("a")
        (name,) = session.tasks
        by_key = {each.key: each for each in formats_of(session, name)}
        assert by_key["peft"].refusal.startswith("ssf cannot be written as LoRA")
        assert "export" not in by_key["peft"].refusal and by_key["timm"].refusal == ""
        with pytest.raises(SettingError, match="ssf cannot be written as LoRA"):
            format_called(session, name, "peft")
    finally:
        sessions.close()


@pytest.mark.parametrize("key", ["nothing", "", None, 7, ["onnx"], False])
def test_unknown_formats_are_refused(session: Session, key: object) -> None:
    with pytest.raises(SettingError, match="Choose a format first"):
        format_called(session, next(iter(session.tasks)), key)


def test_unknown_tasks_and_tasks_without_a_checkpoint_are_refused(session: Session) -> None:
    with pytest.raises(UnknownNameError, match="task 'nothing'"):
        formats_of(session, "nothing")
    name, task = next(iter(session.tasks.items()))
    session.tasks["bare"] = Task(task.key, session.tasks[name].classes, None)
    with pytest.raises(CheckpointError, match="not its checkpoint"):
        formats_of(session, "bare")
