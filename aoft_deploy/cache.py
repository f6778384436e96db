"""The folder for cached files, which can be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path | None:
    """Return ``$AOFT_CACHE_DIR``, or ``aoft-deploy`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Returns:
        None if ``AOFT_CACHE_DIR`` is set but empty, which disables the cache.
    """
    named = os.environ.get("AOFT_CACHE_DIR")
    if named == "":
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else base / "aoft-deploy"
