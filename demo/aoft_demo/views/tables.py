"""Tables as HTML: values as shades of a colour, and the figures of a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["numbers", "shades"]


def shades(
    values: Mapping[tuple[str, str], float], *, title: str, row_name: str = "", text: str = "{:.2f}"
) -> str:
    """Table whose cells are darker for larger values, from zero on; absent cells stay empty.

    Args:
        values: Values from 0 on, by row and column; both appear in the order of the keys.
        title: Title of the table.
        row_name: Text before the name of each row.
        text: Format of a value.
    """
    rows = list(dict.fromkeys(row for row, _ in values))
    columns = list(dict.fromkeys(column for _, column in values))
    most = max(values.values(), default=1.0) or 1.0
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = []
    for row in rows:
        cells = "".join(
            f'<td style="--share:{values[row, column] / most:.3f}">'
            f"<span>{text.format(values[row, column])}</span></td>"
            if (row, column) in values
            else '<td class="none"><span aria-label="unchanged">–</span></td>'
            for column in columns
        )
        lines.append(f'<tr><th scope="row">{escape(f"{row_name} {row}".strip())}</th>{cells}</tr>')
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(title)}">'
        f'<table class="shades"><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></figure>"
    )


def numbers(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str) -> str:
    """The figures of a chart as a table that opens, for those who cannot see or want to copy."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f'<details class="numbers"><summary>{escape(title)}</summary>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div></details>"
    )
