"""Verify a quantised artefact again, with its float layers in a lower precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import Engine, EngineOptions
from aoft_deploy.artefacts.exporter import Exporter
from aoft_deploy.artefacts.verification import Report
from aoft_deploy.errors import VerificationError

__all__ = ["LoweredLayers", "lower_float_layers"]


@dataclass(frozen=True)
class LoweredLayers:
    """The verification of an artefact whose float layers are computed in a lower precision.

    Attributes:
        precision: The lower precision.
        report: Comparison with the unmerged model, in the lower precision.
        in_fp32: The comparison in fp32, as on machines without the lower precision.
    """

    precision: str
    report: Report
    in_fp32: Report

    def to_dict(self) -> dict[str, Any]:
        """JSON values for the manifest's entry ``verification``."""
        report = self.in_fp32
        return {
            "float_layers": {
                "precision": self.precision,
                "in_fp32": {
                    "max_abs": report.max_abs,
                    "relative": report.relative,
                    "agreement": report.agreement,
                },
            }
        }


def lower_float_layers(
    exporter: Exporter,
    draft: Path,
    info: ArtefactInfo,
    in_fp32: Report,
    verify: Callable[[Engine], Report],
) -> LoweredLayers | None:
    """State the lower precision in a verified draft if it is faster here and the answers hold.

    Args:
        exporter: The exporter.
        draft: The artefact; its float layers are stated to be in fp32.
        info: Metadata of the artefact.
        in_fp32: The verification of the draft as it is.
        verify: Compares an engine's answers with those of the unmerged model.

    Returns:
        The verification in the lower precision. None if the draft stays as it is.
    """
    layers = exporter.float_layers
    if layers is None or info.precision not in layers.precisions:
        return None
    if not layers.is_faster(info.flops or 0):
        return None
    layers.state(draft, layers.lower)
    try:
        report = verify(exporter.load(draft, EngineOptions()))
    except VerificationError:
        layers.state(draft, "fp32")
        return None
    return LoweredLayers(layers.lower, report, in_fp32)
