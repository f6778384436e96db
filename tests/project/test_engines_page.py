"""The table of speeds is made of the recorded results."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page() -> Any:
    spec = importlib.util.spec_from_file_location(
        "engines_page", ROOT / "benchmarks" / "export" / "engines_page.py"
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(page: Any) -> None:
    text = page.markdown(page.reports(), page.reports("nodes"), page.reports("quantisation"))
    assert page.PAGE.read_text("utf-8") == text


def test_the_readme_quotes_five_lines_of_the_table(page: Any) -> None:
    report = next(each for each in page.reports() if each["machine"]["processor"] == "AMD EPYC")
    phrases = page.readme_figures(report)
    assert len(phrases) == 5
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert ", ".join(phrases) in text


def test_every_figure_is_in_one_cell_of_its_table(page: Any) -> None:
    for report in page.reports():
        lines = page.section(report)
        ratios = re.findall(r"(\d+\.\d\d) ×", "\n".join(lines))
        assert sorted(ratios) == sorted(f"{row['ratio']:.2f}" for row in report["rows"])


def test_a_profile_shows_shares_and_how_far_the_peak_is(page: Any) -> None:
    groups = {"linear maps": 0.6, "attention": 0.3, "norms": 0.1}
    row: dict[str, Any] = {"name": "onnxruntime fp32", "batch": 8, "seconds": 1.0, "groups": groups}
    row["precision"] = "fp32"
    report: dict[str, Any] = {
        "machine": {"processor": "Some CPU", "threads": 2},
        "versions": {"torch": "2.14.1"},
        "model": "vit_base_patch16_224",
        "method": "lora",
        "gemm_peaks": {"fp32": 2e11},
        "rows": [row | {"share_of_peak": 0.9}, row | {"batch": 1, "share_of_peak": None}],
    }
    assert "## Where the time goes" not in page.markdown([], [])
    lines = page.markdown([], [report]).splitlines()
    assert "### Nodes on Some CPU" in lines
    assert lines[-2] == (
        "| onnxruntime fp32 | 8 | 60% (90%) | 30% | 0% | 10% | 0% | 0% | 0% | 0% | 0% |"
    )
    assert lines[-1].startswith("| onnxruntime fp32 | 1 | 60% | 30% |")
    report["rows"][1]["share_of_peak"] = 1.1
    lines = page.markdown([], [report]).splitlines()
    assert lines[-2].startswith("| onnxruntime fp32 | 8 | 60% | 30% |")


def test_quantisations_are_compared_by_speed_size_error_and_accuracy(page: Any) -> None:
    exact: dict[str, Any] = {"name": "ONNX Runtime fp32", "bytes": 343_000_000, "error": 0.0}
    exact |= {"ratios": {"1": 1.0, "16": 1.0}}
    exact["tasks"] = {"digits": {"accuracy": 0.98, "agreement": 1.0}}
    static = exact | {"name": "ONNX Runtime int8, static", "error": None, "tasks": {}}
    static |= {"ratios": {"1": 2.39, "16": 2.84}, "bytes": 88_400_000}
    report: dict[str, Any] = {
        "machine": {"processor": "Some CPU", "threads": 2},
        "versions": {"torch": "2.14.1"},
        "model": "vit_base_patch16_224",
        "method": "lora",
        "gemm_peaks": {"fp32": 2e11},
        "rows": [exact, static],
    }
    text = page.markdown([], [], [report])
    assert "## Ways to quantise" in text and "## Where the time goes" not in text
    assert text.splitlines()[-4:] == [
        "| quantisation | batch 1 | batch 16 | MB | error | digits |",
        "|---|---|---|---|---|---|",
        "| ONNX Runtime fp32 * | 1.00 × | 1.00 × | 343 | 0.0% | 98.0% (100.0%) |",
        "| ONNX Runtime int8, static | 2.39 × | 2.84 × | 88 | – | – |",
    ]


@pytest.mark.parametrize(
    ("name", "row", "column"),
    [
        ("onnxruntime int8", ("onnxruntime", "int8"), "merged"),
        ("onnxruntime fp32, plain backbone", ("onnxruntime", "fp32"), "plain"),
        ("onnxruntime fp32, opset 20", ("onnxruntime, opset 20", "fp32"), "merged"),
        ("openvino int8, 16 tasks mixed", ("openvino", "int8"), "16 tasks mixed"),
        ("PEFT, unmerged", ("PEFT LoRA r = 8, unmerged", "fp32"), "merged"),
        ("PEFT, 16 tasks mixed", ("PEFT LoRA r = 8, unmerged", "fp32"), "16 tasks mixed"),
    ],
)
def test_a_variant_has_its_row_and_column(
    page: Any, name: str, row: tuple[str, str], column: str
) -> None:
    assert page.place(name) == (row, column)
