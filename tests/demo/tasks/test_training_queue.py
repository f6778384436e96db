"""Trainings in subprocesses, and the queue that runs one at a time."""

from __future__ import annotations

import subprocess
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


def run(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A process that leads a group, as ``Trainers`` starts it."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def test_a_process_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    training, pid_file = Training(), tmp_path / "pid"
    training.start(lambda: run(IGNORES_SIGTERM, str(pid_file)))
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
        training.start(lambda: run("open(sys.argv[1], 'w')", str(tmp_path / "started")))
    assert not (tmp_path / "started").exists()


def test_stopped_trainings_do_not_block_the_queue() -> None:
    queue, one, two, three = TrainingQueue(), Training(), Training(), Training()
    with queue.entered(one):
        assert queue.before(one) == 0
        with queue.entered(two), queue.entered(three):
            assert [queue.before(t) for t in (one, two, three)] == [0, 1, 2]
            two.stop()
            one.stop()  # its session ended, and nothing consumes its progress
            assert queue.before(three) == 0
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


def test_stopped_trainings_make_room_in_the_queue() -> None:
    queue = TrainingQueue()
    with ExitStack() as stack:
        trainings = [Training() for _ in range(MAX_WAITING + 1)]
        for training in trainings:
            stack.enter_context(queue.entered(training))
        trainings[3].stop()  # its page was closed, and nothing leaves the queue for it
        stack.enter_context(queue.entered(Training()))
        with pytest.raises(SettingError, match="trainings are waiting"):
            stack.enter_context(queue.entered(Training()))
