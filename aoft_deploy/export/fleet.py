"""From checkpoints of one backbone to one verified graph that answers all their tasks.

The graph takes ``pixel_values`` and ``task``, an index for each image. Before it appears, every
task answers the same images through it, in shuffled batches of mixed tasks, and each answer is
compared with that task's own unmerged model.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from aoft_deploy.artefacts.prediction import check_classes
from aoft_deploy.artefacts.protocols import Exporter, FleetExporter, FolderExporter
from aoft_deploy.artefacts.registry import exporter_names, get_exporter
from aoft_deploy.artefacts.spec import Recipe
from aoft_deploy.artefacts.verification import BATCH_SIZES, Bar, Comparison, Report
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import Checkpoint, read_checkpoint
from aoft_deploy.checkpoints.opening import open_checkpoint
from aoft_deploy.data.images import read_image
from aoft_deploy.data.listing import image_files
from aoft_deploy.errors import (
    AttachError,
    CheckpointError,
    OutputError,
    SettingError,
    UnknownNameError,
)
from aoft_deploy.export.calibration import calibration_files, calibration_pixels
from aoft_deploy.export.merged import (
    MIN_AGREEMENT,
    Exported,
    arithmetic_of,
    artefact_size,
    bar_for,
    built_for,
    check_output,
    check_output_folder,
    device_of,
    flops,
    judges,
    learnt_from,
    left_in_float,
    logits,
    manifest_path,
    normalised,
    on_device,
    provenance,
    publish,
    verifiable,
    verification_pixels,
    versions,
    within,
)
from aoft_deploy.files import file_digest, json_text, writable_folder
from aoft_deploy.tuning.backbones.identity import difference
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.methods import get_method
from aoft_deploy.tuning.multitask import FleetModel, FoldedModel, MixedModel
from aoft_deploy.tuning.task_layout import classifier_rows
from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = ["export_fleet", "task_names"]

FORMAT = "aoft-deploy-fleet/1"

FORMS = ("auto", "mixed", "folded")

Pairs = list[tuple[int, int]]
"""Task and image of each answer."""


def task_names(checkpoints: Sequence[Path]) -> list[str]:
    """Names of tasks: that of the file, or of its folder where the file is ``model.ckpt``.

    Raises:
        SettingError: Two tasks have the same name.
    """
    names = [p.resolve().parent.name if p.name == "model.ckpt" else p.stem for p in checkpoints]
    for name in names:
        if names.count(name) > 1:
            raise SettingError(
                f"Two tasks are called {name!r}: rename one's file, or its folder if the file is "
                "model.ckpt."
            )
    return names


def export_fleet(
    checkpoints: Sequence[Path],
    output: Path,
    *,
    to: str = "onnx",
    weights: Path | None = None,
    force: bool = False,
    images: Sequence[Path] = (),
    precision: str = "fp32",
    calibrate: Sequence[Path] = (),
    min_agreement: float = MIN_AGREEMENT,
    form: str = "auto",
    batches: tuple[int, int, int] | None = None,
    compute_capability: str | None = None,
    opset: int | None = None,
    command: Sequence[str] = (),
) -> Exported:
    """Export many tasks of one backbone as one graph, verified.

    Args:
        checkpoints: One ``model.ckpt`` for each task, all of the same backbone, method, settings
            and preprocessing; numbers of classes may differ.
        output: The artefact.
        to: Name of an exporter that writes fleets.
        weights: File with the backbone's weights; None takes timm's own.
        force: Accept other backbone weights than those trained on; the manifest says so.
        images: Real images, or folders of them, that every task is verified with beside the
            built-in ones; below fp32 alone.
        precision: Of the shared backbone; the tasks' numbers stay float32.
        calibrate: Real images, or folders of them, to learn ranges of activations from, where the
            precision needs them; the tasks take turns on them.
        min_agreement: Below fp32, least share of answers with the unmerged models' top class.
        form: ``mixed``: a batch may hold any tasks, each sample's update is added as it goes.
            ``folded``: the runtime is given one task at a time, which the graph folds into its
            weights; every method and layer can. ``auto`` takes mixed where it can and costs little,
            or where the exporter writes nothing else.
        batches: Smallest, usual and largest batch, where the artefact is built for a range.
        compute_capability: Of the GPU to build for, such as ``8.9``; None is this machine's.
        opset: Of ONNX, where the exporter writes several; None is its own choice.
        command: The command line, for the manifest.

    Returns:
        Where the artefact and its manifest stand, and the figures over all tasks.

    Raises:
        AoftError: Anything wrong with the input, tasks that cannot share a graph, or answers that
            differ; no file is left then.
    """
    names = task_names(checkpoints)
    exporter = _fleet_exporter(to, form)
    bar = bar_for(exporter, to, precision, min_agreement, images)
    built = built_for(exporter, to, batches, compute_capability, opset)
    learnt = calibration_files(exporter, to, precision, calibrate, images)
    if isinstance(exporter, FolderExporter):
        check_output_folder(output)
    else:
        sources = [*checkpoints, *([weights] if weights else []), *images, *calibrate]
        check_output(output, exporter.SUFFIX, sources)
    pictures = [read_image(path) for path in image_files(images)]
    tasks = [read_checkpoint(path) for path in checkpoints]
    for path, task in zip(checkpoints, tasks, strict=True):
        check_classes(task.classes, str(path))
        _check_same(path, task, checkpoints[0], tasks[0])
    source = BackboneSource(weights=weights, force=force)
    tuned, _ = open_checkpoint(checkpoints[0], source)
    spare = functools.partial(open_checkpoint, checkpoints[0], source)
    preprocessing = tasks[0].preprocessing
    if form == "auto" and "folded" not in exporter.FORMS:
        form = "mixed"
    model, chosen = _model(lambda: spare()[0], form, precision, preprocessing.size)
    pixels = verification_pixels(preprocessing, pictures, precision)
    inputs = normalised(pixels, preprocessing)
    expected, tables = _answers_and_tables(tuned, model, tasks, inputs)
    metadata = {
        **_metadata(tuned, names, tasks, model),
        "precision": precision,
        "form": chosen,
        **flops(merge(tuned), preprocessing.size),
    }
    mean, std = preprocessing.mean, preprocessing.std
    ranges = calibration_pixels(learnt, preprocessing)
    built["min_agreement"] = min_agreement if learnt else 0.0
    built["judged"] = None if precision == "fp32" else pixels
    recipe = Recipe(preprocessing.size, False, mean, std, metadata, precision, ranges, **built)
    with writable_folder(output.parent) as folder:
        draft = folder / output.name
        try:
            exporter.export_fleet(model, draft, recipe, tables)
        except (OSError, RuntimeError) as error:
            if isinstance(error, OutputError):
                raise
            reason = " ".join(str(error).split())[:200]
            raise OutputError(f"The fleet could not be written ({reason}).") from error
        engine = verifiable(exporter, draft)
        left, arithmetic = left_in_float(engine), arithmetic_of(exporter, draft, precision)
        for judge, judged in judges(exporter, draft, engine, precision, pixels):
            few = len(judged)
            answers = [own[:few] for own in expected]
            report = _verified(judge, inputs[:few], answers, bar, recipe.batches)
        manifest = {
            **provenance(draft, to, command),
            **{key: json.loads(metadata[key]) for key in ("tasks", "backbone", "preprocessing")},
            "method": tuned.method,
            "settings": tuned.settings,
            "precision": precision,
            "form": chosen,
            "forced": bool(difference(tuned.identity, tasks[0].backbone)),
            "checkpoints": [
                {"name": name, "sha256": file_digest(path)}
                for name, path in zip(names, checkpoints, strict=True)
            ],
            **learnt_from(learnt, left),
            "verification": {
                **report.to_dict(),
                "real_images": len(pictures),
                "arithmetic": arithmetic,
                **on_device(exporter, draft, precision),
            },
            "versions": versions(),
        }
        size = artefact_size(draft)
        publish(draft, output, manifest)
    device = device_of(exporter, output, precision)
    return Exported(output, manifest_path(output), report, size, device, arithmetic, left)


def _fleet_exporter(to: str, form: str) -> FleetExporter:
    """An exporter of fleets of a form.

    Raises:
        UnknownNameError: There is no such exporter or form.
        SettingError: The exporter writes no fleets, or none of the form.
    """
    exporter: Exporter = get_exporter(to)
    if not isinstance(exporter, FleetExporter):
        fleets = [
            name for name in exporter_names() if isinstance(get_exporter(name), FleetExporter)
        ]
        raise SettingError(f"--to {to} writes no fleets: choose {' or '.join(fleets)}.")
    if form in FORMS and form not in ("auto", *exporter.FORMS):
        raise SettingError(
            f"--to {to} would answer all images of a batch by one task in the form {form}: leave "
            "--form out."
        )
    return exporter


def _model(
    make: Callable[[], TunedModel], form: str, precision: str, size: int
) -> tuple[FleetModel, str]:
    """The model to export, and its form.

    Raises:
        UnknownNameError: There is no such form.
        SettingError: Integers are to be folded into.
        AttachError: The form asked for is not possible.
    """
    if form not in FORMS:
        raise UnknownNameError("form of fleet", form, FORMS)
    if form == "folded" and precision != "fp32":
        raise SettingError(f"Nothing can be folded into weights of {precision}: use --form mixed.")
    tuned = make()
    if form == "folded" or (form == "auto" and precision == "fp32" and _multiplies_twice(tuned)):
        return FoldedModel(tuned), "folded"
    try:
        model = MixedModel(tuned)
        model.try_out(size)
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
    """Tasks of a fleet differ in their trained numbers and classes alone."""
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
) -> tuple[list[NDArray[np.float32]], dict[str, NDArray[Any]]]:
    """Each unmerged model's logits, and all tasks' numbers as ``MixedModel.forward`` takes them."""
    expected, rows, heads = [], [], []
    for task in tasks:
        tuned.backbone.reset_classifier(len(task.classes))  # type: ignore[operator]
        tuned.load_trained(task.tensors)
        expected.append(logits(tuned.eval(), inputs))
        rows.append(model.layout.row(task.tensors))
        heads.append(classifier_rows(tuned))
    count = np.array([len(head) for head in heads], np.int64)
    return expected, {
        "bank": torch.stack(rows).numpy(),
        "heads": torch.cat(heads).numpy(),
        "first": count.cumsum() - count,
        "count": count,
        "columns": np.arange(count.max(), dtype=np.int64),
    }


def _metadata(
    tuned: TunedModel, names: Sequence[str], tasks: Sequence[Checkpoint], model: FleetModel
) -> Mapping[str, str]:
    named = [
        {"name": name, "classes": list(task.classes)}
        for name, task in zip(names, tasks, strict=True)
    ]
    return {
        "format": FORMAT,
        "tasks": json_text(named),
        "preprocessing": json.dumps(tasks[0].preprocessing.to_dict()),
        "method": tuned.method,
        "settings": json.dumps(tuned.settings),
        "defaults": json.dumps(dict(get_method(tuned.method).defaults)),
        "backbone": json.dumps(tuned.identity.to_dict()),
        "row": json.dumps(model.layout.order()),
    }


def _verified(
    engine: Any,
    inputs: NDArray[np.float32],
    expected: Sequence[NDArray[np.float32]],
    bar: Bar,
    batches: tuple[int, int, int] = Recipe.batches,
) -> Report:
    """Every task on every image in mixed batches, compared with its unmerged model."""
    comparison = Comparison(max(float(np.abs(answers).max()) for answers in expected), bar)
    for size in BATCH_SIZES:
        for pairs in _mixed_batches(len(expected), len(inputs), size):
            tasks, images = np.array(pairs).T
            pieces = within(len(pairs), batches)
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


def _mixed_batches(tasks: int, images: int, size: int) -> list[Pairs]:
    """Batches in random order: all pairs at the largest size, one image of each task below it."""
    few = 1 if size < max(BATCH_SIZES) else images
    pairs = [(task, (task + i) % images) for task in range(tasks) for i in range(few)]
    order = np.random.default_rng(size).permutation(len(pairs))
    shuffled = [pairs[i] for i in order]
    return [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
