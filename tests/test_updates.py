"""Every update's formula against the dense formula of its paper, and its three faces against it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aoft_deploy import approximately_orthogonal
from aoft_deploy.delta import Delta, OutputDelta, Rows, WeightDelta, apply_linear, fold_rows
from aoft_deploy.errors import SettingError
from aoft_deploy.tuned import exact_deltas, fold_exactly
from aoft_deploy.updates import Aoft, AoftLowRank, LowRank, Rescale, ScaleShift, Shift, Update

IN, OUT, RANK = 12, 10, 4
Dense = Callable[[dict[str, Tensor], Tensor, Tensor], tuple[Tensor, Tensor]]


def dense_lora(p: dict[str, Tensor], w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return w + 0.5 * p["b"] @ p["a"], b


def dense_aoft(p: dict[str, Tensor], w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    down = approximately_orthogonal(p["q_down"], RANK)
    up = approximately_orthogonal(p["q_up"], RANK)
    scale = p.get("rank_scale", torch.ones(RANK, dtype=w.dtype))
    return w + 0.5 * (down @ scale.diag() @ up.mT).mT, b


def dense_rlrr(p: dict[str, Tensor], w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    scale = sum(
        (o[:, None] * i[None, :] for o, i in zip(p["scale_out"], p["scale_in"], strict=True)),
        torch.zeros_like(w),
    )
    return w + w * scale, b + p["shift"]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def cases() -> list[tuple[Update, Dense]]:
    return [
        (LowRank(IN, OUT, RANK, 0.5, generator()), dense_lora),
        (AoftLowRank(IN, OUT, Aoft(RANK, 0.5), generator()), dense_aoft),
        (AoftLowRank(IN, OUT, Aoft(RANK, 0.5, True), generator()), dense_aoft),
        (Rescale(IN, OUT, 1, OUT, "published", generator()), dense_rlrr),
        (Rescale(IN, OUT, 3, OUT, "published", generator()), dense_rlrr),
    ]


IDS = ["lora", "aoft", "aoft-star", "rlrr", "rlrr-rank-3"]


def randomised(update: Update, seed: int = 1) -> Update:
    """The update with random parameters, in float64."""
    g = torch.Generator().manual_seed(seed)
    update = update.double()
    for parameter in update.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=g) * 0.5
    return update


def map_and_input() -> tuple[Tensor, Tensor, Tensor]:
    g = generator()
    shapes = (OUT, IN), (OUT,), (2, 3, IN)
    w, b, x = (torch.randn(s, dtype=torch.float64, generator=g) for s in shapes)
    return w, b, x


def exact(rows: Rows, update: Update) -> list[tuple[Rows, Delta]]:
    return [(rows, delta) for delta in exact_deltas([update]).values()]


def parameters(update: Update) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in update.named_parameters()}


@pytest.mark.parametrize("case", range(len(IDS)), ids=IDS)
def test_all_three_faces_equal_the_dense_formula(case: int) -> None:
    update, dense = cases()[case]
    randomised(update)
    w, b, x = map_and_input()
    folded_w, folded_b = dense(parameters(update), w, b)
    expected = x @ folded_w.mT + folded_b
    delta = update.delta()
    assert isinstance(delta, WeightDelta)
    got_w, got_b = fold_rows(w, b, [((0, OUT), delta)])
    assert got_b is not None
    assert torch.allclose(got_w, folded_w, atol=1e-12) and torch.allclose(got_b, folded_b)
    applied = apply_linear(x, w, b, [((0, OUT), delta)])
    mixed = delta.mix(x, x @ w.mT + b, w)
    exact_w, exact_b = fold_exactly(w, b, exact((0, OUT), update))
    assert exact_b is not None
    for answer in (applied, mixed, x @ exact_w.mT + exact_b):
        assert (answer - expected).abs().max() < 1e-12


@pytest.mark.parametrize("case", range(len(IDS)), ids=IDS)
def test_a_mixed_batch_gives_every_sample_its_own_tasks_answer(case: int) -> None:
    tasks = [randomised(cases()[case][0], seed) for seed in range(5)]
    w, b, _ = map_and_input()
    x = torch.randn(7, 3, IN, dtype=torch.float64)
    chosen = torch.tensor([4, 0, 0, 2, 1, 3, 4])
    bank = {n: torch.stack([parameters(t)[n] for t in tasks]) for n in parameters(tasks[0])}
    delta = tasks[0].formula(**{n: bank[n][chosen] for n in bank})
    mixed = delta.mix(x, x @ w.mT + b, w)
    for sample, task in enumerate(chosen.tolist()):
        own = apply_linear(x[sample], w, b, [((0, OUT), tasks[task].delta())])
        assert (mixed[sample] - own).abs().max() < 1e-12


@pytest.mark.parametrize("case", range(len(IDS)), ids=IDS)
def test_structured_gradients_equal_those_of_the_dense_formula(case: int) -> None:
    update, dense = cases()[case]
    randomised(update)
    w, b, x = map_and_input()
    x.requires_grad_()
    rows = (0, OUT)
    named = dict(update.named_parameters())

    def structured(inputs: Tensor, *values: Tensor) -> Tensor:
        delta = update.formula(**dict(zip(named, values, strict=True)))
        return apply_linear(inputs, w, b, [(rows, delta)])  # type: ignore[list-item]

    assert torch.autograd.gradcheck(structured, (x, *named.values()))
    seed = torch.randn(2, 3, OUT, dtype=torch.float64)
    torch.autograd.backward(structured(x, *named.values()), seed)
    copies = {n: p.detach().clone().requires_grad_() for n, p in named.items()}
    dense_w, dense_b = dense(copies, w, b)
    torch.autograd.backward((x.detach() @ dense_w.mT + dense_b), seed)
    for name, parameter in named.items():
        ours, theirs = parameter.grad, copies[name].grad
        assert ours is not None and theirs is not None
        assert torch.allclose(ours, theirs, atol=1e-10), name


def test_rows_beside_an_updates_own_are_left_alone_and_their_gradients_too() -> None:
    w, b, x = (torch.randn(s, dtype=torch.float64) for s in ((3 * OUT, IN), (3 * OUT,), (5, IN)))
    first, last = (
        randomised(AoftLowRank(IN, OUT, Aoft(RANK, 1.0, True), generator()), s) for s in (1, 2)
    )
    deltas = [((0, OUT), first.delta()), ((2 * OUT, 3 * OUT), last.delta())]
    folded, bias = fold_rows(w, b, deltas)
    assert bias is not None and torch.equal(bias, b)
    assert torch.equal(folded[OUT : 2 * OUT], w[OUT : 2 * OUT])
    torch.autograd.backward(apply_linear(x, w, b, deltas)[:, OUT:].sum())  # type: ignore[arg-type]
    assert all(p.grad is not None and not p.grad.any() for p in first.parameters())
    assert any(p.grad is not None and p.grad.any() for p in last.parameters())


@pytest.mark.parametrize(
    "update",
    [
        LowRank(IN, OUT, RANK, 1.0, generator()),
        AoftLowRank(IN, OUT, Aoft(RANK, 1.0, True), generator()),
        Rescale(IN, OUT, 2, OUT, "identity", generator()),
    ],
    ids=["lora", "aoft-star", "rlrr"],
)
def test_an_update_that_starts_at_zero_changes_no_bit(update: Update) -> None:
    w, b = torch.randn(OUT, IN), torch.randn(OUT)
    w[0, 0], w[3, 3], b[1] = -0.0, 0.0, -0.0
    folded, bias = fold_exactly(w, b, exact((0, OUT), update))
    assert bias is not None
    assert torch.equal(folded.view(torch.int32), w.view(torch.int32))
    assert torch.equal(bias.view(torch.int32), b.view(torch.int32))


def test_plain_aoft_cannot_start_at_zero_and_its_size_is_about_the_root_of_its_rank() -> None:
    update = AoftLowRank(768, 768, Aoft(16), generator())
    change, _ = fold_rows(torch.zeros(768, 768), None, [((0, 768), update.delta())])
    assert change.norm().item() == pytest.approx(4.0, rel=0.1)


def test_trained_numbers_of_aoft_do_not_grow_with_its_rank() -> None:
    counts = {
        rank: sum(
            p.numel() for p in AoftLowRank(64, 48, Aoft(rank), generator()).parameters()
        )
        for rank in (1, 8, 48)
    }
    assert set(counts.values()) == {64 + 48}


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 3, 2, 2)], ids=["norm", "linear", "conv"])
def test_ssf_folds_into_whatever_made_the_output(shape: tuple[int, ...]) -> None:
    update = randomised(ScaleShift(6, True, 0.02, generator()))
    w, b = torch.randn(shape, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    got, bias = fold_exactly(w, b, exact((0, 6), update))
    scale, shift = parameters(update)["scale"], parameters(update)["shift"]
    assert torch.allclose(got, w * scale.view(-1, *[1] * (len(shape) - 1)), atol=1e-14)
    assert bias is not None and torch.allclose(bias, b * scale + shift, atol=1e-14)
    y = torch.randn(2, 3, 6, dtype=torch.float64)
    delta = update.delta()
    assert torch.allclose(delta.mix(y, y, w), y * scale + shift, atol=1e-14)


def test_without_a_bias_nothing_is_shifted() -> None:
    names = {n for n, _ in Rescale(IN, OUT, 1, 0, "published", generator()).named_parameters()}
    assert names == {"scale_in", "scale_out"}
    assert [n for n, _ in ScaleShift(6, False, 0.0, generator()).named_parameters()] == [
        "scale"
    ]


def test_a_shift_moves_a_vector_and_nothing_else() -> None:
    update = Shift(5)
    update.shift.data = torch.arange(5.0)
    delta = update.delta()
    assert isinstance(delta, OutputDelta)
    assert torch.equal(
        delta.mix(torch.zeros(1), torch.ones(2, 3, 5), torch.zeros(1))[0, 0], 1 + torch.arange(5.0)
    )


@pytest.mark.parametrize("rank", [0, 11, -3])
def test_a_rank_that_no_matrix_can_have_is_refused(rank: int) -> None:
    for make in (
        lambda: LowRank(IN, OUT, rank, 1.0, generator()),
        lambda: AoftLowRank(IN, OUT, Aoft(rank), generator()),
        lambda: Rescale(IN, OUT, rank, OUT, "published", generator()),
    ):
        with pytest.raises(
            SettingError, match=f"rank is {rank}, but a 10 × 12 weight allows 1 to 10"
        ):
            make()


def test_autocast_computes_the_same_answer_as_a_plain_map_of_the_folded_weight() -> None:
    update = randomised(AoftLowRank(IN, OUT, Aoft(RANK), generator())).float()
    w, b, x = torch.randn(OUT, IN), torch.randn(OUT), torch.randn(4, IN)
    delta = update.delta()
    with torch.autocast("cpu", torch.bfloat16):
        got = apply_linear(x, w, b, [((0, OUT), delta)])  # type: ignore[list-item]
    folded, _ = fold_rows(w, b, [((0, OUT), delta)])
    expected = torch.nn.functional.linear(x.bfloat16(), folded.bfloat16(), b.bfloat16())
    assert got.dtype == torch.bfloat16 and torch.equal(got, expected)
    torch.autograd.backward(got.float().sum())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in update.parameters())
