"""merge: the merged model equals the tuned one, and is the plain architecture."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import (
    ARCHITECTURES,
    AT_THE_PRETRAINED_FUNCTION,
    PROMPTS,
    REFUSED,
    identity,
    image,
    model,
    same_bits,
    tune,
)
from torch import nn

from aoft_deploy import attach, merge
from aoft_deploy.cli.export import main as export_main
from aoft_deploy.errors import (
    AttachError,
    CheckpointError,
)
from aoft_deploy.tuning.methods import method_names
from aoft_deploy.tuning.prompted_blocks import Prompted
from aoft_deploy.tuning.sites.discovery import find_sites
from aoft_deploy.tuning.tuned_model import TunedModel


def check_plain(merged: nn.Module, keys: list[str], types: list[type], method: str) -> None:
    """Assert that the merged model has the base's keys and module types, and the prompts."""
    if method not in PROMPTS:
        assert list(merged.state_dict()) == keys
        assert [type(m) for m in merged.modules()] == types
        return
    blocks = [site.module for site in find_sites(merged) if site.role == "block"]
    prompts = [f"{block}.prompts.tokens" for block in blocks]
    assert set(merged.state_dict()) == {*keys, *prompts}
    assert [k for k in merged.state_dict() if k not in prompts] == keys
    others = [m for n, m in merged.named_modules() if not n.endswith(".prompts")]
    for module, kind in zip(others, types, strict=True):
        prompted = isinstance(module, Prompted)
        assert (type(module).__bases__[1] if prompted else type(module)) is kind
    assert sum(isinstance(m, Prompted) for m in others) == len(blocks)


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_merged_model_equals_the_tuned_one_and_is_the_plain_architecture(
    name: str, method: str
) -> None:
    if method in PROMPTS and name in REFUSED:
        with pytest.raises(AttachError, match=REFUSED[name]):
            attach(model(name), method, backbone=identity(name))
        return
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        base = model(name, dtype)
        keys, types = list(base.state_dict()), [type(m) for m in base.modules()]
        x = image(base)
        with torch.no_grad():
            untouched = base(x)
            tuned = tune(base, method, backbone=identity(name))
            unmerged = tuned(x)
            merged = merge(tuned)
            scale = max(1.0, unmerged.abs().max().item()) if dtype is torch.float32 else 1.0
            assert (merged(x) - unmerged).abs().max() <= tolerance * scale
            assert (unmerged - untouched).abs().max() > 0.01
        check_plain(merged, keys, types, method)


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "fused rlrr": ("rlrr", {"fused_qkv": True, "norms": ["norm"]}),
    "rlrr of rank 3": ("rlrr", {"rank": 3, "norms": ["norm", "reduction_norm", "patch"]}),
    "rlrr on batch norm": ("rlrr", {"norms": ["batch_norm"]}),
    "rlrr without residual": ("rlrr", {"residual": False}),
    "rlrr of one side": ("rlrr", {"sides": "in"}),
    "fused lora": ("lora", {"targets": ["qkv", "proj"]}),
    "lora on all": ("lora", {"rank": 2, "targets": ["q", "k", "v", "proj", "fc1", "fc2"]}),
    "lora on reduction": ("lora", {"targets": ["reduction"]}),
    "lora on convolutions": ("lora", {"rank": 3, "targets": ["conv"]}),
    "aoft on convolutions": ("aoft-lora-star", {"rank": 3, "targets": ["conv"]}),
    "adapter after all": ("adapter", {"targets": ["q", "v", "proj", "fc1", "fc2"]}),
    "adapter after convolutions": ("adapter", {"targets": ["conv"]}),
    "strict shared adapter": ("aoft-adapter-star", {"strict": True, "shared": True}),
    "adapter without residual": ("aoft-adapter", {"residual": False}),
    "adapter after reduction": ("aoft-adapter", {"residual": False, "targets": ["reduction"]}),
    "shallow prompts": ("aoft-vpt-star", {"deep": False, "strict": True, "rank": 3}),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_merged_model_equals_the_tuned_one_with_other_settings(form: str) -> None:
    method, settings = FORMS[form]
    supported = 0
    for name in list(ARCHITECTURES)[:5]:
        base = model(name, torch.float64)
        x = image(base)
        try:
            tuned = tune(base, method, backbone=identity(name), **settings)
        except AttachError:
            continue
        supported += 1
        with torch.no_grad():
            assert (merge(tuned)(x) - tuned(x)).abs().max() <= 1e-12, name
    assert supported >= 1


