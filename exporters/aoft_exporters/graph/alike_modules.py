"""Find modules of a model that compute the same function of their weights, such as its blocks."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aoft_exporters.graph.tracing import plain_name

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["alike_modules"]

CONTAINERS = ("Sequential", "ModuleList")
"""Types of modules whose children are compared."""

OWN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
"""Attributes of a module that ``_Comparison.modules`` compares by rules of their own."""

PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
"""Types whose values are compared by ``==``."""


def alike_modules(model: nn.Module) -> dict[str, str]:
    """The modules that differ from an earlier sibling in the values of their weights alone.

    Two modules are alike if all their attributes are equal, down to the last submodule. Weights are
    the floating-point parameters and persistent buffers: of these, shapes and types are equal. Only
    the children of lists and sequences are compared. Modules that share a parameter with others are
    left out.

    Returns:
        Paths of modules, and for each the path of the first one like it. Every first one is there
        too, under its own path. Modules without any like them are not, nor are submodules of
        those that are.
    """
    shared = _shared_parameters(model)
    found = dict[str, str]()
    for path, module in model.named_modules():
        if type(module).__name__ not in CONTAINERS or _is_within(path, found):
            continue
        firsts: list[tuple[str, nn.Module]] = []
        likes: dict[str, str] = {}
        for name, child in module.named_children():
            own = f"{path}.{name}" if path else name
            if any(id(parameter) in shared for parameter in child.parameters()):
                continue
            same = (f for f, first in firsts if _Comparison(f, own).modules(first, child))
            first = next(same, own)
            likes[own] = first
            if first == own:
                firsts.append((own, child))
        repeated = {first for own, first in likes.items() if own != first}
        found |= {own: first for own, first in likes.items() if first in repeated}
    return found


def _is_within(path: str, found: Mapping[str, str]) -> bool:
    return any(path == other or path.startswith(f"{other}.") for other in found)


def _shared_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that a model has under more than one name."""
    seen, shared = set[int](), set[int]()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


class _Comparison:
    """Compares two modules of a model.

    Texts that begin with the name of the module that they belong to, such as names of sites, are
    equal if the rest is.

    Args:
        left: Path of the first module.
        right: Path of the second module.
    """

    def __init__(self, left: str, right: str) -> None:
        self.left, self.right = plain_name(f"{left}."), plain_name(f"{right}.")
        self.pairs = set[tuple[int, int]]()  # compared before, or being compared

    def modules(self, a: nn.Module, b: nn.Module) -> bool:
        """Whether two modules are alike."""
        if type(a) is not type(b):
            return False
        if a is b or (id(a), id(b)) in self.pairs:
            return True
        self.pairs.add((id(a), id(b)))
        kept = a._non_persistent_buffers_set
        return (
            kept == b._non_persistent_buffers_set
            and self.weights(a._parameters, b._parameters, set())
            and self.weights(a._buffers, b._buffers, kept)
            and list(a._modules) == list(b._modules)
            and all(map(self._children, a._modules.values(), b._modules.values()))
            and self.values(_others(a), _others(b))
        )

    def _children(self, a: nn.Module | None, b: nn.Module | None) -> bool:
        return a is b or (a is not None and b is not None and self.modules(a, b))

    def weights(self, a: Mapping[str, Any], b: Mapping[str, Any], by_value: set[str]) -> bool:
        """Whether parameters or buffers agree; those in ``by_value`` and integers in each value."""
        if list(a) != list(b):
            return False
        for name, left in a.items():
            right = b[name]
            if left is None or right is None:
                if left is not right:
                    return False
            elif left.shape != right.shape or left.dtype != right.dtype:
                return False
            elif name in by_value or not left.is_floating_point():
                if not _equal(left, right):
                    return False
        return True

    def values(self, a: Any, b: Any) -> bool:
        """Whether two attributes agree. Objects of unknown types agree with themselves only."""
        import torch

        if a is b:
            return True
        if type(a) is not type(b):
            return False
        if isinstance(a, torch.nn.Module):  # no child: one around it, or one elsewhere
            return (id(a), id(b)) in self.pairs
        if isinstance(a, torch.Tensor):
            return a.shape == b.shape and a.dtype == b.dtype and _equal(a, b)
        if isinstance(a, str):
            return a == b or self._below(a, b)
        if isinstance(a, PLAIN) or isinstance(a, (torch.dtype, torch.device, torch.Size)):
            return bool(a == b)
        if isinstance(a, Mapping):
            return list(a) == list(b) and all(self.values(a[key], b[key]) for key in a)
        if isinstance(a, (list, tuple)):
            return self._sequences(a, b)
        if isinstance(a, (set, frozenset)):
            return all(isinstance(each, PLAIN) for each in a) and a == b
        if isinstance(a, functools.partial):
            return self._sequences((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
        if isinstance(a, types.MethodType):
            return a.__func__ is b.__func__ and self.values(a.__self__, b.__self__)
        return False

    def _sequences(self, a: Sequence[Any], b: Sequence[Any]) -> bool:
        return len(a) == len(b) and all(map(self.values, a, b))

    def _below(self, a: str, b: str) -> bool:
        inside = a.startswith(self.left) and b.startswith(self.right)
        return inside and a[len(self.left) :] == b[len(self.right) :]


def _others(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in OWN}


def _equal(a: Tensor, b: Tensor) -> bool:
    import torch

    return torch.equal(a, b)
