"""Gradients of every method in the precisions of training, compared with PyTorch's in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from devices import each_device
from small_models import model, trained
from torch import Tensor
from torch.nn import functional as F

from aoft_deploy import attach
from aoft_deploy.float32_products import float32_products
from aoft_deploy.tuning import updated_layers
from aoft_deploy.tuning.merging import merge
from aoft_deploy.tuning.methods import method_names
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_deploy.tuning.updates.folding import fold_rows

NAME, SIZE, CLASSES, IMAGES = "vit_tiny_patch16_224", 32, 5, 4
BOUNDS = {"fp32": 5e-6, "bf16": 0.03}
"""Largest error of a gradient, relative to its norm; bf16 keeps 8 bits of the fraction."""


def images() -> Tensor:
    return torch.randn(IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def gradients(tuned: TunedModel, device: str, dtype: torch.dtype, bf16: bool) -> dict[str, Tensor]:
    """Gradients of the mean loss, by parameter, in float64 on the CPU."""
    tuned = copy.deepcopy(tuned).to(device, dtype)
    labels = torch.arange(IMAGES, device=device) % CLASSES
    with float32_products():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits = tuned(images().to(device, dtype))
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss: Any = F.cross_entropy(logits.to(wide), labels)
        loss.backward()
    found = {n: p.grad for n, p in tuned.trained().items()}
    return {n: grad.double().cpu() for n, grad in found.items() if grad is not None}


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, deltas: Any) -> Tensor:
    """``apply_linear`` with the gradients of PyTorch's autograd."""
    return F.linear(x, *fold_rows(weight, bias, deltas))


def exact_gradients(tuned: TunedModel) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updated_layers, "apply_linear", plain_linear)
        return gradients(tuned, "cpu", torch.float64, bf16=False)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@each_device
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("method", method_names())
def test_gradients_are_those_of_float64(method: str, precision: str, device: str) -> None:
    tuned = trained(attach(model(NAME), method)).eval()
    exact = exact_gradients(tuned)
    found = gradients(tuned, device, torch.float32, bf16=precision == "bf16")
    assert found.keys() == exact.keys()
    whole, theirs = (torch.cat([g.flatten() for g in each.values()]) for each in (found, exact))
    assert error(whole, theirs) <= BOUNDS[precision]
    for name, gradient in exact.items():
        if gradient.norm() > 1e-3 * theirs.norm():  # a smaller one is mostly rounding
            assert error(found[name], gradient) <= 3 * BOUNDS[precision], name


@each_device
@pytest.mark.parametrize("method", method_names())
def test_a_merged_model_gives_the_unmerged_logits_on_the_device(method: str, device: str) -> None:
    tuned = trained(attach(model(NAME), method)).eval()
    x = images()
    with torch.inference_mode(), float32_products():
        exact = copy.deepcopy(tuned).double()(x.double())
        there = tuned.to(device)
        merged = merge(there)
        answers = merged(x.to(device)).double().cpu(), there(x.to(device)).double().cpu()
    assert next(merged.parameters()).device.type == device
    for logits in answers:
        assert (logits - exact).abs().max() <= 2e-5 * max(1, exact.abs().max())
