"""The options of aoft-train. This module imports no heavy libraries."""

from __future__ import annotations

import argparse
import json
from argparse import SUPPRESS
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aoft_deploy.cli.command import Parser, add_import_option
from aoft_deploy.training.paper_benchmarks.tasks import BENCHMARKS
from aoft_deploy.training.settings import AUGMENTATIONS, PRECISIONS, TRAIN_ON, TrainingSettings
from aoft_deploy.tuning.method_names import SUMMARIES

__all__ = ["check_usage", "given_settings", "parser"]

DEFAULT = TrainingSettings()


def parser() -> argparse.ArgumentParser:
    """The command's options. Training settings without a value are absent from the result."""
    p = Parser(
        prog="aoft-train",
        description="Fine-tune a pre-trained Vision Transformer on labelled images. Writes "
        "model.ckpt (only the trained parameters) and metrics.jsonl (one line per epoch).",
        epilog="Several GPUs: accelerate launch -m aoft_deploy.cli.train OPTIONS.",
    )
    add = p.add_argument
    add("--data", required=True, metavar="DIR|NAME", help="image folder, or a built-in task")
    add("--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    add("--resume", action="store_true", help="continue the run in --out, if there is one")
    add("--quiet", action="store_true", help="show no progress")
    add("--tensorboard", action="store_true", help="also write TensorBoard metrics into --out")
    add("--workers", type=int, metavar="N", help="processes that load images (0 on a CPU, else 8)")
    add(
        "--trust-images",
        action="store_true",
        help="skip the check that every training image can be decoded",
    )
    _add_benchmark(p)
    _add_model(p)
    _add_optimisation(p)
    _add_data(p)
    return p


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
    add("--seeds", type=int, metavar="N", help="runs of each task of the suite (3)")
    add("--tasks", nargs="+", metavar="TASK", help="only these tasks of the suite")
    add(
        "--any-size",
        action="store_true",
        help="accept splits with other numbers of images, and report them",
    )


def _add_model(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("model", argument_default=SUPPRESS)
    add = group.add_argument
    add("--backbone", metavar="NAME", help=f"timm name ({DEFAULT.backbone})")
    add(
        "--backbone-weights",
        type=Path,
        metavar="FILE",
        help=".safetensors, .pth, .bin or .npz; default: timm's weights",
    )
    add_import_option(group)
    add("--img-size", type=int, metavar="N", help="side of the input in pixels")
    add(
        "--crop-mode",
        metavar="MODE",
        help="resize the shorter edge (center), both (squash) or the longer (border)",
    )
    add("--crop-pct", type=float, metavar="X", help="share of the resized image that is kept")
    add(
        "--method",
        choices=SUMMARIES,
        metavar="NAME",
        help=f"{', '.join(SUMMARIES)} ({DEFAULT.method})",
    )
    add("--rank", type=int, metavar="D", help="rank of the method's updates")
    add("--targets", nargs="+", metavar="MAP", help="linear maps to update, such as q v fc1")
    add(
        "--set",
        action="append",
        type=_setting,
        metavar="NAME=VALUE",
        help="another setting of the method, as JSON; may be repeated",
    )


def _add_optimisation(p: argparse.ArgumentParser) -> None:
    add = p.add_argument_group("optimisation", argument_default=SUPPRESS).add_argument
    for name, kind, meaning in (
        ("epochs", int, ""),
        ("stop-after", int, "stop after this many epochs of the full schedule"),
        ("batch-size", int, "images per step, over all GPUs and accumulated parts"),
        ("accumulate", int, "compute each step in N parts, to save memory"),
        ("lr", float, "peak learning rate (depends on the method)"),
        ("head-lr", float, "peak learning rate of the classifier (depends on the method)"),
        ("min-lr", float, "final learning rate"),
        ("warmup-epochs", float, "epochs with increasing learning rate"),
        ("weight-decay", float, "weight decay of trained matrices"),
        ("clip-norm", float, "largest gradient norm; 0 means no limit"),
    ):
        metavar = "N" if kind is int or name == "warmup-epochs" else "X"
        add(f"--{name}", type=kind, metavar=metavar, help=_help(name, meaning))
    add("--precision", choices=PRECISIONS, help=_help("precision"))
    add("--seed", type=int, metavar="N", help=_help("seed"))


def _add_data(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("data and regularisation", argument_default=SUPPRESS)
    add = group.add_argument
    meaning = "train+val trains on both and keeps the last epoch"
    add("--train-on", choices=TRAIN_ON, help=_help("train-on", meaning))
    add("--augment", choices=AUGMENTATIONS, help=_help("augment"))
    for name, meaning in (
        ("mixup", "alpha of mixup"),
        ("cutmix", "alpha of CutMix"),
        ("label-smoothing", "share of the target that is spread over all classes"),
        ("drop-path", "rate of stochastic depth"),
    ):
        add(f"--{name}", type=float, metavar="X", help=_help(name, meaning))


def _help(name: str, meaning: str = "") -> str:
    """Help text: a setting's meaning and default."""
    default = getattr(DEFAULT, name.replace("-", "_"))
    return meaning if default is None else f"{meaning} ({default})".strip()


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
    if options.any_size and not (options.suite or options.recipe):
        p.error("--any-size needs --recipe or --suite")
    if options.suite and "seed" in settings:
        p.error("--suite counts its seeds from 0: give --seeds instead of --seed")
    if options.seeds is not None and options.seeds < 1:
        p.error("--seeds must be 1 or more")
    fixed = {"train_on", "stop_after"} & settings.keys()
    if fixed and (options.suite or options.recipe):
        p.error("--recipe and --suite decide --train-on and --stop-after themselves")
