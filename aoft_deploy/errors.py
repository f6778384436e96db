"""Errors that a user can cause, each a refinement of a builtin.

    AoftError
    ├── UnknownNameError    (LookupError)       a method, backbone, task … that does not exist
    ├── SettingError        (ValueError)        a setting outside its range
    │   └── DivergedError                       settings that training diverges with
    ├── AttachError         (TypeError)         a model that a method cannot attach to
    ├── BackboneError       (ValueError)        missing, wrong-shaped or foreign backbone weights
    ├── CheckpointError     (ValueError)        a file that is no checkpoint, or does not fit
    ├── ArtefactError       (ValueError)        a file that is no artefact, or is damaged
    ├── DataError           (ValueError)        an image folder or list that cannot be used
    │   └── ImageError                          one image file that cannot be used
    ├── VerificationError   (ArithmeticError)   an artefact whose answers differ from the model's
    ├── OutputError         (OSError)           a result that cannot be written
    └── MissingExtraError   (ImportError)       an optional package that is not installed

Messages are one sentence: what, got, allowed, next step. Only the commands' ``main`` catches them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AoftError",
    "ArtefactError",
    "AttachError",
    "BackboneError",
    "CheckpointError",
    "DataError",
    "DivergedError",
    "ImageError",
    "MissingExtraError",
    "OutputError",
    "SettingError",
    "UnknownNameError",
    "VerificationError",
]


class AoftError(Exception):
    """Base of everything that this package raises for a fault in its input."""


class UnknownNameError(AoftError, LookupError):
    """A name that is not in its registry.

    Args:
        kind: What the name should have been, such as ``"method"``.
        name: The name that was given.
        known: The names that exist. Close ones are suggested; short lists are printed whole.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        message = f"Unknown {kind} {name!r}."
        close = difflib.get_close_matches(name, names, n=3)
        if close:
            message += f" Did you mean {' or '.join(close)}?"
        if len(names) <= 20:
            message += f" Known: {', '.join(names) or 'none'}."
        super().__init__(message)


class SettingError(AoftError, ValueError):
    """A setting outside its allowed range."""


class DivergedError(SettingError):
    """Settings that make training diverge: its numbers are not finite."""


class AttachError(AoftError, TypeError):
    """A model that offers no place for a method's updates."""


class BackboneError(AoftError, ValueError):
    """Backbone weights that are missing, wrong-shaped or not the expected ones."""


class CheckpointError(AoftError, ValueError):
    """A file that is no checkpoint, is damaged, or does not fit the backbone."""


class ArtefactError(AoftError, ValueError):
    """A file or folder that is no artefact, is damaged, or was changed after its manifest."""


class DataError(AoftError, ValueError):
    """An image folder, list or split that cannot be used."""


class ImageError(DataError):
    """One image file that cannot be used."""


class VerificationError(AoftError, ArithmeticError):
    """An artefact whose answers differ from the unmerged model's."""


class OutputError(AoftError, OSError):
    """A result that cannot be written where it was asked for."""


class MissingExtraError(AoftError, ImportError):
    """An optional package that is not installed.

    Args:
        package: The package that is missing, such as ``"onnxruntime"``.
        extra: The extra of this project that brings it, such as ``"cpu"``.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed: run pip install 'aoft-deploy[{extra}]'.", name=package
        )
