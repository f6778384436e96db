"""Coverage of timm: the row order of fused maps, some cells of the coverage table, and its page.

``benchmarks/export/coverage.py`` computes the full table.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from aoft_deploy import attach, merge
from aoft_deploy.errors import AttachError
from aoft_deploy.tuning.backbones.identity import Backbone
from aoft_deploy.tuning.methods import method_names
from aoft_deploy.tuning.sites.attention_classes import (
    FUSED,
    ROWS_BY_HEAD,
    ROWS_BY_PART,
    SEPARATE,
    class_of,
    fused_parts,
    parts_refusal,
)
from aoft_deploy.tuning.sites.classifier import classifier_names
from aoft_deploy.tuning.sites.discovery import find_sites

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
PAGE = ROOT / "docs" / "evidence" / "coverage.md"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """``benchmarks/export/coverage.py`` as a module."""
    spec = importlib.util.spec_from_file_location(
        "coverage_table", ROOT / "benchmarks" / "export" / "coverage.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "benchmarks" / "export"))  # for the modules beside it
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.path[0]
    return module


class Products(TorchFunctionMode):
    """Records the operands of every matrix product and fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[Tensor, ...]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.operands += [args[:2], (args[0].new_full((), torch.nan), args[2])]
        elif func in (Tensor.matmul, Tensor.__matmul__, torch.matmul):
            self.operands.append(args[:2])
        return func(*args, **(kwargs or {}))


def attention_class(kind: tuple[str, str]) -> type[nn.Module]:
    found: type[nn.Module] = getattr(importlib.import_module(kind[0]), kind[1])
    return found


