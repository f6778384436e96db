import hashlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer

import aoft_deploy
from aoft_deploy.tuning.backbones import bundled

TRAIN, TEST = 200, 200


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))[: TRAIN + TEST]
    images = torch.tensor(data.images[order], dtype=torch.float32)[:, None] / 16
    images = torch.nn.functional.interpolate(images, size=64, mode="bicubic").clamp(0, 1)
    return images.expand(-1, 3, -1, -1) * 2 - 1, torch.tensor(data.target[order])


def model(**kwargs: Any) -> VisionTransformer:
    made = timm.create_model("aoft_vit_nano", pretrained=True, **kwargs)
    assert isinstance(made, VisionTransformer)
    return made.eval()


def probe(backbone: VisionTransformer, digits: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Accuracy of ridge regression on standardised class-token features."""
    images, target = digits
    with torch.inference_mode():
        z = torch.cat([backbone(x) for x in torch.split(images, 100)]).double()
    z = (z - z[:TRAIN].mean(0)) / z[:TRAIN].std(0)
    train = z[:TRAIN]
    wanted = 2 * torch.nn.functional.one_hot(target[:TRAIN]).double() - 1
    gram = train.T @ train + TRAIN * torch.eye(z.shape[1])
    guess = (z[TRAIN:] @ torch.linalg.solve(gram, train.T @ wanted)).argmax(1)
    return float((guess == target[TRAIN:]).double().mean())


def test_the_name_is_registered_with_timm_and_has_weights() -> None:
    assert timm.is_model("aoft_vit_nano")
    assert "aoft_vit_nano" in timm.list_pretrained("aoft*")


def test_registering_it_again_changes_nothing() -> None:
    before = timm.model_entrypoint("aoft_vit_nano")
    aoft_deploy.register()
    aoft_deploy.register()
    assert timm.model_entrypoint("aoft_vit_nano") is before


def test_timm_knows_it_only_once_it_is_registered() -> None:
    code = (
        "import timm, aoft_deploy; before = timm.is_model('aoft_vit_nano')\n"
        "aoft_deploy.register()\n"
        "print(before, timm.create_model('aoft_vit_nano', num_classes=3).head.out_features)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "False 3\n"


def test_the_model_is_timms_own_class() -> None:
    assert type(model(num_classes=10)) is VisionTransformer


def test_preprocessing_is_64_pixels_bicubic_without_a_crop_margin() -> None:
    config = timm.get_pretrained_cfg("aoft_vit_nano")
    assert config is not None
    assert (config.input_size, config.crop_pct) == ((3, 64, 64), 1.0)
    assert config.interpolation == "bicubic"
    assert config.mean == config.std == (0.5, 0.5, 0.5)


def test_it_has_between_two_and_three_million_parameters() -> None:
    assert 2e6 < sum(p.numel() for p in model().parameters()) < 3e6


def test_the_file_is_at_most_eight_megabytes() -> None:
    assert bundled.WEIGHTS.stat().st_size <= 8e6


def test_the_file_loads_strictly_and_is_what_create_model_loads() -> None:
    loaded = model(num_classes=0).state_dict()
    with safe_open(bundled.WEIGHTS, "pt") as file:
        assert set(file.keys()) == set(loaded)
        for name in loaded:
            stored = file.get_tensor(name)
            assert stored.dtype is torch.float16
            assert stored.isfinite().all()
            assert torch.equal(stored.float(), loaded[name])


def test_the_metadata_of_the_file_has_its_digest() -> None:
    digest = hashlib.sha256()
    with safe_open(bundled.WEIGHTS, "np") as file:
        notes = file.metadata()
        for name in sorted(file.keys()):
            digest.update(name.encode() + file.get_tensor(name).tobytes())
    assert notes["script"] == "tools/pretrain_backbone.py"  # the path of the script at that time
    assert {"seed", "steps", "images", "script_sha256", "licence"} <= set(notes)
    assert notes["sha256_of_tensors"] == digest.hexdigest()


def test_a_new_classifier_does_not_change_the_backbone() -> None:
    plain, headed = model(num_classes=0).state_dict(), model(num_classes=7).state_dict()
    assert set(headed) - set(plain) == {"head.weight", "head.bias"}
    assert headed["head.weight"].shape == (7, 192)
    assert all(torch.equal(value, headed[name]) for name, value in plain.items())


def test_timms_keyword_arguments_work() -> None:
    larger = model(num_classes=3, img_size=96, drop_path_rate=0.1)
    assert larger(torch.zeros(2, 3, 96, 96)).shape == (2, 3)


def test_features_are_the_same_every_time() -> None:
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        first, second = model(num_classes=0)(x), model(num_classes=0)(x)
    assert first.shape == (4, 192)
    assert torch.equal(first, second)


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    model(num_classes=10)


def test_a_linear_probe_on_digits_beats_random_weights_by_ten_points(
    digits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    torch.manual_seed(0)
    untrained = bundled.aoft_vit_nano().eval()
    assert probe(model(num_classes=0), digits) > probe(untrained, digits) + 0.10
