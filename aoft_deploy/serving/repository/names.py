"""Names of models, and text about them that JSON and clients may see."""

from __future__ import annotations

import re
from pathlib import Path

from aoft_deploy.errors import SettingError

__all__ = ["artefact_name", "check_name", "is_name", "printable", "without_paths"]


def artefact_name(text: str) -> tuple[str, Path]:
    """Name and path of ``NAME=PATH`` or of a path alone."""
    name, equals, path = text.partition("=")
    if equals and "/" not in name and not Path(text).exists():
        return name, Path(path)
    return Path(text).stem, Path(text)


def is_name(name: str) -> bool:
    """Whether a model's name can be part of a URL and of JSON."""
    pattern = r"[^/\\\0-\x1f\x7f\ud800-\udfff]{1,200}"
    return re.fullmatch(pattern, name) is not None and name not in (".", "..")


def check_name(name: str) -> None:
    """Raise if a model's name cannot be part of a URL.

    Raises:
        SettingError: It cannot.
    """
    if not is_name(name):
        raise SettingError(f"A model cannot be called {name!r} in a URL: rename it.")


def printable(text: str) -> str:
    """Text with bytes of file names that are not UTF-8 replaced by escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def without_paths(message: str, path: Path) -> str:
    """An error message without the locations of files on the host.

    Args:
        message: The message.
        path: The file that it speaks of, of which only the name is kept.
    """
    text = printable(message.replace(str(path), path.name))
    text = re.sub(r"\[\w+Error\] : \d+ : \w+ : ", "", text)  # prefix of ONNX Runtime's messages
    return re.sub(r"(?<![\w.])/[\w.\-/ ]*/(?=[\w.\-])", "", text)
