"""The optimiser: parameter groups, the learning-rate schedule, and AdamW's state by name."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import AdamW

from aoft_deploy.training.model import is_head
from aoft_deploy.training.settings import TrainingSettings
from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = ["make_optimiser", "moments", "restore_moments", "schedule", "set_rate"]


def make_optimiser(tuned: TunedModel, settings: TrainingSettings) -> AdamW:
    """AdamW over the trained parameters only.

    Matrices are decayed: the low-rank factors, RLRR's scales and the classifier's weight, which
    are neutral at zero. Vectors are not: SSF's scales are neutral at one, and AOFT's generating
    vectors must not shrink to zero.

    Args:
        tuned: The model, on its device.
        settings: Gives the peak rates and the decay.

    Returns:
        The optimiser; each parameter group has its ``peak`` rate.
    """
    update_rate, head_rate = settings.peak_rates()
    groups = []
    for of_head in (False, True):
        for decays in (False, True):
            members = [
                parameter
                for name, parameter in tuned.trained().items()
                if is_head(name) == of_head and (parameter.dim() >= 2) == decays
            ]
            if members:
                rate = head_rate if of_head else update_rate
                decay = settings.weight_decay if decays else 0.0
                groups.append({"params": members, "weight_decay": decay, "peak": rate})
    fused = next(tuned.parameters()).device.type in ("cpu", "cuda")
    return AdamW(groups, lr=update_rate, fused=fused)


def schedule(step: int, *, peak: float, floor: float, warmup: int, total: int) -> float:
    """Learning rate of a step: linear warm-up to ``peak``, then half a cosine down to ``floor``.

    Args:
        step: The step, from 0.
        peak: Rate of step ``warmup``.
        floor: Rate of the last step.
        warmup: Number of warm-up steps.
        total: Number of all steps.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(total - 1 - warmup, 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2


def set_rate(optimiser: AdamW, step: int, *, floor: float, warmup: int, total: int) -> float:
    """Set the learning rate of each parameter group for a step; return that of the first."""
    for group in optimiser.param_groups:
        group["lr"] = schedule(
            step, peak=group["peak"], floor=min(floor, group["peak"]), warmup=warmup, total=total
        )
    rate: float = optimiser.param_groups[0]["lr"]
    return rate


def moments(tuned: TunedModel, optimiser: AdamW) -> dict[str, Tensor]:
    """AdamW's moments of each trained parameter, as ``first.NAME`` and ``second.NAME``."""
    values: dict[str, Tensor] = {}
    for name, parameter in tuned.trained().items():
        values[f"first.{name}"] = optimiser.state[parameter]["exp_avg"]
        values[f"second.{name}"] = optimiser.state[parameter]["exp_avg_sq"]
    return values


def restore_moments(
    tuned: TunedModel, optimiser: AdamW, values: Mapping[str, Tensor], steps: int
) -> None:
    """Restore the result of ``moments`` after ``steps`` optimiser steps."""
    for name, parameter in tuned.trained().items():
        optimiser.state[parameter] = {
            "step": torch.tensor(float(steps), device=parameter.device),
            "exp_avg": values[f"first.{name}"].to(parameter),
            "exp_avg_sq": values[f"second.{name}"].to(parameter),
        }
