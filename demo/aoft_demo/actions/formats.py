"""The formats in which a task can be taken home, and why some of them cannot work here."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import SharedFleet, checkpoint_of
from aoft_deploy.artefacts.exporter import Exporter
from aoft_deploy.artefacts.registry import exporters
from aoft_deploy.errors import EXTRAS, AoftError, SettingError
from aoft_deploy.export.merged import export_merged

__all__ = [
    "ALL_TASKS",
    "CHECKPOINT",
    "DEFAULT",
    "Format",
    "format_called",
    "formats_of",
    "usual_formats",
]

DEFAULT: str = inspect.signature(export_merged).parameters["to"].default
"""The exporter that the library uses if none is named."""

CHECKPOINT = "checkpoint"
"""Key of the format that is the task's own file."""

ALL_TASKS = "all-skills"
"""Key of the format that holds all tasks, and the name of its file."""


@dataclass(frozen=True)
class Format:
    """One format of a task's download.

    Attributes:
        key: A name that no other format has.
        about: What it is, in one sentence.
        runtimes: What runs it, such as ``onnxruntime``.
        to: Name of the exporter; empty for the task's own file.
        precision: A precision of the exporter.
        uint8: Whether the model takes pixels instead of normalised values.
        refusal: Why it cannot work here; empty if it can.
    """

    key: str
    about: str
    runtimes: tuple[str, ...] = ()
    to: str = ""
    precision: str = "fp32"
    uint8: bool = False
    refusal: str = ""

    @property
    def is_fleet(self) -> bool:
        """Whether it holds all tasks."""
        return self.key == ALL_TASKS


def usual_formats(shared: SharedFleet) -> list[Format]:
    """Every format, with what the installed packages refuse; the usual one first."""
    found = sorted(exporters(), key=lambda exporter: (exporter.name != DEFAULT, exporter.name))
    formats = [each for exporter in found for each in _formats(exporter, bool(shared.examples))]
    about = "The skill by itself: what training has learnt, without the shared model."
    formats.append(Format(CHECKPOINT, about, ("aoft-export", "aoft-demo")))
    return formats


def formats_of(session: Session, name: str) -> list[Format]:
    """Every format of a task, with what this machine and the task's method refuse.

    The first call for a task opens its checkpoint.

    Raises:
        AoftError: There is no such task, or its checkpoint is missing or cannot be opened.
    """
    with session.using(name) as task:
        path = checkpoint_of(task, name)
        weights = session.shared.weights
        reason = _no_low_rank(path, path.stat().st_mtime_ns, weights)
    by_name = {exporter.name: exporter for exporter in exporters()}
    return [
        each if each.refusal else replace(each, refusal=_refusal(by_name.get(each.to), reason))
        for each in usual_formats(session.shared)
    ]


def format_called(session: Session, name: str, key: object) -> Format:
    """A format of a task that can work here.

    Raises:
        AoftError: There is no such task or format, or it cannot work here.
    """
    by_key = {each.key: each for each in formats_of(session, name)}
    chosen = by_key.get(key) if isinstance(key, str) else None
    if chosen is None:
        raise SettingError("Choose a format first.")
    if chosen.refusal:
        raise SettingError(chosen.refusal)
    return chosen


def _formats(exporter: Exporter, has_pictures: bool) -> Iterator[Format]:
    """The formats of an exporter; the default one also has a small and a pixel form."""
    usual = Format(
        exporter.name, _about(exporter), exporter.engines, exporter.name, refusal=_missing(exporter)
    )
    yield usual
    if exporter.name != DEFAULT:
        return
    if "int8" in exporter.precisions and "int8" not in exporter.calibrated:
        about = "The same with weights of 8 bits: a quarter of the size, nearly the same answers."
        refusal = "" if has_pictures else "It is checked on pictures, and the demo has none here."
        key = f"{exporter.name}-int8"
        yield replace(
            usual, key=key, about=about, precision="int8", refusal=usual.refusal or refusal
        )
    about = "The same for pictures as they are: it takes bytes from 0 to 255 and scales them."
    yield replace(usual, key=f"{exporter.name}-uint8", about=about, uint8=True)


def _about(exporter: Exporter) -> str:
    """The first sentence of the module that defines the exporter."""
    text = inspect.getdoc(sys.modules[exporter.export.__module__]) or exporter.name
    sentence = " ".join(text.partition("\n\n")[0].split()).replace("``", "")
    sentence = sentence.removeprefix("Export to ")
    return sentence[:1].upper() + sentence[1:]


def _missing(exporter: Exporter) -> str:
    """Which package the check of an artefact needs, if it is not installed."""
    if exporter.device is not None:  # another package may stand for the runtime
        return ""
    engine = exporter.engines[0]
    packages = [engine] if engine in EXTRAS else [p for p, e in EXTRAS.items() if e == engine]
    if not packages or any(find_spec(package) for package in packages):
        return ""
    extra = EXTRAS[packages[0]]
    return f"It is checked with {packages[0]}, which is missing: pip install 'aoft-deploy[{extra}]'"


def _refusal(exporter: Exporter | None, no_low_rank: str) -> str:
    """Why this machine, or a task's method, has no use for an exporter."""
    if exporter is None:
        return ""
    if exporter.device is not None:
        import torch

        if not torch.cuda.is_available():
            return "It is built for a graphics card of NVIDIA, which this machine does not have."
    return no_low_rank if exporter.updates is not None else ""


@lru_cache(maxsize=64)
def _no_low_rank(path: Path, modified_ns: int, weights: Path | None) -> str:
    """Why a checkpoint cannot be written as updates alone; the time is part of the cache's key."""
    from aoft_deploy.checkpoints.backbone_source import BackboneSource
    from aoft_deploy.checkpoints.lora_factors import low_rank_factors
    from aoft_deploy.checkpoints.opening import open_checkpoint

    tuned, _ = open_checkpoint(path, BackboneSource(weights=weights))
    try:
        low_rank_factors(tuned)
    except AoftError as error:
        return str(error).partition(": export with")[0] + "."
    return ""
