"""aoft-predict: classify image files with an exported artefact."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.cli.command import (
    Parser,
    add_engine_options,
    engine_options,
    positive,
    run,
    with_options,
)
from aoft_deploy.cli.progress import Progress
from aoft_deploy.texts import one_line

if TYPE_CHECKING:
    from aoft_deploy.artefacts.image_stream import Source
    from aoft_deploy.classes import Answer

__all__ = ["main"]

STDIN = "-"
"""Input or list that is read from standard input."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = Parser(
        prog="aoft-predict", description="Classify image files with an exported artefact."
    )
    options.add_argument(
        "artefact", type=Path, metavar="ARTEFACT", help="what aoft-export wrote, such as model.onnx"
    )
    options.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="image, folder of images, quoted pattern such as 'photos/*.jpg', or - for one image "
        "on standard input",
    )
    options.add_argument(
        "--list",
        metavar="FILE",
        help="classify the images of this list, one path a line; - reads "
        "the list from standard input",
    )
    options.add_argument("--task", metavar="NAME", help="task of a fleet, which a fleet needs")
    answers = options.add_argument_group("answers, in the order of the inputs")
    answers.add_argument(
        "--top",
        type=positive,
        metavar="N",
        help="most probable classes (default: 1, or of independent labels all above 0.5)",
    )
    form = answers.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line for each image")
    form.add_argument(
        "--csv",
        action="store_true",
        help="a table with the columns image, label, probability; a row a class",
    )
    add_engine_options(options.add_argument_group("engine"))
    return options


def predict(options: argparse.Namespace) -> None:
    """Classify all readable images, name the others, and fail if an image has no answer."""
    if not options.inputs and options.list is None:
        parser().error("give images, or a list of them with --list")

    from aoft_deploy.artefacts.image_stream import classify_stream
    from aoft_deploy.artefacts.prediction import load_classifier
    from aoft_deploy.errors import AoftError, ImageError
    from aoft_deploy.memory import keep_large_blocks

    keep_large_blocks()
    sources, total = _sources(options)
    classifier = load_classifier(options.artefact, options.task, engine_options(options))
    write = _csv() if options.csv else _json if options.json else _text
    start, done, failed = time.monotonic(), 0, 0
    of = "" if total is None else f" of {total:,}"
    with Progress(hidden=sys.stdout.isatty()) as progress:
        for name, answer in classify_stream(classifier, sources, options.top):
            done += 1
            if not isinstance(answer, AoftError):
                write(name, answer)
            elif total == 1:
                raise answer
            else:
                failed += 1
                progress.note(f"warning: {one_line(with_options(str(answer), parser()), 1000)}")
            progress.show(f"{done:,}{of} images, {done / (time.monotonic() - start):.1f} a second")
    if failed:
        raise ImageError(f"No answer for {failed:,} of {done:,} images.")


def _sources(options: argparse.Namespace) -> tuple[Iterator[Source], int | None]:
    """The images of all inputs, and their number; None for a list from standard input.

    Raises:
        ImageError: A folder or pattern has no images, or the list cannot be read or is empty.
        SettingError: Standard input is a terminal.
    """
    from aoft_deploy.data.listing import describe_skipped, image_files
    from aoft_deploy.errors import ImageError, SettingError

    if STDIN in (*options.inputs, options.list) and sys.stdin.isatty():
        raise SettingError(
            "Standard input is a terminal: name files, or pipe an image into the command, as in "
            f"aoft-predict {options.artefact} - < photo.jpg."
        )
    named, skipped = list[str](), Counter[str]()
    for text in options.inputs:
        named += [STDIN] if text == STDIN else map(str, image_files([Path(text)], skipped))
    if skipped:
        print(f"note: {describe_skipped(skipped)}.", file=sys.stderr)
    if options.list == STDIN:
        return map(_source, chain(named, _lines(sys.stdin.buffer))), None
    if options.list is not None:
        try:
            named += _lines(Path(options.list).read_bytes().splitlines())
        except OSError as error:
            raise ImageError(f"List {options.list} cannot be read: {error.strerror}.") from error
        if not named:
            raise ImageError(f"List {options.list} names no images: write one path a line.")
    return map(_source, named), len(named)


def _lines(lines: Iterable[bytes]) -> Iterator[str]:
    return (os.fsdecode(line) for each in lines if (line := each.strip(b"\r\n")))


def _source(name: str) -> Source:
    return name, sys.stdin.buffer.read() if name == STDIN else Path(name)


def _csv() -> Callable[[str, list[Answer]], None]:
    """Function that writes an image's rows of a table, whose header comes with the first."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    header: list[str] = []

    def write(name: str, answer: list[Answer]) -> None:
        rows = [_entry(each) for each in answer]
        if rows and not header:
            header.extend(["image", *rows[0]])
            table.writerow(header)
        table.writerows([name, *row.values()] for row in rows)

    return write


def _json(name: str, answer: list[Answer]) -> None:
    entry = {"image": name, "classes": [_entry(each) for each in answer]}
    print(json.dumps(entry, ensure_ascii=False))


def _text(name: str, answer: list[Answer]) -> None:
    print("  ".join([name, *map(str, answer)]))


def _entry(answer: Answer) -> dict[str, Any]:
    return {
        name: round(value, 6) if name == "probability" else value
        for name, value in answer._asdict().items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``aoft-predict --help``."""
    return run(parser(), predict, argv)


if __name__ == "__main__":
    raise SystemExit(main())
