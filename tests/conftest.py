"""Fixtures of all tests: a backbone of 19,000 random weights, and tasks tuned on it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import listings
import pytest
import timm
import torch
from checkpoint_metadata import with_changed_metadata
from folder_contents import folder_contents
from pictures import random_picture
from PIL import Image
from safetensors.torch import save_file
from seeding import Seeding
from served import Served
from warm import keep_operator_table

import aoft_deploy.tuning.backbones.bundled  # noqa: F401  (registers aoft_vit_nano with timm)
from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.cli.export import main as export_main
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.backbone import create_backbone
from aoft_deploy.tuning.tuned_model import TunedModel

NAME = "aoft_vit_nano"
ARGS: dict[str, Any] = {"img_size": 16, "depth": 1, "embed_dim": 32, "num_heads": 2}
"""Five tokens, one block, width 32: a ViT with one of each kind of layer."""

CLASSES = ("cat", "dog", "zürich", "two words", "日本")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSING = Preprocessing(ARGS["img_size"], crop_pct=0.9, mean=MEAN, std=STD)


def pytest_configure(config: pytest.Config) -> None:
    """Make the random numbers of all tests reproducible, and exports of small models quick."""
    config.pluginmanager.register(Seeding())
    keep_operator_table()


@pytest.fixture(scope="session")
def root(pytestconfig: pytest.Config) -> Path:
    """The root of the checkout."""
    return pytestconfig.rootpath


@pytest.fixture(scope="session", autouse=True)
def graph_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A graph cache for the tests alone, which the workers of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "graphs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AOFT_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def backbone_name() -> str:
    return NAME


@pytest.fixture(scope="session")
def backbone_args() -> dict[str, Any]:
    return dict(ARGS)


@pytest.fixture(scope="session")
def classes() -> tuple[str, ...]:
    return CLASSES


@pytest.fixture(scope="session")
def backbone_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A safetensors file with the weights of the small backbone."""
    model = timm.create_model(NAME, num_classes=0, **ARGS)
    _randomise(model, seed=1)
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def make_tuned(backbone_weights: Path) -> Callable[..., TunedModel]:
    """Function from a method and its settings to a model with random, as if trained, updates."""

    def make(method: str = "rlrr", seed: int = 2, **settings: Any) -> TunedModel:
        model, identity = create_backbone(
            NAME, num_classes=len(CLASSES), weights=backbone_weights, **ARGS
        )
        tuned = attach(model, method, seed=seed, backbone=identity, **settings)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in tuned.trained().items():
                if name.startswith("head."):  # timm initialises it with another seed
                    parameter.zero_()
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return tuned.eval()

    return make


@pytest.fixture(scope="session")
def make_checkpoint(
    make_tuned: Callable[..., TunedModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Function from a method and its settings to the model.ckpt of ``make_tuned``'s model."""

    def make(method: str = "rlrr", **settings: Any) -> Path:
        path = tmp_path_factory.mktemp(method) / "model.ckpt"
        tuned = make_tuned(method, **settings)
        save(tuned, path, classes=CLASSES, preprocessing=PREPROCESSING, training={"epochs": 3})
        return path

    return make


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """The model.ckpt of an RLRR task, which updates every kind of site."""
    return make_checkpoint("rlrr")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Nine image files of different shapes."""
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"photo {i}.png" for i in range(9)]
    for i, path in enumerate(paths):
        random_picture(20 + 3 * i, 37 - 2 * i, seed=i).save(path)
    return paths


@pytest.fixture(scope="session")
def training_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sixteen image files, other ones than ``photos``."""
    folder = tmp_path_factory.mktemp("training")
    for i in range(16):
        random_picture(30 + i, 40 - i, seed=100 + i).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., Image.Image]:
    return random_picture


@pytest.fixture(scope="session")
def artefact(
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The ONNX artefact of ``checkpoint``, exported by the command and verified with ``photos``."""
    path = tmp_path_factory.mktemp("artefact") / "task.onnx"
    options: list[Any] = ["--merge", checkpoint, "--backbone-weights", backbone_weights]
    options += ["-o", path, "--images", *photos]
    assert export_main([str(option) for option in options]) == 0
    return path


@pytest.fixture(scope="session")
def pixel_artefact(
    checkpoint: Path, backbone_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The ONNX artefact of ``checkpoint`` that takes pixels: ``--uint8``."""
    path = tmp_path_factory.mktemp("artefact") / "pixels.onnx"
    options: list[Any] = ["--merge", checkpoint, "--backbone-weights", backbone_weights]
    assert export_main([*map(str, options), "-o", str(path), "--uint8"]) == 0
    return path


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, str]]:
    return folder_contents


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Function that runs a command which must fail with one line and change no file.

    It returns the line without ``error: ``.
    """

    def check(main: Callable[[Sequence[str]], int], *argv: object) -> str:
        before = folder_contents(tmp_path)
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        line = capsys.readouterr().err
        assert code == 1
        assert line.startswith("error: ")
        assert line.endswith("\n")
        assert len(line.splitlines()) == 1, line
        assert folder_contents(tmp_path) == before
        return line.removeprefix("error: ").rstrip("\n")

    return check


@pytest.fixture(scope="session")
def with_metadata() -> Callable[..., Path]:
    return with_changed_metadata


@pytest.fixture(scope="session")
def write_vtab() -> Callable[..., Path]:
    return listings.write_vtab


@pytest.fixture(scope="session")
def write_fgvc() -> Callable[..., Path]:
    return listings.write_fgvc


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Served]]:
    """Function that starts a server with the command's arguments; it runs until the module ends."""
    started: list[Served] = []

    def start(*arguments: object, ready: bool = True, port: int = 0, shell: str = "") -> Served:
        folder = tmp_path_factory.mktemp("serve")
        started.append(Served(folder, *arguments, port=port, shell=shell))
        if ready:
            started[-1].event("ready")
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def fleet_tasks(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Checkpoints of four tasks of one method, named after the tasks, in one folder."""
    folder = tmp_path_factory.mktemp("fleet tasks")
    checkpoints = {}
    for i, name in enumerate(("pets", "birds", "zürich", "two words")):
        checkpoints[name] = folder / f"{name}.ckpt"
        shutil.copyfile(make_checkpoint("aoft-lora-star", seed=10 + i), checkpoints[name])
    return checkpoints


@pytest.fixture(scope="session")
def fleet_artefact(
    fleet_tasks: dict[str, Path], backbone_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A fleet of the first two of ``fleet_tasks``."""
    path = tmp_path_factory.mktemp("artefact") / "fleet.onnx"
    options: list[Any] = ["--fleet", *list(fleet_tasks.values())[:2], "-o", path]
    options += ["--backbone-weights", backbone_weights]
    assert export_main([str(option) for option in options]) == 0
    return path


@torch.no_grad()
def _randomise(module: torch.nn.Module, seed: int) -> None:
    """Replace initial values such as zeros and ones by random ones."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.mul_(0.5).add_(noise * (0.15 if parameter.dim() > 1 else 0.3))
