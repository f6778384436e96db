"""Verify an artefact also on this machine's GPU, if the CPU has verified it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import Engine, EngineOptions
from aoft_deploy.artefacts.exporter import Exporter
from aoft_deploy.artefacts.verification import Report
from aoft_deploy.errors import AoftError, VerificationError

__all__ = ["GpuVerification", "verify_on_gpu"]


@dataclass(frozen=True)
class GpuVerification:
    """What is known of an artefact on a GPU.

    Attributes:
        device: Name of the GPU; None if there is none.
        report: Comparison of the GPU's answers with those of the unmerged model; None if the GPU
            does not run the artefact.
        reason: Why there is no report; empty if there is one.
        placement: Number of nodes by execution provider and operator.
        nodes_on_cpu: Name and operator of each node that is computed on the CPU.
    """

    device: str | None
    report: Report | None = None
    reason: str = ""
    placement: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    nodes_on_cpu: Sequence[Mapping[str, str]] = ()

    @property
    def verified_on(self) -> str | None:
        """Name of the GPU that gave the unmerged model's answers, or None."""
        return None if self.report is None else self.device

    def to_dict(self) -> dict[str, Any]:
        """JSON values for the manifest."""
        device = {} if self.device is None else {"device": self.device}
        if self.report is None:
            return {"verified": False, **device, "reason": self.reason}
        return {
            "verified": True,
            **device,
            "max_abs": self.report.max_abs,
            "relative": self.report.relative,
            "agreement": self.report.agreement,
            "nodes": {name: sum(found.values()) for name, found in self.placement.items()},
            "nodes_on_cpu": [dict(node) for node in self.nodes_on_cpu],
        }


def verify_on_gpu(
    exporter: Exporter, draft: Path, verify: Callable[[Engine], Report]
) -> GpuVerification | None:
    """Open a draft on this machine's GPU and verify it there, as on the CPU before.

    Args:
        exporter: The exporter.
        draft: The artefact.
        verify: Compares an engine's answers with those of the unmerged model.

    Returns:
        The result, also if there is no GPU or the GPU does not run the artefact. None if artefacts
        of the exporter run on one kind of device only.

    Raises:
        VerificationError: The GPU runs the artefact, but fails or gives other answers.
    """
    if exporter.gpu is None:
        return None
    runtime, device = exporter.engines[0], exporter.gpu()
    if device is None:
        reason = f"{runtime} finds no GPU on this machine, so only the CPU verified the artefact"
        return GpuVerification(None, reason=reason)
    try:
        engine = exporter.load(draft, EngineOptions(device="cuda"))
    except AoftError as error:
        return GpuVerification(device, reason=str(error).replace(str(draft), draft.name))
    try:
        report = verify(engine)
    except AoftError as error:
        reason = str(error).replace(str(draft), draft.name)
        raise VerificationError(
            f"The CPU verified the artefact, but {device} did not. {reason} To export for CPUs "
            "alone, hide the GPU: set the environment variable CUDA_VISIBLE_DEVICES to -1."
        ) from error
    info = ArtefactInfo(engine.info)
    return GpuVerification(device, report, "", info.placement, info.nodes_on_cpu)
