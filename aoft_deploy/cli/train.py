"""aoft-train: fine-tune a backbone on a folder of images."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aoft_deploy.cli.command import run
from aoft_deploy.hyperparameters import (
    AUGMENTATIONS,
    PRECISIONS,
    TRAIN_ON,
    TrainingSettings,
)

if TYPE_CHECKING:
    from aoft_deploy.training import Result

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    default = TrainingSettings()
    p = argparse.ArgumentParser(
        prog="aoft-train",
        description="Fine-tune a pre-trained Vision Transformer on labelled images. Writes "
        "model.ckpt (the trained numbers alone) and metrics.jsonl (one line per epoch).",
        epilog="Several GPUs: accelerate launch -m aoft_deploy.cli.train OPTIONS.",
    )
    add = p.add_argument
    add("--data", required=True, metavar="DIR|NAME", help="image folder, or an offline task")
    add("--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    add("--quiet", action="store_true", help="show no progress")
    add("--tensorboard", action="store_true", help="write metrics for TensorBoard into --out too")
    add("--workers", type=int, metavar="N", help="processes that load images (0 on a CPU, else 8)")

    add = p.add_argument_group("model").add_argument
    add("--backbone", metavar="NAME", default=default.backbone, help="timm name (%(default)s)")
    add(
        "--backbone-weights",
        type=Path,
        metavar="FILE",
        help=".safetensors, .pth, .bin or .npz; timm's own if not given",
    )
    add("--img-size", type=int, metavar="N", help="side of the input in pixels")
    add("--method", metavar="NAME", default=default.method, help="how to fine-tune (%(default)s)")
    add("--rank", type=int, metavar="D", help="rank of the method's updates")
    add("--targets", nargs="+", metavar="MAP", help="linear maps to update, such as q v fc1")
    add(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help="another setting of the method, as JSON; may be repeated",
    )

    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, metavar="N", default=default.epochs, help="(%(default)s)")
    add(
        "--batch-size",
        type=int,
        metavar="N",
        default=default.batch_size,
        help="images of a step, over all GPUs and accumulated parts (%(default)s)",
    )
    add(
        "--accumulate",
        type=int,
        metavar="N",
        default=default.accumulate,
        help="compute each step in N parts, to save memory (%(default)s)",
    )
    add("--lr", type=float, metavar="X", help="peak learning rate (depends on the method)")
    add(
        "--head-lr",
        type=float,
        metavar="X",
        help="peak learning rate of the classifier (depends on the method)",
    )
    add("--min-lr", type=float, metavar="X", default=default.min_lr, help="last one (%(default)s)")
    add(
        "--warmup-epochs",
        type=float,
        metavar="N",
        default=default.warmup_epochs,
        help="epochs of rising learning rate (%(default)s)",
    )
    add(
        "--weight-decay",
        type=float,
        metavar="X",
        default=default.weight_decay,
        help="of trained matrices (%(default)s)",
    )
    add(
        "--clip-norm",
        type=float,
        metavar="X",
        default=default.clip_norm,
        help="largest gradient norm, 0 for no limit (%(default)s)",
    )
    add("--precision", choices=PRECISIONS, default=default.precision, help="(%(default)s)")
    add("--seed", type=int, metavar="N", default=default.seed, help="(%(default)s)")

    add = p.add_argument_group("data and regularisation").add_argument
    add(
        "--train-on",
        choices=TRAIN_ON,
        default=default.train_on,
        help="train+val trains on both and keeps the last epoch (%(default)s)",
    )
    add("--augment", choices=AUGMENTATIONS, default=default.augment, help="(%(default)s)")
    for name, meaning in (
        ("mixup", "alpha of mixup"),
        ("cutmix", "alpha of CutMix"),
        ("label-smoothing", "share of the target spread over all classes"),
        ("drop-path", "rate of stochastic depth"),
    ):
        value = getattr(default, name.replace("-", "_"))
        add(f"--{name}", type=float, metavar="X", default=value, help=f"{meaning} (%(default)s)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run(parser(), _body, argv)


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value  # a word needs no quotes


def _body(options: argparse.Namespace) -> None:
    values = vars(options)
    method_settings = dict(values.pop("set"))
    for name in ("rank", "targets"):
        value = values.pop(name)
        if value is not None:
            method_settings[name] = value
    data, out, resume, quiet, tensorboard, workers = (
        values.pop(name) for name in ("data", "out", "resume", "quiet", "tensorboard", "workers")
    )
    settings = TrainingSettings(method_settings=method_settings, **values)

    from accelerate.state import PartialState

    from aoft_deploy.data import load_data
    from aoft_deploy.training import train

    try:
        result = train(
            load_data(data, seed=settings.seed),
            out,
            settings,
            resume=resume,
            workers=workers,
            progress=not quiet,
            tensorboard=tensorboard,
        )
    except KeyboardInterrupt:
        print(f"Finished epochs are in {out}: go on with --resume.", file=sys.stderr)
        raise
    if PartialState().is_main_process:
        for name, value in _table(result):
            print(f"{name:<18}{value}")


def _table(result: Result) -> list[tuple[str, str]]:
    return [
        ("method", result.method),
        ("trained numbers", f"{result.update_parameters:,} + {result.head_parameters:,} (head)"),
        ("chosen epoch", f"{result.best_epoch} of {result.epochs}"),
        ("val accuracy", _percent(result.val_accuracy)),
        ("test accuracy", _percent(result.test_accuracy)),
        ("seconds", f"{result.seconds:.1f}"),
        ("checkpoint", f"{result.checkpoint} ({result.checkpoint_bytes:,} bytes)"),
    ]


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.2%}"


if __name__ == "__main__":
    raise SystemExit(main())
