"""Fine-tuning: the loop over epochs, the choice of one, and the test of it.

Nothing random depends on what happened before: the order of the images, their augmentation and
stochastic depth are functions of the seed and of the place in the run. So a run repeats exactly on
the same machine, and a run that was killed and resumed ends like one that was not.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.accelerator import Accelerator
from accelerate.state import PartialState
from accelerate.utils.operations import gather_object
from tqdm import tqdm

from aoft_deploy.checkpoints import opening
from aoft_deploy.data.folder import ImageList, Splits, find_faults, image_paths, refuse_faults
from aoft_deploy.errors import MissingExtraError, SettingError
from aoft_deploy.processors import processors
from aoft_deploy.training.analysis.quantities import orthogonality
from aoft_deploy.training.augmentation import preserved_randomness
from aoft_deploy.training.batches import (
    Loader,
    Part,
    PixelBatches,
    evaluation_parts,
    fingerprint,
    training_parts,
)
from aoft_deploy.training.learner import Learner, create_model, diverged, model_preprocessing
from aoft_deploy.training.optimisation import moments, restore_moments
from aoft_deploy.training.run_folder import Progress, RunFolder
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
    opening: Path
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
    with preserved_randomness(accelerator.device), _deterministic(accelerator.device):
        run = _Run(accelerator, splits, out, settings, workers, progress)
        state = run.folder.open(resume)
        if not checked and state.result is None:
            check_splits(splits, trust_images=trust_images, progress=progress)
        if run.tells:
            print(*splits.summary(), sep="\n", file=sys.stderr)
        accelerator.wait_for_everyone()  # nobody writes before all have looked
        run.restore(state)
        with _tensorboard(out, len(state.lines), tensorboard and run.writes) as log:
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
    files = [(image_paths(images), whole) for images, whole in lists]
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


class _Run:
    """The parts of a run: model, optimiser, loaders and folder."""

    def __init__(
        self,
        accelerator: Any,
        splits: Splits,
        out: Path,
        settings: TrainingSettings,
        workers: int,
        progress: bool,
    ) -> None:
        self.accelerator, self.settings, self.splits = accelerator, settings, splits
        self.writes = bool(accelerator.is_main_process)
        self.tells, self.workers = progress and self.writes, workers
        self.fitted = splits.train
        if settings.train_on == "train+val":
            labels = [*splits.train.labels, *splits.val.labels]
            self.fitted = ImageList([*splits.train.images, *splits.val.images], labels)
        self.steps = math.ceil(len(self.fitted) / settings.batch_size)
        self.tuned = create_model(settings, len(splits.classes))
        self.preprocessing = model_preprocessing(self.tuned, settings)
        self.learner = Learner(accelerator, self.tuned, self.preprocessing, settings, self.steps)
        self.folder = RunFolder(out, self._record())

    def _record(self) -> dict[str, Any]:
        """Everything that decides the run's numbers."""
        record = {
            **self.settings.to_dict(),
            "method_settings": self.tuned.settings,
            "backbone_weights": self.tuned.identity.digest[:16],
            "precision": self.learner.precision,
            "classes": list(self.splits.classes),
        }
        for part in ("train", "val", "test"):
            images = getattr(self.splits, part)
            record[f"{part}_images"] = None if images is None else fingerprint(images)[:16]
        return record

    @cached_property
    def train_loader(self) -> Loader:
        """Training images in this process's parts."""
        settings, processes = self.settings, self.accelerator.num_processes
        first = settings.accumulate * self.accelerator.process_index
        plan = partial(
            training_parts,
            len(self.fitted),
            settings.batch_size,
            settings.accumulate * processes,
            range(first, first + settings.accumulate),
            settings.seed,
        )
        pixels = PixelBatches(self.fitted, self.preprocessing, settings.augment, settings.seed)
        return Loader(pixels, plan, workers=self.workers, pin=self.learner.device.type == "cuda")

    @cached_property
    def val_loader(self) -> Loader:
        """Validation images that this process judges."""
        return self._evaluation_loader(self.splits.val)

    def _evaluation_loader(self, images: ImageList) -> Loader:
        def plan(epoch: int) -> Iterator[Part]:
            return evaluation_parts(
                len(images),
                math.ceil(self.settings.batch_size / self.settings.accumulate),
                self.accelerator.process_index,
                self.accelerator.num_processes,
            )

        return Loader(PixelBatches(images, self.preprocessing), plan, workers=self.workers)

    def restore(self, state: Progress) -> None:
        """Put model, optimiser and metrics file where the progress left them."""
        if state.lines and self.writes:
            self.folder.rewrite_metrics(state)
        if state.tensors:
            self.tuned.load_trained(state.group("now"))
            done = len(state.lines) * self.steps
            restore_moments(self.tuned, self.learner.optimiser, state.tensors, done)

    def do_epoch(self, state: Progress, epoch: int) -> dict[str, Any]:
        """Train and validate an epoch, write it down, and return its metrics."""
        start = time.perf_counter()
        name = f"epoch {epoch + 1}/{self.settings.epochs_done}"
        hidden = None if self.tells else True  # None: hidden where stderr is no terminal
        with tqdm(total=self.steps, desc=name, disable=hidden, leave=False) as bar:
            rate, loss, accuracy = self.learner.fit(self.train_loader, epoch, bar.update)
        fitted = time.perf_counter()
        val_loss, val_accuracy = None, None
        if self.settings.train_on == "train":
            val_loss, val_accuracy = self.learner.evaluate(self.val_loader)
        if not math.isfinite(loss) or not math.isfinite(val_loss or 0):
            raise diverged(epoch, self.settings)
        line = {
            "epoch": epoch + 1,
            "lr": rate,
            "train_loss": loss,
            "train_accuracy": accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "seconds": time.perf_counter() - start,
            "images_per_second": len(self.fitted) / (fitted - start),
            **orthogonality(self.tuned),
        }
        self._keep(state, line)
        if self.tells:
            print(_told(line, self.settings.epochs_done), file=sys.stderr)
        return line

    def _keep(self, state: Progress, line: dict[str, Any]) -> None:
        """Enter an epoch into the progress and into the folder."""
        trained = {n: p.detach().cpu().clone() for n, p in self.tuned.trained().items()}
        chosen = state.group("best")
        improves = not state.best or _merit(line) > _merit(state.best)
        if improves:
            state.best = {k: line[k] for k in ("epoch", "val_loss", "val_accuracy")}
            chosen = {n: t.clone() for n, t in trained.items()}
        state.lines.append(line)
        state.tensors = {
            **{f"now.{n}": t for n, t in trained.items()},
            **{f"best.{n}": t for n, t in chosen.items()},
            **moments(self.tuned, self.learner.optimiser),
        }
        if self.writes:
            self.folder.save(state)
            self.folder.append_metrics(line)
            if improves:
                self._save_checkpoint(state.best)

    def _save_checkpoint(self, figures: Mapping[str, Any]) -> None:
        chosen = {**self.settings.to_dict(), "precision": self.learner.precision}
        for key in ("backbone", "img_size", "crop_mode", "crop_pct", "method", "method_settings"):
            del chosen[key]  # they stand elsewhere in the checkpoint
        opening.save(
            self.tuned,
            self.folder.checkpoint,
            classes=self.splits.classes,
            preprocessing=self.preprocessing,
            training={**figures, "images": len(self.fitted), "settings": chosen},
        )

    def finish(self, state: Progress) -> None:
        """Test the chosen epoch and write what the run ends with."""
        start = time.perf_counter()
        self.tuned.load_trained(state.group("best"))
        loss, accuracy = None, None
        if self.splits.test is not None:
            loss, accuracy = self.learner.evaluate(self._evaluation_loader(self.splits.test))
        figures = {**state.best, "test_loss": loss, "test_accuracy": accuracy}
        line = {**figures, "seconds": time.perf_counter() - start}
        if self.writes:
            self._save_checkpoint(figures)
        self.accelerator.wait_for_everyone()
        state.lines.append(line)
        state.tensors = {}
        sizes = {n: p.numel() for n, p in self.tuned.trained().items()}
        head = sum(size for name, size in sizes.items() if name.startswith("head."))
        state.result = {
            "method": self.tuned.method,
            "update_parameters": sum(sizes.values()) - head,
            "head_parameters": head,
            "epochs": self.settings.epochs_done,
            "best_epoch": state.best["epoch"],
            "val_loss": state.best["val_loss"],
            "val_accuracy": state.best["val_accuracy"],
            "test_accuracy": accuracy,
            "checkpoint_bytes": self.folder.checkpoint.stat().st_size,
            "seconds": sum(line["seconds"] for line in state.lines),
        }
        if self.writes:
            self.folder.save(state)
            self.folder.append_metrics(line)


