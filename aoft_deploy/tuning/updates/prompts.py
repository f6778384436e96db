"""Prompts: free tokens that a block sees beside its own."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from aoft_deploy.tuning.updates.delta import PromptDelta
from aoft_deploy.tuning.updates.update import Update

__all__ = ["Prompts"]


class Prompts(Update):
    """VPT (arXiv 2203.12119): trained tokens beside a block's own.

    Starts uniform in ±√(6 / (3 · patch² + embed_dim)), as the published code does.

    Args:
        width: Width of the tokens.
        rank: Number of prompts.
        patch: Side of the backbone's patches in pixels.
        generator: Source of the randomness.
        embed_dim: Width of the patch embedding, where a later stage's tokens are wider; 0 for
            ``width``.
    """

    def __init__(
        self, width: int, rank: int, patch: int, generator: Generator, embed_dim: int = 0
    ) -> None:
        super().__init__()
        bound = (6 / (3 * patch**2 + (embed_dim or width))) ** 0.5
        tokens = torch.empty(rank, width)
        self.tokens = nn.Parameter(tokens.uniform_(-bound, bound, generator=generator))

    def formula(self, tokens: Tensor) -> PromptDelta:  # type: ignore[override]
        """The prompts as they are. tokens: (..., prompts, width)."""
        return PromptDelta(tokens)
