r"""Every timm family with attention, and ResNet and ConvNeXt, under every method.

Each family is represented by a small model with random parameters and BatchNorm statistics. The
script attaches a method, changes all trained parameters, and compares the merged model with the
unmerged one in float64: "exact" means a difference of at most 1e-12 of the largest logit (or of
one), with the module types and state-dict keys of the base model. For prompts, and for one method
that changes every layer, it also exports the merged float32 model and runs it with ONNX Runtime at
batch 1 and 2. If the method cannot be attached, the cell holds the message of the refusal.

A model with a method attached that is not exact is a bug; so is a linear map of an attention or MLP
without an update under a method for every map. The script reports bugs and exits with code 1.

    python benchmarks/export/coverage.py --out benchmarks/results/coverage.json \
        --table docs/evidence/coverage.md
    python benchmarks/export/coverage.py --families eva hiera --resume --out ... --table ...
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from coverage_page import bugs, markdown, summary, text
from families import FAMILIES, Family, images, representative, unlisted
from torch import Tensor, nn

from aoft_deploy import attach, merge
from aoft_deploy.artefacts.registry import get_exporter
from aoft_deploy.artefacts.spec import ExportSpec, InputSpec
from aoft_deploy.errors import AttachError
from aoft_deploy.tuning.backbones.identity import Backbone
from aoft_deploy.tuning.methods import get_method, method_names
from aoft_deploy.tuning.sites.attention_classes import LEFT_ALONE, is_attention
from aoft_deploy.tuning.sites.classifier import classifier_names
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_deploy.tuning.updated_layers import UpdatedModule

TOLERANCE = 1e-12


ONNX_TOLERANCE = 5e-5


EVERY_MAP = ("rlrr", "ssf")
"""Methods that update every linear map of a block."""


def tuned_model(base: nn.Module, method: str, **settings: Any) -> TunedModel:
    """The method attached with rank 2, and every trained parameter changed from its start."""
    if "rank" in get_method(method).defaults:
        settings["rank"] = 2
    dtype = next(base.parameters()).dtype
    identity = Backbone(type(base).__name__, "none")
    tuned = attach(base, method, backbone=identity, **settings).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.trained().values():
            noise = torch.empty_like(parameter).normal_(0, 0.02, generator=generator)
            parameter.add_(noise)
    return tuned


def uncovered(tuned: TunedModel) -> Iterator[str]:
    """Linear maps without an update in the attentions and MLPs of the blocks."""
    backbone = tuned.backbone
    branches = [
        f"{path}."
        for path, module in backbone.named_modules()
        if is_attention(module) or re.fullmatch(r"(attn|mlp).*", path.rpartition(".")[2])
    ]
    heads = {name.rpartition(".")[0] for name in classifier_names(backbone)}
    for path, module in backbone.named_modules():
        is_excluded = path in heads or any(part in LEFT_ALONE for part in path.split("."))
        if isinstance(module, nn.Linear) and path.startswith(tuple(branches)) and not is_excluded:
            rows = _updated_rows(backbone, path)
            if rows != [(0, module.out_features)]:
                yield f"{path} rows {rows}"


def _updated_rows(backbone: nn.Module, path: str) -> list[tuple[int, int]]:
    """Ranges of updated output rows of the layer at ``X.base``; adjacent ranges are joined."""
    owner = backbone.get_submodule(path.rpartition(".")[0])
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(owner.rows) if isinstance(owner, UpdatedModule) else ():
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def left_alone(tuned: TunedModel) -> list[str]:
    """Names of the layers with weights but without an update, with # for indices."""
    heads = {name.rpartition(".")[0] for name in classifier_names(tuned.backbone)}
    found = set()
    for path, module in tuned.backbone.named_modules():
        is_ignored = path.endswith(".base") or ".updates" in path or path in heads
        if not is_ignored and isinstance(module._parameters.get("weight"), Tensor):
            found.add(re.sub(r"\d+", "#", path))
    return sorted(found)


@torch.no_grad()
def difference(base: nn.Module, family: Family, method: str, **settings: Any) -> tuple[float, Any]:
    """Relative difference between the merged and the unmerged model in float64.

    Raises:
        AssertionError: The merged model has another architecture than the base, or nothing changed.
    """
    base = copy.deepcopy(base).double()
    x = images(family, 2, torch.float64)
    before = base(x)
    keys = [key for key in base.state_dict()]
    types = [type(module) for module in base.modules()]
    tuned = tuned_model(base, method, **settings)
    if method in EVERY_MAP:
        missing = list(uncovered(tuned))
        assert not missing, f"leaves out {missing[0]}"
    expected = tuned(x)
    merged = merge(tuned)
    answers = merged(x)
    if "vpt" not in method:
        assert list(merged.state_dict()) == keys, "other state-dict keys"
        assert [type(module) for module in merged.modules()] == types, "other module types"
    else:
        assert [key for key in merged.state_dict() if ".prompts." not in key] == keys
    assert (expected - before).abs().max() > 1e-9, "changes nothing"
    largest = max(1.0, float(expected.abs().max()))
    return float((answers - expected).abs().max()) / largest, tuned


