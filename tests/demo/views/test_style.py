"""The page's style sheets: views do not change each other, and Gradio can rewrite the selectors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import aoft_demo.views

VIEWS = Path(aoft_demo.views.__file__).parent
SHEETS = sorted(VIEWS.glob("**/style.css"))
FOLDERS = sorted(sheet.parent for sheet in SHEETS if sheet.parent != VIEWS)


def selectors(sheet: Path) -> Iterator[str]:
    """Each selector of a style sheet, also of those within media queries."""
    text = re.sub(r"/\*.*?\*/", "", sheet.read_text("utf-8"), flags=re.DOTALL)
    text = re.sub(r"@keyframes[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", "", text)
    text = re.sub(r"@media[^{]*\{", "", text)
    for rule in re.findall(r"([^{}]+)\{[^{}]*\}", text):
        for selector in re.split(r",(?![^(]*\))", rule):
            yield selector.strip()


@pytest.mark.parametrize("sheet", SHEETS, ids=lambda sheet: str(sheet.relative_to(VIEWS)))
def test_no_comma_within_a_selectors_brackets(sheet: Path) -> None:
    """Gradio splits rules at every comma before it adds its own prefix to the selectors."""
    found = list(selectors(sheet))
    assert found and not [each for each in found if "," in each]


def test_a_views_rules_begin_with_what_only_the_view_has() -> None:
    """Otherwise a class that two views use, such as "scale", gets the rules of both."""
    for folder in FOLDERS:
        others = "\n".join(
            path.read_text("utf-8")
            for path in VIEWS.rglob("*")
            if path.suffix in {".py", ".js"} and path.parent != folder
        )
        used = {
            name
            for names in re.findall(r"class(?:Name)?(?:=|: )\\?[\"']([^\"'<>]*)", others)
            for name in names.split()
        }
        for selector in selectors(folder / "style.css"):
            first = re.match(r"(?:\.gradio-container\S* |\.dark )?([^\s>+~:\[]+)", selector)
            assert first, selector
            if "#" not in first[1]:
                classes = set(re.findall(r"\.([\w-]+)", first[1]))
                assert classes - used, f"{folder.name}: {selector!r} also applies to other views"
