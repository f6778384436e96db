"""The view How it works in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from browser_support import PICTURE, violations
from demo_page import DemoPage

from aoft_demo.actions.evidence import accuracies, speeds
from aoft_demo.tasks.shared_fleet import BUNDLED
from aoft_deploy import load
from aoft_deploy.training.analysis.quantities import analyse_file

pytestmark = pytest.mark.slow

TAB = ("[role=tabpanel]",)
OTHERS = ("#head", "#tabs > .tab-wrapper", "#inside-task")
"""Parts of the frame and of Gradio: header, row of tabs, dropdown."""

WATCH = """() => {
    window.seen = new Set();
    new MutationObserver(() => {
        const busy = document.querySelector("#inside .busy");
        if (busy) seen.add(busy.textContent);
    }).observe(document.querySelector("#inside"), { childList: true, subtree: true });
}"""
"""JavaScript: collect what the panel says while it is busy."""


def test_looking_inside(open_page: Callable[..., DemoPage]) -> None:
    page = open_page()
    page.classify(PICTURE)
    page.tab("How it works")
    page.playwright.evaluate(WATCH)
    page.click("#look")
    page.see("#attention img")
    assert page.playwright.evaluate("seen.size") == 1  # it said that it was busy
    page.see("#inside .chart")
    task = page.find("#inside-task input").input_value()
    path = BUNDLED / f"{task}.ckpt"
    expected, tuned = analyse_file(path), load(path)

    alts = [image.get_attribute("alt") for image in page.find("#attention img").all()]
    assert [a.startswith("Attention of the class token") for a in alts] == [True, True]
    assert "before fine-tuning" in alts[0] and f"after fine-tuning for {task}" in alts[1]
    moved = re.search(r"moved (\d+) % of the attention", page.find("#attention").inner_text())
    assert moved and 0 < int(moved[1]) <= 100

    heads = sum(tuned.backbone.get_parameter(name).numel() for name in tuned.classifier)
    trained = sum(p.numel() for p in tuned.trained().values()) - heads
    page.shows("#inside", f"Training set {trained:,} numbers for {task}")
    ratios = [x["change_ratio"] for x in expected["layers"] if x["change_ratio"] is not None]
    page.shows("#inside", f"Training changed {len(ratios)} of {len(expected['layers'])} layers")
    cells = page.find("#inside .shades td:not(.none) span").all_inner_texts()
    assert cells == [f"{ratio:.2f}" for ratio in ratios]
    page.expect(page.find("#inside .three img")).to_have_count(3)
    page.find("#inside .numbers summary").click()
    rows = [
        row.locator("td").all_inner_texts() for row in page.find("#inside .numbers tbody tr").all()
    ]
    for kind in ("rows", "columns"):
        (row,) = (row for row in rows if row[0] == f"backbone, {kind}")
        angles = expected["angles"][kind]
        assert row[1:3] == [f"{angles['mean']:.1f}°", f"{angles['sd']:.2f}°"]
    assert {f"{expected['method']}, down", "LoRA, up"} <= {row[0] for row in rows}

    best, fastest = max(accuracies(), key=lambda a: a.mean), max(s.ratio for s in speeds())
    page.shows("#measured", f"{100 * best.mean:.1f} ± {100 * best.margin:.1f}")
    page.shows("#measured", f"{fastest:.2f} ×")
    page.shows("#measured", re.compile(r"The axis starts at \d+%, not at 0"))
    assert not violations(page, TAB, OTHERS)


def test_it_fits_a_phone_and_a_dark_page(open_page: Callable[..., DemoPage]) -> None:
    page = open_page(color_scheme="dark")
    page.tab("How it works")
    page.playwright.set_viewport_size({"width": 390, "height": 844})
    page.click("#look")
    page.see("#attention img")
    page.see("#inside .chart")
    assert page.playwright.evaluate("document.documentElement.scrollWidth") == 390
    for name in page.find("#measured .name").all():
        cut = name.evaluate("e => e.scrollWidth > e.clientWidth + 1")
        assert not cut, name.inner_text()
    assert not violations(page, TAB, OTHERS)
