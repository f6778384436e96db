"""Find the fastest artefact for this machine: export, verify and time every candidate."""

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
from aoft_deploy.artefacts.isolation import SubprocessEngine
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
"""Exporters and precisions to try on a CPU. Ratios are relative to the first."""

BATCHES, ROUNDS = (1, 8), 5


@dataclass(frozen=True)
class Candidate:
    """An exporter and a precision, with the result.

    Attributes:
        to: Name of the exporter.
        precision: Precision of the artefact.
        ratios: Throughput at each of ``BATCHES`` relative to the first candidate; empty if the
            candidate was not exported.
        reason: Why the candidate was not exported; empty if it was.
        slower_at: Batch sizes at which it is slower than the fp32 candidate that it is compared
            with. If there is one, the candidate is not chosen.
    """

    to: str
    precision: str
    ratios: tuple[float, ...] = ()
    reason: str = ""
    slower_at: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        entries: dict[str, Any] = {"exporter": self.to, "precision": self.precision}
        if self.ratios:
            entries |= {"batches": list(BATCHES), "ratios": list(self.ratios)}
        if self.reason:
            entries["left_out"] = self.reason
        if self.slower_at:
            entries["slower_than_fp32_at"] = list(self.slower_at)
        return entries


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

    A precision below fp32 needs images for its verification, and must reach ``min_agreement``. The
    artefacts are timed in one interleaved run. As the choice is not known in advance, no file may
    exist at any of the possible paths.

    Args:
        checkpoint: As for ``export_merged``.
        output: Path of the artefact without a suffix; None means beside the checkpoint.
        uint8: As for ``export_merged``.
        backbone: As for ``export_merged``.
        verify: Images for verification and calibration.
        overwrite: Replace an existing artefact at the chosen path. Artefacts of other exporters are
            kept.
        command: The command line, for the manifest.
        progress: Called with each candidate after its export succeeded or failed.

    Returns:
        The fastest artefact, and all candidates.

    Raises:
        OutputError: A file at a possible path exists and must not, or cannot, be replaced.
        AoftError: The input is invalid, or no candidate passed verification. No file is left.
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
        best, timed = choose(_timed(drafts))
        results = {(candidate.to, candidate.precision): candidate for candidate in timed}
        candidates = [results.get((each.to, each.precision), each) for each in tried]
        chosen = drafts[Candidate(best.to, best.precision)]
        target = targets[best.to]
        contents = read_manifest(chosen.manifest)
        contents["chosen"] = {
            "machine": machine(processors()),
            "among": [candidate.to_dict() for candidate in candidates],
        }
        check_targets()  # files may have appeared in the meantime
        with _moved_aside(target, scratch):
            publish(chosen.path, target, contents)
        return replace(chosen, path=target, manifest=manifest_path(target)), candidates


def choose(timed: Sequence[Candidate]) -> tuple[Candidate, list[Candidate]]:
    """Choose the fastest candidate that is not slower than fp32 at any batch size.

    First, choose the fastest fp32 candidate that is not slower than the first candidate at any
    batch size. Then choose the fastest candidate of a lower precision that is not slower than that
    fp32 candidate at any batch size, if there is one.

    Args:
        timed: Candidates with ratios, fp32 before others.

    Returns:
        The choice, and all candidates with their ``slower_at``.
    """
    compared = list[Candidate]()
    best = timed[0]
    for is_fp32 in (True, False):
        baseline = best
        for candidate in timed:
            if (candidate.precision == "fp32") is not is_fp32:
                continue
            pairs = zip(BATCHES, candidate.ratios, baseline.ratios, strict=True)
            slower = tuple(batch for batch, ratio, minimum in pairs if ratio < minimum)
            compared.append(replace(candidate, slower_at=slower))
            if not slower and prod(candidate.ratios) > prod(best.ratios):
                best = candidate
    return best, compared


def _targets(output: Path) -> dict[str, Path]:
    """The possible paths of the artefact, by exporter."""
    suffixes = {to: get_exporter(to).suffix for to, _ in CANDIDATES}
    if output.name in ("", "..") or output.suffix in suffixes.values():
        raise OutputError(
            f'`to="auto"` chooses between {" and ".join(suffixes.values())}, so {output} cannot be '
            "the artefact's name: give a name without a suffix with `output`."
        )
    return {to: output.with_name(output.name + suffix) for to, suffix in suffixes.items()}


def _check_absent(target: Path) -> None:
    """Refuse a path where an artefact or its manifest exists, even as a broken symbolic link."""
    for path in (target, manifest_path(target)):
        if os.path.lexists(path) and not _is_empty_folder(path):
            raise OutputError(
                f'{path} exists, and `to="auto"` may choose that name: give another name with '
                "`output`, or replace it with `overwrite=True`."
            )


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _check_replaceable(to: str, target: Path, inputs: Sequence[Path]) -> None:
    """Refuse an invalid output path, and a folder that is not an unchanged artefact."""
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
    """Context manager: move an existing folder and its manifest away, and back on failure."""
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
    """The missing input of a candidate, as a phrase; empty if nothing is missing."""
    if precision != "fp32" and not verify.images:
        return "needs `images` to be judged on"
    if _learns(to, precision) and not verify.calibrate:
        return "needs `calibrate`"
    return ""


def _timed(drafts: dict[Candidate, Exported]) -> list[Candidate]:
    """Time the exported candidates, and set their ratios."""
    options = EngineOptions(threads=processors())
    with ExitStack() as stack:
        engines = {
            c: stack.enter_context(SubprocessEngine(partial(load_artefact, draft.path, options)))
            for c, draft in drafts.items()
        }
        subjects = [Subject.of(f"{c.to} {c.precision}", engine) for c, engine in engines.items()]
        preprocessing = ArtefactInfo(subjects[0].engine.info).preprocessing
        size = (preprocessing.height, preprocessing.width)
        timings = interleaved(subjects, BATCHES, size, ROUNDS)
    return [
        replace(candidate, ratios=tuple(t.ratio for t in timings if t.subject is subject))
        for candidate, subject in zip(engines, subjects, strict=True)
    ]
