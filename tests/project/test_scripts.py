"""Every script of benchmarks/ and tools/ runs to its end on a tiny model.

A new script that stands in none of the tables here makes ``test_every_script_is_listed`` fail.
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
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

ROOT = Path(__file__).parents[2]
MODEL = ("--model", "test_vit")
ONCE = ("--rounds", "1")

RUNS: dict[str, tuple[str, ...]] = {
    "benchmarks/accuracy/digits.py": (
        *("--runs", "linear, random weights", "aoft-lora"),
        *("--images", "8", "--epochs", "1", "--seeds", "1", "--out", "{out}"),
    ),
    "benchmarks/export/engines.py": (
        *(*MODEL, *ONCE, "--batches", "1", "--threads", "1", "--out", "{out}"),
        *("--variants", "PyTorch", "PEFT, unmerged", "onnxruntime int8", "openvino fp32"),
    ),
    "benchmarks/export/exporting.py": (*MODEL, *ONCE, "--out", "{out}"),
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
    "benchmarks/export/coverage.py": (
        "--families",
        "deit",
        "--out",
        "{out}",
        "--table",
        "{out}.md",
    ),
    "tools/demo_tasks.py": (
        *("--out", "{folder}", "--tasks", "digits", "--images", "8", "--epochs", "1"),
    ),
    "tools/pretraining/train.py": (
        *("--out", "{folder}/weights.safetensors", "--log", "{out}", "--steps", "1"),
        *("--instances", "1", "--batch", "4"),
    ),
}
"""Arguments of each script; ``{out}`` is where it writes its figures."""

SLOW = (
    *("engines", "exporting", "fleet", "forms", "stress", "serving", "soak"),
    *("training_step", "methods", "coverage"),
)

ELSEWHERE = {
    "benchmarks/export/coverage_page.py": "a module of coverage.py",
    "benchmarks/export/families.py": "a module of coverage.py",
    "benchmarks/export/torch_engines.py": "a module, which engines.py runs",
    "benchmarks/serving/peers.py": "below",
    "benchmarks/serving/peer_servers/bento.py": "below",
    "benchmarks/serving/peer_servers/lit.py": "below",
    "benchmarks/serving/peer_servers/rays.py": "below",
    "tools/mutants.py": "it runs the tests",
    "tools/pretraining/figures.py": "a module of train.py",
    "tools/pretraining/model.py": "a module of train.py",
    "tools/pretraining/scenes.py": "a module of train.py",
    "tools/quickstart.py": "tests/project/test_readme.py",
}
"""Scripts that are not run by the table, and why."""


def run(script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own."""
    return subprocess.run(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
    )


def imported(script: str) -> ModuleType:
    """A script as a module."""
    name = f"{Path(script).stem}_script"
    spec = importlib.util.spec_from_file_location(name, ROOT / script)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_is_listed() -> None:
    found = {
        str(path.relative_to(ROOT))
        for folder in ("benchmarks", "tools")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert found == set(RUNS) | set(ELSEWHERE)
    assert not set(RUNS) & set(ELSEWHERE)


@pytest.fixture
def given(artefact: Path, fleet_artefact: Path, fleet_tasks: dict[str, Path]) -> dict[str, Path]:
    """What scripts take that measure an artefact."""
    return {"artefact": artefact, "fleet": fleet_artefact, "task": fleet_tasks["birds"]}


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, marks=[pytest.mark.slow] if Path(script).stem in SLOW else [])
        for script in RUNS
    ],
)
def test_scripts_run_to_their_end(
    script: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    words = RUNS[script]
    given = request.getfixturevalue("given") if "{task}" in words else {}
    out = tmp_path / "figures.json"
    done = run(script, *(w.format(out=out, folder=tmp_path, **given) for w in words))
    judged_by_time = script == "benchmarks/serving/soak.py"
    assert done.returncode == 0 or judged_by_time, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.stdout
    if "{out}" in words:
        assert out.stat().st_size > 2
    if judged_by_time:
        found = json.loads(out.read_text())
        assert found["at 80 %"]["wrong"] == found["at 300 %"]["wrong"] == found["end"]["wrong"] == 0
        assert (found["end"]["exit code"], found["end"]["tracebacks"]) == (0, 0)


def test_the_fleet_is_timed_beside_all_that_the_page_of_results_names() -> None:
    script = imported("benchmarks/fleet/fleet.py")
    rows = json.loads((ROOT / "benchmarks/results/fleet_16.json").read_text())["rows"]
    assert {row["variant"] for row in rows} <= set(script.VARIANTS)


def test_the_backbone_is_checked_by_a_probe() -> None:
    done = run("tools/pretraining/train.py", "--check", "--images", "40")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["task"] for row in rows] == ["digits", "shape", "count", "orientation"]
    assert all((row["train"], row["test"]) == (20, 20) for row in rows)


def test_servers_are_compared_where_wrk_is_there_and_refused_where_not(tmp_path: Path) -> None:
    words = ["--venvs", str(tmp_path), "--peers", "--seconds", "1", *ONCE]
    nowhere = run("benchmarks/serving/peers.py", *words, PATH=str(tmp_path))
    assert (nowhere.returncode, nowhere.stdout) == (1, "")
    assert nowhere.stderr == "wrk is not installed (Debian: apt install wrk).\n"
    if shutil.which("wrk"):
        done = run("benchmarks/serving/peers.py", *words)
        assert done.returncode == 0 and "aoft-serve, tiny" in done.stdout, done.stderr


def test_a_peer_that_cannot_be_installed_is_named(
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
def test_a_peers_script_says_what_it_lacks(peer: str, tmp_path: Path) -> None:
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
        pytest.param(peer, name, nested, id=peer)
        for peer, name, nested in (
            ("lit", "LitServe", False),
            ("bento", "BentoML", True),
            ("rays", "Ray Serve", False),
        )
        if importlib.util.find_spec(PEERS[peer]) is not None
    ],
)
def test_a_peer_that_is_installed_answers_as_the_model_does(
    peer: str, name: str, nested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = imported("benchmarks/serving/peers.py")
    monkeypatch.setattr(script, "environment", lambda folder, name: Path(sys.executable))
    model = made(tmp_path / "tiny.onnx")
    data = [script.DATA] if nested else script.DATA
    body = json.dumps({"data": data})
    with script.served(name, "tiny", model, tmp_path, "/predict", body) as (port, _):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        connection.close()
    image = np.array(script.DATA, np.float32).reshape(1, 3, 2, 2)
    (wanted,) = ReferenceEvaluator(str(model)).run(None, {"pixel_values": image})
    got = answer["data"] if isinstance(answer, dict) else answer
    np.testing.assert_allclose(np.ravel(got), np.ravel(wanted), atol=1e-5)


def made(path: Path) -> Path:
    """A linear map of 12 numbers to 10 as an ONNX file."""
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
