"""Errors that a user can cause. Each also derives from a built-in exception.

    AoftError
    ├── UnknownNameError    (LookupError)       a method, backbone, task … that does not exist
    ├── SettingError        (ValueError)        a setting outside its range
    │   └── DivergedError                       settings with which training diverges
    ├── AttachError         (TypeError)         a model that a method cannot attach to
    ├── BackboneError       (ValueError)        missing, wrong-shaped or foreign backbone weights
    ├── CheckpointError     (ValueError)        a file that is no checkpoint, or does not fit
    ├── ArtefactError       (ValueError)        a file that is no artefact, or is damaged
    ├── DataError           (ValueError)        an image folder or list that cannot be used
    │   └── ImageError                          one image file that cannot be used
    ├── VerificationError   (ArithmeticError)   an artefact whose logits differ from the model's
    ├── OutputError         (OSError)           a result that cannot be written
    └── MissingExtraError   (ImportError)       an optional package that is not installed

A message is one sentence: what is wrong, the value, the allowed values, the next step. Only the
commands' ``main`` functions catch these errors.
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
    """Base class of the errors that this package raises for invalid input."""


class UnknownNameError(AoftError, LookupError):
    """A name that is not in its registry.

    Args:
        kind: What the name stands for, such as ``"method"``.
        name: The unknown name.
        known: The existing names. The message suggests close matches, and lists up to 20 names.
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
    """Settings with which training diverges: a loss or gradient is not finite."""


class AttachError(AoftError, TypeError):
    """A model without sites for a method's updates."""


class BackboneError(AoftError, ValueError):
    """Backbone weights that are missing, wrong-shaped or not the expected ones."""


class CheckpointError(AoftError, ValueError):
    """A file that is not a checkpoint, is damaged, or does not fit the backbone."""


class ArtefactError(AoftError, ValueError):
    """A file or folder that is not an artefact, is damaged, or differs from its manifest."""


class DataError(AoftError, ValueError):
    """An image folder, list or split that cannot be used."""


class ImageError(DataError):
    """One image file that cannot be used."""


class VerificationError(AoftError, ArithmeticError):
    """An artefact whose logits differ from the unmerged model's."""


class OutputError(AoftError, OSError):
    """A result that cannot be written to its path."""


class MissingExtraError(AoftError, ImportError):
    """An optional package that is not installed.

    Args:
        package: The missing package, such as ``"onnxruntime"``.
        extra: The extra of this project that installs it, such as ``"cpu"``.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed: run pip install 'aoft-deploy[{extra}]'.", name=package
        )
