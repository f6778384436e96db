"""Names of an OpenVINO folder's files and of its metadata section."""

from __future__ import annotations

__all__ = ["FLOAT_LAYERS", "MARKER", "SECTION", "TASKS", "WEIGHTS"]

MARKER = "openvino_model.xml"
WEIGHTS = "openvino_model.bin"
TASKS = "tasks.safetensors"
"""Tables of a fleet's tasks."""

SECTION = "aoft"
"""Section of ``rt_info`` that holds the metadata."""

FLOAT_LAYERS = "float_layers"
"""Metadata key of the precision of the layers that int8 leaves in float: ``fp32`` or ``bf16``."""
