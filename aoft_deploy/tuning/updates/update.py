"""The kinds of update: a few trained numbers each, and the one formula that they stand for.

``formula`` maps the numbers to a ``Delta`` and is the only place where a method's mathematics
stands; training, merging and the many-task engine all call it. Parameters may carry leading task
axes, and the delta then carries them too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import is_dataclass

from torch import Tensor, nn

from aoft_deploy.errors import SettingError
from aoft_deploy.tuning.updates.delta import Delta, PromptDelta

__all__ = ["Update", "check_rank"]


class Update(nn.Module, ABC):
    """Trained numbers of one site."""

    @abstractmethod
    def formula(self, **parameters: Tensor) -> Delta | PromptDelta:
        """The delta that these parameters stand for."""

    def kind(self) -> Hashable:
        """What two updates have in common if one call of ``formula`` can serve both, stacked."""
        plain = (bool, int, float, str)
        constants = (
            (k, v) for k, v in vars(self).items() if isinstance(v, plain) or is_dataclass(v)
        )
        return type(self), *constants, *((n, p.shape) for n, p in self.named_parameters())

    def delta(self) -> Delta | PromptDelta:
        """The delta of this module's own parameters."""
        return self.formula(**dict(self.named_parameters()))


def check_rank(rank: int, in_features: int, out_features: int) -> None:
    """Refuse a rank that no (out, in) matrix can have."""
    limit = min(in_features, out_features)
    if not 1 <= rank <= limit:
        raise SettingError(
            f"rank is {rank}, but a {out_features} × {in_features} weight allows 1 to {limit}."
        )
