"""What the tests share: a backbone of 19,000 random weights, and tuned tasks on it."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import aoft_deploy.tuning.backbones.bundled  # noqa: F401  (registers aoft_vit_nano with timm)
from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.cli.export import main as export_main
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.tuning.attaching import attach
from aoft_deploy.tuning.backbones.backbone import create_backbone
from aoft_deploy.tuning.tuned_model import TunedModel

NAME = "aoft_vit_nano"
ARGS: dict[str, Any] = {"img_size": 16, "depth": 1, "embed_dim": 32, "num_heads": 2}
"""Five tokens, one block, width 32: every layer of a ViT and nothing else."""

CLASSES = ("cat", "dog", "zürich", "two words", "日本")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSING = Preprocessing(ARGS["img_size"], crop_pct=0.9, mean=MEAN, std=STD)


def seed_by(name: str) -> None:
    """Let all random numbers of the process follow from a name."""
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Seeds:
    """A plugin that seeds every fixture and every test by its name.

    Hooks of this file are not called for fixtures of the session, which stands above this folder.
    """

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> None:
        """A fixture makes the same random numbers whatever ran before."""
        seed_by(f"{fixturedef.baseid}::{fixturedef.argname}[{getattr(request, 'param_index', 0)}]")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        """A test makes the same random numbers whatever ran before, and not its fixtures'."""
        seed_by(item.nodeid)


def pytest_configure(config: pytest.Config) -> None:
    """Seed all random numbers."""
    config.pluginmanager.register(Seeds())


@pytest.fixture(scope="session", autouse=True)
def graph_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Kept graphs of the tests lie in a folder of their own."""
    folder = tmp_path_factory.mktemp("graphs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AOFT_CACHE_DIR", str(folder))
        yield folder


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int) -> None:
    """Give every parameter its own values, so that nothing is zero or one by construction."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.mul_(0.5).add_(noise * (0.15 if parameter.dim() > 1 else 0.3))


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
    randomise(model, seed=1)
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def make_tuned(backbone_weights: Path) -> Callable[..., TunedModel]:
    """From a method and its settings to a model as if trained: no number is at its start."""

    def make(method: str = "rlrr", seed: int = 2, **settings: Any) -> TunedModel:
        model, identity = create_backbone(
            NAME, num_classes=len(CLASSES), weights=backbone_weights, **ARGS
        )
        tuned = attach(model, method, seed=seed, backbone=identity, **settings)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in tuned.trained().items():
                parameter.mul_(not name.startswith("head."))  # timm starts it with its own seed
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return tuned.eval()

    return make


@pytest.fixture(scope="session")
def make_checkpoint(
    make_tuned: Callable[..., TunedModel], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """From a method and its settings to the model.ckpt of ``make_tuned``'s model."""

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
        picture(20 + 3 * i, 37 - 2 * i, seed=i).save(path)
    return paths


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Coarse random colours under fine noise, so that a shift or a turn changes the answer."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (3, 3, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height)), np.float64)
    noisy = smooth + generator.normal(0, 12, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., Image.Image]:
    return picture


@pytest.fixture(scope="session")
def artefact(
    checkpoint: Path,
    backbone_weights: Path,
    photos: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The ONNX artefact of ``checkpoint``, exported by the command with real images."""
    path = tmp_path_factory.mktemp("artefact") / "task.onnx"
    options: list[Any] = ["--merge", checkpoint, "--backbone-weights", backbone_weights]
    options += ["-o", path, "--images", *photos]
    assert export_main([str(option) for option in options]) == 0
    return path


@pytest.fixture(scope="session")
def pixel_artefact(
    checkpoint: Path, backbone_weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """As ``artefact``, with ``--uint8``."""
    path = tmp_path_factory.mktemp("artefact") / "pixels.onnx"
    options: list[Any] = ["--merge", checkpoint, "--backbone-weights", backbone_weights]
    assert export_main([*map(str, options), "-o", str(path), "--uint8"]) == 0
    return path


def listing(folder: Path) -> dict[str, str]:
    """Every file and folder below, with the content of each file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        found[str(path.relative_to(folder))] = content
    return found


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, str]]:
    return listing


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must refuse its input in one line and leave the folder as it was.

    Returns the line without ``error: ``.
    """

    def check(main: Callable[[Sequence[str]], int], *argv: object) -> str:
        before = listing(tmp_path)
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        line = capsys.readouterr().err
        assert code == 1
        assert line.startswith("error: ")
        assert line.endswith("\n")
        assert len(line.splitlines()) == 1, line
        assert listing(tmp_path) == before
        return line.removeprefix("error: ").rstrip("\n")

    return check


def rewrite(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Copy a checkpoint with its metadata changed in place by ``change``."""
    data = source.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = json.loads(header["__metadata__"]["aoft"])
    change(metadata)
    header["__metadata__"]["aoft"] = json.dumps(metadata)
    text = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return target


