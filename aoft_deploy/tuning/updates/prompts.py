"""VPT: trained prompt tokens of a transformer block."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from aoft_deploy.tuning.updates.delta import PromptDelta
from aoft_deploy.tuning.updates.update import Update

__all__ = ["Prompts"]


class Prompts(Update):
    """VPT (arXiv 2203.12119): trained tokens that a block processes beside its own.

    The initial values are uniform in ±√(6 / (3 · patch² + embed_dim)), as in the published code.

    Args:
        width: Width of the tokens.
        rank: Number of prompts.
        patch: Side of the backbone's patches in pixels.
        generator: Random generator for the initial values.
        embed_dim: Width of the patch embedding, if it differs from ``width``; 0 means ``width``.
            The tokens of later stages are wider.
    """

    def __init__(
        self, width: int, rank: int, patch: int, generator: Generator, embed_dim: int = 0
    ) -> None:
        super().__init__()
        bound = (6 / (3 * patch**2 + (embed_dim or width))) ** 0.5
        tokens = torch.empty(rank, width)
        self.tokens = nn.Parameter(tokens.uniform_(-bound, bound, generator=generator))

    def formula(self, tokens: Tensor) -> PromptDelta:  # type: ignore[override]
        """The trained tokens themselves. tokens: (..., prompts, width)."""
        return PromptDelta(tokens)
