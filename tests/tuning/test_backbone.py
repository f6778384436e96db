"""The identity of a backbone: its architecture and the hash of its weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aoft_deploy import attach, save
from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.checkpoints.opening import load
from aoft_deploy.cli.export import main
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import AoftError, BackboneError, CheckpointError, UnknownNameError
from aoft_deploy.fleet.fleet import Fleet
from aoft_deploy.fleet.opening import open_store
from aoft_deploy.fleet.packed_tasks import PackedTasks, pack
from aoft_deploy.fleet.task import TaskKind, read_task
from aoft_deploy.training.model import create_model, model_preprocessing
from aoft_deploy.training.settings import TrainingSettings
from aoft_deploy.tuning.backbones.architecture import (
    architecture_label,
    first_difference,
    same_architecture,
)
from aoft_deploy.tuning.backbones.backbone import create_backbone
from aoft_deploy.tuning.backbones.identity import (
    Backbone,
    difference,
    difference_from_timm,
    identify,
    weights_digest,
)

NAME, QUICK = "vit_base_patch32_clip_224", "vit_base_patch32_clip_quickgelu_224"
SHAPE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1}
SHAPE |= {"num_heads": 2}
HALF = (0.5, 0.5, 0.5)
PREPROCESSING = Preprocessing(32, crop_pct=1.0, mean=HALF, std=HALF)
CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that fit both OpenAI's CLIP (QuickGELU) and OpenCLIP (GELU)."""
    model = timm.create_model(QUICK, num_classes=0, **SHAPE)
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def trained(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a checkpoint on a named backbone with the weights of ``clip``."""

    def make(name: str, method: str = "lora", **args: Any) -> Path:
        model, identity = create_backbone(name, num_classes=3, weights=clip, **{**SHAPE, **args})
        tuned = attach(model, method, backbone=identity)
        path = tmp_path_factory.mktemp("task") / "model.ckpt"
        save(tuned, path, classes=CLASSES, preprocessing=PREPROCESSING)
        return path

    return make


def described(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        found: dict[str, Any] = json.loads(file.metadata()["aoft"])
    return found


def test_the_same_weights_in_another_architecture_are_refused(
    trained: Callable[..., Path], clip: Path, refused: Callable[..., str]
) -> None:
    path = trained(QUICK)
    options = ["--merge", path, "--backbone-weights", clip, "--backbone", NAME]
    line = refused(main, *options)
    assert line == (
        f"{path} was trained on {QUICK}, but {NAME} computes something else with the same weights "
        f"(blocks.0.mlp.act is GELU, not QuickGELU): give --backbone {QUICK}, or accept the "
        "difference with --force."
    )


def test_force_accepts_another_architecture_and_is_recorded_in_the_manifest(
    trained: Callable[..., Path], clip: Path
) -> None:
    path = trained(QUICK)
    options = ["--merge", path, "--backbone-weights", clip, "--to", "timm"]
    for more, forced in ((["--backbone", NAME, "--force"], True), (["--force"], False)):
        output = path.with_suffix(".safetensors")
        assert main([str(option) for option in (*options, *more, "-o", output)]) == 0
        manifest = json.loads(output.with_name(f"{output.name}.json").read_text())
        assert manifest["forced"] is forced
        assert manifest["backbone"]["name"] == (NAME if forced else QUICK)
        output.unlink()
        output.with_name(f"{output.name}.json").unlink()


def test_the_same_architecture_under_another_name_is_accepted(
    trained: Callable[..., Path], clip: Path
) -> None:
    # A tag names the origin of weights. OpenAI's and timm's ViT-B/32 have different names, but
    # compute the same with equal patch and norm settings.
    path = trained(f"{NAME}.openai")
    for name in (NAME, f"{NAME}.laion2b", "vit_medium_patch32_clip_224"):
        tuned = load(path, backbone=name, weights=clip)
        assert tuned.identity.digest == described(path)["backbone"]["digest"]
        assert difference(tuned.identity, replace(tuned.identity, name=NAME)) == ""


@pytest.mark.parametrize(
    ("found", "wanted", "message"),
    [
        (QUICK, NAME, "blocks.0.mlp.act is QuickGELU, not GELU"),
        ("efficientnet_lite0", "tf_efficientnet_lite0", "conv_stem is Conv2d, not Conv2dSame"),
        ("vit_base_patch16_224", "vit_base_patch16_clip_224", "norm_pre is Identity, not "),
        ("vit_tiny_patch16_224", "vit_tiny_patch16_384", "patch_embed.grid_size is (14, 14), not"),
        ("vit_small_patch16_224", "vit_tiny_patch16_224", "embed_dim is 384, not 192"),
        ("no_such_model", "vit_tiny_patch16_224", "no_such_model is another architecture"),
        ("deit_tiny_patch16_224", "vit_tiny_patch16_224", ""),
        ("vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", ""),
    ],
)
def test_names_are_compared_by_the_models_that_timm_creates(
    found: str, wanted: str, message: str
) -> None:
    reason = difference(Backbone(found, "d"), Backbone(wanted, "d"))
    assert message in reason
    assert bool(reason) is bool(message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"act_layer": "relu"}, "blocks.0.mlp.act is ReLU, not GELU"),
        ({"norm_layer": "layernorm2d"}, "norm"),
        ({"no_embed_class": True}, "no_embed_class is True, not False"),
        ({"global_pool": "avg"}, "global_pool is avg, not token"),
        ({"drop_path_rate": 0.1}, ""),
        ({"img_size": 224}, ""),
    ],
)
def test_arguments_that_shape_a_model_are_compared(args: dict[str, Any], message: str) -> None:
    name = "vit_tiny_patch16_224"
    reason = difference(Backbone(name, "d", args=args), Backbone(name, "d"))
    assert message in reason
    assert bool(reason) is bool(message)


def test_arguments_of_the_checkpoint_apply_to_another_name_too(
    trained: Callable[..., Path], clip: Path
) -> None:
    path = trained(NAME, act_layer="quick_gelu")
    assert load(path, weights=clip).identity.args["act_layer"] == "quick_gelu"
    assert load(path, weights=clip, backbone=QUICK).identity.name == QUICK
    assert "quick" in architecture_label(NAME, described(path)["backbone"]["args"])


def test_a_deprecated_name_is_replaced_by_its_current_one(tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, identity = create_backbone(
            "vit_tiny_patch16_224_in21k",
            num_classes=3,
            weights=tmp_path / "a.safetensors",
            img_size=32,
            depth=1,
        )
    assert identity.name == "vit_tiny_patch16_224.augreg_in21k"


def test_identify_finds_the_arguments_that_shape_a_model(tmp_path: Path) -> None:
    model = timm.create_model(NAME, num_classes=3, drop_path_rate=0.2, act_layer="relu", **SHAPE)
    identity = identify(model)
    assert identity.args == {**SHAPE, "act_layer": "relu"}
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    save(attach(model, "lora"), tmp_path / "a.ckpt", classes=CLASSES, preprocessing=PREPROCESSING)
    tuned = load(tmp_path / "a.ckpt", weights=tmp_path / "w.safetensors", backbone=NAME)
    assert "ReLU" in str(tuned.backbone)


def changed_activation(model: nn.Module) -> None:
    model.get_submodule("blocks.0.mlp").act = nn.ReLU()


def changed_epsilon(model: nn.Module) -> None:
    model.get_submodule("norm").eps = 1e-3  # type: ignore[assignment]


def changed_pool(model: nn.Module) -> None:
    model.global_pool = "avg"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_activation, r"blocks\.0\.mlp\.act is ReLU, not GELU"),
        (changed_epsilon, r"norm\.eps is 0\.001, not 1e-05"),
        (changed_pool, "global_pool is avg, not token"),
    ],
)
def test_a_checkpoint_of_a_changed_model_is_not_opened_on_the_unchanged_one(
    change: Callable[[nn.Module], None],
    message: str,
    quick_fleet: Path,
    clip: Path,
    tmp_path: Path,
) -> None:
    model = timm.create_model(NAME, num_classes=3, **SHAPE)
    model.load_state_dict(load_file(clip), strict=False)
    change(model)
    path = tmp_path / "a.ckpt"
    save(attach(model, "lora"), path, classes=CLASSES, preprocessing=PREPROCESSING)
    with pytest.raises(
        CheckpointError, match=rf"timm does not create as {NAME}.*\({message}\): attach"
    ):
        load(path, weights=clip)
    forced = load(path, weights=clip, force=True)
    stored = read_checkpoint(path).backbone
    assert re.search(message, difference(forced.identity, stored))
    with pytest.raises(CheckpointError, match=f"{message}.*a fleet has no such backbone"):
        Fleet(quick_fleet).add(path, "a")


def test_an_argument_that_cannot_be_stored_marks_the_model_as_changed(tmp_path: Path) -> None:
    model = timm.create_model(NAME, num_classes=3, act_layer=nn.ReLU, **SHAPE)
    path = tmp_path / "a.ckpt"
    save(attach(model), path, classes=CLASSES, preprocessing=PREPROCESSING)
    assert described(path)["backbone"]["origin"] == ("changed: blocks.0.mlp.act is ReLU, not GELU")


def test_a_plain_model_does_not_differ_from_its_name() -> None:
    for name in ("test_vit", "vit_base_patch32_clip_quickgelu_224", "efficientnet_lite0"):
        model = timm.create_model(name, num_classes=5, drop_rate=0.1)
        assert difference_from_timm(identify(model)) == "", name


def test_the_structure_of_a_model_is_not_stored(trained: Callable[..., Path]) -> None:
    stored = described(trained(NAME))["backbone"]
    assert stored.keys() == {"name", "digest", "origin", "args"}
    with pytest.raises(BackboneError, match=r"has the keys .*structure"):
        Backbone.from_dict({**stored, "structure": []})


@pytest.fixture(scope="module")
def quick_fleet(trained: Callable[..., Path], clip: Path) -> Path:
    path = trained(QUICK)
    fleet = path.with_name("fleet.onnx")
    options = ["--fleet", path, "--backbone-weights", clip, "-o", fleet]
    assert main([str(option) for option in options]) == 0
    return fleet


def test_a_fleet_refuses_a_task_of_another_architecture(
    quick_fleet: Path, trained: Callable[..., Path], tmp_path: Path
) -> None:
    fleet = Fleet(quick_fleet)
    same, other = trained(f"{QUICK}.openai"), trained(NAME)
    fleet.add(same, "same")
    with pytest.raises(CheckpointError, match=rf"was trained on {NAME}\(.*\), but the fleet's"):
        fleet.add(other, "other")
    assert set(fleet.tasks) == {"same", *Fleet(quick_fleet).tasks}
    (tmp_path / "other.ckpt").write_bytes(other.read_bytes())
    with pytest.raises(CheckpointError, match="may compute something else with the same weights"):
        open_store(tmp_path, fleet.kind).read("other")


def test_a_fleet_of_two_architectures_is_refused(
    trained: Callable[..., Path], clip: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    first, second = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    first.write_bytes(trained(QUICK).read_bytes())
    second.write_bytes(trained(NAME).read_bytes())
    options = ["--backbone-weights", clip, "-o", tmp_path / "f.onnx"]
    line = refused(main, "--fleet", first, second, *options)
    assert f"{second} and {first} differ in their backbone" in line


def test_a_packed_file_of_another_architecture_is_refused(
    quick_fleet: Path, trained: Callable[..., Path], tmp_path: Path
) -> None:
    kind = Fleet(quick_fleet).kind
    (tmp_path / "a.ckpt").write_bytes(trained(QUICK).read_bytes())
    pack(open_store(tmp_path, kind), tmp_path / "tasks")
    assert PackedTasks(tmp_path / "tasks", kind).kind.backbone == QUICK
    with pytest.raises(CheckpointError, match=f"trained on {QUICK}.*fleet's backbone is {NAME}"):
        PackedTasks(tmp_path / "tasks", replace(kind, backbone=NAME))
    with pytest.raises(CheckpointError, match="act_layer=relu"):
        PackedTasks(tmp_path / "tasks", replace(kind, args={**kind.args, "act_layer": "relu"}))


def test_packed_files_without_a_backbone_name_can_be_read(
    quick_fleet: Path, trained: Callable[..., Path], tmp_path: Path
) -> None:
    kind = Fleet(quick_fleet).kind
    old = {k: v for k, v in kind.to_dict().items() if k not in ("backbone", "args")}
    (tmp_path / "a.ckpt").write_bytes(trained(QUICK).read_bytes())
    pack(open_store(tmp_path, TaskKind.from_dict(old)), tmp_path / "tasks")
    stored = PackedTasks(tmp_path / "tasks", kind)
    expected = read_task(tmp_path / "a.ckpt", kind)
    assert (stored.read("a").row == expected.row).all()


def test_comparing_names_does_not_import_torch() -> None:
    code = (
        "import sys, aoft_deploy.tuning.backbones.architecture\n"
        "import aoft_deploy.fleet.task, aoft_deploy.file_signatures\n"
        "assert not {'torch', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_same_architecture_compares_names_and_arguments() -> None:
    same = same_architecture
    assert same("a.x", {}, "a.y", {"drop_path_rate": 0.1})
    assert same("a", {"img_size": 96}, "a", {})
    assert not same("a", {"img_size": 96}, "a", {"img_size": 64})
    assert not same("a", {"depth": 3}, "a", {})
    assert not same("a", {}, "ab", {})
    assert first_difference(("p\tclass\tA",), ("p\tclass\tA",)) == ""
    assert first_difference(("p\tclass\tA",), ()) == "p has other parts"


def test_the_digest_depends_on_every_tensor_its_name_type_and_shape() -> None:
    model = timm.create_model("test_vit", num_classes=3).eval()
    first, classifier = weights_digest(model), {"head.weight", "head.bias"}
    for name, tensor in model.state_dict().items():
        flat, original = tensor.view(-1), tensor.view(-1)[-1].clone()
        flat[-1] = torch.nextafter(original, torch.tensor(torch.inf))
        assert (weights_digest(model) == first) is (name in classifier), name
        flat[-1] = original
    assert weights_digest(model) == first

    def altered(change: Callable[[dict[str, Tensor]], object]) -> str:
        class Other(nn.Module):
            def get_classifier(self) -> nn.Module:
                head: nn.Module = model.head  # type: ignore[assignment]
                return head

            def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
                return model.named_parameters()

            def state_dict(self, *args: Any, **kwargs: Any) -> Any:
                state = dict(model.state_dict())
                change(state)
                return state

        return weights_digest(Other())

    def moved(state: dict[str, Tensor]) -> None:
        state["norm.gain"] = state.pop("norm.weight")

    def exchanged(state: dict[str, Tensor]) -> None:
        a, b = "blocks.0.norm1.weight", "blocks.1.mlp.fc1.bias"
        state[a], state[b] = state[b], state[a]

    assert altered(lambda state: None) == first
    others = {
        altered(moved),
        altered(exchanged),
        altered(lambda state: state.update({"norm.bias": state["norm.bias"].view(1, -1)})),
        altered(lambda state: state.update({"norm.bias": state["norm.bias"].view(-1, 1)})),
        altered(lambda state: state.update({"norm.bias": state["norm.bias"].half()})),
        altered(lambda state: state.update({"norm.bias": state["norm.bias"].bfloat16()})),
        altered(lambda state: state.update({"more": torch.ones(1)})),
        altered(lambda state: state.pop("cls_token")),
        first,
    }
    assert len(others) == 9


@pytest.mark.parametrize(("size", "left_out"), [(160, set()), (96, {"pos_embed"})])
def test_the_digest_leaves_out_only_resampled_tensors(size: int, left_out: set[str]) -> None:
    model = timm.create_model("test_vit", num_classes=3, img_size=size)
    first = identify(model).digest
    excluded = {"head.weight", "head.bias"} | left_out
    for name, tensor in model.state_dict().items():
        original = tensor.clone()
        tensor.view(-1)[0] += 1
        assert (identify(model).digest == first) is (name in excluded), name
        tensor.copy_(original)


@pytest.mark.parametrize(
    ("name", "what"),
    [("hf-hub:timm/vit_tiny_patch16_224", "Unknown backbone"), ("nope.tag", "Unknown backbone")],
)
def test_a_name_that_timm_does_not_list_is_refused(name: str, what: str) -> None:
    with pytest.raises(AoftError, match=what):
        create_backbone(name, num_classes=3)


@timm.models.register_model
def my_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A user's model, which leaves the loading of weights to others."""
    return timm.create_model("vit_tiny_patch16_224", **{**SHAPE, **kwargs})


def test_a_users_own_timm_model_gets_the_weights_of_the_file_and_its_own_size(
    tmp_path: Path,
) -> None:
    weights = timm.create_model("my_vit", num_classes=0).state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    settings = TrainingSettings(backbone="my_vit", backbone_weights=tmp_path / "w.safetensors")
    tuned = create_model(settings, 3)
    same, identity = create_backbone("my_vit", num_classes=2, weights=tmp_path / "w.safetensors")
    for name, tensor in weights.items():
        assert torch.equal(same.state_dict()[name], tensor)
    assert identity.digest == tuned.identity.digest
    assert model_preprocessing(tuned, settings).height == 32


def test_an_unknown_backbone_may_be_in_a_module_of_the_user() -> None:
    with pytest.raises(UnknownNameError, match=r"a module of yours .* import that first"):
        create_backbone("my_vlt_of_nobody", num_classes=2)