@pytest.fixture(scope="session")
def with_metadata() -> Callable[..., Path]:
    return rewrite


def _colours(path: Path, label: int, number: int) -> None:
    """A small JPEG whose hue says its class."""
    rng = np.random.default_rng([label, number])
    base = np.array([40 + 60 * (label % 4), 200 - 60 * (label % 4), 30 * (label % 7)])
    noisy = base + rng.normal(0, 15, (10, 12, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="session")
def write_vtab() -> Callable[..., Path]:
    """From a root, a task's name, sizes and a number of classes to small data in VTAB's layout."""

    def write(
        root: Path, name: str, train: int = 8, val: int = 6, test: int = 6, classes: int = 2
    ) -> Path:
        sizes = {"train800": train, "val200": val, "test": test}
        lists = {
            part: [(f"images/{part}/{i:06}.jpg", i % classes) for i in range(count)]
            for part, count in sizes.items()
        }
        both = [label for part in ("train800", "val200") for _, label in lists[part]]
        lists["train800val200"] = [
            (f"images/train800val200/{i:06}.jpg", label) for i, label in enumerate(both)
        ]
        for number, (part, entries) in enumerate(lists.items()):
            for i, (image, label) in enumerate(entries):
                _colours(root / name / image, label, 1000 * number + i)
            text = "".join(f"{image} {label}\n" for image, label in entries)
            (root / name / f"{part}.txt").write_text(text)
        return root / name

    return write


@pytest.fixture(scope="session")
def write_fgvc() -> Callable[..., Path]:
    """From a root, a data set's name and lists of class ids to small data in VPT's layout."""

    def write(root: Path, name: str, images: str = "", **parts: Sequence[int | str]) -> Path:
        for part, ids in parts.items():
            entries = {f"{value}/{part}{i}.jpg": value for i, value in enumerate(ids)}
            for i, (image, value) in enumerate(entries.items()):
                _colours(root / name / images / image, len(str(value)) + ord(str(value)[-1]), i)
            (root / name / f"{part}.json").write_text(json.dumps(entries))
        return root / name

    return write


ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**18),
    "MALLOC_TRIM_THRESHOLD_": str(2**18),
}
"""The C library gives back what is free, so that a process has little more than it holds."""

HOST = ("/tmp", "traceback", ".py", "onnxruntime", "0x")
"""What no client is told, in lower case."""


