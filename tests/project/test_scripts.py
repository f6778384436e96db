"""Every script of benchmarks/ and tools/ runs on a tiny model.

A new script must be added to one of the tables here: see ``test_every_script_is_listed``.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from checkout import ROOT
from forked import run_python
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

MODEL = ("--model", "test_vit")
ONCE = ("--rounds", "1")

ONE_BLOCK = """
import runpy, sys, timm
from functools import partial
from pathlib import Path
timm.models._registry._model_entrypoints["test_vit"] = partial(timm.models.test_vit, depth=1)
del sys.argv[0]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Code that runs a script with a test_vit of one block, which is traced quickly."""

RUNS: dict[str, tuple[str, ...]] = {
    "benchmarks/accuracy/digits.py": (
        *("--runs", "linear, random weights", "aoft-lora"),
        *("--images", "8", "--epochs", "1", "--seeds", "1", "--out", "{out}"),
    ),
    "benchmarks/export/engines.py": (
        *(*MODEL, *ONCE, "--batches", "1", "--threads", "1", "--out", "{out}"),
        *("--variants", "PyTorch", "PEFT, unmerged", "onnxruntime int8", "openvino fp32"),
    ),
    "benchmarks/export/node_profile.py": (
        *(*MODEL, "--batches", "1", "--runs", "1", "--threads", "1", "--out", "{out}"),
        *("--variants", "PyTorch", "onnxruntime fp32", "openvino fp32, 16 tasks mixed"),
    ),
    "benchmarks/export/quantisation.py": (
        *(*MODEL, *ONCE, "--batches", "1", "--threads", "1", "--calibration", "4"),
        *("--tasks", "digits", "--images", "32", "--epochs", "1", "--out", "{out}"),
        *("--variants", "ONNX Runtime int8, static, SmoothQuant", "ONNX Runtime 4-bit weights"),
    ),
    "benchmarks/export/exporting.py": (*MODEL, *ONCE, "--out", "{out}"),
    "benchmarks/export/starting.py": (
        *(*MODEL, "--small", "test_vit", *ONCE, "--tasks", "3", "--out", "{out}"),
    ),
    "benchmarks/fleet/fleet.py": (
        *(*MODEL, *ONCE, "--batches", "2", "--tasks", "1", "3", "--threads", "1"),
        *("--out", "{out}", "--variants", "merged", "fleet", "merged int8", "fleet int8"),
        *("sessions", "LoraAdapter", "torch merged", "torch fleet", "PEFT"),
    ),
    "benchmarks/fleet/forms.py": (
        *MODEL,
        *ONCE,
        "--batch",
        "2",
        "--threads",
        "1",
        "--out",
        "{out}",
    ),
    "benchmarks/fleet/paging.py": (
        *(*MODEL, "--tasks", "30", "--resident", "10", "--checkpoints", "2", "--exponents", "1"),
        *("--budgets", "0.00005", "--warm-up", "10", "--requests", "40", "--out", "{out}"),
    ),
    "benchmarks/fleet/stress.py": (
        *("--tasks", "60", "--requests", "60", "--threads", "2", "--out", "{out}"),
    ),
    "benchmarks/tuning/merging.py": (*MODEL, *ONCE, "--out", "{out}"),
    "benchmarks/accuracy/methods.py": (
        *("--runs", "{out}", "--variants", "LoRA + AOFT, rank 8", "--tasks", "digits"),
        *("--images", "8", "--epochs", "1", "--seeds", "1", "--img-size", "16"),
    ),
    "benchmarks/serving/serving.py": (
        *("--artefact", "{artefact}", "--fleet", "{fleet}", "--task", "{task}", "--tasks", "2"),
        *(*ONCE, "--windows", "1", "--seconds", "0.5", "--turns", "2", "--batch", "1"),
        *("--threads", "1", "--out", "{out}"),
    ),
    "benchmarks/serving/routing.py": (
        *("--replicas", "4", "--tasks", "50", "--requests", "400", "--resident", "5", "10"),
        *("--die", "1", "--out", "{out}"),
    ),
    "benchmarks/serving/soak.py": (
        *("--fleet", "{fleet}", "--task", "{task}", "--queue", "8", "--warm-up", "0.5"),
        *("--capacity", "2", "--seconds", "2", "--overload", "2", "--out", "{out}"),
    ),
    "benchmarks/tuning/training_step.py": (
        *(*MODEL, *ONCE, "--batch", "2", "--variants", "aoft-lora-8", "--precision", "fp32"),
        *("--out", "{out}"),
    ),
    "benchmarks/tuning/training_run.py": (
        *("--rounds", "1", "--epochs", "1", "--img-size", "16", "--out", "{out}"),
    ),
    "benchmarks/export/coverage.py": (
        "--families",
        "deit",
        "--out",
        "{out}",
        "--table",
        "{out}.md",
    ),
    "tools/pretraining/train.py": (
        *("--out", "{folder}/weights.safetensors", "--log", "{out}", "--steps", "1"),
        *("--instances", "1", "--batch", "4"),
    ),
}
"""Arguments of each script; ``{out}`` is the file for its results."""

SLOW = (
    *("engines", "exporting", "fleet", "forms", "node_profile", "quantisation"),
    *("serving", "starting"),
    *("training_step", "training_run", "methods", "coverage"),
)
STRESS = ("stress", "soak")

NOT_IN_TABLE = {
    "benchmarks/export/coverage_page.py": "a module of coverage.py",
    "benchmarks/export/engines_page.py": "tests/project/test_engines_page.py",
    "benchmarks/export/families.py": "a module of coverage.py",
    "benchmarks/export/measured.py": "a module of exporting.py and starting.py",
    "benchmarks/export/quantisers.py": "a module of quantisation.py",
    "benchmarks/export/torch_engines.py": "a module of engines.py",
    **{
        f"benchmarks/gpu/{name}.py": "tests/project/test_gpu_benchmark.py"
        for name in (
            *("__init__", "__main__", "aims", "answers", "artefacts", "commands", "machine"),
            *("models", "pack", "processes", "run", "speed", "steps", "table", "timing"),
            *("torch_speed", "training"),
        )
    },
    "benchmarks/serving/peers.py": "tested below",
    "benchmarks/serving/peer_servers/bento.py": "tested below",
    "benchmarks/serving/peer_servers/lit.py": "tested below",
    "benchmarks/serving/peer_servers/rays.py": "tested below",
    "tools/demo_animation.py": "it uses the page as tests/demo/browser do",
    "tools/demo_skills.py": "tests/project/test_demo_skills.py",
    "tools/docs_hooks.py": "tests/project/test_docs.py",
    "tools/mutants.py": "it runs the tests itself",
    "tools/package_readme.py": "tests/project/test_install.py",
    "tools/pretraining/figures.py": "a module of train.py",
    "tools/pretraining/model.py": "a module of train.py",
    "tools/pretraining/scenes.py": "a module of train.py",
    **{
        f"tools/skills/{name}.py": "tests/project/test_demo_skills.py"
        for name in (
            *("digits", "drawings", "examples", "measuring", "objects", "photographs"),
            *("pictures", "questions", "textures"),
        )
    },
    "tools/quickstart.py": "tests/project/test_readme.py",
    "tools/transcripts.py": "tests/project/test_docs.py",
}
"""Scripts that are not in the table, and why."""


def run(script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a subprocess."""
    spawns_others = Path(script).stem in ("engines", "exporting", "node_profile", "starting")
    before = ("-c", ONE_BLOCK) if MODEL[1] in arguments and not spawns_others else ()
    return run_python(*before, ROOT / script, *arguments, cwd=ROOT, env={**os.environ, **more})


