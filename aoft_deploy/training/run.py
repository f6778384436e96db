"""A training run: check the images, train the epochs, choose the best one and test it.

Random numbers are functions of the seed and the position in the run; the order of the images,
their augmentation and stochastic depth do not depend on earlier draws. A run is therefore exactly
repeatable on the same machine, and a run that was killed and resumed gives the same result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.accelerator import Accelerator

from aoft_deploy.data.splits import Splits
from aoft_deploy.errors import SettingError
from aoft_deploy.processors import processors
from aoft_deploy.texts import one_line
from aoft_deploy.training.augmentation import preserved_randomness
from aoft_deploy.training.environment import deterministic, tensorboard_writer
from aoft_deploy.training.image_check import find_unreadable, leave_out
from aoft_deploy.training.loop import TrainingLoop
from aoft_deploy.training.model import create_model, model_preprocessing
from aoft_deploy.training.overview import overview
from aoft_deploy.training.precision import precision_on
from aoft_deploy.training.reporting import Reporter
from aoft_deploy.training.run_folder import RunFolder
from aoft_deploy.training.settings import RunOptions, TrainingSettings
from aoft_deploy.tuning.training_forward import check_checkpointing

__all__ = ["Result", "train"]


@dataclass(frozen=True)
class Result:
    """Result of a finished run.

    Attributes:
        method: Name of the method.
        update_parameters: Number of trained parameters of the updates.
        head_parameters: Number of trained parameters of the classifier.
        epochs: Number of trained epochs.
        best_epoch: The chosen epoch, from 1.
        val_loss: Its mean loss on the validation images; None if they were trained on.
        val_accuracy: Its accuracy on the validation images; None if they were trained on.
        test_accuracy: Its accuracy on the test images; None if there are none.
        checkpoint: Path of the checkpoint.
        checkpoint_bytes: Size of the checkpoint.
        seconds: Time of all epochs and the test, also those before a resume.
        left_out: Number of images that were left out because they cannot be read.
    """

    method: str
    update_parameters: int
    head_parameters: int
    epochs: int
    best_epoch: int
    val_loss: float | None
    val_accuracy: float | None
    test_accuracy: float | None
    checkpoint: Path
    checkpoint_bytes: int
    seconds: float
    left_out: int


def train(
    splits: Splits,
    out: Path,
    settings: TrainingSettings | None = None,
    options: RunOptions | None = None,
    *,
    checked: bool = False,
) -> Result:
    """Fine-tune a backbone, choose the best epoch on the validation images, and test it once.

    The epoch with the highest validation accuracy is kept; of equal ones, that with the lower loss.
    Under ``accelerate launch``, all processes share the images of each step.

    Args:
        splits: The images.
        out: Folder for ``model.ckpt``, ``metrics.jsonl`` and ``resume.safetensors``.
        settings: The hyper-parameters; None for the defaults.
        options: How to execute the run; None for the defaults.
        checked: ``find_unreadable`` has checked the images already.

    Raises:
        UnknownNameError: Unknown backbone, method or method setting.
        BackboneError: The backbone's weights are missing or do not fit.
        SettingError: A setting is outside its range, ``out`` holds a run with other settings or
            data, or the GPU has too little memory.
        DivergedError: A loss or gradient is not finite.
        DataError: An image cannot be used.
        OutputError: ``out`` cannot be written, or holds a run and ``options`` neither resumes nor
            overwrites it.
        MissingExtraError: TensorBoard is requested but not installed.
    """
    settings, options = settings or TrainingSettings(), options or RunOptions()
    accelerator: Any = Accelerator(mixed_precision="no")  # its autocast is fixed for the process
    reporter = Reporter(options.progress and accelerator.is_main_process)
    workers = options.workers
    if workers is None:
        workers = min(8, processors()) if accelerator.device.type == "cuda" else 0
    folder = RunFolder(out)
    state = folder.open(resume=options.resume, overwrite=options.overwrite)
    with preserved_randomness(accelerator.device), deterministic(accelerator.device), _memory():
        tuned = create_model(settings, len(splits.classes))
        if options.checkpointing:
            check_checkpointing(tuned.backbone)
        tuned.checkpointing = options.checkpointing
        model_preprocessing(tuned, settings)  # refuses wrong settings before images are read
        precision_on(accelerator.device, settings.precision)
        if state.lines or checked:
            left_out = folder.left_out()
        else:
            left_out = find_unreadable(splits, options, reporter)
        splits = leave_out(splits, left_out)
        run = TrainingLoop(accelerator, tuned, splits, folder, settings, workers, reporter)
        accelerator.wait_for_everyone()  # no process writes before all have read the folder
        run.restore(state)
        wants_log = options.tensorboard and run.writes
        with tensorboard_writer(out, len(state.lines), wants_log) as log:
            if run.writes and not state.lines:
                folder.prepare(left_out)
            complete = f"The run in {out} is already complete."
            reporter.say(*([complete] if state.result else overview(run, state, len(left_out))))
            for epoch in range(len(state.lines), settings.epochs_done):
                log(run.do_epoch(state, epoch))
        if state.result is None:
            run.finish(state)
        return Result(checkpoint=folder.checkpoint, left_out=len(left_out), **state.result or {})


@contextmanager
def _memory() -> Iterator[None]:
    """Report a GPU without enough memory as wrong settings."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SettingError(
            "The GPU has too little memory: compute each step in parts with `accumulate`, such as "
            f"`accumulate=4`, or choose a smaller `batch_size` ({one_line(error, 100)})."
        ) from error
