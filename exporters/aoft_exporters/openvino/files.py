"""Files of an OpenVINO folder."""

from __future__ import annotations

__all__ = ["MARKER", "SECTION", "TASKS", "WEIGHTS"]

MARKER = "openvino_model.xml"
WEIGHTS = "openvino_model.bin"
TASKS = "tasks.safetensors"
"""A fleet's tables."""

SECTION = "aoft"
"""Section of ``rt_info`` that holds the metadata."""
