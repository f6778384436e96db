"""The base of all updates: a few trained parameters at one site, and their formula.

``formula`` maps the parameters to a ``Delta``. It is the only place that contains the mathematics
of an update: training, merging and the many-task models all call it.
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
    """The trained parameters of one site."""

    @abstractmethod
    def formula(self, **parameters: Tensor) -> Delta | PromptDelta:
        """The delta of these parameters. Leading task axes of the parameters stay in front."""

    def kind(self) -> Hashable:
        """A key that two updates share if one call of ``formula`` can serve both, stacked."""
        simple = (bool, int, float, str)
        constants = (
            (k, v) for k, v in vars(self).items() if isinstance(v, simple) or is_dataclass(v)
        )
        return type(self), *constants, *((n, p.shape) for n, p in self.named_parameters())

    def delta(self) -> Delta | PromptDelta:
        """The delta of this module's own parameters."""
        return self.formula(**dict(self.named_parameters()))


def check_rank(rank: int, in_features: int, out_features: int) -> None:
    """Refuse a rank that an (out, in) matrix cannot have."""
    limit = min(in_features, out_features)
    if not 1 <= rank <= limit:
        raise SettingError(
            f"rank is {rank}, but a {out_features} × {in_features} weight allows 1 to {limit}."
        )
