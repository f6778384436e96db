"""Tests on each device: the CPU always, a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])]
)
"""Runs a test with ``device="cpu"``, and with ``device="cuda"``."""