def imported(script: str) -> ModuleType:
    """Import a script as a module."""
    name = f"{Path(script).stem}_script"
    spec = importlib.util.spec_from_file_location(name, ROOT / script)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str((ROOT / script).parent))  # for the modules beside it
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.path[0]
    return module


def test_every_script_is_listed() -> None:
    scripts = {
        str(path.relative_to(ROOT))
        for folder in ("benchmarks", "tools")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert scripts == set(RUNS) | set(NOT_IN_TABLE)
    assert not set(RUNS) & set(NOT_IN_TABLE)


@pytest.fixture
def inputs(artefact: Path, fleet_artefact: Path, fleet_tasks: dict[str, Path]) -> dict[str, Path]:
    """Artefacts and checkpoints, by their placeholders in the arguments."""
    return {"artefact": artefact, "fleet": fleet_artefact, "task": fleet_tasks["birds"]}


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(
            script,
            marks=[pytest.mark.slow] * (Path(script).stem in SLOW)
            + [pytest.mark.stress] * (Path(script).stem in STRESS),
        )
        for script in RUNS
    ],
)
def test_scripts_run(script: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    words = RUNS[script]
    files = request.getfixturevalue("inputs") if "{task}" in words else {}
    out = tmp_path / "figures.json"
    done = run(script, *(w.format(out=out, folder=tmp_path, **files) for w in words))
    depends_on_speed = script == "benchmarks/serving/soak.py"
    assert done.returncode == 0 or depends_on_speed, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.stdout
    if "{out}" in words:
        assert out.stat().st_size > 2
    if depends_on_speed:
        results = json.loads(out.read_text())
        end = results["end"]
        assert results["at 80 %"]["wrong"] == results["at 300 %"]["wrong"] == end["wrong"] == 0
        assert (end["exit code"], end["tracebacks"]) == (0, 0)


def test_the_fleet_benchmark_has_all_variants_of_the_published_results() -> None:
    script = imported("benchmarks/fleet/fleet.py")
    rows = json.loads((ROOT / "benchmarks/results/fleet_16.json").read_text())["rows"]
    assert {row["variant"] for row in rows} <= set(script.VARIANTS)


def test_the_pretrained_backbone_is_checked_with_linear_probes() -> None:
    done = run("tools/pretraining/train.py", "--check", "--images", "40")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["task"] for row in rows] == ["digits", "shape", "count", "orientation"]
    assert all((row["train"], row["test"]) == (20, 20) for row in rows)


