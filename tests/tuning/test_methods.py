"""The methods: names, settings, and the sites that they update."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import timm
import torch
from torch import nn

from aoft_deploy.errors import SettingError, UnknownNameError
from aoft_deploy.tuning.method_summaries import SUMMARIES
from aoft_deploy.tuning.methods import METHODS, get_method, method_names
from aoft_deploy.tuning.sites.classifier import classifier_names
from aoft_deploy.tuning.sites.discovery import find_sites
from aoft_deploy.tuning.updates.rescale import Rescale
from aoft_deploy.tuning.updates.scale_shift import ScaleShift, Shift
from aoft_deploy.tuning.updates.update import Update

AOFT = {"rank": 8, "scale": 1.0, "strict": False}
ADAPTER = {**AOFT, "shared": False, "residual": True, "targets": "auto"}

DEFAULTS: dict[str, dict[str, Any]] = {
    "aoft-lora": {**AOFT, "targets": "auto"},
    "aoft-lora-star": {**AOFT, "targets": "auto"},
    "aoft-adapter": ADAPTER,
    "aoft-adapter-star": ADAPTER,
    "aoft-vpt": {**AOFT, "deep": True},
    "aoft-vpt-star": {**AOFT, "deep": True},
    "rlrr": {
        "rank": 1,
        "init": "published",
        "sides": "both",
        "residual": True,
        "fused_qkv": False,
        "norms": ["norm", "patch"],
    },
    "lora": {"rank": 8, "scale": 1.0, "targets": "auto", "ranks": {}},
    "adapter": {"rank": 8, "scale": 1.0, "targets": "auto"},
    "vpt": {"rank": 8, "deep": True},
    "ssf": {"init_std": 0.02},
    "bitfit": {},
    "linear": {},
    "full": {},
}
"""Names and defaults that checkpoints and commands depend on."""

SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 32, "window_size": 2, "depths": (1, 1, 1, 1)},
    "resnet18": {},
    "resnet50": {"layers": (1, 1, 1, 1)},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "beit_base_patch16_224": {"img_size": 32, "depth": 1},
}


@functools.cache
def shapes(name: str) -> nn.Module:
    """The architecture on the meta device."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, num_classes=1, **SMALL[name])
    return model


def updates(name: str, method: str, **settings: Any) -> dict[str, Update]:
    """The updates of a method, by the site's name."""
    chosen, sites = get_method(method), find_sites(shapes(name))
    assert chosen.build is not None
    values = chosen.resolved(chosen.settings(settings), sites)
    built = {s.name: chosen.build(s, values, torch.Generator()) for s in sites}
    return {name: update for name, update in built.items() if update is not None}


def kinds(name: str, method: str, **settings: Any) -> dict[str, list[type[Update]]]:
    """The kinds of update, by the role of their sites."""
    roles = {s.name: s.role for s in find_sites(shapes(name))}
    found: dict[str, list[type[Update]]] = {}
    for site, update in updates(name, method, **settings).items():
        found.setdefault(roles[site], []).append(type(update))
    return found


def test_names_and_defaults_do_not_change() -> None:
    assert method_names() == tuple(sorted(DEFAULTS))
    for name, defaults in DEFAULTS.items():
        assert get_method(name).settings({}) == defaults
        assert json.loads(json.dumps(defaults)) == defaults


def test_every_method_is_described_in_one_line_with_its_paper() -> None:
    assert SUMMARIES.keys() == METHODS.keys()  # the names that are known without torch
    for method in METHODS.values():
        assert method.summary and "\n" not in method.summary
        aoft_host = method.name in (
            "aoft-adapter",
            "aoft-adapter-star",
            "aoft-vpt",
            "aoft-vpt-star",
        )
        if method.name not in ("linear", "full") and not aoft_host:
            assert "arXiv" in method.summary, method.name


