"""A fast deep copy of modules."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

__all__ = ["copy_structure"]

_ATOMS = (bool, int, float, str, type(None))


def copy_structure(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy(module, memo)`` in a fifth of its time, which is spent on empty dicts."""
    if id(module) in memo:
        known: nn.Module = memo[id(module)]
        return known
    if hasattr(module, "__deepcopy__"):
        own: nn.Module = copy.deepcopy(module, memo)
        return own
    twin = memo[id(module)] = object.__new__(type(module))
    for name, value in vars(module).items():
        if name == "_modules":
            twin.__dict__[name] = {n: c and copy_structure(c, memo) for n, c in value.items()}
        elif isinstance(value, _ATOMS):
            twin.__dict__[name] = value
        elif isinstance(value, (dict, set)) and not value:
            twin.__dict__[name] = type(value)()
        else:
            twin.__dict__[name] = copy.deepcopy(value, memo)
    return twin
