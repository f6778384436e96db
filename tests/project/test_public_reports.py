"""The table of public reports names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROWS = [
    (path.name, line)
    for path in sorted((TESTS / "public_reports").glob("*.md"))
    for line in path.read_text("utf-8").splitlines()
    if line.startswith("|") and not re.match(r"\|[\s:|-]+\|$|\| *report *\|", line)
]


def test_there_are_reports() -> None:
    assert len(ROWS) >= 1


@pytest.mark.parametrize(("file", "row"), ROWS)
def test_a_report_names_tests_that_exist(file: str, row: str) -> None:
    cells = [cell.strip() for cell in row.strip().strip("|").split("|")]
    assert len(cells) == 3, f"{file}: a row has the cells report, what went wrong, test: {row}"
    named = re.findall(r"([\w/]*test_\w+\.py)(?:::(\w+))?", cells[2])
    assert named, f"{file}: no test is named: {row}"
    for source, function in named:
        text = (TESTS / source.removeprefix("tests/")).read_text("utf-8")
        assert f"def {function}(" in text or not function, f"{file}: {source} has no {function}"
