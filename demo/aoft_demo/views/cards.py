"""What the page shows, as HTML; every text of a stranger is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from aoft_deploy.export.merged import Exported

from aoft_demo.actions.classify import Answers
from aoft_demo.actions.evidence import Accuracy, Speed
from aoft_demo.actions.inside import Family, Insight
from aoft_demo.actions.swap import Agreement, Resident
from aoft_demo.actions.train import Step
from aoft_demo.tasks.shared_fleet import Stage
from aoft_demo.views.charts import Bar, Line, bars, lines
from aoft_demo.views.notices import empty
from aoft_demo.views.units import duration, size

__all__ = [
    "agreement_card",
    "angle_cards",
    "answer_cards",
    "attention_card",
    "evidence_cards",
    "export_card",
    "header",
    "of_picture",
    "resident_card",
    "training_card",
]


def header(stage: Stage, tasks: Sequence[Resident]) -> str:
    """What is running, in one line."""
    own = sum(task.bytes for task in tasks)
    name = str(stage.backbone.get("name", "one backbone"))
    return (
        '<div class="head"><h1>Many tasks, one backbone</h1><p>'
        f"<b>{len(tasks)}</b> task{'s' * (len(tasks) != 1)}, {size(own)} in all, on one "
        f"<b>{escape(name)}</b> of {size(stage.backbone_bytes)}. Everything stays on this machine."
        "</p></div>"
    )


def of_picture(html: str, picture: str) -> str:
    """What is said about a picture, marked with it."""
    return f'<div data-picture="{escape(picture)}">{html}</div>'


def answer_cards(answers: Answers) -> str:
    """A card for each task, and what the one pass took."""
    count = len(answers.predictions)
    cards = []
    for name, best in answers.predictions.items():
        rows = "".join(
            f'<div class="line" data-label="{escape(p.label)}" data-p="{p.probability:.6f}">'
            f'<span class="name">{escape(p.label)}</span><span class="bar">'
            f'<i class="b1" style="width:{100 * p.probability:.1f}%"></i></span>'
            f'<span class="value">{p.probability:.1%}</span></div>'
            for p in best[:4]
        )
        cards.append(
            f'<section class="card" data-task="{escape(name)}"><h3>{escape(name)}</h3>'
            f'<div class="top">{escape(best[0].label)}</div>{rows}</section>'
        )
    each = duration(answers.seconds / count)
    what = f"{count} tasks" if count > 1 else "1 task"
    facts = (
        f'<div class="facts" role="status"><span><b>{duration(answers.seconds)}</b> one pass, '
        f"{what}</span><span><b>{each}</b> per answer</span>"
        f"<span><b>{duration(answers.switch)}</b> to switch to "
        f"{'them' if count > 1 else 'it'}</span>"
        f"<span>{answers.width} × {answers.height} pixels</span></div>"
    )
    return f'{facts}<div class="cards" tabindex="0" aria-label="Answers">{"".join(cards)}</div>'


def resident_card(stage: Stage, tasks: Sequence[Resident]) -> str:
    """Tasks in memory, and their bytes against the backbone's."""
    if not tasks:
        return empty("No tasks", "Add one from its model.ckpt, or train one.")
    own = sum(task.bytes for task in tasks)
    rows = "".join(
        f'<tr data-task="{escape(t.name)}" data-bytes="{t.bytes}"><td>{escape(t.name)}</td>'
        f"<td>{t.classes}</td><td>{size(t.bytes)}</td><td>{escape(t.origin)}</td></tr>"
        for t in tasks
    )
    alone = len(tasks) * stage.backbone_bytes + own
    together = stage.backbone_bytes + own
    chart = bars(
        [
            Bar("a model per task", alone, size(alone), colour=2),
            Bar("this fleet", together, size(together)),
            Bar("of it, all tasks", own, size(own)),
        ],
        title="Memory for weights",
    )
    return (
        f'{chart}<div class="scroll" tabindex="0" aria-label="Resident tasks"><table>'
        "<thead><tr><th>task</th><th>classes</th><th>in memory</th><th>from</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def agreement_card(name: str, found: Agreement) -> str:
    """Whether three ways to the answers agree."""
    rows = [
        ("merged − unmerged, largest difference of a logit", f"{found.merged:.1e}"),
        ("fleet − unmerged, largest difference of a logit", f"{found.fleet:.1e}"),
        ("largest logit", f"{found.largest:.2f}"),
        ("same class by all three", f"{found.agreeing} of {found.images} pictures"),
    ]
    cells = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows)
    good = found.agreeing == found.images
    said = "The answers agree." if good else "Some answers differ: look at the figures."
    return (
        f'<div class="said {"good" if good else "bad"}" role="status"><b>{escape(name)}</b>: {said}'
        f'</div><table class="figures"><tbody>{cells}</tbody></table>'
    )


