"""aoft-bench: measure how fast artefacts run, compared with each other and with the CPU's peak."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.cli.command import Parser, positive, run

if TYPE_CHECKING:
    from aoft_deploy.artefacts.timing import Subject, Timing

__all__ = ["main"]


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = Parser(
        prog="aoft-bench",
        description="Time artefacts in one interleaved run, each in a subprocess. Prints images "
        "per second, the ratio to the first artefact, and the share of this processor's peak in "
        "matrix products.",
    )
    options.add_argument("artefacts", type=Path, nargs="+", metavar="ARTEFACT")
    options.add_argument(
        "--batches", type=positive, nargs="+", default=[1, 8], metavar="N", help="default: 1 8"
    )
    options.add_argument(
        "--engines",
        nargs="+",
        metavar="NAME",
        help="run each artefact in each of these engines; default: the engine that verified it",
    )
    options.add_argument(
        "--threads",
        type=positive,
        nargs="+",
        metavar="N",
        help="run each artefact with each of these thread counts; default: the number of cores",
    )
    options.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 …")
    options.add_argument("--rounds", type=positive, default=7, metavar="N", help="default: 7")
    options.add_argument("--json", type=Path, metavar="FILE", help="write all measurements")
    options.add_argument("--plot", type=Path, metavar="FILE.png", help="plot the throughput")
    return options


def bench(options: argparse.Namespace) -> None:
    """Time the artefacts, and print, write and plot the results."""
    from aoft_deploy.artefacts.machine import gemm_peaks, machine
    from aoft_deploy.artefacts.timing import interleaved, trusted_peaks
    from aoft_deploy.drawing import check_matplotlib
    from aoft_deploy.errors import OutputError
    from aoft_deploy.files import json_text
    from aoft_deploy.processors import processors

    if options.plot:
        check_matplotlib()
    threads = options.threads or [processors()]
    with ExitStack() as engines:
        subjects = _subjects(options, threads, engines)
        size = _size(subjects)
        timings = interleaved(subjects, options.batches, size, options.rounds, _progress(options))
    _print(timings)
    on_cpu = all(subject.engine.device == "cpu" for subject in subjects)
    measured = gemm_peaks(max(threads)) if on_cpu else {}
    peaks = trusted_peaks(measured, timings)
    _print_shares(timings, peaks, measured)
    try:
        if options.json:
            rows = [timing.to_dict(peaks) for timing in timings]
            result = {"machine": machine(max(threads)), "gemm_peaks": measured, "rows": rows}
            options.json.write_text(json_text(result, indent=1) + "\n", "utf-8")
        if options.plot:
            from aoft_deploy.artefacts.throughput_plot import draw_throughput

            draw_throughput(timings, options.plot)
    except OSError as error:
        raise OutputError(f"The figures cannot be written: {error}.") from error


def _subjects(
    options: argparse.Namespace, threads: Sequence[int], engines: ExitStack
) -> list[Subject]:
    """Load every artefact in every engine, with the shortest names that are unique."""
    from aoft_deploy.artefacts.engine import EngineOptions
    from aoft_deploy.artefacts.isolation import SubprocessEngine
    from aoft_deploy.artefacts.registry import load_artefact
    from aoft_deploy.artefacts.timing import Subject

    short = len({path.name for path in options.artefacts}) == len(options.artefacts)
    subjects = []
    for path in options.artefacts:
        for name in options.engines or [None]:
            for count in threads:
                load = partial(load_artefact, path, EngineOptions(name, count, options.device))
                engine = engines.enter_context(SubprocessEngine(load))
                label = path.name if short else str(path)
                label += f" {name}" if name else ""
                label += f" ×{count}" if len(threads) > 1 else ""
                subjects.append(Subject.of(label, engine))
    return subjects


def _size(subjects: Sequence[Subject]) -> tuple[int, int]:
    """Height and width of the artefacts' images.

    Raises:
        ArtefactError: An artefact has no preprocessing in its metadata.
        SettingError: The sizes differ.
    """
    from aoft_deploy.artefacts.description import ArtefactInfo
    from aoft_deploy.errors import SettingError

    sizes: dict[tuple[int, int], str] = {}
    for subject in subjects:
        preprocessing = ArtefactInfo(subject.engine.info, subject.name).preprocessing
        sizes.setdefault((preprocessing.height, preprocessing.width), subject.name)
    if len(sizes) > 1:
        named = ", ".join(f"{name} {h} x {w}" for (h, w), name in sizes.items())
        raise SettingError(f"Artefacts of different input sizes ({named}): time them separately.")
    return next(iter(sizes))


def _progress(options: argparse.Namespace) -> Any:
    """A progress callback, which prints only to a terminal."""
    if not sys.stderr.isatty():
        return lambda done: None

    def show(done: int) -> None:
        end = "\n" if done == options.rounds else ""
        print(f"\rround {done} of {options.rounds}", end=end, file=sys.stderr, flush=True)

    return show


def _print(timings: Sequence[Timing]) -> None:
    width = max(len(timing.subject.name) for timing in timings)
    print(f"{'batch':>5}  {'artefact':{width}}  {'ms':>9}  {'img/s':>8}  {'ratio':>6}")
    for timing in timings:
        print(
            f"{timing.batch:5}  {timing.subject.name:{width}}  {timing.median * 1e3:9.2f}  "
            f"{timing.throughput:8.2f}  {timing.ratio:6.2f}",
            flush=True,
        )


def _print_shares(
    timings: Sequence[Timing], peaks: dict[str, float], measured: dict[str, float]
) -> None:
    """Print this machine's peaks, and the share of them that each artefact reaches."""
    if not measured:
        return
    speeds = ", ".join(f"{name} {peak / 1e9:,.0f}" for name, peak in measured.items())
    print(f"peak of matrix products on this machine, in 10⁹ operations per second: {speeds}")
    for name in (name for name in measured if name not in peaks):
        print(
            f"no share of {name}: an artefact is faster than the measured peak, so it is no limit"
        )
    for timing in timings:
        share, subject = timing.share(peaks), timing.subject
        if share is not None:
            print(f"{timing.batch:5}  {subject.name}  {share:.0%} of {subject.precision}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``aoft-bench --help``."""
    return run(parser(), bench, argv)


if __name__ == "__main__":
    raise SystemExit(main())
