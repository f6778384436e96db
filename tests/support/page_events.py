"""The demo's page without a server: its handlers, called as Gradio calls them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

__all__ = ["PageEvents"]


class PageEvents:
    """The events of a page.

    Args:
        page: The page, as ``gradio.Blocks``.
    """

    def __init__(self, page: Any) -> None:
        self.page = page
        self.ids = {block.elem_id: number for number, block in page.blocks.items()}
        self.ids |= {"page": page._id, "tab": None}

    def handlers(self, part: str, event: str) -> list[Any]:
        """What an event runs on the server.

        Args:
            part: ``elem_id`` of the component; ``page``, or ``tab`` for the browser's tab.
            event: Name of the event, such as ``click``.
        """
        target = (self.ids[part], event)
        return [each for each in self.page.fns.values() if each.fn and target in each.targets]

    def call(self, part: str, event: str, *given: Any, visitor: str, data: Any = None) -> Any:
        """Run an event's handler, and return its result.

        Args:
            part: See ``handlers``.
            event: See ``handlers``.
            given: Values of the event's inputs.
            visitor: Name of the visitor's page.
            data: What the page sends with the event; None if its handler takes no such data.
        """
        (handler,) = self.handlers(part, event)
        request = SimpleNamespace(session_hash=visitor)
        sent = [] if data is None else [SimpleNamespace(_data=data)]
        if event == "load":  # the request comes first
            return handler.fn(request, *given)
        return handler.fn(*given, *sent, request)