@torch.no_grad()
def onnx_difference(base: nn.Module, family: Family, method: str, **settings: Any) -> float:
    """Relative difference between the exported model in ONNX Runtime and the unmerged model."""
    tuned = tuned_model(copy.deepcopy(base), method, **settings)
    exporter = get_exporter("onnx")
    images = InputSpec(family.size, family.size, False, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    recipe = ExportSpec(images, {})
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        exporter.export(merge(tuned), path, recipe)
        engine = exporter.load(path)
        for batch in (1, 2):
            x = images(family, batch, torch.float32)
            expected = tuned(x)
            answers = torch.from_numpy(engine.run(x.numpy()))
            largest = max(1.0, float(expected.abs().max()))
            worst = max(worst, float((answers - expected).abs().max()) / largest)
    return worst


WHOLE = {"rlrr": {"fused_qkv": True}}


def whole_map(method: str) -> dict[str, Any]:
    """Settings with which a method updates a fused map as a whole; empty if there are none."""
    if "targets" in get_method(method).defaults and "adapter" not in method:
        return {"targets": ["qkv"]}
    return dict(WHOLE.get(method, {}))


def cell(base: nn.Module, family: Family, method: str) -> dict[str, Any]:
    """One cell of the table: whether the method attaches, and the difference after merging."""
    try:
        worst, tuned = difference(base, family, method)
        settings: dict[str, Any] = {}
    except AttachError as error:
        result: dict[str, Any] = {"refused": str(error)}
        settings = whole_map(method)
        if "head by head" not in str(error) or not settings:
            return result
        worst, tuned = difference(base, family, method, **settings)
        result |= {"settings": settings}
    else:
        result = {}
    result |= {"updates": len(tuned.updates), "difference": worst}
    if worst > TOLERANCE:
        result["bug"] = f"merged and unmerged differ by {worst:.1e}"
    if method == "rlrr":
        result["left_alone"] = left_alone(tuned)
    return result


def row(name: str) -> dict[str, Any]:
    """All cells of a family."""
    family = FAMILIES[name]
    base = representative(family)
    cells: dict[str, dict[str, Any]] = {}
    for method in method_names():
        try:
            cells[method] = cell(base, family, method)
        except Exception as error:  # any exception here is a bug that the script reports
            cells[method] = {"bug": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    broadest = next(
        (m for m in ("rlrr", "ssf", "lora", "full") if "difference" in cells[m]), "full"
    )
    for method in (broadest, "vpt"):
        result = cells[method]
        if "difference" not in result:
            continue
        try:
            result["onnx"] = onnx_difference(base, family, method, **result.get("settings", {}))
            if not result["onnx"] <= ONNX_TOLERANCE:
                result["onnx_failure"] = f"ONNX Runtime differs by {result['onnx']:.1e}"
        except Exception as error:  # the ONNX exporter raises exceptions of any type
            while error.__cause__ is not None:
                error = error.__cause__  # type: ignore[assignment]
            reason = " ".join(str(error).split())[:200]
            result["onnx_failure"] = f"{type(error).__name__}: {reason}"
    args = {name: str(value) for name, value in family.args.items()}
    return {"model": family.model, "args": args, "size": family.size, "cells": cells}


def write(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the results so far."""
    report["families"] = dict(sorted(report["families"].items()))
    report["summary"] = summary(report["families"])
    if options.out:
        options.out.write_text(json.dumps(report, indent=1, default=list) + "\n")
    if options.table:
        options.table.parent.mkdir(exist_ok=True)
        options.table.write_text(markdown(report))


def main(argv: Sequence[str] | None = None) -> int:
    """Compute and print the table; write it after every family."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=sorted(FAMILIES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the other rows in --out")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "command": "python benchmarks/export/coverage.py --out benchmarks/results/coverage.json "
        "--table docs/evidence/coverage.md",
        "versions": {
            "python": platform.python_version(),
            "timm": timm.__version__,
            "torch": torch.__version__,
        },
        "methods": list(method_names()),
        "families": {},
    }
    if options.resume and options.out.exists():
        report["families"] = json.loads(options.out.read_text())["families"]
    done = set(report["families"])
    for name in options.families or [name for name in FAMILIES if name not in done]:
        entry = report["families"][name] = row(name)
        print(f"{name:26}", *(f"{m}: {text(r)};" for m, r in entry["cells"].items()), flush=True)
        write(report, options)
    write(report, options)
    print(json.dumps(report["summary"]))
    found = bugs(report["families"]) + [f"{f} is in no list of families.py" for f in unlisted()]
    for line in found:
        print("BUG", line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
