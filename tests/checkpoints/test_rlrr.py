"""Files of the published RLRR code, against the published forward, which is repeated here."""

from __future__ import annotations

import importlib
import math
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from aoft_deploy.checkpoints.checkpoint import read_checkpoint
from aoft_deploy.checkpoints.rlrr import is_torch_file, published_preprocessing, read_published
from aoft_deploy.cli.export import main
from aoft_deploy.cli.inspect import main as inspect_main
from aoft_deploy.cli.predict import main as predict_main
from aoft_deploy.errors import CheckpointError
from aoft_deploy.fleet.task import TaskKind, read_task

BACKBONE = "published_test_vit"
SIZE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 32, 8, 48, 2, 3, 7
HIDDEN = 4 * WIDTH

default_cfgs = generate_default_cfgs(
    {BACKBONE: {"input_size": (3, SIZE, SIZE), "classifier": "head"}}
)  # timm's register_model reads this name


@register_model
def published_test_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """timm's ViT at a small size. It needs a name, because a published file contains no size."""
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer,
        BACKBONE,
        pretrained,
        img_size=SIZE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        **kwargs,
    )
    return model


def jax_weights(seed: int) -> dict[str, Tensor]:
    """Random weights under the names and in the layout of the JAX release."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.1, mean: float = 0.0) -> Tensor:
        return mean + std * torch.randn(shape, generator=generator)

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}/scale": normal(WIDTH, mean=1), f"{name}/bias": normal(WIDTH)}

    weights = {
        "cls": normal(1, 1, WIDTH),
        "embedding/kernel": normal(PATCH, PATCH, 3, WIDTH, std=(3 * PATCH**2) ** -0.5),
        "embedding/bias": normal(WIDTH),
        "Transformer/posembed_input/pos_embedding": normal(1, (SIZE // PATCH) ** 2 + 1, WIDTH),
        **norm("Transformer/encoder_norm"),
        # The release's classifier and pre_logits, which fine-tuning replaces and ignores.
        "head/kernel": normal(WIDTH, CLASSES),
        "head/bias": normal(CLASSES),
        "pre_logits/kernel": normal(WIDTH, WIDTH),
        "pre_logits/bias": normal(WIDTH),
    }
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        attention, mlp = f"{block}/MultiHeadDotProductAttention_1", f"{block}/MlpBlock_3"
        weights |= norm(f"{block}/LayerNorm_0") | norm(f"{block}/LayerNorm_2")
        for part in ("query", "key", "value"):
            shape = (WIDTH, HEADS, WIDTH // HEADS)
            weights[f"{attention}/{part}/kernel"] = normal(*shape, std=1.5 * WIDTH**-0.5)
            weights[f"{attention}/{part}/bias"] = normal(*shape[1:])
        weights[f"{attention}/out/kernel"] = normal(HEADS, WIDTH // HEADS, WIDTH, std=WIDTH**-0.5)
        weights[f"{attention}/out/bias"] = normal(WIDTH)
        weights[f"{mlp}/Dense_0/kernel"] = normal(WIDTH, HIDDEN, std=WIDTH**-0.5)
        weights[f"{mlp}/Dense_0/bias"] = normal(HIDDEN)
        weights[f"{mlp}/Dense_1/kernel"] = normal(HIDDEN, WIDTH, std=HIDDEN**-0.5)
        weights[f"{mlp}/Dense_1/bias"] = normal(WIDTH)
    return weights


def published_state(seed: int) -> OrderedDict[str, Tensor]:
    """A state dict as the published code saves it: its names, shapes and magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    state: OrderedDict[str, Tensor] = OrderedDict()

    def ssf(scale: str, shift: str) -> None:
        state[scale] = 1 + 0.2 * torch.randn(WIDTH, generator=generator)
        state[shift] = 0.2 * torch.randn(WIDTH, generator=generator)

    ssf("transformer.embeddings.ssf_scale_patch", "transformer.embeddings.ssf_shift_patch")
    for i in range(DEPTH):
        layer = f"transformer.encoder.layer.{i}"
        ssf(f"{layer}.ssf_scale_attn_norm", f"{layer}.ssf_shift_attn_norm")
        ssf(f"{layer}.ssf_scale_ffn_norm", f"{layer}.ssf_shift_ffn_norm")
        shapes = {f"attn.{part}": (WIDTH, WIDTH) for part in ("query", "key", "value", "out")}
        shapes |= {"ffn.fc1": (WIDTH, HIDDEN), "ffn.fc2": (HIDDEN, WIDTH)}
        for name, (inputs, outputs) in shapes.items():
            column, line = torch.empty(1, inputs), torch.empty(outputs, 1)
            column.uniform_(-1, 1, generator=generator).mul_(math.sqrt(6 / inputs))
            line.uniform_(-1, 1, generator=generator).mul_(math.sqrt(6))
            state[f"{layer}.{name}.scale_col"], state[f"{layer}.{name}.scale_line"] = column, line
            shift = 0.1 * torch.randn(1, outputs, generator=generator)
            state[f"{layer}.{name}.shift_bias"] = shift
    ssf("transformer.encoder.ssf_scale_enc_norm", "transformer.encoder.ssf_shift_enc_norm")
    state["head.weight"] = 0.1 * torch.randn(CLASSES, WIDTH, generator=generator)
    state["head.bias"] = torch.randn(CLASSES, generator=generator)
    return state


