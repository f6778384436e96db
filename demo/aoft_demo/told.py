"""Faults as one sentence on the page, without folders of this machine; the page stays usable."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import gradio as gr

from aoft_deploy.errors import AoftError

__all__ = ["sentence", "told"]

F = TypeVar("F", bound=Callable[..., Any])

FOLDERS = re.compile(r"(?<![\w./])/(?:[^/\s'\"]+/)+")


def sentence(error: Exception) -> str:
    """What to tell a visitor about a fault."""
    if isinstance(error, AoftError | NotImplementedError):
        return FOLDERS.sub("", " ".join(str(error).split()))
    traceback.print_exception(error, file=sys.stderr)
    return "This did not work, and the fault is ours; the page goes on. The log has the details."


def told(function: F) -> F:
    """A handler whose faults appear on the page as a message."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generate(*arguments: Any) -> Iterator[Any]:
            try:
                yield from function(*arguments)
            except Exception as error:
                _raise(error)

        return generate  # type: ignore[return-value]

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            _raise(error)

    return call  # type: ignore[return-value]


def _raise(error: Exception) -> NoReturn:
    if isinstance(error, gr.Error):
        raise error
    raise gr.Error(sentence(error), title="Not done", print_exception=False) from None
