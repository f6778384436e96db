"""The commands as a user calls them, each in a new process, and the tests marked `gpu`."""

from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
import sys
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aoft_deploy.artefacts.manifest import manifest_path
from benchmarks.gpu.answers import ALLOWED
from benchmarks.gpu.artefacts import checkpoint
from benchmarks.gpu.models import pictures, small
from benchmarks.gpu.run import NotMeasured, Run

__all__ = ["as_a_user", "marked_tests"]

ROOT = Path(__file__).parents[2]


def as_a_user(run: Run) -> None:
    """aoft-predict, aoft-bench and aoft-serve with ``--device``, without PyTorch in the process."""
    model = run.artefact("small fp32")
    images = sorted(pictures(run, small(run)).iterdir())[:8]
    on_cpu = _predictions(run, model, images, "--device", "cpu")
    with run.row("aoft-predict"):
        found = _predictions(run, model, images, "--device", run.device)
        _note_difference(run, "aoft-predict", found, on_cpu)
    with run.row("aoft-predict, a fleet"):
        fleet = run.artefact("small fleet fp32")
        of_task = _predictions(run, fleet, images, "--task", "t0")
        _note_difference(run, "aoft-predict, a fleet", of_task, on_cpu)
    with run.row("aoft-bench"):
        _bench(run, model)
    with run.row("aoft-export"):
        _export(run)
    with run.row("aoft-serve"):
        _serve(run, [f"one={model}"], ["one"], images, on_cpu)
    with run.row("aoft-serve, a fleet"):
        _serve(run, [str(run.artefact("small fleet fp32"))], ["t0"], images, on_cpu)


def _command(name: str, *words: object) -> list[str]:
    return [sys.executable, "-m", f"aoft_deploy.cli.{name}", *map(str, words)]


def _output(run: Run, name: str, *words: object) -> str:
    """What a command prints.

    Raises:
        RuntimeError: It failed; the message is its last line of errors.
    """
    done = subprocess.run(
        _command(name, *words), capture_output=True, text=True, timeout=max(run.left, 1)
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise RuntimeError(lines[-1])
    if done.stderr.strip():
        print(done.stderr, file=sys.stderr)
    return done.stdout


def _predictions(run: Run, artefact: Path, images: Sequence[Path], *words: str) -> list[Any]:
    """Label and probability of each image's first class."""
    lines = _output(run, "predict", artefact, *images, "--json", *words).splitlines()
    return [json.loads(line)["classes"][0] for line in lines]


def _note_difference(run: Run, row: str, found: list[Any], expected: list[Any]) -> None:
    """Compare the first class and its probability, which is at most as far off as the logits."""
    error = max(
        abs(one["probability"] - other["probability"])
        for one, other in zip(found, expected, strict=True)
    )
    same = [one["label"] for one in found] == [other["label"] for other in expected]
    allowed = ALLOWED["fp32"]
    run.note(row, kind="parity", error=error, allowed=allowed, passed=same and error <= allowed)


def _bench(run: Run, model: Path) -> None:
    times = run.out / "aoft-bench.json"
    words = ("--rounds", "3", "--batches", *run.batches[:2], "--json", times)
    text = _output(run, "bench", model, "--device", run.device, *words)
    rows = json.loads(times.read_text())["rows"]
    run.note("aoft-bench", passed=len(rows) == 2, text=text.splitlines())


def _export(run: Run) -> None:
    """Export the small model, which is verified on the GPU too, and note its manifest's entry."""
    path, model = checkpoint(run, "small fp32")
    output = run.scratch / "verified.onnx"
    words = ["--merge", path, "-o", output, "--overwrite", "--import", "benchmarks.gpu.models"]
    words += ["--backbone-weights", model.weights] if model.weights else []
    text = _output(run, "export", *words)
    found = json.loads(manifest_path(output).read_text("utf-8"))["verification"]["gpu"]
    passed = found["verified"] or run.dry
    run.note("aoft-export", passed=passed, gpu=found, text=text.splitlines())


def _serve(
    run: Run, artefacts: list[str], models: list[str], images: Sequence[Path], expected: list[Any]
) -> None:
    """Send pictures to a server from 16 threads, read its metrics, and stop it."""
    with _server(run, artefacts) as (url, process):

        def classify(path: Path) -> Any:
            target = f"{url}/v2/models/{models[0]}/classify?top=1"
            with urllib.request.urlopen(target, path.read_bytes(), timeout=30) as answer:
                return json.load(answer)["predictions"][0][0]

        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(classify, [*images] * 8))
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
            metrics = answer.read().decode()
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
    error = max(
        abs(one["probability"] - expected[i % len(images)]["probability"])
        for i, one in enumerate(found)
    )
    gpu = [line for line in metrics.splitlines() if line.startswith("nv_gpu")]
    run.note(
        f"aoft-serve {models[0]}",
        kind="parity",
        error=error,
        allowed=ALLOWED["fp32"],
        passed=error <= ALLOWED["fp32"] and code == 0,
        exit_code=code,
        gpu_metrics=gpu,
    )


@contextmanager
def _server(run: Run, artefacts: list[str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A running aoft-serve that is ready, and its address."""
    words = ("--port", "0", "--device", run.device, "--strict")
    process = subprocess.Popen(
        _command("serve", *artefacts, *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        events: dict[str, Any] = {}
        while "ready" not in events:
            line = process.stderr.readline()
            if not line.startswith("{"):  # its log is JSON
                raise RuntimeError(f"aoft-serve ended: {line or events}")
            event = json.loads(line)
            events[event["event"]] = event
        yield f"http://127.0.0.1:{events['listening']['port']}", process
    finally:
        process.kill()
        process.communicate()


def marked_tests(run: Run) -> None:
    """The tests marked ``gpu``."""
    report = run.out / "tests.xml"
    chosen = ROOT / "tests"
    if run.dry:
        chosen /= "exporters/tensorrt/test_refit.py"
    words = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", "default", f"--rootdir={ROOT}"]
    words += [f"--junitxml={report}", "-rs", str(chosen)]
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(words,))
    process.start()
    process.join()
    if not report.exists():
        raise NotMeasured(f"pytest wrote no report and ended with {process.exitcode}: see log.txt")
    suite = ElementTree.parse(report).getroot()[0]
    counts = {k: int(suite.attrib[k]) for k in ("tests", "failures", "errors", "skipped")}
    bad = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = counts["failures"] == counts["errors"] == 0
    run.note("tests marked gpu", passed=passed, **counts, failed_tests=bad)


def _pytest(words: Sequence[str]) -> None:
    import pytest

    raise SystemExit(pytest.main([*words]))
