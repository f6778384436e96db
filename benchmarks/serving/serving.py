"""aoft-serve compared with the bare engine, on the same artefact and machine, taking turns.

--artefact is a merged ONNX artefact with the input pixel_values, --fleet a fleet on the same
backbone, to which --task is added --tasks times. In each round, the engine alone and the server
take turns of a few seconds: the engine in its own process, batch after batch; the server with as
many clients as fill two batches, one image per request. The cases are tensors as bytes, JPEGs, one
task of the fleet, and all its tasks mixed. The output is medians: images per second, from the end
of one batch to the end of another, their share of the preceding turn of the bare engine, p50 and
p99 in milliseconds, and the server's processor time per request. At batch 1 a single client, a bare
socket and the bare engine take turns; each runs twice, and the second run counts. added_p50 is the
difference of their medians. around_p50 is the median of a request's time without the engine's time
in the server, whose process is not that of the bare engine and may be faster or slower.

    python benchmarks/serving/serving.py --artefact vitb.onnx --fleet fleet.onnx --task task.ckpt
"""

from __future__ import annotations

import argparse
import atexit
import http.client
import io
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.isolation import SubprocessEngine
from aoft_deploy.artefacts.machine import machine
from aoft_deploy.artefacts.registry import load_artefact

TICKS = os.sysconf("SC_CLK_TCK")

BARE = """
import json, sys, time
import numpy as np
from pathlib import Path
from aoft_deploy.artefacts.engine import EngineOptions
from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.fleet.fleet import Fleet
path, batch, seconds, tasks, threads, repository = json.loads(sys.argv[1])
size = None
if tasks:
    fleet = Fleet(Path(path), threads=threads)
    for file in sorted(Path(repository).iterdir()):
        fleet.add(file)
    names = (tasks * batch)[:batch]
    size, run = fleet.preprocessing.height, lambda images: fleet.predict(images, names)
else:
    engine = load_artefact(Path(path), EngineOptions(threads=threads))
    size, run = json.loads(engine.info["preprocessing"])["size"], engine.run
images = np.random.default_rng(0).normal(size=(batch, 3, size, size)).astype(np.float32)
run(images)
run(images)
for _ in sys.stdin:
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run(images)
        times.append(time.perf_counter() - start)
    print(json.dumps(times), flush=True)
"""


class Load(NamedTuple):
    """Measurements of the clients.

    Attributes:
        rate: Images per second, between the ends of two batches.
        milliseconds: Duration of each request.
        cpu: Seconds of the server's processor time per request.
        memory: Memory of the server's process at the end, in MB.
        failed: Requests that were not answered with 200.
    """

    rate: float
    milliseconds: list[float]
    cpu: float
    memory: float
    failed: int


