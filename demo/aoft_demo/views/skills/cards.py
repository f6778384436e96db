"""The tasks of a session as rows, and their memory; all texts are escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from aoft_demo.actions.residents import Resident
from aoft_demo.actions.skill_cards import SkillCard
from aoft_demo.tasks.session import Session
from aoft_demo.views.notices import empty
from aoft_demo.views.parts import show_code
from aoft_demo.views.units import size

__all__ = ["rows"]

ORIGINS = {"initial": "built in", "added": "added by you", "trained": "taught by you"}

DROP = (
    '<div class="drop"><p>Drop <b>model.ckpt</b> files or their folders here.</p>'
    '<button type="button" class="plain" data-act="choose">Choose files</button>'
    '<input type="file" multiple accept=".ckpt,.safetensors" aria-label="Add skills" '
    'tabindex="-1" hidden><p class="sending" role="status"></p></div>'
)

CODE = show_code(
    Shell="aoft-serve fleet.onnx --store checkpoints/",
    Python="""
from aoft_deploy.fleet.fleet import Fleet

fleet = Fleet("fleet.onnx")
fleet.add("model.ckpt", "my skill")  # writes one row of the tables; nothing is loaded again
print(sorted(fleet.tasks))
fleet.remove("my skill")
""",
)


def rows(session: Session, tasks: Sequence[Resident], about: Mapping[str, SkillCard]) -> str:
    """The memory, a row for each task, and the place to add more.

    Args:
        session: The session.
        tasks: Its tasks.
        about: What is known about the tasks, by their names.
    """
    listed = "".join(_row(task, about[task.name], task.name not in session.off) for task in tasks)
    undo = ""
    if session.removed is not None:
        undo = (
            f'<div class="undo" role="status"><span>{escape(session.removed)} was removed.</span>'
            '<button type="button" class="plain" data-act="restored">Undo</button></div>'
        )
    body = (
        f'<ul class="rows" tabindex="0" aria-label="Skills">{listed}</ul>'
        if tasks
        else empty("No skills", "Add one from its model.ckpt, or teach one.")
    )
    memory = _memory(session.shared.backbone_bytes, tasks) if tasks else ""
    return f"{memory}{undo}{body}{DROP}{CODE}"


def _row(task: Resident, card: SkillCard, on: bool) -> str:
    name = escape(task.name)
    right = card.right
    classes = f"{task.classes} answer{'s' * (task.classes != 1)}"
    facts = " · ".join(filter(None, [size(task.bytes), classes, ORIGINS[task.origin], right]))
    title = escape(card.question)
    small = f"<small>{name}</small>" if card.question != task.name else ""
    return (
        f'<li data-task="{name}" data-bytes="{task.bytes}">'
        f'<button type="button" class="switch" role="switch" aria-checked="{str(on).lower()}" '
        f'aria-label="Ask: {title} {name}" data-act="switched" data-name="{name}"></button>'
        f'<div class="what"><b>{title}</b>{small}<p>{escape(facts)}</p></div>'
        f'<button type="button" class="plain" data-act="proved" data-name="{name}" '
        f'aria-label="Prove it: {name}">Prove it</button>'
        f'<button type="button" class="remove" data-act="removed" data-name="{name}" '
        f'aria-label="Remove {name}" title="Remove">✕</button></li>'
    )


def _memory(backbone: int, tasks: Sequence[Resident]) -> str:
    """Bars: memory for the weights, here and as separate models."""
    own = sum(task.bytes for task in tasks)
    together, separate = backbone + own, len(tasks) * backbone + own
    bars = "".join(
        f'<div class="line"><span class="name">{name}</span><span class="bar">'
        f'<i class="{colour}" style="width:{100 * value / separate:.1f}%"></i></span>'
        f'<span class="value">{size(value)}</span></div>'
        for name, value, colour in (
            ("here: one model and its skills", together, "b1"),
            ("as separate models", separate, "b2"),
        )
    )
    return f'<section class="memory" aria-label="Memory">{bars}</section>'
