"""Tables of speeds: engine, precision and batch, for plain, merged and mixed models.

It reads ``benchmarks/results/engines*.json``, one file a machine, as engines.py writes them, and
``nodes*.json`` and ``quantisation*.json``, as node_profile.py and quantisation.py write them. The
README quotes ``readme_figures``.

    python benchmarks/export/engines_page.py [--out docs/evidence/engines.md]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "evidence" / "engines.md"
RESULTS = ROOT / "benchmarks" / "results"

COLUMNS = ("plain", "merged", "16 tasks mixed")

NAMES = {
    "torch.onnx.export, ONNX Runtime": ("torch.onnx.export in ONNX Runtime", "fp32", "merged"),
    "timm's export, ONNX Runtime": ("timm's export in ONNX Runtime", "fp32", "merged"),
    "PyTorch": ("PyTorch", "fp32", "merged"),
    "torch.compile": ("PyTorch, compiled", "fp32", "merged"),
    "PEFT, unmerged": ("PEFT LoRA r = 8, unmerged", "fp32", "merged"),
    "PEFT, 16 tasks mixed": ("PEFT LoRA r = 8, unmerged", "fp32", "16 tasks mixed"),
}
"""Row (engine, precision) and column of the rivals."""

QUOTED = {
    "PyTorch": "PyTorch",
    "onnxruntime fp32": "ONNX Runtime fp32",
    "onnxruntime int8": "int8",
    "openvino int8": "OpenVINO int8",
    "onnxruntime int8, 16 tasks mixed": "16 tasks in ONNX Runtime int8",
}
"""Variants that the README quotes, and their names there."""

GROUPS = (
    *("linear maps", "attention", "GELU", "norms", "quantisation", "additions"),
    *("thin products", "patch embedding", "copies and others"),
)
"""Columns of the table of nodes, as node_profile.py names them."""

NODES = """\
## Where the time goes

The share of each kind of node in the time of all nodes, and in brackets how much of the peak of
their precision the linear maps reach. OpenVINO computes GELU, biases and most quantisation within
the linear maps, and softmax and both products of attention as one node. *Thin products* are those
of a fleet's task parameters. Profilers cost time, and each engine ran alone, so only shares of one
engine can be compared. A peak that some engine exceeds is no bound, so its shares are left out.

`benchmarks/export/node_profile.py` measures.
"""

HEAD = """\
# Engines, precisions and batches

