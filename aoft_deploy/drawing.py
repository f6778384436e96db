"""Shared by all plots: resolution, colours, creating figures, and saving them as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aoft_deploy.errors import optional_imports

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DPI", "PALETTE", "check_matplotlib", "new_figure", "save_figure"]

DPI = 150

PALETTE = {
    "blue": "#0072b2",
    "vermilion": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "orange": "#e69f00",
    "sky blue": "#56b4e9",
    "grey": "#4d4d4d",
}
"""Colour-blind-safe palette of Okabe and Ito, plus a dark grey."""


def check_matplotlib() -> None:
    """Check that matplotlib is installed, before the work whose results are plotted.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with optional_imports():
        import matplotlib.figure  # noqa: F401


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure, sized in inches, without registering it in pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file on a white background."""
    figure.savefig(path, dpi=DPI, facecolor="white", format="png")
