"""What the page shows, as text."""

from __future__ import annotations

import asyncio
import errno
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aoft_demo.actions.classify import Answers
from aoft_demo.actions.evidence import accuracies, results_folder, speeds
from aoft_demo.actions.inside import Insight
from aoft_demo.actions.swap import Agreement
from aoft_demo.views import cards, notices, units
from aoft_demo.views.charts import Bar, Line, bars, lines
from aoft_demo.views.choosers import chooser, names_among, refreshed
from aoft_demo.views.failures import sentence, told
from aoft_demo.views.page import Page
from aoft_deploy.artefacts.prediction import Prediction
from aoft_deploy.errors import CheckpointError

ROOT = Path(__file__).parents[2]


def test_names_of_strangers_are_text() -> None:
    bad = "<script>alert(1)</script>"
    answers = Answers({bad: [Prediction(bad, 1.0)]}, 0.01, 1e-5, 3, 4)
    for html in (
        cards.answer_cards(answers),
        notices.problem(bad, bad),
        notices.done(bad, bad),
        cards.of_picture("", bad),
        cards.angle_cards(bad, Insight((), (), "lora", ())),
        cards.agreement_card(bad, Agreement(1, 1.0, 0.0, 0.0, 1)),
        bars([Bar(bad, 1.0, bad)], title=bad),
        lines([Line(bad, [(0, 1)], 1)], x=(0, 1), y=(0, 1), x_label=bad, y_label=bad),
    ):
        assert "<script" not in html and "&lt;script" in html


def test_figures_are_in_units_that_suit_them() -> None:
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


def test_answers_that_differ_are_told_apart() -> None:
    assert "good" in cards.agreement_card("a", Agreement(16, 1.0, 1e-6, 1e-6, 16))
    assert "Some answers differ" in cards.agreement_card("a", Agreement(16, 1.0, 1.0, 1.0, 15))


def test_a_curve_stays_in_its_frame() -> None:
    html = lines(
        [Line("a", [(0, -5), (1, 0.5), (2, 9)], 1)], x=(0, 2), y=(0, 1), x_label="x", y_label="y"
    )
    (points,) = re.findall(r'points="([^"]+)"', html)
    heights = [float(pair.split(",")[1]) for pair in points.split()]
    assert heights[0] > heights[1] > heights[2] >= 0


def test_the_evidence_is_that_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    found = {a.method: a for a in accuracies()}
    for row, method in (("LoRA, rank 8", "LoRA, rank 8"), ("RLRR", "RLRR"), ("SSF", "SSF")):
        (line,) = re.findall(rf"^\| {row} \| ([\d.]+) ± ([\d.]+) \|", readme, re.M)
        ours = found[method]
        assert (f"{100 * ours.mean:.1f}", f"{100 * ours.half:.1f}") == line
    engines = json.loads((ROOT / "benchmarks/results/engines.json").read_text())["rows"]
    most = max(row["batch"] for row in engines)
    ratios = [row["ratio"] for row in engines if row["batch"] == most]
    assert [s.ratio for s in speeds()][: len(ratios)] == ratios
    html = cards.evidence_cards(accuracies(), speeds())
    assert "96.8 ± 0.7" in html and f"{max(ratios):.2f} ×" in html
    assert f"batches of {most}:" in html


def test_an_installation_without_results_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = importlib.import_module("aoft_demo.actions.evidence")
    assert results_folder() == ROOT / "benchmarks" / "results"
    monkeypatch.setattr(evidence, "__file__", "/nowhere/aoft_demo/actions/evidence.py")
    assert results_folder() is None and accuracies() == [] and speeds() == []
    assert "No measurements here" in cards.evidence_cards([], [])


def test_a_fault_is_a_sentence_without_folders(capsys: pytest.CaptureFixture[str]) -> None:
    error = CheckpointError("/tmp/aoft-demo-x/uploads/ab/model.ckpt is no checkpoint (1/2 read).")
    assert sentence(error) == "model.ckpt is no checkpoint (1/2 read)."
    assert "the fault is ours" in sentence(ValueError("secret"))
    assert "secret" in capsys.readouterr().err


