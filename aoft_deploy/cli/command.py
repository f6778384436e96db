"""What the commands share: errors in one line, interrupts that clean up, exit codes.

The library's messages name its parameters in backquotes, such as ```min_agreement```; a command
shows the option in their place, ``--min-agreement``.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from aoft_deploy.errors import AoftError
from aoft_deploy.processors import limited

if TYPE_CHECKING:
    from aoft_deploy.artefacts.engine import EngineOptions

__all__ = ["add_engine_options", "engine_options", "positive", "run", "with_options"]

_PARAMETER = re.compile(r"`(\w+)(?:=([^`]*))?`")


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
    _open_standard_streams()
    options = parser.parse_args(argv)
    few = limited()
    if few is not None:  # libraries of arithmetic, loaded later, count the machine's cores
        os.environ.setdefault("OMP_NUM_THREADS", str(few))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # any file's name can be printed
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        body(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _failed("Interrupted; nothing unfinished was left.")
    except BrokenPipeError:
        _drop_output()  # whoever read our output has gone
        return 1
    except (AoftError, OSError) as error:
        _drop_output()
        return _failed(with_options(str(error), parser))
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def with_options(message: str, parser: argparse.ArgumentParser) -> str:
    """A message of the library with a command's options in place of the parameters' names.

    the option is a switch. A name that is the end of an option's, such as ```weights``` of
    the option is a switch. A name that is only the end of an option's, such as ```weights``` of
    ``--backbone-weights``, stands for it. Names without an option stay, without backquotes.

    Args:
        message: It names parameters in backquotes.
        parser: The command's parser, whose options have the parameters' names.
    """
    options = {
        action.dest: (max(action.option_strings, key=len), action.nargs == 0)
        for action in parser._actions
        if action.option_strings
    }

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        known = [name] if name in options else [o for o in options if o.endswith(f"_{name}")]
        if len(known) != 1:
            return name if value is None else f"{name}={value}"
        flag, is_switch = options[known[0]]
        words = "" if value is None or is_switch else re.sub(r"[\"'(),]+", " ", value)
        return " ".join([flag, *words.split()])

    return _PARAMETER.sub(option, message)


def positive(text: str) -> int:
    """A whole number from 1, for ``type=`` of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def add_engine_options(options: argparse.ArgumentParser) -> None:
    """How an artefact is run."""
    options.add_argument(
        "--engine",
        metavar="NAME",
        help="onnxruntime, openvino, tensorrt or torch; default: what the artefact was verified "
        "with",
    )
    options.add_argument(
        "--threads", type=positive, metavar="N", help="within a batch; default: the engine's choice"
    )
    options.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1 …; default: the engine's choice"
    )


def engine_options(options: argparse.Namespace) -> EngineOptions:
    """The values of ``add_engine_options``."""
    from aoft_deploy.artefacts.engine import EngineOptions

    return EngineOptions(options.engine, options.threads, options.device)


def _open_standard_streams() -> None:
    """Give streams that are closed to the null device.

    Otherwise the next socket or file gets their number, and what is printed goes there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))


def _failed(message: str) -> int:
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 1


def _drop_output() -> None:
    """Let go of printed text that nobody takes, which would fail again when Python exits."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
