"""Results, notices and units as HTML."""

from __future__ import annotations

from aoft_demo.actions.analysis import Family, TaskAnalysis
from aoft_demo.actions.changes import Change
from aoft_demo.actions.classify import Answers
from aoft_demo.actions.verification import Agreement
from aoft_demo.views import notices, units
from aoft_demo.views.ask.cards import answer_cards, for_picture
from aoft_demo.views.charts import Bar, Line, bars, lines
from aoft_demo.views.explain.cards import inside_cards
from aoft_demo.views.skills.cards import agreement_card
from aoft_deploy.classes import Answer, Prediction, Value


def test_texts_of_users_are_escaped() -> None:
    bad = "<script>alert(1)</script>"
    answers = Answers({bad: [Prediction(bad, 1.0)]}, 0.01, 1e-5, 3, 4)
    rows = Family("backbone, rows", 1, 90.0, 1.0, 1.0, (1,) * 180)
    for html in (
        answer_cards(answers),
        notices.failure(bad, bad),
        notices.success(bad, bad),
        for_picture("", bad),
        inside_cards(bad, TaskAnalysis((rows,), (), 0, "lora", (bad,)), Change(1, 1, 1, None)),
        agreement_card(bad, Agreement(1, 1.0, 0.0, 0.0, 1)),
        bars([Bar(bad, 1.0, bad)], title=bad),
        lines([Line(bad, [(0, 1)], 1)], x=(0, 1), y=(0, 1), x_label=bad, y_label=bad),
    ):
        assert "<script" not in html and "&lt;script" in html


def test_figures_have_suitable_units() -> None:
    answers = Answers({"a": [Prediction("x", 0.25)]}, 0.0123, 42e-6, 3, 4)
    html = answer_cards(answers)
    for text in ("12.3 ms", "42 µs", "25.0%", 'data-p="0.250000"', "3 × 4 pixels"):
        assert text in html
    assert [units.size(n) for n in (12, 28_300, 10_900_000, 2e9)] == [
        "12 bytes",
        "28.3 KB",
        "10.9 MB",
        "2.0 GB",
    ]


def test_labels_and_values_have_their_own_cards() -> None:
    labels: list[Answer] = [Prediction("ripe", 0.9), Prediction("red", 0.6)]
    answers = Answers({"fruit": labels, "leaf": [], "age": [Value("years", 41.25)]}, 1, 1, 3, 4)
    html = answer_cards(answers)
    assert [html.count(f'class="top">{text}<') for text in ("ripe", "no label", "years 41.25")] == [
        1,
        1,
        1,
    ]
    assert html.count("data-p=") == 2 and html.count("%</span>") == 2
    assert '<span class="value">41.25</span>' in html


def test_differing_answers_are_reported() -> None:
    html = agreement_card("a", Agreement(16, 1.0, 1e-6, 1e-6, 16))
    assert "good" in html and "the same answers" in html
    assert "different answers" in agreement_card("a", Agreement(16, 1.0, 1.0, 1.0, 15))