def test_an_unknown_method_is_refused_with_close_names() -> None:
    with pytest.raises(
        UnknownNameError, match=r"Unknown method 'aoft_vpt'\. Did you mean aoft-vpt"
    ):
        get_method("aoft_vpt")


def test_given_settings_replace_the_defaults() -> None:
    given = {"rank": 3, "init": "identity", "norms": []}
    settings = get_method("rlrr").settings(given)
    assert settings == {**DEFAULTS["rlrr"], **given}
    assert get_method("rlrr").settings({}) == DEFAULTS["rlrr"]


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("lora", {"scale": 2}, 2.0),
        ("ssf", {"init_std": 0}, 0.0),
        ("lora", {"targets": "fc1"}, ["fc1"]),
        ("lora", {"targets": ("q", "fc1")}, ["q", "fc1"]),
        ("lora", {"targets": "auto"}, "auto"),
        ("lora", {"targets": ["qkv"]}, ["qkv"]),
        ("lora", {"ranks": {"blocks.0.mlp.fc1": 3}}, {"blocks.0.mlp.fc1": 3}),
        ("rlrr", {"norms": "norm"}, ["norm"]),
        ("rlrr", {"norms": []}, []),
    ],
)
def test_values_are_converted_to_one_type(name: str, given: dict[str, Any], expected: Any) -> None:
    value = get_method(name).settings(given)[next(iter(given))]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "given", "error", "message"),
    [
        ("lora", {"rnk": 3}, UnknownNameError, "Unknown setting of lora 'rnk'.*rank"),
        ("vpt", {"scale": 1.0}, UnknownNameError, "Unknown setting of vpt 'scale'. Known: deep"),
        ("linear", {"rank": 3}, UnknownNameError, "Unknown setting of linear 'rank'. Known: none"),
        ("rlrr", {"init": "ones"}, UnknownNameError, "Unknown init of rlrr 'ones'.*published"),
        ("rlrr", {"init": 3}, UnknownNameError, "Unknown init of rlrr '3'"),
        (
            "rlrr",
            {"sides": "left"},
            UnknownNameError,
            "Unknown sides of rlrr 'left'.*both, in, out",
        ),
        ("rlrr", {"norms": ["norms"]}, UnknownNameError, "Unknown norm of rlrr 'norms'. Did you"),
        ("rlrr", {"norms": "auto"}, UnknownNameError, "Unknown norm of rlrr 'auto'.*batch_norm"),
        ("rlrr", {"norms": None}, UnknownNameError, "Unknown norm of rlrr 'None'"),
        ("lora", {"targets": ["Q"]}, UnknownNameError, "Unknown target of lora 'Q'.*gate, k, proj"),
        ("lora", {"targets": ["auto"]}, UnknownNameError, "Unknown target of lora 'auto'"),
        ("lora", {"targets": 3}, UnknownNameError, "Unknown target of lora '3'"),
        ("lora", {"targets": {"q": 1}}, UnknownNameError, "Unknown target of lora"),
        ("lora", {"targets": []}, SettingError, "targets of lora is empty: give at least one role"),
        ("adapter", {"targets": ()}, SettingError, "targets of adapter is empty"),
        (
            "lora",
            {"targets": ["qkv", "q"]},
            SettingError,
            "targets of lora contains qkv and a part of",
        ),
        (
            "aoft-lora",
            {"targets": ["v", "qkv"]},
            SettingError,
            "contains qkv and a part of it: choose",
        ),
        ("lora", {"rank": 2.5}, SettingError, "rank of lora is 2.5, but must be of type int"),
        ("lora", {"rank": True}, SettingError, "rank of lora is True, but must be of type int"),
        ("lora", {"rank": "8"}, SettingError, "rank of lora is '8', but must be of type int"),
        ("vpt", {"deep": 1}, SettingError, "deep of vpt is 1, but must be of type bool"),
        ("lora", {"scale": True}, SettingError, "scale of lora is True, but must be of type float"),
        (
            "lora",
            {"scale": 2**60},
            SettingError,
            "scale of lora is 11.*, but must be of type float",
        ),
        ("lora", {"scale": float("nan")}, SettingError, "scale of lora is nan, but must be finite"),
        (
            "ssf",
            {"init_std": float("inf")},
            SettingError,
            "init_std of ssf is inf, but must be fin",
        ),
        ("lora", {"ranks": [3]}, SettingError, r"ranks of lora is \[3\], but must be of type dict"),
        ("lora", {"ranks": {"a": 2.0}}, SettingError, "ranks of lora must map site names to whole"),
        (
            "lora",
            {"ranks": {"a": True}},
            SettingError,
            "ranks of lora must map site names to whole",
        ),
        ("lora", {"ranks": {"a": "4"}}, SettingError, "ranks of lora must map site names to whole"),
    ],
)
def test_wrong_settings_are_named_with_what_is_allowed(
    name: str, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        get_method(name).settings(given)


@pytest.mark.parametrize("method", ["lora", "aoft-lora", "aoft-lora-star"])
def test_automatic_targets_of_lora_are_attention_then_mlp_then_convolutions(method: str) -> None:
    expected = {
        "vit_tiny_patch16_224": ["q", "v"],
        "swin_tiny_patch4_window7_224": ["q", "v"],
        "convnext_atto": ["fc1", "fc2"],
        "resnet18": ["conv"],
    }
    chosen = get_method(method)
    for name, targets in expected.items():
        resolved = chosen.resolved(chosen.settings({}), find_sites(shapes(name)))
        assert resolved["targets"] == targets, name
        assert set(kinds(name, method, rank=2)) == set(targets)


@pytest.mark.parametrize("method", ["adapter", "aoft-adapter", "aoft-adapter-star"])
def test_automatic_targets_of_adapters_are_the_last_maps_of_the_branches(method: str) -> None:
    expected = {
        "vit_tiny_patch16_224": {"proj", "fc2"},
        "convnext_atto": {"fc2"},
        "resnet18": {"conv"},
    }
    for name, roles in expected.items():
        assert set(kinds(name, method, rank=2)) == roles, name


def test_given_targets_are_not_resolved() -> None:
    chosen, sites = get_method("lora"), find_sites(shapes("resnet18"))
    settings = chosen.settings({"targets": ["q"]})
    assert chosen.resolved(settings, sites) == settings
    assert get_method("ssf").resolved({"init_std": 0.0}, sites) == {"init_std": 0.0}


def test_rlrr_updates_every_linear_map_and_the_given_norms() -> None:
    vit = "vit_tiny_patch16_224"
    maps = {role: [Rescale] * 2 for role in ("q", "k", "v", "proj", "fc1", "fc2")}
    outputs: dict[str, list[type[Update]]] = {"norm": [ScaleShift] * 5, "patch": [ScaleShift]}
    assert kinds(vit, "rlrr") == maps | outputs
    assert kinds(vit, "rlrr", norms=[]) == maps
    fused = {role: [Rescale] * 2 for role in ("qkv", "proj", "fc1", "fc2")}
    assert kinds(vit, "rlrr", fused_qkv=True, norms=["norm"]) == {
        **fused,
        "norm": [ScaleShift] * 5,
    }


def test_rlrr_updates_the_norms_of_other_families_only_if_given() -> None:
    assert set(kinds("resnet18", "rlrr")) == {"conv"}
    assert set(kinds("resnet18", "rlrr", norms=["batch_norm"])) == {"conv", "batch_norm"}
    swin = set(kinds("swin_tiny_patch4_window7_224", "rlrr"))
    assert "reduction" in swin and "reduction_norm" not in swin
    updated = kinds("swin_tiny_patch4_window7_224", "rlrr", norms=["reduction_norm"])
    assert updated["reduction_norm"] == [ScaleShift] * 3 and "norm" not in updated


def test_norms_of_rlrr_start_around_one_only_with_published_initial_values() -> None:
    for init, spread in (("published", True), ("identity", False), ("normal", False)):
        scale = updates("vit_tiny_patch16_224", "rlrr", init=init)["norm"].get_parameter("scale")
        assert bool((scale != 1).any()) is spread


def test_ssf_updates_every_output_once() -> None:
    vit = kinds("vit_tiny_patch16_224", "ssf")
    assert set(vit) == {"norm", "patch", "qkv", "proj", "fc1", "fc2"}
    assert {kind for found in vit.values() for kind in found} == {ScaleShift}
    beit = kinds("beit_base_patch16_224", "ssf")
    assert beit["q_bias"] == beit["v_bias"] == [Shift]
    assert set(kinds("resnet50", "ssf")) == {"conv", "batch_norm"}


def test_bitfit_updates_every_bias_and_nothing_else() -> None:
    for name in ("vit_tiny_patch16_224", "convnext_atto", "resnet18"):
        shifted = updates(name, "bitfit")
        assert {type(update) for update in shifted.values()} == {Shift}
        model = shapes(name)
        biases = {n for n, _ in model.named_parameters() if n.endswith(".bias")}
        assert {f"{site}.bias" for site in shifted} == biases - set(classifier_names(model))


@pytest.mark.parametrize("method", ["vpt", "aoft-vpt", "aoft-vpt-star"])
def test_prompts_are_in_every_block_or_in_the_first(method: str) -> None:
    assert list(updates("vit_tiny_patch16_224", method)) == ["blocks.0", "blocks.1"]
    assert list(updates("vit_tiny_patch16_224", method, deep=False)) == ["blocks.0"]


def test_ranks_of_single_sites_replace_the_targets() -> None:
    ranks = {"blocks.0.attn.qkv.k": 3, "blocks.1.mlp.fc1": 2}
    built = updates("vit_tiny_patch16_224", "lora", ranks=ranks)
    assert {name: len(u.get_parameter("a")) for name, u in built.items()} == ranks


def test_ranks_must_name_existing_sites_and_no_row_twice() -> None:
    with pytest.raises(UnknownNameError, match=r"site in ranks of lora 'blocks\.0\.mlp\.fc3'"):
        updates("vit_tiny_patch16_224", "lora", ranks={"blocks.0.mlp.fc3": 2})
    with pytest.raises(UnknownNameError, match=r"Unknown site in ranks of lora 'blocks\.0\.norm1'"):
        updates("vit_tiny_patch16_224", "lora", ranks={"blocks.0.norm1": 1})
    both = {"blocks.0.attn.qkv": 2, "blocks.0.attn.qkv.v": 2}
    with pytest.raises(
        SettingError, match=r"ranks of lora contains .*qkv\.v and the whole map: choose"
    ):
        updates("vit_tiny_patch16_224", "lora", ranks=both)


@pytest.mark.parametrize(
    ("name", "method", "settings", "message"),
    [
        ("vit_tiny_patch16_224", "lora", {"rank": 999}, "rank is 999, but a 192 × 192 weight"),
        ("vit_tiny_patch16_224", "aoft-vpt", {"rank": 193}, "rank is 193, but a 192 × 192"),
        ("vit_tiny_patch16_224", "rlrr", {"rank": 0}, "rank is 0, but a 192 × 192 weight allows"),
        ("vit_tiny_patch16_224", "rlrr", {"rank": 2, "sides": "in"}, "scales of a single side"),
        ("convnext_atto", "lora", {"targets": ["conv"]}, "rank is 8, but a 280 × 7 weight allows"),
        ("resnet18", "aoft-adapter", {"rank": 65}, "rank is 65, but a 64 × 64 weight allows"),
    ],
)
def test_ranks_outside_a_sites_shape_are_refused(
    name: str, method: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        updates(name, method, **settings)