def published_forward(x: Tensor, jax: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
    """The released model's logits in float64. x: (batch, 3, 64, 64) → (batch, classes)."""
    w = {name: tensor.double() for name, tensor in jax.items()}
    s = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: Tensor, name: str, ssf: str) -> Tensor:
        y = F.layer_norm(x, (WIDTH,), w[f"{name}/scale"], w[f"{name}/bias"], eps=1e-6)
        return y * s[ssf.format("scale")] + s[ssf.format("shift")]

    def linear(x: Tensor, kernel: Tensor, bias: Tensor, name: str) -> Tensor:
        weight = kernel.T
        weight = weight * s[f"{name}.scale_col"] * s[f"{name}.scale_line"] + weight
        return x @ weight.T + (bias.reshape(-1) + s[f"{name}.shift_bias"].reshape(-1))

    def attention(x: Tensor, name: str, ours: str) -> Tensor:
        parts = []
        for part in ("query", "key", "value"):
            kernel = w[f"{name}/{part}/kernel"].reshape(WIDTH, WIDTH)
            y = linear(x, kernel, w[f"{name}/{part}/bias"], f"{ours}.{part}")
            parts.append(y.view(*y.shape[:2], HEADS, -1).transpose(1, 2))
        query, key, value = parts
        scores = query @ key.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        kernel = w[f"{name}/out/kernel"].reshape(WIDTH, WIDTH)
        return linear(mixed, kernel, w[f"{name}/out/bias"], f"{ours}.out")

    patches = F.conv2d(
        x.double(), w["embedding/kernel"].permute(3, 2, 0, 1), w["embedding/bias"], stride=PATCH
    )
    tokens = patches.flatten(2).transpose(1, 2)
    tokens = (
        tokens * s["transformer.embeddings.ssf_scale_patch"]
        + s["transformer.embeddings.ssf_shift_patch"]
    )
    y = torch.cat([w["cls"].expand(len(x), 1, WIDTH), tokens], dim=1)
    y = y + w["Transformer/posembed_input/pos_embedding"]
    for i in range(DEPTH):
        jax_block, layer = f"Transformer/encoderblock_{i}", f"transformer.encoder.layer.{i}"
        z = norm(y, f"{jax_block}/LayerNorm_0", f"{layer}.ssf_{{}}_attn_norm")
        y = y + attention(z, f"{jax_block}/MultiHeadDotProductAttention_1", f"{layer}.attn")
        z = norm(y, f"{jax_block}/LayerNorm_2", f"{layer}.ssf_{{}}_ffn_norm")
        for dense, name in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
            dense = f"{jax_block}/MlpBlock_3/{dense}"
            z = linear(z, w[f"{dense}/kernel"], w[f"{dense}/bias"], f"{layer}.ffn.{name}")
            z = F.gelu(z) if name == "fc1" else z
        y = y + z
    y = norm(y, "Transformer/encoder_norm", "transformer.encoder.ssf_{}_enc_norm")
    return y[:, 0] @ s["head.weight"].T + s["head.bias"]


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("jax") / "ViT.npz"
    arrays: dict[str, Any] = {name: t.numpy() for name, t in jax_weights(seed=0).items()}
    np.savez(path, **arrays)
    return path


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    path = tmp_path / "cifar  75.60.pth"
    torch.save(published_state(seed=1), path)
    return path


def options(pth: Path, npz: Path, *more: object) -> list[object]:
    return ["--merge", pth, "--backbone", BACKBONE, "--backbone-weights", npz, "--overwrite", *more]


