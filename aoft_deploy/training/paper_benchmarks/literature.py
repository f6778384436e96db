"""Published results on VTAB-1k and FGVC, to compare with measured ones. Light to import.

Papers report two averages for VTAB-1k: the mean of 19 tasks, and the mean of 3 group means, which
is 2 to 2.5 points higher. A row has the averages that its source prints; a missing one is computed
only if the source has all 19 columns. Parameter counts are in millions as printed; they are kept
apart by whether the source includes the classifier, excludes it, or does not say.

Model selection differs: the released RLRR code reports the best test accuracy of all epochs.
"""

from __future__ import annotations

from dataclasses import dataclass

from aoft_deploy.training.paper_benchmarks.tasks import FGVC, VTAB, Benchmark

__all__ = ["PUBLISHED", "PublishedRow", "mean_of_groups"]


@dataclass(frozen=True)
class PublishedRow:
    """A row of a table in a paper; accuracies in percent.

    Attributes:
        method: Name in the paper; a star marks AugReg weights for RLRR, ARC and HTA, and scales per
            rank component for AOFT.
        source: The paper, and how reliable the number is.
        mean_tasks: Mean over all tasks, as printed.
        mean_groups: Mean of the group means, as printed.
        tasks: The columns in the order of ``Benchmark.tasks``; empty if unknown.
        with_head: Trained parameters in millions, including the classifier.
        without_head: Trained parameters in millions, without the classifier.
        unstated: Trained parameters in millions, if the source does not say which.
        backbone: Architecture and weights.
    """

    method: str
    source: str
    mean_tasks: float | None = None
    mean_groups: float | None = None
    tasks: tuple[float, ...] = ()
    with_head: float | None = None
    without_head: float | None = None
    unstated: float | None = None
    backbone: str = "ViT-B/16"


def mean_of_groups(benchmark: Benchmark, columns: tuple[float, ...]) -> float | None:
    """Mean of the group means, from all columns; None without columns or with a single group."""
    if not columns or len(benchmark.groups) == 1:
        return None
    groups: dict[str, list[float]] = {}
    for task, value in zip(benchmark.tasks, columns, strict=True):
        groups.setdefault(task.group, []).append(value)
    means = [sum(values) / len(values) for values in groups.values()]
    return sum(means) / len(means)


