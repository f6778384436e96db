"""The fastest artefact for this machine whose answers hold: every way tried, verified and timed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from aoft_deploy.apart import Apart
from aoft_deploy.engines import CalibratedExporter, FolderExporter, get_exporter, load_artefact
from aoft_deploy.errors import AoftError, CheckpointError, OutputError, SettingError
from aoft_deploy.export import (
    Exported,
    check_output,
    check_output_folder,
    export_merged,
    manifest_path,
    publish,
)
from aoft_deploy.files import writable_folder
from aoft_deploy.measurement import Subject, interleaved, machine

__all__ = ["CANDIDATES", "Candidate", "export_fastest"]

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
        ratios: Throughput at batch 1 and 8 as a multiple of the first candidate's; empty where it
            was left out.
        reason: Why it was left out; empty where it was not.
    """

    to: str
    precision: str
    ratios: tuple[float, ...] = ()
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        told = {"batches": list(BATCHES), "ratios": list(self.ratios)} if self.ratios else {}
        left = {"left_out": self.reason} if self.reason else {}
        return {"exporter": self.to, "precision": self.precision, **told, **left}


def export_fastest(
    checkpoint: Path,
    output: Path | None = None,
    *,
    images: Sequence[Path] = (),
    calibrate: Sequence[Path] = (),
    command: Sequence[str] = (),
    progress: Callable[[Candidate], None] = lambda candidate: None,
    **options: Any,
) -> tuple[Exported, list[Candidate]]:
    """Export a checkpoint in every way that this machine offers, and keep the fastest.

    A precision below fp32 is tried only with ``images`` to judge it on, and kept only if it reaches
    ``min_agreement``. Artefacts are timed in turn, in one run.

    Args:
        checkpoint: As of ``export_merged``.
        output: The artefact without its suffix; None puts it beside the checkpoint.
        images: Real images to judge with.
        calibrate: Real images to learn ranges of activations from.
        command: The command line, for the manifest.
        progress: Told every candidate when it has been exported or left out.
        **options: Further ones of ``export_merged``.

    Returns:
        The artefact that was kept, and all candidates.

    Raises:
        AoftError: Anything wrong with the input, or no candidate holds; no file is left then.
    """
    if not checkpoint.exists():
        raise CheckpointError(f"There is no file {checkpoint}.")
    target = output or checkpoint.resolve().with_suffix("")
    finals = {to: target.with_name(target.name + get_exporter(to).SUFFIX) for to, _ in CANDIDATES}
    for to, final in finals.items():
        if isinstance(get_exporter(to), FolderExporter):
            check_output_folder(final)
        else:
            check_output(final, get_exporter(to).SUFFIX, [checkpoint, *images, *calibrate])
    with writable_folder(target.parent) as scratch:
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
        timed = _timed(drafts)
        best = max(timed, key=lambda candidate: prod(timed[candidate].ratios))
        ranked = [timed.get(candidate, candidate) for candidate in tried]
        final = finals[best.to]
        contents = json.loads(drafts[best].manifest.read_text("utf-8"))
        contents["chosen"] = {
            "machine": machine(os.cpu_count()),
            "among": [candidate.to_dict() for candidate in ranked],
        }
        publish(drafts[best].path, final, contents)
        return replace(drafts[best], path=final, manifest=manifest_path(final)), ranked


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


def _timed(drafts: dict[Candidate, Exported]) -> dict[Candidate, Candidate]:
    """The candidates with their ratios to the first."""
    threads = os.cpu_count()
    with ExitStack() as stack:
        engines = {
            c: stack.enter_context(Apart(partial(load_artefact, done.path, threads=threads)))
            for c, done in drafts.items()
        }
        subjects = [Subject.of(f"{c.to} {c.precision}", engine) for c, engine in engines.items()]
        size = json.loads(subjects[0].engine.info["preprocessing"])["size"]
        timings = interleaved(subjects, BATCHES, size, ROUNDS)
    return {
        candidate: replace(
            candidate,
            ratios=tuple(t.ratio for t in timings if t.subject is subject),
        )
        for candidate, subject in zip(engines, subjects, strict=True)
    }
