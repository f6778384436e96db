"""The command aoft-demo: many tasks on one backbone, in a browser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from aoft_deploy.cli.command import Parser, positive, run

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """The command's parser."""
    options = Parser(
        prog="aoft-demo",
        description="Demonstrate many tasks on one backbone in a browser: ask, race, teach, prove "
        "and take home. No data leaves this machine.",
    )
    add = options.add_argument
    add(
        "paths",
        nargs="*",
        type=Path,
        metavar="ARTEFACT|CKPT",
        help="a fleet of aoft-export --fleet, model.ckpt files, or both; default: bundled tasks",
    )
    add("--host", default="127.0.0.1", metavar="H", help="address to listen on (127.0.0.1)")
    add(
        "--port",
        type=port,
        default=7860,
        metavar="P",
        help="port to listen on; 0 takes a free one (7860)",
    )
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="further host name that requests may use, such as that of a proxy on this machine",
    )
    add("--backbone-weights", type=Path, metavar="FILE", help="file with the backbone's weights")
    add("--examples", type=Path, metavar="DIR", help="example pictures; default: bundled ones")
    add("--threads", type=positive, metavar="N", help="threads of the runtime; default: all cores")
    return options


def port(text: str) -> int:
    """A port, for ``type=`` of an option."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def show(options: argparse.Namespace) -> None:
    """Serve the page until a signal arrives."""
    from aoft_demo.server import demo_server, serve
    from aoft_demo.tasks.formats import check_paths

    check_paths(options.paths)
    server = demo_server(
        options.paths,
        host=options.host,
        port=options.port,
        weights=options.backbone_weights,
        examples=options.examples,
        threads=options.threads,
        allowed_hosts=options.allow_host,
    )
    serve(server)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``aoft-demo --help``."""
    return run(parser(), show, argv)


if __name__ == "__main__":
    raise SystemExit(main())
