"""Parts that several views show, as HTML."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

__all__ = ["facts", "figures", "show_code", "table"]


def facts(*facts: str) -> str:
    """Short facts in a row; each is HTML."""
    spans = "".join(f"<span>{fact}</span>" for fact in facts)
    return f'<div class="facts" role="status">{spans}</div>'


def figures(*rows: tuple[str, str]) -> str:
    """A table of names and values."""
    cells = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows)
    return f'<table class="figures"><tbody>{cells}</tbody></table>'


def table(name: str, columns: Iterable[str], rows: str) -> str:
    """A table that scrolls; the rows are HTML."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    return (
        f'<div class="scroll" tabindex="0" aria-label="{escape(name)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def show_code(**snippets: str) -> str:
    """A part that opens and shows how to do the same without the page.

    Args:
        snippets: Code by the name of its language, such as ``Shell`` or ``Python``.
    """
    blocks = "".join(
        f'<figure><figcaption>{escape(language)}<button type="button" class="copy">Copy</button>'
        f'</figcaption><pre tabindex="0">{escape(code.strip())}</pre></figure>'
        for language, code in snippets.items()
    )
    return f'<details class="code"><summary>Show code</summary>{blocks}</details>'