@pytest.mark.parametrize("method", method_names())
def test_merging_does_not_change_the_tuned_model(
    method: str,
) -> None:
    name = "vit_tiny_patch16_224" if method in PROMPTS else "beit_base_patch16_224"
    for dtype in (torch.float64, torch.float32):
        tuned = tune(model(name, dtype), method, backbone=identity(name))
        x = image(tuned.backbone)
        before = {n: t.clone() for n, t in tuned.state_dict().items()}
        flags = [p.requires_grad for p in tuned.parameters()]
        answer = tuned(x)
        merged = merge(tuned)
        after = tuned.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[n], before[n]) for n in before)
        assert [p.requires_grad for p in tuned.parameters()] == flags
        assert torch.equal(tuned(x), answer)
        assert torch.equal(merge(tuned)(x), merged(x))


IN_PLACE = [
    (name, method)
    for name in ("vit_tiny_patch16_224", "swinv2_tiny_window8_256", "resnet18")
    for method in method_names()
    if (name != "vit_tiny_patch16_224" if method not in PROMPTS else name not in REFUSED)
]
"""Prompts on architectures that support them, and other methods where most is folded."""


@pytest.mark.parametrize(("name", "method"), IN_PLACE)
def test_merging_in_place_gives_the_same_bits_and_disables_the_tuned_model(
    name: str, method: str
) -> None:
    tuned = tune(model(name), method, backbone=identity(name))
    expected = merge(tuned)
    merged = merge(tuned, in_place=True)
    assert list(merged.state_dict()) == list(expected.state_dict())
    for key, tensor in expected.state_dict().items():
        assert same_bits(merged.state_dict()[key], tensor), key
    assert [type(m) for m in merged.modules()] == [type(m) for m in expected.modules()]
    assert not any(p.requires_grad for p in merged.parameters())
    x = image(expected)
    assert torch.equal(merged(x), expected(x))
    uses: list[Callable[[], Any]] = [
        lambda: tuned(x),
        lambda: merge(tuned),
        lambda: merge(tuned, in_place=True),
        lambda: tuned.trained(),
        lambda: tuned.load_trained({}),
    ]
    for use in uses:
        with pytest.raises(
            CheckpointError, match="merged in place and cannot be used: load its check"
        ):
            use()


def test_merging_in_place_reuses_the_memory_of_the_weights() -> None:
    tuned = tune(model(), "rlrr")
    base = tuned.backbone.get_submodule("blocks.0.mlp.fc1").base.weight  # type: ignore[union-attr]
    merged = merge(tuned, in_place=True)
    assert merged.get_parameter("blocks.0.mlp.fc1.weight").data_ptr() == base.data_ptr()  # type: ignore[operator]


def test_a_failed_merge_in_place_disables_the_tuned_model() -> None:
    tuned = tune(model(), "lora")
    for parameter in tuned.updates["blocks.1.attn.qkv.v"].parameters():
        parameter.data.fill_(1e30)
    with pytest.raises(CheckpointError, match=r"not finite in torch\.float32"):
        merge(tuned, in_place=True)
    with pytest.raises(CheckpointError, match="merged in place and cannot be used"):
        tuned(image(model()))


