"""One task of a benchmark: choose on the validation images, train on all images, test once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from accelerate.state import PartialState

from aoft_deploy.data.splits import Splits
from aoft_deploy.errors import DivergedError
from aoft_deploy.files import file_digest, write_json
from aoft_deploy.training.batches import fingerprints
from aoft_deploy.training.image_check import find_unreadable, leave_out
from aoft_deploy.training.loop import merit
from aoft_deploy.training.paper_benchmarks.fgvc import load_fgvc
from aoft_deploy.training.paper_benchmarks.recipes import Recipe
from aoft_deploy.training.paper_benchmarks.tasks import VTAB, deviations
from aoft_deploy.training.paper_benchmarks.vtab import load_vtab
from aoft_deploy.training.reporting import Reporter
from aoft_deploy.training.run import Result, train
from aoft_deploy.training.run_folder import RunFolder, check_same, existing_run, unreadable
from aoft_deploy.training.settings import RunOptions

__all__ = ["RECORD", "Outcome", "load_splits", "run_recipe"]

RECORD = "result.json"
"""File of a finished run: everything that determined its results, and the outcome."""


@dataclass(frozen=True)
class Outcome:
    """Result of a run of a task.

    Attributes:
        task: Benchmark and task, such as ``vtab/cifar``.
        method: Name of the method.
        backbone: timm name.
        seed: Seed of the run.
        lr: The chosen peak learning rate.
        epoch: The chosen epoch, from 1.
        val_accuracy: Accuracy on the validation images, when rate and epoch were chosen.
        test_accuracy: Accuracy on the test images, after training on all others.
        update_parameters: Number of trained parameters of the updates.
        head_parameters: Number of trained parameters of the classifier.
        deviations: Phrases on how the images differ from the benchmark's.
        seconds: Time of all training runs and the test.
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


def load_splits(recipe: Recipe, root: Path, *, any_size: bool = False) -> Splits:
    """The images of a recipe's task.

    Args:
        recipe: Gives the task, and the seed of a split that has to be made.
        root: Folder of the benchmark.
        any_size: Accept other numbers of images than in the benchmark.

    Raises:
        DataError: As for ``load_vtab`` and ``load_fgvc``.
    """
    if recipe.benchmark is VTAB:
        return load_vtab(root, recipe.task.name, any_size=any_size)
    return load_fgvc(root, recipe.task.name, seed=recipe.settings.seed, any_size=any_size)


def run_recipe(
    recipe: Recipe, splits: Splits, out: Path, options: RunOptions | None = None
) -> Outcome:
    """Choose learning rate and epoch on the validation images, then train on all, and test once.

    The final run trains the chosen number of epochs with the same learning-rate schedule. Of equal
    accuracies, that with the lower loss is chosen; a rate that diverges is skipped.

    Args:
        recipe: The task and its hyper-parameters.
        splits: The images of the task.
        out: Folder for ``model.ckpt`` and ``metrics.jsonl`` of the final run, for ``result.json``,
            and, in ``search``, for the runs that rate and epoch are chosen from.
        options: How to execute the runs; a finished run is not repeated. None for the defaults.

    Raises:
        OutputError: ``out`` cannot be written, or holds a run and ``options`` neither resumes nor
            overwrites it.
        SettingError: The run in ``out`` has other settings or data.
        CheckpointError: A file of the run in ``out`` cannot be read.
        DivergedError: Training diverges with every rate.
        AoftError: As for ``train``.
    """
    options = options or RunOptions()
    processes: Any = PartialState()
    reporter = Reporter(options.progress and processes.is_main_process)
    folder, record = RunFolder(out), out / RECORD
    folder.open(resume=options.resume, overwrite=options.overwrite)
    if record.exists() and options.resume:
        return _read(record, _inputs(recipe, leave_out(splits, folder.left_out())))
    if record.exists() and not options.overwrite:
        raise existing_run(out, record)
    search = out / "search"
    started = options.resume and search.exists()
    faults = folder.left_out() if started else find_unreadable(splits, options, reporter)
    splits = leave_out(splits, faults)
    inputs = _inputs(recipe, splits)
    if processes.is_main_process and not started:
        record.unlink(missing_ok=True)
        shutil.rmtree(search, ignore_errors=True)
        folder.prepare(faults)
    processes.wait_for_everyone()
    options = replace(options, overwrite=False)
    rate, searched, seconds = _search(recipe, splits, search, options, reporter)
    settings = replace(recipe.at(rate), train_on="train+val", stop_after=searched.best_epoch)
    final = train(splits, out, settings, options, checked=True)
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
    if processes.is_main_process:
        write_json(record, {"run": inputs, "outcome": asdict(outcome)})
    processes.wait_for_everyone()
    return outcome


def _inputs(recipe: Recipe, splits: Splits) -> dict[str, Any]:
    """Everything that determines the results of a run, as JSON values."""
    weights = recipe.settings.backbone_weights
    return {
        **recipe.settings.to_dict(),
        "task": f"{recipe.benchmark.name}/{recipe.task.name}",
        "lr": list(recipe.rates),
        "head_lr": recipe.settings.head_lr,
        "backbone_weights": file_digest(weights)[:16] if weights and weights.is_file() else None,
        **fingerprints(splits),
    }


def _read(record: Path, inputs: Mapping[str, Any]) -> Outcome:
    """The outcome of a finished run with the same inputs."""
    try:
        found = json.loads(record.read_text("utf-8"))
        before, values = found["run"], found["outcome"]
        outcome = Outcome(**{**values, "deviations": tuple(values["deviations"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(record, error) from error
    check_same(record.parent, before, json.loads(json.dumps(inputs)))
    return outcome


def _search(
    recipe: Recipe, splits: Splits, out: Path, options: RunOptions, reporter: Reporter
) -> tuple[float, Result, float]:
    """The best rate, its result, and the seconds of all runs; the test images are not used."""
    without_test = replace(splits, test=None)
    found: list[tuple[float, Result]] = []
    seconds = 0.0
    failures: list[DivergedError] = []
    for number, rate in enumerate(recipe.rates, 1):
        reporter.say(
            f"{recipe.task.name}, learning rate {rate:g} ({number} of {len(recipe.rates)})"
        )
        settings = replace(recipe.at(rate), train_on="train")
        try:
            result = train(without_test, out / f"lr-{rate:g}", settings, options, checked=True)
        except DivergedError as error:
            failures.append(error)
            continue
        found.append((rate, result))
        seconds += result.seconds
    if not found:
        raise failures[-1]
    best = max(found, key=lambda pair: merit(vars(pair[1])))
    return *best, seconds
