"""Where the backbone of a checkpoint comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["BackboneSource"]


@dataclass(frozen=True)
class BackboneSource:
    """The backbone to open a checkpoint with.

    Attributes:
        name: timm name to use instead of the one in the checkpoint. A published RLRR .pth and a
            folder that PEFT wrote contain none, so they need it.
        weights: File with the backbone's weights; None uses timm's own.
        force: Accept a backbone that differs from the one trained on.
    """

    name: str | None = None
    weights: Path | None = None
    force: bool = False
