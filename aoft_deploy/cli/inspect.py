"""aoft-inspect: show what a checkpoint or artefact holds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aoft_deploy.cli.command import run

__all__ = ["main"]

SHOWN = 12
"""Entries of a long list or table that the text form shows."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="aoft-inspect", description="Show what a checkpoint, ONNX artefact or manifest holds."
    )
    options.add_argument("file", type=Path, metavar="FILE")
    options.add_argument("--json", action="store_true", help="everything, as JSON")
    return options


def inspect(options: argparse.Namespace) -> None:
    """Print the description."""
    from aoft_deploy.inspection import inspect_file

    description = inspect_file(options.file)
    if options.json:
        print(json.dumps(description, indent=2, ensure_ascii=False))
        return
    for key, value in description.items():
        print(f"{key.replace('_', ' '):18}{_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        parts = [f"{k} {_text(v)}" for k, v in list(value.items())[:SHOWN]]
    elif isinstance(value, list):
        parts = [_text(v) for v in value[:SHOWN]]
    else:
        return (
            f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        )
    rest = len(value) - len(parts)
    return ", ".join(parts + ([f"… and {rest} more"] if rest else []))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``aoft-inspect --help``."""
    return run(parser(), inspect, argv)


if __name__ == "__main__":
    raise SystemExit(main())
