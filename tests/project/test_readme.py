"""The README: its snippets run, its commands parse, and the quickstart prints its output."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands() -> list[str]:
    """The README's command lines of this project."""
    lines = (line for block in blocks("") for line in block.splitlines())
    return [line for line in lines if re.match(r"aoft-\w+ .*-|aoft-\w+ +\S+/", line)]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_snippets_run(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_there_are_snippets_and_commands() -> None:
    assert blocks("python") and len(commands()) >= 8


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)
    command = name.removeprefix("aoft-")
    name = "aoft_demo.cli" if command == "demo" else f"aoft_deploy.cli.{command}"
    module = importlib.import_module(name)
    module.parser().parse_args(arguments)


@pytest.mark.parametrize("path", re.findall(r"\]\(([\w./]+)\)", README))
def test_links_to_files_of_the_project_exist(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.slow
def test_the_quickstart_prints_the_readmes_output(tmp_path: Path) -> None:
    options = ["--epochs", "2", "--out", str(tmp_path / "run")]
    command = [sys.executable, "tools/quickstart.py", *options]
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
