"""Training's forward pass: the model's logits and gradients, from less work and memory."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_models import ARCHITECTURES, image, model, trained
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from aoft_deploy import attach
from aoft_deploy.errors import SettingError
from aoft_deploy.tuning import frozen_attention
from aoft_deploy.tuning.class_token import reads_class_token
from aoft_deploy.tuning.frozen_functions import FrozenFunctions
from aoft_deploy.tuning.training_forward import check_checkpointing
from aoft_deploy.tuning.tuned_model import TunedModel
from aoft_deploy.tuning.updates import products
from aoft_deploy.tuning.updates.applying import apply_linear
from aoft_deploy.tuning.updates.delta import WeightDelta
from aoft_deploy.tuning.updates.folding import fold_rows, folded_briefly
from aoft_deploy.tuning.updates.scratch import rounded, scratch

LIBRARIES: Any = torch.backends
VIT = "vit_tiny_patch16_224"


def images(tuned: TunedModel, count: int = 3) -> Tensor:
    return image(tuned.backbone, count)


def step(tuned: TunedModel, forward: Any, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Logits, all gradients, and the bytes of activations that are kept for the backward pass."""
    own = {p.untyped_storage().data_ptr() for p in tuned.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = forward(x)
    tuned.zero_grad()
    logits.square().sum().backward()
    grads = [p.grad for p in tuned.trained().values() if p.grad is not None]
    return logits.detach(), torch.cat([g.flatten() for g in grads]), sum(kept.values())


@pytest.mark.parametrize("method", ["lora", "ssf", "linear"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_gradients_are_the_models_and_less_is_kept(name: str, method: str) -> None:
    tuned = trained(attach(model(name), method)).double().eval()
    x = images(tuned)
    logits, grads, kept = step(tuned, tuned, x)
    expected, theirs, more = step(tuned, tuned.backbone, x)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads, theirs, rtol=1e-8, atol=1e-8 * float(theirs.abs().max()))
    assert kept <= more


def test_a_vision_transformer_keeps_a_fifth_less() -> None:
    base = timm.create_model(VIT, img_size=64, depth=4, num_classes=5).eval()
    tuned = trained(attach(base, "aoft-lora"))
    x = images(tuned, 8)
    *_, kept = step(tuned, tuned, x)
    *_, more = step(tuned, tuned.backbone, x)
    assert kept < 0.8 * more


@pytest.mark.parametrize("method", ["aoft-lora", "linear"])
def test_autograd_records_nothing_before_the_first_site(method: str) -> None:
    tuned = attach(model(VIT), method)
    recorded: dict[str, bool] = {}
    for name, module in tuned.backbone.named_modules():
        if name in ("patch_embed", "blocks.0.norm1", "blocks.0.attn", "blocks.1.norm1", "norm"):
            module.register_forward_hook(
                lambda m, x, out, name=name: recorded.__setitem__(name, out.grad_fn is not None)
            )
    tuned(images(tuned)).sum().backward()
    later = method == "aoft-lora"
    assert recorded == {
        "patch_embed": False,
        "blocks.0.norm1": False,
        "blocks.0.attn": later,
        "blocks.1.norm1": later,
        "norm": later,
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_gives_the_same_bits_from_less_memory(precision: str) -> None:
    base = timm.create_model(VIT, img_size=32, depth=4, num_classes=5, drop_path_rate=0.3)
    tuned = trained(attach(base, "aoft-lora-star")).train()
    x, found = images(tuned), []
    for checkpointing in (False, True):
        tuned.checkpointing = checkpointing
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found.append(step(tuned, tuned, x))
    (logits, grads, kept), (again, same, less) = found
    assert torch.equal(logits, again) and torch.equal(grads, same)
    assert less < kept / 3


def test_checkpointing_refuses_other_models() -> None:
    check_checkpointing(model(VIT))
    with pytest.raises(SettingError, match=r"`checkpointing` needs .* not SwinTransformer with"):
        check_checkpointing(model("swin_tiny_patch4_window7_224"))


def test_the_last_block_is_cut_only_if_the_class_token_alone_is_read() -> None:
    def made(**changes: Any) -> nn.Module:
        return timm.create_model(VIT, img_size=32, depth=1, num_classes=5, **changes)

    assert reads_class_token(made()) and reads_class_token(made(reg_tokens=2, init_values=0.1))
    assert not reads_class_token(made(global_pool="avg"))
    assert not reads_class_token(made(proj_drop_rate=0.1))
    assert not reads_class_token(model("beit_base_patch16_224"))
    assert not reads_class_token(attach(made(), "vpt").backbone)
    hooked = made()
    hooked.blocks[-1].register_forward_hook(lambda *args: None)  # type: ignore[index, union-attr]
    assert not reads_class_token(hooked)


@pytest.mark.parametrize("path", ["blocks", "blocks.1", "blocks.1.mlp", "blocks.1.norm2", "norm"])
def test_a_hook_sees_what_it_sees_in_the_model_itself(path: str) -> None:
    base = timm.create_model(VIT, img_size=32, depth=2, num_classes=5).eval()
    tuned, seen = trained(attach(base, "lora")), list[Tensor]()
    x = images(tuned)
    tuned.backbone.get_submodule(path).register_forward_hook(lambda m, x, out: seen.append(out))
    tuned(x)
    tuned.backbone(x)
    ours, theirs = seen
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scores", [1, 1 << 20])
def test_attentions_gradients_are_those_of_autograd(
    scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_attention, "SCORES", scores)
    made = [torch.randn(3, 2, n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 7, 7)]
    weight = torch.randn(3, 2, 4, 8, dtype=torch.float64)
    q, k, v = made
    for scale in (None, 0.7):
        expected = F.scaled_dot_product_attention(q, k, v, scale=scale)
        with FrozenFunctions():
            found = F.scaled_dot_product_attention(q, k, v, scale=scale)
        pair = [torch.autograd.grad(out, made, weight) for out in (found, expected)]
        for ours, theirs in zip(*pair, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    with FrozenFunctions():
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(causal, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_the_gradients_of_queries_keys_and_values_are_joined_without_a_copy() -> None:
    packed = torch.randn(2, 5, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    found = []
    for ours in (True, False):
        with FrozenFunctions() if ours else nullcontext():
            q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
            out = F.scaled_dot_product_attention(q, k, v)
        parts = torch.autograd.grad(out, (q, k, v), weight, retain_graph=True)
        if ours:
            assert frozen_attention._joined(parts).data_ptr() == parts[0].data_ptr()
        found.append(torch.autograd.grad(out, packed, weight)[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)
    assert found[0].is_contiguous()


def test_gradients_that_do_not_lie_in_one_tensor_are_stacked() -> None:
    whole = torch.randn(4, 2, 3)
    for parts in (
        whole[:3].unbind(),  # joined
        whole[[0, 1, 2]].flip(0).unbind(),
        (whole[0], whole[2], whole[3]),
        (whole[2], whole[1], whole[0]),
        (whole[0], whole[0], whole[0]),
        (whole[0], torch.randn(4, 2, 3)[1], whole[2]),
        (whole[0], whole[1].reshape(3, 2).mT, whole[2]),
        (whole[1],),
    ):
        assert torch.equal(frozen_attention._joined(parts), torch.stack(list(parts)))
    x = torch.randn(2, 3, requires_grad=True)
    with FrozenFunctions():
        first, second = x.unbind(1)[:2]
    assert torch.equal(first, x[:, 0]) and torch.equal(second, x[:, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_weight_that_is_folded_for_one_product_is_the_folded_weight(dtype: torch.dtype) -> None:
    weight, bias = torch.randn(9, 6), torch.randn(9)
    low_rank = WeightDelta(left=torch.randn(2, 3), right=torch.randn(2, 6), shift=torch.randn(3))
    deltas: list[Any] = [((1, 4), low_rank), ((4, 6), WeightDelta(diagonal=torch.randn(2)))]
    expected, shifted = fold_rows(weight, bias, deltas)
    before = weight.clone()
    folded, found = folded_briefly(weight, bias, deltas, dtype)
    assert found is not None and shifted is not None
    assert torch.equal(folded, expected.to(dtype)) and torch.equal(found, shifted.to(dtype))
    again, none = folded_briefly(weight, None, deltas, dtype)
    assert none is None and again.data_ptr() == folded.data_ptr()
    assert torch.equal(weight, before)


def test_each_thread_uses_its_own_memory_again() -> None:
    wide = scratch((6, 5), torch.bfloat16)
    assert scratch((2, 3), torch.bfloat16).data_ptr() == wide.data_ptr()
    assert scratch((2, 3), torch.float64).data_ptr() != wide.data_ptr()
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(scratch, (2, 3), torch.bfloat16).result()
    assert other.data_ptr() != wide.data_ptr()
    weight = torch.randn(40, 50)
    assert rounded(weight, torch.float32) is weight
    assert torch.equal(rounded(weight, torch.bfloat16), weight.bfloat16())


@pytest.mark.parametrize("shift", [True, False])
def test_a_product_of_bfloat16_is_the_library_s(shift: bool) -> None:
    x, weight = torch.randn(3, 7, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    bias = torch.randn(48).bfloat16() if shift else None
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    ours, theirs = products.product(x, weight, bias), F.linear(x, weight, bias)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() <= 1.01 * (theirs - exact).abs().max()


def test_a_normalised_tensor_that_is_changed_in_place_is_kept_itself() -> None:
    source = torch.randn(4, 6, dtype=torch.float64)
    weight = torch.randn(5, 6, dtype=torch.float64)
    rank = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    delta = WeightDelta(left=rank, right=torch.ones(1, 6, dtype=torch.float64))
    found = []
    for changed in (True, False):
        with FrozenFunctions():
            x = F.layer_norm(source, (6,))
            x = x.mul_(3) if changed else x * 3
            out = apply_linear(x, weight, None, [((0, 5), delta)])
        found.append(torch.autograd.grad(out.square().sum(), rank)[0])
    assert torch.equal(*found)


def test_both_libraries_give_the_same_product(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(3, 7, 33), torch.randn(33, 20).mT, torch.randn(20)
    exact = F.linear(x.double(), weight.double(), bias.double())
    for prefers in (True, False):
        if prefers and not LIBRARIES.mkldnn.is_available():
            continue
        monkeypatch.setattr(products, "_prefers_onednn", lambda prefers=prefers: prefers)
        found = products.product(x, weight, bias)
        assert (found - exact).abs().max() < 2e-5
        assert (products.product(x.mT, torch.randn(4, 7))).shape == (3, 33, 4)


@pytest.mark.parametrize(("vendor", "prefers"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_onednn_multiplies_on_processors_of_amd(
    vendor: str, prefers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"vendor_id : {vendor}\n")
    monkeypatch.setattr(products, "CPUINFO", tmp_path / "cpuinfo")
    both = LIBRARIES.mkl.is_available() and LIBRARIES.mkldnn.is_available()
    assert products._prefers_onednn.__wrapped__() is (prefers and both)
    monkeypatch.setattr(products, "CPUINFO", tmp_path / "missing")
    assert products._prefers_onednn.__wrapped__() is False


def test_a_copy_keeps_the_setting_and_merging_is_not_affected() -> None:
    tuned = attach(model(VIT), "lora")
    tuned.checkpointing = True
    assert copy.deepcopy(tuned).checkpointing
    x = images(tuned)
    with torch.no_grad():
        assert torch.equal(tuned(x), tuned.backbone(x))