@torch.no_grad()
def products(
    attention: nn.Module, name: str, roles: tuple[str, ...], shape: tuple[int, ...], *rest: Any
) -> list[tuple[Tensor, ...]]:
    """The operands of an attention's products if the fused map gives 1 (q), -2 (k) and 3 (v)."""
    attention.eval()
    fused = attention.get_submodule(name)
    weight = fused.get_parameter("weight")
    rows = torch.tensor([{"q": 1.0, "k": -2.0, "v": 3.0}[role] for role in roles])
    weight.zero_()
    rows = rows.repeat_interleave(len(weight) // len(roles)) / weight.shape[1]
    weight.add_(rows.view(-1, *[1] * (weight.dim() - 1)))
    bias = fused._parameters.get("bias")
    if bias is not None:
        bias.zero_()
    for norm in (m for m in attention.modules() if isinstance(m, nn.LayerNorm)):
        norm.weight.zero_()
        norm.bias.fill_(1.0)
    record = Products()
    with record:
        attention(torch.ones(shape), *rest)
    return record.operands


class Zero(nn.Module):
    """Replaces a position encoding."""

    def forward(self, q: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        return torch.zeros_like(q)


TOKENS, GRID, IMAGE = (2, 4, 12), (2, 2, 2, 12), (2, 12, 2, 2)
HEADS: dict[str, Any] = {"dim": 12, "num_heads": 3}
IN_OUT: dict[str, Any] = {"dim": 12, "dim_out": 12}

MADE: dict[tuple[str, str], tuple[dict[str, Any], tuple[int, ...], tuple[Any, ...]]] = {
    ("timm.layers.attention", "Attention"): (HEADS, TOKENS, ()),
    ("timm.layers.attention", "AttentionRope"): (HEADS, TOKENS, ()),
    ("timm.layers.attention2d", "Attention2d"): (HEADS, IMAGE, ()),
    ("timm.layers.diff_attention", "DiffAttention"): ({"dim": 12, "num_heads": 2}, TOKENS, ()),
    ("timm.models.beit", "Attention"): (HEADS, TOKENS, ()),
    ("timm.models.cait", "TalkingHeadAttn"): (HEADS, TOKENS, ()),
    ("timm.models.coat", "FactorAttnConvRelPosEnc"): (
        {**HEADS, "shared_crpe": Zero()},
        TOKENS,
        ((2, 2),),
    ),
    ("timm.models.convit", "GPSA"): (HEADS, TOKENS, ()),
    ("timm.models.convit", "MHSA"): (HEADS, TOKENS, ()),
    ("timm.models.davit", "ChannelAttention"): (HEADS, TOKENS, ()),
    ("timm.models.davit", "ChannelAttentionV2"): (HEADS, TOKENS, ()),
    ("timm.models.davit", "WindowAttention"): ({**HEADS, "window_size": (2, 2)}, TOKENS, ()),
    ("timm.models.edgenext", "CrossCovarianceAttn"): (HEADS, TOKENS, ()),
    ("timm.models.eva", "EvaAttention"): ({**HEADS, "scale_norm": False}, TOKENS, ()),
    ("timm.models.fastvit", "Attention"): ({"dim": 12, "head_dim": 4}, IMAGE, ()),
    ("timm.models.gcvit", "WindowAttentionGlobal"): (
        {**HEADS, "window_size": (2, 2)},
        TOKENS,
        (torch.ones(TOKENS),),
    ),
    ("timm.models.hiera", "MaskUnitAttention"): ({**IN_OUT, "heads": 3}, TOKENS, ()),
    ("timm.models.hieradet_sam2", "MultiScaleAttention"): ({**IN_OUT, "num_heads": 3}, GRID, ()),
    ("timm.models.maxxvit", "Attention2d"): (
        {"dim": 12, "dim_head": 4, "head_first": False},
        IMAGE,
        (),
    ),
    ("timm.models.maxxvit", "AttentionCl"): (
        {"dim": 12, "dim_head": 4, "head_first": False},
        GRID,
        (),
    ),
    ("timm.models.metaformer", "Attention"): ({"dim": 12, "head_dim": 4}, TOKENS, ()),
    ("timm.models.mvitv2", "MultiScaleAttention"): (
        {**IN_OUT, "num_heads": 3, "feat_size": (2, 2), "has_cls_token": False},
        TOKENS,
        ((2, 2),),
    ),
    ("timm.models.nest", "Attention"): (HEADS, (2, 1, 4, 12), ()),
    ("timm.models.pvt_v2", "Attention"): (HEADS, TOKENS, ((2, 2),)),
    ("timm.models.swin_transformer", "WindowAttention"): (
        {**HEADS, "window_size": 2},
        TOKENS,
        (),
    ),
    ("timm.models.swin_transformer_v2", "WindowAttention"): (
        {**HEADS, "window_size": (2, 2)},
        TOKENS,
        (),
    ),
    ("timm.models.swin_transformer_v2_cr", "WindowMultiHeadAttention"): (
        {**HEADS, "window_size": (2, 2)},
        TOKENS,
        (),
    ),
    ("timm.models.tnt", "Attention"): ({**HEADS, "hidden_dim": 12}, TOKENS, ()),
    ("timm.models.twins", "GlobalSubSampleAttn"): (HEADS, TOKENS, ((2, 2),)),
    ("timm.models.twins", "LocallyGroupedAttn"): ({**HEADS, "ws": 2}, TOKENS, ((2, 2),)),
    ("timm.models.visformer", "Attention"): (HEADS, IMAGE, ()),
    ("timm.models.vision_transformer_relpos", "RelPosAttention"): (HEADS, TOKENS, ()),
    ("timm.models.vision_transformer_sam", "Attention"): (HEADS, GRID, ()),
    ("timm.models.volo", "Attention"): (HEADS, GRID, ()),
    ("timm.models.volo", "ClassAttention"): (HEADS, TOKENS, ()),
    ("timm.models.xcit", "XCA"): (HEADS, TOKENS, ()),
}
"""A small instance of every class with known rows: its arguments, its input, and what follows."""

PLACES = {
    ("timm.models.coat", "FactorAttnConvRelPosEnc"): {"q": (1, 0), "v": (0, 1)},
    ("timm.models.davit", "ChannelAttention"): {"q": (1, 1), "k": (0, 0), "v": (0, 1)},
}
"""Where a part enters, product and operand, if not q · k and then scores · v. CoaT's k enters as
its softmax over the tokens, whose values do not tell; it is the part that is left."""

SIGN = {"q": 1, "k": -1, "v": 1}


def test_every_class_with_known_rows_is_tested() -> None:
    assert set(MADE) == ROWS_BY_PART
    assert not ROWS_BY_PART & (ROWS_BY_HEAD | SEPARATE)


@pytest.mark.parametrize("kind", sorted(ROWS_BY_PART), ids=".".join)
def test_each_part_of_a_fused_map_enters_the_attention_in_its_role(
    kind: tuple[str, str],
) -> None:
    options, shape, rest = MADE[kind]
    attention = attention_class(kind)(**options)
    assert not parts_refusal(attention, "attn")
    fused = [name for name in FUSED if isinstance(getattr(attention, name, None), nn.Module)]
    assert fused
    for name in fused:
        roles = fused_parts(attention, name)
        places = PLACES.get(kind, {"q": (0, 0), "k": (0, 1), "v": (1, 1)})
        found = products(attention, name, roles, shape, *rest)
        for role in set(roles).intersection(places):
            product, operand = places[role]
            part = found[product][operand]
            assert torch.allclose(part, part.flatten()[0].expand_as(part)), f"{role} is mixed"
            assert part.flatten()[0].sign() == SIGN[role]
            assert role != "v" or torch.allclose(part, torch.tensor(3.0))


def test_the_parts_of_gcvits_local_windows_are_three() -> None:
    kind = ("timm.models.gcvit", "WindowAttentionGlobal")
    attention = attention_class(kind)(**MADE[kind][0], use_global=False)
    found = products(attention, "qkv", fused_parts(attention, "qkv"), TOKENS)
    assert [float(t.mean().sign()) for t in found[0]] == [1, -1]
    assert torch.allclose(found[1][1], torch.tensor(3.0))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (("timm.models.tiny_vit", "Attention"), {"key_dim": 4, "attn_ratio": 1, "num_heads": 3}),
        (("timm.models.efficientformer", "Attention"), {"key_dim": 4, "attn_ratio": 1}),
        (("timm.models.maxxvit", "AttentionCl"), {"dim_head": 4}),
    ],
    ids=["tiny_vit", "efficientformer", "maxxvit"],
)
def test_rows_ordered_by_head_mix_every_part_and_are_refused(
    kind: tuple[str, str], options: dict[str, Any]
) -> None:
    size = {"resolution": (2, 2)} if "key_dim" in options else {}
    heads = {"num_heads": 3} if "key_dim" in options else {}
    attention = attention_class(kind)(dim=12, **{**options, **heads, **size})
    assert "rows are ordered head by head" in parts_refusal(attention, "attn")
    shape = GRID if kind[1] == "AttentionCl" else TOKENS
    query = products(attention, "qkv", ("q", "k", "v"), shape)[0][0]
    assert not torch.allclose(query, query.flatten()[0].expand_as(query))


