"""Results, notices and units as HTML."""

from __future__ import annotations

from aoft_demo.actions.analysis import TaskAnalysis
from aoft_demo.actions.classify import Answers
from aoft_demo.actions.verification import Agreement
from aoft_demo.views import cards, notices, units
from aoft_demo.views.charts import Bar, Line, bars, lines
from aoft_deploy.artefacts.prediction import Prediction


def test_texts_of_users_are_escaped() -> None:
    bad = "<script>alert(1)</script>"
    answers = Answers({bad: [Prediction(bad, 1.0)]}, 0.01, 1e-5, 3, 4)
    for html in (
        cards.answer_cards(answers),
        notices.failure(bad, bad),
        notices.success(bad, bad),
        cards.for_picture("", bad),
        cards.analysis_cards(bad, TaskAnalysis((), (), "lora", ())),
        cards.agreement_card(bad, Agreement(1, 1.0, 0.0, 0.0, 1)),
        bars([Bar(bad, 1.0, bad)], title=bad),
        lines([Line(bad, [(0, 1)], 1)], x=(0, 1), y=(0, 1), x_label=bad, y_label=bad),
    ):
        assert "<script" not in html and "&lt;script" in html


def test_figures_have_suitable_units() -> None:
    answers = Answers({"a": [Prediction("x", 0.25)]}, 0.0123, 42e-6, 3, 4)
    html = cards.answer_cards(answers)
    for text in ("12.3 ms", "42 µs", "25.0%", 'data-p="0.250000"', "3 × 4 pixels"):
        assert text in html
    assert [units.size(n) for n in (12, 28_300, 10_900_000, 2e9)] == [
        "12 bytes",
        "28.3 KB",
        "10.9 MB",
        "2.0 GB",
    ]


def test_differing_answers_are_reported() -> None:
    html = cards.agreement_card("a", Agreement(16, 1.0, 1e-6, 1e-6, 16))
    assert "good" in html and "the same answers" in html
    assert "different answers" in cards.agreement_card("a", Agreement(16, 1.0, 1.0, 1.0, 15))
