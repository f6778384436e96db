"""Where an artefact's nodes are computed, as text and as JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aoft_deploy.artefacts.timing import Subject

__all__ = ["placement_entry", "placement_text"]


def placement_text(placement: Mapping[str, Mapping[str, int]]) -> str:
    """How many nodes each provider computes, and which operators are on the CPU.

    Args:
        placement: Number of nodes by execution provider and operator.
    """
    parts = [
        f"{sum(operators.values())} nodes on {provider}"
        + (f" ({', '.join(operators)})" if provider.startswith("CPU") else "")
        for provider, operators in placement.items()
    ]
    return ", ".join(parts)


def placement_entry(subject: Subject) -> dict[str, Any] | None:
    """JSON values for an artefact on a GPU; None for others, or if its engine does not tell."""
    from aoft_deploy.artefacts.description import ArtefactInfo

    info = ArtefactInfo(subject.engine.info, subject.name)
    if not info.placement or not subject.engine.device.startswith("cuda"):
        return None
    return {
        "name": subject.name,
        "device": subject.engine.device,
        "nodes": info.placement,
        "nodes_on_cpu": info.nodes_on_cpu,
    }
