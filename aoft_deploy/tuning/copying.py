"""A fast deep copy of modules."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

__all__ = ["copy_structure"]

_ATOMS = (bool, int, float, str, type(None))


def copy_structure(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy(module, memo)``, five times faster: it does not deep-copy empty dicts."""
    if id(module) in memo:
        copied: nn.Module = memo[id(module)]
        return copied
    if hasattr(module, "__deepcopy__"):
        deep: nn.Module = copy.deepcopy(module, memo)
        return deep
    result = memo[id(module)] = object.__new__(type(module))
    for name, value in vars(module).items():
        if name == "_modules":
            result.__dict__[name] = {n: c and copy_structure(c, memo) for n, c in value.items()}
        elif isinstance(value, _ATOMS):
            result.__dict__[name] = value
        elif isinstance(value, (dict, set)) and not value:
            result.__dict__[name] = type(value)()
        else:
            result.__dict__[name] = copy.deepcopy(value, memo)
    return result
