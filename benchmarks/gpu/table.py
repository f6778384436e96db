"""The results as a Markdown page: checks, aims, speeds, failures, and what was not measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.aims import aims

__all__ = ["write_table"]

Row = Mapping[str, Any]

SUBJECT = ("batch", "runtime", "model", "precision", "images")
SPEED = (*SUBJECT, "ms", "ms on the GPU", "images per second", "share of the peak")
"""Columns of the speeds."""


def write_table(out: Path) -> int:
    """Write ``table.md`` from ``results.jsonl``.

    Returns:
        Number of steps and checks that failed.
    """
    results = out / "results.jsonl"
    lines = results.read_text("utf-8").splitlines() if results.exists() else []
    rows = [json.loads(line) for line in lines]
    (out / "table.md").write_text("\n".join(_page(rows)) + "\n", "utf-8")
    return sum("failed" in row or row.get("passed") is False for row in rows)


def _page(rows: Sequence[Row]) -> Iterator[str]:
    machine = next((row for row in rows if row["row"] == "machine" and "device" in row), {})
    versions = ", ".join(f"{name} {v}" for name, v in machine.get("versions", {}).items())
    yield f"# {machine.get('device', 'Unknown device')}"
    yield ""
    yield f"Driver {machine.get('driver')}, CUDA {machine.get('cuda')}, {versions}."
    is_dry = machine.get("dry", False)
    if is_dry:
        yield from ("", "A dry run with a tiny model: its speeds mean nothing.")
    yield from _table(
        "Checks",
        ("step", "check", "result", "error", "allowed", "notes"),
        [_check(row) for row in rows if "passed" in row],
    )
    found = [
        (
            *(aim.text, "not measured" if aim.found is None else f"{aim.found:,.4g}"),
            "" if is_dry else aim.verdict,
        )
        for aim in aims(rows)
    ]
    yield from _table("Aims", ("aim on an H100", "found", "reached"), found)
    yield from _table("Speed", SPEED, _speeds(rows, machine))
    yield from _table(
        "Training step in bf16", ("method", "batch", "ms", "× PEFT", "peak MiB"), _steps(rows)
    )
    for title, key in (("Failed", "failed"), ("Not measured", "not_measured")):
        reasons = [(row["step"], row["row"], row[key]) for row in rows if key in row]
        yield from _table(title, ("step", "row", "why"), reasons)


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    yield from ("", f"## {title}", "")
    if not rows:
        yield "None."
        return
    for cells in (heads, ["---"] * len(heads), *rows):
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _or(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _check(row: Row) -> tuple[object, ...]:
    notes = []
    for provider, nodes in (row.get("placement") or {}).items():
        notes.append(f"{provider}: {sum(nodes.values())} nodes")
    for key, form in (("agreement", ".1%"), ("images_per_second", ",.0f"), ("tests", "d")):
        if row.get(key) is not None:
            notes.append(f"{key.replace('_', ' ')}: {row[key]:{form}}")
    notes += [f"{key}: {row[key]}" for key in ("skipped", "failed_tests") if row.get(key)]
    result = "passed" if row["passed"] else "FAILED"
    error, allowed = _or(row.get("error"), ".1e"), _or(row.get("allowed"), ".0e")
    return row["step"], row["row"], result, error, allowed, "; ".join(notes)


def _speeds(rows: Sequence[Row], machine: Row) -> list[tuple[object, ...]]:
    """Rows of the speeds, the fastest of each batch size first."""
    peaks = {row["precision"]: row["per_second"] for row in rows if row.get("kind") == "peak"}
    speeds = [row for row in rows if row.get("kind") == "speed"]
    found: list[tuple[object, ...]] = []
    for row in sorted(speeds, key=lambda each: (each["batch"], -each["images_per_second"])):
        speed, peak = row["images_per_second"], peaks.get(row["precision"])
        flops = machine.get("flops")
        share = f"{speed * flops / peak:.0%}" if peak and flops else ""
        words = (row[key] for key in SUBJECT)
        times = (f"{row['ms']:.3f}", _or(row["device_ms"], ".3f"))
        found.append((*words, *times, f"{speed:,.0f}", share))
    return found


def _steps(rows: Sequence[Row]) -> list[tuple[object, ...]]:
    steps = [row for row in rows if row.get("kind") == "training step"]
    peft = next((row["ms"] for row in steps if row["row"] == "PEFT LoRA"), None)
    return [
        (
            *(row["row"], row["batch"], f"{row['ms']:.2f}"),
            "" if peft is None else f"{row['ms'] / peft:.2f}",
            _or(row["peak_mib"], ".0f"),
        )
        for row in steps
    ]
