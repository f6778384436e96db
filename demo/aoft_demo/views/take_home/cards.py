"""An exported task as HTML; all texts are escaped."""

from __future__ import annotations

from aoft_demo.actions.export import ExportedTask
from aoft_demo.views.notices import success
from aoft_demo.views.parts import figures
from aoft_demo.views.units import size

__all__ = ["export_card"]


def export_card(name: str, exported: ExportedTask) -> str:
    """What was written, and the result of its verification."""
    report = exported.report
    allowed = "–" if report.tolerance is None else f"{report.tolerance:.1e}"
    return success(name, "is merged and verified.") + figures(
        ("file", f"{exported.path.name}, {size(exported.size)}"),
        ("largest difference of a logit from the unmerged model", f"{report.max_abs:.1e}"),
        ("allowed difference", allowed),
        ("same class", f"{report.agreement:.1%} of {report.images} pictures"),
        ("batch sizes", ", ".join(map(str, report.batch_sizes))),
    )
