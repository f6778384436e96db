"""Every update: apply, fold and mix, compared with the dense formula of its paper."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from aoft_deploy.errors import SettingError
from aoft_deploy.tuning import updates
from aoft_deploy.tuning.exact_folding import exact_deltas, fold_exactly
from aoft_deploy.tuning.updated_layers import UpdatedModule
from aoft_deploy.tuning.updates.aoft import Aoft, AoftAdapter, AoftLowRank, AoftPrompts
from aoft_deploy.tuning.updates.applying import apply_linear
from aoft_deploy.tuning.updates.delta import PromptDelta, WeightDelta
from aoft_deploy.tuning.updates.folding import fold_rows
from aoft_deploy.tuning.updates.low_rank import LowRank, LowRankAdapter
from aoft_deploy.tuning.updates.prompts import Prompts
from aoft_deploy.tuning.updates.rescale import Init, Rescale
from aoft_deploy.tuning.updates.scale_shift import ScaleShift, Shift
from aoft_deploy.tuning.updates.update import Update

IN, OUT, RANK, SCALE = 12, 10, 4, 0.5
ROWS = (0, OUT)
Parameters = dict[str, Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed))


def ao(q: Tensor, strict: bool) -> Tensor:
    """AO(q) by the rows of Q(q) in the paper; shares no code with the package."""
    if strict:
        q = q / q.square().sum().sqrt()
    first = torch.cat([q[:1], -q[1:]])
    below = torch.eye(len(q), dtype=q.dtype) - q[:, None] * q[None, :] / (1 + q[0])
    below = torch.cat([q[:, None], below[:, 1:]], dim=1)
    return torch.cat([first[None], below[1:]])[:, :RANK]


def aoft_product(p: Parameters, strict: bool, shared: bool = False) -> Tensor:
    """scale · AO(q_down) diag(λ) AO(q_up)ᵀ, the matrix to the right of x."""
    down = ao(p["q_down"], strict)
    up = down if shared else ao(p["q_up"], strict)
    lam = p.get("rank_scale", torch.ones(RANK, dtype=down.dtype))
    return SCALE * down @ lam.diag() @ up.mT


def gain(p: Parameters) -> Tensor:
    """Σ_k scale_out_k scale_in_kᵀ, with ones for a missing side."""
    rank = len(next(iter(p.values())))
    outs = p.get("scale_out", torch.ones(rank, OUT, dtype=torch.float64))
    ins = p.get("scale_in", torch.ones(rank, IN, dtype=torch.float64))
    total = torch.zeros(OUT, IN, dtype=torch.float64)
    for o, i in zip(outs, ins, strict=True):
        total = total + torch.outer(o, i)
    return total


def after(matrix: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The map, followed by a matrix."""
    return matrix @ w, matrix @ b


@dataclass(frozen=True)
class Case:
    """An update of an OUT × IN map, and the weight and bias by its paper."""

    make: Callable[..., Update]
    dense: Callable[[Parameters, Tensor, Tensor], tuple[Tensor, Tensor]]
    arguments: dict[str, Any] = field(default_factory=dict)

    def update(self, seed: int = 1) -> Update:
        """The update with random parameters, in float64."""
        update = self.make(generator=generator(), **self.arguments).double()
        for i, parameter in enumerate(update.parameters()):
            parameter.data = 0.5 * random(*parameter.shape, seed=100 * seed + i)
        return update


def rescale(**changes: Any) -> dict[str, Any]:
    form = {"rank": 1, "shifts": OUT, "init": "published", **changes}
    return {"in_features": IN, "out_features": OUT, **form}


