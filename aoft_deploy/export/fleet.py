"""Export checkpoints of one backbone as a fleet: one verified graph for many tasks.

The inputs of the graph are ``pixel_values`` and ``task``, the index of each image's task. Every
task is verified: all tasks run on the same images, in shuffled batches of mixed tasks, and each
answer is compared with the task's unmerged model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import Engine, FleetTables
from aoft_deploy.artefacts.exporter import Exporter, FleetSupport
from aoft_deploy.artefacts.spec import BuildOptions, ExportSpec
from aoft_deploy.artefacts.verification import Bar, Comparison, Report
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.classes import Classes, check_classes
from aoft_deploy.data.normalisation import normalised
from aoft_deploy.errors import CheckpointError, optional_imports
from aoft_deploy.export.fleet_form import fleet_exporter, fleet_model
from aoft_deploy.export.merged import describe_model
from aoft_deploy.export.options import VerifyOptions
from aoft_deploy.export.output_paths import artefact_path
from aoft_deploy.export.pipeline import Request, export_verified
from aoft_deploy.export.publishing import Exported
from aoft_deploy.export.sources import named_tasks, source_of
from aoft_deploy.export.verifying import batch_pieces, logits, open_draft
from aoft_deploy.files import file_digest

if TYPE_CHECKING:
    from aoft_deploy.checkpoints.checkpoint import Checkpoint
    from aoft_deploy.tuning.multitask import FleetModel
    from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = ["export_fleet"]


@optional_imports()
def export_fleet(
    checkpoints: Sequence[str | Path] | Mapping[str, str | Path | TunedModel],
    output: str | Path | None = None,
    *,
    to: str = "onnx",
    precision: str = "fp32",
    form: str = "auto",
    backbone: BackboneSource = BackboneSource(),
    verify: VerifyOptions = VerifyOptions(),
    build: BuildOptions = BuildOptions(),
    overwrite: bool = False,
    command: Sequence[str] = (),
) -> Exported:
    """Export many tasks of one backbone as one verified graph.

    Args:
        checkpoints: One ``model.ckpt`` or run's folder for each task, or checkpoints and models in
            memory by the names of their tasks. All have the same backbone, method, settings and
            preprocessing. The numbers of classes and the activations may differ.
        output: Path of the artefact; None means ``fleet.onnx`` or, below fp32, ``fleet-int8.onnx``
            in the current folder.
        to: Name of an exporter that supports fleets.
        precision: Precision of the shared backbone. The tasks' parameters stay float32.
        form: ``mixed``: a batch may contain any tasks, and each sample's update is computed at
            runtime. ``folded``: the runtime gets one task at a time, and the graph folds it into
            the weights; every method and layer supports this form. ``auto``: mixed if it is
            possible and adds little cost, or if the exporter supports no other form.
        backbone: The backbone's weights, if they are not timm's. The backbone's name is ignored.
        verify: Images for verification, used for every task, and for calibration.
        build: Options of ONNX graphs and TensorRT engines.
        overwrite: Replace an existing artefact at ``output``.
        command: The command line, for the manifest.

    Returns:
        The paths of artefact and manifest, and the verification results over all tasks.

    Raises:
        AoftError: The input is invalid, the tasks cannot share a graph, or the answers differ. No
            file is left.
    """
    given = named_tasks(checkpoints)
    exporter, support = fleet_exporter(to, form, precision)
    with ExitStack() as stack:
        sources = {name: stack.enter_context(source_of(task)) for name, task in given.items()}
        paths = {name: source.path for name, source in sources.items()}
        request = Request(
            exporter,
            artefact_path(Path("fleet"), exporter, precision) if output is None else Path(output),
            [*paths.values()],
            backbone,
            precision=precision,
            verify=verify,
            build=build,
            overwrite=overwrite,
            command=command,
        )

        from aoft_deploy.checkpoints.checkpoint import read_checkpoint  # imports torch
        from aoft_deploy.export.flops import flops_text
        from aoft_deploy.tuning.backbones.identity import difference
        from aoft_deploy.tuning.merging import merge
        from aoft_deploy.tuning.methods import get_method

        tasks = {name: read_checkpoint(path) for name, path in paths.items()}
        first, source = next(iter(tasks.values())), next(iter(sources.values()))
        for name, task in tasks.items():
            check_classes(task.classes, str(paths[name]))
            _check_same(paths[name], task, source.path, first)
        chosen_backbone = replace(backbone, name=None)
        tuned, _ = source.open(chosen_backbone)
        preprocessing = first.preprocessing
        if form == "auto" and "folded" not in support.forms:
            form = "mixed"
        model, chosen = fleet_model(
            lambda: source.open(chosen_backbone)[0], form, precision, preprocessing
        )
        pixels = request.pixels(preprocessing)
        inputs = normalised(pixels, preprocessing.mean, preprocessing.std)
        expected, tables = _answers_and_tables(tuned, model, [*tasks.values()], inputs)
        info = ArtefactInfo.of_fleet(
            {name: task.classes for name, task in tasks.items()},
            describe_model(tuned, first),
            get_method(tuned.method).defaults,
            model.layout.order(),
        ).having(precision=precision, form=chosen, flops=flops_text(merge(tuned), preprocessing))
        forced = bool(difference(tuned.identity, first.backbone))
        subject = _Fleet(exporter, support, model, tables, info, expected, paths, forced)
        return export_verified(request, subject, pixels)


@dataclass
class _Fleet:
    """The shared model with the tables of its tasks, and the expected logits of each task."""

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
        return open_draft(self.exporter, draft, self.info.precision)

    def verify(
        self,
        engine: Engine,
        pixels: NDArray[np.uint8],
        spec: ExportSpec,
        bar: Bar,
        batch_sizes: Sequence[int],
    ) -> Report:
        inputs = spec.input.prepare(pixels)
        expected = [answers[: len(pixels)] for answers in self.expected]
        classes = [*self.info.tasks.values()]
        batches = spec.build.batch_range
        return _verified(engine, inputs, expected, classes, bar, batches, batch_sizes)

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


def _check_same(path: Path, task: Checkpoint, first_path: Path, first: Checkpoint) -> None:
    """Refuse a task that differs in more than its parameters and classes."""
    from aoft_deploy.tuning.backbones.identity import difference
    from aoft_deploy.tuning.methods import get_method

    for name in ("backbone", "method", "settings", "preprocessing"):
        expected, value = getattr(first, name), getattr(task, name)
        if name == "backbone":
            expected, value = "", difference(task.backbone, first.backbone)
        elif name == "settings":  # checkpoints of older versions lack the newer settings
            defaults = get_method(first.method).defaults
            expected, value = {**defaults, **expected}, {**defaults, **value}
        if expected != value:
            raise CheckpointError(
                f"{path} and {first_path} differ in their {name}, so they cannot be one fleet: "
                f"export each by itself, or fleets with the same {name}."
            )


def _answers_and_tables(
    tuned: TunedModel,
    model: FleetModel,
    tasks: Sequence[Checkpoint],
    inputs: NDArray[np.float32],
) -> tuple[list[NDArray[np.float32]], FleetTables]:
    """The logits of each task's unmerged model, and the parameters of all tasks."""
    import torch

    from aoft_deploy.tuning.task_layout import classifier_rows

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
    classes: Sequence[Classes],
    bar: Bar,
    batches: tuple[int, int, int],
    batch_sizes: Sequence[int],
) -> Report:
    """Compare every task on every image, in mixed batches, with the expected logits."""
    comparison = Comparison(max(float(np.abs(answers).max()) for answers in expected), bar)
    for size in batch_sizes:
        is_largest = size == max(batch_sizes)  # smaller batches repeat some of the pairs
        count = len(inputs) if is_largest else 1
        for pairs in _mixed_batches(len(expected), len(inputs), count, size):
            tasks, images = np.array(pairs).T
            pieces = batch_pieces(len(pairs), batches)
            answers = np.concatenate(
                [engine.run(inputs[images[i]], tasks[i])[:count] for i, count in pieces]
            )
            for answer, (task, image) in zip(answers, pairs, strict=True):
                wanted = expected[task][image][None]
                found, padding = answer[None, : wanted.shape[1]], answer[wanted.shape[1] :]
                if not np.isneginf(padding).all():
                    found = answer[None]  # fails the comparison by its shape
                comparison.add(
                    found, wanted, size, classes[task], f"the fleet's task {task}", is_largest
                )
    return comparison.report(len(inputs), batch_sizes)


def _mixed_batches(tasks: int, images: int, count: int, size: int) -> list[list[tuple[int, int]]]:
    """Batches of (task, image) pairs in random order, ``count`` images of each task."""
    pairs = [(task, (task + i) % images) for task in range(tasks) for i in range(count)]
    order = np.random.default_rng(size).permutation(len(pairs))
    shuffled = [pairs[i] for i in order]
    return [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
