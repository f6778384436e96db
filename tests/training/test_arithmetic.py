"""Three steps of training and their gradients, compared with a computation by hand in float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate.accelerator import Accelerator
from torch import Tensor, nn
from torch.func import functional_call

import aoft_deploy.tuning.backbones.bundled  # noqa: F401  (registers aoft_vit_nano with timm)
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.data.splits import ImageList
from aoft_deploy.training.batches import Loader, PixelBatches, training_parts
from aoft_deploy.training.learner import Learner
from aoft_deploy.training.model import only_depth_is_random
from aoft_deploy.training.settings import TrainingSettings
from aoft_deploy.tuning.attaching import attach

NAME = "aoft_vit_nano"
SIZE, CLASSES, COUNT, BATCH = 16, 3, 11, 4
ARGS: dict[str, Any] = {"img_size": SIZE, "depth": 2, "embed_dim": 32, "num_heads": 2}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
PREPROCESSING = Preprocessing(SIZE, crop_pct=1.0, mean=MEAN, std=STD)
RANK, SCALE = 2, 0.5

BASE = TrainingSettings(
    backbone=NAME,
    method="lora",
    method_settings={"rank": RANK, "scale": SCALE, "targets": ["q", "v"]},
    epochs=1,
    batch_size=BATCH,
    lr=2e-2,
    head_lr=1e-2,
    min_lr=3e-3,
    warmup_epochs=1 / 3,
    weight_decay=0.3,
    clip_norm=0.0,
    precision="fp32",
    seed=5,
)


def images() -> ImageList:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(COUNT)]
    return ImageList(pixels, rng.integers(0, CLASSES, COUNT).tolist())


def backbone(**arguments: Any) -> nn.Module:
    """A model of timm in float64 with random weights that do not depend on its initialisation."""
    model = timm.create_model(NAME, num_classes=CLASSES, **ARGS, **arguments)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=source)
            parameter.copy_(noise + (parameter.dim() == 1 and name.endswith("weight")))
    return model.double()


def learner(settings: TrainingSettings, **arguments: Any) -> Learner:
    tuned = attach(backbone(**arguments), settings.method, seed=3, **settings.method_settings)
    tuned = tuned.double()
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():  # move all parameters from their start, so that every gradient is nonzero
        for parameter in tuned.trained().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=source))
    accelerator = Accelerator(mixed_precision="no")
    return Learner(accelerator, tuned, PREPROCESSING, settings, math.ceil(COUNT / BATCH))


def loader(settings: TrainingSettings, first: int = 0, processes: int = 1) -> Loader:
    mine = range(first * settings.accumulate, (first + 1) * settings.accumulate)
    parts = settings.accumulate * processes
    plan = partial(training_parts, COUNT, settings.batch_size, parts, mine, settings.seed)
    return Loader(PixelBatches(images(), PREPROCESSING), plan)


def gradients(learner: Learner, loader: Loader) -> list[dict[str, Tensor]]:
    """Gradients of the trained parameters before each optimiser step of an epoch."""
    found: list[dict[str, Tensor]] = []

    def look(*_: object) -> None:
        trained = learner.tuned.trained()
        found.append({n: p.grad.clone() for n, p in trained.items() if p.grad is not None})

    learner.optimiser.register_step_pre_hook(look)
    learner.fit(loader, 0, lambda *_: None)
    return found


def agree(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float = 1e-11) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= bound * value.abs().max(), name


# Computation by hand


def dense(model: nn.Module, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's parameters with W + scale · B A in the rows of q and v, and the classifier."""
    weights = {name: value.detach() for name, value in model.named_parameters()}
    changed = {f"head.{name}": numbers[f"head.head.{name}"] for name in ("weight", "bias")}
    for block in range(len(model.blocks)):  # type: ignore[arg-type]
        name = f"blocks.{block}.attn.qkv.weight"
        width = weights[name].shape[1]
        rows = list(weights[name].reshape(3, width, width))
        for place, role in ((0, "q"), (2, "v")):
            a, b = (numbers[f"update.blocks.{block}.attn.qkv.{role}.{name}"] for name in "ab")
            rows[place] = rows[place] + SCALE * b @ a
        changed[name] = torch.cat(rows)
    return changed


def normal(indices: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
    """Normalised images (n, 3, size, size) and one-hot labels (n, classes) in float64."""
    source = images()
    pixels = np.stack([np.asarray(source.images[i]) for i in indices]).astype(np.float64) / 255
    x = torch.from_numpy((pixels - np.array(MEAN)) / np.array(STD)).permute(0, 3, 1, 2)
    return x, torch.eye(CLASSES, dtype=torch.float64)[[source.labels[i] for i in indices]]


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * (logits - logits.logsumexp(-1, keepdim=True))).sum(-1).mean()


