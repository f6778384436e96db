"""Comparison of all methods: offline tasks, several seeds, the same tuning budget for each.

Every variant fine-tunes the bundled backbone on 1,000 images of each task. Its peak learning rate
is chosen from ``RATES`` times its default on the validation images of the first seed; the other
seeds use the same rate. Accuracy is measured on the test images, which do not influence any choice.
Each finished run is one line of the runs file and is not repeated, so the script can be stopped at
any time, and several can run in parallel (``--part 0/2``, ``--part 1/2``).

    python benchmarks/accuracy/methods.py --runs benchmarks/results/methods.jsonl
    python benchmarks/accuracy/methods.py --runs benchmarks/results/methods.jsonl --table

The input has ``--img-size`` pixels. At 32, half of the backbone's default, an epoch costs a
quarter, and the frozen features fit less well, so that the methods differ more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student

from aoft_deploy import load, merge
from aoft_deploy.data.synthetic import load_task
from aoft_deploy.training.run import train
from aoft_deploy.training.settings import TrainingSettings
from aoft_deploy.tuning.backbones.backbone import create_backbone

BACKBONE = "aoft_vit_nano"
RATES = (1.0, 0.3, 3.0)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "LoRA, rank 8": ("lora", {}),
    "LoRA, rank 1": ("lora", {"rank": 1}),
    "LoRA + AOFT, rank 8": ("aoft-lora", {}),
    "LoRA + AOFT*, rank 8": ("aoft-lora-star", {}),
    "LoRA + AOFT*, rank 64": ("aoft-lora-star", {"rank": 64}),
    "RLRR": ("rlrr", {}),
    "RLRR, no residual": ("rlrr", {"residual": False}),
    "RLRR, left only": ("rlrr", {"sides": "out"}),
    "RLRR, right only": ("rlrr", {"sides": "in"}),
    "Adapter, rank 8": ("adapter", {}),
    "Adapter + AOFT, rank 8": ("aoft-adapter", {}),
    "Adapter + AOFT*, rank 8": ("aoft-adapter-star", {}),
    "Adapter + AOFT*, rank 64": ("aoft-adapter-star", {"rank": 64}),
    "VPT-Deep, 8 prompts": ("vpt", {}),
    "VPT-Deep + AOFT, 8 prompts": ("aoft-vpt", {}),
    "VPT-Deep + AOFT*, 8 prompts": ("aoft-vpt-star", {}),
    "SSF": ("ssf", {}),
    "BitFit": ("bitfit", {}),
    "full": ("full", {}),
}
"""The methods, with the settings that differ from their defaults."""

CLAIMS = (
    (
        "LoRA + AOFT, rank 8",
        "LoRA, rank 8",
        "AOFT reaches LoRA's accuracy",
    ),
    ("LoRA + AOFT*, rank 8", "LoRA + AOFT, rank 8", "AOFT* is at least AOFT, as LoRA"),
    ("Adapter + AOFT*, rank 8", "Adapter + AOFT, rank 8", "AOFT* is at least AOFT, as adapter"),
    ("Adapter + AOFT, rank 8", "Adapter, rank 8", "AOFT reaches the adapter's accuracy"),
    ("VPT-Deep + AOFT, 8 prompts", "VPT-Deep, 8 prompts", "AOFT reaches VPT's accuracy"),
    ("RLRR", "RLRR, no residual", "RLRR's residual helps"),
    ("RLRR", "RLRR, left only", "both scales beat the left one"),
    ("RLRR", "RLRR, right only", "both scales beat the right one"),
)
"""Claims of the papers: the first variant compared with the second."""


@dataclass(frozen=True)
class Run:
    """One training run: variant, task, seed, and factor of the learning rate."""

    variant: str
    task: str
    seed: int
    factor: float


def settings_of(run: Run, options: argparse.Namespace) -> TrainingSettings:
    """The hyper-parameters of a run."""
    method, method_settings = VARIANTS[run.variant]
    plain = TrainingSettings(method=method)
    rate, head_rate = plain.peak_rates()
    rates = {"head_lr": run.factor * head_rate} if method == "linear" else {"lr": run.factor * rate}
    return TrainingSettings(
        backbone=BACKBONE,
        img_size=options.img_size,
        method=method,
        method_settings=method_settings,
        epochs=options.epochs,
        seed=run.seed,
        **rates,
    )


def measured(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    """Train, and return the results as a row of the runs file."""
    settings = settings_of(run, options)
    with tempfile.TemporaryDirectory() as scratch:
        splits = load_task(run.task, seed=run.seed, train=options.images)
        result = train(splits, Path(scratch) / "run", settings)
        norm = relative_norm(result.checkpoint)
    return {
        **vars(run),
        "val": result.val_accuracy,
        "val_loss": result.val_loss,
        "test": result.test_accuracy,
        "parameters": result.update_parameters,
        "head": result.head_parameters,
        "seconds": result.seconds,
        "relative_norm": norm,
        "img_size": options.img_size,
        "epochs": options.epochs,
        "images": options.images,
    }


def relative_norm(checkpoint: Path) -> float | None:
    """Mean of ‖ΔW‖₂ / ‖W‖₂ over the matrices that fine-tuning changed; None if it changed none."""
    tuned = load(checkpoint)
    plain, _ = create_backbone(BACKBONE, num_classes=tuned.num_classes, **tuned.identity.args)
    folded, ratios = dict(merge(tuned).named_parameters()), []
    for name, weight in plain.named_parameters():
        change = folded[name] - weight
        if weight.dim() == 2 and name not in tuned.classifier and change.any():
            ratio = torch.linalg.matrix_norm(change, 2) / torch.linalg.matrix_norm(weight, 2)
            ratios.append(float(ratio))
    return statistics.mean(ratios) if ratios else None


def finished(path: Path, options: argparse.Namespace) -> dict[Run, dict[str, Any]]:
    """The runs of the file with these options."""
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines]
    return {
        Run(row["variant"], row["task"], row["seed"], row["factor"]): row
        for row in rows
        if (row["img_size"], row["epochs"], row.get("images", 1000))
        == (options.img_size, options.epochs, options.images)
    }


def chosen_factor(rows: dict[Run, dict[str, Any]], variant: str, task: str) -> float | None:
    """The rate with the best validation accuracy on the first seed; None before all are done."""
    tried = [rows.get(Run(variant, task, 0, factor)) for factor in RATES]
    if any(row is None for row in tried):
        return None
    best = max((r for r in tried if r), key=lambda row: (row["val"], -row["val_loss"]))
    return float(best["factor"])


def wanted(options: argparse.Namespace, rows: dict[Run, dict[str, Any]]) -> Iterator[Run]:
    """All runs, in the order that is most useful if the benchmark is stopped."""
    for task in options.tasks:
        for factor in RATES:
            yield from (Run(v, task, 0, factor) for v in options.variants)
        for seed in range(1, options.seeds):
            for variant in options.variants:
                factor_now = chosen_factor(rows, variant, task)
                if factor_now is not None:
                    yield Run(variant, task, seed, factor_now)


def run_all(options: argparse.Namespace) -> None:
    """Do the runs of this part that are not in the file."""
    part, parts = (int(n) for n in options.part.split("/"))
    while True:
        rows = finished(options.runs, options)
        mine = [
            run
            for run in wanted(options, rows)
            if run not in rows and options.variants.index(run.variant) % parts == part
        ]
        if not mine:
            return
        row = measured(mine[0], options)
        with options.runs.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{row['task']:12}{row['variant']:28}{row['seed']:3}{row['test']:8.2%}", flush=True)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval (Student's t)."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, float("nan")
    spread = statistics.stdev(values) / len(values) ** 0.5
    return mean, float(student.ppf(0.975, len(values) - 1)) * spread


def accuracies(
    rows: dict[Run, dict[str, Any]], variant: str, task: str, seeds: int
) -> dict[int, float]:
    """Test accuracy by seed, in per cent, at the chosen rate."""
    factor = chosen_factor(rows, variant, task)
    found = ((s, rows.get(Run(variant, task, s, factor or 1.0))) for s in range(seeds))
    return {seed: 100 * row["test"] for seed, row in found if row and factor is not None}


def table(options: argparse.Namespace) -> str:
    """The Markdown table and the claims."""
    rows = finished(options.runs, options)
    lines = [
        f"| method | trained, beside the classifier | {' | '.join(options.tasks)} | ‖ΔW‖₂ / ‖W‖₂ |",
        "|---|---|" + "---|" * (len(options.tasks) + 1),
    ]
    for variant in options.variants:
        done = [row for run, row in rows.items() if run.variant == variant]
        if not done:
            continue
        cells = [cell(accuracies(rows, variant, task, options.seeds)) for task in options.tasks]
        at_rate = [
            row for row in done if row["factor"] == chosen_factor(rows, variant, row["task"])
        ]
        norms = [row["relative_norm"] for row in at_rate if row["relative_norm"] is not None]
        norm = f"{statistics.mean(norms):.2f}" if norms else "–"
        lines.append(f"| {variant} | {done[0]['parameters']:,} | {' | '.join(cells)} | {norm} |")
    lines += ["", "Same seeds against each other, in points of accuracy:", ""]
    for better, worse, claim in CLAIMS:
        cells = [difference(rows, better, worse, task, options.seeds) for task in options.tasks]
        lines.append(f"* {claim}: {better} − {worse} = {', '.join(cells)}")
    return "\n".join(lines)


def cell(values: dict[int, float]) -> str:
    """Mean ± half width, and the number of seeds."""
    if not values:
        return "–"
    mean, half = interval(list(values.values()))
    return f"{mean:.1f} ± {half:.1f} ({len(values)})"


def difference(
    rows: dict[Run, dict[str, Any]], better: str, worse: str, task: str, seeds: int
) -> str:
    """Mean paired difference ± half width."""
    first, second = (accuracies(rows, v, task, seeds) for v in (better, worse))
    pairs = [first[s] - second[s] for s in first if s in second]
    if len(pairs) < 2:
        return f"{task} –"
    mean, half = interval(pairs)
    return f"{task} {mean:+.1f} ± {half:.1f}"


def main() -> None:
    """Do the missing runs, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="file with a line for each run")
    parser.add_argument("--tasks", nargs="+", default=["digits", "shape"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1000, help="training images")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--part", default="0/1", help="share of the variants to do, such as 0/2")
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs")
    options = parser.parse_args()
    if options.table:
        print(table(options))
    else:
        run_all(options)


if __name__ == "__main__":
    main()