REPRESENTATIVES = ("deit", "swin_transformer_v2_cr")
"""A plain and a windowed family, which no other test attaches to."""


@pytest.mark.parametrize("family", REPRESENTATIVES)
@pytest.mark.parametrize("method", [m for m in method_names() if "vpt" not in m])
def test_plain_and_windowed_families_merge_exactly(
    script: ModuleType, family: str, method: str
) -> None:
    entry = script.FAMILIES[family]
    result = script.cell(script.representative(entry), entry, method)
    assert "bug" not in result
    assert result["difference"] <= 1e-12


def test_a_family_with_an_attention_that_is_not_known_is_refused(script: ModuleType) -> None:
    entry = script.FAMILIES["levit"]
    base = script.representative(entry)
    for method in ("lora", "rlrr", "ssf", "bitfit", "vpt"):
        with pytest.raises(
            AttachError, match="maps are not known: only the methods linear and full support Levit"
        ):
            script.tuned_model(base, method)
    assert script.cell(base, entry, "linear")["difference"] <= 1e-12


def test_an_attention_of_another_name_is_not_a_known_block() -> None:
    with torch.device("meta"):
        model = small("shvit_s1")
    with pytest.raises(AttachError, match="SHViT has no transformer blocks of a known kind"):
        find_sites(model)


def test_a_fused_map_with_rows_ordered_by_head_can_be_updated_as_a_whole(
    script: ModuleType,
) -> None:
    entry = script.FAMILIES["tiny_vit"]
    base = script.representative(entry)
    with pytest.raises(AttachError, match="head by head: update the whole map with the role qkv"):
        script.tuned_model(base, "lora")
    result = script.cell(base, entry, "lora")
    assert result["settings"] == {"targets": ["qkv"]}
    assert result["difference"] <= 1e-12


def test_the_script_finds_rows_without_an_update(script: ModuleType) -> None:
    base = script.representative(script.FAMILIES["deit"])
    missing = list(script.uncovered(script.tuned_model(base, "lora")))
    assert "blocks.0.attn.qkv.base rows [(0, 48), (96, 144)]" in missing
    assert "blocks.0.mlp.fc1 rows []" in missing
    rows = {"deit": {"cells": {"rlrr": {"bug": missing[0]}, "lora": {"refused": "Why."}}}}
    assert script.bugs(rows) == [f"deit × rlrr: {missing[0]}"]


def small(name: str, **args: Any) -> nn.Module:
    model: nn.Module = timm.create_model(name, num_classes=3, **args)
    return model.eval()


def vit(depth: int = 1) -> nn.Module:
    return small("vit_tiny_patch16_224", img_size=32, depth=depth, embed_dim=24, num_heads=2)


