"""The options of aoft-train. This module imports no heavy libraries."""

from __future__ import annotations

import argparse
import json
from argparse import SUPPRESS
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aoft_deploy.cli.command import Parser, add_import_option, positive
from aoft_deploy.training.paper_benchmarks.tasks import BENCHMARKS
from aoft_deploy.training.settings import AUGMENTATIONS, PRECISIONS, TRAIN_ON, TrainingSettings
from aoft_deploy.tuning.method_summaries import SUMMARIES

__all__ = ["check_usage", "given_settings", "parser"]

BACKBONES = "the backbone's"
DEFAULT = TrainingSettings()
TASKS = ("colour", "count", "digits", "orientation", "position", "shape")


def parser() -> argparse.ArgumentParser:
    """The command's options. Training settings without a value are absent from the result."""
    p = Parser(
        prog="aoft-train",
        description="Fine-tune a pre-trained Vision Transformer on labelled images. Writes "
        "model.ckpt (only the trained parameters) and metrics.jsonl (one line per epoch).",
        epilog="Several GPUs: accelerate launch -m aoft_deploy.cli.train OPTIONS.",
    )
    _add_data(p)
    _add_model(p)
    _add_optimisation(p)
    _add_regularisation(p)
    _add_output(p)
    _add_benchmark(p)
    return p


