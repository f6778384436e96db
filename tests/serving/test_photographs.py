"""A Vision Transformer at 224 pixels answers concurrent clients with photographs correctly."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from aoft_deploy.artefacts.prediction import load_classifier
from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.cli.export import main
from aoft_deploy.data.images import read_image
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.backbone import create_backbone

NAME, HALF = "vit_tiny_patch16_224", (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    weights = folder / "backbone.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model(NAME, num_classes=0).state_dict(), weights)
    checkpoints = []
    for seed, classes in enumerate((3, 7)):
        model, identity = create_backbone(NAME, num_classes=classes, weights=weights)
        tuned = attach(model, "aoft-lora-star", backbone=identity)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in tuned.trained().values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        checkpoints.append(folder / f"task{seed}.ckpt")
        names = [f"c{i}" for i in range(classes)]
        save(
            tuned, checkpoints[-1], classes=names, preprocessing=Preprocessing(224, 0.9, HALF, HALF)
        )
    options = ["--fleet", *checkpoints, "--backbone-weights", weights, "-o", folder / "fleet.onnx"]
    assert main([str(option) for option in options]) == 0
    return folder / "fleet.onnx"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Two photographs and parts of them, as JPEG, PNG and WebP."""
    folder, found = Path(sklearn.__file__).parent / "datasets" / "images", []
    target = tmp_path_factory.mktemp("photographs")
    for name in ("china.jpg", "flower.jpg"):
        found.append((folder / name).read_bytes())
        whole = Image.open(folder / name)
        for i, box in enumerate(((0, 0, 400, 300), (200, 100, 600, 420), (50, 20, 300, 400))):
            for suffix in (".jpg", ".png", ".webp"):
                path = target / f"{i}{suffix}"
                whole.crop(box).save(path)
                found.append(path.read_bytes())
    return found


@pytest.mark.stress
def test_every_client_gets_its_own_photograph_s_answer(
    serve: Callable[..., Any], fleet: Path, photographs: list[bytes]
) -> None:
    images = [read_image(photograph) for photograph in photographs]
    tasks = ("task0", "task1")
    wanted = {task: load_classifier(fleet, task).predict(images, top=7) for task in tasks}
    server = serve(fleet, "--max-batch", 8)

    def ask(turn: int) -> None:
        task, place = tasks[turn % 2], turn * 7 % len(photographs)
        address = f"/v2/models/{task}/classify?top=7"
        status, _, content = server.ask("POST", address, photographs[place], timeout=60)
        assert status == 200
        (answer,) = json.loads(content)["predictions"]
        expected = {p.label: p[1] for p in wanted[task][place]}
        assert answer[0]["label"] == wanted[task][place][0].label
        assert len(answer) == len(expected)
        assert np.allclose(
            [p["probability"] for p in answer], [expected[p["label"]] for p in answer], atol=1e-5
        )

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(160)))
    text = server.ask("GET", "/metrics")[2].decode()
    assert 'aoft_stage_seconds_count{artefact="fleet",stage="decode"} 160' in text
    assert server.stop() == 0
