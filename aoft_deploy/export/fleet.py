"""From checkpoints of one backbone to one verified graph that answers all their tasks.

The graph takes ``pixel_values`` and ``task``, an index for each image. Every task is verified: it
answers the same images in shuffled batches of mixed tasks, and each answer is compared with that
task's own unmerged model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aoft_deploy.artefacts.description import ArtefactInfo, check_classes
from aoft_deploy.artefacts.engine import Engine, FleetTables
from aoft_deploy.artefacts.exporter import Exporter, FleetSupport
from aoft_deploy.artefacts.registry import exporters, get_exporter
from aoft_deploy.artefacts.spec import BuildOptions, ExportSpec
from aoft_deploy.artefacts.verification import BATCH_SIZES, Bar, Comparison, Report
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import Checkpoint, read_checkpoint
from aoft_deploy.checkpoints.names import unique_task_names
from aoft_deploy.checkpoints.opening import open_checkpoint
from aoft_deploy.data.normalisation import normalised
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import AttachError, CheckpointError, SettingError, UnknownNameError
from aoft_deploy.export.flops import flops_text
from aoft_deploy.export.merged import describe_model
from aoft_deploy.export.options import VerifyOptions
from aoft_deploy.export.pipeline import Request, export_verified
from aoft_deploy.export.publishing import Exported
from aoft_deploy.export.verifying import batch_pieces, logits, open_draft
from aoft_deploy.files import file_digest
from aoft_deploy.tuning.backbones.identity import difference
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.methods import get_method
from aoft_deploy.tuning.multitask import FleetModel, FoldedModel, MixedModel
from aoft_deploy.tuning.task_layout import classifier_rows
from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = ["export_fleet"]

FORMS = ("auto", "mixed", "folded")


def export_fleet(
    checkpoints: Sequence[Path],
    output: Path,
    *,
    to: str = "onnx",
    precision: str = "fp32",
    form: str = "auto",
    backbone: BackboneSource = BackboneSource(),
    verify: VerifyOptions = VerifyOptions(),
    build: BuildOptions = BuildOptions(),
    command: Sequence[str] = (),
) -> Exported:
    """Export many tasks of one backbone as one graph, verified.

    Args:
        checkpoints: One ``model.ckpt`` for each task, all of the same backbone, method, settings
            and preprocessing; numbers of classes may differ.
        output: The artefact.
        to: Name of an exporter that writes fleets.
        precision: Of the shared backbone; the tasks' parameters stay float32.
        form: ``mixed``: a batch may hold any tasks, and each sample's update is added on the fly.
            ``folded``: the runtime gets one task at a time, which the graph folds into its weights;
            every method and layer can. ``auto`` takes mixed where that is possible and costs
            little, or where the exporter writes nothing else.
        backbone: The backbone's weights, where they are not timm's; its name stays.
        verify: Images that every task is verified with, and to learn ranges of activations from.
        build: Choices of ONNX graphs and TensorRT engines.
        command: The command line, for the manifest.

    Returns:
        Paths of the artefact and its manifest, and the figures over all tasks.

    Raises:
        AoftError: The input is wrong, tasks cannot share a graph, or answers differ; no file is
            left then.
    """
    names = unique_task_names(checkpoints)
    exporter, support = _fleet_exporter(to, form)
    request = Request.checked(
        exporter,
        output,
        [*checkpoints, *([backbone.weights] if backbone.weights else [])],
        precision=precision,
        verify=verify,
        build=build,
        command=command,
    )
    tasks = [read_checkpoint(path) for path in checkpoints]
    for path, task in zip(checkpoints, tasks, strict=True):
        check_classes(task.classes, str(path))
        _check_same(path, task, checkpoints[0], tasks[0])
    source = replace(backbone, name=None)
    open_first = functools.partial(open_checkpoint, checkpoints[0], source)
    tuned, _ = open_first()
    preprocessing = tasks[0].preprocessing
    if form == "auto" and "folded" not in support.forms:
        form = "mixed"
    model, chosen = _model(lambda: open_first()[0], form, precision, preprocessing)
    pixels = request.pixels(preprocessing)
    inputs = normalised(pixels, preprocessing.mean, preprocessing.std)
    expected, tables = _answers_and_tables(tuned, model, tasks, inputs)
    info = ArtefactInfo.of_fleet(
        {name: task.classes for name, task in zip(names, tasks, strict=True)},
        describe_model(tuned, tasks[0]),
        get_method(tuned.method).defaults,
        model.layout.order(),
    ).having(precision=precision, form=chosen, flops=flops_text(merge(tuned), preprocessing))
    sources = dict(zip(names, checkpoints, strict=True))
    forced = bool(difference(tuned.identity, tasks[0].backbone))
    subject = _Fleet(exporter, support, model, tables, info, expected, sources, forced)
    return export_verified(request, subject, pixels)


@dataclass
class _Fleet:
    """The tasks' shared model with their tables, and each unmerged model's logits."""

    exporter: Exporter
    support: FleetSupport
    model: FleetModel
    tables: FleetTables
    info: ArtefactInfo
    expected: Sequence[NDArray[np.float32]]
    checkpoints: Mapping[str, Path]
    forced: bool

    def write(self, draft: Path, spec: ExportSpec) -> None:
        self.support.export(self.model, draft, spec, self.tables)

    def open(self, draft: Path) -> Engine:
        return open_draft(self.exporter, draft)

    def verify(
        self, engine: Engine, pixels: NDArray[np.uint8], spec: ExportSpec, bar: Bar
    ) -> Report:
        inputs = spec.input.prepare(pixels)
        expected = [answers[: len(pixels)] for answers in self.expected]
        return _verified(engine, inputs, expected, bar, spec.build.batch_range)

    def manifest(self, spec: ExportSpec) -> dict[str, Any]:
        entries = self.info.entries()
        shared = ("tasks", "backbone", "preprocessing", "method", "settings", "precision", "form")
        return {
            **{key: entries[key] for key in shared},
            "forced": self.forced,
            "checkpoints": [
                {"name": name, "sha256": file_digest(path)}
                for name, path in self.checkpoints.items()
            ],
        }


def _fleet_exporter(to: str, form: str) -> tuple[Exporter, FleetSupport]:
    """An exporter of fleets of a form.

    Raises:
        UnknownNameError: There is no such exporter or form.
        SettingError: The exporter writes no fleets, or none of the form.
    """
    exporter = get_exporter(to)
    if form not in FORMS:
        raise UnknownNameError("form of fleet", form, FORMS)
    if exporter.fleet is None:
        able = sorted(each.name for each in exporters() if each.fleet is not None)
        raise SettingError(f"{to} writes no fleets: choose {' or '.join(able)} with `to`.")
    if form not in ("auto", *exporter.fleet.forms):
        raise SettingError(
            f"{to} would answer all images of a batch by one task in the form {form}: leave `form` "
            "out."
        )
    return exporter, exporter.fleet


def _model(
    make: Callable[[], TunedModel], form: str, precision: str, preprocessing: Preprocessing
) -> tuple[FleetModel, str]:
    """The model to export, and its form.

    Raises:
        SettingError: The folded form is asked for below fp32.
        AttachError: The form asked for is not possible.
    """
    if form == "folded" and precision != "fp32":
        raise SettingError(
            f'Updates cannot be folded into weights of {precision}: use `form="mixed"`.'
        )
    tuned = make()
    if form == "folded" or (form == "auto" and precision == "fp32" and _multiplies_twice(tuned)):
        return FoldedModel(tuned), "folded"
    try:
        model = MixedModel(tuned)
        model.try_out(preprocessing.height, preprocessing.width)
    except AttachError:
        if form == "mixed" or precision != "fp32":
            raise
        return FoldedModel(make()), "folded"
    return model, "mixed"


def _multiplies_twice(tuned: TunedModel) -> bool:
    """Whether a mixed batch takes a second product with a weight, as RLRR's gains do."""
    deltas = (update.delta() for update in tuned.updates.values())
    return any(getattr(delta, "gain_out", None) is not None for delta in deltas)


