"""The project's own measurements as charts with one sentence each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from aoft_demo.actions.evidence import Accuracy, Speed
from aoft_demo.views.charts import Bar, bars, dots
from aoft_demo.views.explain.cards import section
from aoft_demo.views.notices import empty, note
from aoft_demo.views.tables import numbers

__all__ = ["evidence_cards"]


def evidence_cards(accuracy: Sequence[Accuracy], speed: Sequence[Speed]) -> str:
    """Accuracy of methods, and speed of engines."""
    if not accuracy:
        return empty("No measurements found", "They are part of the project's wheel.")
    parts = [_accuracy(accuracy), *([_speed(speed)] if speed else [])]
    return f'<h2 class="inside">Measured</h2><div class="two">{"".join(parts)}</div>'


def _accuracy(accuracy: Sequence[Accuracy]) -> str:
    best = sorted(accuracy, key=lambda each: -each.mean)
    rows = [
        Bar(
            f"{each.method} · {_trained(each)}",
            100 * each.mean,
            f"{100 * each.mean:.1f} ± {100 * each.margin:.1f}",
            100 * each.margin,
            1 if "AOFT" in each.method or "RLRR" in each.method else 2,
        )
        for each in best
    ]
    low = math.floor(min(row.value - row.margin for row in rows))
    chart = dots(rows, title="Right answers on unseen digits, in %", x=(low, 100), unit="%")
    most = max(accuracy, key=lambda each: each.parameters)
    small = min(
        (each for each in accuracy if 0 < each.parameters <= most.parameters / 100),
        key=lambda each: -each.mean,
        default=most,
    )
    sentence = (
        f"{small.method} trains {small.parameters:,} numbers and is right on "
        f"{100 * small.mean:.1f} %; training {_all(most)} gives {100 * most.mean:.1f} %."
    )
    seeds = min(each.seeds for each in accuracy)
    foot = note(
        f"Each dot is the mean of {seeds} trainings. The line through it is its "
        " 95 % confidence interval: where two lines overlap a lot, the order of the two "
        "methods is not certain. Green: methods of this project. Behind the name: trained numbers, "
        "without the classifier. Source: benchmarks/accuracy/methods.py, digits at 32 pixels."
    )
    table = numbers(
        ("method", "right answers", "95 % interval", "trained numbers", "trainings"),
        [
            (
                each.method,
                f"{100 * each.mean:.1f} %",
                f"± {100 * each.margin:.1f}",
                f"{each.parameters:,}",
                str(each.seeds),
            )
            for each in best
        ],
        title="The figures of accuracy",
    )
    return section("How often it is right", sentence, chart + foot + table)


def _trained(each: Accuracy) -> str:
    return f"{each.parameters:,}" if each.parameters else "classifier only"


def _all(most: Accuracy) -> str:
    return f"all {most.parameters:,}" if most.method == "full" else f"{most.parameters:,}"


def _speed(speed: Sequence[Speed]) -> str:
    usual = speed[0].baseline
    engines = [each for each in speed if each.baseline == usual]
    fleets = [each for each in speed if each.baseline != usual]
    fastest = max(engines, key=lambda each: each.ratio)
    sentence = (
        f"{fastest.name} answers {fastest.ratio:.1f} times as many pictures a second as {usual}, "
        "the usual way."
    )
    rows = [
        Bar(
            each.name,
            each.ratio,
            f"{each.ratio:.2f} ×",
            colour=1 if each.name.startswith(("onnxruntime", "openvino")) else 2,
        )
        for each in sorted(engines, key=lambda each: -each.ratio)
    ]
    most = math.ceil(2 * fastest.ratio) / 2
    chart = bars(rows, title=f"Pictures a second, relative to {usual}", most=most, unit=" ×")
    many = "".join(
        f" {each.name} in one batch: {each.ratio:.2f} × the speed of {each.baseline}."
        for each in fleets
    )
    foot = note(
        f"One merged ViT-B/16 in batches of {engines[0].batch}: on two CPU cores, the median of "
        f"runs in turn. Green: files of this project.{many} Sources: benchmarks/export/engines.py "
        "and benchmarks/fleet/fleet.py."
    )
    table = numbers(
        ("what runs", "speed", "relative to", "batch"),
        [(s.name, f"{s.ratio:.2f} ×", s.baseline, str(s.batch)) for s in speed],
        title="The figures of speed",
    )
    return section("How fast it answers", sentence, chart + foot + table)
