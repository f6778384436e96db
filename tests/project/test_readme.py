"""The README is short, its figures are the measured ones, and the quickstart prints its output.

``test_docs.py`` checks the links, commands and code of the README together with the site's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT
from documents import README
from forked import run_python

INSTALL = ROOT / "docs" / "start" / "install.md"


def measured(name: str) -> Any:
    """The content of a file in benchmarks/results."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))


def row(start: str) -> list[str]:
    """The factors in a row of the README's table of measurements."""
    (line,) = re.findall(rf"^\| {re.escape(start)}.*$", README.read_text("utf-8"), re.M)
    return re.findall(r"([\d.]+) ×", line)


def test_the_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 150


def test_figures_are_those_of_the_results() -> None:
    step = measured("training_step_fp32")["variants"]["aoft-lora-8"]
    assert row("training step") == [f"{step['time_ratio']:.2f}", f"{step['memory_ratio']:.2f}"]

    engines = {
        r["name"]: f"{r['ratio']:.2f}" for r in measured("engines")["rows"] if r["batch"] == 1
    }
    names = ("onnxruntime fp32", "onnxruntime fp32, plain backbone")
    assert row("merged model") == [engines[name] for name in names]
    assert row("the same in int8") == [engines["onnxruntime int8"], engines["openvino int8"]]

    (fleet,) = [r for r in measured("fleet_16")["rows"] if r["variant"] == "fleet"]
    assert row("16 images of 16 tasks") == [f"{fleet['of merged']:.2f}"]

    served = measured("serving")["cases"]["JPEGs"]
    assert row("a served JPEG") == [f"{served['share']:.2f}"]


def test_every_measurement_names_its_script() -> None:
    table = README.read_text("utf-8").partition("## Measured")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 5
    for line in rows:
        (script,) = re.findall(r"`(benchmarks/\S+\.py)`", line)
        assert (ROOT / script).is_file()


@pytest.mark.slow
def test_the_quickstart_prints_the_documented_output(tmp_path: Path) -> None:
    options = ["--epochs", "1", "--out", str(tmp_path / "run")]
    done = run_python(ROOT / "tools" / "quickstart.py", *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    page = INSTALL.read_text("utf-8").partition("<!-- quickstart -->")[2]
    for line in page.split("```")[1].splitlines()[2:]:
        label = line[:46].strip()
        assert label in done.stdout, label
    merged, unmerged = (
        re.search(rf"test accuracy, {kind}.*?([\d.]+)%", done.stdout) for kind in ("merged", "unm")
    )
    assert merged is not None and unmerged is not None
    assert merged[1] == unmerged[1] and float(merged[1]) > 80
    assert (tmp_path / "run" / "model.onnx").is_file()
