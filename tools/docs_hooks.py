"""Hooks of mkdocs.yml: pages that are made from the sources, and links that leave docs/.

* Each command's reference comes from its argparse parser, so it cannot disagree with ``--help``.
* The Python reference lists the names in ``__all__``; mkdocstrings renders their docstrings.
* Documents outside docs/, such as CHANGELOG.md, become pages of the site.
* A relative link to another file of the repository becomes a link to it on GitHub. A link to a
  file that does not exist is a warning, which ``mkdocs build --strict`` turns into an error.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import posixpath
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
SOURCE = f"{PROJECT['urls']['Homepage']}/blob/main"

COMMANDS = {
    f"aoft-{name}": f"aoft_deploy.cli.{name}"
    for name in ("train", "export", "predict", "inspect", "bench", "serve")
} | {"aoft-demo": "aoft_demo.cli"}
"""Module of each command; its function ``parser`` makes the parser."""

PACKAGES = ("aoft_deploy", "aoft_deploy.fleet")
"""Packages whose public names are in the Python reference."""

DOCUMENTS = {
    "ARCHITECTURE.md": "project/architecture.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "aoft_deploy/tuning/backbones/weights/aoft_vit_nano.md": "evidence/aoft_vit_nano.md",
    "benchmarks/README.md": "evidence/scripts.md",
    "deploy/README.md": "how-to/containers.md",
}
"""Documents outside docs/ and their pages."""

_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"^(```|~~~).*?^\1[ ]*$", re.M | re.S)
_log = logging.getLogger("mkdocs.hooks.docs")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that are made from the sources."""
    pages = {page: (ROOT / path).read_text("utf-8") for path, page in DOCUMENTS.items()}
    pages |= {f"commands/{name}.md": command_page(name) for name in COMMANDS}
    pages["commands/index.md"] = commands_page()
    pages["python/reference.md"] = reference_page()
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Rewrite the relative links that leave docs/."""
    sources = {target: path for path, target in DOCUMENTS.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    made = page.file.generated_by is not None and page.file.src_uri not in sources
    return markdown if made else with_site_links(markdown, source, page.file.src_uri)


def with_site_links(markdown: str, source: str, page: str) -> str:
    """The text with each relative link as the page needs it.

    Args:
        markdown: Text of a document.
        source: The document's path in the repository, from which its links are relative.
        page: Path of its page, relative to docs/.
    """

    def rewritten(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if re.match(r"[a-z]+:|#|/", target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path in DOCUMENTS:
            url = posixpath.relpath(DOCUMENTS[path], posixpath.dirname(page) or ".")
        elif path.startswith("docs/"):  # MkDocs checks these
            url = posixpath.relpath(path.removeprefix("docs/"), posixpath.dirname(page) or ".")
        elif (ROOT / path).exists():
            url = f"{SOURCE}/{path}"
        else:
            _log.warning("%s links to %s, which does not exist", source, path)
            return match[0]
        return f"{before}{url}{hash_}{anchor}{after}"

    return "".join(
        part if code else _LINK.sub(rewritten, part) for code, part in _code_and_text(markdown)
    )


def _code_and_text(markdown: str) -> Iterator[tuple[bool, str]]:
    """The fenced code blocks (True) and the parts between them (False)."""
    end = 0
    for fence in _FENCE.finditer(markdown):
        yield False, markdown[end : fence.start()]
        yield True, fence[0]
        end = fence.end()
    yield False, markdown[end:]


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of a command such as aoft-train."""
    parser: argparse.ArgumentParser = importlib.import_module(COMMANDS[name]).parser()
    parser.prog = name
    return parser


def commands_page() -> str:
    """The list of all commands, each with its description."""
    rows = (f"| [`{n}`]({n}.md) | {_sentence(command_parser(n).description)} |" for n in COMMANDS)
    head = [
        "# Commands",
        "",
        "These pages are made from the commands' parsers and say what `--help` says.",
    ]
    return "\n".join([*head, "", "| command | what it does |", "|---|---|", *rows, ""])


def command_page(name: str) -> str:
    """A command's reference: its description, and a table for each group of options."""
    parser = command_parser(name)
    usage = " ".join([*_choices(parser), *map(_usage, filter(_is_needed, parser._actions))])
    lines = [f"# {name}", "", _cell(parser.description), "", f"```\n{name} {usage}\n```", ""]
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.help is not argparse.SUPPRESS]
        if not actions:
            continue
        title = group.title or "options"
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        lines += [_cell(group.description), ""] if group.description else []
        lines += ["| option | meaning |", "|---|---|"]
        lines += [f"| {_names(action)} | {_meaning(parser, action)} |" for action in actions]
        lines += [""]
    lines += [_cell(parser.epilog), ""] if parser.epilog else []
    return "\n".join(lines)


def reference_page() -> str:
    """The public names of each package, for mkdocstrings."""
    lines = ["# Python reference", ""]
    for package in PACKAGES:
        names = sorted(importlib.import_module(package).__all__)
        lines += [f"## {package}", ""]
        for name in names:
            if not name.startswith("__"):
                lines += [f"::: {package}.{name}", ""]
    return "\n".join(lines)


def _choices(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The groups of options of which one is needed."""
    for group in parser._mutually_exclusive_groups:
        if group.required:
            yield f"({' | '.join(map(_usage, group._group_actions))})"


def _is_needed(action: argparse.Action) -> bool:
    return action.required or (not action.option_strings and action.nargs != "*")


def _usage(action: argparse.Action) -> str:
    value = _value(action)
    return f"{max(action.option_strings, key=len)} {value}" if action.option_strings else value


def _value(action: argparse.Action) -> str:
    """The placeholder of an option's value, as ``--help`` shows it."""
    if action.nargs == 0:
        return ""
    formatter = argparse.HelpFormatter("")
    default = action.dest.upper() if action.option_strings else action.dest
    return formatter._format_args(action, default)


def _names(action: argparse.Action) -> str:
    value = _value(action)
    if not action.option_strings:
        return f"`{value}`"
    return ", ".join(f"`{name}`" for name in action.option_strings) + (
        f" `{value}`" if value else ""
    )


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    if not action.help:
        return ""
    return _cell(parser._get_formatter()._expand_help(action))


def _cell(text: str | None) -> str:
    """Text of a parser as Markdown in one line."""
    joined = " ".join((text or "").split())
    joined = re.sub(r"(?<![\w`])(--[a-z][\w-]*)", r"`\1`", joined)
    return joined.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _sentence(text: str | None) -> str:
    return _cell(text).partition(". ")[0].rstrip(".") + "."


def on_page_content(html: str, *, page: Any, config: Any, files: Files) -> str:
    """Remove the roles of reStructuredText, such as ``:func:``, from docstrings."""
    return re.sub(r":(?:attr|class|data|func|meth|mod):(?=<code>)", "", html)


def on_config(config: Any) -> Any:
    """Let the parsers fold no lines."""
    os.environ["COLUMNS"] = "1000"
    return config
