"""Processes that train, one of which may be started before it is needed."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from teaching import shades

from aoft_demo.tasks.trainers import Trainers

psutil: Any = importlib.import_module("psutil")  # its types are partial

pytestmark = pytest.mark.slow


@pytest.fixture
def trainers() -> Iterator[Trainers]:
    started = Trainers()
    yield started
    started.close()


def children() -> set[Any]:
    return set(psutil.Process().children())


def test_one_process_waits_and_is_used_for_the_next_training(
    trainers: Trainers, tmp_path: Path
) -> None:
    before = children()
    trainers.prepare()
    trainers.prepare()
    (waiting,) = children() - before
    nowhere = ["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]
    process = trainers.start(nowhere, tmp_path / "log")
    assert process.pid == waiting.pid
    assert process.wait(120) == 1
    assert "nowhere' does not exist" in (tmp_path / "log").read_text()
    assert process.stdin is not None
    process.stdin.close()

    trainers.prepare()
    (waiting,) = children() - before
    waiting.kill()
    waiting.wait()  # as after a long idle time
    process = trainers.start(["--version"], tmp_path / "log")
    assert process.pid != waiting.pid
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()

    trainers.prepare()
    (waiting,) = children() - before
    trainers.close()
    trainers.prepare()
    assert children() == before and not waiting.is_running()


def test_a_process_ends_when_its_owner_has_ended(trainers: Trainers, tmp_path: Path) -> None:
    for name, shade in (("dark", 20), ("light", 220)):
        (tmp_path / "data" / name).mkdir(parents=True)
        shades(tmp_path / "data" / name, shade, 5)
    arguments = ["--data", tmp_path / "data", "--out", tmp_path / "run", "--epochs", 1000]
    process = trainers.start([*map(str, arguments), "--quiet"], tmp_path / "log")
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 240
    while not metrics.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    assert process.stdin is not None
    process.stdin.close()  # as the system does when the owner is killed
    assert process.wait(60) == 1