class Server:
    """An aoft-serve process."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "aoft_deploy.cli.serve", *map(str, arguments)]
        self.process = subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE)
        atexit.register(self.process.kill)  # a failure must leave no server behind
        assert self.process.stderr is not None
        self.port = 0
        for line in self.process.stderr:
            event = json.loads(line) if line.startswith(b"{") else {"event": line.decode()}
            self.port = event.get("port", self.port)
            if event["event"] == "ready":
                break
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def load(
        self, requests: list[tuple[str, bytes, dict[str, str]]], clients: int, seconds: float
    ) -> Load:
        """Send requests continuously over this many connections."""
        times: list[float] = []
        ends: list[float] = []
        failed = 0
        begin = time.perf_counter() + 0.5 + 0.1 * seconds  # after the batches have settled
        end = begin + seconds

        def client(number: int) -> None:
            nonlocal failed
            connection = http.client.HTTPConnection("127.0.0.1", self.port)
            turn = number
            while (start := time.perf_counter()) < end:
                address, body, headers = requests[turn % len(requests)]
                connection.request("POST", address, body, headers)
                response = connection.getresponse()
                response.read()
                if begin <= (now := time.perf_counter()):
                    ends.append(now)
                    times.append(now - start)
                    failed += response.status != 200
                turn += clients
            connection.close()

        threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        time.sleep(max(begin - time.perf_counter(), 0))
        before = self.cpu()
        for thread in threads:
            thread.join()
        spent, answers = self.cpu() - before, rate(ends, clients // 2)
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        memory = int(status.partition("VmRSS:")[2].split()[0]) / 1024
        return Load(answers, [1e3 * t for t in times], spent / len(times), memory, failed)

    def take_turns(
        self, requests: list[tuple[str, bytes, dict[str, str]]], alone: Callable[[], float], n: int
    ) -> tuple[list[float], list[float], list[float]]:
        """Milliseconds of n requests and n runs of the bare engine; of two runs each, the second.

        Third come those of the server's own engine, on which the requests waited.
        """
        served, bare, engine = [], [], []
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for turn in range(n):
                request = whole(*requests[turn % len(requests)])
                asked(connection, request)
                before = self.computed()
                served.append(1e3 * asked(connection, request))
                engine.append(1e3 * (self.computed() - before))
                bare.append(1e3 * [alone(), alone()][1])
        return served[1:], bare[1:], engine[1:]

    def computed(self) -> float:
        """Seconds of all models in the engine so far, from the server's metrics."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/v2/models/stats")
        stats = json.loads(connection.getresponse().read())["model_stats"]
        connection.close()
        times = (model["inference_stats"]["compute_infer"]["ns"] for model in stats)
        return 1e-9 * float(sum(times))

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(60)


