"""Results as HTML, in the order of the tabs; all texts are escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aoft_demo.actions.analysis import Family, TaskAnalysis
from aoft_demo.actions.classify import Answers
from aoft_demo.actions.evidence import Accuracy, Speed
from aoft_demo.actions.export import ExportedTask
from aoft_demo.actions.residents import Resident
from aoft_demo.actions.train import TrainingProgress
from aoft_demo.actions.verification import Agreement
from aoft_demo.tasks.shared_fleet import SharedFleet
from aoft_demo.views.charts import Bar, Line, bars, lines
from aoft_demo.views.notices import empty, success, verdict
from aoft_demo.views.units import duration, size
from aoft_deploy.classes import Answer, Value

__all__ = [
    "agreement_card",
    "analysis_cards",
    "answer_cards",
    "attention_card",
    "evidence_cards",
    "export_card",
    "for_picture",
    "header",
    "resident_card",
    "training_card",
]


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


# Classify


def for_picture(html: str, picture: str) -> str:
    """Mark HTML with the picture that it belongs to."""
    return f'<div data-picture="{escape(picture)}">{html}</div>'


def answer_cards(answers: Answers) -> str:
    """A card for each task, and the duration of the pass."""
    count = len(answers.predictions)
    tasks = f"{count} tasks" if count > 1 else "1 task"
    facts = _facts(
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
    return f'{facts}<div class="cards" tabindex="0" aria-label="Answers">{cards}</div>'


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


# Swap


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
    return chart + _table("Tasks", ("task", "classes", "memory", "origin"), rows)


def agreement_card(name: str, result: Agreement) -> str:
    """Whether the unmerged model, the merged model and the fleet agree."""
    good = result.agreeing == result.images
    same = "gives the same answers unmerged, merged and in the fleet."
    text = same if good else "gives different answers: see the figures below."
    return verdict(name, text, good=good) + _figures(
        ("largest difference of a logit, merged to unmerged", f"{result.merged:.1e}"),
        ("largest difference of a logit, fleet to unmerged", f"{result.fleet:.1e}"),
        ("largest logit", f"{result.largest:.2f}"),
        ("same answer from all three", f"{result.agreeing} of {result.images} pictures"),
    )


# Inside


def analysis_cards(name: str, analysis: TaskAnalysis) -> str:
    """Angles of a task as curves and as a table, and the size of each layer's update."""
    low, high, bins = 60.0, 120.0, 120
    curves = []
    for number, family in enumerate(analysis.families):
        colour = (2, 1, 3)[min(number // 2, 2)]
        points = [(x, y) for x, y in _rebinned(family, bins) if low <= x <= high]
        curves.append(Line(family.name, points, colour, dashed=number % 2 == 1))
    most = max((y for curve in curves for _, y in curve.points), default=1.0)
    chart = lines(
        curves,
        x=(low, high),
        y=(0, most),
        x_label="angle between two vectors in degrees",
        y_label="Share of pairs of vectors per 1.5 degrees",
        percent=True,
    )
    rows = "".join(
        f'<tr data-family="{escape(f.name)}"><td>{escape(f.name)}</td><td>{f.mean:.1f}°</td>'
        f"<td>{f.sd:.2f}°</td><td>{f.farthest:.1f}°</td></tr>"
        for f in analysis.families
    )
    columns = ("vectors", "mean", "std. deviation", "farthest from 90°")
    sizes = bars(
        [Bar(layer, ratio, f"{ratio:.3f}") for layer, ratio in analysis.layers],
        title="Size of each layer's update, ‖ΔW‖₂ / ‖W‖₂",
    )
    notes = "".join(f"<p class='note'>{escape(note)}</p>" for note in analysis.notes)
    return (
        f"{_facts(f'Inside <b>{escape(name)}</b>')}"
        f'<div class="two"><div>{chart}{_table("Angles", columns, rows)}</div>'
        f"<div>{sizes if analysis.layers else ''}{notes}</div></div>"
    )


def _rebinned(family: Family, bins: int) -> list[tuple[float, float]]:
    """Centre of each of fewer, equal bins from 0 to 180 degrees, with its share of the pairs."""
    total = sum(family.counts) or 1
    width = 180 / len(family.counts)
    shares = [0.0] * bins
    for i, count in enumerate(family.counts):
        shares[min(int((i + 0.5) * width / 180 * bins), bins - 1)] += count / total
    return [((i + 0.5) * 180 / bins, share) for i, share in enumerate(shares)]


def attention_card(name: str, picture: Image.Image, grid: NDArray[np.float32]) -> str:
    """The overlay of a task's attention, with the patch of the highest attention in words."""
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=88)
    data = base64.b64encode(content.getvalue()).decode()
    row, column = np.unravel_index(int(grid.argmax()), grid.shape)
    text = escape(
        f"Attention of the class token in the last block of {name}: highest at row {row + 1}, "
        f"column {column + 1} of {grid.shape[0]} × {grid.shape[1]} patches."
    )
    return (
        f'<figure class="look"><img src="data:image/jpeg;base64,{data}" alt="{text}"/>'
        f'<figcaption data-patch="{row},{column}">{text}</figcaption></figure>'
    )


# Train


def training_card(progress: TrainingProgress) -> str:
    """Accuracy after each epoch as curves, and the latest figures."""
    points = list(enumerate(progress.lines, 1))
    train = [(float(i), float(line["train_accuracy"])) for i, line in points]
    val = [(float(i), float(line["val_accuracy"])) for i, line in points]
    chart = lines(
        [Line("training pictures", train, 2), Line("validation pictures", val, 1)],
        x=(1, max(progress.epochs, 2)),
        y=(0, 1),
        x_label="epoch",
        y_label="Accuracy",
        percent=True,
        integers=True,
    )
    facts = [f"<b>{len(points)}</b> of {progress.epochs} epochs"]
    if val:
        facts.append(f"best validation accuracy <b>{max(v for _, v in val):.1%}</b>")
    if progress.test is not None:
        facts.append(f'test accuracy <b data-test="{progress.test:.6f}">{progress.test:.1%}</b>')
    return _facts(*facts, f"{progress.seconds:.0f} s") + chart


# Export


def export_card(name: str, exported: ExportedTask) -> str:
    """What was written, and the result of its verification."""
    report = exported.report
    allowed = "–" if report.tolerance is None else f"{report.tolerance:.1e}"
    return success(name, "is merged and verified.") + _figures(
        ("file", f"{exported.path.name}, {size(exported.size)}"),
        ("largest difference of a logit from the unmerged model", f"{report.max_abs:.1e}"),
        ("allowed difference", allowed),
        ("same class", f"{report.agreement:.1%} of {report.images} pictures"),
        ("batch sizes", ", ".join(map(str, report.batch_sizes))),
    )


# Evidence


def evidence_cards(accuracy: Sequence[Accuracy], speed: Sequence[Speed]) -> str:
    """The project's own measurements."""
    if not accuracy:
        return empty("No measurements found", "They are part of the project's wheel.")
    left = bars(
        [
            Bar(
                f"{a.method} · {a.parameters:,}",
                100 * a.mean,
                f"{100 * a.mean:.1f} ± {100 * a.margin:.1f}",
                100 * a.margin,
                1 if "AOFT" in a.method or "RLRR" in a.method else 2,
            )
            for a in sorted(accuracy, key=lambda a: -a.mean)
        ],
        title="Test accuracy on digits at 32 pixels in %, and number of trained parameters",
        least=90,
    )
    ratios = [Bar(s.name, s.ratio, f"{s.ratio:.2f} ×") for s in speed]
    right = bars(ratios, title="Throughput of ViT-B/16 on two CPU cores", most=3)
    baseline, batch = (speed[0].baseline, speed[0].batch) if speed else ("nothing", 0)
    note = (
        f'<p class="note">Merged models in batches of {batch}: relative to {escape(baseline)}. '
        "Fleets with 16 tasks in a batch: relative to one task's merged model of the same "
        "precision. Scripts: benchmarks/export/engines.py, benchmarks/fleet/fleet.py and "
        "benchmarks/accuracy/methods.py.</p>"
    )
    return f'<div class="two"><div>{left}</div><div>{right}{note}</div></div>'


# Parts of several cards


def _facts(*facts: str) -> str:
    """Short facts in a row; each is HTML."""
    spans = "".join(f"<span>{fact}</span>" for fact in facts)
    return f'<div class="facts" role="status">{spans}</div>'


def _figures(*rows: tuple[str, str]) -> str:
    """A table of names and values."""
    cells = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows)
    return f'<table class="figures"><tbody>{cells}</tbody></table>'


def _table(name: str, columns: Iterable[str], rows: str) -> str:
    """A table that scrolls; the rows are HTML."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    return (
        f'<div class="scroll" tabindex="0" aria-label="{escape(name)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
