"""The fastest artefact for this machine: every candidate is exported, verified and timed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.isolation import Apart
from aoft_deploy.artefacts.machine import machine
from aoft_deploy.artefacts.manifest import check_unchanged, manifest_path, read_manifest
from aoft_deploy.artefacts.registry import get_exporter, load_artefact
from aoft_deploy.artefacts.timing import Subject, interleaved
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.errors import (
    AoftError,
    ArtefactError,
    CheckpointError,
    OutputError,
    SettingError,
)
from aoft_deploy.export.merged import export_merged
from aoft_deploy.export.options import VerifyOptions
from aoft_deploy.export.publishing import Exported, check_output, publish
from aoft_deploy.files import writable_folder
from aoft_deploy.processors import processors

__all__ = ["BATCHES", "CANDIDATES", "Candidate", "choose", "export_fastest"]

CANDIDATES = (
    ("onnx", "fp32"),
    ("onnx", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)
"""Exporters and precisions to try on a CPU; ratios are relative to the first."""

BATCHES, ROUNDS = (1, 8), 5


@dataclass(frozen=True)
class Candidate:
    """An exporter and a precision, with the outcome.

    Attributes:
        to: Name of the exporter.
        precision: Of the artefact.
        ratios: Throughput at each of ``BATCHES`` as a multiple of the first candidate's; empty
            where it was left out.
        reason: Why it was left out; empty where it was not.
        slower_at: Batch sizes at which it is slower than the fp32 candidate that it is compared
            with; it is not chosen then.
    """

    to: str
    precision: str
    ratios: tuple[float, ...] = ()
    reason: str = ""
    slower_at: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        told = {"batches": list(BATCHES), "ratios": list(self.ratios)} if self.ratios else {}
        left = {"left_out": self.reason} if self.reason else {}
        slow = {"slower_than_fp32_at": list(self.slower_at)} if self.slower_at else {}
        return {"exporter": self.to, "precision": self.precision, **told, **left, **slow}


def export_fastest(
    checkpoint: Path,
    output: Path | None = None,
    *,
    uint8: bool = False,
    backbone: BackboneSource = BackboneSource(),
    verify: VerifyOptions = VerifyOptions(),
    overwrite: bool = False,
    command: Sequence[str] = (),
    progress: Callable[[Candidate], None] = lambda candidate: None,
) -> tuple[Exported, list[Candidate]]:
    """Export a checkpoint with every candidate, and keep the fastest artefact.

    A precision below fp32 is tried only with images to judge it on, and kept only if it reaches
    ``min_agreement``. Artefacts are timed in turn, in one run. The choice is not known in advance,
    so nothing may exist under any of the possible names.

    Args:
        checkpoint: As of ``export_merged``.
        output: The artefact without its suffix; None puts it beside the checkpoint.
        uint8: As of ``export_merged``.
        backbone: As of ``export_merged``.
        verify: Images to judge with, and to learn ranges of activations from.
        overwrite: Replace the artefact that has the name of the chosen one. Those of other
            exporters stay.
        command: The command line, for the manifest.
        progress: Called with every candidate when it has been exported or left out.

    Returns:
        The artefact that was kept, and all candidates.

    Raises:
        OutputError: An artefact or a manifest of a possible name exists, and must not be
            overwritten or cannot be.
        AoftError: The input is wrong, or no candidate holds; no file is left then.
    """
    if not checkpoint.exists():
        raise CheckpointError(f"There is no file {checkpoint}.")
    targets = _targets(output or checkpoint.resolve().with_suffix(""))
    inputs = [checkpoint, *verify.images, *verify.calibrate]
    inputs += [backbone.weights] if backbone.weights else []

    def check_targets() -> None:
        for to, target in targets.items():
            if not overwrite:
                _check_absent(target)
            _check_replaceable(to, target, inputs)

    check_targets()
    with writable_folder(next(iter(targets.values())).parent) as scratch:
        tried, drafts = [], dict[Candidate, Exported]()
        for to, precision in CANDIDATES:
            candidate = Candidate(to, precision, reason=_missing(to, precision, verify))
            if not candidate.reason:
                calibrate = verify.calibrate if _learns(to, precision) else ()
                try:
                    drafts[candidate] = export_merged(
                        checkpoint,
                        scratch / f"{to}-{precision}" / targets[to].name,
                        to=to,
                        precision=precision,
                        uint8=uint8,
                        backbone=backbone,
                        verify=replace(verify, calibrate=calibrate),
                        command=command,
                    )
                except (SettingError, ImportError, ArithmeticError) as error:
                    if not isinstance(error, AoftError):
                        raise
                    candidate = replace(candidate, reason=str(error))
            tried.append(candidate)
            progress(candidate)
        if not drafts:
            raise OutputError(f"No candidate could be exported: {tried[0].reason}")
        best, judged = choose(_timed(drafts))
        known = {(candidate.to, candidate.precision): candidate for candidate in judged}
        ranked = [known.get((one.to, one.precision), one) for one in tried]
        chosen = drafts[Candidate(best.to, best.precision)]
        target = targets[best.to]
        contents = read_manifest(chosen.manifest)
        contents["chosen"] = {
            "machine": machine(processors()),
            "among": [candidate.to_dict() for candidate in ranked],
        }
        check_targets()  # files may have appeared in the meantime
        with _moved_aside(target, scratch):
            publish(chosen.path, target, contents)
        return replace(chosen, path=target, manifest=manifest_path(target)), ranked


def choose(timed: Sequence[Candidate]) -> tuple[Candidate, list[Candidate]]:
    """The fastest candidate over all batch sizes that is slower than fp32 at none of them.

    First the fastest fp32 candidate that is nowhere slower than the first one; then, among lower
    precisions, the fastest that is nowhere slower than that fp32 candidate.

    Args:
        timed: Candidates with ratios, fp32 before others.

    Returns:
        The choice, and all with their ``slower_at``.
    """
    judged = list[Candidate]()
    best = timed[0]
    for full in (True, False):
        limit = best
        for candidate in timed:
            if (candidate.precision == "fp32") is not full:
                continue
            pairs = zip(BATCHES, candidate.ratios, limit.ratios, strict=True)
            slower = tuple(batch for batch, own, least in pairs if own < least)
            judged.append(replace(candidate, slower_at=slower))
            if not slower and prod(candidate.ratios) > prod(best.ratios):
                best = candidate
    return best, judged


def _targets(output: Path) -> dict[str, Path]:
    """The paths that the artefact may get, by exporter."""
    suffixes = {to: get_exporter(to).suffix for to, _ in CANDIDATES}
    if output.name in ("", "..") or output.suffix in suffixes.values():
        raise OutputError(
            f'`to="auto"` chooses between {" and ".join(suffixes.values())}, so {output} cannot be '
            "the artefact's name: give one without a suffix with `output`."
        )
    return {to: output.with_name(output.name + suffix) for to, suffix in suffixes.items()}


def _check_absent(target: Path) -> None:
    """Refuse a path at which an artefact or its manifest exists, even as a dead link."""
    for path in (target, manifest_path(target)):
        if os.path.lexists(path) and not _is_empty_folder(path):
            raise OutputError(
                f'{path} exists, and `to="auto"` may choose that name: give another name with '
                "`output`, or replace it with `overwrite=True`."
            )


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _check_replaceable(to: str, target: Path, inputs: Sequence[Path]) -> None:
    """Refuse a path that an artefact cannot take, or a folder that is not an unchanged export."""
    exporter = get_exporter(to)
    if not exporter.marker or target.is_symlink() or not (target / exporter.marker).is_file():
        check_output(exporter, target, inputs)
    elif not manifest_path(target).is_file():
        raise OutputError(
            f"{target} has no manifest of aoft-export: give another name with `output`."
        )
    else:
        try:
            check_unchanged(target)
        except ArtefactError as error:
            raise OutputError(f"{error} Or give another name with `output`.") from error


@contextmanager
def _moved_aside(target: Path, scratch: Path) -> Iterator[None]:
    """Context manager: an existing folder and its manifest are moved away, and back on failure."""
    if not target.is_dir() or _is_empty_folder(target):
        yield
        return
    moved = [path for path in (target, manifest_path(target)) if path.exists()]
    for path in moved:
        path.rename(scratch / f"old-{path.name}")
    try:
        yield
    except BaseException:
        for path in moved:
            (scratch / f"old-{path.name}").rename(path)
        raise


def _learns(to: str, precision: str) -> bool:
    return precision in get_exporter(to).calibrated


def _missing(to: str, precision: str, verify: VerifyOptions) -> str:
    """What a candidate needs that was not given."""
    if precision != "fp32" and not verify.images:
        return "needs `images` to be judged on"
    if _learns(to, precision) and not verify.calibrate:
        return "needs `calibrate`"
    return ""


def _timed(drafts: dict[Candidate, Exported]) -> list[Candidate]:
    """The candidates with their ratios to the first."""
    options = EngineOptions(threads=processors())
    with ExitStack() as stack:
        engines = {
            c: stack.enter_context(Apart(partial(load_artefact, done.path, options)))
            for c, done in drafts.items()
        }
        subjects = [Subject.of(f"{c.to} {c.precision}", engine) for c, engine in engines.items()]
        preprocessing = ArtefactInfo(subjects[0].engine.info).preprocessing
        size = (preprocessing.height, preprocessing.width)
        timings = interleaved(subjects, BATCHES, size, ROUNDS)
    return [
        replace(candidate, ratios=tuple(t.ratio for t in timings if t.subject is subject))
        for candidate, subject in zip(engines, subjects, strict=True)
    ]
