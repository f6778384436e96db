"""Build hook: README.md as a package index shows it, with absolute links and pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

__all__ = ["AbsoluteLinks", "absolute"]

RELATIVE = r"(?!https?:|mailto:|#|/)"


def absolute(text: str, home: str) -> str:
    """Markdown whose relative links and pictures lead into the repository.

    Args:
        text: The Markdown.
        home: Address of the repository on GitHub.
    """
    pictures = rf"\1{home}/raw/main/"
    text = re.sub(rf"""(!\[[^\]]*\]\(|\b(?:src|srcset)=["']){RELATIVE}""", pictures, text)
    links = rf"\1{home}/blob/main/"
    return re.sub(rf"""(\]\(|\bhref=["']){RELATIVE}""", links, text)


class AbsoluteLinks(MetadataHookInterface):
    """Sets the long description of the package."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the dynamic field ``readme``."""
        home = metadata["urls"]["Homepage"]
        text = absolute(Path(self.root, "README.md").read_text("utf-8"), home)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
