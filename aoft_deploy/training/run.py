"""Fine-tuning: the loop over epochs, the choice of one, and the test of it.

Nothing random depends on what happened before: the order of the images, their augmentation and
stochastic depth are functions of the seed and of the place in the run. So a run repeats exactly on
the same machine, and a run that was killed and resumed ends like one that was not.
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
from aoft_deploy.errors import SettingError
from aoft_deploy.processors import processors
from aoft_deploy.training.augmentation import preserved_randomness
from aoft_deploy.training.environment import deterministic, tensorboard_writer
from aoft_deploy.training.loop import TrainingLoop
from aoft_deploy.training.settings import TrainingSettings

__all__ = ["Result", "check_splits", "train"]


@dataclass(frozen=True)
class Result:
    """What a finished run gave.

    Attributes:
        method: Name of the method.
        update_parameters: Trained numbers of the updates.
        head_parameters: Trained numbers of the classifier.
        epochs: Epochs that were trained.
        best_epoch: The chosen one, from 1.
        val_loss: Its mean loss on the validation images; None if trained on them.
        val_accuracy: Its share of right answers on these; None too.
        test_accuracy: The same on the test images; None where there are none.
        checkpoint: Where the checkpoint is.
        checkpoint_bytes: Its size.
        seconds: Time in the loop, resumed parts included.
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
    *,
    resume: bool = False,
    workers: int | None = None,
    progress: bool = False,
    tensorboard: bool = False,
    trust_images: bool = False,
    checked: bool = False,
) -> Result:
    """Fine-tune a backbone, choose the epoch by validation, and test it once.

    The epoch with the highest validation accuracy is kept, of equal ones that with the lower loss.
    Under ``accelerate launch``, all processes share each step's images.

    Args:
        splits: The images.
        out: Folder for ``model.ckpt``, ``metrics.jsonl`` and ``resume.safetensors``.
        settings: The hyper-parameters; None takes the defaults.
        resume: Go on with the run in ``out``, if there is one; it ends as if never stopped.
        workers: Processes that prepare images; None takes none on a CPU and up to 8 for a GPU.
            The numbers do not depend on it.
        progress: Show progress on stderr.
        tensorboard: Write the metrics for TensorBoard into ``out`` too.
        trust_images: Read the headers alone of the training images before the first epoch, and
            not their pixels too.
        checked: ``check_splits`` has looked at the images already.

    Raises:
        UnknownNameError: Unknown backbone, method or method setting.
        BackboneError: The backbone's weights are missing or do not fit.
        SettingError: A setting outside its range, or a run in ``out`` that had other settings or
            data.
        DivergedError: A loss or gradient is not finite.
        DataError: An image cannot be used.
        OutputError: ``out`` cannot be written, or holds a run and ``resume`` is false.
        MissingExtraError: TensorBoard is wanted and not installed.
    """
    settings = settings or TrainingSettings()
    accelerator: Any = Accelerator(mixed_precision="no")  # whose autocast is fixed per process
    if workers is not None and workers < 0:
        raise SettingError(f"workers is {workers}: use a whole number from 0.")
    if workers is None:
        workers = min(8, processors()) if accelerator.device.type == "cuda" else 0
    with preserved_randomness(accelerator.device), deterministic(accelerator.device):
        run = TrainingLoop(accelerator, splits, out, settings, workers, progress)
        state = run.folder.open(resume)
        if not checked and state.result is None:
            check_splits(splits, trust_images=trust_images, progress=progress)
        if run.tells:
            print(*splits.summary(), sep="\n", file=sys.stderr)
        accelerator.wait_for_everyone()  # nobody writes before all have looked
        run.restore(state)
        with tensorboard_writer(out, len(state.lines), tensorboard and run.writes) as log:
            for epoch in range(len(state.lines), settings.epochs_done):
                log(run.do_epoch(state, epoch))
        if state.result is None:
            run.finish(state)
        elif run.tells:
            print(f"The run in {out} is complete already.", file=sys.stderr)
        return Result(checkpoint=run.folder.checkpoint, **state.result or {})


def check_splits(splits: Splits, *, trust_images: bool = False, progress: bool = False) -> None:
    """Look at every image before the first epoch, and name all that cannot be used.

    Under ``accelerate launch``, the processes share the files.

    Args:
        splits: The images; those of ``val`` and ``test`` are decoded whole.
        trust_images: Read the headers alone of the training images.
        progress: Show progress on stderr, and a line for each file that cannot be used.

    Raises:
        DataError: Some cannot be used; the first five are named.
    """
    processes: Any = PartialState()
    tells = progress and processes.is_main_process
    lists = [(splits.train, not trust_images), (splits.val, True)]
    if splits.test is not None:
        lists.append((splits.test, True))
    files = [(images.files(), whole) for images, whole in lists]
    shares = [(paths[processes.process_index :: processes.num_processes], w) for paths, w in files]
    hidden = None if tells else True
    total = sum(len(paths) for paths, _ in shares)
    with tqdm(total=total, desc="check images", disable=hidden, leave=False) as bar:
        found = [find_faults(paths, whole=whole, tick=bar.update) for paths, whole in shares]
    faults = [fault for each in found for fault in each]
    if processes.num_processes > 1:
        faults = gather_object(faults)
    if tells and len(faults) > 1:
        print(*faults, sep="\n", file=sys.stderr)
    refuse_faults(faults, sum(len(paths) for paths, _ in files))
