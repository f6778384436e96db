"""Run the commands of a document's ``console`` blocks and write their real output below them.

    python tools/transcripts.py README.md docs/tutorials/photographs.md
    python tools/transcripts.py --check README.md      # compare, and write nothing

The commands of one document run in order in one new folder, which has ``photos/``, ``shapes/`` and
``colours/``: 60 scanned digits and 60 drawn pictures twice, each in three folders, named by class.
A command that ends with ``&`` runs until the document ends. A server listens on another port than
8000, which may be in use. Long output is shortened.

The check requires that every shown line is still printed, but for those about the machine. It
ignores the values of numbers.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE, STDOUT

HEAD, TAIL = 9, 13
"""Output of more lines is shortened to its first and last ones."""

PICTURES = {
    "photos": ("digits", {"four": "4", "seven": "7", "zero": "0"}),
    "shapes": ("shape", {"ring": "ring", "star": "star", "triangle": "triangle"}),
    "colours": ("colour", {"blue": "blue", "green": "green", "red": "red"}),
}
"""The built-in task of each folder, and the task's class of each of its folders."""

PER_CLASS = 20
BLOCK = re.compile(r"^```console\n(.*?)^```", re.M | re.S)
_MACHINE = re.compile(r"device +")
"""Start of lines that differ between machines."""
_NUMBER = re.compile(r"\b[0-9a-f]{32,}\b|[-+]?\d[\d.,e+-]*")


def write_pictures(folder: Path) -> None:
    """Write the folders of JPEG files that the documents' commands read."""
    from PIL import Image

    from aoft_deploy.data.synthetic import load_task

    for data, (task, classes) in PICTURES.items():
        splits = load_task(task, train=400, val=1, test=0)
        for name, of_task in classes.items():
            (folder / data / name).mkdir(parents=True)
            label = splits.classes.index(of_task)
            found = [i for i, of in enumerate(splits.train.labels) if of == label][:PER_CLASS]
            for number, index in enumerate(found, 1):
                picture, _ = splits.train[index]
                assert isinstance(picture, Image.Image)
                large = picture.resize((320, 320), Image.Resampling.BICUBIC)
                large.save(folder / data / name / f"{number:02}.jpg", quality=92)


def commands(block: str) -> list[str]:
    """The commands of a block: lines after ``$``, with continuation lines."""
    found: list[str] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append(line.removeprefix("$ "))
        elif found and found[-1].endswith("\\"):
            found[-1] += f"\n{line}"
    return found


class Shell:
    """Runs commands in a folder, as a terminal would, without being one.

    Attributes:
        folder: Working directory, which is left out of the output.
        environment: Environment variables of the commands.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        cache = {"AOFT_CACHE_DIR": str(folder / ".cache")}
        self.environment = {**cache, **os.environ, "PATH": path}
        self._servers: list[subprocess.Popen[bytes]] = []
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = str(free.getsockname()[1])

    def run(self, command: str) -> str:
        """The output of a command, standard error included; of a server that of its start."""
        actual = command.replace("127.0.0.1:8000", f"127.0.0.1:{self._port}")
        if command.endswith("&"):
            return self._start(f"{actual.removesuffix('&')} --port {self._port}")
        code, output = self.execute(actual)
        if code:
            raise SystemExit(f"$ {command}\n{output}\nexit code {code}")
        return self._as_shown(output)

    def execute(self, command: str) -> tuple[int, str]:
        """The exit code and the output of a command that ends by itself."""
        bash = ["bash", "-c", command]
        done = subprocess.run(
            bash, cwd=self.folder, env=self.environment, stdout=PIPE, stderr=STDOUT
        )
        return done.returncode, done.stdout.decode("utf-8", "replace")

    def _start(self, command: str) -> str:
        log = self.folder / f".log-{len(self._servers)}"
        bash = ["bash", "-c", f"exec {command}"]
        with log.open("wb") as file:
            server = subprocess.Popen(
                bash, cwd=self.folder, env=self.environment, stdout=file, stderr=STDOUT
            )
        self._servers.append(server)
        end = time.monotonic() + 120
        while b'"ready"' not in log.read_bytes():
            if server.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"$ {command}\n{log.read_text('utf-8')}")
            time.sleep(0.1)
        return self._as_shown(log.read_text("utf-8", "replace"))

    def close(self) -> None:
        """End the servers."""
        for server in self._servers:
            server.send_signal(signal.SIGTERM)
            server.wait(60)

    def _as_shown(self, output: str) -> str:
        text = output.replace(f"{self.folder}/", "")
        return text.replace("\r", "\n").replace(self._port, "8000")


def lines_of(output: str) -> list[str]:
    """The lines of an output, without empty ones at its end."""
    return [line.rstrip() for line in output.rstrip().splitlines()]


def shortened(lines: list[str]) -> list[str]:
    """The first and the last lines of a long output."""
    if len(lines) <= HEAD + TAIL + 1:
        return lines
    return [*lines[:HEAD], "…", *lines[-TAIL:]]


def masked(line: str) -> str:
    """A line without the values of its numbers."""
    return " ".join(_NUMBER.sub("#", line).split())


def missing(block: str, printed: list[str]) -> list[str]:
    """The shown lines of a block that are not printed."""
    known = {masked(line) for line in printed} | {"…", ""}
    shown = (line for line in block.splitlines() if not line.startswith("$ "))
    return [line for line in shown if masked(line) not in known and not _MACHINE.match(line)]


def run_document(text: str, make_shell: type[Shell] = Shell) -> tuple[str, list[str]]:
    """Run a document's commands.

    Args:
        text: The document.
        make_shell: Runs the commands.

    Returns:
        The document with new outputs, and the lines of the old ones that are not printed now.
    """
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        write_pictures(folder)
        shell = make_shell(folder)

        def rewritten(match: re.Match[str]) -> str:
            lines, printed = [], []
            for command in commands(match[1]):
                output = lines_of(shell.run(command))
                lines += [f"$ {command}", *shortened(output)]
                printed += output
            faults.extend(missing(match[1], printed))
            return "\n".join(["```console", *lines, "```"])

        try:
            return BLOCK.sub(rewritten, text), faults
        finally:
            shell.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Update or check documents."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("documents", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    options = parser.parse_args(argv)
    wrong = False
    for path in options.documents:
        text, faults = run_document(path.read_text("utf-8"))
        if options.check:
            wrong = wrong or bool(faults)
            print("".join(f"{path}: not printed now: {line}\n" for line in faults), end="")
        else:
            path.write_text(text, "utf-8")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
