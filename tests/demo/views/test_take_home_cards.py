"""Formats to choose from, and the verified report in words."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from aoft_demo.actions.export import TakenHome
from aoft_demo.actions.formats import ALL_TASKS, Format
from aoft_demo.views.take_home.cards import (
    format_list,
    next_card,
    result_card,
    verdict_in_words,
)
from aoft_deploy.artefacts.verification import Report

ONNX = Format("onnx", "One file.", ("onnxruntime",), "onnx")
BAD = "<script>alert(1)</script>"
EXACT = Report(32, (1, 2, 7), 1.234e-6, 1e-7, 1.0, 1e-4)


def done(report: Report | None, **changes: object) -> TakenHome:
    value = TakenHome(("a",), ONNX, Path("/x/a.onnx"), 10, "softmax", None, report, 25)
    return replace(value, **changes)  # type: ignore[arg-type]


def test_the_report_is_in_words() -> None:
    assert verdict_in_words(done(EXACT)) == (
        "The file gives the same answers as the trained model: on 32 pictures the largest "
        "difference of an output was 0.0000012, and all 32 answers agree. It was run in batches "
        "of 1, 2 and 7."
    )
    small = replace(EXACT, tolerance=None, agreement=0.96, agreement_shown=0.8179, images=25)
    words = verdict_in_words(done(small))
    assert words.startswith("The file gives nearly the same outputs as the trained model: on 25")
    assert "96% of the answers agree" in words and "at least 81.7% of other such" in words
    assert "agree" not in verdict_in_words(done(EXACT, activation="none"))
    everything = done(EXACT, format=replace(ONNX, key=ALL_TASKS), tasks=("a", "b"))
    assert "as the trained models" in verdict_in_words(everything)
    assert "2 skills in one file" in result_card(everything)
    assert "difference of an output was 0," in verdict_in_words(done(replace(EXACT, max_abs=0.0)))


def test_shares_are_rounded_down() -> None:
    nearly = done(replace(EXACT, agreement=0.9996, images=10_000))
    assert "and 99.9% of the answers agree" in verdict_in_words(nearly)
    assert "nearly the same outputs" in verdict_in_words(nearly)
    assert "<td>99.9%</td>" in result_card(nearly) and "100%" in result_card(done(EXACT))
    assert "29% of the answers" in verdict_in_words(done(replace(EXACT, agreement=0.29)))
    eight_bits = verdict_in_words(done(replace(EXACT, tolerance=None)))
    assert "nearly the same outputs" in eight_bits and "all 32 answers agree" in eight_bits


def test_the_exact_figures_are_in_small_print() -> None:
    html = result_card(done(EXACT, left_out=("b", "c")))
    for text in ("1.2e-06", "1.0e-04", "25 from the examples, 7 patterns", "1, 2, 7", "b, c"):
        assert text in html
    assert "Left out" not in result_card(done(EXACT))
    html = result_card(done(None))
    assert "as training wrote it" in html and "The figures" not in html


def test_formats_that_cannot_work_are_disabled_with_their_reason() -> None:
    formats = [
        replace(ONNX, refusal="It is missing."),
        *(replace(ONNX, key=f"f{i}") for i in range(4)),
    ]
    html = format_list(formats)
    assert re.findall(r'value="(\w+)" (checked|disabled)', html) == [
        ("onnx", "disabled"),
        ("f0", "checked"),
    ]
    assert "It is missing." in html and "2 more formats" in html and "<details>" in html
    html = format_list(formats, "f3")
    assert 'value="f3" checked' in html and "<details open>" in html
    assert 'value="f0" checked' in format_list(formats, "onnx")


def test_texts_are_escaped() -> None:
    evil = done(
        EXACT, tasks=(BAD,), left_out=(BAD,), code={"Shell": BAD}, steps={BAD: BAD}, path=Path(BAD)
    )
    formats = format_list([replace(ONNX, about=BAD, refusal=BAD, key=BAD, to=BAD)], BAD)
    for html in (result_card(evil), next_card(evil), formats):
        assert "<script" not in html and "&lt;script" in html
