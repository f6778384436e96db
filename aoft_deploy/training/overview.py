"""What a run is about to do, as a table: data, model, optimisation, device, and output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from aoft_deploy.training.model import parameter_counts
from aoft_deploy.training.run_folder import LEFT_OUT, Progress
from aoft_deploy.tuning.backbones.bundled import WEIGHTS

if TYPE_CHECKING:
    from aoft_deploy.training.loop import TrainingLoop

__all__ = ["overview"]


def overview(run: TrainingLoop, state: Progress, left_out: int) -> list[str]:
    """Lines that say what a run does, before its first epoch.

    Args:
        run: The run.
        state: Its progress so far.
        left_out: Number of images that are left out.
    """
    folder = run.folder.path
    rows = run.splits.summary()
    if run.settings.train_on == "train+val":
        rows = [(name, f"{text}, trained on" if name == "val" else text) for name, text in rows]
    if run.splits.test is None:
        only_val = ", so accuracy is measured only on val, which also chooses the epoch"
        rows.append(("test", "none" + (only_val if run.settings.train_on == "train" else "")))
    if left_out:
        images = "1 unreadable image" if left_out == 1 else f"{left_out:,} unreadable images"
        rows.append(("left out", f"{images}, listed in {folder / LEFT_OUT}"))
    rows += [*_model(run), ("training", _training(run, len(state.lines)))]
    rows += [("device", _device(run)), ("output", str(folder))]
    return [f"{name:<10}{phrase}" for name, phrase in rows]


def _model(run: TrainingLoop) -> list[tuple[str, str]]:
    tuned, size = run.tuned, run.preprocessing
    count, head = parameter_counts(tuned)
    added = sum(p.numel() for name, p in tuned.trained().items() if not name.startswith("backbone"))
    whole = sum(parameter.numel() for parameter in tuned.parameters()) - added
    settings = ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in tuned.settings.items()
        if value != {}
    )
    return [
        (
            "backbone",
            f"{tuned.identity.name}, {whole:,} parameters, {_origin(run)}, "
            f"input {size.width} x {size.height} pixels",
        ),
        ("method", f"{tuned.method}: {settings}" if settings else tuned.method),
        (
            "trained",
            f"{count:,} parameters ({count / whole:.2%} of the backbone) + {head:,} (classifier)",
        ),
    ]


def _origin(run: TrainingLoop) -> str:
    """Where the weights of the backbone come from."""
    if run.settings.backbone_weights is not None:
        return f"weights of {run.settings.backbone_weights}"
    config = getattr(run.tuned.backbone, "pretrained_cfg", None) or {}
    if config.get("hf_hub_id"):
        return f"weights of {config['hf_hub_id']} on the Hugging Face Hub"
    if config.get("file") == str(WEIGHTS):
        return "bundled weights"
    return f"weights of {config.get('file') or config.get('url') or 'timm'}"


def _training(run: TrainingLoop, done: int) -> str:
    settings = run.settings
    epochs = "1 epoch" if settings.epochs_done == 1 else f"{settings.epochs_done:,} epochs"
    epochs += f" ({done:,} of them done)" if done else ""
    update_rate, head_rate = settings.peak_rates()
    has_updates = parameter_counts(run.tuned)[0] > 0
    rates = f"{update_rate:g} (classifier {head_rate:g})" if has_updates else f"{head_rate:g}"
    return (
        f"{epochs} of {run.steps:,} steps, up to {settings.batch_size:,} images per step, "
        f"learning rate {rates}, augment {settings.augment}"
    )


def _device(run: TrainingLoop) -> str:
    device, processes = run.learner.device, run.accelerator.num_processes
    if device.type == "cuda":
        what = torch.cuda.get_device_name(device)
    else:
        count = torch.get_num_threads()
        what = "1 thread" if count == 1 else f"{count} threads"
    shared = f", {processes} processes" if processes > 1 else ""
    return f"{device.type} ({what}){shared}, precision {run.learner.precision}"
