"""Find the fastest artefact for this machine: export, verify and time every candidate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.isolation import SubprocessEngine
from aoft_deploy.artefacts.manifest import manifest_path, read_manifest
from aoft_deploy.artefacts.registry import get_exporter, load_artefact
from aoft_deploy.artefacts.timing import Subject, interleaved
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.file_format import checkpoint_file
from aoft_deploy.errors import (
    AoftError,
    CheckpointError,
    OutputError,
    SettingError,
    optional_imports,
)
from aoft_deploy.export.merged import export_merged
from aoft_deploy.export.options import VerifyOptions
from aoft_deploy.export.output_paths import artefact_path, beside, check_output
from aoft_deploy.export.publishing import Exported, publish
from aoft_deploy.export.race import Candidate, Race
from aoft_deploy.files import writable_folder
from aoft_deploy.processors import processors

__all__ = ["BATCHES", "CANDIDATES", "export_fastest"]

CANDIDATES = (
    ("onnx", "fp32"),
    ("onnx", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)
"""Exporters and precisions to try on a CPU. Ratios are relative to the first."""

BATCHES, ROUNDS = (1, 8), 5


@optional_imports()
def export_fastest(
    checkpoint: Path,
    output: Path | None = None,
    *,
    uint8: bool = False,
    batches: Sequence[int] = BATCHES,
    backbone: BackboneSource = BackboneSource(),
    verify: VerifyOptions = VerifyOptions(),
    overwrite: bool = False,
    command: Sequence[str] = (),
    progress: Callable[[Candidate], None] = lambda candidate: None,
) -> tuple[Exported, Race]:
    """Export a checkpoint with every candidate, and keep the fastest artefact.

    A precision below fp32 needs images for its verification, and must reach ``min_agreement``. The
    artefacts are timed in one interleaved run. As the choice is not known in advance, nothing may
    exist at any of the possible paths.

    Args:
        checkpoint: As for ``export_merged``.
        output: Path of the artefact without a suffix; None means beside the checkpoint. The suffix
            and, below fp32, the precision are added: ``task.onnx``, ``task-int8.openvino``.
        uint8: As for ``export_merged``.
        batches: Batch sizes that the artefact will serve. ``criterion`` says how they decide.
        backbone: As for ``export_merged``.
        verify: Images for verification and calibration.
        overwrite: Replace an existing artefact of the chosen exporter and precision.
        command: The command line, for the manifest.
        progress: Called with each candidate after its export succeeded or failed.

    Returns:
        The chosen artefact, and the figures of all candidates.

    Raises:
        OutputError: Something at a possible path exists and may not be replaced.
        AoftError: The input is invalid, or no candidate passed verification. No file is left.
    """
    batches = sorted(set(batches))
    if not batches or batches[0] < 1:
        raise SettingError("`batches` must be one or more batch sizes from 1.")
    checkpoint = checkpoint_file(checkpoint)
    if not checkpoint.exists():
        raise CheckpointError(f"There is no file {checkpoint}.")
    targets = _targets(output or beside(checkpoint))
    inputs = [checkpoint, *verify.images, *verify.calibrate]
    inputs += [backbone.weights] if backbone.weights else []

    candidates = [Candidate(to, kind, reason=_missing(to, kind, verify)) for to, kind in CANDIDATES]

    def check_targets() -> None:
        for each in candidates:
            if not each.reason:
                check_output(get_exporter(each.to), targets[each.name], inputs, overwrite)

    check_targets()
    with writable_folder(targets[candidates[0].name].parent) as scratch:
        drafts = dict[str, Exported]()
        for i, each in enumerate(candidates):
            if not each.reason:
                calibrate = verify.calibrate if _learns(each.to, each.precision) else ()
                try:
                    drafts[each.name] = export_merged(
                        checkpoint,
                        scratch / each.name / targets[each.name].name,
                        to=each.to,
                        precision=each.precision,
                        uint8=uint8,
                        backbone=backbone,
                        verify=replace(verify, calibrate=calibrate),
                        command=command,
                    )
                except (SettingError, ImportError, ArithmeticError) as error:
                    if not isinstance(error, AoftError):
                        raise
                    candidates[i] = replace(each, reason=str(error))
            progress(candidates[i])
        if not drafts:
            raise OutputError(f"No candidate could be exported: {candidates[0].reason}")
        ratios = _ratios({name: draft.path for name, draft in drafts.items()}, batches)
        race = Race.of([replace(c, ratios=ratios.get(c.name, {})) for c in candidates])
        draft, target = drafts[race.chosen.name], targets[race.chosen.name]
        check_targets()  # something may have appeared there in the meantime
        publish(draft.path, target, {**read_manifest(draft.manifest), "chosen": race.to_dict()})
        return replace(draft, path=target, manifest=manifest_path(target)), race


def _targets(output: Path) -> dict[str, Path]:
    """The possible paths of the artefact, by the candidate's name."""
    suffixes = list(dict.fromkeys(get_exporter(to).suffix for to, _ in CANDIDATES))
    if output.name in ("", "..") or output.suffix in suffixes:
        raise OutputError(
            f'`to="auto"` chooses between {" and ".join(suffixes)}, so {output} cannot be the '
            "artefact's name: give a name without a suffix with `output`."
        )
    return {
        Candidate(to, precision).name: artefact_path(output, get_exporter(to), precision)
        for to, precision in CANDIDATES
    }


def _learns(to: str, precision: str) -> bool:
    return precision in get_exporter(to).calibrated


def _missing(to: str, precision: str, verify: VerifyOptions) -> str:
    """The missing input of a candidate, as a phrase; empty if nothing is missing."""
    if precision != "fp32" and not verify.images:
        return "needs `images` to be judged on"
    if _learns(to, precision) and not verify.calibrate:
        return "needs `calibrate`"
    return ""


def _ratios(artefacts: Mapping[str, Path], batches: Sequence[int]) -> dict[str, dict[int, float]]:
    """Time artefacts in turn. The ratios, by name and batch size, are relative to the first one."""
    options = EngineOptions(threads=processors())
    with ExitStack() as stack:
        subjects = [
            Subject.of(
                name, stack.enter_context(SubprocessEngine(partial(load_artefact, path, options)))
            )
            for name, path in artefacts.items()
        ]
        preprocessing = ArtefactInfo(subjects[0].engine.info).preprocessing
        size = (preprocessing.height, preprocessing.width)
        ratios: dict[str, dict[int, float]] = {name: {} for name in artefacts}
        for timing in interleaved(subjects, batches, size, ROUNDS):
            ratios[timing.subject.name][timing.batch] = timing.ratio
    return ratios