def test_a_published_file_on_jax_weights_gives_the_logits_of_the_published_forward(
    npz: Path, pth: Path
) -> None:
    # float32 against float64, on logits of about 1 to 10.
    assert main([str(o) for o in options(pth, npz)]) == 0
    x = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(pth.with_suffix(".onnx"))
    logits = session.run(["logits"], {"pixel_values": x.numpy()})[0]
    expected = published_forward(x, jax_weights(seed=0), published_state(seed=1)).numpy()
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_every_part_of_a_published_file_changes_the_logits() -> None:
    # The comparison above might not notice a part that hardly changes the logits.
    x = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    jax, state = jax_weights(seed=0), published_state(seed=1)
    logits = published_forward(x, jax, state)
    for name, tensor in state.items():
        changed = {**state, name: tensor.flatten().roll(1).view(tensor.shape)}
        difference = (published_forward(x, jax, changed) - logits).abs().max()
        if not name.endswith("key.shift_bias"):  # a shift common to all keys drops out of softmax
            assert difference > 1e-3, name


def test_the_published_preprocessing_resizes_to_the_input_size() -> None:
    preprocessing = published_preprocessing(64)
    assert (preprocessing.size, preprocessing.crop_pct) == (64, 1.0)
    assert preprocessing.mean == preprocessing.std == (0.5, 0.5, 0.5)
    assert (preprocessing.crop_mode, preprocessing.interpolation) == ("squash", "bicubic")


def test_a_published_file_without_a_backbone_is_refused(
    pth: Path, refused: Callable[..., str]
) -> None:
    line = refused(main, "--merge", pth)
    assert "--backbone and --backbone-weights" in line


