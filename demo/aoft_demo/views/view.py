"""What the page needs of a view: a part of the page with its own tab."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["View", "refresh_nothing"]


def refresh_nothing(session: Any) -> Sequence[Any]:
    """No values: for a view that shows nothing of the session's tasks."""
    return ()


@dataclass(frozen=True)
class View:
    """A view's components that depend on the session's tasks, and its events.

    The page calls ``refresh`` when it is loaded, and after each event of ``changes`` of any view.

    Attributes:
        inputs: Components whose values ``refresh`` takes.
        outputs: Components whose values ``refresh`` returns.
        refresh: From the session and the values of ``inputs`` to the values of ``outputs``.
        changes: Events after which the session's tasks may be others.
        task: The component that chooses the view's task; a link to the page can set it.
    """

    inputs: Sequence[Any] = ()
    outputs: Sequence[Any] = ()
    refresh: Callable[..., Sequence[Any]] = refresh_nothing
    changes: Sequence[Any] = ()
    task: Any = None