class Served:
    """An aoft-serve process of the tests, on this machine alone, in a session of its own.

    Args:
        folder: Where its log goes.
        arguments: Of the command.
        port: Where it listens; 0 takes a free one.
        shell: Command of a shell before it, such as ``ulimit``.
    """

    def __init__(self, folder: Path, *arguments: object, port: int = 0, shell: str = "") -> None:
        self.log_file = folder / "serve.log"
        command = [sys.executable, "-m", "aoft_deploy.cli.serve", *map(str, arguments)]
        if shell:
            command = ["bash", "-c", f'{shell} && exec "$0" "$@"', *command]
        environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1"}
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(port), "--threads", "1"],
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self._checked = 0
        self.port = int(self.event("listening")["port"])

    @property
    def events(self) -> list[dict[str, Any]]:
        """Whole lines of its log."""
        lines = self.log_file.read_bytes().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line[:1] == b"{" and line.endswith(b"\n")]

    def event(self, name: str, seconds: float = 30) -> dict[str, Any]:
        """Wait until the log tells of it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = [event for event in self.events if event["event"] == name]
            if found:
                return found[-1]
            assert self.process.poll() is None, self.log_file.read_text()
            time.sleep(0.01)
        raise AssertionError(f"no {name}: {self.log_file.read_text()}")

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 30,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers in lower case, and content of a request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return response.status, found, response.read()
        finally:
            connection.close()

    def refused(self, *request: Any, **more: Any) -> tuple[int, str]:
        """Status and sentence of a request that fails in the protocol's form."""
        return self.sentence(*self.ask(*request, **more))

    @staticmethod
    def sentence(status: int, headers: Mapping[str, str], content: bytes) -> tuple[int, str]:
        """Status and sentence of an answer in the form of failures."""
        assert status >= 400, content
        assert headers["content-type"] == "application/json"
        found = json.loads(content)
        assert list(found) == ["error"] and isinstance(found["error"], str) and found["error"]
        assert not any(word in found["error"].lower() for word in HOST), found
        return status, found["error"]

    def logits(self, model: str, images: np.ndarray[Any, Any], **more: Any) -> Any:
        """Logits of a batch, asked with bytes."""
        name, kind = ("image", "UINT8") if images.dtype == np.uint8 else ("pixel_values", "FP32")
        size = {"binary_data_size": images.nbytes}
        entry = {"name": name, "datatype": kind, "shape": images.shape, "parameters": size}
        text = json.dumps({"inputs": [entry], **more}).encode()
        headers = {"Inference-Header-Content-Length": str(len(text))}
        address = f"/v2/models/{model}/infer"
        status, _, content = self.ask("POST", address, text + images.tobytes(), headers)
        assert status == 200, content
        (output,) = json.loads(content)["outputs"]
        return np.array(output["data"], np.float32).reshape(output["shape"])

    def check(self) -> None:
        """Assert that it lives, is ready, and has told JSON alone and no failure of its own.

        Only of an engine that failed it tells where.
        """
        assert self.process.poll() is None
        assert self.ask("GET", "/v2/health/ready")[0] == 200
        whole, _, _ = self.log_file.read_bytes()[self._checked :].rpartition(b"\n")
        self._checked += len(whole)
        for line in whole.splitlines():
            assert b"Traceback" not in line
            event = json.loads(line) if line else {"event": ""}
            assert event["event"] not in ("request failed", "library", "following files failed")
            assert "traceback" not in event or event["event"] == "engine failed"

    def memory(self) -> int:
        """Bytes of memory that it has now."""
        text = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @contextmanager
    def within(self, extra: int) -> Iterator[None]:
        """Assert that it has for no moment more memory than that beside what it has now."""
        folder = Path(f"/proc/{self.process.pid}")
        (folder / "clear_refs").write_text("5")  # forgets the peak
        before = self.memory()
        yield
        lines = (folder / "status").read_text().splitlines()
        (peak,) = (1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        assert peak - before < extra

    def session(self) -> set[int]:
        """Processes of its session, which those that it leaves behind stay in."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(ProcessLookupError, PermissionError):
                if os.getsid(int(folder.name)) == self.process.pid:
                    found.add(int(folder.name))
        return found

    def stop(self, number: int = signal.SIGTERM, seconds: float = 15) -> int:
        """Send a signal and wait for the end; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def kill(self) -> None:
        """End it whatever it does."""
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Served]]:
    """Start a server with the command's arguments; it ends with the tests of the module."""
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
    """Four tasks of one method, as checkpoints of their names in one folder."""
    folder = tmp_path_factory.mktemp("fleet tasks")
    found = {}
    for i, name in enumerate(("pets", "birds", "zürich", "two words")):
        found[name] = folder / f"{name}.ckpt"
        found[name].write_bytes(make_checkpoint("aoft-lora-star", seed=10 + i).read_bytes())
    return found


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
