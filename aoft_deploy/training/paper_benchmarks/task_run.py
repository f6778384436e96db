"""One task of a benchmark by its recipe: choose on validation images, train on all, test once."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from accelerate.state import PartialState

from aoft_deploy.data.splits import Splits
from aoft_deploy.errors import CheckpointError, DivergedError, OutputError
from aoft_deploy.files import file_digest, write_json
from aoft_deploy.training.batches import fingerprint
from aoft_deploy.training.paper_benchmarks.fgvc import load_fgvc
from aoft_deploy.training.paper_benchmarks.recipes import Recipe
from aoft_deploy.training.paper_benchmarks.tasks import VTAB, deviations
from aoft_deploy.training.paper_benchmarks.vtab import load_vtab
from aoft_deploy.training.run import Result, check_splits, train
from aoft_deploy.training.run_folder import check_same

__all__ = ["RECORD", "Outcome", "load_splits", "run_recipe"]

RECORD = "result.json"
"""File of a finished run: what decided its numbers, and its outcome."""


@dataclass(frozen=True)
class Outcome:
    """What a task's run gave.

    Attributes:
        task: Benchmark and task, such as ``vtab/cifar``.
        method: Name of the method.
        backbone: timm name.
        seed: Seed of the run.
        lr: The chosen peak learning rate.
        epoch: The chosen epoch, from 1.
        val_accuracy: Share of right answers on the validation images when these were chosen.
        test_accuracy: The same on the test images, after training on all others.
        update_parameters: Trained numbers of the updates.
        head_parameters: Trained numbers of the classifier.
        deviations: How the images differ from the benchmark's, a phrase each.
        seconds: Time of all training and the test.
    """

    task: str
    method: str
    backbone: str
    seed: int
    lr: float
    epoch: int
    val_accuracy: float
    test_accuracy: float
    update_parameters: int
    head_parameters: int
    deviations: tuple[str, ...]
    seconds: float


def load_splits(recipe: Recipe, root: Path, *, strict: bool = True) -> Splits:
    """The images of a recipe's task.

    Args:
        recipe: Says the task, and the seed where a split has to be made.
        root: Folder of the benchmark.
        strict: Refuse other sizes than the benchmark's.

    Raises:
        DataError: As for ``load_vtab`` and ``load_fgvc``.
    """
    if recipe.benchmark is VTAB:
        return load_vtab(root, recipe.task.name, strict=strict)
    return load_fgvc(root, recipe.task.name, seed=recipe.settings.seed, strict=strict)


def run_recipe(
    recipe: Recipe, splits: Splits, out: Path, *, resume: bool = False, **options: Any
) -> Outcome:
    """Choose learning rate and epoch on the validation images, then train on all, and test once.

    The final run does the chosen number of epochs with the learning rates that these had when they
    were chosen. Of equal accuracies the lower loss is chosen; a rate that diverges is passed over.

    Args:
        recipe: The task and its hyper-parameters.
        splits: Its images.
        out: Folder for the final run's ``model.ckpt`` and ``metrics.jsonl``, for ``result.json``,
            and in ``search`` for the runs to choose from.
        resume: Go on with the runs in ``out``, if there are any; a finished one is not repeated.
        **options: ``workers``, ``progress``, ``tensorboard`` and ``trust_images`` of ``train``.

    Raises:
        OutputError: ``out`` cannot be written, or holds a run and ``resume`` is false.
        SettingError: The run in ``out`` had other settings or data.
        CheckpointError: A file of that run cannot be read.
        DivergedError: Training diverges with every rate.
        AoftError: As for ``train``.
    """
    decisive = _decisive(recipe, splits)
    record = out / RECORD
    if record.exists():
        if not resume:
            raise OutputError(
                f"{out} holds a run already ({RECORD}): continue it with --resume, "
                "or name another folder."
            )
        return _read(record, decisive)
    check_splits(
        splits,
        trust_images=options.pop("trust_images", False),
        progress=options.get("progress", False),
    )
    options["checked"] = True
    rate, searched, seconds = _search(recipe, splits, out / "search", resume=resume, **options)
    settings = replace(recipe.at(rate), train_on="train+val", stop_after=searched.best_epoch)
    final = train(splits, out, settings, resume=resume, **options)
    outcome = Outcome(
        task=f"{recipe.benchmark.name}/{recipe.task.name}",
        method=final.method,
        backbone=settings.backbone,
        seed=settings.seed,
        lr=rate,
        epoch=searched.best_epoch,
        val_accuracy=cast(float, searched.val_accuracy),
        test_accuracy=cast(float, final.test_accuracy),
        update_parameters=final.update_parameters,
        head_parameters=final.head_parameters,
        deviations=deviations(recipe.task, splits),
        seconds=seconds + final.seconds,
    )
    processes: Any = PartialState()
    if processes.is_main_process:
        write_json(record, {"run": decisive, "outcome": asdict(outcome)})
    processes.wait_for_everyone()
    return outcome


def _decisive(recipe: Recipe, splits: Splits) -> dict[str, Any]:
    """Everything that decides a run's numbers."""
    weights = recipe.settings.backbone_weights
    decisive = {
        **recipe.settings.to_dict(),
        "task": f"{recipe.benchmark.name}/{recipe.task.name}",
        "lr": list(recipe.rates),
        "head_lr": recipe.settings.head_lr,
        "backbone_weights": file_digest(weights)[:16] if weights and weights.is_file() else None,
    }
    for part in ("train", "val", "test"):
        decisive[f"{part}_images"] = fingerprint(getattr(splits, part))[:16]
    return decisive


def _read(record: Path, decisive: Mapping[str, Any]) -> Outcome:
    """A finished run's outcome."""
    try:
        found = json.loads(record.read_text("utf-8"))
        before, values = found["run"], found["outcome"]
        outcome = Outcome(**{**values, "deviations": tuple(values["deviations"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{record} cannot be read ({error}): start again in another folder."
        ) from error
    check_same(record.parent, before, json.loads(json.dumps(decisive)))
    return outcome


def _search(
    recipe: Recipe, splits: Splits, out: Path, **options: Any
) -> tuple[float, Result, float]:
    """The best rate, its run, and the seconds of all runs; the test images are not touched."""
    found: list[tuple[float, Result]] = []
    seconds = 0.0
    failures: list[DivergedError] = []
    for rate in recipe.rates:
        if options.get("progress") and PartialState().is_main_process:
            print(f"{recipe.task.name}, learning rate {rate:g}", file=sys.stderr)
        settings = replace(recipe.at(rate), train_on="train")
        try:
            result = train(replace(splits, test=None), out / f"lr-{rate:g}", settings, **options)
        except DivergedError as error:
            failures.append(error)
            continue
        found.append((rate, result))
        seconds += result.seconds
    if not found:
        raise failures[-1]
    best = max(found, key=lambda pair: _merit(pair[1]))
    return *best, seconds


def _merit(result: Result) -> tuple[float, float]:
    """Grows with validation accuracy, then with a falling loss."""
    return cast(float, result.val_accuracy), -cast(float, result.val_loss)