def _check_same(path: Path, task: Checkpoint, first_path: Path, first: Checkpoint) -> None:
    """Refuse a task that differs in more than its parameters and classes."""
    for what in ("backbone", "method", "settings", "preprocessing"):
        ours, theirs = getattr(first, what), getattr(task, what)
        if what == "backbone":
            ours, theirs = "", difference(task.backbone, first.backbone)
        elif what == "settings":  # an older checkpoint lacks those that came later
            defaults = get_method(first.method).defaults
            ours, theirs = {**defaults, **ours}, {**defaults, **theirs}
        if ours != theirs:
            raise CheckpointError(
                f"{path} has another {what} than {first_path}, so they cannot be one fleet: "
                f"export each by itself, or fleets of equal {what}."
            )


def _answers_and_tables(
    tuned: TunedModel,
    model: FleetModel,
    tasks: Sequence[Checkpoint],
    inputs: NDArray[np.float32],
) -> tuple[list[NDArray[np.float32]], FleetTables]:
    """Each unmerged model's logits, and the parameters of all tasks."""
    expected, rows, heads = [], [], []
    for task in tasks:
        tuned.backbone.reset_classifier(len(task.classes))  # type: ignore[operator]
        tuned.load_trained(task.tensors)
        expected.append(logits(tuned.eval(), inputs))
        rows.append(model.layout.row(task.tensors))
        heads.append(classifier_rows(tuned))
    count = np.array([len(head) for head in heads], np.int64)
    return expected, FleetTables(
        bank=torch.stack(rows).numpy(),
        heads=torch.cat(heads).numpy(),
        first=count.cumsum() - count,
        count=count,
        columns=np.arange(count.max(), dtype=np.int64),
    )


def _verified(
    engine: Engine,
    inputs: NDArray[np.float32],
    expected: Sequence[NDArray[np.float32]],
    bar: Bar,
    batches: tuple[int, int, int],
) -> Report:
    """Compare every task on every image, in mixed batches, with its unmerged model's logits."""
    comparison = Comparison(max(float(np.abs(answers).max()) for answers in expected), bar)
    for size in BATCH_SIZES:
        for pairs in _mixed_batches(len(expected), len(inputs), size):
            tasks, images = np.array(pairs).T
            pieces = batch_pieces(len(pairs), batches)
            answers = np.concatenate(
                [engine.run(inputs[images[i]], tasks[i])[:count] for i, count in pieces]
            )
            for answer, (task, image) in zip(answers, pairs, strict=True):
                own = expected[task][image][None]
                given, beyond = answer[None, : own.shape[1]], answer[own.shape[1] :]
                if not np.isneginf(beyond).all():
                    given = answer[None]  # classes that the task does not have
                comparison.add(given, own, size, f"the fleet's task {task}")
    return comparison.report(len(inputs), BATCH_SIZES)


def _mixed_batches(tasks: int, images: int, size: int) -> list[list[tuple[int, int]]]:
    """Batches of pairs of task and image, in random order.

    All pairs at the largest batch size, one image of each task at the others.
    """
    few = 1 if size < max(BATCH_SIZES) else images
    pairs = [(task, (task + i) % images) for task in range(tasks) for i in range(few)]
    order = np.random.default_rng(size).permutation(len(pairs))
    shuffled = [pairs[i] for i in order]
    return [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
