"""Tasks as files to take home: one task in a format, or all tasks in one file."""

from __future__ import annotations

import shlex
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aoft_demo.actions.export_code import Code, Plan, export_code, export_command, next_steps
from aoft_demo.actions.formats import ALL_TASKS, CHECKPOINT, DEFAULT, Format, format_called
from aoft_demo.actions.sample_pictures import write_sample_pictures
from aoft_demo.tasks.session import NO_TASK, Session
from aoft_demo.tasks.shared_fleet import checkpoint_of
from aoft_deploy.artefacts.manifest import artefact_files
from aoft_deploy.artefacts.registry import get_exporter
from aoft_deploy.artefacts.verification import Report
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.errors import CheckpointError, SettingError
from aoft_deploy.export.options import VerifyOptions
from aoft_deploy.export.publishing import Exported

__all__ = ["TakenHome", "export_all", "export_task"]


@dataclass(frozen=True)
class TakenHome:
    """What can be downloaded.

    Attributes:
        tasks: Names of the tasks in it.
        format: Its format.
        path: The file to download: the artefact, or a zip file of a folder and its manifest.
        size: Size of that file in bytes.
        activation: What the outputs mean, as in ``Classes.activation``; of all tasks.
        manifest: The artefact's manifest; None for a task's own file.
        report: Comparison with the unmerged model; None for a task's own file.
        pictures: Number of the report's pictures that show real objects.
        code: How to write the file again, by language.
        steps: How to use the file, by purpose.
        left_out: Names of tasks that are not in it, because their checkpoints are missing.
    """

    tasks: tuple[str, ...]
    format: Format
    path: Path
    size: int
    activation: str
    manifest: Path | None = None
    report: Report | None = None
    pictures: int = 0
    code: Code = field(default_factory=dict)
    steps: Code = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def export_task(session: Session, name: str, key: object) -> TakenHome:
    """Write a task in a format, with its manifest, into the session's folder.

    Args:
        session: Session with the task.
        name: Name of the task.
        key: ``Format.key`` of a format.

    Raises:
        AoftError: There is no such task or format, the format cannot work here, the task has no
            checkpoint or was removed in the meantime, or the answers differ.
    """
    from aoft_deploy.export.merged import export_merged

    chosen = format_called(session, name, key)
    with session.using(name) as task:
        checkpoint = checkpoint_of(task, name)
        source = f"{name}{checkpoint.suffix}"
        if chosen.key == CHECKPOINT:
            return _own_file(session, checkpoint, name, chosen)

        def write(output: Path, images: Sequence[Path], command: Sequence[str]) -> Exported:
            return export_merged(
                checkpoint,
                output,
                to=chosen.to,
                precision=chosen.precision,
                uint8=chosen.uint8,
                backbone=BackboneSource(weights=session.shared.weights),
                verify=VerifyOptions(images=images),
                command=command,
            )

        return _exported(session, name, [name], [source], chosen, task.classes.activation, write)


def export_all(session: Session) -> TakenHome:
    """Write all tasks of a session as one artefact, with its manifest, into the session's folder.

    Raises:
        AoftError: No task has a checkpoint, a task was removed in the meantime, or the answers
            differ.
    """
    from aoft_deploy.export.fleet import export_fleet

    tasks = dict(session.tasks)
    if not tasks:
        raise SettingError(NO_TASK)
    found = {name: task.checkpoint for name, task in tasks.items() if task.checkpoint is not None}
    if not found:
        raise CheckpointError(
            "The demo has no checkpoint of any skill: start aoft-demo with them, or add one on "
            "the tab Skills."
        )
    activations = {tasks[name].classes.activation for name in found}

    def write(output: Path, images: Sequence[Path], command: Sequence[str]) -> Exported:
        return export_fleet(
            found,
            output,
            backbone=BackboneSource(weights=session.shared.weights),
            verify=VerifyOptions(images=images),
            command=command,
        )

    about = "All skills and the shared model in one file."
    chosen = Format(ALL_TASKS, about, get_exporter(DEFAULT).engines, DEFAULT)
    sources = [f"{name}{path.suffix}" for name, path in found.items()]
    activation = activations.pop() if len(activations) == 1 else "mixed"
    left_out = [name for name in tasks if name not in found]
    return _exported(
        session, ALL_TASKS, [*found], sources, chosen, activation, write, left_out=left_out
    )


def _exported(
    session: Session,
    stem: str,
    tasks: Sequence[str],
    sources: Sequence[str],
    chosen: Format,
    activation: str,
    write: Callable[[Path, Sequence[Path], Sequence[str]], Exported],
    left_out: Sequence[str] = (),
) -> TakenHome:
    """Write an artefact with ``write``, and pack it if it is a folder."""
    suffix = "" if chosen.precision == "fp32" else f"-{chosen.precision}"
    suffix += "-uint8" if chosen.uint8 else ""
    folder = _empty_folder(session)
    output = folder / f"{stem}{suffix}{get_exporter(chosen.to).suffix}"
    preprocessing = session.shared.fleet.preprocessing
    size = max(preprocessing.height, preprocessing.width)
    try:
        samples = folder / "samples"
        count = write_sample_pictures(session.shared.examples, samples, size)
        plan = Plan(sources, output.name, chosen, bool(count), session.shared.weights)
        done = write(output, [samples] if count else [], export_command(plan))
        task = tasks[0] if chosen.is_fleet else None
        download = _packed(done.path, done.manifest) if done.path.is_dir() else done.path
        return TakenHome(
            tuple(tasks),
            chosen,
            download,
            download.stat().st_size,
            activation,
            done.manifest,
            done.report,
            count,
            export_code(plan),
            next_steps(done.path, task),
            tuple(left_out),
        )
    finally:
        shutil.rmtree(folder / "samples", ignore_errors=True)
        _clear_if_ended(session)


def _own_file(session: Session, checkpoint: Path, name: str, chosen: Format) -> TakenHome:
    """A copy of a task's checkpoint."""
    copy = _empty_folder(session) / f"{name}{checkpoint.suffix}"
    try:
        shutil.copyfile(checkpoint, copy)
    finally:
        _clear_if_ended(session)
    python = f"from aoft_deploy import load\n\nmodel = load({copy.name!r})\n"
    return TakenHome(
        (name,),
        chosen,
        copy,
        copy.stat().st_size,
        session.task(name).classes.activation,
        code={
            "Shell": f"aoft-inspect {shlex.quote(copy.name)}",
            "Python": python + 'print(model.predict("picture.png"))',
        },
        steps={
            "See what is in it": f"aoft-inspect {shlex.quote(copy.name)}",
            "Make a file that runs by itself": f"aoft-export --merge {shlex.quote(copy.name)}",
            "Show it in this demo at home": f"aoft-demo {shlex.quote(copy.name)}",
        },
    )


def _empty_folder(session: Session) -> Path:
    """The session's folder of downloads, without earlier ones."""
    folder = session.folder / "exports"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _clear_if_ended(session: Session) -> None:
    if session.ended:  # the session's folder was removed during the export
        shutil.rmtree(session.folder, ignore_errors=True)


def _packed(artefact: Path, manifest: Path) -> Path:
    """A zip file of an artefact's folder and its manifest, without compression."""
    target = artefact.with_name(f"{artefact.name}.zip")
    with zipfile.ZipFile(target, "w") as archive:
        for file in [*artefact_files(artefact), manifest]:
            archive.write(file, file.relative_to(artefact.parent))
    return target
