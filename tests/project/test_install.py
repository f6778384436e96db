"""Each role's installation runs that role's commands, and holds no package that it does not need.

The roles without torch are installed with pip, as a user installs them. Those with torch take
several gigabytes, so their environments link to the packages that the tests themselves run with.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterable
from email.message import Message
from email.parser import Parser
from importlib.metadata import distribution, requires
from pathlib import Path
from urllib.request import urlopen

import pytest
from checkout import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from served import Served

import aoft_deploy

pytestmark = pytest.mark.slow

LARGEST_SERVER = 350
"""Limit of ``[cpu,serve]`` with all that it needs, in megabytes."""

Packages = set[str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    run(*build, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def described(wheel: Path) -> Message:
    """The wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment to which each test adds the role that it needs."""
    return Environment(tmp_path_factory.mktemp("server"))


@pytest.fixture
def make_linked(wheel: Path, described: Message, tmp_path: Path) -> Callable[..., Environment]:
    """Function from extras to an environment of them whose packages are links."""

    def make(*extras: str) -> Environment:
        environment = Environment(tmp_path / "linked")
        environment.link(needed(described, *extras))
        pip("--python", environment.python, "install", "--no-deps", "--no-index", wheel)
        return environment

    return make


class Environment:
    """A virtual environment.

    Args:
        folder: Its folder.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.folder, self.python = folder, folder / "bin" / "python"
        (self.packages,) = folder.glob("lib/python*/site-packages")

    def install(self, wheel: Path, extras: str) -> None:
        """Install a role with pip, in the releases of constraints.txt."""
        target = f"{wheel}[{extras}]" if extras else wheel
        constraint = ("--constraint", ROOT / "constraints.txt")
        pip("--python", self.python, "install", *constraint, target)

    def link(self, names: Packages) -> None:
        """Make installed packages visible."""
        for name in names:
            installed = distribution(name)
            for file in installed.files or ():
                entry = self.packages / file.parts[0]
                if file.parts[0] not in ("..", "__pycache__") and not entry.exists():
                    entry.symlink_to(Path(str(installed.locate_file(file.parts[0]))))

    def installed(self) -> Packages:
        """Names of the packages."""
        names = (path.name.partition("-")[0] for path in self.packages.glob("*.dist-info"))
        return {canonicalize_name(name) for name in names}

    def megabytes(self) -> float:
        """Size of all packages."""
        return sum(f.stat().st_size for f in self.packages.rglob("*") if f.is_file()) / 1e6

    def command(self, name: str, *arguments: object, cwd: Path, code: int = 0) -> str:
        """Run a command; return its standard output, or its errors if it fails as expected."""
        words = [self.folder / "bin" / name, *arguments]
        done = run(*words, cwd=cwd, code=code)
        return done.stderr if code else done.stdout


