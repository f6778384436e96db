"""aoft-serve: serve exported artefacts over HTTP."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from aoft_deploy.cli.command import DEVICE, Parser, run
from aoft_deploy.serving.settings import PARSERS, Settings, read_toml

__all__ = ["main", "one_by_one", "parser"]


def parser() -> argparse.ArgumentParser:
    """The command's options: the artefacts, and one flag for each field of ``Settings``."""
    options = Parser(
        prog="aoft-serve",
        description="Serve exported artefacts over HTTP with the Open Inference Protocol v2.",
    )
    options.add_argument(
        "artefacts",
        nargs="*",
        metavar="[NAME=]ARTEFACT",
        help="artefacts of aoft-export; each task of a fleet is a model under the task's name",
    )
    options.add_argument(
        "--config", type=Path, metavar="TOML", help="file with settings; flags override it"
    )
    for entry in fields(Settings):
        flag, help = "--" + entry.name.replace("_", "-"), entry.metadata["help"]
        if entry.type == "bool":
            options.add_argument(flag, action="store_true", default=None, help=help)
        else:
            shown = "" if entry.default in (None, ()) else f" (default {entry.default})"
            several: dict[str, Any] = {"action": "append"} if "tuple" in str(entry.type) else {}
            options.add_argument(flag, type=PARSERS[str(entry.type)], help=help + shown, **several)
    return options


def serve(options: argparse.Namespace) -> None:
    """Serve until the process gets a signal."""
    config = {} if options.config is None else read_toml(options.config)
    paths = options.artefacts or config.get("artefacts", [])
    config.pop("artefacts", None)
    flags = {f.name: getattr(options, f.name) for f in fields(Settings)}
    given = {n: tuple(v) if isinstance(v, list) else v for n, v in flags.items() if v is not None}
    settings = Settings(**config | given)
    from aoft_deploy.memory import return_large_blocks
    from aoft_deploy.serving import server
    from aoft_deploy.serving.repository.names import artefact_name

    return_large_blocks()
    server.serve(settings, [artefact_name(path) for path in paths])


def one_by_one(words: Sequence[str]) -> list[str]:
    """The arguments with ``--device`` before each device, so that artefacts may follow devices."""
    found, after, missing = list[str](), False, False
    for word in words:
        if word == "--device":
            after = missing = True
        elif after and (missing or DEVICE.fullmatch(word)):
            found += ["--device", word]
            missing = False
        else:
            found.append(word)
            after = False
    return [*found, "--device"] if missing else found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``aoft-serve --help``."""
    return run(parser(), serve, one_by_one(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    raise SystemExit(main())