def _merit(figures: Mapping[str, Any]) -> tuple[float, float, int]:
    """Grows with validation accuracy, then with a falling loss; without these, with the epoch."""
    if figures["val_accuracy"] is None:
        return 0.0, 0.0, figures["epoch"]
    return figures["val_accuracy"], -figures["val_loss"], 0


def _told(line: Mapping[str, Any], epochs: int) -> str:
    text = (
        f"epoch {line['epoch']}/{epochs}  train loss {line['train_loss']:.4f}  "
        f"accuracy {line['train_accuracy']:.1%}"
    )
    if line["val_accuracy"] is not None:
        text += f"  val loss {line['val_loss']:.4f}  accuracy {line['val_accuracy']:.1%}"
    return f"{text}  {line['images_per_second']:.0f} images/s"


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Let a GPU use only algorithms that give the same bits every time, where there are any."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


@contextmanager
def _tensorboard(
    out: Path, done: int, wanted: bool
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that takes an epoch's metrics; those of epochs after ``done`` are dropped."""
    if not wanted:
        yield lambda line: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "tensorboard") from error

    with SummaryWriter(out, purge_step=done + 1) as writer:

        def log(line: Mapping[str, Any]) -> None:
            for name, value in line.items():
                if name != "epoch" and value is not None:
                    writer.add_scalar(name, value, line["epoch"])

        yield log
