"""The progress of a training, its result, and the answers of the new skill, as HTML."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from urllib.parse import quote

from aoft_demo.actions.skill_cards import percent
from aoft_demo.actions.train import Plan, TrainingProgress
from aoft_demo.views.charts import Line, lines
from aoft_demo.views.parts import show_code
from aoft_deploy.classes import Answer, Prediction

__all__ = ["answer_card", "progress_card", "result_card", "waiting_card"]

SHOWN = (
    "backbone",
    "backbone_weights",
    "img_size",
    "method",
    "method_settings",
    "epochs",
    "batch_size",
    "augment",
)
"""Settings that the code shows."""


def waiting_card(before: int) -> str:
    """While other trainings run first.

    Args:
        before: Number of trainings before this one.
    """
    text = "1 training" if before == 1 else f"{before} trainings"
    return _running(f"{text} before yours", "It starts by itself.", None, "")


def progress_card(name: str, progress: TrainingProgress | None) -> str:
    """A training that runs: the time left, the best so far in words, and the curve.

    Args:
        name: Name of the skill.
        progress: Its progress; None while the pictures are prepared.
    """
    if progress is None:
        return _running("Preparing the pictures", "", None, "")
    if not progress.lines:
        about = "" if progress.left is None else f" (about {max(math.ceil(progress.left), 1)} s)"
        return _running(f"Starting{about}", "", None, "")
    done, epochs = len(progress.lines), progress.plan.settings.epochs
    left = "finishing" if done == epochs else f"about {_seconds(progress.left or 0)} left"
    best = max(float(line["val_accuracy"]) for line in progress.lines)
    words = f"Best so far: {_right(best, progress.plan.val)} kept aside."
    return _running(f"Learning {name}: {left}", words, done / epochs, _curve(progress))


def result_card(name: str, progress: TrainingProgress) -> str:
    """A finished training: how often the skill is right, and what can be done with it."""
    plan = progress.plan
    val = max(float(line["val_accuracy"]) for line in progress.lines)
    if progress.test is None:
        share, count = val, plan.val
        note = (
            "These few pictures also chose the best round, so the figure flatters. Add pictures to "
            "get a real test."
        )
    else:
        share, count = progress.test, plan.test
        note = (
            f"It learned from {plan.train} pictures; {plan.val} others chose the best round. The "
            "last pictures of each camera burst are kept aside, since neighbours are almost equal."
        )
    place = quote(name, safe="")
    return (
        f'<div class="training done" data-skill="{escape(name)}">'
        f'<div class="verdict good" role="status"><b>{escape(name)}</b> is ready: '
        f"{_right(share, count)} that were not used for training "
        f'(<b data-accuracy="{share:.6f}">{percent(share)}</b>).</div>'
        f'<p class="note">{escape(note)}</p>'
        f'<p class="links"><a href="#ask">See it on Ask</a>'
        f'<a href="#take-home/{place}">Take it home</a></p>'
        f"<details><summary>How it learned, in {progress.seconds:.0f} s</summary>"
        f"{_curve(progress)}</details>{_code(name, plan)}</div>"
    )


def answer_card(name: str, answers: Sequence[Answer]) -> str:
    """The answers of a skill, as bars."""
    top = "no label"
    if answers:
        best = answers[0]
        top = best.label if isinstance(best, Prediction) else str(best)
    rows = "".join(_row(answer) for answer in answers)
    return (
        f'<section class="card" data-task="{escape(name)}"><div class="top" role="status">'
        f"{escape(top)}</div>{rows}</section>"
    )


def _row(answer: Answer) -> str:
    label = f'<span class="name">{escape(answer.label)}</span>'
    if not isinstance(answer, Prediction):
        value = f'<span class="value">{answer.value:.6g}</span>'
        return f'<div class="line" data-label="{escape(answer.label)}">{label}{value}</div>'
    share = answer.probability
    return (
        f'<div class="line" data-label="{escape(answer.label)}" data-p="{share:.6f}">{label}'
        f'<span class="bar"><i class="b1" style="width:{100 * share:.1f}%"></i></span>'
        f'<span class="value">{share:.0%}</span></div>'
    )


def _running(title: str, words: str, share: float | None, chart: str) -> str:
    """A training that waits or runs; a share of None is not known yet."""
    width, now = "", ""
    if share is not None:
        width, now = f"width:{100 * share:.1f}%", f' aria-valuenow="{100 * share:.0f}"'
    return (
        f'<div class="training running"><h2>{escape(title)}</h2>'
        f'<div class="progress{" unknown" if share is None else ""}" role="progressbar" '
        f'aria-label="Training" aria-valuemin="0" aria-valuemax="100"{now}>'
        f'<i style="{width}"></i></div>'
        f'<p role="status">{escape(words)}</p>{chart}</div>'
    )


def _right(share: float, count: int) -> str:
    """A share of pictures in words."""
    return f"right on {round(share * count)} of {count} picture{'s' * (count != 1)}"


def _seconds(left: float) -> str:
    """A remaining time, in steps that suit an estimate; at least a second."""
    if left < 10:
        return f"{max(math.ceil(left), 1)} s"
    if left < 90:
        return f"{5 * math.ceil(left / 5)} s"
    return f"{math.ceil(left / 60)} minutes"


def _curve(progress: TrainingProgress) -> str:
    """Accuracy after each epoch."""
    points = list(enumerate(progress.lines, 1))
    train = [(float(i), float(line["train_accuracy"])) for i, line in points]
    val = [(float(i), float(line["val_accuracy"])) for i, line in points]
    return lines(
        [Line("pictures it learns from", train, 2), Line("pictures kept aside", val, 1)],
        x=(1, max(progress.plan.settings.epochs, 2)),
        y=(0, 1),
        x_label="round",
        y_label="How often it is right",
        percent=True,
        integers=True,
    )


def _code(name: str, plan: Plan) -> str:
    """The command and the Python lines that train the same skill from a folder of pictures."""
    settings = plan.settings
    if settings.backbone_weights is not None:  # without the folder of this machine
        settings = replace(settings, backbone_weights=Path(settings.backbone_weights.name))
    given = {name: getattr(settings, name) for name in SHOWN if getattr(settings, name) is not None}
    values = "".join(
        f"    {name}={f'Path({str(value)!r})' if isinstance(value, Path) else repr(value)},\n"
        for name, value in given.items()
    )
    python = (
        "from pathlib import Path\n\n"
        "from aoft_deploy.data.folder import load_folder\n"
        "from aoft_deploy.training.run import train\n"
        "from aoft_deploy.training.settings import TrainingSettings\n\n"
        f"settings = TrainingSettings(\n{values})\n"
        f"result = train(load_folder(Path('pictures')), Path({name!r}), settings)\n"
        "print(result.checkpoint, result.val_accuracy)"
    )
    shell = (
        "# pictures/train, pictures/val and pictures/test hold a folder for each class\n"
        + shlex.join(
            [
                "aoft-train",
                *replace(plan, settings=settings).arguments(Path("pictures"), Path(name)),
            ]
        )
    )
    return show_code(Shell=shell, Python=python)
