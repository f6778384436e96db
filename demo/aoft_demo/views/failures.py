"""Failures as one sentence on the page, without paths of the host."""

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

from aoft_demo.views.notices import failure
from aoft_deploy.errors import AoftError

__all__ = ["failure_message", "show_failures"]

F = TypeVar("F", bound=Callable[..., Any])

FOLDERS = re.compile(r"(?<=')/(?:[^/']+/)+|(?<=\")/(?:[^/\"]+/)+|(?<![\w./])/(?:[^/\s'\"]+/)+")
"""Folders before a file name; a folder's name may contain spaces if the path is quoted."""


def failure_message(error: Exception) -> str:
    """The message to show for an error; an unexpected error is logged with its traceback."""
    if isinstance(error, AoftError | NotImplementedError):
        temporary = tempfile.gettempdir()
        text = str(error)
        for prefix in (temporary, repr(temporary)[1:-1]):
            text = text.replace(f"{prefix}/", "/")
        return FOLDERS.sub("", " ".join(text.split()))
    traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "The demo's disk is full: free some space and try again."
    return "Something went wrong: this is a bug. You can continue; the log has the details."


def show_failures(title: str, output: int = 0, outputs: int = 1) -> Callable[[F], F]:
    """Decorator of a handler: show its errors in place of its result.

    Args:
        title: Title of the message.
        output: Index of the output that shows the message.
        outputs: Number of outputs; the others keep their values.
    """

    def message(error: Exception) -> Any:
        html = failure(title, failure_message(error))
        if outputs == 1:
            return html
        return tuple(html if i == output else gr.skip() for i in range(outputs))

    def decorate(handler: F) -> F:
        if inspect.isgeneratorfunction(handler):

            @functools.wraps(handler)
            def generate(*arguments: Any) -> Iterator[Any]:
                try:
                    yield from handler(*arguments)
                except Exception as error:
                    yield message(error)

            return generate  # type: ignore[return-value]

        @functools.wraps(handler)
        def call(*arguments: Any) -> Any:
            try:
                return handler(*arguments)
            except Exception as error:
                return message(error)

        return call  # type: ignore[return-value]

    return decorate
