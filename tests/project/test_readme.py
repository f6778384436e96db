"""The README's snippets run, its commands parse, and the quickstart prints what it promises."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands() -> list[str]:
    lines = (line for block in blocks("") for line in block.splitlines())
    return [line for line in lines if re.match(r"aoft-\w+ .*-|aoft-\w+ +\S+/", line)]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_snippets_run(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_there_are_snippets_to_run() -> None:
    assert blocks("python") and len(commands()) >= 8


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)
    command = name.removeprefix("aoft-")
    home = "aoft_demo.cli" if command == "demo" else f"aoft_deploy.cli.{command}"
    module = importlib.import_module(home)
    module.parser().parse_args(arguments)


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w./]+)\)", README))
def test_links_within_the_project_lead_somewhere(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.slow
def test_the_quickstart_prints_what_the_readme_shows(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "tools/quickstart.py",
        "--epochs",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    shown = README.partition("<!-- quickstart -->")[2].split("```")[1].splitlines()[2:]
    for line in shown:
        label = line[:46].strip()
        assert label in done.stdout, label
    merged, unmerged = (
        re.search(rf"test accuracy, {kind}.*?([\d.]+)%", done.stdout) for kind in ("merged", "unm")
    )
    assert merged is not None and unmerged is not None
    assert merged[1] == unmerged[1] and float(merged[1]) > 80
    assert (tmp_path / "run" / "model.onnx").is_file()
