"""Mutation testing: plant faults in the code, one at a time, and check that tests fail.

``python tools/mutants.py`` plants every fault of ``tools/mutants/*.toml``. Arguments select some:
names of those files, or parts of the names of sources. Each fault is planted in a copy of the
checkout, where the listed tests must fail. The script is run by hand, not in CI.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent
LISTS = Path(__file__).with_suffix("")
SOURCES = ("aoft_deploy", "exporters", "demo")
COPIED = (*SOURCES, "tests", "benchmarks", "tools", "deploy", "docs")
NOTHING_RAN = (2, 3, 4, 5)
"""Exit codes of pytest that mean that no test ran."""


@dataclass(frozen=True)
class Mutant:
    """A fault to plant.

    Attributes:
        file: Source, relative to the checkout.
        find: Text that occurs once in it.
        replace: The faulty text.
        tests: Arguments of pytest for the tests that must fail.
        why: The consequence for a user.
        survives: Why no test can detect the fault; empty if a test must.
    """

    file: str
    find: str
    replace: str
    tests: tuple[str, ...]
    why: str
    survives: str = ""


def read_list(path: Path) -> list[Mutant]:
    """The faults of a list.

    Raises:
        ValueError: An entry has a missing or an unknown key, or names no source.
    """
    found = []
    for number, entry in enumerate(tomllib.loads(path.read_text("utf-8"))["mutant"], 1):
        try:
            mutant = Mutant(**entry | {"tests": tuple(entry["tests"])})
            (ROOT / mutant.file).stat()
        except (KeyError, TypeError, OSError) as error:
            raise ValueError(f"{path.name}, mutant {number}: {error}.") from error
        found.append(mutant)
    return found


def copy_checkout(folder: Path) -> None:
    """Copy the files that tests need into a folder."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, folder / path.name)


def run_tests(folder: Path, tests: Sequence[str], seconds: float) -> int | None:
    """Exit code of pytest on a copy of the checkout; None after a timeout."""
    places = [folder, *(folder / source for source in SOURCES[1:])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            timeout=seconds,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def stale(mutant: Mutant, source: str) -> bool:
    """Whether ``find`` no longer occurs exactly once in the source."""
    return source.count(mutant.find) != 1 or mutant.find == mutant.replace


def judge(mutant: Mutant, folder: Path, seconds: float) -> str:
    """Plant a fault in a copy, run its tests, restore the copy, and return the result."""
    path = folder / mutant.file
    before = path.read_text("utf-8")
    if stale(mutant, before):
        return "STALE"
    path.write_text(before.replace(mutant.find, mutant.replace), "utf-8")
    try:
        code = run_tests(folder, mutant.tests, seconds)
    finally:
        path.write_text(before, "utf-8")
    if code is None:
        return "killed: hangs"
    if code in NOTHING_RAN:
        return "NOTHING RAN"
    return "killed" if code else "SURVIVED"


def main(argv: Sequence[str] | None = None) -> int:
    """Plant faults and print each result; return 0 if all faults that must be killed were."""
    parser = argparse.ArgumentParser(description="Plant faults and check that tests fail.")
    parser.add_argument("only", nargs="*", help="names of lists, or parts of the names of sources")
    parser.add_argument(
        "--jobs", type=int, default=1, help="number of copies of the checkout to use in parallel"
    )
    parser.add_argument("--seconds", type=float, default=600, help="time limit for one fault")
    parser.add_argument(
        "--check", action="store_true", help="only check that the lists match the sources"
    )
    options = parser.parse_args(argv)
    mutants = [
        mutant
        for path in sorted(LISTS.glob("*.toml"))
        for mutant in read_list(path)
        if not options.only
        or path.stem in options.only
        or any(name in mutant.file for name in options.only)
    ]
    if options.check:
        old = [m for m in mutants if stale(m, (ROOT / m.file).read_text("utf-8"))]
        for mutant in old:
            print(f"STALE  {mutant.file}: {mutant.why}")
        print(f"{len(mutants)} faults in {len({mutant.file for mutant in mutants})} sources")
        return 1 if old else 0
    results = plant(mutants, options.jobs, options.seconds)
    killed = sum(result.startswith("killed") for result in results)
    print(f"{killed} of {len(mutants)} killed")
    missed = [
        m
        for m, r in zip(mutants, results, strict=True)
        if not r.startswith("killed") and not m.survives
    ]
    return 1 if missed else 0


def plant(mutants: Sequence[Mutant], jobs: int, seconds: float) -> list[str]:
    """Judge all faults, several at a time, and print each result when it is known."""
    with tempfile.TemporaryDirectory() as scratch:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            copy_checkout(Path(scratch, str(number)))
            copies.put(Path(scratch, str(number)))

        def one(mutant: Mutant) -> str:
            folder, start = copies.get(), time.perf_counter()
            try:
                result = judge(mutant, folder, seconds)
            finally:
                copies.put(folder)
            spent = time.perf_counter() - start
            because = f" ({mutant.survives})" if mutant.survives else ""
            print(f"{result:14} {spent:4.0f} s  {mutant.file}: {mutant.why}{because}", flush=True)
            return result

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, mutants))


if __name__ == "__main__":
    raise SystemExit(main())
