"""Answers as HTML; all texts are escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from aoft_demo.actions.classify import Answers
from aoft_demo.actions.residents import Resident
from aoft_demo.tasks.shared_fleet import SharedFleet
from aoft_demo.views.parts import facts
from aoft_demo.views.units import duration, size
from aoft_deploy.classes import Answer, Value

__all__ = ["answer_cards", "for_picture", "header"]


def header(shared: SharedFleet, tasks: Sequence[Resident]) -> str:
    """Title of the page, with the sizes of the tasks and of the backbone."""
    own = sum(task.bytes for task in tasks)
    name = str(shared.backbone.get("name", "backbone"))
    return (
        '<div class="head"><h1>Many tasks, one backbone</h1><p>'
        f"<b>{len(tasks)}</b> task{'s' * (len(tasks) != 1)}, {size(own)} in total, on one "
        f"<b>{escape(name)}</b> of {size(shared.backbone_bytes)}. Everything stays on this machine."
        "</p></div>"
    )


def for_picture(html: str, picture: str) -> str:
    """Mark HTML with the picture that it belongs to."""
    return f'<div data-picture="{escape(picture)}">{html}</div>'


def answer_cards(answers: Answers) -> str:
    """A card for each task, and the duration of the pass."""
    count = len(answers.predictions)
    tasks = f"{count} tasks" if count > 1 else "1 task"
    shown = facts(
        f"<b>{duration(answers.seconds)}</b> for one pass, {tasks}",
        f"<b>{duration(answers.seconds / count)}</b> per task",
        f"<b>{duration(answers.switch)}</b> to switch tasks",
        f"{answers.width} × {answers.height} pixels",
    )
    cards = "".join(
        f'<section class="card" data-task="{escape(name)}"><h3>{escape(name)}</h3>'
        f'<div class="top">{escape(_headline(best))}</div>{"".join(map(_line, best))}</section>'
        for name, best in answers.predictions.items()
    )
    return f'{shown}<div class="cards" tabindex="0" aria-label="Answers">{cards}</div>'


def _headline(best: Sequence[Answer]) -> str:
    if not best:
        return "no label"
    return str(best[0]) if isinstance(best[0], Value) else best[0].label


def _line(answer: Answer) -> str:
    name = f'<span class="name">{escape(answer.label)}</span>'
    if isinstance(answer, Value):
        value = f'<span class="value">{answer.value:.6g}</span>'
        return f'<div class="line" data-label="{escape(answer.label)}">{name}{value}</div>'
    return (
        f'<div class="line" data-label="{escape(answer.label)}" data-p="{answer.probability:.6f}">'
        f'{name}<span class="bar"><i class="b1" style="width:{100 * answer.probability:.1f}%"></i>'
        f'</span><span class="value">{answer.probability:.1%}</span></div>'
    )