def test_no_folder_is_told_whatever_it_is_called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("/tmp/a b/it's #1/aoft-demo-x", '/tmp/"é %41?/aoft-demo-x', "/home/me/aoft-x"):
        monkeypatch.setattr(tempfile, "tempdir", folder)
        path = f"{folder}/uploads/ab12/my cat's.png"
        for text in (f"Cannot read image {path!r}: it is empty.", f"{path} is no checkpoint."):
            told_text = sentence(CheckpointError(text))
            assert "my cat" in told_text and "/" not in told_text, told_text
            assert "aoft" not in told_text and "uploads" not in told_text, told_text
    outside = CheckpointError("Cannot read '/srv/my tasks/pets.ckpt': 3/4 of it are missing.")
    assert sentence(outside) == "Cannot read 'pets.ckpt': 3/4 of it are missing."
    full = sentence(OSError(errno.ENOSPC, "No space left on device", "/srv/x"))
    assert full == "The disk that the demo writes to is full: make room there, and try again."
    assert "/srv/x" in capsys.readouterr().err


def test_a_list_keeps_what_was_chosen_while_that_is_there() -> None:
    kept: dict[str, Any] = {"choices": ["a", "b", "new"]}  # an update without a value keeps it
    for chosen, expected in (
        ("b", kept),
        ("a", kept),
        ("gone", kept | {"value": None}),
        (None, kept),
    ):
        assert refreshed(chosen, ["a", "b", "new"]).constructor_args == expected
    assert refreshed("a", []).constructor_args == {"choices": [], "value": None}


def test_a_list_passes_on_names_alone() -> None:
    made: Any = chooser(["a", "b"], label="x")
    assert made.value == "a" and chooser([], label="x").value is None
    assert made.preprocess("gone") == "gone"  # the handler says so
    assert [made.preprocess(odd) for odd in (["a"], {"a": 1}, 7, None)] == [None] * 4
    assert names_among(["a", {"b": 1}, 7, "gone"]) == ["a", "gone"]
    assert names_among("a") == names_among(None) == []


def test_a_fault_around_a_handler_is_told_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Gradio would answer with nothing: the page stands still, and only the log knows."""

    def place() -> str:
        return "/etc/hostname"  # which Gradio does not serve

    def fail() -> str:
        raise CheckpointError("/a/b/c.ckpt is bad.")

    gr: Any = importlib.import_module("gradio")

    async def try_all() -> list[str]:
        page = Page()
        with page:
            button = gr.Button()
            button.click(place, None, gr.Image())
            button.click(fail, None, gr.HTML())
        page.has_launched = True
        found = []
        for number in page.fns:
            with pytest.raises(gr.Error) as refusal:
                await page.process_api(number, [], request=None)
            found.append(refusal.value.message)
        return found

    before, after = asyncio.run(try_all())
    assert "the fault is ours" in before and after == "c.ckpt is bad."
    assert "InvalidPathError" in capsys.readouterr().err


def test_a_handlers_fault_stands_where_its_result_would() -> None:
    @told("Not done")
    def fails() -> str:
        raise CheckpointError("/a/b/c.ckpt is bad.")

    @told("Not done", 1, of=2)
    def generates() -> Iterator[tuple[Any, Any]]:
        yield 1, 2
        raise CheckpointError("late.")

    assert 'role="alert"' in fails() and "<p>c.ckpt is bad.</p>" in fails()
    first, (kept, shown) = generates()
    assert first == (1, 2) and "late." in shown and kept != shown


HEAVY = "gradio numpy onnxruntime PIL timm torch".split()


def imported(code: str) -> set[str]:
    report = f"\nimport json; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    command = [sys.executable, "-c", f"import sys\n{code}{report}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("--port=x", 2), ("--port=70000", 2)])
def test_the_command_line_needs_no_heavy_library(option: str, code: int) -> None:
    run = f"try:\n    main(['{option}'])\nexcept SystemExit as end:\n    assert end.code == {code}"
    assert imported(f"from aoft_demo.cli import main\n{run}") == set()


@pytest.mark.parametrize(
    "module",
    sorted(
        ".".join(p.relative_to(ROOT / "demo").with_suffix("").parts)
        for p in (ROOT / "demo").rglob("[!_]*.py")
    ),
)
def test_all_of_a_module_is_sorted_and_exists(module: str) -> None:
    found = importlib.import_module(module)
    assert all(hasattr(found, name) for name in found.__all__)
    assert len(set(found.__all__)) == len(found.__all__)