def _add_data(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("data")
    add, check = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add(
        "--data",
        required=True,
        metavar="DIR|NAME",
        help="folder with train/CLASS/… and maybe val and test, or with CLASS/…, of which 10%% "
        f"each become val and test; or a built-in task: {', '.join(TASKS)}",
    )
    check(
        "--skip-unreadable",
        action="store_true",
        help="leave out images that cannot be read, and list them in unreadable.json",
    )
    check(
        "--trust-images",
        action="store_true",
        help="skip the check that every training image can be decoded",
    )
    meaning = "processes that load images (default: 0 on a CPU, up to 8 for a GPU)"
    add("--workers", type=int, metavar="N", help=meaning)
    meaning = "train+val trains on both and keeps the last epoch"
    add("--train-on", choices=TRAIN_ON, default=SUPPRESS, help=_help("train-on", meaning))


def _add_model(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("model", argument_default=SUPPRESS)
    add = group.add_argument
    meaning = "timm name, such as vit_base_patch16_224.augreg_in21k"
    add(
        "--backbone", metavar="NAME", help=_help("backbone", meaning, f"{DEFAULT.backbone}, a demo")
    )
    meaning = "its weights: .safetensors, .pth, .bin or .npz (default: timm's, downloaded)"
    add("--backbone-weights", type=Path, metavar="FILE", help=meaning)
    add_import_option(group)
    meaning = "side of the input in pixels"
    add("--img-size", type=int, metavar="N", help=_help("img-size", meaning, BACKBONES))
    meaning = "resize the shorter edge (center), the longer (border), or both (squash)"
    add("--crop-mode", metavar="MODE", help=_help("crop-mode", meaning, BACKBONES))
    meaning = "share of the resized side that is kept, from 0.1"
    add("--crop-pct", type=float, metavar="X", help=_help("crop-pct", meaning, BACKBONES))
    meaning = f"fine-tuning method: {', '.join(SUMMARIES)}"
    add("--method", choices=SUMMARIES, metavar="NAME", help=_help("method", meaning))
    add("--rank", type=int, metavar="D", help=_help("", "rank of the updates", "the method's"))
    meaning = "linear maps to update, such as q k v qkv proj fc1 fc2"
    add("--targets", nargs="+", metavar="MAP", help=_help("", meaning, "the method's"))
    meaning = "another setting of the method, as JSON; may be repeated"
    add("--set", action="append", type=_setting, metavar="NAME=VALUE", help=meaning)


def _add_optimisation(p: argparse.ArgumentParser) -> None:
    add = p.add_argument_group("optimisation", argument_default=SUPPRESS).add_argument
    for name, kind, meaning, default in (
        ("epochs", int, "passes over the training images", ""),
        ("stop-after", int, "stop after this many epochs of the full schedule", "all"),
        ("batch-size", int, "images per step, over all GPUs and accumulated parts", ""),
        ("accumulate", int, "compute each step in N parts, to save memory", ""),
        ("lr", float, "peak learning rate of the updates", "the method's"),
        ("head-lr", float, "peak learning rate of the classifier", "the method's"),
        ("min-lr", float, "final learning rate", ""),
        ("warmup-epochs", float, "epochs with increasing learning rate", ""),
        ("weight-decay", float, "weight decay of trained matrices", ""),
        ("clip-norm", float, "largest gradient norm; 0 means no limit", ""),
        ("seed", int, "seed of all random numbers, and of a split that is made", ""),
    ):
        metavar = "N" if kind is int or name == "warmup-epochs" else "X"
        add(f"--{name}", type=kind, metavar=metavar, help=_help(name, meaning, default))
    add(
        "--checkpointing",
        action="store_true",
        default=False,
        help="keep only the inputs of blocks for the backward pass: less memory, more time, the "
        "same results",
    )
    meaning = (
        "of the arithmetic; auto is bf16 where the hardware computes it fast, else fp32; tf32 is "
        "for NVIDIA GPUs"
    )
    add("--precision", choices=PRECISIONS, help=_help("precision", meaning))


def _add_regularisation(p: argparse.ArgumentParser) -> None:
    add = p.add_argument_group("regularisation", argument_default=SUPPRESS).add_argument
    meaning = (
        "flip mirrors half of the images; affine rotates, shifts and scales slightly; window crops "
        "at random positions and mirrors; crop also varies the size; rand is crop with RandAugment"
    )
    add("--augment", choices=AUGMENTATIONS, help=_help("augment", meaning))
    for name, meaning in (
        ("mixup", "alpha of mixup; 0 for none"),
        ("cutmix", "alpha of CutMix; 0 for none"),
        ("label-smoothing", "share of the target that is spread over all classes"),
        ("drop-path", "rate of stochastic depth"),
    ):
        add(f"--{name}", type=float, metavar="X", help=_help(name, meaning))


def _add_output(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("output")
    add, existing = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    existing("--resume", action="store_true", help="continue the run in --out, if there is one")
    existing("--overwrite", action="store_true", help="replace the run in --out, if there is one")
    add("--quiet", action="store_true", help="show only notes and the results")
    add("--tensorboard", action="store_true", help="also write TensorBoard metrics into --out")


def _add_benchmark(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group(
        "benchmarks of the papers",
        "--data is the benchmark's folder. Learning rate and epoch are chosen on the validation "
        "images. A final run trains on these images as well, and is tested once. Other options "
        "override the recipe.",
    )
    kind = group.add_mutually_exclusive_group()
    kind.add_argument("--recipe", metavar="TASK", help="one task, such as vtab/cifar")
    kind.add_argument("--suite", choices=BENCHMARKS, help="all tasks; finished runs are kept")
    add = group.add_argument
    meaning = "runs of each task of the suite (default: 3)"
    add("--seeds", type=positive, metavar="N", help=meaning)
    add("--tasks", nargs="+", metavar="TASK", help="only these tasks of the suite (default: all)")
    meaning = "accept splits with other numbers of images, and report them"
    add("--any-size", action="store_true", help=meaning)


def _help(name: str, meaning: str, default: str = "") -> str:
    """Help text: a setting's meaning and its default, by default that of ``TrainingSettings``."""
    return f"{meaning} (default: {default or getattr(DEFAULT, name.replace('-', '_'))})"


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value  # strings need no quotes


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The values of ``TrainingSettings`` that are on the command line."""
    values = vars(options)
    settings = {name: values[name] for name in values.keys() & vars(DEFAULT).keys()}
    method_settings = dict(values.get("set", ()))
    method_settings |= {name: values[name] for name in ("rank", "targets") if name in values}
    return {**settings, "method_settings": method_settings}


def check_usage(
    p: argparse.ArgumentParser, options: argparse.Namespace, settings: Mapping[str, Any]
) -> None:
    """Exit with 2 if options cannot be combined."""
    if not options.suite and (options.seeds is not None or options.tasks is not None):
        p.error("--seeds and --tasks need --suite")
    fixed = {"train_on", "stop_after"} & settings.keys()
    if not (options.suite or options.recipe):
        if options.any_size:
            p.error("--any-size needs --recipe or --suite")
    elif fixed:
        p.error("--recipe and --suite decide --train-on and --stop-after themselves")
    elif options.skip_unreadable and not options.any_size:
        p.error("--skip-unreadable changes the numbers of images: --any-size accepts that")
    if options.suite and "seed" in settings:
        p.error("--suite counts its seeds from 0: give --seeds instead of --seed")
