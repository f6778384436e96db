"""aoft-predict: classify image files with an exported artefact."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aoft_deploy.cli.command import add_engine_options, engine_options, positive, run

if TYPE_CHECKING:
    from PIL.Image import Image

    from aoft_deploy.artefacts.prediction import Classifier
    from aoft_deploy.classes import Answer
    from aoft_deploy.errors import AoftError

__all__ = ["main"]

BATCH = 16


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="aoft-predict", description="Classify image files with an exported artefact."
    )
    options.add_argument(
        "artefact", type=Path, metavar="ARTEFACT", help="an artefact of aoft-export"
    )
    options.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    options.add_argument(
        "--top",
        type=positive,
        help="most probable classes per image (default 1; of independent labels, those above 0.5)",
    )
    options.add_argument("--task", metavar="NAME", help="name of a task, for a fleet")
    add_engine_options(options)
    options.add_argument("--json", action="store_true", help="one JSON object per image")
    return options


def predict(options: argparse.Namespace) -> None:
    """Classify all readable images, then fail if an image has no answer."""
    from aoft_deploy.artefacts.prediction import load_classifier
    from aoft_deploy.data.images import read_image
    from aoft_deploy.errors import ImageError

    classifier = load_classifier(options.artefact, options.task, engine_options(options))
    failures: list[AoftError] = []
    readable: list[tuple[Path, Image]] = []
    for path in options.images:
        try:
            readable.append((path, read_image(path)))
        except ImageError as error:
            failures.append(error)
        if len(readable) == BATCH:
            failures += _answer(classifier, readable, options)
            readable = []
    if readable:
        failures += _answer(classifier, readable, options)
    if failures:
        more = f" ({len(failures) - 1} more have no answer)" if len(failures) > 1 else ""
        raise type(failures[0])(f"{failures[0]}{more}")


def _answer(
    classifier: Classifier, batch: list[tuple[Path, Image]], options: argparse.Namespace
) -> list[AoftError]:
    """Print a line for each classified image, and return the errors of the others."""
    from aoft_deploy.errors import VerificationError

    try:
        answers = classifier.predict([image for _, image in batch], options.top)
    except VerificationError as error:
        if len(batch) == 1:
            return [VerificationError(f"{batch[0][0]} has no answer. {error}")]
        return [failure for each in batch for failure in _answer(classifier, [each], options)]
    for (path, _), row in zip(batch, answers, strict=True):
        print(_as_json(path, row) if options.json else "  ".join([str(path), *map(str, row)]))
    return []


def _as_json(path: Path, row: list[Answer]) -> str:
    classes = [answer._asdict() for answer in row]
    return json.dumps({"image": str(path), "classes": classes}, ensure_ascii=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see ``aoft-predict --help``."""
    return run(parser(), predict, argv)


if __name__ == "__main__":
    raise SystemExit(main())
