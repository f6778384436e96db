"""aoft-bench: measure how fast artefacts run, compared with each other and with the CPU's peak."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aoft_deploy.cli.command import (
    DEVICES,
    ENGINES,
    Parser,
    device,
    positive,
    run,
    with_options,
)
from aoft_deploy.cli.progress import Progress
from aoft_deploy.errors import AoftError
from aoft_deploy.texts import one_line

if TYPE_CHECKING:
    from aoft_deploy.artefacts.timing import Subject, Timing

__all__ = ["main"]


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = Parser(
        prog="aoft-bench",
        description="Time artefacts in turn, each in a subprocess, so that other load affects all "
        "of them equally. Prints images per second, the ratio to the first artefact, and the share "
        "of this processor's peak in matrix products.",
    )
    options.add_argument(
        "artefacts", type=Path, nargs="+", metavar="ARTEFACT", help="what aoft-export wrote"
    )
    engine = options.add_argument_group("engine")
    engine.add_argument(
        "--engines",
        nargs="+",
        metavar="NAME",
        help=f"run each artefact in each of these: {ENGINES} (default: the engine that verified "
        "the artefact)",
    )
    engine.add_argument(
        "--threads",
        type=positive,
        nargs="+",
        metavar="N",
        help="run each artefact with each of these numbers of CPU threads (default: the number of "
        "cores)",
    )
    engine.add_argument(
        "--device", type=device, metavar="NAME", help=f"{DEVICES} (default: the engine's choice)"
    )
    timing = options.add_argument_group("measurement")
    timing.add_argument(
        "--batches",
        type=positive,
        nargs="+",
        default=[1, 8],
        metavar="N",
        help="images in a batch (default: 1 8)",
    )
    timing.add_argument(
        "--rounds",
        type=positive,
        default=7,
        metavar="N",
        help="timed runs of each artefact at each batch size; their median is shown (default: 7)",
    )
    results = options.add_argument_group("results, beside the printed table")
    results.add_argument("--json", type=Path, metavar="FILE", help="all measurements, in seconds")
    results.add_argument("--plot", type=Path, metavar="FILE.png", help="a plot of the throughput")
    results.add_argument("--overwrite", action="store_true", help="replace existing files")
    return options


def bench(options: argparse.Namespace) -> None:
    """Time the artefacts, print each result as it comes, and write and plot all of them.

    Raises:
        AoftError: A result cannot be written, or an artefact could not be timed.
    """
    from aoft_deploy.artefacts.machine import gemm_peaks, machine
    from aoft_deploy.artefacts.timing import trusted_peaks
    from aoft_deploy.drawing import check_matplotlib
    from aoft_deploy.files import check_new, write_json
    from aoft_deploy.processors import processors

    for name in ("json", "plot"):
        if getattr(options, name):
            check_new(getattr(options, name), options.overwrite, name)
    if options.plot:
        check_matplotlib()
    threads = options.threads or [processors()]
    timings: list[Timing] = []
    with ExitStack() as engines, Progress() as progress:
        subjects = _subjects(options, threads, engines, progress)
        progress.clear()
        _print_placements(subjects)
        for batch in options.batches:
            timings += _timed(subjects, batch, options.rounds, progress)
            progress.clear()
            _print(timings, batch)
    if not timings:
        raise AoftError("Nothing was timed: see the warnings.")
    on_cpu = all(timing.subject.engine.device == "cpu" for timing in timings)
    has_torch = importlib.util.find_spec("torch") is not None
    measured = gemm_peaks(max(threads)) if on_cpu and has_torch else {}
    peaks = trusted_peaks(measured, timings)
    if measured:
        _print_shares(timings, peaks, measured)
    elif on_cpu:
        print("no shares of the peak: measuring it needs PyTorch, aoft-deploy[train]")
    if options.json:
        rows = [timing.to_dict(peaks) for timing in timings]
        result = {"machine": machine(max(threads)), "gemm_peaks": measured, "rows": rows}
        write_json(options.json, result)
    if options.plot:
        from aoft_deploy.artefacts.throughput_plot import draw_throughput

        draw_throughput(timings, options.plot)
    names = len(options.artefacts) * len(options.engines or [None]) * len(threads)
    if missing := names * len(options.batches) - len(timings):
        raise AoftError(f"{missing} of {names * len(options.batches)} timings are missing.")


def _subjects(
    options: argparse.Namespace,
    threads: Sequence[int],
    engines: ExitStack,
    progress: Progress,
) -> list[Subject]:
    """Load every artefact in every engine, with the shortest names that are unique.

    Raises:
        AoftError: A single artefact cannot be loaded.
    """
    from aoft_deploy.artefacts.engine import EngineOptions
    from aoft_deploy.artefacts.isolation import SubprocessEngine
    from aoft_deploy.artefacts.registry import load_artefact
    from aoft_deploy.artefacts.timing import Subject

    short = len({path.name for path in options.artefacts}) == len(options.artefacts)
    wanted = [
        (path, engine, count)
        for path in options.artefacts
        for engine in options.engines or [None]
        for count in threads
    ]
    subjects = []
    for path, name, count in wanted:
        label = path.name if short else str(path)
        label += f" {name}" if name else ""
        label += f" ×{count}" if len(threads) > 1 else ""
        progress.show(f"opening {label}")
        load = partial(load_artefact, path, EngineOptions(name, count, options.device))
        try:
            subject = Subject.of(label, engines.enter_context(SubprocessEngine(load)))
            _size([subject])
            subjects.append(subject)
        except Exception as error:  # engines raise their own classes
            if len(wanted) == 1:
                raise
            _left_out(progress, label, error)
    return subjects


def _timed(subjects: list[Subject], batch: int, rounds: int, progress: Progress) -> list[Timing]:
    """Time those subjects that can run a batch of this size."""
    from aoft_deploy.artefacts.timing import inputs_for, interleaved

    able, size = [], _size(subjects)
    for subject in subjects:
        try:
            subject.engine.run(*inputs_for(subject.engine, batch, size))
            able.append(subject)
        except Exception as error:  # engines raise their own classes
            _left_out(progress, f"{subject.name} at batch {batch}", error)

    def show(done: int) -> None:
        progress.show(f"batch {batch}: round {done} of {rounds}")

    try:
        return interleaved(able, [batch], size, rounds, show)
    except Exception as error:
        _left_out(progress, f"batch {batch}", error)
        return []


def _left_out(progress: Progress, name: str, error: Exception) -> None:
    reason = one_line(with_options(str(error), parser()), 1000)
    progress.note(f"warning: {name} is left out: {reason}")


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
    return next(iter(sizes), (0, 0))


def _print_placements(subjects: Sequence[Subject]) -> None:
    """Print how many nodes of each artefact on a GPU are computed where, if its engine tells."""
    from aoft_deploy.artefacts.description import ArtefactInfo

    for subject in subjects:
        placement = ArtefactInfo(subject.engine.info, subject.name).placement
        if placement and subject.engine.device != "cpu":
            parts = [
                f"{sum(operators.values())} nodes on {provider}"
                + (f" ({', '.join(operators)})" if provider.startswith("CPU") else "")
                for provider, operators in placement.items()
            ]
            print(f"{subject.name} on {subject.engine.device}: {', '.join(parts)}", flush=True)


def _print(timings: Sequence[Timing], batch: int) -> None:
    """Print the rows of a batch size; the header comes before the first."""
    width = max((len(timing.subject.name) for timing in timings), default=0)
    if timings and timings[0].batch == batch:
        print(f"{'batch':>5}  {'artefact':{width}}  {'ms':>9}  {'img/s':>8}  {'ratio':>6}")
    for timing in (timing for timing in timings if timing.batch == batch):
        print(
            f"{timing.batch:5}  {timing.subject.name:{width}}  {timing.median * 1e3:9.2f}  "
            f"{timing.throughput:8.2f}  {timing.ratio:6.2f}",
            flush=True,
        )


def _print_shares(
    timings: Sequence[Timing], peaks: dict[str, float], measured: dict[str, float]
) -> None:
    """Print this machine's peaks, and the share of them that each artefact reaches."""
    from aoft_deploy.artefacts.machine import PRECISIONS

    speeds = ", ".join(f"{name} {peak / 1e9:,.0f}" for name, peak in measured.items())
    print(f"peak of matrix products on this machine, in 10⁹ operations per second: {speeds}")
    for name in (name for name in measured if name not in peaks):
        print(
            f"no share of {name}: an artefact is faster than the measured peak, so it is no limit"
        )
    for name in (name for name in PRECISIONS if name not in measured):
        print(
            f"no share of {name}: its products are not faster than those of fp32, as this "
            "processor has no instructions for them or PyTorch no kernels"
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
