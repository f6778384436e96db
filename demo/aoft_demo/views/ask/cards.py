"""Answers as HTML; all texts are escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from shlex import quote

from aoft_demo.actions.classify import Answers
from aoft_demo.actions.residents import Resident
from aoft_demo.actions.skill_cards import SkillCard
from aoft_demo.tasks.shared_fleet import SharedFleet
from aoft_demo.views.parts import show_code
from aoft_demo.views.units import decimal, duration, size
from aoft_deploy.classes import Answer, Value

__all__ = ["answer_cards", "for_picture", "header"]

FEW = 4
"""Cards that are set in two columns."""


def header(shared: SharedFleet, tasks: Sequence[Resident]) -> str:
    """Title of the page, and what the tasks share."""
    own = sum(task.bytes for task in tasks)
    backbone, count = shared.backbone_bytes, len(tasks)
    if not tasks:
        text = f"One {size(backbone)} model waits for skills."
    elif count == 1:
        text = f"<b>1 skill</b> of {size(own)} on one {size(backbone)} model."
    else:
        saved = f"<b>{size(backbone + own)}</b> in memory instead of {size(count * backbone + own)}"
        text = (
            f"<b>{count} skills</b> of about {size(own / count)} share one {size(backbone)} model: "
            f"{saved}."
        )
    return (
        '<div class="head"><h1>One picture, one pass, many skills</h1>'
        f"<p>{text} Everything stays on this machine.</p></div>"
    )


def for_picture(html: str, picture: str) -> str:
    """Mark HTML with the picture that it belongs to."""
    return f'<div data-picture="{escape(picture)}">{html}</div>'


def answer_cards(
    answers: Answers, cards: dict[str, SkillCard], difference: float | None, saved: float
) -> str:
    """A card for each task, and the four facts that the other views prove.

    Args:
        answers: The answers.
        cards: What is known about the tasks, by their names.
        difference: Largest difference of a logit between merged and unmerged models, if known.
        saved: Memory of separate models divided by that of the fleet.
    """
    found = answers.predictions
    outside = [
        name
        for name, best in found.items()
        if _fits_not(best, cards[name]) and not _is_unsure(best, cards[name])
    ]
    shown = "".join(_card(name, found[name], cards[name]) for name in found if name not in outside)
    shown += _group(outside, answers, cards)
    few = " few" * (len(found) - len(outside) <= FEW)
    count = len(found)
    return (
        f'<p class="hidden" role="status">{count} answer{"s" * (count != 1)}</p>'
        f'<div class="cards{few}" tabindex="0" role="group" aria-label="Answers">{shown}</div>'
        f"{_strip(answers, difference, saved)}{_code(list(answers.predictions))}"
    )


def _is_unsure(best: Sequence[Answer], card: SkillCard) -> bool:
    """Whether a task's best answer is too improbable to be shown as its answer."""
    probability = getattr(best[0], "probability", None) if best else None
    return probability is not None and probability < card.threshold


def _fits_not(best: Sequence[Answer], card: SkillCard) -> bool:
    """Whether a task's best answer is that its question does not fit the picture."""
    top = best[0] if best else None
    return top is not None and not isinstance(top, Value) and top.label == card.none_class


def _group(names: Sequence[str], answers: Answers, cards: dict[str, SkillCard]) -> str:
    """The tasks that were not made for the picture, folded away if there are several."""
    shown = "".join(_card(name, answers.predictions[name], cards[name]) for name in names)
    if len(names) < 2:
        return shown
    labels = " or ".join(dict.fromkeys(str(cards[name].none_class) for name in names))
    listed = " · ".join(names)
    return (
        f'<details class="group"><summary><b>{len(names)} skills say “{escape(labels)}”:</b> '
        f'{escape(listed)}</summary><div class="cards">{shown}</div></details>'
    )


def _strip(answers: Answers, difference: float | None, saved: float) -> str:
    """Four facts, each a link to the view that proves it."""
    count = len(answers.predictions)
    same = "" if difference is None else f" ± {decimal(difference, 1)}"
    facts = (
        ("race", duration(answers.seconds), f"one pass, {count} skill{'s' * (count != 1)}"),
        ("skills", duration(answers.switch), "to switch skills"),
        ("prove", "same answers ✓", f"merged = unmerged{same}"),
        ("memory", f"{saved:.1f}× less", "memory than separate models"),
    )
    links = "".join(
        f'<a href="#{target}"><b>{escape(value)}</b> <span>{escape(text)}</span></a>'
        for target, value, text in facts
    )
    pixels = f"{answers.width} × {answers.height} pixels"
    return f'<nav class="strip" aria-label="Proofs" data-pixels="{pixels}">{links}</nav>'


def _card(name: str, best: Sequence[Answer], card: SkillCard) -> str:
    top = best[0] if best else None
    unsure, none = _is_unsure(best, card), _fits_not(best, card)
    headline = "Not sure" if unsure else _headline(top)
    others = "".join(map(_line, best[1:]))
    more = f"<details><summary>Other answers</summary>{others}</details>" if others else ""
    guess = f"best guess: {_headline(top)}" if unsure else ""
    about = " · ".join(filter(None, [guess, *_about(card)]))
    return (
        f'<section class="card{" quiet" * (unsure or none)}" data-task="{escape(name)}" '
        f'aria-label="{escape(card.question)}"><h2>{escape(card.question)}</h2>'
        f'<div class="top">{escape(headline)}</div>{_line(top) if top else ""}'
        f'<p class="about">{escape(about)}</p>{more}</section>'
    )


def _about(card: SkillCard) -> list[str]:
    """What a task was made for, and how often it is right."""
    made = f"for {card.made_for}" if card.made_for else "your own skill"
    right = card.right
    return [made, right]


def _headline(top: Answer | None) -> str:
    if top is None:
        return "None of them"
    return str(top) if isinstance(top, Value) else top.label


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


def _code(names: Sequence[str]) -> str:
    """How to get the same answers without the page."""
    files = [f"{name}.ckpt" for name in names]
    return show_code(
        Shell=f"aoft-export --fleet {' '.join(map(quote, files))} -o fleet.onnx\n"
        f"aoft-predict fleet.onnx picture.png --task {quote(names[0])}",
        Python=f"""
from aoft_deploy import export_fleet
from aoft_deploy.data.images import read_image
from aoft_deploy.fleet.fleet import Fleet

tasks = {list(names)}
export_fleet([f"{{task}}.ckpt" for task in tasks], "fleet.onnx")
fleet = Fleet("fleet.onnx")
row = fleet.preprocessing(read_image("picture.png"))
batch = row[None].repeat(len(tasks), 0)  # one picture, one row for each skill
for task, answer in zip(tasks, fleet.predict(batch, tasks)):
    print(task, answer.answers(1)[0])
""",
    )
