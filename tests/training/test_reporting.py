from __future__ import annotations

import contextlib
import os
import pty
import re
import sys
import termios

import pytest

from aoft_deploy.training import reporting
from aoft_deploy.training.reporting import Reporter, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which a test sets."""
    now = [1000.0]
    monkeypatch.setattr("aoft_deploy.training.reporting.time.monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_every_ten_seconds_says_what_is_done_and_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Reporter(True).counting("epoch 1/3", 6000) as tick:
        for second in range(30):
            clock[0] += 1
            tick(200, lambda second=second: f"loss {second}.5")  # type: ignore[misc]
    lines = [
        "epoch 1/3  2,000 of 6,000 images  loss 9.5  200 images/s  20 s left",
        "epoch 1/3  4,000 of 6,000 images  loss 19.5  200 images/s  10 s left",
    ]
    assert capsys.readouterr().err.splitlines() == lines


def test_any_printed_line_delays_the_next(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = Reporter(True)
    for epoch in range(20):
        with reporter.counting(f"epoch {epoch}", 3) as tick:
            for _ in range(3):
                clock[0] += 3
                tick()
        reporter.say(f"epoch {epoch} done")
    assert capsys.readouterr().err.splitlines() == [f"epoch {epoch} done" for epoch in range(20)]


def test_a_week_of_training_prints_few_lines(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Reporter(True).counting("epoch 1/1", 10**9) as tick:
        for _ in range(7 * 24 * 3600 // 5):
            clock[0] += 5
            tick()
    assert 600 < capsys.readouterr().err.count("\n") < 800


def test_figures_are_computed_only_for_a_line(clock: list[float]) -> None:
    def figures() -> str:
        raise AssertionError("a GPU would be waited for")

    with Reporter(True).counting("x", 100) as tick:
        for _ in range(50):
            clock[0] += 0.1
            tick(1, figures)


def test_nothing_is_printed_unless_shown(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = Reporter(False)
    reporter.say("hidden")
    with reporter.counting("x", 9) as tick:
        clock[0] += 60
        tick()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("columns", [0, 100])
def test_a_terminal_gets_a_bar_and_one_without_a_width_gets_lines(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, columns))
    with open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with Reporter(True).counting("check images", 50) as tick:
            for _ in range(50):
                clock[0] += 1
                tick(1, lambda: "loss 0.5")
    printed = b""
    with contextlib.suppress(OSError):  # the end, once the terminal is closed
        while piece := os.read(screen, 100_000):
            printed += piece
    os.close(screen)
    assert bool(re.search(rb"check images: +0%\|", printed)) == (columns > 0)
    assert printed.count(b"\n") == (0 if columns else 4)


def test_durations_are_readable() -> None:
    assert [duration(s) for s in (0, 12.4, 99, 100, 5940, 12000)] == [
        "0 s",
        "12 s",
        "99 s",
        "2 min",
        "99 min",
        "3 h 20 min",
    ]


def test_the_first_quarter_of_an_hour_has_the_shortest_gaps() -> None:
    assert reporting.SECONDS == reporting.SHARE * 1000