def run(*words: object, cwd: Path | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a program without network access to model hubs, and check its exit code."""
    done = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def pip(*words: object) -> None:
    """Run pip."""
    run(sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", *words)


def chosen(requirements: Iterable[str], extras: Iterable[str]) -> list[Requirement]:
    """The requirements that apply here with these extras."""
    parsed = map(Requirement, requirements)
    return [
        each
        for each in parsed
        if each.marker is None or any(each.marker.evaluate({"extra": e}) for e in ("", *extras))
    ]


def needed(described: Message, *extras: str) -> Packages:
    """All packages that a role installs, by the requirements of the installed releases."""
    todo = chosen(described.get_all("Requires-Dist", []), extras)
    found: dict[str, set[str]] = {}
    while todo:
        each = todo.pop()
        name = canonicalize_name(each.name)
        if name not in found or not each.extras <= found[name]:
            found[name] = found.get(name, set()) | each.extras
            todo += chosen(requires(name) or (), found[name])
    return set(found)


def test_the_wheel_has_types_licence_bundled_files_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for package in ("aoft_deploy", "aoft_exporters", "aoft_demo"):
        assert f"{package}/py.typed" in names
    assert "aoft_deploy/tuning/backbones/weights/aoft_vit_nano.safetensors" in names
    assert "aoft_demo/results/engines.json" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    folders = {name.partition("/")[0] for name in names}
    assert folders == {"aoft_deploy", "aoft_exporters", "aoft_demo"} | {
        f"aoft_deploy-{aoft_deploy.__version__}.dist-info"
    }


def test_a_package_index_shows_links_keywords_and_a_readme_that_works_there(
    described: Message,
) -> None:
    assert described["Version"] == aoft_deploy.__version__
    assert len(described.get_all("Project-URL", [])) >= 4
    assert "Typing :: Typed" in described.get_all("Classifier", [])
    assert "timm" in described["Keywords"]
    assert described["Description-Content-Type"] == "text/markdown"
    text = str(described.get_payload())
    assert text.startswith("# aoft-deploy")
    outside_code = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    links = re.findall(r"\]\(([^)]+)\)|(?:src|href)=\"([^\"]+)\"", outside_code)
    assert links and all(re.match(r"https?://|#", one or two) for one, two in links)
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", outside_code)
    addresses = r"https://(img\.shields\.io/|github\.com/[\w-]+/[\w-]+/raw/main/docs/)"
    assert pictures and all(re.match(addresses, picture) for picture in pictures)


def test_each_extra_brings_one_onnxruntime_at_most_and_torch_only_where_it_is_used(
    described: Message,
) -> None:
    base = needed(described)
    assert base >= {"numpy", "onnx", "pillow", "safetensors"}
    for light in ("cpu", "serve", "openvino", "plots", "tensorboard"):
        assert not needed(described, light) & {"torch", "timm"}, light
    assert "onnxruntime" in needed(described, "cpu")
    for without in ("serve", "demo", "train", "openvino", "peft", "ray"):
        assert not needed(described, without) & {"onnxruntime", "onnxruntime-gpu"}, without
    assert needed(described, "demo") >= {"gradio"} | needed(described, "train")
    gpu = {each.name: each for each in chosen(described.get_all("Requires-Dist", []), ["gpu"])}
    assert gpu.keys() >= {"onnxruntime-gpu", "tensorrt-rtx"} and "onnxruntime" not in gpu
    runtime = gpu["onnxruntime-gpu"]  # with CUDA's libraries, and Attention on GPUs
    assert runtime.extras == {"cuda", "cudnn"} and not runtime.specifier.contains("1.24.9")
    everything = needed(described, "all")
    assert "onnxruntime-gpu" not in everything
    for extra in set(described.get_all("Provides-Extra", [])) - {"all", "gpu", "tensorrt"}:
        assert needed(described, extra) <= everything, extra


def test_the_role_train_and_cpu_trains_exports_and_predicts(
    make_linked: Callable[..., Environment], photos: list[Path], tmp_path: Path
) -> None:
    role = make_linked("train", "cpu")
    size = ("--img-size", "16", "--epochs", "1", "--quiet")
    role.command("aoft-train", "--data", "shape", *size, "--out", "run", cwd=tmp_path)
    role.command("aoft-export", "--merge", "run/model.ckpt", cwd=tmp_path)
    answer = role.command("aoft-predict", "run/model.onnx", photos[0], cwd=tmp_path)
    assert re.search(r"\w+ \d+\.\d%", answer)
    error = role.command("aoft-serve", "run/model.onnx", cwd=tmp_path, code=1)
    assert "run pip install 'aoft-deploy[serve]'" in error


def test_the_role_demo_and_cpu_shows_the_page(make_linked: Callable[..., Environment]) -> None:
    words = [str(make_linked("demo", "cpu").folder / "bin" / "aoft-demo"), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        address = next(found[0] for line in demo.stdout if (found := re.search(r"http:\S+", line)))
        assert "aoft" in urlopen(address).read().decode()
        demo.send_signal(signal.SIGTERM)


def test_the_base_install_inspects_checkpoints_and_artefacts(
    server: Environment, wheel: Path, checkpoint: Path, artefact: Path, tmp_path: Path
) -> None:
    server.install(wheel, "")
    assert not server.installed() & {"torch", "timm"}
    assert run(server.python, "-m", "aoft_deploy").stdout.count("\n  aoft-") == 7
    for file in (checkpoint, artefact, f"{artefact}.json"):
        assert "dog" in server.command("aoft-inspect", file, cwd=tmp_path)
    error = server.command("aoft-train", "--data", "shape", "--out", "no", cwd=tmp_path, code=1)
    assert error == "error: accelerate is not installed: run pip install 'aoft-deploy[train]'.\n"


def test_the_role_cpu_predicts_and_measures(
    server: Environment, wheel: Path, artefact: Path, photos: list[Path], tmp_path: Path
) -> None:
    server.install(wheel, "cpu")
    assert not server.installed() & {"torch", "timm"}
    answer = server.command("aoft-predict", artefact, photos[0], cwd=tmp_path)
    assert re.search(r" \d+\.\d%", answer)
    table = server.command("aoft-bench", artefact, "--rounds", "1", cwd=tmp_path)
    assert table.count(artefact.name) >= 2


def test_the_role_cpu_and_serve_serves_within_its_size(
    server: Environment,
    wheel: Path,
    artefact: Path,
    photos: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.install(wheel, "cpu,serve")
    installed = server.installed()
    assert not installed & {"torch", "timm", "scikit-learn", "accelerate", "gradio"}
    with capsys.disabled():
        print(f"\n[cpu,serve]: {len(installed)} packages, {server.megabytes():.0f} MB")
    assert server.megabytes() <= LARGEST_SERVER
    monkeypatch.setattr(sys, "executable", str(server.python))
    served = Served(tmp_path, f"animals={artefact}")
    try:
        served.event("ready")
        picture = photos[0].read_bytes()
        status, _, answer = served.ask("POST", "/v2/models/animals/classify", picture)
        assert status == 200 and b"dog" in answer
    finally:
        served.process.terminate()
        assert served.process.wait(30) == 0
