"""How PyTorch computes products of float32: exactly rounded, or in TensorFloat-32 (TF32).

By default, cuDNN computes float32 convolutions of an NVIDIA GPU in TF32, which keeps 10 bits of
the fraction. ``torch.set_float32_matmul_precision`` allows less than float32 for matrix products on
a GPU, and on a CPU too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["float32_products"]


class _Switches:
    """PyTorch's switches. They apply to the whole process, so blocks with one setting share them.

    A block waits while blocks with the other setting run, and later blocks wait behind it.
    """

    def __init__(self) -> None:
        self._entry, self._changed = threading.Lock(), threading.Condition()
        self._blocks, self._tf32, self._before = 0, False, list[str]()

    @contextmanager
    def set(self, tf32: bool) -> Iterator[None]:
        with self._entry, self._changed:
            self._changed.wait_for(lambda: not self._blocks or self._tf32 == tf32)
            if not self._blocks:
                self._tf32, self._before = tf32, [each.fp32_precision for each in _switches()]
                gpu = "tf32" if tf32 else "ieee"
                _write([gpu, gpu, "ieee", "ieee"])
            self._blocks += 1
        try:
            yield
        finally:
            with self._changed:
                self._blocks -= 1
                if not self._blocks:
                    _write(self._before)
                    self._changed.notify_all()


def _switches() -> tuple[Any, ...]:
    """Matrix products and convolutions on a GPU, then on a CPU."""
    from torch import backends

    gpu: Any = backends.cudnn  # its type does not know its switches
    cpu: Any = backends.mkldnn
    return backends.cuda.matmul, gpu.conv, cpu.matmul, cpu.conv


def _write(precisions: Sequence[str]) -> None:
    for switch, precision in zip(_switches(), precisions, strict=True):
        switch.fp32_precision = precision


_SWITCHES = _Switches()


def float32_products(tf32: bool = False) -> Any:
    """Context manager: compute products of float32 in float32, or on an NVIDIA GPU in TF32.

    A GPU's products get the setting that holds when they are launched; they may run after the
    block. PyTorch's own settings return when the last block ends. Blocks must not be nested.

    Args:
        tf32: Whether a GPU computes in TF32.
    """
    return _SWITCHES.set(tf32)
