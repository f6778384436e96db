from itertools import pairwise

import pytest
import torch
from torch.optim import AdamW

from aoft_deploy.training.model import create_model
from aoft_deploy.training.optimisation import (
    make_optimiser,
    moments,
    restore_moments,
    schedule,
    set_rate,
)
from aoft_deploy.training.settings import TrainingSettings
from aoft_deploy.tuning.methods import method_names
from aoft_deploy.tuning.tuned_model import TunedModel


def stepped(method: str) -> tuple[TunedModel, AdamW]:
    settings = TrainingSettings(method=method, img_size=16)
    tuned = create_model(settings, 3)
    optimiser = make_optimiser(tuned, settings)
    tuned(torch.rand(2, 3, 16, 16)).square().sum().backward()
    optimiser.step()
    return tuned, optimiser


@pytest.mark.parametrize("method", method_names())
def test_memory_holds_two_moments_per_trained_parameter_and_no_frozen_gradient(method: str) -> None:
    tuned, optimiser = stepped(method)
    trained = tuned.trained()
    held = [t for state in optimiser.state.values() for k, t in state.items() if k != "step"]
    assert sum(t.numel() for t in held) == 2 * sum(p.numel() for p in trained.values())
    chosen = {id(p) for p in trained.values()}
    assert {id(p) for g in optimiser.param_groups for p in g["params"]} == chosen
    assert all(p.grad is None for p in tuned.parameters() if id(p) not in chosen)
    assert all(p.grad is not None for p in trained.values())


@pytest.mark.parametrize(
    ("method", "decayed"),
    [
        ("aoft-lora-star", {"weight"}),
        ("lora", {"a", "b", "weight"}),
        ("rlrr", {"scale_in", "scale_out", "weight"}),
    ],
)
def test_only_matrices_are_decayed(method: str, decayed: set[str]) -> None:
    settings = TrainingSettings(method=method, img_size=16, weight_decay=0.1)
    tuned = create_model(settings, 3)
    groups = make_optimiser(tuned, settings).param_groups
    members = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    names = {n.rpartition(".")[2] for n, p in tuned.trained().items() if id(p) in members}
    assert names == decayed


def test_the_rate_rises_linearly_and_then_falls_to_the_floor() -> None:
    rates = [schedule(s, peak=1.0, floor=0.1, warmup=4, total=20) for s in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (3, 3), (0, 2)])
def test_short_schedules_stay_within_floor_and_peak(warmup: int, total: int) -> None:
    for step in range(total):
        assert 0.1 <= schedule(step, peak=1.0, floor=0.1, warmup=warmup, total=total) <= 1


def test_updates_and_classifier_have_their_own_rates() -> None:
    settings = TrainingSettings(img_size=16, lr=0.5, head_lr=0.25)
    optimiser = make_optimiser(create_model(settings, 3), settings)
    assert set_rate(optimiser, 0, floor=0.0, warmup=0, total=10) == 0.5
    assert {g["lr"] for g in optimiser.param_groups} == {0.5, 0.25}


def test_moments_are_restored_exactly() -> None:
    tuned, optimiser = stepped("aoft-lora-star")
    saved = {name: tensor.clone() for name, tensor in moments(tuned, optimiser).items()}
    fresh, other = stepped("aoft-lora-star")
    other.step()
    restore_moments(fresh, other, saved, steps=1)
    assert all(torch.equal(t, saved[n]) for n, t in moments(fresh, other).items())
    assert {float(state["step"]) for state in other.state.values()} == {1.0}
