"""Shared by all commands: parsers, one-line errors, clean interrupts, and exit codes.

Messages of the library name parameters in backquotes, such as ```min_agreement```. Commands replace
them with options, such as ``--min-agreement``.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import signal
import sys
from collections import namedtuple
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from aoft_deploy._version import __version__
from aoft_deploy.errors import (
    EXTRAS,
    AoftError,
    SettingError,
    UnknownNameError,
    close_matches,
    optional_imports,
)
from aoft_deploy.processors import limited
from aoft_deploy.texts import one_line

if TYPE_CHECKING:
    from aoft_deploy.artefacts.engine import EngineOptions

__all__ = [
    "DEVICE",
    "DEVICES",
    "ENGINES",
    "Parser",
    "add_engine_options",
    "add_import_option",
    "device",
    "engine_options",
    "positive",
    "run",
    "with_options",
]

ENGINES = "onnxruntime, openvino, tensorrt or torch"
DEVICE = re.compile(r"cpu|mps|(cuda|xpu)(:\d+)?")
DEVICES = "cpu, cuda, mps or xpu; cuda:1 is the second GPU"
"""Values of ``--engine`` and ``--device``, for help texts."""

_PARAMETER = re.compile(r"`(\w+)(?:=([^`]*))?`")


class Parser(argparse.ArgumentParser):
    """The parser of a command: it has ``--version``, and reports wrong usage in one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments; an unknown option is reported before a missing one."""
        return super().parse_known_args(self._with_known_options(args), namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As ``parse_known_args``, which newer Pythons do not call for this."""
        return super().parse_known_intermixed_args(self._with_known_options(args), namespace)

    def _with_known_options(self, args: Sequence[str] | None) -> list[str]:
        """The arguments, or the process's; exit with 2 if an option is unknown."""
        words = sys.argv[1:] if args is None else list(args)
        known = [o for o in self._option_string_actions if o.startswith("--")]
        for word in words:
            option = word.partition("=")[0]
            if option == "--":
                break
            if re.fullmatch(r"--\S+", option) and not any(o.startswith(option) for o in known):
                self.error(f"Unknown option {option}.{close_matches(option, known)}")
        return words

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            unknown = UnknownNameError("name", value, map(str, action.choices))
            raise argparse.ArgumentError(action, str(unknown))

    def error(self, message: str) -> NoReturn:
        """Exit with 2 after one line on stderr."""
        text = " ".join(message.removeprefix("argument ").split())
        self.exit(2, f"error: {text} (see {self.prog} --help)\n")


def run(
    parser: argparse.ArgumentParser,
    body: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None,
) -> int:
    """Parse the arguments, and run a command.

    Args:
        parser: The command's parser. Wrong usage exits with 2 after one line on stderr.
        body: The command, which takes the parsed options.
        argv: Arguments; None means those of the process.

    Returns:
        The exit code: 0, or 1 after one line on stderr for invalid input or an interrupt.
    """
    _open_standard_streams()
    options = parser.parse_intermixed_args(argv)  # files may stand between options
    limit = limited()
    if limit is not None:  # numerical libraries, loaded later, count the machine's cores
        os.environ.setdefault("OMP_NUM_THREADS", str(limit))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # so that every file name can be printed
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with optional_imports():
            for module in getattr(options, "import", ()):
                _import_module(module)
            body(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _failed("Interrupted; nothing unfinished was left.")
    except BrokenPipeError:
        _drop_output()  # the reader of the output has exited
        return 1
    except (AoftError, OSError) as error:
        _drop_output()
        return _failed(with_options(str(error), parser))
    finally:
        signal.signal(signal.SIGTERM, previous)
        # CPython ends with SIGINT if the last code that it executed from a text was interrupted,
        # such as that of a class of named tuples in an import, though the interrupt was handled.
        namedtuple("Executed", "text")
    return 0


def with_options(message: str, parser: argparse.ArgumentParser) -> str:
    """Replace the parameters in a message of the library with a command's options.

    ```to="auto"``` becomes ``--to auto``. The value is left out if the option is a switch. A name
    also stands for the only option that ends with it, such as ```weights``` for
    ``--backbone-weights``. A name without an option loses its backquotes.

    Args:
        message: A message with parameters in backquotes.
        parser: The command's parser. Its options have the names of the parameters.
    """
    options = {
        action.dest: (max(action.option_strings, key=len), action.nargs == 0)
        for action in parser._actions
        if action.option_strings
    }

    def option(match: re.Match[str]) -> str:
        name, value = match.groups()
        matching = [name] if name in options else [o for o in options if o.endswith(f"_{name}")]
        if len(matching) != 1:
            return name if value is None else f"{name}={value}"
        flag, is_switch = options[matching[0]]
        words = "" if value is None or is_switch else re.sub(r"[\"'(),]+", " ", value)
        return " ".join([flag, *words.split()])

    return _PARAMETER.sub(option, message)


def positive(text: str) -> int:
    """Parse a whole number from 1: a ``type=`` for options."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def device(text: str) -> str:
    """Parse the name of a device: a ``type=`` for options."""
    if not DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no device: choose {DEVICES}")
    return text


def add_engine_options(options: argparse._ActionsContainer) -> None:
    """Add the options of ``EngineOptions`` to a parser or a group of its options."""
    options.add_argument(
        "--engine",
        metavar="NAME",
        help=f"{ENGINES} (default: the engine that verified the artefact)",
    )
    options.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="CPU threads for one batch (default: the engine's choice)",
    )
    options.add_argument(
        "--device", type=device, metavar="NAME", help=f"{DEVICES} (default: the engine's choice)"
    )
    add_import_option(options)


def engine_options(options: argparse.Namespace) -> EngineOptions:
    """The parsed values of ``add_engine_options``."""
    from aoft_deploy.artefacts.engine import EngineOptions

    return EngineOptions(options.engine, options.threads, options.device)


def add_import_option(options: argparse._ActionsContainer) -> None:
    """Add ``--import MODULE``; ``run`` imports the modules before it runs the command."""
    options.add_argument(
        "--import",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this Python module first, to register timm models of your own; the current "
        "folder is searched too; may be repeated",
    )


def _import_module(name: str) -> None:
    """Import a module that a user named.

    Raises:
        SettingError: The import fails.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            raise
        import traceback

        last = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if "importlib" in last.filename else f" in {last.filename}:{last.lineno}"
        reason = f"{type(error).__name__}{place}: {one_line(error).rstrip('.')}"
        raise SettingError(
            f"`import={name}` fails ({reason}): give the name of a module that is installed or in "
            "the current folder."
        ) from error


def _open_standard_streams() -> None:
    """Open closed standard streams on the null device.

    Otherwise the next socket or file gets the stream's number, and printed text goes there.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))


def _failed(message: str) -> int:
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    return 1


def _drop_output() -> None:
    """Discard buffered output that cannot be written: flushing it would fail again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
