from __future__ import annotations

import os
import pty
from contextlib import suppress

import pytest

from aoft_deploy.cli import progress
from aoft_deploy.cli.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which stands still unless a test changes it."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])  # type: ignore[attr-defined]
    return now


def test_without_a_terminal_a_line_comes_every_ten_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress() as shown:
        for second in range(25):
            clock[0] = second
            shown.show(f"second {second}")
        shown.note("a note")
    assert capsys.readouterr().err == "second 10\nsecond 20\na note\n"
    with Progress(hidden=True) as shown:
        clock[0] = 100
        shown.show("second 100")
        shown.note("a note")
    assert capsys.readouterr().err == "a note\n"


def test_on_a_terminal_the_line_is_redrawn_and_removed(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stderr, os.fdopen(leader, "rb", buffering=0) as screen:
        monkeypatch.setattr("sys.stderr", stderr)
        with Progress() as shown:
            for tenth in range(4):
                clock[0] = tenth * 0.11
                shown.show(f"{tenth}")
            shown.note("a note")
            clock[0] = 1.0
            shown.show("4")
        stderr.close()
        drawn = b""
        with suppress(OSError):  # how a terminal without a writer ends
            while piece := screen.read(1000):  # may be any part of what was written
                drawn += piece
    clear = "\r\x1b[K"
    assert drawn.decode() == f"1{clear}2{clear}3{clear}a note\r\n4{clear}"
