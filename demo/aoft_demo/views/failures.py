"""Faults as one sentence on the page, without folders of this machine; the page stays usable."""

from __future__ import annotations

import errno
import functools
import inspect
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import gradio as gr

from aoft_demo.views.notices import problem
from aoft_deploy.errors import AoftError

__all__ = ["sentence", "told"]

F = TypeVar("F", bound=Callable[..., Any])

FOLDERS = re.compile(r"(?<=')/(?:[^/']+/)+|(?<=\")/(?:[^/\"]+/)+|(?<![\w./])/(?:[^/\s'\"]+/)+")
"""Folders before a file's name; those with spaces are known by the quotes around the whole."""


def sentence(error: Exception) -> str:
    """What to tell a visitor about a fault."""
    if isinstance(error, AoftError | NotImplementedError):
        own = tempfile.gettempdir()
        text = str(error).replace(f"{own}/", "/").replace(f"{own!r}"[1:-1] + "/", "/")
        return FOLDERS.sub("", " ".join(text.split()))
    traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "The disk that the demo writes to is full: make room there, and try again."
    return "This did not work, and the fault is ours; the page goes on. The log has the details."


def told(title: str, place: int = 0, of: int = 1) -> Callable[[F], F]:
    """A handler whose faults appear where its result would, and stay there.

    Args:
        title: What did not happen.
        place: Which of the handler's outputs shows it.
        of: Number of outputs; the others stay as they are.
    """

    def card(error: Exception) -> Any:
        shown = problem(title, sentence(error))
        return shown if of == 1 else tuple(shown if i == place else gr.skip() for i in range(of))

    def wrap(function: F) -> F:
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def generate(*arguments: Any) -> Iterator[Any]:
                try:
                    yield from function(*arguments)
                except Exception as error:
                    yield card(error)

            return generate  # type: ignore[return-value]

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except Exception as error:
                return card(error)

        return call  # type: ignore[return-value]

    return wrap
