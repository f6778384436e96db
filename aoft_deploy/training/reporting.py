"""Progress on stderr: a bar on a terminal, and elsewhere a line from time to time."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm

__all__ = ["Reporter", "Tick", "duration"]

SECONDS = 10.0
"""Time between two lines in the first quarter of an hour."""

SHARE = 0.01
"""Share of the time since the start that passes between later lines, so that logs stay short."""


class Tick(Protocol):
    """Function that counts images: how many more are done, and what else to show."""

    def __call__(self, images: int = 1, figures: Callable[[], str] = str) -> None:
        """Count ``images`` more; ``figures`` is called if something is printed."""


class Reporter:
    """Shows the progress of a run.

    Args:
        shown: If false, nothing is printed.
    """

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.draws = shown and _is_terminal()
        self.start = self.last = time.monotonic()

    def say(self, *lines: str) -> None:
        """Print lines."""
        if self.shown and lines:
            print(*lines, sep="\n", file=sys.stderr, flush=True)
            self.last = time.monotonic()

    @contextmanager
    def counting(self, name: str, total: int) -> Iterator[Tick]:
        """Context manager: count the images of a task that may take long.

        Args:
            name: Name of the task.
            total: Number of its images.

        Yields:
            A function that takes the number of images that were done since its last call.
        """
        begin, done = time.monotonic(), 0
        bar = tqdm(total=total, desc=name, unit=" images", leave=False, disable=not self.draws)

        def tick(images: int = 1, figures: Callable[[], str] = str) -> None:
            nonlocal done
            done += images
            now = time.monotonic()
            wait = max(1.0 if self.draws else SECONDS, SHARE * (now - self.start))
            if self.shown and now - self.last >= wait and begin < now and done < total:
                self.last = now
                bar.set_postfix_str(figures(), refresh=False)
                if not self.draws:
                    rate = done / (now - begin)
                    words = f"{done:,} of {total:,} images", figures(), f"{rate:.0f} images/s"
                    left = f"{duration((total - done) / rate)} left"
                    self.say("  ".join([name, *filter(None, words), left]))
            bar.update(images)

        with bar:
            yield tick


def _is_terminal() -> bool:
    """Whether stderr is a terminal with a width, which one in a container may not have."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


def duration(seconds: float) -> str:
    """A time in words, such as ``45 s``, ``12 min`` or ``3 h 20 min``."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
