"""Deltas of linear maps, convolutions, biases, norms and tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from aoft_deploy.errors import CheckpointError
from aoft_deploy.tuning import exact_folding
from aoft_deploy.tuning.exact_folding import fold_exactly
from aoft_deploy.tuning.updated_layers import UpdatedModule
from aoft_deploy.tuning.updates.aoft import Aoft, AoftLowRank
from aoft_deploy.tuning.updates.applying import apply_linear
from aoft_deploy.tuning.updates.delta import (
    Delta,
    OutputDelta,
    PromptDelta,
    Rows,
    WeightDelta,
    matrix_shape,
)
from aoft_deploy.tuning.updates.folding import fold_rows
from aoft_deploy.tuning.updates.low_rank import LowRank, LowRankAdapter
from aoft_deploy.tuning.updates.rescale import Rescale
from aoft_deploy.tuning.updates.scale_shift import ScaleShift
from aoft_deploy.tuning.updates.update import Update


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def published_view(convolution: Tensor, scale_in: Tensor, scale_out: Tensor) -> Tensor:
    """W + W ⊙ line ⊙ col as in the released models/RLRR_ResNet.py, also for non-square kernels."""
    rows = convolution.shape[0] * convolution.shape[2]
    columns = convolution.shape[1] * convolution.shape[3]
    matrix = convolution.reshape(rows, columns)
    change = matrix * scale_in.reshape(1, columns) * scale_out.reshape(rows, 1)
    return (matrix + change).reshape(convolution.shape)


CONVOLUTIONS: dict[str, Callable[[], nn.Conv2d]] = {
    "square": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    "pointwise": lambda: nn.Conv2d(4, 6, 1),
    "tall": lambda: nn.Conv2d(4, 6, (5, 2)),
    "wide": lambda: nn.Conv2d(4, 6, (1, 4)),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 6, (7, 3), padding=(3, 1), groups=6),
    "dilated": lambda: nn.Conv2d(4, 6, 2, dilation=2),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_rescaling_a_convolution_equals_the_published_code(kind: str) -> None:
    torch.manual_seed(0)
    layer = CONVOLUTIONS[kind]().double().requires_grad_(False)
    rows, columns = matrix_shape(layer.weight)
    assert (rows, columns) == (
        layer.out_channels * layer.kernel_size[0],
        layer.in_channels // layer.groups * layer.kernel_size[1],
    )
    update = Rescale(columns, rows, 1, 0, "published", torch.Generator().manual_seed(1)).double()
    scale_in, scale_out = update.get_parameter("scale_in"), update.get_parameter("scale_out")
    weight = published_view(layer.weight, scale_in.detach(), scale_out.detach())
    x = random(2, layer.in_channels, 9, 8)
    expected = nn.functional.conv2d(
        x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    module = UpdatedModule(layer, [((0, layer.out_channels), update)])
    assert (module(x) - expected).abs().max() < 1e-12
    plain, shift = module.merged(exact_folding.exact_deltas([update]), in_place=False)
    assert shift is None and type(plain) is nn.Conv2d
    assert (plain(x) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_gradients_through_a_convolution_are_those_of_its_matrix(kind: str) -> None:
    torch.manual_seed(0)
    layer = CONVOLUTIONS[kind]().double().requires_grad_(False)
    rows, columns = matrix_shape(layer.weight)
    update = Rescale(columns, rows, 1, 0, "published", torch.Generator().manual_seed(1)).double()
    module = UpdatedModule(layer, [((0, layer.out_channels), update)])
    x = random(1, layer.in_channels, 9, 8)
    torch.autograd.backward(module(x).square().sum())
    copies = {n: p.detach().clone().requires_grad_() for n, p in update.named_parameters()}
    weight = published_view(layer.weight, copies["scale_in"], copies["scale_out"])
    reference = nn.functional.conv2d(
        x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    torch.autograd.backward(reference.square().sum())
    for name, parameter in update.named_parameters():
        ours, theirs = parameter.grad, copies[name].grad
        assert ours is not None and theirs is not None
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10), name


def test_a_low_rank_change_of_a_convolution_is_one_of_its_matrix() -> None:
    layer = nn.Conv2d(4, 6, (3, 2)).double().requires_grad_(False)
    update = LowRank(4 * 2, 6 * 3, 5, 0.5, torch.Generator().manual_seed(0)).double()
    update.get_parameter("b").data = random(6 * 3, 5)
    a, b = update.get_parameter("a").detach(), update.get_parameter("b").detach()
    expected = layer.weight + (0.5 * b @ a).reshape(layer.weight.shape)
    module = UpdatedModule(layer, [((0, 6), update)])
    assert torch.allclose(module.weight, expected, atol=1e-14)
    assert torch.equal(module.bias, layer.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "shape", [(6,), (6, 4), (6, 4, 3, 2), (6, 1, 7, 7)], ids=["norm", "linear", "conv", "depthwise"]
)
@pytest.mark.parametrize("fields", ["scale", "shift", "mixing", "all"])
def test_an_output_delta_folds_into_the_layer_that_computes_the_output(
    shape: tuple[int, ...], fields: str
) -> None:
    everything = {
        "scale": random(6, seed=1),
        "left": random(2, 6, seed=2),
        "right": random(2, 6, seed=3),
        "shift": random(6, seed=4),
    }
    chosen = {"mixing": ("left", "right"), "all": tuple(everything)}.get(fields, (fields,))
    delta = OutputDelta(**{name: everything[name] for name in chosen})
    matrix = torch.eye(6, dtype=torch.float64)
    if "scale" in chosen:
        matrix = matrix + everything["scale"].diag()
    if "left" in chosen:
        matrix = matrix + everything["left"].mT @ everything["right"]
    shift = everything["shift"] if "shift" in chosen else torch.zeros(6, dtype=torch.float64)
    weight, bias = random(*shape, seed=5), random(6, seed=6)
    folded, folded_bias = fold_rows(weight, bias, [((0, 6), delta)])
    assert torch.allclose(folded, torch.tensordot(matrix, weight, dims=1), atol=1e-13)
    assert folded_bias is not None
    assert torch.allclose(folded_bias, matrix @ bias + shift, atol=1e-13)
    unbiased, none = fold_rows(weight, None, [((0, 6), delta)])
    assert none is None and torch.equal(unbiased, folded)
    y = random(2, 5, 6, seed=7)
    assert torch.allclose(delta.mix(y, y, weight), y @ matrix.mT + shift, atol=1e-13)
    assert delta.mixes_rows == ("left" in chosen)


def test_an_adapter_after_a_convolution_acts_on_its_channels() -> None:
    layer = nn.Conv2d(3, 6, 3, padding=1).double().requires_grad_(False)
    update = LowRankAdapter(6, 2, 1.0, torch.Generator().manual_seed(0)).double()
    update.get_parameter("b").data = random(6, 2)
    a, b = update.get_parameter("a").detach(), update.get_parameter("b").detach()
    x = random(2, 3, 5, 4)
    y = layer(x).movedim(1, -1)
    expected = (y + y @ a.mT @ b.mT).movedim(-1, 1)
    assert torch.allclose(UpdatedModule(layer, [((0, 6), update)])(x), expected, atol=1e-12)


def test_layers_in_another_memory_format_can_have_updates() -> None:
    layer = nn.Conv2d(4, 6, 3).double().requires_grad_(False)
    update = Rescale(12, 18, 1, 6, "published", torch.Generator().manual_seed(0)).double()
    x = random(2, 4, 5, 5)
    expected = UpdatedModule(layer, [((0, 6), update)])(x)
    layer = layer.to(memory_format=torch.channels_last)
    module = UpdatedModule(layer, [((0, 6), update)])
    assert torch.allclose(module(x), expected, atol=1e-13)
    for in_place in (False, True):
        plain, _ = module.merged(exact_folding.exact_deltas([update]), in_place)
        assert torch.allclose(plain(x), expected, atol=1e-13)


def test_a_delta_without_a_shift_does_not_change_the_bias_or_share_its_memory() -> None:
    weight, bias = random(6, 4), random(6)
    delta = WeightDelta(left=random(2, 6, seed=1), right=random(2, 4, seed=2))
    before = weight.clone()
    folded, new_bias = fold_rows(weight, bias, [((0, 6), delta)])
    assert new_bias is not None and torch.equal(new_bias, bias)
    assert new_bias.data_ptr() != bias.data_ptr()
    assert torch.equal(weight, before) and not torch.equal(folded, before)


def test_deltas_of_every_kind_in_one_map_change_only_their_own_rows() -> None:
    weight, bias, x = random(14, 5), random(14), random(3, 5)
    deltas: list[tuple[Rows, WeightDelta]] = [
        ((1, 5), WeightDelta(diagonal=random(3, seed=1), shift=random(4, seed=2))),
        (
            (6, 9),
            WeightDelta(gain_out=random(2, 3, seed=3), gain_in=random(2, 5, seed=4)),
        ),
        ((10, 14), WeightDelta(left=random(1, 4, seed=5), right=random(1, 5, seed=6))),
    ]
    expected, shifted = weight.clone(), bias.clone()
    for i, value in enumerate(random(3, seed=1)):
        expected[1 + i, i] += value
    shifted[1:5] += random(4, seed=2)
    gain = random(2, 3, seed=3).mT @ random(2, 5, seed=4)
    expected[6:9] += expected[6:9] * gain
    expected[10:14] += random(1, 4, seed=5).mT @ random(1, 5, seed=6)
    folded, new_bias = fold_rows(weight, bias, deltas)
    exact, exact_bias = fold_exactly(weight, bias, deltas)
    for got, got_bias in ((folded, new_bias), (exact, exact_bias)):
        assert torch.allclose(got, expected, atol=1e-14)
        assert got_bias is not None and torch.allclose(got_bias, shifted, atol=1e-14)
        for untouched in (0, 5, 9):
            assert torch.equal(got[untouched], weight[untouched])
    applied = apply_linear(x, weight, bias, deltas)
    assert torch.allclose(applied, x @ expected.mT + shifted, atol=1e-13)


@pytest.mark.parametrize("at_once", [1, 7, 40, 10**6])
@pytest.mark.parametrize("kind", ["aoft", "lora", "rlrr", "ssf", "adapter"])
def test_folding_in_blocks_of_rows_gives_the_same_weight(
    kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    kinds: dict[str, Update] = {
        "aoft": AoftLowRank(5, 8, Aoft(4), generator),
        "lora": LowRank(5, 8, 2, 1.0, generator),
        "rlrr": Rescale(5, 8, 2, 8, "published", generator),
        "ssf": ScaleShift(8, True, 0.02, generator),
        "adapter": LowRankAdapter(8, 2, 1.0, generator),
    }
    update = kinds[kind]
    for i, parameter in enumerate(update.parameters()):
        parameter.data = random(*parameter.shape, seed=i)
    weight, bias = random(12, 5), random(12)
    delta = exact_folding.exact_deltas([update])[update]
    expected, expected_bias = fold_rows(weight, bias, [((3, 11), delta)])
    assert expected_bias is not None
    monkeypatch.setattr(exact_folding, "BLOCK_SIZE", at_once)
    for in_place in (False, True):
        folded, new_bias = fold_exactly(weight, bias, [((3, 11), delta)], in_place)
        assert torch.allclose(folded, expected, atol=1e-14)
        assert new_bias is not None and torch.allclose(new_bias, expected_bias, atol=1e-14)
        assert (folded is weight) == in_place


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_computed_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    weight, bias = random(6, 4).to(dtype), random(6, seed=1).to(dtype)
    left, right = random(2, 6, seed=2), random(2, 4, seed=3)
    delta = WeightDelta(left=left, right=right, shift=random(6, seed=4))
    folded, new_bias = fold_exactly(weight, bias, [((0, 6), delta)])
    assert folded.dtype == dtype
    assert torch.equal(folded, (weight.double() + left.mT @ right).to(dtype))
    assert new_bias is not None
    assert torch.equal(new_bias, (bias.double() + random(6, seed=4)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_delta_of_zeros_changes_no_bit_of_any_weight_including_negative_zeros(
    dtype: torch.dtype, in_place: bool
) -> None:
    weight, bias = random(6, 4).to(dtype), random(6, seed=1).to(dtype)
    weight[0, 0], weight[2, 1], bias[3] = -0.0, 0.0, -0.0
    deltas: list[Delta] = [
        WeightDelta(left=torch.zeros(2, 6).double(), right=random(2, 4, seed=3)),
        WeightDelta(diagonal=torch.zeros(4).double(), shift=torch.zeros(6).double()),
        WeightDelta(gain_out=torch.zeros(1, 6).double(), gain_in=random(1, 4, seed=3)),
        OutputDelta(scale=torch.zeros(6).double(), shift=torch.zeros(6).double()),
        OutputDelta(left=torch.zeros(2, 6).double(), right=random(2, 6, seed=3)),
    ]
    for delta in deltas:
        old, old_bias = weight.clone(), bias.clone()
        new, new_bias = fold_exactly(old, old_bias, [((0, 6), delta)], in_place)
        assert new_bias is not None
        for got, expected in ((new, weight), (new_bias, bias)):
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("where", ["weight", "bias"])
def test_folded_values_that_are_not_finite_are_refused(where: str) -> None:
    weight, bias = torch.ones(6, 4), torch.ones(6)
    large = torch.full((6,), 1e39, dtype=torch.float64)
    delta: OutputDelta = OutputDelta(scale=large) if where == "weight" else OutputDelta(shift=large)
    with pytest.raises(CheckpointError, match=r"not finite in torch\.float32: the trained"):
        fold_exactly(weight, bias, [((0, 6), delta)])


def test_prompts_follow_the_prefix_and_can_differ_per_sample() -> None:
    x, tokens = random(2, 5, 3), random(2, 4, 3, seed=1)
    mixed = PromptDelta(tokens).before(x, 2)
    assert mixed.shape == (2, 9, 3)
    for i in range(2):
        alone = PromptDelta(tokens)[i].before(x[i : i + 1], 2)[0]
        assert torch.equal(alone, mixed[i])
        assert torch.equal(alone, torch.cat([x[i, :2], tokens[i], x[i, 2:]]))
    assert torch.equal(PromptDelta(tokens[0]).before(x, 0)[1, :4], tokens[0])


def test_prompts_get_the_dtype_of_the_other_tokens() -> None:
    x = torch.zeros(1, 2, 3, dtype=torch.bfloat16)
    assert PromptDelta(torch.ones(1, 3)).before(x, 1).dtype == torch.bfloat16


def test_a_delta_can_be_indexed_by_task_and_lists_its_fields() -> None:
    delta = WeightDelta(left=random(3, 2, 6), right=random(3, 2, 4), shift=random(3, 6))
    assert delta.names() == ("left", "right", "shift")
    one = delta[1]
    assert one.diagonal is None and one.gain_in is None
    assert torch.equal(one.left, random(3, 2, 6)[1])  # type: ignore[arg-type]
    assert torch.equal(one.shift, random(3, 6)[1])  # type: ignore[arg-type]


def test_gradients_under_bf16_autocast_are_summed_in_float32() -> None:
    """Compare with float64 sums of the same bf16 factors; bf16 sums would be wrong by 1e-1."""
    tokens, width, out, d = 4096, 8, 12, 5
    weight = random(out, width, seed=1).float()
    fields = {"diagonal": random(d, seed=2).float(), "shift": random(out, seed=3).float()}
    fields = {name: value.requires_grad_() for name, value in fields.items()}
    x = (1 + random(tokens, width, seed=4).abs()).float()
    grad = (1 + random(tokens, out, seed=5).abs()).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = apply_linear(x, weight, torch.zeros(out), [((0, out), WeightDelta(**fields))])
    assert y.dtype == torch.bfloat16
    torch.autograd.backward(y, grad)
    seen, exact = x.bfloat16().double(), grad.double()
    expected = {"shift": exact.sum(0), "diagonal": (exact[:, :d] * seen[:, :d]).sum(0)}
    for name, value in expected.items():
        found = fields[name].grad
        assert found is not None and found.dtype == torch.float32
        assert ((found.double() - value).abs() <= 1e-5 * value.abs()).all(), name


def test_new_weights_are_written_without_page_faults() -> None:
    """Threads that write one new huge page together would clear it several times."""
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "RUSAGE_THREAD"):
        pytest.skip("the system does not count the page faults of a thread")
    new = exact_folding._empty_like(torch.empty(2**24)).numpy()  # 32 huge pages
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    new.fill(1)
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 8
