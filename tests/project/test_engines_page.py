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
    assert page.PAGE.read_text("utf-8") == page.markdown(page.reports(), page.reports("nodes"))


def test_the_readme_quotes_five_lines_of_the_table(page: Any) -> None:
    report = next(each for each in page.reports() if each["machine"]["processor"] == "AMD EPYC")
    phrases = page.readme_figures(report)
    assert len(phrases) == 5
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert ", ".join(phrases) in text


def test_the_shares_of_a_profiles_nodes_add_up(page: Any) -> None:
    profiles = page.reports("nodes")
    assert profiles
    for report in profiles:
        for row in report["rows"]:
            assert set(row["groups"]) <= set(page.GROUPS)
            assert sum(row["groups"].values()) == pytest.approx(row["seconds"])


def test_every_figure_is_in_one_cell_of_its_table(page: Any) -> None:
    for report in page.reports():
        lines = page.section(report)
        ratios = re.findall(r"(\d+\.\d\d) ×", "\n".join(lines))
        assert sorted(ratios) == sorted(f"{row['ratio']:.2f}" for row in report["rows"])


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
