"""The coverage table as a Markdown page, with its counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aoft_deploy.tuning.methods import method_names


def text(result: Mapping[str, Any]) -> str:
    """Short text of a cell."""
    if "bug" in result:
        return f"BUG: {result['bug']}"
    if "difference" not in result:
        return "refused"
    words = "exact" + (", ONNX" if "onnx" in result and "onnx_failure" not in result else "")
    words += ", no ONNX" if "onnx_failure" in result else ""
    return words + (" (whole qkv)" if "settings" in result else "")


def bugs(rows: Mapping[str, Any]) -> list[str]:
    """Descriptions of all cells with a bug."""
    return [
        f"{family} × {method}: {result['bug']}"
        for family, entry in rows.items()
        for method, result in entry["cells"].items()
        if "bug" in result
    ]


def summary(rows: Mapping[str, Any]) -> dict[str, int]:
    """Counts of the table."""
    cells = [result for entry in rows.values() for result in entry["cells"].values()]
    exact = [result for result in cells if "difference" in result and "bug" not in result]
    complete = [
        entry
        for entry in rows.values()
        if all(
            "difference" in entry["cells"][m] and "settings" not in entry["cells"][m]
            for m in method_names()
            if "vpt" not in m
        )
    ]
    return {
        "families": len(rows),
        "families_with_every_method_but_prompts": len(complete),
        "cells": len(cells),
        "exact": len(exact),
        "refused": sum("difference" not in r and "bug" not in r for r in cells),
        "onnx_parity": sum("onnx" in r and "onnx_failure" not in r for r in cells),
        "onnx_failures": sum("onnx_failure" in r for r in cells),
        "bugs": len(bugs(rows)),
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a Markdown page."""
    rows, counts, methods = report["families"], report["summary"], report["methods"]
    lines = [
        "# Coverage",
        "",
        "Which timm families take which method. Made by a script; do not edit:",
        "",
        f"    {report['command']}",
        "",
        f"timm {report['versions']['timm']}, torch {report['versions']['torch']}. "
        f"{counts['families']} families: all of timm's with attention between tokens, and ResNet "
        f"and ConvNeXt. {counts['families_with_every_method_but_prompts']} take every method but "
        f"prompts as it is. Of {counts['cells']} cells {counts['exact']} are exact, "
        f"{counts['refused']} refused, {counts['bugs']} wrong.",
        "",
        "**exact**: the merged model and the unmerged one, random in every parameter, agree to "
        "1e-12 in float64, and the merged one has the base's own modules and keys. **ONNX**: the "
        "exported float32 model, run by ONNX Runtime at batch 1 and 2, agrees to 5e-5; tried for "
        "one method that touches everything and for prompts. **(whole qkv)**: refused as it is, "
        'exact with `targets=["qkv"]` (`fused_qkv=True` of rlrr). **refused**: `attach` says why, '
        "see below.",
        "",
        "| family | model | " + " | ".join(methods) + " |",
        "|---|---|" + "---|" * len(methods),
    ]
    for name, entry in rows.items():
        words = " | ".join(text(entry["cells"][m]) for m in methods)
        lines.append(f"| {name} | {entry['model']} | {words} |")
    lines += ["", "## Refusals", ""]
    for name, entry in rows.items():
        sentences: dict[str, list[str]] = {}
        for method in methods:
            refusal = entry["cells"][method].get("refused")
            if refusal:
                sentences.setdefault(refusal, []).append(method)
        lines += [f"* **{name}**, {', '.join(ms)}: {s}" for s, ms in sentences.items()]
    lines += ["", "## Exports that fail", ""]
    failures = [
        f"* **{name}**, {method}: {result['onnx_failure']}"
        for name, entry in rows.items()
        for method, result in entry["cells"].items()
        if "onnx_failure" in result
    ]
    lines += failures or ["None."]
    lines += [
        "",
        "## Left as they are by rlrr",
        "",
        "Layers with weights that it does not update, besides the classifier: position biases, "
        "talking heads, norms inside attention, and all that stands outside the blocks.",
        "",
    ]
    for name, entry in rows.items():
        parts = entry["cells"].get("rlrr", {}).get("left_alone")
        if parts:
            lines.append(f"* **{name}**: {', '.join(f'`{part}`' for part in parts)}")
    return "\n".join(lines) + "\n"