def _columns(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


RLRR = "RLRR, arXiv 2403.19067"
HTA = "HTA, arXiv 2410.22952"
PACE = "PACE, NeurIPS 2024"
AOFT = "AOFT, arXiv 2507.13260, by second-hand summaries"
TABLES = "tables of RLRR and HTA"
BI = "binary_adapter's README"
BOTH = f"mean of tasks: {RLRR}; mean of groups: {PACE}"
AUGREG, LARGE, HUGE, SWIN = "ViT-B/16 AugReg", "ViT-L/16", "ViT-H/14", "Swin-B"

VTAB_ROWS = (
    PublishedRow("Full fine-tuning", BOTH, 65.6, 68.9, unstated=85.8),
    PublishedRow("Linear", BOTH, 52.9, 57.6, with_head=0.04),
    PublishedRow("BitFit", RLRR, 62.1, unstated=0.14),
    PublishedRow("VPT-Shallow", RLRR, 64.9, unstated=0.11),
    PublishedRow("VPT-Deep", BOTH, 69.4, 72.0, unstated=0.60),
    PublishedRow("Adapter", f"mean of tasks: {HTA}; of groups: {PACE}", 71.4, 73.9, unstated=0.16),
    PublishedRow("LoRA", BOTH, 72.3, 74.5, without_head=0.29),
    PublishedRow("AdaptFormer", BOTH, 72.3, 74.7, unstated=0.16),
    PublishedRow("NOAH", f"{PACE}; its columns average to 75.5", mean_groups=74.2),
    PublishedRow("SSF", RLRR, 73.1, unstated=0.24, backbone=AUGREG),
    PublishedRow("FacT-TK", RLRR, 73.2, unstated=0.07),
    PublishedRow("ARC", RLRR, 73.4, unstated=0.13),
    PublishedRow("ARC*", RLRR, 74.3, unstated=0.13, backbone=AUGREG),
    PublishedRow("Convpass", "PETL-ViT's README", mean_groups=76.56),
    PublishedRow("Bi-LoRA32", BI, mean_groups=76.7),
    PublishedRow("Bi-AdaptFormer32", BI, mean_groups=77.0),
    PublishedRow("Adapter+AOFT", AOFT, 72.5, with_head=0.06),
    PublishedRow("Adapter+AOFT*", AOFT, 72.7, with_head=0.06),
    PublishedRow("LoRA+AOFT†", AOFT, 74.1),
    PublishedRow("VPT-Deep+AOFT", AOFT, 70.7, with_head=0.05),
    PublishedRow(
        "RLRR",
        RLRR,
        74.5,
        tasks=_columns(
            "75.6 92.4 72.9 99.3 91.5 89.8 57.0  86.8 95.2 85.3 75.9 "
            "79.7 64.2 53.9 82.1 83.9 53.7 33.4 43.6"
        ),
        with_head=0.33,
    ),
    PublishedRow(
        "RLRR*",
        RLRR,
        75.1,
        tasks=_columns(
            "76.7 92.7 76.3 99.6 92.6 91.8 56.0  87.8 96.2 89.1 76.3 "
            "80.4 63.3 54.5 83.3 83.0 53.7 32.0 41.7"
        ),
        with_head=0.33,
        backbone=AUGREG,
    ),
    PublishedRow(
        "RLRR",
        RLRR,
        75.2,
        tasks=_columns(
            "79.3 92.0 74.6 99.5 92.1 89.6 60.1  87.3 95.3 87.3 75.7 "
            "82.7 62.1 54.6 80.6 87.1 54.7 31.3 41.9"
        ),
        with_head=0.82,
        backbone=LARGE,
    ),
    PublishedRow(
        "RLRR",
        RLRR,
        72.0,
        tasks=_columns(
            "70.3 89.8 69.7 98.6 87.8 88.5 51.3  86.0 95.0 84.9 74.6 "
            "73.8 60.1 49.6 78.6 83.6 52.4 32.0 41.8"
        ),
        with_head=1.33,
        backbone=HUGE,
    ),
    PublishedRow(
        "RLRR",
        RLRR,
        73.0,
        tasks=_columns(
            "66.1 90.6 75.5 99.3 92.1 90.9 54.7  87.1 95.9 87.1 76.5 "
            "66.0 57.8 55.3 84.1 91.1 55.2 28.6 34.0"
        ),
        with_head=0.41,
        backbone=SWIN,
    ),
    PublishedRow(
        "HTA",
        HTA,
        74.7,
        tasks=_columns(
            "76.6 94.3 72.5 99.3 91.3 86.2 56.5  87.6 95.7 85.0 75.7 "
            "82.6 63.3 52.5 81.0 84.5 52.6 34.5 47.3"
        ),
        unstated=0.22,
    ),
    PublishedRow(
        "HTA*",
        HTA,
        75.7,
        tasks=_columns(
            "79.0 92.8 77.6 99.6 92.4 89.4 55.1  88.2 96.1 89.7 76.4 "
            "84.2 61.7 53.6 82.0 85.1 53.7 33.9 47.9"
        ),
        unstated=0.22,
        backbone=AUGREG,
    ),
    PublishedRow("GLoRA", PACE, mean_groups=78.0),
    PublishedRow("LoRA_mul+VPT_add", PACE, mean_groups=76.4),
    PublishedRow(
        "LoRA_mul+VPT_add+PACE",
        PACE,
        mean_groups=79.0,
        tasks=_columns(
            "79.0 94.2 73.6 99.4 92.4 93.7 58.0  87.4 96.4 89.3 77.1 "
            "84.9 70.9 54.9 84.3 84.7 57.3 39.3 44.8"
        ),
    ),
)

FGVC_ROWS = (
    PublishedRow("Full fine-tuning", TABLES, 88.5),
    PublishedRow("Linear", TABLES, 79.3),
    PublishedRow("Adapter", AOFT, 85.7, tasks=(87.1, 84.3, 98.5, 89.8, 68.6), unstated=0.41),
    PublishedRow("LoRA", AOFT, 89.5, tasks=(88.3, 85.6, 99.2, 91.0, 83.2), unstated=0.44),
    PublishedRow("VPT-Deep", AOFT, 89.1, tasks=(88.5, 84.2, 99.0, 90.2, 83.6), unstated=0.85),
    PublishedRow("ARC", TABLES, 90.1, unstated=0.25),
    PublishedRow("SSF", TABLES, 90.7, unstated=0.39, backbone=AUGREG),
    PublishedRow("ARC*", TABLES, 90.7, backbone=AUGREG),
    PublishedRow("Adapter+AOFT*", AOFT, 90.1, tasks=(89.0, 84.5, 99.5, 92.0, 85.2), with_head=0.20),
    PublishedRow("LoRA+AOFT", AOFT, 89.9, tasks=(88.8, 84.2, 99.4, 92.0, 85.1), with_head=0.22),
    PublishedRow("VPT-Deep+AOFT", AOFT, 89.5, tasks=(88.7, 82.8, 99.5, 91.5, 84.1), unstated=0.15),
    PublishedRow("RLRR", RLRR, 90.4, tasks=(89.3, 84.7, 99.5, 92.0, 87.0), with_head=0.47),
    PublishedRow(
        "RLRR*",
        RLRR,
        91.0,
        tasks=(89.8, 85.3, 99.6, 90.0, 90.4),
        with_head=0.47,
        backbone=AUGREG,
    ),
    PublishedRow("HTA", HTA, 90.6, unstated=0.36),
    PublishedRow("HTA*", HTA, 91.1, unstated=0.36, backbone=AUGREG),
)

PUBLISHED = {VTAB.name: VTAB_ROWS, FGVC.name: FGVC_ROWS}
"""Rows by benchmark."""
