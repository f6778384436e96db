"""Which execution provider computes each operator of a session."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aoft_deploy.errors import SettingError

__all__ = [
    "CPU_PROVIDER",
    "RECORD_PLACEMENT",
    "check_placement",
    "placement_of",
    "placement_texts",
]

CPU_PROVIDER = "CPUExecutionProvider"
RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"
"""Session option without which ONNX Runtime does not keep the placement."""

SHAPE_OPERATORS = frozenset(
    "Add And Cast Concat Constant ConstantOfShape Div Equal Gather Greater Identity Less Max Min "
    "Mod Mul Not Or Range ReduceProd Reshape Shape Size Slice Squeeze Sub Unsqueeze Where".split()
)
"""Operators that also compute shapes. ONNX Runtime places those of shapes on the CPU on purpose.

Where they compute on images, ONNX Runtime copies to the CPU and back, and refuses to record.
"""


def placement_of(session: Any) -> dict[str, dict[str, int]]:
    """Number of nodes by provider and operator, most frequent first.

    Args:
        session: A session that was opened with ``RECORD_PLACEMENT``.
    """
    counts: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        counts.setdefault(part.ep_name, Counter()).update(map(_operator, part.get_nodes()))
    return {provider: dict(found.most_common()) for provider, found in counts.items()}


def placement_texts(session: Any) -> dict[str, str]:
    """Metadata of an engine on a GPU, as JSON; ``ArtefactInfo`` parses them.

    Args:
        session: As for ``placement_of``.

    Returns:
        ``placement``, and ``nodes_on_cpu``: name and operator of each node that the CPU computes.
    """
    parts = session.get_provider_graph_assignment_info()
    on_cpu = [node for part in parts if part.ep_name == CPU_PROVIDER for node in part.get_nodes()]
    named = [{"name": str(node.name), "operator": _operator(node)} for node in on_cpu]
    return {"placement": json.dumps(placement_of(session)), "nodes_on_cpu": json.dumps(named)}


def _operator(node: Any) -> str:
    """Domain, unless it is ONNX's own, and type of a node."""
    return f"{node.domain}.{node.op_type}".lstrip(".")


def check_placement(
    placement: Mapping[str, Mapping[str, int]], path: Path, device: str, version: str
) -> None:
    """Check that the CPU computes nothing but shapes.

    Args:
        placement: The result of ``placement_of``.
        path: The file that the error names.
        device: The device that was asked for.
        version: Version of ONNX Runtime.

    Raises:
        SettingError: It does.
    """
    on_cpu = placement.get(CPU_PROVIDER, {})
    layers = {name: count for name, count in on_cpu.items() if name not in SHAPE_OPERATORS}
    if layers:
        named = ", ".join(f"{name} ({count})" for name, count in layers.items())
        raise SettingError(
            f"{path} cannot run on {device}: ONNX Runtime {version} would compute these of its "
            f'operators on the CPU: {named}. Choose `device="cpu"`, or export in another '
            "`precision`."
        )
