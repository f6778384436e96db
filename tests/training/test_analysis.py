"""The analysis of a checkpoint, compared with dense computations on its merged weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aoft_deploy import approximately_orthogonal, attach, merge
from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.data.synthetic import load_task
from aoft_deploy.errors import CheckpointError
from aoft_deploy.training.analysis.orthogonality import orthogonality
from aoft_deploy.training.analysis.quantities import analyse, analyse_file
from aoft_deploy.training.run import train
from aoft_deploy.training.settings import TrainingSettings
from aoft_deploy.tuning.backbones.backbone import create_backbone
from aoft_deploy.tuning.methods import method_names
from aoft_deploy.tuning.tuned_model import TunedModel

MAKE = Callable[..., TunedModel]
AOFT = [name for name in method_names() if name.startswith("aoft-")]
FOLDING = [name for name in method_names() if name not in ("linear", "full")]
PARTS = {"q": slice(0, 32), "k": slice(32, 64), "v": slice(64, 96)}


def layers(analysis: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {layer["name"]: layer for layer in analysis["layers"]}


def dense(model: nn.Module, name: str) -> Tensor:
    """Weight of an analysed layer in a plain model."""
    path, _, part = name.rpartition(".")
    if part in PARTS:
        return model.get_parameter(f"{path}.weight").detach().double()[PARTS[part]]
    return model.get_parameter(f"{name}.weight").detach().double()


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def off_identity(matrix: Tensor) -> float:
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype)
    return float((matrix.mT @ matrix - eye).abs().max())


@pytest.fixture(scope="module")
def base(backbone_weights: Path, backbone_name: str, backbone_args: dict[str, Any]) -> nn.Module:
    return create_backbone(backbone_name, num_classes=5, weights=backbone_weights, **backbone_args)[
        0
    ]


@pytest.mark.parametrize("method", FOLDING)
def test_norms_of_weights_and_changes_equal_those_of_the_merged_model(
    method: str, make_tuned: MAKE, base: nn.Module
) -> None:
    tuned = make_tuned(method).double()
    merged, found = merge(tuned), layers(analyse(tuned))
    linear = {n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "head"}
    listed = {name for name in found if name.rpartition(".")[2] not in PARTS} - {"blocks.0"}
    assert listed | {"blocks.0.attn.qkv"} == linear
    for name in found.keys() - {"blocks.0"}:
        norms, weight = found[name]["spectral_norms"], dense(base, name)
        change = dense(merged, name) - weight
        assert norms["weight"] == pytest.approx(norm(weight))
        if name in tuned.updates:
            assert norms["change"] == pytest.approx(norm(change), rel=1e-9, abs=1e-12)
            assert found[name]["change_ratio"] == pytest.approx(norm(change) / norm(weight))
        else:
            assert not change.any()
            assert "change" not in norms
            assert found[name]["change_ratio"] is None


def test_full_fine_tuning_is_compared_with_the_backbone_before_it(
    make_checkpoint: Callable[..., Path], backbone_weights: Path, base: nn.Module
) -> None:
    path = make_checkpoint("full")
    analysis = analyse_file(path, weights=backbone_weights)
    trained = load_file(path)
    for name, layer in layers(analysis).items():
        owner, _, part = name.rpartition(".")
        key = f"{owner if part in PARTS else name}.weight"
        after = trained[f"backbone.{key}"].double()[PARTS.get(part, slice(None))]
        assert layer["spectral_norms"]["weight"] == pytest.approx(norm(dense(base, name)))
        change = norm(after - dense(base, name))
        assert layer["spectral_norms"]["change"] == pytest.approx(change)
    assert analysis["notes"] == [
        "full has neither down and up matrices nor prompts.",
        "full has no AO matrices, so there is no deviation from orthogonality.",
    ]


def dense_projections(tuned: TunedModel, site: str) -> dict[str, Tensor]:
    """The matrices of an AOFT site by the paper's definition."""
    update = tuned.updates[site]
    p = {name: parameter.detach().double() for name, parameter in update.named_parameters()}
    if tuned.settings["strict"]:
        p = {name: q / q.norm() for name, q in p.items()}
    rank = tuned.settings["rank"]
    if "q" in p:
        return {"prompts": approximately_orthogonal(p["q"], rank)}
    up = p.get("q_up", p["q_down"])
    return {
        "down": approximately_orthogonal(p["q_down"], rank),
        "up": approximately_orthogonal(up, rank),
    }


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        *((name, {"strict": strict}) for name in AOFT for strict in (False, True)),
        ("aoft-adapter", {"shared": True}),
        ("aoft-adapter-star", {"residual": False}),
        ("aoft-lora-star", {"rank": 1}),
    ],
    ids=str,
)
def test_matrices_of_aoft_equal_the_dense_definition(
    method: str, settings: dict[str, Any], make_tuned: MAKE
) -> None:
    tuned = make_tuned(method, **settings)
    found = layers(analyse(tuned))
    worst: dict[str, list[float]] = {}
    for site in tuned.updates:
        for kind, matrix in dense_projections(tuned, site).items():
            layer = found[site]
            assert layer["spectral_norms"][kind] == pytest.approx(norm(matrix))
            expected = pytest.approx(off_identity(matrix), abs=1e-12)
            assert layer["deviations"][kind] == expected
            assert layer["vectors"][kind] == list(matrix.mT.shape)
            worst.setdefault(kind, []).append(off_identity(matrix))
    figures = {}
    for kind, values in worst.items():
        figures[f"deviation_{kind}_mean"] = sum(values) / len(values)
        figures[f"deviation_{kind}_max"] = max(values)
    assert orthogonality(tuned) == pytest.approx(figures, abs=1e-12)