def by_hand(settings: TrainingSettings, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained parameters after one epoch of three steps."""
    model = backbone().eval()
    numbers = {name: value.clone() for name, value in start.items()}
    first = {name: torch.zeros_like(value) for name, value in numbers.items()}
    second = {name: torch.zeros_like(value) for name, value in numbers.items()}
    order = np.random.default_rng((settings.seed, 1, 0)).permutation(COUNT)
    steps = np.array_split(order, math.ceil(COUNT / BATCH))
    assert len(steps) == 3
    for step, chosen in enumerate(steps):
        x, one_hot = normal(chosen)
        target = (1 - settings.label_smoothing) * one_hot + settings.label_smoothing / CLASSES
        if settings.mixup:
            rng = np.random.default_rng((settings.seed, 4, 0, step, 0))
            share = rng.beta(settings.mixup, settings.mixup)
            share = max(share, 1 - share)
            x = share * x + (1 - share) * x.flip(0)
            target = share * target + (1 - share) * target.flip(0)
        leaves = {name: value.requires_grad_() for name, value in numbers.items()}
        logits = functional_call(model, dense(model, leaves), (x,))
        found = torch.autograd.grad(loss_of(logits, target), list(leaves.values()))
        grads = dict(zip(leaves, found, strict=True))
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        if settings.clip_norm and norm > settings.clip_norm:
            factor = settings.clip_norm / (norm + 1e-6)
            grads = {name: grad * factor for name, grad in grads.items()}
        for name, grad in grads.items():
            peak = settings.head_lr if name.startswith("head.") else settings.lr
            assert peak is not None
            # One of three steps is warm-up, at half of the peak; then both ends of the cosine.
            rate = (peak / 2, peak, settings.min_lr)[step]
            decay = settings.weight_decay if grad.dim() > 1 else 0.0
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.999 * second[name] + 0.001 * grad.square()
            mean = first[name] / (1 - 0.9 ** (step + 1))
            spread = (second[name] / (1 - 0.999 ** (step + 1))).sqrt()
            old = numbers[name].detach()
            numbers[name] = old - rate * decay * old - rate * mean / (spread + 1e-8)
    return numbers


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"label_smoothing": 0.2},
        {"clip_norm": 0.5},
        {"mixup": 0.8},
        {"mixup": 0.8, "label_smoothing": 0.1, "clip_norm": 0.5},
    ],
    ids=["plain", "smoothing", "clipping", "mixup", "all"],
)
def test_three_steps_equal_those_computed_by_hand(changes: dict[str, Any]) -> None:
    settings = replace(BASE, **changes)
    ours = learner(settings)
    start = {name: p.detach().clone() for name, p in ours.tuned.trained().items()}
    expected = by_hand(settings, start)
    ours.fit(loader(settings), 0, lambda *_: None)
    for name, parameter in ours.tuned.trained().items():
        moved = (expected[name] - start[name]).abs().max()
        assert (parameter - expected[name]).abs().max() <= 1e-9 * moved, name


# Gradients before the optimiser


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_gradients_of_accumulated_parts_equal_those_of_the_whole_step(accumulate: int) -> None:
    settings = replace(BASE, label_smoothing=0.1)  # steps of 4, 4 and 3 images in unequal parts
    parts = replace(settings, accumulate=accumulate)
    whole = gradients(learner(settings), loader(settings))
    summed = gradients(learner(parts), loader(parts))
    assert len(whole) == len(summed) == 3
    for one, many in zip(whole, summed, strict=True):
        agree(many, one)


def test_gradients_are_those_of_the_mean_loss_over_the_step() -> None:
    settings = replace(BASE, lr=1e-30, head_lr=1e-30, min_lr=0.0, weight_decay=0.0)
    ours = learner(settings)
    numbers = {n: p.detach().clone().requires_grad_() for n, p in ours.tuned.trained().items()}
    found = gradients(ours, loader(settings))
    model, order = backbone().eval(), np.random.default_rng((settings.seed, 1, 0))
    for step, chosen in zip(found, np.array_split(order.permutation(COUNT), 3), strict=True):
        x, one_hot = normal(chosen)
        loss = loss_of(functional_call(model, dense(model, numbers), (x,)), one_hot)
        grads = torch.autograd.grad(loss, list(numbers.values()))
        agree(step, dict(zip(numbers, grads, strict=True)))


RATES = {"drop_rate": 0.5, "pos_drop_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5}


def test_dropout_of_the_backbone_is_off_in_training() -> None:
    model = backbone(**RATES)
    assert any(isinstance(m, nn.Dropout) and m.p == 0.5 for m in model.modules())
    plain, dropping = learner(BASE), learner(BASE, **RATES)
    for one, other in zip(
        gradients(plain, loader(BASE)), gradients(dropping, loader(BASE)), strict=True
    ):
        agree(other, one, 0.0)


def test_stochastic_depth_is_on_in_training_and_dropout_is_not() -> None:
    ours = learner(BASE, drop_path_rate=0.9, **RATES)
    only_depth_is_random(ours.tuned)
    x = torch.ones(1, 3, SIZE, SIZE, dtype=torch.float64)
    torch.manual_seed(0)
    answers = {tuple(ours.tuned(x).flatten().tolist()) for _ in range(30)}
    # Each of two branches in two blocks is kept or dropped: at most 16 different outputs.
    assert 1 < len(answers) <= 16


TWO = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
import test_arithmetic as t
from accelerate.state import PartialState

settings = t.replace(t.BASE, accumulate=int(sys.argv[3]))
learner = t.learner(settings)
state = PartialState()
assert state.num_processes == 2
found = t.gradients(learner, t.loader(settings, state.process_index, 2))
if state.is_main_process:
    torch.save(found, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_of_two_processes_equal_those_of_one(tmp_path: Path, accumulate: int) -> None:
    (tmp_path / "two.py").write_text(TWO)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    out = tmp_path / "gradients.pt"
    subprocess.run(
        [*launch, tmp_path / "two.py", Path(__file__).parent, out, str(accumulate)],
        check=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    alone = gradients(learner(BASE), loader(BASE))
    for one, two in zip(alone, torch.load(out, weights_only=True), strict=True):
        agree(two, one)
