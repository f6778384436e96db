"""What is optimised how: parameter groups, the learning rate of a step, AdamW's state by name."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import AdamW

from aoft_deploy.training.settings import TrainingSettings
from aoft_deploy.tuning.tuned_model import TunedModel

__all__ = ["make_optimiser", "moments", "restore_moments", "schedule", "set_rate"]


def make_optimiser(tuned: TunedModel, settings: TrainingSettings) -> AdamW:
    """AdamW over the trained numbers alone.

    Matrices are decayed: the low-rank factors, RLRR's scales and the classifier's weight, where
    zero means no change. Vectors are not: zero is wrong for SSF's scales, which rest at one, and
    for the vectors that generate AOFT's projections.

    Args:
        tuned: The model, on its device.
        settings: Says the peak rates and the decay.

    Returns:
        The optimiser; each group holds its ``peak`` rate.
    """
    update_rate, head_rate = settings.peak_rates()
    groups = []
    for is_head in (False, True):
        for decays in (False, True):
            members = [
                parameter
                for name, parameter in tuned.trained().items()
                if name.startswith("head.") == is_head and (parameter.dim() >= 2) == decays
            ]
            if members:
                rate = head_rate if is_head else update_rate
                decay = settings.weight_decay if decays else 0.0
                groups.append({"params": members, "weight_decay": decay, "peak": rate})
    fused = next(tuned.parameters()).device.type in ("cpu", "cuda")
    return AdamW(groups, lr=update_rate, fused=fused)


def schedule(step: int, *, peak: float, floor: float, warmup: int, total: int) -> float:
    """Learning rate of a step: a linear rise to ``peak``, then half a cosine down to ``floor``.

    Args:
        step: The step, from 0.
        peak: Rate of step ``warmup``.
        floor: Rate of the last step.
        warmup: Steps of the rise.
        total: All steps.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(total - 1 - warmup, 1)
    return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2


def set_rate(optimiser: AdamW, step: int, *, floor: float, warmup: int, total: int) -> float:
    """Give each group its rate for a step, and return the first group's."""
    for group in optimiser.param_groups:
        group["lr"] = schedule(
            step, peak=group["peak"], floor=min(floor, group["peak"]), warmup=warmup, total=total
        )
    rate: float = optimiser.param_groups[0]["lr"]
    return rate


def moments(tuned: TunedModel, optimiser: AdamW) -> dict[str, Tensor]:
    """AdamW's two averages of each trained parameter, as ``first.NAME`` and ``second.NAME``."""
    averages: dict[str, Tensor] = {}
    for name, parameter in tuned.trained().items():
        averages[f"first.{name}"] = optimiser.state[parameter]["exp_avg"]
        averages[f"second.{name}"] = optimiser.state[parameter]["exp_avg_sq"]
    return averages


def restore_moments(
    tuned: TunedModel, optimiser: AdamW, averages: Mapping[str, Tensor], steps: int
) -> None:
    """Put averages back as ``moments`` gave them, after ``steps`` optimiser steps."""
    for name, parameter in tuned.trained().items():
        optimiser.state[parameter] = {
            "step": torch.tensor(float(steps), device=parameter.device),
            "exp_avg": averages[f"first.{name}"].to(parameter),
            "exp_avg_sq": averages[f"second.{name}"].to(parameter),
        }
