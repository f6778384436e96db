"""Trainings in subprocesses, and the queue that runs one at a time."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from aoft_demo.tasks.training_queue import MAX_WAITING, Training, TrainingQueue
from aoft_deploy.errors import SettingError

IGNORES_SIGTERM = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)"])
print(child.pid, file=open(sys.argv[1], "w"), flush=True)
time.sleep(999)
"""


def test_a_process_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    training, pid_file = Training(), tmp_path / "pid"
    training.start([sys.executable, "-c", IGNORES_SIGTERM, str(pid_file)], tmp_path / "log")
    while not (pid_file.is_file() and pid_file.read_text().strip()):
        assert training.wait(0.05) is None
    child = int(pid_file.read_text())
    training.stop()
    assert training.wait(0) == -9
    status, end = Path(f"/proc/{child}/status"), time.monotonic() + 60
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_stopped_training_does_not_start(tmp_path: Path) -> None:
    training = Training()
    training.stop()
    with pytest.raises(SettingError, match="Training was stopped; nothing was added"):
        training.start(
            [sys.executable, "-c", f"open({str(tmp_path / 'started')!r}, 'w')"], tmp_path / "log"
        )
    assert not (tmp_path / "started").exists()


def test_stopped_trainings_do_not_block_the_queue() -> None:
    queue, one, two, three = TrainingQueue(), Training(), Training(), Training()
    with queue.entered(one):
        assert queue.is_first(one)
        with queue.entered(two), queue.entered(three):
            assert [queue.is_first(t) for t in (one, two, three)] == [True, False, False]
            two.stop()
            one.stop()  # its session ended, and nothing consumes its progress
            assert queue.is_first(three)
    with queue.entered(one), queue.entered(Training()):
        pass


def test_the_length_of_the_queue_is_limited() -> None:
    queue = TrainingQueue()
    with ExitStack() as stack:
        for _ in range(MAX_WAITING + 1):
            stack.enter_context(queue.entered(Training()))
        with pytest.raises(SettingError, match=f"{MAX_WAITING} trainings are waiting"):
            stack.enter_context(queue.entered(Training()))
    with queue.entered(Training()):
        pass
