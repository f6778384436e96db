"""The precision that a run computes in, on its device."""

from __future__ import annotations

from typing import Any

import torch

from aoft_deploy.errors import SettingError

__all__ = ["fast_bf16", "precision_on"]


def precision_on(device: torch.device, precision: str) -> str:
    """The precision of a run: ``fp32``, ``tf32`` or ``bf16``.

    Args:
        device: The device that trains.
        precision: One of ``PRECISIONS``; ``auto`` is bf16 if the device is faster in it.

    Raises:
        SettingError: The device does not compute in TF32.
    """
    if precision == "auto":
        return "bf16" if fast_bf16(device) else "fp32"
    if precision == "tf32" and not (device.type == "cuda" and torch.cuda.is_tf32_supported()):
        raise SettingError(
            f"`precision` is 'tf32', but the device {device.type} has no TF32, which NVIDIA GPUs "
            "have from compute capability 8.0: choose `precision=fp32` or `precision=bf16`."
        )
    return precision


def fast_bf16(device: torch.device) -> bool:
    """Whether the hardware computes bfloat16 faster than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        get_capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)  # not in older torch
        found = get_capabilities()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    return False