@pytest.mark.parametrize("method", ["lora", "adapter", "vpt"])
def test_matrices_of_other_methods_are_the_trained_ones(method: str, make_tuned: MAKE) -> None:
    tuned = make_tuned(method)
    found = layers(analyse(tuned))
    for site, update in tuned.updates.items():
        p = {name: parameter.detach().double() for name, parameter in update.named_parameters()}
        matrices = {"prompts": p["tokens"].mT} if "tokens" in p else {"down": p["a"].mT}
        if "b" in p:
            matrices["up"] = p["b"]
        for kind, matrix in matrices.items():
            assert found[site]["spectral_norms"][kind] == pytest.approx(norm(matrix))
            assert found[site]["vectors"][kind] == list(matrix.mT.shape)
        assert found[site]["deviations"] == {}


@pytest.mark.parametrize("method", sorted(set(method_names()) - set(AOFT)))
def test_a_method_without_ao_matrices_has_no_deviation(method: str, make_tuned: MAKE) -> None:
    assert orthogonality(make_tuned(method)) == {}


def test_angles_equal_those_between_the_dense_vectors(make_tuned: MAKE, base: nn.Module) -> None:
    tuned = make_tuned("aoft-lora", rank=6)
    analysis = analyse(tuned)
    families: dict[str, list[Tensor]] = {"rows": [], "columns": [], "down": [], "up": []}
    for name in layers(analysis):
        families["rows"].append(dense(base, name))
        families["columns"].append(dense(base, name).mT)
    for site in tuned.updates:
        for kind, matrix in dense_projections(tuned, site).items():
            families[kind].append(matrix.mT)
    assert list(analysis["angles"]) == list(families)
    for kind, matrices in families.items():
        found = analysis["angles"][kind]
        degrees = []
        for vectors in matrices:
            unit = nn.functional.normalize(vectors, dim=1)
            cosines = (unit @ unit.mT).clamp(-1, 1)
            pairs = torch.ones_like(cosines).triu(1).bool()
            degrees.append(torch.rad2deg(cosines[pairs].acos()))
        every = torch.cat(degrees)
        assert (found["matrices"], found["pairs"]) == (len(matrices), len(every))
        assert found["mean"] == pytest.approx(every.mean().item())
        assert found["sd"] == pytest.approx(every.std(correction=0).item())
        assert found["farthest_from_90"] == pytest.approx((every - 90).abs().max().item())
        assert found["counts"] == torch.histc(every, len(found["counts"]), 0, 180).tolist()
        assert sum(found["random_counts"]) == pytest.approx(len(every), rel=1e-3)
        layer_pairs = [
            x["angles"][kind]["pairs"] for x in analysis["layers"] if kind in x["angles"]
        ]
        assert layer_pairs == [len(part) for part in degrees]


def test_an_untrained_lora_has_no_angles_between_zero_vectors(
    backbone_name: str, backbone_args: dict[str, Any]
) -> None:
    model = timm.create_model(backbone_name, num_classes=5, **backbone_args)
    analysis = analyse(attach(model, "lora", rank=4))
    assert list(analysis["angles"]) == ["rows", "columns", "down"]
    assert {x["spectral_norms"].get("change", 0) for x in analysis["layers"]} == {0}