def test_a_published_file_on_a_backbone_without_blocks_is_refused(
    pth: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    import timm

    weights = tmp_path / "resnet.pth"
    torch.save(timm.create_model("resnet10t").state_dict(), weights)
    arguments = ["--merge", pth, "--backbone", "resnet10t", "--backbone-weights", weights]
    assert "needs a plain Vision Transformer, not resnet10t" in refused(main, *arguments)


def test_a_published_file_of_a_deeper_model_is_refused(
    npz: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    state = published_state(seed=1)
    layer = f"transformer.encoder.layer.{DEPTH}"
    state[f"{layer}.ssf_scale_attn_norm"] = torch.ones(WIDTH)
    torch.save(state, tmp_path / "deeper.pth")
    line = refused(main, *options(tmp_path / "deeper.pth", npz))
    assert f"update.blocks.{DEPTH}.norm1.scale, which the model has no place for" in line


def test_a_published_file_of_a_shallower_model_is_refused(
    npz: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    state = published_state(seed=1)
    shallow = {n: t for n, t in state.items() if f"layer.{DEPTH - 1}." not in n}
    torch.save(shallow, tmp_path / "shallower.pth")
    line = refused(main, *options(tmp_path / "shallower.pth", npz))
    assert f"The checkpoint lacks update.blocks.{DEPTH - 1}" in line


@pytest.mark.parametrize(
    "name", ["transformer.encoder.layer.0.attn.qkv.scale_col", "head.scale", "", "head.bias\n"]
)
def test_a_name_that_the_published_code_does_not_write_is_refused(
    name: str, npz: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    torch.save({**published_state(seed=1), name: torch.ones(3)}, tmp_path / "x.pth")
    assert "has no place for" in refused(main, *options(tmp_path / "x.pth", npz))


def test_a_published_file_without_head_bias_is_refused(
    npz: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    state = published_state(seed=1)
    del state["head.bias"]
    torch.save(state, tmp_path / "x.pth")
    assert "has no head.bias" in refused(main, *options(tmp_path / "x.pth", npz))


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(3)],
        torch.ones(3),
        7,
        {"head.bias": 7},
        {"head.bias": None, "head.weight": "text"},
        {"head.bias": torch.tensor(1.0)},
        {"head.bias": torch.ones(0)},
        {"head.bias": torch.ones(2, 3)},
        {3: torch.ones(3), "head.bias": torch.ones(3)},
        {"head.bias": torch.ones(3, dtype=torch.complex64)},
        {"head.bias": torch.eye(3).to_sparse()},
        {"head.bias": {"nested": torch.ones(3)}},
    ],
    ids=str,
)
def test_a_pickle_of_something_else_is_refused(
    content: object, npz: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    torch.save(content, tmp_path / "x.pth")
    refused(main, *options(tmp_path / "x.pth", npz))


def test_a_published_file_with_a_non_finite_value_is_refused(
    npz: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    state = published_state(seed=1)
    state["transformer.encoder.layer.1.ffn.fc1.scale_line"][5] = math.nan
    torch.save(state, tmp_path / "x.pth")
    line = refused(main, *options(tmp_path / "x.pth", npz))
    assert "update.blocks.1.mlp.fc1.scale_out holds values that are not finite" in line


@pytest.mark.parametrize("length", [2, 10, 1000, 0.5, 0.99])
def test_a_truncated_published_file_is_refused(
    length: float, npz: Path, pth: Path, refused: Callable[..., str]
) -> None:
    data = pth.read_bytes()
    pth.write_bytes(data[: length if isinstance(length, int) else int(length * len(data))])
    line = refused(main, *options(pth, npz))
    assert re.search("is damaged or would run code|is an incomplete zip archive", line), line


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


BOMBS = ("archive", "bare", "legacy", "module", "module.safetensors", "bare.safetensors")


def bomb(folder: Path, marker: Path, kind: str) -> Path:
    """A pickle that creates ``marker`` when it is unpickled without restrictions.

    The kind is a torch archive, a bare pickle, torch's legacy format or a module, optionally with
    the suffix of a safetensors file.
    """
    form, _, suffix = kind.partition(".")
    path = folder / f"{form}.{suffix or 'pth'}"
    module = torch.nn.Linear(2, 2)
    module.more = Bomb(marker)  # type: ignore[assignment]
    content = module if form == "module" else {**published_state(seed=1), "extra": Bomb(marker)}
    if form == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    return path


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A TorchScript archive, which consists of code."""
    path = tmp_path / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        trace: Any = torch.jit.trace
        trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(path))
    return path


@pytest.mark.parametrize("kind", BOMBS)
def test_the_malicious_pickles_of_these_tests_run_code_when_unpickled(
    kind: str, tmp_path: Path
) -> None:
    path = bomb(tmp_path, tmp_path / "ran", kind)
    with path.open("rb") as file:
        if kind.startswith("bare"):
            pickle.load(file)
        else:
            torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", BOMBS)
def test_a_pickle_that_would_run_code_is_refused_without_running_it(
    kind: str, npz: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    marker = tmp_path / "ran"
    path = bomb(tmp_path, marker, kind)
    assert "would run code" in refused(main, *options(path, npz))
    assert "is a pickle, which could run code" in refused(main, "--merge", path)
    with pytest.raises(CheckpointError, match="would run code"):
        read_published(path)
    with pytest.raises(CheckpointError, match="is a pickle, which could run code"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="is no checkpoint of aoft-train"):
        read_task(path, TaskKind("", "rlrr", {}, {}, (), WIDTH))
    message = "is no safetensors file" if path.suffix == ".safetensors" else "would run code"
    assert message in refused(inspect_main, path)
    assert not marker.exists()


@pytest.mark.parametrize("kind", BOMBS)
def test_an_artefact_or_adapter_that_would_run_code_is_refused_without_running_it(
    kind: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    marker = tmp_path / "ran"
    artefact = bomb(tmp_path, marker, kind).rename(tmp_path / "a.safetensors")
    line = refused(predict_main, artefact, tmp_path / "a.png")
    assert "is no safetensors file" in line
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
    artefact.rename(folder / "adapter_model.safetensors")
    assert "is no safetensors file" in refused(main, "--merge", folder)
    assert not marker.exists()


@pytest.mark.parametrize("kind", BOMBS)
def test_backbone_weights_that_would_run_code_are_refused_without_running_it(
    kind: str, pth: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    marker = tmp_path / "ran"
    path = bomb(tmp_path, marker, kind)
    line = refused(main, *options(pth, path))
    assert re.search("cannot be read as weights|which could run code: save the model", line), line
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ".ckpt"])
def test_torchscript_is_refused(
    suffix: str, script: Path, pth: Path, npz: Path, refused: Callable[..., str]
) -> None:
    path = script.rename(script.with_suffix(suffix))
    for argv in (options(path, npz), ["--merge", path], options(pth, path)):
        assert "is a TorchScript program, which is not run" in refused(main, *argv)


def test_an_npz_with_a_pickled_array_is_refused_without_running_it(
    pth: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.npz"
    arrays: dict[str, Any] = {name: t.numpy() for name, t in jax_weights(seed=0).items()}
    np.savez(path, **{**arrays, "cls": np.array([Bomb(marker)], dtype=object)})
    assert "cannot be read as weights" in refused(main, *options(pth, path))
    assert not marker.exists()


@pytest.mark.parametrize("depth", [DEPTH - 1, DEPTH + 1])
def test_an_npz_with_another_number_of_blocks_is_refused(
    depth: int, npz: Path, pth: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    with np.load(npz) as archive:
        arrays = dict(archive)
    last = f"Transformer/encoderblock_{DEPTH - 1}/"
    if depth < DEPTH:
        arrays = {n: a for n, a in arrays.items() if not n.startswith(last)}
    else:
        arrays |= {n.replace(last, f"{last[:-2]}{DEPTH}/"): a for n, a in arrays.items()}
    np.savez(tmp_path / "other.npz", **arrays)
    line = refused(main, *options(pth, tmp_path / "other.npz"))
    assert f"holds {depth} encoder blocks, but the model has {DEPTH}" in line


@pytest.mark.parametrize(
    "name",
    ["cls", "Transformer/encoder_norm/bias", "Transformer/encoderblock_1/LayerNorm_2/scale"],
)
def test_an_npz_without_one_of_its_arrays_is_refused(
    name: str, npz: Path, pth: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    with np.load(npz) as archive:
        arrays = {n: a for n, a in archive.items() if n != name}
    np.savez(tmp_path / "less.npz", **arrays)
    assert "cannot be read as weights" in refused(main, *options(pth, tmp_path / "less.npz"))


@pytest.mark.parametrize("shape", [(WIDTH - 1,), (2 * WIDTH,), (WIDTH, 2)])
def test_an_npz_with_an_array_of_another_shape_is_refused(
    shape: tuple[int, ...], npz: Path, pth: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    with np.load(npz) as archive:
        arrays = dict(archive)
    arrays["Transformer/encoder_norm/bias"] = np.zeros(shape, np.float32)
    np.savez(tmp_path / "shape.npz", **arrays)
    assert "cannot be read as weights" in refused(main, *options(pth, tmp_path / "shape.npz"))


@pytest.mark.parametrize("name", ["cls", "Transformer/encoderblock_0/LayerNorm_0/scale"])
def test_an_npz_with_a_non_finite_value_is_refused(
    name: str, npz: Path, pth: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    with np.load(npz) as archive:
        arrays = dict(archive)
    arrays[name] = np.full_like(arrays[name], np.nan)
    np.savez(tmp_path / "nan.npz", **arrays)
    line = refused(main, *options(pth, tmp_path / "nan.npz", "--to", "timm"))
    assert "nan.npz holds values that are not finite" in line


def test_an_npz_for_a_model_other_than_a_vit_is_refused(
    npz: Path, pth: Path, refused: Callable[..., str]
) -> None:
    arguments = ["--merge", pth, "--backbone", "resnet10t", "--backbone-weights", npz]
    assert "cannot be loaded from an .npz file" in refused(main, *arguments)


def test_is_torch_file_accepts_only_files_of_torch_save(
    tmp_path: Path, pth: Path, checkpoint: Path
) -> None:
    assert is_torch_file(pth)
    assert not is_torch_file(checkpoint)
    assert not is_torch_file(tmp_path)
    assert not is_torch_file(tmp_path / "nothing")
    (tmp_path / "empty").touch()
    assert not is_torch_file(tmp_path / "empty")


def test_a_zip_archive_that_torch_did_not_write_is_refused(
    npz: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    assert "is a zip archive: unpack it" in refused(main, *options(tmp_path / "photos.zip", npz))


def faulty_npz(npz: Path, path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    with np.load(npz) as archive:
        arrays = {name: archive[name] for name in archive.files}
    change(arrays)
    np.savez(path, **arrays)
    return path


NORM = "Transformer/encoderblock_0/LayerNorm_0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.update({f"{NORM}/gain": np.ones(3)}), "more"),
        (lambda arrays: arrays.update({"registers": np.ones((1, 4, 8))}), "more"),
        (lambda arrays: arrays.update({"embedding/bias": np.ones(1)}), "fewer"),
        (lambda arrays: arrays.update({"pre_logits/kernel": np.ones((8, 8))}), ""),
        (lambda arrays: arrays.update({"head/more": np.ones(8)}), ""),
    ],
)
def test_an_npz_file_must_fill_the_model_exactly(
    change: Callable[[dict[str, Any]], object],
    message: str,
    npz: Path,
    pth: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    path = faulty_npz(npz, tmp_path / "w.npz", change)
    if message:
        line = refused(main, *options(pth, path))
        assert re.search(r"holds \d+ weights of a backbone, but VisionTransformer has \d+", line)
    else:
        assert main([str(o) for o in options(pth, path)]) == 0


def test_a_published_scale_that_is_no_vector_is_refused(
    npz: Path, tmp_path: Path, refused: Any
) -> None:
    state = published_state(seed=1)
    name = next(name for name in state if name.endswith("scale_col"))
    state[name] = state[name].reshape(2, -1)
    torch.save(state, tmp_path / "a.pth")
    line = refused(main, *options(tmp_path / "a.pth", npz))
    assert f"{name} has shape (2, " in line
    assert "must be a vector" in line