Each cell is the throughput relative to `torch.onnx.export` in ONNX Runtime at the same batch
size, and in brackets the share of what the cores can compute in large matrix products of the same
precision. *Plain* is the backbone without a task, *merged* one task's model, and *16 tasks mixed*
a batch whose images belong to 16 tasks in turn. All engines of a machine took turns in one run,
each in a process of its own; figures are medians. The weights are random, so this page says
nothing of accuracy: an artefact below fp32 is only written if it keeps the answers on real
images. Where it is faster, OpenVINO's int8 has its float layers in bf16; [Ways to
quantise](#ways-to-quantise) compares it with float32.

`benchmarks/export/engines.py` measures, `benchmarks/export/engines_page.py` writes this page.
"""

QUANTISATIONS = """\
## Ways to quantise

The throughput relative to ONNX Runtime fp32 at the same batch size, the size of the artefact, and
the *error*: the root mean square of the differences to the logits in fp32, relative to the spread
of an image's logits. These are of a model with random weights; a dash means that they were not
measured or not finite. The last columns are of the bundled
backbone, fine-tuned on tasks of this package: the accuracy on the test images, and in brackets the
share of them whose top class is that of fp32. Rows with a star are what `aoft-export` writes;
OpenVINO's int8 has its float layers in bf16 if the processor computes in it, the model is large
enough to gain, and the answers hold. None of the other ways beats them by more than two runs
differ (some per cent), so they are not kept.

*Dynamic* chooses the scale of activations for each batch, *static* has learnt it from calibration
images. SmoothQuant moves a part of the activations' range to the weights; OpenVINO's int8 always
does so. *8-bit* and *4-bit weights* (MatMulNBits, blocks of 32) save memory alone.

`benchmarks/export/quantisation.py` measures.
"""

EXPORTED = (
    *("ONNX Runtime fp32", "ONNX Runtime int8, dynamic", "OpenVINO fp32", "OpenVINO bf16"),
    *("OpenVINO int8", "OpenVINO int8, float layers in bf16"),
    *("PyTorch compiled fp32", "PyTorch compiled bf16"),
)
"""Ways that the product uses."""


def place(name: str) -> tuple[tuple[str, str], str]:
    """Row (engine, precision) and column of a variant of engines.py."""
    if name in NAMES:
        engine, precision, column = NAMES[name]
        return (engine, precision), column
    main, _, kind = name.partition(", ")
    engine, _, precision = main.partition(" ")
    column = {"": "merged", "plain backbone": "plain", "16 tasks mixed": kind}.get(kind, "merged")
    suffix = f", {kind}" if kind.startswith("opset") else ""
    return (engine + suffix, precision), column


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a table of one batch size."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        key, column = place(row["name"])
        share = row["share_of_peak"]
        text = f"{row['ratio']:.2f} ×" + ("" if share is None else f" ({share:.0%})")
        cells.setdefault(key, {})[column] = text
    lines = [f"| engine | precision | {' | '.join(COLUMNS)} |", "|---|---" + "|---" * 3 + "|"]
    for (engine, precision), found in cells.items():
        values = " | ".join(found.get(column, "–") for column in COLUMNS)
        lines.append(f"| {engine} | {precision} | {values} |")
    return lines


def settings(report: Mapping[str, Any]) -> str:
    """What was measured with which versions, and the machine's peaks."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    peaks = report["gemm_peaks"].items()
    speeds = ", ".join(f"{name} {peak / 1e9:,.0f}" for name, peak in peaks)
    return (
        f"{report['model']}, {report['method']}, {report['machine']['threads']} threads; "
        f"{versions}. Peak of matrix products in 10⁹ operations a second: {speeds}."
    )


def section(report: Mapping[str, Any]) -> list[str]:
    """The lines of a machine."""
    lines = [f"## {report['machine']['processor']}", "", settings(report)]
    for batch in dict.fromkeys(row["batch"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["batch"] == batch]
        lines += ["", f"**Batch {batch}**", "", *table(rows)]
    return lines


def node_section(report: Mapping[str, Any]) -> list[str]:
    """The lines of a machine's profiles."""
    lines = [
        f"### Nodes on {report['machine']['processor']}",
        "",
        settings(report),
        "",
        f"| engine | batch | {' | '.join(GROUPS)} |",
        "|---|---" + "|---" * len(GROUPS) + "|",
    ]
    shares = [(row["precision"], row["share_of_peak"] or 0) for row in report["rows"]]
    exceeded = {precision for precision, share in shares if share > 1}
    for row in report["rows"]:
        cells = [f"{row['groups'].get(name, 0) / row['seconds']:.0%}" for name in GROUPS]
        if row["share_of_peak"] is not None and row["precision"] not in exceeded:
            cells[0] += f" ({row['share_of_peak']:.0%})"
        lines.append(f"| {row['name']} | {row['batch']} | {' | '.join(cells)} |")
    return lines


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def quantisation_section(report: Mapping[str, Any]) -> list[str]:
    """The lines of a machine's comparison of quantisations."""
    first, *_ = report["rows"]
    batches, tasks = list(first["ratios"]), list(first["tasks"])
    heads = [*(f"batch {batch}" for batch in batches), "MB", "error", *tasks]
    lines = [
        f"### Quantisations on {report['machine']['processor']}",
        "",
        settings(report),
        "",
        f"| quantisation | {' | '.join(heads)} |",
        "|---" * (1 + len(heads)) + "|",
    ]
    for row in report["rows"]:
        cells = [f"{row['ratios'][batch]:.2f} ×" for batch in batches]
        cells += [f"{row['bytes'] / 1e6:.0f}", _share(row.get("error"))]
        for task in tasks:
            found = row["tasks"].get(task)
            cells.append(f"{found['accuracy']:.1%} ({found['agreement']:.1%})" if found else "–")
        name = row["name"] + (" *" if row["name"] in EXPORTED else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def readme_figures(report: Mapping[str, Any]) -> list[str]:
    """The five lines of a machine's table that the README quotes, each as a phrase."""
    found: dict[str, list[str]] = {}
    for row in report["rows"]:
        found.setdefault(row["name"], []).append(f"{row['ratio']:.2f}")
    return [f"{text} {' and '.join(found[name])} ×" for name, text in QUOTED.items()]


def markdown(
    reports: Sequence[Mapping[str, Any]],
    nodes: Sequence[Mapping[str, Any]],
    quantisations: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page."""
    lines = [HEAD]
    for report in reports:
        lines += [*section(report), ""]
    if nodes:
        lines += [NODES]
    for report in nodes:
        lines += [*node_section(report), ""]
    if quantisations:
        lines += [QUANTISATIONS]
    for report in quantisations:
        lines += [*quantisation_section(report), ""]
    return "\n".join(lines)


def reports(kind: str = "engines") -> list[dict[str, Any]]:
    """The results of all machines by the names of their files.

    Args:
        kind: ``engines``, ``nodes`` or ``quantisation``.
    """
    return [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob(f"{kind}*.json"))]


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=PAGE)
    text = markdown(reports(), reports("nodes"), reports("quantisation"))
    parser.parse_args().out.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