def rescaled(p: Parameters, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return w + w * gain(p), b + p["shift"]


def rescaled_alone(p: Parameters, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return w * gain(p), b + p["shift"]


def aoft_cases() -> dict[str, Case]:
    """AOFT as LoRA and as adapter, with all options."""
    cases = {}
    eye = torch.eye(OUT, dtype=torch.float64)
    for star in (False, True):
        for strict in (False, True):
            name = f"{'-star' if star else ''}{'-strict' if strict else ''}"
            options = Aoft(RANK, SCALE, star, strict)
            cases[f"aoft-lora{name}"] = Case(
                AoftLowRank,
                lambda p, w, b, strict=strict: (w + aoft_product(p, strict).mT, b),  # type: ignore[misc]
                {"in_features": IN, "out_features": OUT, "options": options},
            )
            for shared in (False, True):
                for residual in (False, True):
                    form = f"{'-shared' if shared else ''}{'' if residual else '-alone'}"
                    options = Aoft(RANK, SCALE, star, strict, shared)
                    cases[f"aoft-adapter{name}{form}"] = Case(
                        AoftAdapter,
                        lambda p, w, b, strict=strict, shared=shared, residual=residual: after(  # type: ignore[misc]
                            residual * eye + aoft_product(p, strict, shared).mT, w, b
                        ),
                        {"features": OUT, "options": options, "residual": residual},
                    )
    return cases


LORA = {"rank": RANK, "scale": SCALE}

CASES: dict[str, Case] = {
    "lora": Case(
        LowRank,
        lambda p, w, b: (w + SCALE * p["b"] @ p["a"], b),
        {"in_features": IN, "out_features": OUT, **LORA},
    ),
    "adapter": Case(
        LowRankAdapter,
        lambda p, w, b: after(torch.eye(OUT, dtype=torch.float64) + SCALE * p["b"] @ p["a"], w, b),
        {"features": OUT, **LORA},
    ),
    **aoft_cases(),
    "rlrr": Case(Rescale, rescaled, rescale()),
    "rlrr-rank-3": Case(Rescale, rescaled, rescale(rank=3)),
    "rlrr-out": Case(Rescale, rescaled, rescale(sides="out")),
    "rlrr-in": Case(Rescale, rescaled, rescale(sides="in")),
    "rlrr-alone": Case(Rescale, rescaled_alone, rescale(residual=False)),
    "rlrr-alone-rank-3": Case(Rescale, rescaled_alone, rescale(residual=False, rank=3)),
    "rlrr-alone-out": Case(Rescale, rescaled_alone, rescale(residual=False, sides="out")),
    "rlrr-alone-in": Case(Rescale, rescaled_alone, rescale(residual=False, sides="in")),
    "ssf": Case(
        ScaleShift,
        lambda p, w, b: (w * p["scale"][:, None], b * p["scale"] + p["shift"]),
        {"features": OUT, "bias": True, "std": 0.02},
    ),
    "bitfit": Case(
        lambda features, generator: Shift(features),
        lambda p, w, b: (w, b + p["shift"]),
        {"features": OUT},
    ),
}

PROMPTS: dict[str, Case] = {
    "vpt": Case(
        Prompts,
        lambda p, w, b: (p["tokens"], b),
        {"width": IN, "rank": RANK, "patch": 16},
    ),
    **{
        f"aoft-vpt{'-star' if star else ''}{'-strict' if strict else ''}": Case(
            AoftPrompts,
            lambda p, w, b, strict=strict: (  # type: ignore[misc]
                SCALE
                * p.get("rank_scale", torch.ones(RANK, dtype=torch.float64))[:, None]
                * ao(p["q"], strict).mT,
                b,
            ),
            {"width": IN, "options": Aoft(RANK, SCALE, star, strict)},
        )
        for star in (False, True)
        for strict in (False, True)
    },
}


def map_and_input() -> tuple[Tensor, Tensor, Tensor]:
    return random(OUT, IN, seed=1), random(OUT, seed=2), random(2, 3, IN, seed=3)


def layer_with(update: Update, w: Tensor, b: Tensor) -> UpdatedModule:
    """A frozen linear layer with the update."""
    layer = nn.Linear(IN, OUT).double().requires_grad_(False)
    layer.weight.data, layer.bias.data = w.clone(), b.clone()
    return UpdatedModule(layer, [(ROWS, update)])


def parameters(update: Update) -> Parameters:
    return {name: p.detach() for name, p in update.named_parameters()}


def kinds_of(base: type[Update]) -> set[type[Update]]:
    """The subclasses of an update in the package, at any depth."""
    kinds = {kind for child in base.__subclasses__() for kind in {child} | kinds_of(child)}
    return {kind for kind in kinds if kind.__module__.startswith(updates.__name__)}


def test_the_cases_contain_every_kind_of_update() -> None:
    for module in pkgutil.iter_modules(updates.__path__):
        importlib.import_module(f"{updates.__name__}.{module.name}")
    tested = {type(case.update()) for case in (CASES | PROMPTS).values()}
    assert tested == kinds_of(Update)  # type: ignore[type-abstract]


@pytest.mark.parametrize("name", CASES)
def test_apply_fold_and_mix_equal_the_dense_formula(name: str) -> None:
    case = CASES[name]
    update = case.update()
    w, b, x = map_and_input()
    dense_w, dense_b = case.dense(parameters(update), w, b)
    expected = x @ dense_w.mT + dense_b
    assert (expected - x @ w.mT - b).abs().max() > 0.1
    delta = update.delta()
    assert not isinstance(delta, PromptDelta)
    module = layer_with(update, w, b)
    folded_w, folded_b = fold_rows(w, b, [(ROWS, delta)])
    exact_w, exact_b = fold_exactly(w, b, [(ROWS, exact_deltas([update])[update])])
    for got_w, got_b in ((folded_w, folded_b), (exact_w, exact_b), (module.weight, module.bias)):
        assert got_b is not None
        assert (got_w - dense_w).abs().max() < 1e-12 and (got_b - dense_b).abs().max() < 1e-12
    answers = [module(x), delta.mix(x, x @ w.mT + b, w)]
    if isinstance(delta, WeightDelta):
        answers.append(apply_linear(x, w, b, [(ROWS, delta)]))
    for answer in answers:
        assert (answer - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_mix_gives_every_sample_the_output_of_its_task(name: str) -> None:
    case = CASES[name]
    tasks = [case.update(seed) for seed in range(5)]
    w, b, _ = map_and_input()
    x = random(7, 3, IN, seed=4)
    chosen = torch.tensor([4, 0, 0, 2, 1, 3, 4])
    bank = {n: torch.stack([parameters(t)[n] for t in tasks]) for n in parameters(tasks[0])}
    delta = tasks[0].formula(**{n: bank[n][chosen] for n in bank})
    whole = tasks[0].formula(**bank)
    assert not isinstance(delta, PromptDelta) and not isinstance(whole, PromptDelta)
    mixed = delta.mix(x, x @ w.mT + b, w)
    for picked in (whole[chosen], delta):
        assert torch.equal(picked.mix(x, x @ w.mT + b, w), mixed)
    for sample, task in enumerate(chosen.tolist()):
        dense_w, dense_b = case.dense(parameters(tasks[task]), w, b)
        assert (mixed[sample] - x[sample] @ dense_w.mT - dense_b).abs().max() < 1e-12
        assert torch.allclose(fold_rows(w, b, [(ROWS, whole[task])])[0], dense_w, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_the_dense_formula(name: str) -> None:
    case = CASES[name]
    update = case.update()
    w, b, x = map_and_input()
    x.requires_grad_()
    module = layer_with(update, w, b)
    named = dict(update.named_parameters())

    def applied(inputs: Tensor, *values: Tensor) -> Tensor:
        given = {f"updates.0.{n}": v for n, v in zip(named, values, strict=True)}
        result: Tensor = functional_call(module, given, (inputs,))
        return result

    assert torch.autograd.gradcheck(applied, (x, *named.values()), fast_mode=True)
    seed = random(2, 3, OUT, seed=5)
    torch.autograd.backward(module(x), seed)
    copies = {n: p.detach().clone().requires_grad_() for n, p in named.items()}
    other = x.detach().clone().requires_grad_()
    dense_w, dense_b = case.dense(copies, w, b)
    torch.autograd.backward(other @ dense_w.mT + dense_b, seed)
    for parameter, theirs in ((x, other), *((named[n], copies[n]) for n in named)):
        assert parameter.grad is not None and theirs.grad is not None
        assert (parameter.grad - theirs.grad).abs().max() < 1e-10


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_and_their_gradients_equal_the_dense_formula(name: str) -> None:
    case = PROMPTS[name]
    tasks = [case.update(seed) for seed in range(3)]
    _, b, x = map_and_input()
    nothing = torch.zeros(())
    bank = {n: torch.stack([parameters(t)[n] for t in tasks]) for n in parameters(tasks[0])}
    stacked = tasks[0].formula(**bank)
    assert isinstance(stacked, PromptDelta)
    for i, task in enumerate(tasks):
        tokens, _ = case.dense(parameters(task), nothing, b)
        delta, exact = task.delta(), exact_deltas([task])[task]
        assert isinstance(delta, PromptDelta) and isinstance(exact, PromptDelta)
        for got in (delta.tokens, exact.tokens, stacked.tokens[i], stacked[i].tokens):
            assert got.shape == (RANK, IN) and (got - tokens).abs().max() < 1e-13
        expected = torch.cat([x[:, :1], tokens.expand(2, RANK, IN), x[:, 1:]], dim=1)
        assert (delta.before(x, 1) - expected).abs().max() < 1e-13
    update = tasks[0]
    names = [n for n, _ in update.named_parameters()]

    def applied(inputs: Tensor, *values: Tensor) -> Tensor:
        delta = update.formula(**dict(zip(names, values, strict=True)))
        assert isinstance(delta, PromptDelta)
        return delta.before(inputs, 1)

    assert torch.autograd.gradcheck(
        applied, (x.requires_grad_(), *update.parameters()), fast_mode=True
    )
    seed = random(RANK, IN, seed=6)
    delta = update.delta()
    assert isinstance(delta, PromptDelta)
    torch.autograd.backward(delta.tokens, seed)
    copies = {n: p.detach().clone().requires_grad_() for n, p in update.named_parameters()}
    torch.autograd.backward(case.dense(copies, nothing, b)[0], seed)
    for n, parameter in update.named_parameters():
        ours, theirs = parameter.grad, copies[n].grad
        assert ours is not None and theirs is not None
        assert (ours - theirs).abs().max() < 1e-10, n


def test_an_update_changes_only_its_own_rows_and_their_gradients() -> None:
    w, b, x = random(3 * OUT, IN), random(3 * OUT, seed=1), random(5, IN, seed=2)
    first, last = (CASES["aoft-lora-star"].update(seed) for seed in (1, 2))
    deltas = [((0, OUT), first.delta()), ((2 * OUT, 3 * OUT), last.delta())]
    folded, bias = fold_rows(w, b, deltas)  # type: ignore[arg-type]
    assert bias is not None and torch.equal(bias, b)
    assert torch.equal(folded[OUT : 2 * OUT], w[OUT : 2 * OUT])
    torch.autograd.backward(apply_linear(x, w, b, deltas)[:, OUT:].sum())  # type: ignore[arg-type]
    assert all(p.grad is not None and not p.grad.any() for p in first.parameters())
    assert any(p.grad is not None and p.grad.any() for p in last.parameters())


AT_ZERO: dict[str, Callable[[], Update]] = {
    "lora": lambda: LowRank(IN, OUT, RANK, 1.0, generator()),
    "adapter": lambda: LowRankAdapter(OUT, RANK, 1.0, generator()),
    "aoft-lora-star": lambda: AoftLowRank(IN, OUT, Aoft(RANK, 1.0, True), generator()),
    "aoft-lora-star-strict": lambda: AoftLowRank(IN, OUT, Aoft(RANK, 1.0, True, True), generator()),
    "aoft-adapter-star": lambda: AoftAdapter(OUT, Aoft(RANK, 1.0, True), True, generator()),
    "aoft-adapter-star-shared": lambda: AoftAdapter(
        OUT, Aoft(RANK, 1.0, True, False, True), True, generator()
    ),
    "rlrr-identity": lambda: Rescale(IN, OUT, 2, OUT, "identity", generator()),
    "rlrr-identity-in": lambda: Rescale(IN, OUT, 1, OUT, "identity", generator(), "in"),
    "rlrr-identity-out": lambda: Rescale(IN, OUT, 1, OUT, "identity", generator(), "out"),
    "rlrr-zero": lambda: Rescale(IN, OUT, 2, OUT, "zero", generator()),
    "ssf-0": lambda: ScaleShift(OUT, True, 0.0, generator()),
    "bitfit": lambda: Shift(OUT),
}


@pytest.mark.parametrize("name", AT_ZERO)
def test_an_update_that_starts_at_zero_changes_no_bit(name: str) -> None:
    update = AT_ZERO[name]()
    w, b = torch.randn(OUT, IN), torch.randn(OUT)
    w[0, 0], w[3, 3], b[1] = -0.0, 0.0, -0.0
    folded, bias = fold_exactly(w, b, [(ROWS, exact_deltas([update])[update])])
    assert bias is not None
    assert torch.equal(folded.view(torch.int32), w.view(torch.int32))
    assert torch.equal(bias.view(torch.int32), b.view(torch.int32))
    applied = layer_with(update.double(), w.double(), b.double()).weight
    assert torch.equal(applied, w.double())


@pytest.mark.parametrize("name", sorted(set(AT_ZERO) - {"rlrr-zero"}))
def test_an_update_that_starts_at_zero_has_gradients(name: str) -> None:
    update = AT_ZERO[name]().double()
    w, b, x = map_and_input()
    torch.autograd.backward(layer_with(update, w, b)(x).square().sum())
    grads = {n: p.grad for n, p in update.named_parameters()}
    assert any(
        g is not None and g.any() for n, g in grads.items() if n != "shift" or len(grads) < 2
    )


def test_rescaling_with_both_scales_at_zero_learns_only_the_shift() -> None:
    update = AT_ZERO["rlrr-zero"]().double()
    w, b, x = map_and_input()
    torch.autograd.backward(layer_with(update, w, b)(x).square().sum())
    moved = {n for n, p in update.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"shift"}


def test_the_norm_of_plain_aoft_is_about_the_root_of_its_rank() -> None:
    update = AoftLowRank(768, 768, Aoft(16), generator())
    change, _ = fold_rows(torch.zeros(768, 768), None, [((0, 768), update.delta())])  # type: ignore[list-item]
    assert change.norm().item() == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("norm", [0.1, 1.0, 3.0])
def test_strict_products_are_partial_isometries_for_all_vector_norms(norm: float) -> None:
    update = CASES["aoft-lora-strict"].update()
    for parameter in update.parameters():
        parameter.data *= norm / parameter.norm()
    change, _ = fold_rows(random(OUT, IN) * 0, None, [(ROWS, update.delta())])  # type: ignore[list-item]
    singular = torch.linalg.svdvals(change / SCALE)
    assert (singular[:RANK] - 1).abs().max() < 1e-13 and singular[RANK:].max() < 1e-13


@pytest.mark.parametrize("norm", [0.1, 1.0, 3.0])
def test_strict_prompts_are_exactly_orthonormal(norm: float) -> None:
    update = AoftPrompts(768, Aoft(8, 1.0, False, True), generator()).double()
    update.q.data *= norm / update.q.norm()
    delta = update.delta()
    assert isinstance(delta, PromptDelta)
    gram = delta.tokens @ delta.tokens.mT
    assert (gram - torch.eye(8, dtype=torch.float64)).abs().max() < 1e-13


def test_the_parameters_of_aoft_do_not_grow_with_its_rank() -> None:
    def count(update: Update) -> int:
        return sum(p.numel() for p in update.parameters())

    for rank in (1, 8, 48):
        assert count(AoftLowRank(64, 48, Aoft(rank), generator())) == 64 + 48
        assert count(AoftAdapter(64, Aoft(rank), True, generator())) == 2 * 64
        shared = AoftAdapter(64, Aoft(rank, shared=True), True, generator())
        assert count(shared) == 64
        assert count(AoftPrompts(64, Aoft(rank), generator())) == 64
        star = AoftPrompts(64, Aoft(rank, per_rank_scale=True), generator())
        assert count(star) == 64 + rank


def test_without_residual_the_output_of_an_adapter_has_its_rank() -> None:
    update = CASES["aoft-adapter-alone"].update()
    w, b, _ = map_and_input()
    assert torch.linalg.matrix_rank(layer_with(update, w, b).weight).item() == RANK


def starts(init: Init, sides: Any = "both", residual: bool = True) -> Parameters:
    update = Rescale(600, 500, 2 if sides == "both" else 1, 0, init, generator(), sides, residual)
    return parameters(update)


def uniform_within(scale: Tensor, bound: float) -> bool:
    """Whether the values are uniform in ±bound: the largest of 500 is within 2 % of the bound."""
    spread = scale.double().std().item()
    even: bool = spread == pytest.approx(bound / 3**0.5, rel=0.1)
    return even and 0.98 * bound < scale.abs().max().item() <= bound


def test_rlrr_starts_as_the_released_code_does() -> None:
    start = starts("published")
    assert uniform_within(start["scale_in"], (6 / 600) ** 0.5)
    assert uniform_within(start["scale_out"], 6**0.5)


def test_rlrr_starts_at_the_pretrained_function_with_one_scale_at_zero() -> None:
    both, right, left = (starts("identity", sides) for sides in ("both", "in", "out"))
    assert not both["scale_out"].any() and uniform_within(both["scale_in"], (6 / 600) ** 0.5)
    assert not right["scale_in"].any() and not left["scale_out"].any()


def test_the_initial_values_of_the_ablation_are_small_on_both_sides() -> None:
    for scale in starts("normal").values():
        assert scale.std().item() == pytest.approx(0.02, rel=0.1) and scale.abs().max() > 0.04
    for scale in starts("uniform").values():
        assert uniform_within(scale, 0.02)
    for scale in starts("constant").values():
        assert torch.equal(scale, torch.full_like(scale, 0.02))
    for scale in starts("zero").values():
        assert not scale.any()


@pytest.mark.parametrize("sides", ["in", "out"])
def test_a_single_side_starts_within_the_bound_of_the_published_product(sides: str) -> None:
    (scale,) = starts("published", sides).values()
    assert uniform_within(scale, 6 / 600**0.5)


@pytest.mark.parametrize("init", get_args(Init))
def test_without_residual_the_first_pair_starts_around_one(init: Init) -> None:
    start = starts(init, residual=False)
    rests = {"constant": 1.02, "zero": 1.0, "identity": 1.0}
    for name, scale in start.items():
        if init in rests:
            assert torch.equal(scale[0], torch.full_like(scale[0], rests[init])), name
        else:
            assert scale[0].mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("sides", ["both", "in", "out"])
def test_without_residual_identity_starts_at_the_pretrained_weight(sides: Any) -> None:
    update = Rescale(IN, OUT, 1, OUT, "identity", generator(), sides, False).double()
    w, b, _ = map_and_input()
    module = layer_with(update, w, b)
    assert torch.allclose(module.weight, w, atol=1e-15)
    assert torch.equal(module.bias, b)  # type: ignore[arg-type]


def test_without_residual_identity_starts_at_the_pretrained_weight_at_any_rank() -> None:
    update = Rescale(IN, OUT, 3, OUT, "identity", generator(), "both", False).double()
    w, b, _ = map_and_input()
    assert torch.allclose(layer_with(update, w, b).weight, w, atol=1e-15)


def test_ssf_starts_around_one_and_zero() -> None:
    start = parameters(ScaleShift(5000, True, 0.02, generator()))
    for values, middle in ((start["scale"], 1), (start["shift"], 0)):
        assert values.mean().item() == pytest.approx(middle, abs=0.002)
        assert values.std().item() == pytest.approx(0.02, rel=0.1)


def test_prompts_start_within_the_published_bound() -> None:
    tokens = parameters(Prompts(768, 10, 16, generator()))["tokens"]
    assert tokens.shape == (10, 768)
    assert uniform_within(tokens, (6 / (3 * 16**2 + 768)) ** 0.5)


def test_lora_starts_as_the_reference_does() -> None:
    start = parameters(LowRank(600, 500, 8, 1.0, generator()))
    assert not start["b"].any() and uniform_within(start["a"], 600**-0.5)


def test_vectors_of_aoft_start_with_about_unit_norm() -> None:
    for update in (
        AoftLowRank(768, 3072, Aoft(8), generator()),
        AoftPrompts(768, Aoft(8), generator()),
    ):
        for parameter in update.parameters():
            assert parameter.norm().item() == pytest.approx(1, rel=0.1)
    star = AoftPrompts(768, Aoft(8, per_rank_scale=True), generator())
    assert torch.equal(star.rank_scale, torch.ones(8))


def test_without_a_bias_nothing_is_shifted() -> None:
    names = {n for n, _ in Rescale(IN, OUT, 1, 0, "published", generator()).named_parameters()}
    assert names == {"scale_in", "scale_out"}
    assert [n for n, _ in ScaleShift(6, False, 0.0, generator()).named_parameters()] == ["scale"]


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "lora": ["a", "b"],
        "adapter": ["a", "b"],
        "aoft-lora": ["q_down", "q_up"],
        "aoft-lora-star": ["q_down", "q_up", "rank_scale"],
        "aoft-adapter": ["q_down", "q_up"],
        "aoft-adapter-star": ["q_down", "q_up", "rank_scale"],
        "aoft-adapter-shared": ["q_down"],
        "aoft-adapter-star-shared": ["q_down", "rank_scale"],
        "rlrr": ["scale_in", "scale_out", "shift"],
        "rlrr-in": ["scale_in", "shift"],
        "rlrr-out": ["scale_out", "shift"],
        "ssf": ["scale", "shift"],
        "bitfit": ["shift"],
        "vpt": ["tokens"],
        "aoft-vpt": ["q"],
        "aoft-vpt-star": ["q", "rank_scale"],
    }.items(),
)
def test_parameters_keep_the_names_that_checkpoints_hold(name: str, expected: list[str]) -> None:
    assert [n for n, _ in (CASES | PROMPTS)[name].update().named_parameters()] == expected


def test_updates_of_equal_kind_share_one_call_of_their_formula() -> None:
    class Counted(LowRank):
        calls = 0

        def formula(self, a: Tensor, b: Tensor) -> WeightDelta:  # type: ignore[override]
            Counted.calls += 1
            return super().formula(a, b)

    many = [Counted(IN, OUT, RANK, SCALE, generator(i)) for i in range(4)]
    many += [Counted(IN, OUT, RANK, 2 * SCALE, generator(4)), Counted(IN, IN, 2, 1.0, generator(5))]
    for i, update in enumerate(many):
        update.b.data = random(*update.b.shape, seed=i).float()
    together = exact_deltas(many)
    assert Counted.calls == 3 and list(together) == many
    for update in many:
        alone = exact_deltas([update])[update]
        assert together[update].names() == alone.names() == ("left", "right")
        for name in alone.names():
            assert getattr(alone, name).dtype == torch.float64
            assert torch.equal(getattr(together[update], name), getattr(alone, name))


@pytest.mark.parametrize("name", CASES | PROMPTS)
def test_updates_of_equal_kind_get_their_own_deltas(name: str) -> None:
    group = [(CASES | PROMPTS)[name].update(seed) for seed in range(3)]
    together = exact_deltas(group)
    for update in group:
        alone: Any = update.delta()
        for field_name in alone.names():
            ours = getattr(together[update], field_name)
            assert torch.allclose(ours, getattr(alone, field_name).detach(), atol=1e-13)


def test_updates_that_differ_in_an_option_have_different_kinds() -> None:
    loose, strict = (CASES[name].update() for name in ("aoft-lora", "aoft-lora-strict"))
    assert loose.kind() != strict.kind()
    assert CASES["rlrr"].update(1).kind() == CASES["rlrr"].update(2).kind()
    kinds = {case.update().kind() for case in (CASES | PROMPTS).values()}
    assert len(kinds) == len(CASES | PROMPTS)


@pytest.mark.parametrize("rank", [0, 11, -3])
def test_a_rank_that_the_matrix_cannot_have_is_refused(rank: int) -> None:
    makers: list[tuple[int, Callable[[], Update]]] = [
        (IN, lambda: LowRank(IN, OUT, rank, 1.0, generator())),
        (IN, lambda: AoftLowRank(IN, OUT, Aoft(rank), generator())),
        (IN, lambda: Rescale(IN, OUT, rank, OUT, "published", generator())),
        (OUT, lambda: LowRankAdapter(OUT, rank, 1.0, generator())),
        (OUT, lambda: AoftAdapter(OUT, Aoft(rank), True, generator())),
        (OUT, lambda: AoftPrompts(OUT, Aoft(rank), generator())),
    ]
    for width, make in makers:
        message = f"rank is {rank}, but a 10 × {width} weight allows 1 to 10"
        with pytest.raises(SettingError, match=message):
            make()


@pytest.mark.parametrize("sides", ["in", "out"])
def test_a_single_side_has_no_higher_rank(sides: Any) -> None:
    with pytest.raises(
        SettingError, match="rank is 2, but the scales of a single side have rank 1"
    ):
        Rescale(IN, OUT, 2, OUT, "published", generator(), sides)


@pytest.mark.parametrize("name", ["aoft-lora", "aoft-adapter", "rlrr", "adapter", "ssf"])
def test_autocast_gives_about_the_output_of_a_plain_map_with_the_folded_weight(name: str) -> None:
    update = CASES[name].update().float()
    w, b, x = (t.float() for t in map_and_input())
    layer = nn.Linear(IN, OUT).requires_grad_(False)
    layer.weight.data, layer.bias.data = w, b
    module = UpdatedModule(layer, [(ROWS, update)])
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
    folded, bias = module.folded()
    expected = nn.functional.linear(x, folded, bias)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().max() < 0.05 * expected.abs().max()
    torch.autograd.backward(got.float().sum())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in update.parameters())


def test_autocast_gives_the_same_output_as_a_plain_map_with_the_folded_weight() -> None:
    update = CASES["aoft-lora"].update().float()
    w, b, x = torch.randn(OUT, IN), torch.randn(OUT), torch.randn(4, IN)
    delta = update.delta()
    assert isinstance(delta, WeightDelta)
    with torch.autocast("cpu", torch.bfloat16):
        got = apply_linear(x, w, b, [(ROWS, delta)])
    folded, _ = fold_rows(w, b, [(ROWS, delta)])
    expected = nn.functional.linear(x.bfloat16(), folded.bfloat16(), b.bfloat16())
    assert got.dtype == torch.bfloat16 and torch.equal(got, expected)
