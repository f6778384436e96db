"""Results, notices and units as HTML."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from aoft_demo.actions.analysis import Family, TaskAnalysis
from aoft_demo.actions.changes import Change
from aoft_demo.actions.classify import Answers
from aoft_demo.actions.residents import Resident
from aoft_demo.actions.skill_cards import SkillCard
from aoft_demo.actions.verification import Proof
from aoft_demo.tasks.session import Session
from aoft_demo.views import notices, units
from aoft_demo.views.ask.cards import answer_cards, for_picture, header
from aoft_demo.views.charts import Bar, Line, bars, lines
from aoft_demo.views.explain.cards import inside_cards
from aoft_demo.views.skills.cards import rows
from aoft_demo.views.skills.proof import proof_card
from aoft_deploy.classes import Answer, Classes, Prediction, Value

CARD = SkillCard("Which fruit is it?", "fruit", 0.93, "200 test pictures", 0.5)


def proof(difference: float, classes: tuple[str, ...] = ("x", "y")) -> Proof:
    """Logits of two pictures, the second of which the fleet answers differently."""
    logits = np.array([[4.0, 1.0], [0.5, 1.0]], np.float32)
    other = logits.copy()
    other[1, 0] += difference
    return Proof(Classes(classes), logits, logits, other)


def test_texts_of_users_are_escaped(session: Session) -> None:
    bad = "<script>alert(1)</script>"
    answers = Answers({bad: [Prediction(bad, 1.0)]}, 0.01, 1e-5, 3, 4)
    family = Family("backbone, rows", 1, 90.0, 1.0, 1.0, (1,) * 180)
    for html in (
        answer_cards(answers, {bad: replace(CARD, question=bad, made_for=bad)}, 1e-5, 5.0),
        rows(session, [Resident(bad, 2, 9, "added")], {bad: replace(CARD, question=bad)}),
        proof_card(bad, proof(0.0, (bad, bad))),
        notices.failure(bad, bad),
        notices.success(bad, bad),
        for_picture("", bad),
        inside_cards(bad, TaskAnalysis((family,), (), 0, "lora", (bad,)), Change(1, 1, 1, None)),
        bars([Bar(bad, 1.0, bad)], title=bad),
        lines([Line(bad, [(0, 1)], 1)], x=(0, 1), y=(0, 1), x_label=bad, y_label=bad),
    ):
        assert "<script" not in html and "&lt;script" in html


def test_figures_have_suitable_units() -> None:
    answers = Answers({"a": [Prediction("x", 0.25)]}, 0.0123, 42e-6, 3, 4)
    html = answer_cards(answers, {"a": CARD}, 9.5e-6, 4.94)
    texts = ("12.3 ms", "42 µs", "25.0%", 'data-p="0.250000"', "3 × 4 pixels", "± 0.00001", "4.9×")
    for text in texts:
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
    html = answer_cards(answers, dict.fromkeys(answers.predictions, CARD), None, 1.0)
    assert [
        html.count(f'class="top">{text}<') for text in ("ripe", "None of them", "years 41.25")
    ] == [
        1,
        1,
        1,
    ]
    assert html.count("data-p=") == 2 and html.count("%</span>") == 2
    assert '<span class="value">41.25</span>' in html


def test_an_answer_below_the_threshold_is_not_sure() -> None:
    answers = Answers({"fruit": [Prediction("pear", 0.6), Prediction("kiwi", 0.4)]}, 1, 1, 3, 4)

    def shown(threshold: float, none_class: str | None = None) -> str:
        card = replace(CARD, threshold=threshold, none_class=none_class)
        return answer_cards(answers, {"fruit": card}, None, 1.0)

    assert 'class="top">Not sure<' in shown(0.61) and "best guess: pear" in shown(0.61)
    assert 'class="top">pear<' in shown(0.6) and "best guess" not in shown(0.6)
    assert "quiet" in shown(0.5, "pear") and "quiet" not in shown(0.5, "kiwi")
    assert "right on 93% of 200 test pictures" in shown(0.5)


def test_skills_that_a_picture_does_not_fit_are_folded_away() -> None:
    none = replace(CARD, none_class="no fruit")
    for outside, folded in ((["a"], 0), (["a", "b"], 2)):
        found: dict[str, Any] = {name: [Prediction("ripe", 0.9)] for name in "cdef"}
        found |= {name: [Prediction("no fruit", 0.8), Prediction("ripe", 0.2)] for name in outside}
        found["d"] = [Prediction("no fruit", 0.4), Prediction("ripe", 0.3)]  # it is not sure
        found["c"] = [Prediction("no fruit", 0.9)]  # a class like others
        cards = dict.fromkeys(found, none) | {"c": CARD}
        html = answer_cards(Answers(found, 1, 1, 3, 4), cards, None, 1.0)
        shown, _, group = html.partition('<details class="group">')
        assert html.count('<section class="card') == len(found)
        assert group.count("<section") == folded
        assert ("2 skills say “no fruit”:</b> a · b<" in group) == bool(folded)
        assert "cards few" in shown


def test_the_title_counts_the_skills(session: Session) -> None:
    shared: Any = SimpleNamespace(backbone_bytes=10_900_000)
    for count, text in (
        (0, "One 10.9 MB model waits for skills."),
        (1, "<b>1 skill</b> of 3.0 KB on one 10.9 MB model."),
        (2, "<b>2 skills</b> of about 3.0 KB share one 10.9 MB model: <b>10.9 MB</b> in memory"),
    ):
        assert text in header(shared, [Resident(str(i), 2, 3000, "added") for i in range(count)])
    assert 'class="memory"' not in rows(session, [], {})


def test_equal_and_differing_answers_are_told_apart() -> None:
    html = proof_card("a", proof(1e-5))
    assert "The answers are the same, to 5 digits." in html and "2 of 2 pictures" in html
    assert "The answers differ" in proof_card("a", proof(0.01))  # above the tolerance
    assert "1 of 2 pictures" in proof_card("a", proof(1.0))
    assert "same, to 6 digits" in proof_card("a", proof(0.0))  # as many as float32 has


def test_the_header_compares_with_separate_models(session: Session) -> None:
    shared = replace(session.shared, backbone_bytes=10_000_000)
    html = header(shared, [Resident(name, 2, 50_000, "initial") for name in "ab"])
    assert "<b>2 skills</b> of about 50.0 KB share one 10.0 MB model" in html
    assert "<b>10.1 MB</b> in memory instead of 20.1 MB" in html


def test_a_skill_without_a_card_is_the_visitors_own() -> None:
    answers = Answers({"fruit": [Prediction("pear", 0.6)]}, 1, 1, 3, 4)
    assert "for fruit" in answer_cards(answers, {"fruit": CARD}, None, 1.0)
    own = SkillCard("fruit", "", None, "", 0.5)
    html = answer_cards(answers, {"fruit": own}, None, 1.0)
    assert "your own skill" in html and "for " not in html.partition('class="about">')[2][:40]
    assert "right on" not in html


def test_each_fact_leads_to_its_proof() -> None:
    answers = Answers({"a": [Prediction("x", 0.9)]}, 0.0123, 42e-6, 3, 4)
    html = answer_cards(answers, {"a": CARD}, 9.5e-6, 4.94)
    assert re.findall(r'<a href="#(\w+)"><b>([^<]+)</b> <span>([^<]+)<', html) == [
        ("race", "12.3 ms", "one pass, 1 skill"),
        ("skills", "42 µs", "to switch skills"),
        ("prove", "same answers ✓", "merged = unmerged ± 0.00001"),
        ("memory", "4.9× less", "memory than separate models"),
    ]
    unknown = answer_cards(answers, {"a": CARD}, None, 4.94)
    assert "merged = unmerged<" in unknown
