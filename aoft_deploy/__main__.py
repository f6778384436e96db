"""python -m aoft_deploy: list the commands."""

from __future__ import annotations

import sys
import textwrap
from importlib.metadata import distribution

from aoft_deploy._version import __version__

__all__ = ["main"]


def main() -> None:
    """Print the version, and a line for each command: what it does, from its parser."""
    print(f"aoft-deploy {__version__}")
    entries = distribution("aoft-deploy").entry_points.select(group="console_scripts")
    for entry in sorted(entries):
        entry.load()
        parser = sys.modules[entry.module].parser()
        purpose = parser.description.partition(". ")[0].rstrip(".")
        print(textwrap.fill(f"  {entry.name:14}{purpose}.", 80, subsequent_indent=" " * 16))
    print("COMMAND --help shows the options of a command.")


if __name__ == "__main__":
    main()
