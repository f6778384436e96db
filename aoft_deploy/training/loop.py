"""The training loop: epochs, validation, the best checkpoint, and resuming."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.data.splits import ImageList, Splits
from aoft_deploy.training.analysis.orthogonality import orthogonality
from aoft_deploy.training.batches import (
    FeatureBatches,
    Loader,
    Part,
    PixelBatches,
    evaluation_parts,
    fingerprints,
    training_parts,
)
from aoft_deploy.training.learner import Learner, diverged
from aoft_deploy.training.model import model_preprocessing, parameter_counts
from aoft_deploy.training.optimisation import moments, restore_moments
from aoft_deploy.training.reporting import Reporter, duration
from aoft_deploy.training.run_folder import Progress, RunFolder, check_same
from aoft_deploy.training.settings import TrainingSettings
from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = ["TrainingLoop", "merit"]


class TrainingLoop:
    """Model, optimiser, loaders and folder of a run, and the steps of the run.

    Args:
        accelerator: Manages devices and processes.
        tuned: The model.
        splits: The images.
        folder: Folder of the run.
        settings: The hyper-parameters.
        workers: Processes that prepare images.
        reporter: Shows the progress.
    """

    def __init__(
        self,
        accelerator: Any,
        tuned: TunedModel,
        splits: Splits,
        folder: RunFolder,
        settings: TrainingSettings,
        workers: int,
        reporter: Reporter,
    ) -> None:
        self.accelerator, self.tuned, self.splits = accelerator, tuned, splits
        self.folder, self.settings = folder, settings
        self.workers, self.reporter = workers, reporter
        self.writes = bool(accelerator.is_main_process)
        self.fitted = splits.train
        if settings.train_on == "train+val":
            labels = [*splits.train.labels, *splits.val.labels]
            self.fitted = ImageList([*splits.train.images, *splits.val.images], labels)
        self.steps = math.ceil(len(self.fitted) / settings.batch_size)
        self.preprocessing = model_preprocessing(tuned, settings)
        self.learner = Learner(accelerator, tuned, self.preprocessing, settings, self.steps)
        self.started: tuple[float, int] | None = None

    def record(self) -> dict[str, Any]:
        """Everything that determines the results of the run, as JSON values."""
        values = {
            **self.settings.to_dict(),
            "method_settings": self.tuned.settings,
            "backbone_weights": self.tuned.identity.digest[:16],
            "precision": self.learner.precision,
            "classes": list(self.splits.classes),
            **fingerprints(self.splits),
        }
        found: dict[str, Any] = json.loads(json.dumps(values))
        return found

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
        with self.reporter.counting("read training images", len(self.fitted)) as tick:
            augment, seed = settings.augment, settings.seed
            pixels = PixelBatches(self.fitted, self.preprocessing, augment, seed, tick)
        return self._loader("training", pixels, plan)

    def _loader(
        self, name: str, batches: PixelBatches, plan: Callable[[int], Iterator[Part]]
    ) -> Loader:
        """Loader into the memory from which the device copies without waiting.

        It gives features instead of images if they are the same in every epoch.
        """
        pin = self.learner.device.type == "cuda"
        if self.learner.has_constant_features(batches.augment):
            size = math.ceil(self.settings.batch_size / self.settings.accumulate)
            ordered = partial(_in_order, len(batches), size)
            images = Loader(batches, ordered, workers=self.workers, pin=pin)
            with self.reporter.counting(f"features of {name} images", len(batches)) as tick:
                features = self.learner.features(images, tick)
            if features is not None:
                return Loader(FeatureBatches(features, batches.labels), plan)
        return Loader(batches, plan, workers=self.workers, pin=pin)

    @cached_property
    def val_loader(self) -> Loader:
        """Validation images that this process evaluates."""
        return self._evaluation_loader("val", self.splits.val)

    def _evaluation_loader(self, name: str, images: ImageList) -> Loader:
        def plan(epoch: int) -> Iterator[Part]:
            return evaluation_parts(
                len(images),
                math.ceil(self.settings.batch_size / self.settings.accumulate),
                self.accelerator.process_index,
                self.accelerator.num_processes,
            )

        with self.reporter.counting(f"read {name} images", len(images)) as tick:
            pixels = PixelBatches(images, self.preprocessing, tick=tick)
        return self._loader(name, pixels, plan)

    def _evaluate(self, name: str, loader: Loader) -> tuple[float, float]:
        """Mean loss and accuracy; the progress is that of this process."""
        own = math.ceil(len(loader.batches) / self.accelerator.num_processes)
        with self.reporter.counting(name, own) as tick:
            return self.learner.evaluate(loader, tick)

    def restore(self, state: Progress) -> None:
        """Restore the model, the optimiser and the metrics file from the progress.

        Raises:
            SettingError: The run was started with other settings or data.
        """
        record = self.record()
        if state.run:
            check_same(self.folder.path, state.run, record)
        state.run = record
        if state.lines and self.writes:
            self.folder.rewrite_metrics(state)
        if state.tensors:
            self.tuned.load_trained(state.group("now"))
            done = len(state.lines) * self.steps
            restore_moments(self.tuned, self.learner.optimiser, state.tensors, done)

    def do_epoch(self, state: Progress, epoch: int) -> dict[str, Any]:
        """Train and validate an epoch, save it, and return its metrics."""
        start = time.perf_counter()
        self.started = self.started or (start, epoch)
        name, images = f"epoch {epoch + 1}/{self.settings.epochs_done}", len(self.fitted)
        loader = self.train_loader
        with self.reporter.counting(name, images) as count:

            def tick(step: int, loss: Callable[[], str]) -> None:
                count(images * (step + 1) // self.steps - images * step // self.steps, loss)

            rate, loss, accuracy = self.learner.fit(loader, epoch, tick)
        fitted = time.perf_counter()
        val_loss, val_accuracy = None, None
        if self.settings.train_on == "train":
            val_loss, val_accuracy = self._evaluate(f"{name}, val", self.val_loader)
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
            "images_per_second": images / (fitted - start),
            **orthogonality(self.tuned),
        }
        self._keep(state, line)
        self.reporter.say(self._progress_line(line))
        return line

    def _progress_line(self, line: Mapping[str, Any]) -> str:
        epoch, epochs = line["epoch"], self.settings.epochs_done
        text = (
            f"epoch {epoch}/{epochs}  train loss {line['train_loss']:.4f}  "
            f"accuracy {line['train_accuracy']:.1%}"
        )
        if line["val_accuracy"] is not None:
            text += f"  val loss {line['val_loss']:.4f}  accuracy {line['val_accuracy']:.1%}"
        text += f"  {line['images_per_second']:.0f} images/s"
        begin, first = self.started or (0.0, 0)
        left = (time.perf_counter() - begin) / (epoch - first) * (epochs - epoch)
        return f"{text}  {duration(left)} left" if left else text

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
            training={
                **figures,
                "images": len(self.fitted),
                "left_out": len(self.folder.left_out()),
                "settings": settings,
            },
        )

    def finish(self, state: Progress) -> None:
        """Test the best epoch and save the result of the run."""
        start = time.perf_counter()
        self.tuned.load_trained(state.group("best"))
        loss, accuracy = None, None
        if self.splits.test is not None:
            loader = self._evaluation_loader("test", self.splits.test)
            loss, accuracy = self._evaluate("test", loader)
        figures = {**state.best, "test_loss": loss, "test_accuracy": accuracy}
        line = {**figures, "seconds": time.perf_counter() - start}
        if self.writes:
            self._save_checkpoint(figures)
        self.accelerator.wait_for_everyone()
        state.lines.append(line)
        state.tensors = {}
        updates, head = parameter_counts(self.tuned)
        state.result = {
            "method": self.tuned.method,
            "update_parameters": updates,
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


def _in_order(count: int, size: int, epoch: int) -> Iterator[Part]:
    """All images in their order, in parts of ``size``."""
    return evaluation_parts(count, size, 0, 1)


def merit(metrics: Mapping[str, Any]) -> tuple[float, float, int]:
    """Sort key of epochs and runs: higher validation accuracy, then lower validation loss.

    Without validation images, the later epoch is better.
    """
    if metrics["val_accuracy"] is None:
        return 0.0, 0.0, metrics["epoch"]
    return metrics["val_accuracy"], -metrics["val_loss"], 0
