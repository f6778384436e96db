"""A lock for the calls that may not run beside the recording of a CUDA graph.

While a stream of a GPU is recorded, other threads may replay graphs and copy between buffers that
exist. They may not synchronise the device, and may not allocate device or pinned memory if the
recording is in CUDA's global mode. PyTorch records one graph at a time in a process.
"""

from __future__ import annotations

import threading

__all__ = ["GPU_SETUP"]

GPU_SETUP = threading.RLock()
"""Held by an engine while it allocates, warms up and records on a GPU, which it does when it loads.
"""
