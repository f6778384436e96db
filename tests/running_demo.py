"""The demo's command in a process of its own, and what to throw at it."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

__all__ = ["Demo", "bomb"]


class Demo:
    """The command in a process, at ``address`` once it says so.

    Args:
        log: Where its output goes; temporary files lie beside.
        arguments: Of the command.
        cwd: Its working directory.
        environment: Variables beside those of this process.
    """

    def __init__(
        self,
        log: Path,
        *arguments: Path | str,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        command = [sys.executable, "-u", "-m", "aoft_demo.cli", *map(str, arguments)]
        command += ["--port", "0", "--threads", "1"]
        own = {"OMP_NUM_THREADS": "1", "TMPDIR": str(log.parent), **(environment or {})}
        self.log, self.folder, start = log, log.parent, time.monotonic()
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **own}, cwd=cwd
            )
        self.address = self._address(300)
        self.seconds = time.monotonic() - start

    def _address(self, seconds: float) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = re.search(r"is at (http://\S+)", self.log.read_text())
            if found:
                return found[1]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def end(self) -> int:
        """As a supervisor does; Ctrl-C means the same, but is ignored below ``nohup`` and ``&``."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def bomb() -> bytes:
    """A PNG of 21 KB whose pixels would take 170 MB and more."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    side = 13_000
    rows = zlib.compress(bytes((side // 8 + 2) * side), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
