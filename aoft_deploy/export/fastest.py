"""The fastest artefact for this machine whose answers hold: every way tried, verified and timed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from aoft_deploy.artefacts.isolation import Apart
from aoft_deploy.artefacts.machine import machine
from aoft_deploy.artefacts.manifest import check_unchanged
from aoft_deploy.artefacts.protocols import CalibratedExporter, FolderExporter
from aoft_deploy.artefacts.registry import get_exporter, load_artefact
from aoft_deploy.artefacts.timing import Subject, interleaved
from aoft_deploy.errors import AoftError, CheckpointError, OutputError, SettingError
from aoft_deploy.export.merged import (
    Exported,
    check_output,
    check_output_folder,
    export_merged,
    manifest_path,
    publish,
)
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
"""Exporters and precisions that are tried on a CPU; ratios are those to the first."""

BATCHES, ROUNDS = (1, 8), 5


@dataclass(frozen=True)
class Candidate:
    """A way that was tried.

    Attributes:
        to: Name of the exporter.
        precision: Of the artefact.
        ratios: Throughput at the ``BATCHES`` as a multiple of the first candidate's; empty where it
            was left out.
        reason: Why it was left out; empty where it was not.
        slower_at: Batch sizes at which it is slower than the fp32 that it is compared with: it is
            not chosen then.
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
    images: Sequence[Path] = (),
    calibrate: Sequence[Path] = (),
    overwrite: bool = False,
    command: Sequence[str] = (),
    progress: Callable[[Candidate], None] = lambda candidate: None,
    **options: Any,
) -> tuple[Exported, list[Candidate]]:
    """Export a checkpoint in every way that this machine offers, and keep the fastest.

    A precision below fp32 is tried only with ``images`` to judge it on, and kept only if it reaches
    ``min_agreement``. Artefacts are timed in turn, in one run, and ``choose`` chooses. What will be
    chosen is not known before, so nothing that has one of the possible names may be there.

    Args:
        checkpoint: As of ``export_merged``.
        output: The artefact without its suffix; None puts it beside the checkpoint.
        images: Real images to judge with.
        calibrate: Real images to learn ranges of activations from.
        overwrite: Replace the artefact that has the name of the chosen one. Those of other
            exporters stay.
        command: The command line, for the manifest.
        progress: Told every candidate when it has been exported or left out.
        **options: Further ones of ``export_merged``.

    Returns:
        The artefact that was kept, and all candidates.

    Raises:
        OutputError: An artefact or a manifest of a possible name is there already, and is not to
            be overwritten or cannot be.
        AoftError: Anything wrong with the input, or no candidate holds; no file is left then.
    """
    if not checkpoint.exists():
        raise CheckpointError(f"There is no file {checkpoint}.")
    finals = _finals(output or checkpoint.resolve().with_suffix(""))
    inputs = [checkpoint, *images, *calibrate]
    inputs += [options["weights"]] if options.get("weights") else []

    def check_finals() -> None:
        for to, final in finals.items():
            if not overwrite:
                _check_absent(final)
            _check_replaceable(to, final, inputs)

    check_finals()
    with writable_folder(next(iter(finals.values())).parent) as scratch:
        tried, drafts = [], dict[Candidate, Exported]()
        for to, precision in CANDIDATES:
            candidate = Candidate(to, precision, reason=_missing(to, precision, images, calibrate))
            if not candidate.reason:
                draft = scratch / f"{to}-{precision}" / finals[to].name
                learns: dict[str, Any] = {"calibrate": calibrate} if _learns(to, precision) else {}
                try:
                    drafts[candidate] = export_merged(
                        checkpoint,
                        draft,
                        to=to,
                        precision=precision,
                        images=images,
                        command=command,
                        **learns,
                        **options,
                    )
                except (SettingError, ImportError, ArithmeticError) as error:
                    if not isinstance(error, AoftError):
                        raise
                    candidate = replace(candidate, reason=str(error))
            tried.append(candidate)
            progress(candidate)
        if not drafts:
            raise OutputError(f"Nothing could be exported: {tried[0].reason}")
        best, judged = choose(_timed(drafts))
        known = {(candidate.to, candidate.precision): candidate for candidate in judged}
        ranked = [known.get((one.to, one.precision), one) for one in tried]
        chosen = drafts[Candidate(best.to, best.precision)]
        final = finals[best.to]
        contents = json.loads(chosen.manifest.read_text("utf-8"))
        contents["chosen"] = {
            "machine": machine(processors()),
            "among": [candidate.to_dict() for candidate in ranked],
        }
        check_finals()  # the world went on meanwhile
        with _away(final, scratch):
            publish(chosen.path, final, contents)
        return replace(chosen, path=final, manifest=manifest_path(final)), ranked


