"""The model in pre-training: initialisation, heads, losses and optimisers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from figures import CLASSES, FAMILIES
from scenes import MOST_COPIES, SCENE_NUMBERS
from torch import Tensor, nn


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Initialise the model like a trained ViT, which shortens the slow start of training.

    Position embeddings are two-dimensional sines and cosines with the scale of the content.
    Attention weights satisfy WqᵀWk ∝ I and WoWv ∝ -I on the subspace of each head, after Trockman
    and Kolter, "Mimetic Initialization of Self-Attention Layers" (arXiv 2305.09828).
    """
    m: Any = model
    width, side = m.embed_dim, m.patch_embed.grid_size[0]
    wave = torch.arange(side)[:, None] * math.pi / side * torch.logspace(-1, 3, width // 4, 2)
    line = torch.cat([wave.sin(), wave.cos()], 1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    m.pos_embed[0, 1:] = 0.5 * torch.cat([rows, columns], 2).flatten(0, 1)
    for block in m.blocks:
        likeness, value = (nn.init.orthogonal_(torch.empty(width, width)) for _ in range(2))
        qkv, out = block.attn.qkv.weight, block.attn.proj.weight
        qkv.mul_(0.5).add_(torch.cat([0.5 * likeness, 0.5 * likeness, 0.6 * value]))
        out.mul_(0.5).sub_(0.6 * value.T)


class Heads(nn.Module):
    """The linear heads of pre-training; they are not published."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.formula = nn.Linear(width, CLASSES)
        self.family = nn.Linear(width, len(FAMILIES))
        self.copies = nn.Linear(width, MOST_COPIES)
        self.numbers = nn.Linear(width, SCENE_NUMBERS)
        self.ink = nn.Linear(width, 16 * 16)
        self.patch = nn.Linear(width, 8 * 8)


def encode(
    model: nn.Module, images: Tensor, keep: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Run the backbone on `keep` random patches of each image.

    Returns:
        The normalised tokens, [batch, 1 + keep, width], and the indices of the patches, [batch,
        keep].
    """
    m: Any = model
    tokens = m._pos_embed(m.patch_embed(images))
    count = tokens.shape[1] - 1
    kept = torch.rand(len(images), count, generator=g).argsort(1)[:, :keep].sort(1).values
    if keep < count:
        patches = tokens[:, 1:].gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([tokens[:, :1], patches], 1)
    return m.norm(m.blocks(tokens)), kept


def losses(
    heads: Heads, tokens: Tensor, kept: Tensor, label: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Compute the loss of each head from the normalised tokens."""
    z, ink = tokens[:, 0], label["ink"]
    patch = F.unfold(ink, 8, stride=8).transpose(1, 2)
    patch = patch.gather(1, kept[:, :, None].expand(-1, -1, 64))
    bce = F.binary_cross_entropy_with_logits
    return {
        "formula": F.cross_entropy(heads.formula(z), label["formula"], label_smoothing=0.05),
        "family": F.cross_entropy(heads.family(z), label["family"]),
        "copies": F.cross_entropy(heads.copies(z), label["copies"]),
        "numbers": F.mse_loss(heads.numbers(z), label["numbers"]),
        "ink": bce(heads.ink(z), F.avg_pool2d(ink, 4).flatten(1)),
        "patch": bce(heads.patch(tokens[:, 1:]), patch),
    }


WEIGHT = {"formula": 1.0, "family": 0.3, "copies": 0.3, "numbers": 1.0, "ink": 3.0, "patch": 1.0}


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised by five Newton-Schulz steps.

    After K. Jordan et al., "Muon" (2024), https://kellerjordan.github.io/posts/muon/, in float32.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all matrices; a fused query-key-value weight counts as three."""
        for group in self.param_groups:
            sizes: dict[Any, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(mean, group["momentum"])
                parts = 3 if p.shape[0] == 3 * p.shape[1] else 1
                for pair in zip(p.chunk(parts), update.chunk(parts), strict=True):
                    sizes.setdefault(pair[0].shape, []).append(pair)
            for pairs in sizes.values():
                updates = self.orthogonalise(torch.stack([update for _, update in pairs]))
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - group["lr"] * 0.05).add_(update, alpha=-group["lr"])

    @staticmethod
    def orthogonalise(m: Tensor) -> Tensor:
        """Return about U Vᵀ of each U S Vᵀ in `m`, [..., rows, columns]; scale tall ones."""
        tall = m.shape[-2] > m.shape[-1]
        x = m.mT if tall else m
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x.mT * (m.shape[-2] / m.shape[-1]) ** 0.5 if tall else x


def optimisers(model: nn.Module, heads: Heads, lr: float, muon_lr: float) -> list[Any]:
    """Give the blocks' matrices to Muon (if `muon_lr` > 0) and the rest to AdamW."""
    named = [*model.named_parameters(), *heads.named_parameters()]
    matrix = [p for n, p in named if n.startswith("blocks") and p.ndim == 2 and muon_lr > 0]
    in_muon = set(map(id, matrix))
    rest = [(n, p) for n, p in named if id(p) not in in_muon]
    groups = [
        {"params": [p for _, p in rest if p.ndim == 2 or p.ndim == 4], "weight_decay": 0.05},
        {"params": [p for _, p in rest if p.ndim not in (2, 4)], "weight_decay": 0.0},
    ]
    result: list[Any] = [torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=True)]
    return [*result, Muon(matrix, muon_lr)] if matrix else result
