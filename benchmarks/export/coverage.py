r"""Every timm family with attention, and ResNet and ConvNeXt, under every method.

One small representative of each family, random in every parameter and BatchNorm statistic. A method
is attached, all its trained numbers are moved, and the merged model is compared with the unmerged
one in float64: "exact" is a difference of at most 1e-12 of the largest logit (or of one), with the
base's own module types and state-dict keys. For prompts and for one method that touches everything
the merged float32 model is also exported and run by ONNX Runtime at batch 1 and 2. Otherwise the
cell is the sentence that attach refuses with.

A model that attaches but is not exact, or in which a method of every map leaves out a linear map of
an attention or MLP, is a bug: the script says so and ends with exit code 1.

    python benchmarks/export/coverage.py --out benchmarks/results/coverage.json \
        --table docs/coverage.md
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import (
    gcvit,
    list_modules,
    metaformer,
    mvitv2,
    nest,
    volo,
)
from torch import Tensor, nn

from aoft_deploy import attach, merge
from aoft_deploy.artefacts.registry import get_exporter
from aoft_deploy.artefacts.spec import Recipe
from aoft_deploy.errors import AttachError
from aoft_deploy.tuning.backbones.identity import Backbone
from aoft_deploy.tuning.methods import get_method, method_names
from aoft_deploy.tuning.sites.attention_classes import LEFT_ALONE, is_attention
from aoft_deploy.tuning.sites.classifier import classifier_names
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_deploy.tuning.updated_layers import UpdatedModule

CLASSES = 5
TOLERANCE = 1e-12
ONNX_TOLERANCE = 5e-5
EVERY_MAP = ("rlrr", "ssf")
"""Methods that leave no linear map of a block out."""


@dataclass(frozen=True)
class Family:
    """How to make a family's representative small.

    Attributes:
        model: timm name.
        args: Arguments of ``timm.create_model``, or of the class.
        size: Side of its images in pixels.
        cls: Its class, where the timm name fixes what is to be smaller.
    """

    model: str
    args: Mapping[str, Any] = field(default_factory=dict)
    size: int = 64
    cls: Callable[..., nn.Module] | None = None


def plain(name: str, size: int = 32, **args: Any) -> Family:
    """A plain ViT of depth 2 and width 48."""
    args = {"img_size": size, "depth": 2, "embed_dim": 48, "num_heads": 3, **args}
    return Family(name, args, size)


def windowed(name: str) -> Family:
    """A Swin of two stages."""
    args = {"window_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 3)}
    return Family(name, {"img_size": 32, **args}, 32)


FAMILIES = {
    "beit": plain("beit_base_patch16_224"),
    "byoanet": Family("halonet_h1", size=256),
    "cait": plain("cait_xxs24_224"),
    "coat": Family(
        "coat_tiny",
        {
            "img_size": 64,
            "embed_dims": (16, 16, 16, 16),
            "serial_depths": (1, 1, 1, 1),
            "parallel_depth": 1,
        },
    ),
    "convit": Family(
        "convit_tiny",
        {"img_size": 32, "depth": 3, "local_up_to_layer": 2, "embed_dim": 16, "num_heads": 4},
        32,
    ),
    "convnext": Family("test_convnext"),
    "cpubone": Family("cpubone_nano"),
    "crossvit": Family(
        "crossvit_tiny_240",
        {"embed_dim": (24, 48), "num_heads": (3, 3), "depth": ((1, 1, 0), (1, 1, 0))},
        240,
    ),
    "csatv2": Family("csatv2", size=128),
    "davit": Family(
        "davit_tiny",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), "num_heads": (2, 4, 4, 8)},
    ),
    "deepseek_vit": plain("deepseek_vit_412m", 28),
    "deit": plain("deit3_small_patch16_224"),
    "edgenext": Family("edgenext_xx_small", {"dims": (8, 16, 16, 32), "depths": (1, 1, 2, 1)}),
    "efficientformer": Family(
        "efficientformer_l1", {"depths": (1, 1, 1, 2), "embed_dims": (16, 16, 32, 32)}, 224
    ),
    "efficientformer_v2": Family("efficientformerv2_s0", {"img_size": 64}),
    "efficientvit_mit": Family("efficientvit_b0"),
    "efficientvit_msra": Family("efficientvit_m0", size=224),
    "eva": plain("eva02_tiny_patch14_224", 28),
    "fastvit": Family("fastvit_sa12", {"layers": (1, 1, 1, 2), "embed_dims": (32, 32, 64, 64)}),
    "gcvit": Family(
        "gcvit_xxtiny",
        {
            "img_size": 64,
            "window_size": (2, 2, 2, 1),
            "embed_dim": 16,
            "depths": (2, 2, 2, 2),
            "num_heads": (2, 2, 4, 4),
        },
        cls=gcvit.GlobalContextVit,
    ),
    "gemma4_vit": plain("gemma4_vit_167m", 48),
    "hiera": Family(
        "hiera_tiny_224", {"img_size": (64, 64), "embed_dim": 16, "stages": (1, 2, 2, 1)}
    ),
    "hieradet_sam2": Family("hieradet_small", {"embed_dim": 32, "stages": (1, 2, 3, 1)}, 128),
    "iformer": Family("iformer_t"),
    "levit": Family(
        "levit_128s",
        {"img_size": 64, "embed_dim": (32, 48, 64), "depth": (1, 1, 1), "num_heads": (2, 2, 2)},
    ),
    "lowformer": Family("lowformer_b0"),
    "maxxvit": Family("test_maxvit", size=160),
    "metaformer": Family(
        "caformer_s18",
        {
            "depths": (1, 1, 1, 1),
            "dims": (16, 32, 32, 64),
            "token_mixers": [metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
            "norm_layers": [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
        },
        cls=metaformer.MetaFormer,
    ),
    "mobilenetv3": Family("mobilenetv4_hybrid_medium"),
    "mobilenetv5": Family("mobilenetv5_base"),
    "mobilevit": Family("mobilevit_xxs"),
    "mvitv2": Family(
        "mvitv2_tiny",
        {"img_size": 64, "cfg": mvitv2.MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=16)},
        cls=mvitv2.MultiScaleVit,
    ),
    "naflexvit": plain("naflexvit_base_patch16_gap"),
    "nest": Family(
        "nest_tiny",
        {"img_size": 32, "embed_dims": (16, 24, 24), "num_heads": (2, 3, 3), "depths": (1, 1, 1)},
        32,
        nest.Nest,
    ),
    "nextvit": Family("nextvit_small", {"depths": (1, 1, 5, 1)}),
    "pit": Family(
        "pit_ti_224",
        {"img_size": 64, "base_dims": (16, 16, 16), "depth": (1, 1, 1), "heads": (1, 2, 2)},
    ),
    "pvt_v2": Family(
        "pvt_v2_b0",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 24, 32), "num_heads": (1, 2, 3, 4)},
    ),
    "qwen3_vit": plain("qwen3_vit_88m"),
    "resnet": Family("test_resnet"),
    "shvit": Family("shvit_s1"),
    "swiftformer": Family("swiftformer_xs"),
    "swin_transformer": windowed("swin_tiny_patch4_window7_224"),
    "swin_transformer_v2": windowed("swinv2_tiny_window8_256"),
    "swin_transformer_v2_cr": windowed("swinv2_cr_tiny_224"),
    "tiny_vit": Family(
        "tiny_vit_5m_224",
        {
            "embed_dims": (16, 32, 32, 64),
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 2, 2, 4),
            "window_sizes": (2, 2, 2, 2),
        },
    ),
    "tnt": Family(
        "tnt_s_patch16_224",
        {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads_outer": 3},
        32,
    ),
    "twins": Family(
        "twins_svt_small",
        {
            "img_size": 64,
            "depths": (1, 2, 2, 2),
            "embed_dims": (24, 48, 48, 48),
            "num_heads": (2, 3, 3, 3),
        },
    ),
    "visformer": Family(
        "visformer_tiny", {"img_size": 64, "embed_dim": 48, "depth": (1, 1, 1), "num_heads": 2}
    ),
    "vision_transformer": plain("vit_tiny_patch16_224"),
    "vision_transformer_hybrid": plain("vit_tiny_r_s16_p8_224", 64),
    "vision_transformer_relpos": plain("vit_relpos_small_patch16_224"),
    "vision_transformer_sam": plain(
        "samvit_base_patch16_224",
        64,
        depth=3,
        global_attn_indexes=(1,),
        window_size=2,
        neck_chans=32,
    ),
    "vitamin": Family(
        "vitamin_small_224", {"img_size": 64, "depth": 2, "embed_dim": 384, "num_heads": 6}
    ),
    "volo": Family(
        "volo_d1_224",
        {
            "img_size": 64,
            "layers": (1, 1, 1, 1),
            "embed_dims": (24, 48, 48, 48),
            "num_heads": (2, 3, 3, 3),
        },
        cls=volo.VOLO,
    ),
    "xcit": plain("xcit_nano_12_p8_224"),
}

OTHERS = frozenset(
    """byobnet convmixer cspnet cspnext densenet dla dpn efficientnet efficientvim fasternet
    focalnet ghostnet hardcorenas hgnet hrnet inception_next inception_resnet_v2 inception_v3
    inception_v4 lcnetv2 mambaout mlp_mixer nasnet nfnet pnasnet rdnet regnet repghost repvit
    res2net resnest resnetv2 rexnet selecsls senet sequencer sknet starnet tresnet vgg vovnet
    xception xception_aligned""".split()
)
"""timm's other families: convolutions, MLPs, state spaces and recurrence, with no attention between
tokens. CNNs of these that offer it in a few variants count here too."""


@torch.no_grad()
def representative(family: Family) -> nn.Module:
    """The family's small model, random in every number, so that nothing is zero or one."""
    torch.manual_seed(0)
    make = family.cls or partial(timm.create_model, family.model)
    model = make(num_classes=CLASSES, **family.args).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(noise * (0.02 if parameter.dim() > 1 else 0.1))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def images(family: Family, batch: int, dtype: torch.dtype) -> Tensor:
    """Random pixels."""
    generator = torch.Generator().manual_seed(batch)
    return torch.rand(batch, 3, family.size, family.size, generator=generator).to(dtype)


