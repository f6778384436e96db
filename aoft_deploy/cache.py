"""The folder for files that can be made again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path | None:
    """``$AOFT_CACHE_DIR``, or ``aoft-deploy`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Returns:
        None where ``AOFT_CACHE_DIR`` is set and empty: nothing is kept then.
    """
    named = os.environ.get("AOFT_CACHE_DIR")
    if named == "":
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else base / "aoft-deploy"
