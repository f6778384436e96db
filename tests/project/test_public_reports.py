"""The tables of public reports name existing tests."""

from __future__ import annotations

import re

import pytest
from checkout import ROOT

REPORTS = ROOT / "tests" / "public_reports"
ROWS = [
    (path.name, line)
    for path in sorted(REPORTS.glob("*.md"))
    for line in path.read_text("utf-8").splitlines()
    if line.startswith("|") and not re.match(r"\|[\s:|-]+\|$|\| *report *\|", line)
]


def test_there_are_reports() -> None:
    assert len(ROWS) >= 1


@pytest.mark.parametrize(("file", "row"), ROWS)
def test_a_report_names_existing_tests(file: str, row: str) -> None:
    cells = [cell.strip() for cell in row.strip().strip("|").split("|")]
    assert len(cells) == 3, (
        f"{file}: a row must have three cells (report, what went wrong, test): {row}"
    )
    named = re.findall(r"([\w/]*test_\w+\.py)(?:::(\w+))?", cells[2])
    assert named, f"{file}: no test is named: {row}"
    for source, function in named:
        text = (ROOT / "tests" / source.removeprefix("tests/")).read_text("utf-8")
        assert f"def {function}(" in text or not function, f"{file}: {source} has no {function}"
