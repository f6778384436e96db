"""The project's measurements in sentences and charts."""

from __future__ import annotations

import re

from aoft_demo.actions.evidence import Accuracy, Speed
from aoft_demo.views.explain.evidence import evidence_cards

ACCURACIES = [
    Accuracy("full", 0.95, 0.005, 1_000_000, 3),
    Accuracy("linear", 0.85, 0.026, 0, 3),
    Accuracy("AOFT", 0.942, 0.004, 5_000, 3),
    Accuracy("wide", 0.99, 0.004, 500_000, 4),
]
SPEEDS = [
    Speed("timm", 1.0, "timm", 8),
    Speed("onnxruntime", 1.4, "timm", 8),
    Speed("fleet, 16 tasks", 3.0, "its merged model", 32),
]


def test_all_intervals_are_on_the_axis() -> None:
    html = evidence_cards(ACCURACIES, [])
    assert "The axis starts at 82%, not at 0" in html  # 85.0 - 2.6
    names = re.findall(r'<span class="name">(\w+) ·', html)
    assert names == ["wide", "full", "AOFT", "linear"]  # the best first
    places = [float(left) for left in re.findall(r'class="dot b\d" style="left:([\d.]+)%', html)]
    assert places == [94.4, 72.2, 67.8, 16.7]  # from 82 to 100
    assert "linear · classifier only" in html and "mean of 3 trainings" in html


def test_the_sentence_compares_the_best_small_method_with_full_training() -> None:
    html = evidence_cards(ACCURACIES, [])
    assert "AOFT trains 5,000 numbers and is right on 94.2 %" in html
    assert "training all 1,000,000 gives 95.0 %" in html


def test_the_fastest_engine_is_of_the_same_baseline() -> None:
    html = evidence_cards(ACCURACIES, SPEEDS)
    assert "onnxruntime answers 1.4 times as many pictures a second as timm" in html
    assert "fleet, 16 tasks in one batch: 3.00 × the speed of its merged model." in html
    widths = re.findall(r'<i class="b\d" style="width:([\d.]+)%', html)
    assert widths == ["93.3", "66.7"]  # of 1.5