def tuned_model(base: nn.Module, method: str, **settings: Any) -> TunedModel:
    """The method attached with rank 2 and every trained number moved from its start."""
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
    """Linear maps in the attentions and MLPs of the blocks that have no update."""
    backbone = tuned.backbone
    branches = [
        f"{path}."
        for path, module in backbone.named_modules()
        if is_attention(module) or re.fullmatch(r"(attn|mlp).*", path.rpartition(".")[2])
    ]
    heads = {name.rpartition(".")[0] for name in classifier_names(backbone)}
    for path, module in backbone.named_modules():
        alone = path in heads or any(part in LEFT_ALONE for part in path.split("."))
        if isinstance(module, nn.Linear) and path.startswith(tuple(branches)) and not alone:
            rows = _updated_rows(backbone, path)
            if rows != [(0, module.out_features)]:
                yield f"{path} rows {rows}"


def _updated_rows(backbone: nn.Module, path: str) -> list[tuple[int, int]]:
    """Ranges of output rows with an update, neighbours joined, of the layer at ``X.base``."""
    owner = backbone.get_submodule(path.rpartition(".")[0])
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(owner.rows) if isinstance(owner, UpdatedModule) else ():
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def left_alone(tuned: TunedModel) -> list[str]:
    """Patterns of the layers with weights that have no update, indices as #."""
    heads = {name.rpartition(".")[0] for name in classifier_names(tuned.backbone)}
    found = set()
    for path, module in tuned.backbone.named_modules():
        inside = path.endswith(".base") or ".updates" in path or path in heads
        if not inside and isinstance(module._parameters.get("weight"), Tensor):
            found.add(re.sub(r"\d+", "#", path))
    return sorted(found)


