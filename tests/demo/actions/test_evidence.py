"""Measured results of the project."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from aoft_demo.actions.evidence import accuracies, results_folder, speeds
from aoft_demo.views.explain.evidence import evidence_cards


def test_the_figures_are_those_of_the_accuracy_page(root: Path) -> None:
    page = (root / "docs" / "evidence" / "accuracy.md").read_text("utf-8")
    by_method = {a.method: a for a in accuracies()}
    for method in ("LoRA, rank 8", "RLRR", "SSF"):
        (line,) = re.findall(rf"^\| {method} \| ([\d.]+) ± ([\d.]+) \|", page, re.M)
        ours = by_method[method]
        assert (f"{100 * ours.mean:.1f}", f"{100 * ours.margin:.1f}") == line
    engines = json.loads((root / "benchmarks/results/engines.json").read_text())["rows"]
    largest = max(row["batch"] for row in engines)
    ratios = [row["ratio"] for row in engines if row["batch"] == largest]
    assert [s.ratio for s in speeds()][: len(ratios)] == ratios
    html = evidence_cards(accuracies(), speeds())
    assert "96.8 ± 0.7" in html and f"{max(ratios):.2f} ×" in html
    assert f"batches of {largest}:" in html


def test_missing_results_are_reported(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = importlib.import_module("aoft_demo.actions.evidence")
    assert results_folder() == root / "benchmarks" / "results"
    monkeypatch.setattr(evidence, "__file__", "/nowhere/aoft_demo/actions/evidence.py")
    assert results_folder() is None and accuracies() == [] and speeds() == []
    assert "No measurements found" in evidence_cards([], [])


def test_the_learning_rate_is_chosen_by_validation_on_the_first_seed() -> None:
    evidence = importlib.import_module("aoft_demo.actions.evidence")

    def run(factor: float, val: float, test: float, loss: float = 1.0) -> dict[str, float]:
        return {"factor": factor, "val": val, "val_loss": loss, "test": test, "parameters": 7}

    found = evidence._accuracy(
        "a",
        {
            0: [run(1, 0.9, 0.99), run(2, 0.95, 0.6), run(3, 0.95, 0.7, loss=2.0)],
            1: [run(1, 0.99, 0.99), run(2, 0.1, 0.8), run(3, 0.99, 0.99)],
        },
    )
    assert (found.mean, found.seeds, found.parameters) == (pytest.approx(0.7), 2, 7)
    assert found.margin == pytest.approx(12.706 * 0.1)