def test_a_merged_model_can_be_copied_and_loads_into_the_plain_architecture() -> None:
    base = model()
    x = image(base)
    for method in ("rlrr", "aoft-vpt"):
        merged = merge(tune(model(), method))
        assert torch.equal(copy.deepcopy(merged)(x), merged(x))
        loaded = base.load_state_dict(merged.state_dict(), strict=False)
        assert not loaded.missing_keys
        assert bool(loaded.unexpected_keys) is (method == "aoft-vpt")
        assert torch.equal(base(x), merged(x)) is (method == "rlrr")


def test_weights_without_updates_are_shared_with_the_merged_model() -> None:
    tuned = tune(model("vit_tiny_patch16_224"), "aoft-lora")
    merged = merge(tuned)
    shared = merged.get_parameter("blocks.0.mlp.fc1.weight")
    assert shared is tuned.backbone.get_parameter("blocks.0.mlp.fc1.weight")
    head = merged.get_parameter("head.weight")
    assert head.data_ptr() != tuned.backbone.get_parameter("head.weight").data_ptr()


def test_merging_aoft_lora_changes_only_the_rows_of_q_and_v() -> None:
    tuned = tune(model("vit_tiny_patch16_224"), "aoft-lora")
    width = 192
    base = tuned.backbone.get_submodule("blocks.0.attn.qkv").base.weight  # type: ignore[union-attr]
    merged = merge(tuned).get_parameter("blocks.0.attn.qkv.weight")
    assert torch.equal(merged[width : 2 * width], base[width : 2 * width])  # type: ignore[index]
    assert not torch.equal(merged[:width], base[:width])  # type: ignore[index]


@pytest.mark.parametrize(
    "start", [s for s in AT_THE_PRETRAINED_FUNCTION if "without residual" not in s]
)
@pytest.mark.parametrize("in_place", [False, True])
def test_merging_a_zero_update_changes_no_bit(start: str, in_place: bool) -> None:
    method, settings = AT_THE_PRETRAINED_FUNCTION[start]
    for name in ("swin_tiny_patch4_window7_224", "beit_base_patch16_224", "convnext_atto"):
        base = model(name)
        for parameter in base.parameters():
            parameter.data.view(-1)[::7] = -0.0
        expected = {n: t.clone() for n, t in base.state_dict().items()}
        tuned = attach(base, method, backbone=identity(name), **settings)
        merged = merge(tuned, in_place=in_place).state_dict()
        for key, tensor in expected.items():
            assert same_bits(merged[key], tensor), key


def test_a_merged_model_equals_the_tuned_one_for_other_batch_sizes() -> None:
    base = model("vit_tiny_patch16_224", torch.float64)
    tuned = tune(base, "rlrr")
    merged = merge(tuned)
    for batch in (1, 3):
        x = image(base, batch)
        assert torch.allclose(merged(x), tuned(x), atol=1e-12)


def test_parameters_too_large_to_fold_are_refused() -> None:
    tuned = tune(model("vit_tiny_patch16_224"), "lora")
    for parameter in tuned.trained().values():
        parameter.data.fill_(1e30)
    with pytest.raises(CheckpointError, match=r"not finite in torch\.float32"):
        merge(tuned)


def test_prompts_too_large_for_their_dtype_are_refused() -> None:
    tuned = attach(model(), "aoft-vpt-star")
    for update in tuned.updates.values():
        for parameter in update.parameters():
            parameter.data.fill_(1e30)
    with pytest.raises(CheckpointError, match=r"not finite in torch\.float32"):
        merge(tuned)


def test_an_exported_graph_with_prompts_gives_the_logits_of_the_tuned_model(
    make_tuned: Callable[..., TunedModel],
    make_checkpoint: Callable[..., Path],
    backbone_weights: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "task.onnx"
    options: list[Any] = ["--merge", make_checkpoint("aoft-vpt"), "--backbone-weights"]
    assert export_main([str(option) for option in [*options, backbone_weights, "-o", path]]) == 0
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    tuned = make_tuned("aoft-vpt")
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
        (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            assert (torch.from_numpy(answer) - tuned(x)).abs().max() < 1e-5