@torch.no_grad()
def difference(base: nn.Module, family: Family, method: str, **settings: Any) -> tuple[float, Any]:
    """Relative difference of merged and unmerged model in float64.

    Raises:
        AssertionError: The merged model is not the base's own architecture, or nothing changed.
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
    """Relative difference of the exported merged model, run by ONNX Runtime, from the unmerged."""
    tuned = tuned_model(copy.deepcopy(base), method, **settings)
    exporter = get_exporter("onnx")
    recipe = Recipe(family.size, False, (0.0,) * 3, (1.0,) * 3, {})
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
    """Settings with which a method takes a fused map as a whole, where it has any."""
    if "targets" in get_method(method).defaults and "adapter" not in method:
        return {"targets": ["qkv"]}
    return dict(WHOLE.get(method, {}))


def cell(base: nn.Module, family: Family, method: str) -> dict[str, Any]:
    """One cell of the table: attached or refused, and how exact."""
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
        except Exception as error:  # whatever is raised here is what the script looks for
            cells[method] = {"bug": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    widest = next((m for m in ("rlrr", "ssf", "lora", "full") if "difference" in cells[m]), "full")
    for method in (widest, "vpt"):
        result = cells[method]
        if "difference" not in result:
            continue
        try:
            result["onnx"] = onnx_difference(base, family, method, **result.get("settings", {}))
            if not result["onnx"] <= ONNX_TOLERANCE:
                result["onnx_failure"] = f"ONNX Runtime differs by {result['onnx']:.1e}"
        except Exception as error:  # the ONNX exporter raises anything
            while error.__cause__ is not None:
                error = error.__cause__  # type: ignore[assignment]
            reason = " ".join(str(error).split())[:200]
            result["onnx_failure"] = f"{type(error).__name__}: {reason}"
    args = {name: str(value) for name, value in family.args.items()}
    return {"model": family.model, "args": args, "size": family.size, "cells": cells}


def text(result: Mapping[str, Any]) -> str:
    """A cell in words."""
    if "bug" in result:
        return f"BUG: {result['bug']}"
    if "difference" not in result:
        return "refused"
    words = "exact" + (", ONNX" if "onnx" in result and "onnx_failure" not in result else "")
    words += ", no ONNX" if "onnx_failure" in result else ""
    return words + (" (whole qkv)" if "settings" in result else "")


def bugs(rows: Mapping[str, Any]) -> list[str]:
    """What must not be."""
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
    whole = [
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
        "families_with_every_method_but_prompts": len(whole),
        "cells": len(cells),
        "exact": len(exact),
        "refused": sum("difference" not in r and "bug" not in r for r in cells),
        "onnx_parity": sum("onnx" in r and "onnx_failure" not in r for r in cells),
        "onnx_failures": sum("onnx_failure" in r for r in cells),
        "bugs": len(bugs(rows)),
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The table as a page."""
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


def unlisted() -> list[str]:
    """Families of the installed timm that stand in no list of this script."""
    own = (name for name in list_modules() if find_spec(f"timm.models.{name}") is not None)
    return sorted(set(own) - set(FAMILIES) - OTHERS)


def write(report: dict[str, Any], options: argparse.Namespace) -> None:
    """Write what is there so far."""
    report["families"] = dict(sorted(report["families"].items()))
    report["summary"] = summary(report["families"])
    if options.out:
        options.out.write_text(json.dumps(report, indent=1, default=list) + "\n")
    if options.table:
        options.table.parent.mkdir(exist_ok=True)
        options.table.write_text(markdown(report))


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the table, print it, write it after every family."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=sorted(FAMILIES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the other rows that --out has")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "command": "python benchmarks/export/coverage.py --out benchmarks/results/coverage.json "
        "--table docs/coverage.md",
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
    wrong = bugs(report["families"]) + [f"{f} is in no list of this script" for f in unlisted()]
    for line in wrong:
        print("BUG", line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
