"""A training run: check the images, train the epochs, choose the best one and test it.

Random numbers are functions of the seed and the position in the run; the order of the images,
their augmentation and stochastic depth do not depend on earlier draws. A run is therefore exactly
repeatable on the same machine, and a run that was killed and resumed gives the same result.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.accelerator import Accelerator
from accelerate.state import PartialState
from accelerate.utils.operations import gather_object
from tqdm import tqdm

from aoft_deploy.data.splits import Splits, find_faults, refuse_faults
from aoft_deploy.processors import processors
from aoft_deploy.training.augmentation import preserved_randomness
from aoft_deploy.training.environment import deterministic, tensorboard_writer
from aoft_deploy.training.loop import TrainingLoop
from aoft_deploy.training.settings import RunOptions, TrainingSettings

__all__ = ["Result", "check_splits", "train"]


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
        checked: ``check_splits`` has checked the images already.

    Raises:
        UnknownNameError: Unknown backbone, method or method setting.
        BackboneError: The backbone's weights are missing or do not fit.
        SettingError: A setting is outside its range, or ``out`` holds a run with other settings or
            data.
        DivergedError: A loss or gradient is not finite.
        DataError: An image cannot be used.
        OutputError: ``out`` cannot be written, or holds a run and ``options.resume`` is false.
        MissingExtraError: TensorBoard is requested but not installed.
    """
    settings, options = settings or TrainingSettings(), options or RunOptions()
    accelerator: Any = Accelerator(mixed_precision="no")  # its autocast is fixed for the process
    workers = options.workers
    if workers is None:
        workers = min(8, processors()) if accelerator.device.type == "cuda" else 0
    with preserved_randomness(accelerator.device), deterministic(accelerator.device):
        run = TrainingLoop(accelerator, splits, out, settings, workers, options.progress)
        state = run.folder.open(options.resume)
        if not checked and state.result is None:
            check_splits(splits, trust_images=options.trust_images, progress=options.progress)
        if run.shows_progress:
            print(*splits.summary(), sep="\n", file=sys.stderr)
        accelerator.wait_for_everyone()  # no process writes before all have read the folder
        run.restore(state)
        wants_log = options.tensorboard and run.writes
        with tensorboard_writer(out, len(state.lines), wants_log) as log:
            for epoch in range(len(state.lines), settings.epochs_done):
                log(run.do_epoch(state, epoch))
        if state.result is None:
            run.finish(state)
        elif run.shows_progress:
            print(f"The run in {out} is already complete.", file=sys.stderr)
        return Result(checkpoint=run.folder.checkpoint, **state.result or {})


def check_splits(splits: Splits, *, trust_images: bool = False, progress: bool = False) -> None:
    """Read every image before the first epoch, and report all that cannot be used.

    Under ``accelerate launch``, the processes share the files.

    Args:
        splits: The images; those of ``val`` and ``test`` are always decoded.
        trust_images: Read only the headers of the training images.
        progress: Show progress on stderr, and a line for each file that cannot be used.

    Raises:
        DataError: Some images cannot be used; the first five are named.
    """
    processes: Any = PartialState()
    shows_progress = progress and processes.is_main_process
    lists = [(splits.train, not trust_images), (splits.val, True)]
    if splits.test is not None:
        lists.append((splits.test, True))
    files = [(images.files(), whole) for images, whole in lists]
    index, count = processes.process_index, processes.num_processes
    own = [(paths[index::count], whole) for paths, whole in files]
    hidden = None if shows_progress else True
    total = sum(len(paths) for paths, _ in own)
    with tqdm(total=total, desc="check images", disable=hidden, leave=False) as bar:
        found = [find_faults(paths, whole=whole, tick=bar.update) for paths, whole in own]
    faults = [fault for each in found for fault in each]
    if count > 1:
        faults = gather_object(faults)
    if shows_progress and len(faults) > 1:
        print(*faults, sep="\n", file=sys.stderr)
    refuse_faults(faults, sum(len(paths) for paths, _ in files))
