"""Programs that the tests need, installed with apt-get if they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence


def program(names: Sequence[str], packages: Sequence[str]) -> str:
    """Path of a program; a missing one is an error, not a skip.

    Args:
        names: Names of the program; the first that exists is taken, and empty ones are ignored.
        packages: Debian packages that contain it.

    Raises:
        RuntimeError: It is missing and cannot be installed.
    """
    if found := _found(names):
        return found
    how = f"The tests need {names[-1]}: apt-get install {' '.join(packages)}, as root."
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise RuntimeError(how)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    for command in (["apt-get", "update", "-qq"], install):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{how} ({done.stderr.strip()[-300:]})")
    if found := _found(names):
        return found
    raise RuntimeError(how)


def _found(names: Sequence[str]) -> str | None:
    return next((path for name in names if name and (path := shutil.which(name))), None)