@pytest.mark.parametrize(
    ("name", "args", "method", "expected"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 56, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)},
            "rlrr",
            {
                "layers.0.blocks.0.attn.qkv.q": ("0.0", "q"),
                "layers.1.blocks.0.mlp.fc2": ("1.0", "fc2"),
                "layers.1.downsample.reduction": ("1", "reduction"),
            },
        ),
        (
            "eva02_tiny_patch14_224",
            {"img_size": 28, "depth": 1},
            "ssf",
            {"blocks.0.attn.qkv": ("0", "qkv"), "blocks.0.mlp.fc1": ("0", "fc1")},
        ),
        (
            "eva02_base_patch14_224",
            {"img_size": 28, "depth": 1, "embed_dim": 48, "num_heads": 4},
            "lora",
            {"blocks.0.attn.q_proj": ("0", "q"), "blocks.0.mlp.fc1_g": ("0", "fc1_g")},
        ),
        (
            "resnet18",
            {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)},
            "aoft-lora",
            {"conv1": ("", "conv1"), "layer1.0.conv2": ("1.0", "conv2")},
        ),
        (
            "resnet18",
            {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)},
            "aoft-adapter-star",
            {"layer2.0.downsample.0": ("2.0", "downsample.0")},
        ),
    ],
    ids=["swin", "eva02 fused", "eva02 apart", "resnet low rank", "resnet adapter"],
)
def test_layers_of_other_architectures_are_found_and_named_by_block_and_role(
    name: str, args: dict[str, Any], method: str, expected: dict[str, tuple[str, str]]
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **args).double()
    settings: dict[str, Any] = (
        {"rank": 2} if method in ("lora", "aoft-lora", "aoft-adapter-star") else {}
    )
    tuned = attach(model, method, **settings).double()
    with torch.no_grad():
        for parameter in tuned.trained().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    analysis = layers(analyse(tuned))
    for layer, names in expected.items():
        assert (analysis[layer]["block"], analysis[layer]["role"]) == names
    merged = merge(tuned)
    for layer in expected.keys() & tuned.updates.keys():
        if layer.rpartition(".")[2] in PARTS:
            continue
        owner = tuned.backbone.get_submodule(layer)
        before = owner.get_submodule("base").get_parameter("weight")
        change = merged.get_parameter(f"{layer}.weight") - before
        norms = analysis[layer]["spectral_norms"]
        assert norms["change"] > 0
        if change.dim() == 2:
            assert norms["change"] == pytest.approx(norm(change))


# Deviations over the epochs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the default method."""
    out = tmp_path_factory.mktemp("run") / "run"
    settings = TrainingSettings(img_size=16, epochs=2, batch_size=16, precision="fp32")
    train(load_task("digits", train=32, val=20, test=20), out, replace(settings, seed=3))
    return out


def test_every_epoch_of_training_records_its_deviations(run: Path) -> None:
    analysis = analyse_file(run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in analysis["history"]] == [1, 2]
    for found, line in zip(analysis["history"], lines, strict=False):
        assert found == {key: line[key] for key in found}
    chosen = analysis["history"][read_checkpoint(run / "model.ckpt").training["epoch"] - 1]
    values = [layer["deviations"]["up"] for layer in analysis["layers"] if layer["deviations"]]
    assert chosen["deviation_up_max"] == max(values)
    assert chosen["deviation_up_mean"] == pytest.approx(sum(values) / len(values))
    assert analysis["notes"] == []
    assert analyse_file(run / "model.ckpt") == analysis


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda text: None, "There is no .*metrics.jsonl, so the deviations of the epochs"),
        (lambda text: text.replace("deviation_", "other_"), "holds no deviations"),
        (lambda text: "no JSON\n", "holds no deviations"),
        (lambda text: "[1]\n", "holds no deviations"),
        (lambda text: "\n", "holds no deviations"),
        (lambda text: text.splitlines()[-1], "holds no deviations"),
        (lambda text: text.replace('_max": ', '_max": 1'), "belongs to another run"),
    ],
    ids=["none", "older", "no json", "no object", "empty line", "no epoch", "other run"],
)
def test_metrics_without_deviations_of_this_run_are_ignored(
    change: Callable[[str], str | None], note: str, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.ckpt").write_bytes((run / "model.ckpt").read_bytes())
    text = change((run / "metrics.jsonl").read_text())
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    analysis = analyse_file(tmp_path)
    assert analysis["history"] == []
    assert len(analysis["notes"]) == 1
    assert re.search(note, analysis["notes"][0])


def test_the_analysis_is_json_without_nan(
    make_checkpoint: Callable[..., Path], backbone_weights: Path
) -> None:
    for method in ("rlrr", "aoft-vpt", "bitfit"):
        analysis = analyse_file(make_checkpoint(method), weights=backbone_weights)
        assert json.loads(json.dumps(analysis, allow_nan=False)) == analysis
        assert all(math.isfinite(layer["change_ratio"] or 0) for layer in analysis["layers"])


@pytest.mark.parametrize(
    ("method", "notes"),
    [
        ("vpt", ["vpt changes no weight: there is no ΔW.", "vpt has no AO matrices"]),
        ("bitfit", ["ΔW is zero in every layer.", "bitfit has neither", "bitfit has no AO"]),
        ("rlrr", ["rlrr has neither down and up", "rlrr has no AO matrices"]),
        ("aoft-vpt", ["There is no ", "aoft-vpt changes no weight"]),
        ("lora", ["lora has no AO matrices"]),
    ],
)
def test_notes_report_what_a_method_does_not_have(
    method: str, notes: list[str], make_checkpoint: Callable[..., Path], backbone_weights: Path
) -> None:
    found = analyse_file(make_checkpoint(method), weights=backbone_weights)["notes"]
    assert len(found) == len(notes)
    assert all(text.startswith(start) for text, start in zip(found, notes, strict=True))


def test_linear_probing_has_nothing_to_analyse(
    make_checkpoint: Callable[..., Path], backbone_weights: Path
) -> None:
    with pytest.raises(CheckpointError, match="changes only the classifier: there is nothing"):
        analyse_file(make_checkpoint("linear"), weights=backbone_weights)
