"""A server for a long time under load that misbehaves, and whether every answer was right.

aoft-serve with --fleet runs beside --clients closed-loop clients that ask its tasks at random and
compare each answer with the library's. One request in twenty is bad (no JSON, an unknown model, a
wrong shape), another thread sends half of a request and resets the connection, another takes a task
out and in. At the end it is told to end under load. Printed: requests by status as the clients and
as the server counted them, wrong answers, p50 and p99, and memory, file handles and threads with
memory's slope after the first quarter. Ends with 1 where something is not as it must be.

    python benchmarks/serving_soak.py --fleet fleet.onnx --task task.ckpt --seconds 600
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from aoft_deploy.fleet import Fleet

TOKEN = "a token of the soak test"


class Soak:
    """One server, its clients and what they saw."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        repository = folder / "repository"
        repository.mkdir()
        shutil.copy(options.task, repository / "churned.ckpt")
        (folder / "token").write_text(TOKEN)
        command = [sys.executable, "-m", "aoft_deploy.cli.serve", str(options.fleet), "--port", "0"]
        command += ["--repository", str(repository), "--admin-token-file", str(folder / "token")]
        command += ["--follow", "0", "--threads", "1", "--timeout", "10"]
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen(command, stderr=self.log)
        while b'"ready"' not in (text := (folder / "log").read_bytes()):
            time.sleep(0.05)
        self.port = int(re.search(rb'"port":(\d+)', text)[1])  # type: ignore[index]
        fleet = Fleet(options.fleet, threads=1)
        fleet.add(options.task, "churned")
        size, rng = fleet.preprocessing.size, np.random.default_rng(0)
        self.images = rng.normal(size=(8, 3, size, size)).astype(np.float32)
        self.wanted = {
            name: np.stack(fleet.predict(self.images, [name] * 8)) for name in fleet.tasks
        }
        self.counts: Counter[str] = Counter()
        self.times: list[float] = []
        self.samples: list[tuple[float, int, int, int]] = []
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.draining = False

    def body(self, image: int) -> tuple[bytes, dict[str, str]]:
        """A request with one image as bytes."""
        array = self.images[image : image + 1]
        entry = {"name": "pixel_values", "datatype": "FP32", "shape": array.shape}
        entry["parameters"] = {"binary_data_size": array.nbytes}
        text = json.dumps({"inputs": [entry]}).encode()
        return text + array.tobytes(), {"Inference-Header-Content-Length": str(len(text))}

    def client(self, number: int) -> None:
        """Ask until told to stop."""
        rng, counts, times = random.Random(number), Counter[str](), list[float]()
        bodies = [self.body(i) for i in range(8)]
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        names = list(self.wanted)
        while not self.stop.is_set():
            name, image = rng.choice(names), rng.randrange(8)
            body, headers = bodies[image]
            allowed, path = {200}, f"/v2/models/{name}/infer"
            if name == "churned":
                allowed = {200, 404}
            if rng.random() < 0.05:
                fault = rng.randrange(3)
                body = (b"{oops", body, body[:-4])[fault]
                path = "/v2/models/nobody/infer" if fault == 1 else path
                headers = {} if fault == 0 else headers
                allowed = {400, 404}
            start = time.perf_counter()
            try:
                connection.request("POST", path, body, headers)
                response = connection.getresponse()
                content = response.read()
            except ConnectionRefusedError:
                if self.draining:
                    break
                counts["refused"] += 1
                continue
            except (OSError, http.client.HTTPException):
                counts["lost"] += 1
                connection.close()
                continue
            times.append(time.perf_counter() - start)
            counts[str(response.status)] += 1
            if response.status == 200:
                logits = np.array(json.loads(content)["outputs"][0]["data"], np.float32)
                counts["wrong"] += not np.allclose(logits, self.wanted[name][image], atol=1e-4)
            elif response.status not in allowed and not (self.draining and response.status == 503):
                counts["unexpected"] += 1
        connection.close()
        with self.lock:
            self.counts.update(counts)
            self.times += times

    def abort(self) -> None:
        """Go away in the middle of requests."""
        name = next(name for name in self.wanted if name != "churned")
        head = f"POST /v2/models/{name}/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 5000\r\n\r\n{{"
        while not self.stop.wait(0.05):
            try:
                with socket.create_connection(("127.0.0.1", self.port)) as connection:
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    connection.sendall(head.encode())
                    time.sleep(0.01)
            except OSError:
                return

    def churn(self) -> None:
        """Take a task out and in."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        changes = Counter[str]()
        while not self.stop.wait(0.1):
            for change in ("unload", "load", "load"):
                if self.draining:
                    return
                path = f"/v2/repository/models/churned/{change}"
                changes[self.status("POST", path, headers)] += 1
        with self.lock:
            self.counts.update(changes)

    def status(self, method: str, path: str, headers: Any = None) -> str:
        """Status of a small request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, b"", headers or {})
            return str(connection.getresponse().status)
        except OSError:
            return "lost"
        finally:
            connection.close()

    def counted(self) -> Counter[str]:
        """Inference requests by status as the server counted them."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        found = Counter[str]()
        for status, count in re.findall(
            r'^aoft_requests_total\{[^}]*status="(\d+)"\} (\S+)', text, re.M
        ):
            found[status] += int(float(count))
        return found

    def run(self) -> dict[str, Any]:
        """Everything."""
        process = psutil.Process(self.process.pid)
        workers = [
            threading.Thread(target=self.client, args=(i,)) for i in range(self.options.clients)
        ]
        others = [threading.Thread(target=self.abort), threading.Thread(target=self.churn)]
        for thread in workers + others:
            thread.start()
        begin = time.monotonic()
        while (now := time.monotonic() - begin) < self.options.seconds:
            memory = process.memory_info().rss
            self.samples.append((now, memory, process.num_fds(), process.num_threads()))
            time.sleep(0.5)
        self.stop.set()
        for thread in workers + others:
            thread.join()
        time.sleep(0.2)
        seen, counted = Counter(self.counts), self.counted()
        times = sorted(self.times)
        self.stop.clear()
        workers = [threading.Thread(target=self.client, args=(i,)) for i in range(8)]
        for thread in workers:
            thread.start()
        time.sleep(1)
        self.draining = True
        self.process.terminate()
        code = self.process.wait(60)
        self.stop.set()
        for thread in workers:
            thread.join()
        later = [s for s in self.samples if s[0] > self.options.seconds / 4]
        seconds, memory, handles, threads = np.array(later, float).T
        events = [json.loads(x) for x in (self.folder / "log").read_bytes().splitlines()]
        return {
            "command": "python benchmarks/serving_soak.py " + " ".join(sys.argv[1:]),
            "requests": sum(n for s, n in seen.items() if s.isdecimal()),
            "clients counted": dict(sorted(seen.items())),
            "server counted": dict(sorted(counted.items())),
            "wrong": self.counts["wrong"],
            "unexpected": self.counts["unexpected"] + seen["lost"] + seen["refused"],
            "lost while it drained": self.counts["lost"] - seen["lost"],
            "exit code": code,
            "p50 ms": 1e3 * times[len(times) // 2],
            "p99 ms": 1e3 * times[int(0.99 * len(times))],
            "memory MB": [self.samples[0][1] / 2**20, self.samples[-1][1] / 2**20],
            "memory MB/min": 60 * float(np.polyfit(seconds, memory, 1)[0]) / 2**20,
            "handles": [int(handles.min()), int(handles.max())],
            "threads": [int(threads.min()), int(threads.max())],
            "tracebacks": sum("traceback" in event for event in events),
            "same counts": all(
                seen[status] == counted[status] for status in set(counted) - {"499"}
            ),
        }


def main() -> None:
    """Run, print, and end with 1 where something is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fleet", type=Path, required=True)
    parser.add_argument("--task", type=Path, required=True, help="checkpoint that comes and goes")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = Soak(options, Path(scratch)).run()
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    good = not any(
        result[key] for key in ("wrong", "unexpected", "lost while it drained", "tracebacks")
    )
    good = good and result["exit code"] == 0 and result["same counts"]
    sys.exit(int(not good or result["memory MB/min"] > 0.5))


if __name__ == "__main__":
    main()
