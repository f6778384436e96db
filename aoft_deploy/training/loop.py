"""The training loop: epochs, validation, the best checkpoint, and resuming."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.data.splits import ImageList, Splits
from aoft_deploy.training.analysis.orthogonality import orthogonality
from aoft_deploy.training.batches import (
    Loader,
    Part,
    PixelBatches,
    evaluation_parts,
    fingerprints,
    training_parts,
)
from aoft_deploy.training.learner import Learner, diverged
from aoft_deploy.training.model import create_model, is_head, model_preprocessing
from aoft_deploy.training.optimisation import moments, restore_moments
from aoft_deploy.training.run_folder import Progress, RunFolder
from aoft_deploy.training.settings import TrainingSettings

__all__ = ["TrainingLoop", "merit"]


class TrainingLoop:
    """Model, optimiser, loaders and folder of a run, and the steps of the run.

    Args:
        accelerator: Manages devices and processes.
        splits: The images.
        out: Folder of the run.
        settings: The hyper-parameters.
        workers: Processes that prepare images.
        progress: Show progress on stderr.
    """

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
        self.shows_progress, self.workers = progress and self.writes, workers
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
        """Everything that determines the results of the run, as JSON values."""
        return {
            **self.settings.to_dict(),
            "method_settings": self.tuned.settings,
            "backbone_weights": self.tuned.identity.digest[:16],
            "precision": self.learner.precision,
            "classes": list(self.splits.classes),
            **fingerprints(self.splits),
        }

    @cached_property
    def train_loader(self) -> Loader:
        """Training images, in the parts of this process."""
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
        """Validation images that this process evaluates."""
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
        """Restore the model, the optimiser and the metrics file from the progress."""
        if state.lines and self.writes:
            self.folder.rewrite_metrics(state)
        if state.tensors:
            self.tuned.load_trained(state.group("now"))
            done = len(state.lines) * self.steps
            restore_moments(self.tuned, self.learner.optimiser, state.tensors, done)

    def do_epoch(self, state: Progress, epoch: int) -> dict[str, Any]:
        """Train and validate an epoch, save it, and return its metrics."""
        start = time.perf_counter()
        name = f"epoch {epoch + 1}/{self.settings.epochs_done}"
        hidden = None if self.shows_progress else True  # None: hidden where stderr is no terminal
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
        if self.shows_progress:
            print(_progress_line(line, self.settings.epochs_done), file=sys.stderr)
        return line

    def _keep(self, state: Progress, line: dict[str, Any]) -> None:
        """Add an epoch to the progress, and save it to the folder."""
        trained = {n: p.detach().cpu().clone() for n, p in self.tuned.trained().items()}
        best = state.group("best")
        improves = not state.best or merit(line) > merit(state.best)
        if improves:
            state.best = {k: line[k] for k in ("epoch", "val_loss", "val_accuracy")}
            best = {n: t.clone() for n, t in trained.items()}
        state.lines.append(line)
        state.tensors = {
            **{f"now.{n}": t for n, t in trained.items()},
            **{f"best.{n}": t for n, t in best.items()},
            **moments(self.tuned, self.learner.optimiser),
        }
        if self.writes:
            self.folder.save(state)
            self.folder.append_metrics(line)
            if improves:
                self._save_checkpoint(state.best)

    def _save_checkpoint(self, figures: Mapping[str, Any]) -> None:
        settings = {**self.settings.to_dict(), "precision": self.learner.precision}
        for key in ("backbone", "img_size", "crop_mode", "crop_pct", "method", "method_settings"):
            del settings[key]  # the checkpoint has them in other fields
        save(
            self.tuned,
            self.folder.checkpoint,
            classes=self.splits.classes,
            preprocessing=self.preprocessing,
            training={**figures, "images": len(self.fitted), "settings": settings},
        )

    def finish(self, state: Progress) -> None:
        """Test the best epoch and save the result of the run."""
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
        head = sum(size for name, size in sizes.items() if is_head(name))
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


def merit(metrics: Mapping[str, Any]) -> tuple[float, float, int]:
    """Sort key of epochs and runs: higher validation accuracy, then lower validation loss.

    Without validation images, the later epoch is better.
    """
    if metrics["val_accuracy"] is None:
        return 0.0, 0.0, metrics["epoch"]
    return metrics["val_accuracy"], -metrics["val_loss"], 0


def _progress_line(line: Mapping[str, Any], epochs: int) -> str:
    text = (
        f"epoch {line['epoch']}/{epochs}  train loss {line['train_loss']:.4f}  "
        f"accuracy {line['train_accuracy']:.1%}"
    )
    if line["val_accuracy"] is not None:
        text += f"  val loss {line['val_loss']:.4f}  accuracy {line['val_accuracy']:.1%}"
    return f"{text}  {line['images_per_second']:.0f} images/s"
