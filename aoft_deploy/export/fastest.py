"""Find the fastest artefact for this machine: export, verify and time every candidate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from aoft_deploy.artefacts.manifest import manifest_path, read_manifest
from aoft_deploy.artefacts.registry import get_exporter
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.file_format import checkpoint_file
from aoft_deploy.errors import (
    AoftError,
    CheckpointError,
    OutputError,
    SettingError,
    UnknownNameError,
    optional_imports,
)
from aoft_deploy.export.fleet import export_fleet
from aoft_deploy.export.merged import export_merged
from aoft_deploy.export.options import VerifyOptions
from aoft_deploy.export.output_paths import artefact_path, beside, check_output
from aoft_deploy.export.publishing import Exported, publish
from aoft_deploy.export.race import GOALS, Candidate, Race
from aoft_deploy.export.race_timing import timed
from aoft_deploy.files import writable_folder

__all__ = ["BATCHES", "CANDIDATES", "export_fastest", "export_fastest_fleet"]

CANDIDATES = (
    ("onnx", "fp32"),
    ("onnx", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)
"""Exporters and precisions to try on a CPU. Ratios are relative to the first."""

BATCHES = (1, 8)


@optional_imports()
def export_fastest(
    checkpoint: Path,
    output: Path | None = None,
    *,
    uint8: bool = False,
    batches: Sequence[int] = BATCHES,
    goal: str = GOALS[0],
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
        goal: ``latency``: one batch at a time; ``throughput``: several at once; see ``timed``.
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
    checkpoint = checkpoint_file(checkpoint)
    if not checkpoint.exists():
        raise CheckpointError(f"There is no file {checkpoint}.")

    def export(to: str, precision: str, path: Path, verify: VerifyOptions) -> Exported:
        return export_merged(
            checkpoint,
            path,
            to=to,
            precision=precision,
            uint8=uint8,
            backbone=backbone,
            verify=verify,
            command=command,
        )

    contest = _Contest(
        export, output or beside(checkpoint), [checkpoint], backbone, verify, overwrite
    )
    return contest.run(batches, goal, progress)


@optional_imports()
def export_fastest_fleet(
    checkpoints: Sequence[Path],
    output: Path | None = None,
    *,
    form: str = "auto",
    batches: Sequence[int] = BATCHES,
    goal: str = GOALS[0],
    backbone: BackboneSource = BackboneSource(),
    verify: VerifyOptions = VerifyOptions(),
    overwrite: bool = False,
    command: Sequence[str] = (),
    progress: Callable[[Candidate], None] = lambda candidate: None,
) -> tuple[Exported, Race]:
    """Export a fleet with every candidate, and keep the fastest artefact.

    The tasks take turns in the timed batches.

    Args:
        checkpoints: As for ``export_fleet``.
        output: Path of the artefact without a suffix; None means ``fleet`` in the current folder.
        form: As for ``export_fleet``.
        batches: As for ``export_fastest``.
        goal: As for ``export_fastest``.
        backbone: As for ``export_fleet``.
        verify: As for ``export_fastest``.
        overwrite: As for ``export_fastest``.
        command: As for ``export_fastest``.
        progress: As for ``export_fastest``.

    Returns:
        The chosen artefact, and the figures of all candidates.

    Raises:
        OutputError: Something at a possible path exists and may not be replaced.
        AoftError: The input is invalid, or no candidate passed verification. No file is left.
    """
    files = [checkpoint_file(path) for path in checkpoints]
    for path in files:
        if not path.exists():
            raise CheckpointError(f"There is no file {path}.")

    def export(to: str, precision: str, path: Path, verify: VerifyOptions) -> Exported:
        return export_fleet(
            files,
            path,
            to=to,
            precision=precision,
            form=form,
            backbone=backbone,
            verify=verify,
            command=command,
        )

    contest = _Contest(export, output or Path("fleet"), files, backbone, verify, overwrite)
    return contest.run(batches, goal, progress)


@dataclass(frozen=True)
class _Contest:
    """The export of every candidate, and the choice among them.

    Attributes:
        export: Writes an artefact of an exporter and a precision to a path.
        output: Path of the chosen artefact without suffixes.
        sources: The checkpoints.
        backbone: The backbone's weights.
        verify: Images for verification and calibration.
        overwrite: Replace an existing artefact of the chosen exporter and precision.
    """

    export: Callable[[str, str, Path, VerifyOptions], Exported]
    output: Path
    sources: Sequence[Path]
    backbone: BackboneSource
    verify: VerifyOptions
    overwrite: bool

    def run(
        self, batches: Sequence[int], goal: str, progress: Callable[[Candidate], None]
    ) -> tuple[Exported, Race]:
        """Export, time and publish; see ``export_fastest``."""
        batches = sorted(set(batches))
        if not batches or batches[0] < 1:
            raise SettingError("`batches` must be one or more batch sizes from 1.")
        if goal not in GOALS:
            raise UnknownNameError("goal", goal, GOALS)
        verify, targets = self.verify, _targets(self.output)
        candidates = [Candidate(*each, reason=_missing(*each, verify)) for each in CANDIDATES]
        self._check(candidates, targets)
        with writable_folder(targets[candidates[0].name].parent) as scratch:
            drafts = dict[str, Exported]()
            for i, each in enumerate(candidates):
                if not each.reason:
                    calibrate = verify.calibrate if _learns(each.to, each.precision) else ()
                    draft = scratch / each.name / targets[each.name].name
                    try:
                        drafts[each.name] = self.export(
                            each.to, each.precision, draft, replace(verify, calibrate=calibrate)
                        )
                    except (SettingError, ImportError, ArithmeticError) as error:
                        if not isinstance(error, AoftError):
                            raise
                        candidates[i] = replace(each, reason=str(error))
                progress(candidates[i])
            if not drafts:
                raise OutputError(f"No candidate could be exported: {candidates[0].reason}")
            found = timed({name: draft.path for name, draft in drafts.items()}, batches, goal)
            race = Race.of(
                [
                    replace(each, ratios=found[each.name].ratios, lanes=found[each.name].lanes)
                    if each.name in found
                    else each
                    for each in candidates
                ],
                goal,
            )
            chosen, target = drafts[race.chosen.name], targets[race.chosen.name]
            self._check(candidates, targets)  # something may have appeared there in the meantime
            manifest = {**read_manifest(chosen.manifest), "chosen": race.to_dict()}
            publish(chosen.path, target, manifest)
            return replace(chosen, path=target, manifest=manifest_path(target)), race

    def _check(self, candidates: Sequence[Candidate], targets: Mapping[str, Path]) -> None:
        """Refuse to replace what exists at the possible paths."""
        inputs = [*self.sources, *self.verify.images, *self.verify.calibrate]
        inputs += [self.backbone.weights] if self.backbone.weights else []
        for each in candidates:
            if not each.reason:
                check_output(get_exporter(each.to), targets[each.name], inputs, self.overwrite)


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