def test_the_comparison_of_servers_needs_wrk(tmp_path: Path) -> None:
    words = ["--venvs", str(tmp_path), "--peers", "--seconds", "1", *ONCE]
    without_wrk = run("benchmarks/serving/peers.py", *words, PATH=str(tmp_path))
    assert (without_wrk.returncode, without_wrk.stdout) == (1, "")
    assert without_wrk.stderr == "wrk is not installed (Debian: apt install wrk).\n"
    if shutil.which("wrk"):
        done = run("benchmarks/serving/peers.py", *words)
        assert done.returncode == 0 and "aoft-serve, tiny" in done.stdout, done.stderr


def test_a_peer_that_cannot_be_installed_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = imported("benchmarks/serving/peers.py")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match=r"LitServe cannot be installed.*--peers") as ended:
        script.environment(tmp_path, "LitServe")
    assert "litserve onnxruntime numpy" in str(ended.value.code)
    assert not (tmp_path / "litserve" / "made").exists()


PEERS = {"lit": "litserve", "bento": "bentoml", "rays": "ray"}


@pytest.mark.parametrize("peer", PEERS)
def test_a_peers_script_reports_a_missing_package(peer: str, tmp_path: Path) -> None:
    (tmp_path / f"{PEERS[peer]}.py").write_text(f"raise ModuleNotFoundError('{PEERS[peer]}')")
    done = run(
        f"benchmarks/serving/peer_servers/{peer}.py",
        *("model.onnx", "0", "tiny"),
        **{"PYTHONPATH": str(tmp_path), "MODEL": "model.onnx", "KIND": "tiny"},
    )
    assert done.returncode == 1
    assert "is not installed: pip install" in done.stderr and PEERS[peer] in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peer", "name", "nested"),
    [
        pytest.param(peer, name, nested, id=peer, marks=marks)
        for peer, name, nested, marks in (
            ("lit", "LitServe", False, ()),
            ("bento", "BentoML", True, ()),
            ("rays", "Ray Serve", False, pytest.mark.stress),
        )
        if importlib.util.find_spec(PEERS[peer]) is not None
    ],
)
def test_an_installed_peer_gives_the_models_answers(
    peer: str, name: str, nested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = imported("benchmarks/serving/peers.py")
    monkeypatch.setattr(script, "environment", lambda folder, name: Path(sys.executable))
    model = write_tiny_model(tmp_path / "tiny.onnx")
    data = [script.DATA] if nested else script.DATA
    body = json.dumps({"data": data})
    with script.served(name, "tiny", model, tmp_path, "/predict", body) as (port, _):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        connection.close()
    image = np.array(script.DATA, np.float32).reshape(1, 3, 2, 2)
    (expected,) = ReferenceEvaluator(str(model)).run(None, {"pixel_values": image})
    logits = answer["data"] if isinstance(answer, dict) else answer
    np.testing.assert_allclose(np.ravel(logits), np.ravel(expected), atol=1e-5)


def write_tiny_model(path: Path) -> Path:
    """Write an ONNX model: a linear map from 12 inputs to 10 logits."""
    weights = np.random.default_rng(0).normal(size=(12, 10)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["pixel_values"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path
