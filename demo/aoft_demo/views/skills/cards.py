"""Tasks of the fleet as HTML; all texts are escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from aoft_demo.actions.residents import Resident
from aoft_demo.actions.verification import Agreement
from aoft_demo.tasks.shared_fleet import SharedFleet
from aoft_demo.views.charts import Bar, bars
from aoft_demo.views.notices import empty, verdict
from aoft_demo.views.parts import figures, table
from aoft_demo.views.units import size

__all__ = ["agreement_card", "resident_card"]


def resident_card(shared: SharedFleet, tasks: Sequence[Resident]) -> str:
    """Table of the tasks, and their memory beside the backbone's."""
    if not tasks:
        return empty("No tasks", "Add one from its model.ckpt, or train one.")
    own = sum(task.bytes for task in tasks)
    separate = len(tasks) * shared.backbone_bytes + own
    together = shared.backbone_bytes + own
    chart = bars(
        [
            Bar("one model per task", separate, size(separate), colour=2),
            Bar("this fleet", together, size(together)),
            Bar("its tasks alone", own, size(own)),
        ],
        title="Memory for weights",
    )
    rows = "".join(
        f'<tr data-task="{escape(t.name)}" data-bytes="{t.bytes}"><td>{escape(t.name)}</td>'
        f"<td>{t.classes}</td><td>{size(t.bytes)}</td><td>{escape(t.origin)}</td></tr>"
        for t in tasks
    )
    return chart + table("Tasks", ("task", "classes", "memory", "origin"), rows)


def agreement_card(name: str, result: Agreement) -> str:
    """Whether the unmerged model, the merged model and the fleet agree."""
    good = result.agreeing == result.images
    same = "gives the same answers unmerged, merged and in the fleet."
    text = same if good else "gives different answers: see the figures below."
    return verdict(name, text, good=good) + figures(
        ("largest difference of a logit, merged to unmerged", f"{result.merged:.1e}"),
        ("largest difference of a logit, fleet to unmerged", f"{result.fleet:.1e}"),
        ("largest logit", f"{result.largest:.2f}"),
        ("same answer from all three", f"{result.agreeing} of {result.images} pictures"),
    )