def test_a_layer_that_is_used_twice_is_refused() -> None:
    def share_layer(model: nn.Module) -> None:
        first, second = (model.get_submodule(f"blocks.{i}.mlp") for i in (0, 1))
        second.fc1 = first.fc1

    def tie_weight(model: nn.Module) -> None:
        first, second = (model.get_submodule(f"blocks.{i}.mlp.fc1") for i in (0, 1))
        second.weight = first.weight

    changes: list[Callable[[nn.Module], None]] = [share_layer, tie_weight]
    for change in changes:
        model = vit(depth=2)
        change(model)
        with pytest.raises(AttachError, match=r"blocks\.0\.mlp\.fc1 is used in 2 places"):
            attach(model, "rlrr")
        assert attach(model, "lora", rank=2).updates


def test_coats_shared_mlp_is_updated_once_and_everywhere() -> None:
    model = small("coat_tiny", img_size=32)
    assert model.get_submodule("parallel_blocks.0.mlp2") is model.get_submodule(
        "parallel_blocks.0.mlp4"
    )
    tuned = attach(model, "lora", targets=["fc1"], rank=2, backbone=Backbone("coat_tiny", ""))
    assert "parallel_blocks.0.mlp2.fc1" in tuned.updates
    assert "parallel_blocks.0.mlp4.fc1" not in tuned.updates
    for parameter in tuned.trained().values():
        parameter.data.add_(0.1)
    merged = merge(tuned)
    assert merged.get_submodule("parallel_blocks.0.mlp2") is merged.get_submodule(
        "parallel_blocks.0.mlp4"
    )


def test_subclasses_of_linear_maps_are_refused() -> None:
    class Standardised(nn.Linear):
        """Divides its weight by the norm of the weight before use."""

    model = vit()
    model.get_submodule("blocks.0.mlp.fc1").__class__ = Standardised
    with pytest.raises(
        AttachError, match="is a Standardised, a subclass that may transform its weight"
    ):
        attach(model, "rlrr")
    assert attach(model, "lora", rank=2).updates


def test_an_unknown_linear_map_outside_the_blocks_is_refused() -> None:
    model = vit()
    model.extra = nn.Linear(4, 4)
    with pytest.raises(AttachError, match="extra is a linear map outside the blocks"):
        attach(model, "ssf")
    assert attach(model, "lora", rank=2).updates


def test_an_unknown_linear_map_of_a_block_is_refused() -> None:
    model = vit()
    model.get_submodule("blocks.0").add_module("shortcut", nn.Linear(4, 4))
    with pytest.raises(AttachError, match=r"blocks\.0\.shortcut is a map with no known role"):
        attach(model, "ssf")


def test_squeeze_and_excitation_has_no_site() -> None:
    with torch.device("meta"):
        model = small("seresnet50")
    assert any(".se." in path for path, _ in model.named_modules())
    assert not any(".se." in site.module for site in find_sites(model))


def test_talking_heads_and_position_biases_have_no_sites() -> None:
    sites = find_sites(small("cait_xxs24_224", img_size=32, depth=1, embed_dim=24, num_heads=2))
    assert not any(".proj_l" in site.module or ".proj_w" in site.module for site in sites)
    assert {"q", "k", "v"} <= {s.role for s in sites if s.module.startswith("blocks_token_only")}


def test_volos_second_classifier_is_trained_too() -> None:
    with torch.device("meta"):
        names = classifier_names(small("volo_d1_224"))
    assert names == ["aux_head.weight", "aux_head.bias", "head.weight", "head.bias"]


def test_the_classes_of_a_classifier_with_several_layers_are_counted() -> None:
    model = small("caformer_s18", drop_path_rate=0.0)
    assert attach(model, "linear", backbone=Backbone("caformer_s18", "")).num_classes == 3


def test_prompts_are_refused_where_the_blocks_are_not_one_list() -> None:
    with pytest.raises(AttachError, match="PoolingVisionTransformer are not one list of plain"):
        attach(small("pit_ti_224"), "vpt")


def test_every_family_of_the_installed_timm_is_listed(script: ModuleType) -> None:
    assert script.unlisted() == []


def test_the_classes_of_the_table_exist() -> None:
    for kind in ROWS_BY_PART | ROWS_BY_HEAD | SEPARATE:
        cls = attention_class(kind)
        assert class_of(cls.__new__(cls)) == kind


def test_the_page_shows_the_recorded_results(script: ModuleType) -> None:
    report = json.loads(RESULTS.read_text("utf-8"))
    assert PAGE.read_text("utf-8") == script.markdown(report)
    assert report["methods"] == list(method_names())
    assert list(report["families"]) == sorted(script.FAMILIES)
    assert report["summary"] == script.summary(report["families"])
    assert script.bugs(report["families"]) == []
