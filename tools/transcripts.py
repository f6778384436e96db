"""Run the commands of a document's ``console`` blocks and write their real output below them.

    python tools/transcripts.py README.md docs/tutorials/photographs.md
    python tools/transcripts.py --check README.md      # compare, and write nothing

The commands of one document run in order in one new folder. It holds ``photos/``: 60 scanned digits
in three folders, named by class. A command that ends with ``&`` runs until the document ends.
Long output is shortened. The check ignores the values of numbers, which differ between machines.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

HEAD, TAIL = 9, 6
"""Output of more lines is shortened to its first and last ones."""

CLASSES = {"four": "4", "seven": "7", "zero": "0"}
PER_CLASS = 20
_NUMBER = re.compile(r"\b[0-9a-f]{32,}\b|[-+]?\d[\d.,e+-]*")
BLOCK = re.compile(r"^( *)```console\n(.*?)^ *```", re.M | re.S)


def write_photos(folder: Path) -> None:
    """Write scanned digits as JPEG files, in one folder per class."""
    from PIL import Image

    from aoft_deploy.data.synthetic import load_task

    splits = load_task("digits", train=400, val=1, test=0)
    for name, digit in CLASSES.items():
        (folder / name).mkdir(parents=True)
        label = splits.classes.index(digit)
        found = [i for i, of in enumerate(splits.train.labels) if of == label][:PER_CLASS]
        for number, index in enumerate(found, 1):
            picture, _ = splits.train[index]
            assert isinstance(picture, Image.Image)
            large = picture.resize((320, 320), Image.Resampling.BICUBIC)
            large.save(folder / name / f"{number:02}.jpg", quality=92)


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

    Args:
        folder: Working directory, which is left out of the output.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = {**os.environ, "PATH": path, "AOFT_CACHE_DIR": str(folder / ".cache")}
        self._running: list[subprocess.Popen[bytes]] = []

    def run(self, command: str) -> str:
        """The output of a command, standard error included; of a background command its start."""
        if command.endswith("&"):
            return self._start(command.removesuffix("&").strip())
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        text = self._without_folder(done.stdout)
        if done.returncode:
            raise SystemExit(f"$ {command}\n{text}\nexit code {done.returncode}")
        return text

    def _start(self, command: str) -> str:
        log = self._folder / f".log-{len(self._running)}"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self._folder,
                env=self._environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._running.append(process)
        end = time.monotonic() + 120
        while b'"ready"' not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"$ {command} &\n{log.read_text('utf-8')}")
            time.sleep(0.1)
        return self._without_folder(log.read_bytes())

    def close(self) -> None:
        """End the background commands."""
        for process in self._running:
            process.send_signal(signal.SIGTERM)
            process.wait(60)

    def _without_folder(self, output: bytes) -> str:
        text = output.decode("utf-8", "replace").replace(f"{self._folder}/", "")
        return text.replace("\r", "\n")


def shortened(text: str) -> list[str]:
    """The lines of an output; of a long one, the first and the last."""
    lines = [line.rstrip() for line in text.splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if len(lines) <= HEAD + TAIL + 1:
        return lines
    return [*lines[:HEAD], "…", *lines[-TAIL:]]


def with_outputs(text: str, shell: Shell) -> str:
    """The document with new outputs in its console blocks."""

    def rewritten(match: re.Match[str]) -> str:
        indent = match[1]
        lines: list[str] = []
        for command in commands(match[2].replace(f"\n{indent}", "\n").removeprefix(indent)):
            lines += [f"$ {command}", *shortened(shell.run(command))]
        body = "".join(f"{indent}{line}".rstrip() + "\n" for line in "\n".join(lines).split("\n"))
        return f"{indent}```console\n{body}{indent}```"

    return BLOCK.sub(rewritten, text)


def masked(text: str) -> Iterator[str]:
    """The lines of a document's console blocks without the values of numbers."""
    for block in BLOCK.finditer(text):
        for line in block[2].splitlines():
            shown = line if line.strip().startswith("$") else _NUMBER.sub("#", line)
            yield " ".join(shown.split())


def update(path: Path, *, check: bool) -> bool:
    """Run a document's commands; write the outputs or compare. Whether it was right."""
    before = path.read_text("utf-8")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        write_photos(folder / "photos")
        shell = Shell(folder)
        try:
            after = with_outputs(before, shell)
        finally:
            shell.close()
    old, new = list(masked(before)), list(masked(after))
    if check:
        print("\n".join(difflib.unified_diff(old, new, str(path), "now", lineterm="")))
    elif after != before:
        path.write_text(after, "utf-8")
        print(f"{path}: written")
    return old == new


def main(argv: Sequence[str] | None = None) -> int:
    """Update or check documents."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("documents", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    options = parser.parse_args(argv)
    right = [update(path, check=options.check) for path in options.documents]
    return 0 if all(right) or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
