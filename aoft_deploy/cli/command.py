"""What the commands share: errors in one line, interrupts that clean up, exit codes."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

from aoft_deploy.errors import AoftError

__all__ = ["run"]


def run(
    parser: argparse.ArgumentParser,
    body: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None,
) -> int:
    """Parse and do a command's work.

    Args:
        parser: The command's parser; wrong usage exits with 2.
        body: The work, given the parsed options.
        argv: Arguments; None takes the process's.

    Returns:
        0, or 1 after one line on stderr: the input is at fault, or the command was interrupted.
    """
    options = parser.parse_args(argv)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        body(options)
    except AoftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: Interrupted; nothing unfinished was left.", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone
        return 1
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
