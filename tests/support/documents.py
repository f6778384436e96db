"""The README and the pages of docs/: their code blocks and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from checkout import ROOT

__all__ = ["DOCUMENTS", "README", "blocks", "command_lines", "commands", "prose"]

README = ROOT / "README.md"
DOCUMENTS = [
    README,
    *(ROOT / name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md")),
    *(ROOT / name for name in ("benchmarks/README.md", "deploy/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]

_FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```", re.M | re.S)


def blocks(path: Path, *languages: str) -> list[str]:
    """The document's code blocks of some languages; "" is none."""
    found = _FENCE.finditer(path.read_text("utf-8"))
    return [match[3] for match in found if match[2] in languages]


def prose(path: Path) -> str:
    """The document without its code blocks."""
    return _FENCE.sub("", path.read_text("utf-8"))


def command_lines(path: Path) -> Iterator[str]:
    """The lines with commands: those of plain blocks, and those after ``$``."""
    for block in blocks(path, ""):
        yield from block.splitlines()
    for block in blocks(path, "console"):
        lines = block.splitlines()
        yield from (line.removeprefix("$ ") for line in lines if line.startswith("$ "))


def commands(path: Path) -> Iterator[list[str]]:
    """This project's commands in a document, each as its words."""
    for line in command_lines(path):
        if "aoft" not in line or "=" in line.split()[0]:
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set("|&;<>"):
                words.append(word)
            elif words:
                if re.fullmatch(r"aoft-[a-z]+", words[0]):
                    yield words
                elif words[:3] == ["accelerate", "launch", "-m"]:
                    yield [f"aoft-{words[3].rpartition('.')[2]}", *words[4:]]
                words = []
