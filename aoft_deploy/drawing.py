"""What all plots share: resolution, and the check that matplotlib is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aoft_deploy.errors import MissingExtraError

if TYPE_CHECKING:
    pass

__all__ = ["DPI", "check_matplotlib"]


DPI = 150


def check_matplotlib() -> None:
    """Refuse to begin without the library that draws.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots") from error
