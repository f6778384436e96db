"""The overhead of aoft-serve, LitServe, BentoML and Ray Serve, compared on the same machine.

All serve the same ONNX model, a linear map from 12 inputs to 10 outputs, so that nearly all of the
time is overhead of the server: with their own batching (``tiny``), and for the peers also without a
model (``noop``), where aoft-serve still runs the model. Each peer has its own virtual environment
in --venvs, created if it is missing. wrk (Debian: apt install wrk) sends requests over 1 and 32
connections. In each round every server is started, warmed up, measured and ended. The output is the
median of the rounds: requests per second, p50 and p99 in milliseconds, and microseconds of
processor time per request of all the server's processes.

    python benchmarks/serving/peers.py --venvs ~/.cache/peers --rounds 3
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from aoft_deploy.artefacts.spec import ExportSpec, InputSpec
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_exporters.onnx import exporter

HERE = Path(__file__).parent / "peer_servers"
DATA = [round(0.1 * i, 1) for i in range(12)]
PEERS = {
    "LitServe": ["litserve", "onnxruntime", "numpy"],
    "BentoML": ["bentoml", "onnxruntime", "numpy"],
    "Ray Serve": ["ray[serve]", "onnxruntime", "numpy"],
}
LUA = """
wrk.method = "POST"
wrk.body = '{body}'
wrk.headers["Content-Type"] = "application/json"
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("RESULT %d %f %f %f %d\\n", summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


def environment(folder: Path, name: str) -> Path:
    """The Python of a peer's environment, which is created if it is missing."""
    venv = folder / name.replace(" ", "-").lower()
    if not (venv / "made").exists():
        print(f"making {venv}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        words = [str(venv / "bin/pip"), "install", "-q", *PEERS[name]]
        if subprocess.run(words).returncode:
            raise SystemExit(
                f"{name} cannot be installed, see above: leave it out with --peers, or install "
                f"{' '.join(PEERS[name])} into {venv} and create the file {venv / 'made'}."
            )
        (venv / "made").touch()
    return venv / "bin/python"


def free_port() -> int:
    """A port that is not in use."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def command(name: str, kind: str, model: Path, port: int, venvs: Path) -> tuple[list[str], Any]:
    """The command that starts a server, and additional environment variables."""
    if name == "aoft-serve":
        words = [sys.executable, "-m", "aoft_deploy.cli.serve", f"m={model}", "--threads", "1"]
        return [*words, "--port", str(port)], {}
    python = str(environment(venvs, name))
    if name == "BentoML":
        more = {"MODEL": str(model), "KIND": kind, "BENTOML_DO_NOT_TRACK": "True"}
        words = [python, "-m", "bentoml", "serve", "bento:Model", "--host", "127.0.0.1"]
        return [*words, "-p", str(port)], more
    file = {"LitServe": "lit.py", "Ray Serve": "rays.py"}[name]
    more = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    return [python, str(HERE / file), str(model), str(port), kind], more


@contextlib.contextmanager
def served(
    name: str, kind: str, model: Path, venvs: Path, path: str, body: str
) -> Iterator[tuple[int, psutil.Process]]:
    """Context manager: a running server, ended with all its processes."""
    port = free_port()
    words, more = command(name, kind, model, port, venvs)
    process = subprocess.Popen(
        words,
        env={**os.environ, **more},
        cwd=HERE,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    mother = psutil.Process(process.pid)
    try:
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                with contextlib.closing(connection):
                    connection.request("POST", path, body, {"Content-Type": "application/json"})
                    response = connection.getresponse()
                    answer = response.read()
                if response.status == 200:
                    break
            if time.monotonic() > end or process.poll() is not None:
                raise SystemExit(f"{name} ({kind}) did not start.")
            time.sleep(0.2)
        if b"data" not in answer and not answer.startswith(b"["):
            raise SystemExit(f"{name} ({kind}) answered {answer!r}.")
        yield port, mother
    finally:
        children = mother.children(recursive=True) if process.poll() is None else []
        if process.stdin:
            process.stdin.close()
        if name != "Ray Serve":
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


def processor_seconds(mother: psutil.Process) -> float:
    """Processor time of a process and its descendants."""
    total = 0.0
    for process in [mother, *mother.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def wrk(
    url: str, script: Path, connections: int, seconds: float
) -> tuple[int, float, float, float, int]:
    """Requests, seconds, p50, p99, failures."""
    words = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "-s", str(script), url]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found = re.search(r"RESULT (\d+) (\S+) (\S+) (\S+) (\d+)", done.stdout)
    assert found, done.stdout
    count, duration, p50, p99, failed = found.groups()
    return int(count), float(duration), float(p50), float(p99), int(failed)


def one(name: str, kind: str, model: Path, options: argparse.Namespace) -> dict[str, float]:
    """Measure one server in one round."""
    if name == "aoft-serve":
        path = "/v2/models/m/infer"
        tensor = {"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 2, 2], "data": DATA}
        body = json.dumps({"inputs": [tensor]})
    else:
        nested = [DATA] if name == "BentoML" and kind == "tiny" else DATA
        path, body = "/predict", json.dumps({"data": nested})
    script = model.with_name("post.lua")
    script.write_text(LUA.replace("{body}", body))
    found: dict[str, float] = {"failed": 0}
    with served(name, kind, model, options.venvs, path, body) as (port, mother):
        url = f"http://127.0.0.1:{port}{path}"
        wrk(url, script, 32, 2)
        for connections in (1, 32):
            before = processor_seconds(mother)
            count, seconds, p50, p99, failed = wrk(url, script, connections, options.seconds)
            spent = processor_seconds(mother) - before
            found[f"c{connections} req/s"] = count / seconds
            found[f"c{connections} p50 ms"], found[f"c{connections} p99 ms"] = p50, p99
            found[f"c{connections} us/req"] = 1e6 * spent / max(count, 1)
            found["failed"] += failed
    return found


def main() -> None:
    """Measure all servers, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venvs", type=Path, required=True, help="folder for peers' environments")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument(
        "--peers",
        nargs="*",
        default=list(PEERS),
        choices=list(PEERS),
        help="none: aoft-serve alone",
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.venvs = options.venvs.absolute()
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed (Debian: apt install wrk).")
    subjects = [("aoft-serve", "tiny")]
    subjects += [(name, kind) for name in options.peers for kind in ("noop", "tiny")]
    versions = {}
    for name in options.peers:
        python = environment(options.venvs, name)
        package = PEERS[name][0].partition("[")[0]
        code = f"from importlib.metadata import version; print(version({package!r}))"
        done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
        versions[package] = done.stdout.strip()
    rounds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "tiny.onnx"
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(12, 10)).eval()
        half = (0.5, 0.5, 0.5)
        preparation = Preprocessing(2, 1.0, half, half).to_dict()
        names = [str(i) for i in range(10)]
        told = {"classes": json.dumps(names), "preprocessing": json.dumps(preparation)}
        exporter.export(net, model, ExportSpec(InputSpec(2, 2, False, half, half), told))
        for turn in range(options.rounds):
            for name, kind in subjects if turn % 2 == 0 else reversed(subjects):
                rounds.setdefault(f"{name}, {kind}", []).append(one(name, kind, model, options))
    rows = {
        name: {key: statistics.median(row[key] for row in found) for key in found[0]}
        for name, found in rounds.items()
    }
    for name in (f"{name}, {kind}" for name, kind in subjects):
        row = rows[name]
        print(f"{name:18}", "  ".join(f"{key} {value:,.4g}" for key, value in row.items()))
    if options.out:
        head = {"command": "python benchmarks/serving/peers.py", "versions": versions}
        options.out.write_text(
            json.dumps({**head, "rows": rows, "rounds": rounds}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
