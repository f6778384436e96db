"""The results as a Markdown page: checks, aims, speeds, and what was not measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Aim", "aims", "write_table"]

FLOPS = 35.1e9
"""Floating-point operations of ViT-B/16 for one image."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Aim:
    """A figure that the project aims at on an H100.

    Attributes:
        text: What is aimed at.
        found: The figure; None if it was not measured.
        reached: Whether it is as good as the aim.
    """

    text: str
    found: float | None
    reached: bool


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
    versions = ", ".join(f"{k} {v}" for k, v in machine.get("versions", {}).items())
    yield f"# {machine.get('device', 'unknown device')}"
    yield ""
    yield f"Driver {machine.get('driver')}, CUDA {machine.get('cuda')}, {versions}."
    yield from _section("Checks", ("step", "check", "result", "error", "allowed", "notes"))
    yield from (_line(_check(row)) for row in rows if "passed" in row)
    yield from _section("Aims", ("aim", "found", "reached"))
    for aim in aims(rows):
        found = "not measured" if aim.found is None else f"{aim.found:,.3g}"
        yield _line((aim.text, found, "yes" if aim.reached else "no" if aim.found else ""))
    heads = ("batch", "variant", "ms", "ms on the GPU", "img/s", "share of the peak")
    yield from _section("Speed", heads)
    peaks = _peaks(rows)
    speeds = [row for row in rows if row.get("kind") == "speed"]
    for row in sorted(speeds, key=lambda r: (r["batch"], -r["images_per_second"])):
        yield _line(_speed(row, peaks))
    yield from _section("Training step", ("variant", "batch", "ms", "× PEFT", "peak MiB"))
    steps = {row["row"]: row for row in rows if row.get("kind") == "training step"}
    for name, row in steps.items():
        ratio = row["ms"] / steps["step PEFT LoRA"]["ms"] if "step PEFT LoRA" in steps else None
        memory = row["peak_mib"]
        yield _line((name, row["batch"], f"{row['ms']:.2f}", _or(ratio, ".2f"), _or(memory, ".0f")))
    yield from _section("Failed", ("step", "row", "why"))
    yield from (_line((row["step"], row["row"], row["failed"])) for row in rows if "failed" in row)
    yield from _section("Not measured", ("step", "row", "why"))
    for row in rows:
        if "not_measured" in row:
            yield _line((row["step"], row["row"], row["not_measured"]))


def _section(title: str, heads: Sequence[str]) -> Iterator[str]:
    yield from ("", f"## {title}", "", _line(heads), _line(["---"] * len(heads)))


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _or(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _check(row: Row) -> tuple[object, ...]:
    notes = []
    for provider, nodes in (row.get("placement") or {}).items():
        notes.append(f"{provider}: {sum(nodes.values())} nodes")
    for key in ("agreement", "images_per_second", "failed_tests"):
        if row.get(key):
            notes.append(f"{key.replace('_', ' ')} {row[key]}")
    result = "passed" if row["passed"] else "FAILED"
    error, allowed = _or(row.get("error"), ".1e"), _or(row.get("allowed"), ".0e")
    return row["step"], row["row"], result, error, allowed, "; ".join(notes)


def _peaks(rows: Sequence[Row]) -> dict[str, float]:
    return {
        row["row"].removeprefix("peak "): row["flops_per_second"]
        for row in rows
        if row.get("kind") == "peak"
    }


def _speed(row: Row, peaks: Mapping[str, float]) -> tuple[object, ...]:
    peak, speed = peaks.get(row["precision"]), row["images_per_second"]
    share = "" if peak is None else f"{speed * FLOPS / peak:.0%} of {row['precision']}"
    ms, device_ms = f"{row['ms']:.3f}", _or(row["device_ms"], ".3f")
    return row["batch"], row["row"], ms, device_ms, f"{speed:,.0f}", share


def aims(rows: Sequence[Row]) -> Iterator[Aim]:
    """The aims of the project on an H100, and what was found."""
    speeds = [row for row in rows if row.get("kind") == "speed"]

    def best(*words: str, batch: int | None = None, step: str | None = None) -> float | None:
        """Most images per second of the rows whose name has all words."""
        found = [
            row["images_per_second"]
            for row in speeds
            if all(word in row["row"].replace(",", "").split() for word in words)
            and (batch is None or row["batch"] == batch)
            and (step is None or row["step"] == step)
        ]
        return max(found, default=None)

    def ours(precision: str) -> float | None:
        runtimes = (("ONNX", "Runtime"), ("tensorrt",), ("aoti",))
        found = [best(*words, precision) for words in runtimes]
        return max((speed for speed in found if speed is not None), default=None)

    half = max((s for s in (ours("fp16"), ours("bf16")) if s is not None), default=None)
    yield _at_least("ViT-B/16 in bf16 or fp16, images per second", half, 16_600)
    compiled = best("torch.compile")
    yield _at_least("the same, × torch.compile", _ratio(half, compiled), 1.3)
    for runtime in ("PyTorch", "ONNX"):
        ratios = []
        for batch in {row["batch"] for row in speeds}:
            plain = best(runtime, "plain", "fp16", batch=batch)
            merged = [
                row["images_per_second"]
                for row in speeds
                if row["batch"] == batch
                and row["row"] in ("PyTorch, merged, fp16", "ONNX Runtime, fp16")
                and row["row"].startswith(runtime)
            ]
            if plain and merged:
                ratios.append(merged[0] / plain)
        worst = min(ratios, default=None)
        yield _at_least(f"merged, × the plain backbone, {runtime}, slowest batch", worst, 0.99)
    largest = max((row["batch"] for row in speeds), default=None)
    for precision in ("fp16", "fp32"):
        fleet = best("fleet", "tasks", precision, batch=largest)
        merged_speed = best("merged", precision, batch=largest, step="fleet speed")
        text = f"64 mixed tasks, × one merged model, {precision}"
        yield _at_least(text, _ratio(fleet, merged_speed), 0.97)
    yield _at_least("FP8, × fp16", _ratio(ours("fp8"), ours("fp16")), 1.4)
    agreement = next(
        (r["agreement"] for r in rows if r["row"] == "digits fp8" and r.get("agreement")), None
    )
    yield _at_least("FP8, share of equal decisions", agreement, 0.995)
    steps = {row["row"]: row["ms"] for row in rows if row.get("kind") == "training step"}
    step = _ratio(steps.get("step aoft-lora"), steps.get("step PEFT LoRA"))
    yield Aim(
        "a training step of AOFT, × PEFT's, at most 0.9", step, step is not None and step <= 0.9
    )


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def _at_least(text: str, found: float | None, least: float) -> Aim:
    return Aim(f"{text}, at least {least:,}", found, found is not None and found >= least)