def choose(timed: Sequence[Candidate]) -> tuple[Candidate, list[Candidate]]:
    """The fastest of all batch sizes together that is slower than fp32 at none.

    First the fastest fp32 that is nowhere slower than the first candidate; then, of the precisions
    below, the fastest that is nowhere slower than that fp32.

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


def _finals(target: Path) -> dict[str, Path]:
    """The names that artefacts may get, by exporter."""
    suffixes = {to: get_exporter(to).SUFFIX for to, _ in CANDIDATES}
    if target.name in ("", "..") or target.suffix in suffixes.values():
        raise OutputError(
            f"{target} is no name for --to auto, which chooses between "
            f"{' and '.join(suffixes.values())}: name it without a suffix with -o."
        )
    return {to: target.with_name(target.name + suffix) for to, suffix in suffixes.items()}


def _check_absent(final: Path) -> None:
    """Whether nothing has the name of an artefact or of its manifest, not even a dead link."""
    for path in (final, manifest_path(final)):
        if os.path.lexists(path) and not _is_empty_folder(path):
            raise OutputError(
                f"{path} exists, and --to auto may choose that name: name another with -o, or "
                "replace it with --overwrite."
            )


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _check_replaceable(to: str, final: Path, inputs: Sequence[Path]) -> None:
    """Whether an artefact can take a name, in place of one of its kind.

    A folder goes as a whole, so it must be just what was exported.
    """
    exporter = get_exporter(to)
    if not isinstance(exporter, FolderExporter):
        check_output(final, exporter.SUFFIX, inputs)
    elif final.is_symlink() or not (final / exporter.MARKER).is_file():
        check_output_folder(final)
    elif not manifest_path(final).is_file():
        raise OutputError(f"{final} has no manifest of aoft-export: name another with -o.")
    else:
        try:
            check_unchanged(final)
        except CheckpointError as error:
            raise OutputError(f"{error} Name another with -o.") from error


@contextmanager
def _away(final: Path, scratch: Path) -> Iterator[None]:
    """Put a folder that stands there, and its manifest, aside; back if the block fails."""
    if not final.is_dir() or _is_empty_folder(final):
        yield
        return
    moved = [path for path in (final, manifest_path(final)) if path.exists()]
    for path in moved:
        path.rename(scratch / f"old-{path.name}")
    try:
        yield
    except BaseException:
        for path in moved:
            (scratch / f"old-{path.name}").rename(path)
        raise


def _learns(to: str, precision: str) -> bool:
    exporter = get_exporter(to)
    return isinstance(exporter, CalibratedExporter) and precision in exporter.CALIBRATED


def _missing(to: str, precision: str, images: Sequence[Path], calibrate: Sequence[Path]) -> str:
    """What the user did not give that a candidate needs."""
    if precision != "fp32" and not images:
        return "needs --images to be judged on"
    if _learns(to, precision) and not calibrate:
        return "needs --calibrate"
    return ""


def _timed(drafts: dict[Candidate, Exported]) -> list[Candidate]:
    """The candidates with their ratios to the first."""
    threads = processors()
    with ExitStack() as stack:
        engines = {
            c: stack.enter_context(Apart(partial(load_artefact, done.path, threads=threads)))
            for c, done in drafts.items()
        }
        subjects = [Subject.of(f"{c.to} {c.precision}", engine) for c, engine in engines.items()]
        size = json.loads(subjects[0].engine.info["preprocessing"])["size"]
        timings = interleaved(subjects, BATCHES, size, ROUNDS)
    return [
        replace(candidate, ratios=tuple(t.ratio for t in timings if t.subject is subject))
        for candidate, subject in zip(engines, subjects, strict=True)
    ]