def whole(address: str, body: bytes, headers: dict[str, str]) -> bytes:
    """The bytes of a request."""
    lines = [f"POST {address} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def asked(connection: socket.socket, request: bytes) -> float:
    """Seconds until a request is answered."""
    start, answer, size = time.perf_counter(), b"", 0
    connection.sendall(request)
    while not size or len(answer) < size:
        if not (part := connection.recv(65536)):
            raise SystemExit("The server closed the connection.")
        answer += part
        if not size and b"\r\n\r\n" in answer:
            head = answer[: answer.index(b"\r\n\r\n") + 4].lower()
            if not head.startswith(b"http/1.1 200 "):
                raise SystemExit(f"A request was answered with {head.splitlines()[0].decode()}.")
            size = len(head) + int(head.partition(b"content-length: ")[2].split()[0])
    return time.perf_counter() - start


def rate(ends: list[float], batch: int) -> float:
    """Answers per second, from the end of the first batch to the end of the last."""
    ends = sorted(ends)
    if len(ends) <= 2 * batch:
        raise SystemExit("Fewer than three batches were answered: give --seconds more.")
    return (len(ends) - batch) / (ends[-1] - ends[batch - 1])


def tensors(model: str, size: int, count: int) -> list[tuple[str, bytes, dict[str, str]]]:
    """Requests with one image each, as bytes."""
    rng, found = np.random.default_rng(1), []
    for _ in range(count):
        image = rng.normal(size=(1, 3, size, size)).astype(np.float32)
        entry = {"name": "pixel_values", "datatype": "FP32", "shape": image.shape}
        entry["parameters"] = {"binary_data_size": image.nbytes}
        text = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
        headers = {"Inference-Header-Content-Length": str(len(text))}
        found.append((f"/v2/models/{model}/infer", text + image.tobytes(), headers))
    return found


def jpegs(model: str, count: int) -> list[tuple[str, bytes, dict[str, str]]]:
    """Requests with one JPEG of 500 x 375 each, the median size of ImageNet."""
    rng, found = np.random.default_rng(2), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
        stream = io.BytesIO()
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        found.append((f"/v2/models/{model}/classify", stream.getvalue(), {}))
    return found


class Bare:
    """The engine alone, in a process that runs on request."""

    def __init__(
        self, path: Path, options: argparse.Namespace, tasks: list[str], folder: str
    ) -> None:
        given = [str(path), options.batch, options.seconds, tasks, options.threads, folder]
        self.process = subprocess.Popen(
            [sys.executable, "-c", BARE, json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self) -> list[float]:
        """Run for some time; return the seconds of each batch."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        times: list[float] = json.loads(self.process.stdout.readline())
        return times

    def stop(self) -> None:
        """End it."""
        self.process.communicate()


def rounds(
    cases: list[tuple[str, Path, list[str], Any]],
    options: argparse.Namespace,
    size: int,
    folder: str,
) -> dict[str, list[dict[str, float]]]:
    """Run all cases in turn."""
    threads = [] if options.threads is None else ["--threads", options.threads]
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for name, path, tasks, requests in cases if options.windows else []:
            label = "fleet" if tasks else "merged"
            more = ["--repository", folder] if tasks else []
            alone = Bare(path, options, tasks, folder)
            server = Server(f"{label}={path}", "--max-batch", options.batch, *threads, *more)
            for _ in range(options.windows):
                own = options.batch / statistics.median(alone.run())
                load = server.load(requests, 2 * options.batch, options.seconds)
                found.setdefault(name, []).append(row(load, own))
            server.stop()
            alone.stop()
        if options.turns:
            found.setdefault("batch 1, in turn", []).append(in_turn(options, size, threads))
    return found


def row(load: Load, own: float) -> dict[str, float]:
    """Results of a turn under load and a turn of the engine alone."""
    ranked = sorted(load.milliseconds)
    return {
        "bare": own,
        "served": load.rate,
        "share": load.rate / own,
        "p50": statistics.median(ranked),
        "p99": ranked[int(0.99 * len(ranked))],
        "cpu_ms": 1e3 * load.cpu,
        "memory_mb": load.memory,
        "failed": load.failed,
    }


def in_turn(options: argparse.Namespace, size: int, threads: list[Any]) -> dict[str, float]:
    """The time that the server adds to that of one image."""
    image = np.random.default_rng(0).normal(size=(1, 3, size, size)).astype(np.float32)
    server = Server(f"merged={options.artefact}", "--max-batch", 1, *threads)
    with SubprocessEngine(
        partial(load_artefact, options.artefact, EngineOptions(threads=options.threads))
    ) as engine:
        served, alone, own = server.take_turns(
            tensors("merged", size, 8), lambda: engine.duration((image,)).wall, options.turns + 1
        )
    server.stop()
    medians = {"bare_p50": statistics.median(alone), "p50": statistics.median(served)}
    around = statistics.median(all_ - part for all_, part in zip(served, own, strict=True))
    added = medians["p50"] - medians["bare_p50"]
    return {**medians, "added_p50": added, "around_p50": around}


def main() -> None:
    """Run all cases, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artefact", type=Path, required=True)
    parser.add_argument("--fleet", type=Path)
    parser.add_argument("--task", type=Path, help="checkpoint of the fleet's backbone")
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--windows", type=int, default=3, help="turns of both in a round; 0 for none"
    )
    parser.add_argument("--seconds", type=float, default=6, help="of a turn")
    parser.add_argument(
        "--turns", type=int, default=40, help="requests at batch 1, each round; 0: none"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    size = int(json.loads(Path(f"{options.artefact}.json").read_text())["preprocessing"]["size"])
    cases: list[tuple[str, Path, list[str], Any]] = [
        ("tensors", options.artefact, [], tensors("merged", size, 32)),
        ("JPEGs", options.artefact, [], jpegs("merged", 32)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        if options.fleet:
            names = [f"task{i}" for i in range(options.tasks)]
            for name in names:
                shutil.copy(options.task, Path(folder) / f"{name}.ckpt")
            one, mixed = tensors(names[0], size, 16), [tensors(name, size, 1)[0] for name in names]
            cases.append(("fleet, one task", options.fleet, names[:1], one))
            cases.append((f"fleet, {len(names)} tasks", options.fleet, names, mixed))
        found = rounds(cases, options, size, folder)
    result = {
        "machine": machine(options.threads),
        "onnxruntime": version("onnxruntime"),
        "cases": {
            name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            for name, rows in found.items()
        },
        "rounds": found,
    }
    for name, row in result["cases"].items():
        print(f"{name:20}", "  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
