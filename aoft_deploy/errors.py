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
    └── MissingExtraError   (ImportError)       a package that is not installed, or is broken

A message is one sentence: what is wrong, the value, the allowed values, the next step. Only the
commands' ``main`` functions catch these errors.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = [
    "EXTRAS",
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
    "close_matches",
    "optional_imports",
]

EXTRAS = {
    **dict.fromkeys(("PIL", "numpy", "onnx", "safetensors"), ""),
    **dict.fromkeys(("accelerate", "onnx_ir", "onnxscript", "sklearn", "timm"), "train"),
    **dict.fromkeys(("torch", "torchvision", "tqdm"), "train"),
    **dict.fromkeys(("h11", "httptools", "orjson", "python_multipart"), "serve"),
    **dict.fromkeys(("starlette", "uvicorn"), "serve"),
    **dict.fromkeys(("nncf", "openvino"), "openvino"),
    "gradio": "demo",
    "matplotlib": "plots",
    "onnxruntime": "cpu",
    "peft": "peft",
    "ray": "ray",
    "tensorboard": "tensorboard",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "gpu",
}
"""The extra of this project that installs a package, by import name; empty for the base install."""


class AoftError(Exception):
    """Base class of the errors that this package raises for invalid input."""


class UnknownNameError(AoftError, LookupError):
    """A name that is not in its registry.

    Args:
        kind: What the name stands for, such as ``"method"``.
        name: The unknown name.
        known: The existing names. The message suggests close matches, and lists up to 20 names.
        hint: A further sentence.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        names = sorted(known)
        message = f"Unknown {kind} {name!r}.{close_matches(name, names)}"
        if len(names) <= 20:
            message += f" Known: {', '.join(names) or 'none'}."
        super().__init__(f"{message} {hint}".rstrip())


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
    """A package that is not installed, or cannot be imported.

    Args:
        package: The package, such as ``"onnxruntime"``.
        extra: The extra of this project that installs it, such as ``"cpu"``; empty for the base
            install, None for a package that another package needs.
        reason: Why an installed package cannot be imported; empty if it is not installed.
        replaces: A package that must be uninstalled first, since it has the same files.
    """

    def __init__(
        self, package: str, extra: str | None, reason: str = "", replaces: str = ""
    ) -> None:
        install = f"'aoft-deploy[{extra}]'" if extra else "aoft-deploy"
        if reason:
            message = (
                f"{package} cannot be imported ({' '.join(reason.split()).rstrip('.')}): run pip "
                f"check, or pip install --upgrade {install}."
            )
        elif extra is None:
            message = f"{package} is not installed, but another package needs it: run pip check."
        else:
            # Uninstalling one of the two deletes files of the other, so both go.
            first = f"pip uninstall -y {replaces} {package} && " if replaces else ""
            message = f"{package} is not installed: run {first}pip install {install}."
        super().__init__(message, name=package)


@contextmanager
def optional_imports() -> Iterator[None]:
    """Context manager: tell which extra installs a package whose import fails.

    Raises:
        MissingExtraError: A package is not installed, or one of ``EXTRAS`` cannot be imported.
    """
    try:
        yield
    except MissingExtraError:
        raise
    except ImportError as error:
        package, _, submodule = (error.name or "").partition(".")
        if package.startswith("aoft_") or not package:
            raise
        name = package.replace("_", "-")
        absent = not submodule or sys.modules.get(package) is None
        if isinstance(error, ModuleNotFoundError) and absent:
            raise MissingExtraError(name, EXTRAS.get(package)) from None
        if package not in EXTRAS:
            raise
        raise MissingExtraError(name, EXTRAS[package], str(error)) from error


def close_matches(name: str, known: Iterable[str]) -> str:
    """`` Did you mean … or …?`` with names like ``name``; empty if there are none."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(close)}?" if close else ""