def angle_cards(name: str, found: Insight) -> str:
    """A task's angles as curves and as numbers, and the size of each layer's update."""
    low, high, bins = 60.0, 120.0, 120
    curves = []
    for number, family in enumerate(found.families):
        colour = (2, 1, 3)[min(number // 2, 2)]
        points = [(x, y) for x, y in _binned(family, bins) if low <= x <= high]
        curves.append(Line(family.name, points, colour, dashed=number % 2 == 1))
    most = max((y for curve in curves for _, y in curve.points), default=1.0)
    chart = lines(
        curves,
        x=(low, high),
        y=(0, most),
        x_label="angle between two vectors, degrees",
        y_label="Share of pairs of vectors, per 1.5 degrees",
        percent=True,
    )
    rows = "".join(
        f'<tr data-family="{escape(f.name)}"><td>{escape(f.name)}</td><td>{f.mean:.1f}°</td>'
        f"<td>{f.sd:.2f}°</td><td>{f.farthest:.1f}°</td></tr>"
        for f in found.families
    )
    table = (
        '<div class="scroll" tabindex="0" aria-label="Angles"><table><thead><tr><th>vectors</th>'
        "<th>mean</th><th>spread</th><th>farthest from 90°</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )
    sizes = bars(
        [Bar(name, ratio, f"{ratio:.3f}", colour=1) for name, ratio in found.layers],
        title="Size of the update of each layer, ‖ΔW‖₂ / ‖W‖₂",
    )
    notes = "".join(f"<p class='note'>{escape(note)}</p>" for note in found.notes)
    head = f'<div class="facts" role="status"><span>Inside <b>{escape(name)}</b></span></div>'
    return (
        f'{head}<div class="two"><div>{chart}{table}</div>'
        f"<div>{sizes if found.layers else ''}{notes}</div></div>"
    )


def _binned(family: Family, bins: int) -> list[tuple[float, float]]:
    """Share of the pairs in each of fewer, equal bins over 0 to 180 degrees."""
    total = sum(family.counts) or 1
    width = 180 / len(family.counts)
    shares = [0.0] * bins
    for i, count in enumerate(family.counts):
        shares[min(int((i + 0.5) * width / 180 * bins), bins - 1)] += count / total
    return [((i + 0.5) * 180 / bins, share) for i, share in enumerate(shares)]


def evidence_cards(accuracy: Sequence[Accuracy], speed: Sequence[Speed]) -> str:
    """The project's own measurements."""
    if not accuracy:
        return empty("No measurements here", "They come with the project's checkout or its wheel.")
    rows = [
        Bar(
            f"{a.method} · {a.parameters:,}",
            100 * a.mean,
            f"{100 * a.mean:.1f} ± {100 * a.half:.1f}",
            100 * a.half,
            1 if "AOFT" in a.method or "RLRR" in a.method else 2,
        )
        for a in sorted(accuracy, key=lambda a: -a.mean)
    ]
    left = bars(
        rows,
        title="Test accuracy on digits at 32 pixels, %, and numbers trained",
        least=90,
    )
    ratios = [Bar(f"{s.name}", s.ratio, f"{s.ratio:.2f} ×") for s in speed]
    right = bars(ratios, title="ViT-B/16 on two CPU cores: throughput", most=3)
    against, batch = (speed[0].against, speed[0].batch) if speed else ("nothing", 0)
    note = (
        f'<p class="note">Merged models, batches of {batch}: against {escape(against)}. Fleets of '
        "16 tasks in a batch: against one task's merged model in the same precision. "
        "benchmarks/export/engines.py, fleet.py, methods.py have the commands.</p>"
    )
    return f'<div class="two"><div>{left}</div><div>{right}{note}</div></div>'


def training_card(step: Step) -> str:
    """The curves so far and the last figures."""
    points = list(enumerate((line for line in step.lines), 1))
    train = [(float(i), float(line["train_accuracy"])) for i, line in points]
    val = [(float(i), float(line["val_accuracy"])) for i, line in points]
    chart = lines(
        [Line("training pictures", train, 2), Line("validation pictures", val, 1)],
        x=(1, max(step.epochs, 2)),
        y=(0, 1),
        x_label="epoch",
        y_label="Share of right answers",
        percent=True,
        integers=True,
    )
    facts = [f"<span><b>{len(points)}</b> of {step.epochs} epochs</span>"]
    if val:
        facts.append(f"<span>validation <b>{max(v for _, v in val):.1%}</b> at best</span>")
    if step.test is not None:
        facts.append(f'<span>test <b data-test="{step.test:.6f}">{step.test:.1%}</b></span>')
    facts.append(f"<span>{step.seconds:.0f} s</span>")
    return f'<div class="facts" role="status">{"".join(facts)}</div>{chart}'


def export_card(name: str, done: Exported) -> str:
    """What was written, and how it was checked."""
    report = done.report
    rows = [
        ("file", f"{done.path.name}, {size(done.size)}"),
        ("largest difference of a logit to the unmerged model", f"{report.max_abs:.1e}"),
        ("allowed", "–" if report.tolerance is None else f"{report.tolerance:.1e}"),
        ("same class", f"{report.agreement:.1%} of {report.images} pictures"),
        ("batch sizes", ", ".join(map(str, report.batch_sizes))),
    ]
    cells = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows)
    return (
        f'<div class="said good" role="status"><b>{escape(name)}</b> is merged and verified.</div>'
        f'<table class="figures"><tbody>{cells}</tbody></table>'
    )


def attention_card(name: str, picture: Image.Image, grid: NDArray[np.float32]) -> str:
    """Where a task's model looks, with the weight of the most looked-at patch's neighbourhood."""
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=88)
    data = base64.b64encode(content.getvalue()).decode()
    row, column = np.unravel_index(int(grid.argmax()), grid.shape)
    what = (
        f"Where the class token of the last block of {name} looks: most at patch {row + 1} from "
        f"the top, {column + 1} from the left, of {grid.shape[0]} × {grid.shape[1]}."
    )
    return (
        f'<figure class="look"><img src="data:image/jpeg;base64,{data}" alt="{escape(what)}"/>'
        f'<figcaption data-patch="{row},{column}">{escape(what)}</figcaption></figure>'
    )
