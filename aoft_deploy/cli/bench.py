"""aoft-bench: measure how fast artefacts run, compared with each other and with the peak speed."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aoft_deploy.cli.bench_report import (
    figures,
    is_gpu,
    print_placements,
    print_shares,
    print_timings,
)
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
    from aoft_deploy.artefacts.engine import EngineOptions
    from aoft_deploy.artefacts.timing import Subject, Timing

__all__ = ["main"]


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = Parser(
        prog="aoft-bench",
        description="Time artefacts in turn, each in a subprocess, so that other load affects all "
        "of them equally. Prints images per second, the ratio to the first artefact, and the share "
        "of the processor's or GPU's peak in matrix products.",
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
        help="run each artefact on the CPU with each of these numbers of threads (default: the "
        "number of cores)",
    )
    engine.add_argument(
        "--lanes",
        type=positive,
        nargs="+",
        metavar="N",
        help="run each artefact with each of these numbers of batches at once; on the CPU, several "
        "lanes share the cores (default: 1)",
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
    from aoft_deploy.drawing import check_matplotlib
    from aoft_deploy.files import check_new, write_json
    from aoft_deploy.processors import processors

    for name in ("json", "plot"):
        if getattr(options, name):
            check_new(getattr(options, name), options.overwrite, name)
    if options.plot:
        check_matplotlib()
    wanted = _wanted(options)
    timings: list[Timing] = []
    with ExitStack() as engines, Progress() as progress:
        subjects = _subjects(wanted, engines, progress)
        progress.clear()
        print_placements(subjects)
        for batch in options.batches:
            timings += _timed(subjects, batch, options.rounds, progress)
            progress.clear()
            print_timings(timings, batch)
    if not timings:
        raise AoftError("Nothing was timed: see the warnings.")
    threads = max(options.threads or [processors()])
    peaks = {device: _peaks(device, threads) for device in _devices(timings)}
    print_shares(timings, peaks)
    if options.json:
        write_json(options.json, figures(timings, peaks, threads))
    if options.plot:
        from aoft_deploy.artefacts.throughput_plot import draw_throughput

        draw_throughput(timings, options.plot)
    number = len(wanted) * len(options.batches)
    if missing := number - len(timings):
        raise AoftError(f"{missing} of {number} timings are missing.")


def _wanted(options: argparse.Namespace) -> list[tuple[str, Path, EngineOptions]]:
    """Every artefact in every engine, with the shortest names that are unique.

    All are run with each number of lanes, those on the CPU also with each number of threads.

    Raises:
        SettingError: Threads are given, but no artefact runs on the CPU.
    """
    from aoft_deploy.errors import SettingError

    on_gpu = [_on_gpu(path, options.device) for path in options.artefacts]
    if options.threads and all(on_gpu):
        raise SettingError("`threads` is for artefacts on the CPU, but all run on a GPU.")
    short = len({path.name for path in options.artefacts}) == len(options.artefacts)
    return [
        (" ".join([path.name if short else str(path), *words]), path, chosen)
        for path, gpu in zip(options.artefacts, on_gpu, strict=True)
        for words, chosen in _engines(options, gpu)
    ]


def _engines(
    options: argparse.Namespace, on_gpu: bool
) -> Iterator[tuple[list[str], EngineOptions]]:
    """Every combination of engine options for an artefact, each with the words that name it."""
    from aoft_deploy.artefacts.engine import EngineOptions
    from aoft_deploy.processors import processors

    for engine in options.engines or [None]:
        words = [engine] if engine else []
        several = [len(given or []) > 1 for given in (options.threads, options.lanes)]
        for lanes in options.lanes or [1]:
            usual = processors() if lanes == 1 and not on_gpu else None
            for threads in [None] if on_gpu else options.threads or [usual]:
                numbers = [f"×{threads}"] * (several[0] and not on_gpu)
                numbers += [f"{lanes} lane{'s' * (lanes > 1)}"] * several[1]
                yield words + numbers, EngineOptions(engine, threads, options.device, lanes)


def _on_gpu(path: Path, device: str | None) -> bool:
    """Whether an artefact will run on a GPU; False for a damaged one, which loading refuses."""
    from aoft_deploy.artefacts.registry import exporters_of
    from aoft_deploy.errors import ArtefactError

    if device is not None:
        return device != "cpu"
    try:
        exporter = next(exporters_of(path), None)
        return exporter is not None and exporter.usual_device(path) == "cuda"
    except ArtefactError:
        return False


def _devices(timings: Sequence[Timing]) -> list[str]:
    return list(dict.fromkeys(timing.subject.engine.device for timing in timings))


def _peaks(device: str, threads: int) -> dict[str, float]:
    """The peak speed of a device in matrix products, by precision; empty if it is not measured."""
    from aoft_deploy.artefacts.gpu_peaks import gpu_gemm_peaks
    from aoft_deploy.artefacts.machine import gemm_peaks

    if importlib.util.find_spec("torch") is None:
        return {}
    if device == "cpu":
        return gemm_peaks(threads)
    return gpu_gemm_peaks(device) if is_gpu(device) else {}


def _subjects(
    wanted: Sequence[tuple[str, Path, EngineOptions]], engines: ExitStack, progress: Progress
) -> list[Subject]:
    """Load every artefact in every engine.

    Raises:
        AoftError: A single artefact cannot be loaded.
    """
    from aoft_deploy.artefacts.isolation import SubprocessEngine
    from aoft_deploy.artefacts.registry import load_artefact
    from aoft_deploy.artefacts.timing import Subject

    subjects = []
    for label, path, options in wanted:
        progress.show(f"opening {label}")
        load = partial(load_artefact, path, options)
        try:
            engine = engines.enter_context(SubprocessEngine(load))
            subject = Subject.of(label, engine, options.lanes)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``aoft-bench --help``."""
    return run(parser(), bench, argv)


if __name__ == "__main__":
    raise SystemExit(main())
