"""A soak test: a server under load and faulty clients for a long time; every answer is checked.

aoft-serve with --fleet first gets requests as fast as it answers, which measures its capacity; then
80 % of that for --seconds; then 300 % for --overload seconds, each request at its own time whether
or not earlier ones are answered; then SIGTERM under load. Requests choose tasks at random, and each
answer is compared with the library's. One request in twenty is bad (not JSON, an unknown model, a
wrong shape), one thread sends half of a request and resets the connection, another removes and adds
a task. The output for each phase: requests by status as counted by the clients and by the server,
wrong answers, p50 and p99, and how fast the excess was refused; and memory, file descriptors and
threads, with the slope of the memory after the first quarter. Exits with 1 if a requirement is
violated.

    python benchmarks/serving/soak.py --fleet fleet.onnx --task task.ckpt --seconds 600
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

from aoft_deploy.fleet.fleet import Fleet

TOKEN = "a token of the soak test"
DEADLINE = 10.0
"""The server's timeout for a request, in seconds."""


class Measurements:
    """Measurements of the clients in a phase."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}
        self.late = 0.0

    def add(self, other: Measurements) -> None:
        """Add the measurements of one client."""
        self.counts.update(other.counts)
        for status, times in other.times.items():
            self.times.setdefault(status, []).extend(times)
        self.late = max(self.late, other.late)

    def milliseconds(self, status: str) -> dict[str, float]:
        """Percentiles of the requests that were answered with a status."""
        times = sorted(self.times.get(status, []))
        if not times:
            return {}
        share = {"p50": 0.5, "p99": 0.99}
        found = {name: 1e3 * times[int(part * len(times))] for name, part in share.items()}
        return {**found, "max": 1e3 * times[-1]}


class Soak:
    """One server, its clients and their measurements."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        repository = folder / "repository"
        repository.mkdir()
        shutil.copy(options.task, repository / "churned.ckpt")
        (folder / "token").write_text(TOKEN)
        command = [sys.executable, "-m", "aoft_deploy.cli.serve", str(options.fleet), "--port", "0"]
        command += ["--repository", str(repository), "--admin-token-file", str(folder / "token")]
        command += ["--follow", "0", "--threads", "1", "--timeout", str(DEADLINE)]
        command += ["--queue", str(options.queue)]
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen(command, stderr=self.log)
        while b'"ready"' not in (text := (folder / "log").read_bytes()):
            time.sleep(0.05)
        self.port = int(re.search(rb'"port":(\d+)', text)[1])  # type: ignore[index]
        fleet = Fleet(options.fleet, threads=1)
        fleet.add(options.task, "churned")
        size, rng = fleet.preprocessing.height, np.random.default_rng(0)
        self.images = rng.normal(size=(8, 3, size, size)).astype(np.float32)
        self.wanted = {
            name: np.stack([a.logits for a in fleet.predict(self.images, [name] * 8)])
            for name in fleet.tasks
        }
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.draining = False

    def body(self, image: int) -> tuple[bytes, dict[str, str]]:
        """The body and headers of a request with one image as bytes."""
        array = self.images[image : image + 1]
        entry = {"name": "pixel_values", "datatype": "FP32", "shape": array.shape}
        entry["parameters"] = {"binary_data_size": array.nbytes}
        text = json.dumps({"inputs": [entry]}).encode()
        return text + array.tobytes(), {"Inference-Header-Content-Length": str(len(text))}

    def client(self, seen: Measurements, number: int, every: float, start: float) -> None:
        """Send requests until the phase ends, every ``every`` seconds or, if 0, without pause."""
        rng, own = random.Random(number), Measurements()
        bodies = [self.body(i) for i in range(8)]
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        names, due = list(self.wanted), start
        while not self.stop.is_set():
            if every:
                if self.stop.wait(max(due - time.monotonic(), 0)):
                    break
                own.late = max(own.late, time.monotonic() - due)
                due += every
            if not self.ask(connection, rng, own, names, bodies):
                break
        connection.close()
        with self.lock:
            seen.add(own)

    def ask(
        self,
        connection: http.client.HTTPConnection,
        rng: random.Random,
        own: Measurements,
        names: list[str],
        bodies: list[tuple[bytes, dict[str, str]]],
    ) -> bool:
        """Send one request; False if the server has ended as expected."""
        name, image = rng.choice(names), rng.randrange(8)
        body, headers = bodies[image]
        allowed, path = {200, 429}, f"/v2/models/{name}/infer"
        if name == "churned":
            allowed.add(404)
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
                return False
            own.counts["refused"] += 1
            return True
        except (OSError, http.client.HTTPException):
            own.counts["lost"] += 1
            connection.close()
            return True
        status = str(response.status)
        own.times.setdefault(status, []).append(time.perf_counter() - start)
        own.counts[status] += 1
        if response.status == 200:
            logits = np.array(json.loads(content)["outputs"][0]["data"], np.float32)
            own.counts["wrong"] += not np.allclose(logits, self.wanted[name][image], atol=1e-4)
        elif response.status not in allowed and not (self.draining and response.status == 503):
            own.counts["unexpected"] += 1
        return True

    def abort(self, seen: Measurements) -> None:
        """Reset connections in the middle of requests."""
        name = next(name for name in self.wanted if name != "churned")
        head = f"POST /v2/models/{name}/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 5000\r\n\r\n{{"
        aborted = 0
        while not self.stop.wait(0.05):
            try:
                with socket.create_connection(("127.0.0.1", self.port)) as connection:
                    linger = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    connection.sendall(head.encode())
                    time.sleep(0.01)
                aborted += 1
            except OSError:
                break
        with self.lock:
            seen.counts["aborted"] += aborted

    def churn(self, seen: Measurements) -> None:
        """Remove and add a task repeatedly."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        changes = Counter[str]()
        while not self.stop.wait(0.1):
            for change in ("unload", "load", "load"):
                path = f"/v2/repository/models/churned/{change}"
                changes[self.status("POST", path, headers)] += 1
        with self.lock:
            seen.counts.update(changes)

    def status(self, method: str, path: str, headers: Any = None) -> str:
        """Send a small request; return its status."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, b"", headers or {})
            return str(connection.getresponse().status)
        except OSError:
            return "lost"
        finally:
            connection.close()

    def counted(self) -> Counter[str]:
        """Requests by status, from the server's metrics."""
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

    def phase(self, name: str, seconds: float, rate: float, clients: int) -> dict[str, Any]:
        """Run a load of this many requests per second, or as many as are answered if it is 0."""
        process, seen, before = psutil.Process(self.process.pid), Measurements(), self.counted()
        self.stop.clear()
        begin = time.monotonic() + 0.2
        workers = [
            threading.Thread(
                target=self.client,
                args=(seen, i, clients / rate if rate else 0, begin + (i / rate if rate else 0)),
            )
            for i in range(clients)
        ]
        workers += [threading.Thread(target=f, args=(seen,)) for f in (self.abort, self.churn)]
        for thread in workers:
            thread.start()
        samples = []
        while (now := time.monotonic() - begin) < seconds or len(samples) < 8:  # two per quarter
            memory = process.memory_info().rss
            samples.append((now, memory, process.num_fds(), process.num_threads()))
            time.sleep(min(0.5, seconds / 8))
        self.stop.set()
        for thread in workers:
            thread.join()
        time.sleep(0.2)
        counted = self.counted() - before
        counted["200"] -= 1  # the request for the previous count
        del counted["499"]  # clients that disconnect do not see a status
        parts = np.array_split(np.array(samples, float), 4)
        later = np.concatenate(parts[1:])
        slope = 60 * float(np.polyfit(later[:, 0], later[:, 1], 1)[0]) / 2**20
        medians = [np.median(part, axis=0) for part in (parts[1], parts[3])]
        print(f"{name}: {sum(counted.values())} requests", file=sys.stderr, flush=True)
        return {
            "requests": sum(counted.values()),
            "seconds": seconds,
            "offered a second": rate,
            "answered a second": len(seen.times.get("200", [])) / seconds,
            "clients counted": dict(sorted(seen.counts.items())),
            "server counted": dict(sorted(counted.items())),
            "same counts": all(seen.counts[s] == n for s, n in counted.items()),
            "wrong": seen.counts["wrong"],
            "unexpected": sum(seen.counts[key] for key in ("unexpected", "lost", "refused")),
            "answered ms": seen.milliseconds("200"),
            "refused ms": seen.milliseconds("429"),
            "latest start ms": 1e3 * seen.late,
            "memory MB": [samples[0][1] / 2**20, samples[-1][1] / 2**20],
            "memory MB/min": slope,
            "handles in 2nd and 4th quarter": [int(m[2]) for m in medians],
            "threads in 2nd and 4th quarter": [int(m[3]) for m in medians],
        }

    def end(self) -> dict[str, Any]:
        """Send SIGTERM under load."""
        seen = Measurements()
        self.stop.clear()
        workers = [threading.Thread(target=self.client, args=(seen, i, 0.0, 0.0)) for i in range(8)]
        for thread in workers:
            thread.start()
        time.sleep(1)
        self.draining = True
        start = time.monotonic()
        self.process.terminate()
        code = self.process.wait(60)
        seconds = time.monotonic() - start
        self.stop.set()
        for thread in workers:
            thread.join()
        events = [json.loads(x) for x in (self.folder / "log").read_bytes().splitlines()]
        return {
            "clients counted": dict(sorted(seen.counts.items())),
            "lost": seen.counts["lost"],
            "wrong": seen.counts["wrong"],
            "seconds": seconds,
            "exit code": code,
            "tracebacks": sum("traceback" in event for event in events),
        }


def faults(found: dict[str, Any]) -> list[str]:
    """The requirements that are violated."""
    steady, over, end = found["at 80 %"], found["at 300 %"], found["end"]
    wrong = [
        f"{name}: {key} is {phase[key]}"
        for name, phase in (("at 80 %", steady), ("at 300 %", over), ("end", end))
        for key in ("wrong", "unexpected", "lost", "tracebacks", "exit code")
        if phase.get(key)
    ]
    for name, phase in (("at 80 %", steady), ("at 300 %", over)):
        if not phase["same counts"]:
            wrong.append(f"{name}: clients and server counted differently")
        if phase["answered ms"]["p99"] > 1e3 * DEADLINE:
            wrong.append(f"{name}: p99 is past the deadline")
    if steady["memory MB/min"] > 0.5:
        wrong.append("memory grows")
    for key in ("handles in 2nd and 4th quarter", "threads in 2nd and 4th quarter"):
        if steady[key][1] - steady[key][0] > 2:
            wrong.append(f"{key}: {steady[key]}")
    if not over["refused ms"] or over["refused ms"]["p99"] > 100:
        wrong.append(f"excess was refused in {over['refused ms']} ms")
    return wrong


def main() -> None:
    """Run all phases, print the results, and exit with 1 if a requirement is violated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fleet", type=Path, required=True)
    parser.add_argument("--task", type=Path, required=True, help="checkpoint that comes and goes")
    parser.add_argument("--warm-up", type=float, default=10, metavar="SECONDS")
    parser.add_argument("--capacity", type=float, default=20, metavar="SECONDS")
    parser.add_argument("--seconds", type=float, default=600, help="at 80 %% of the capacity")
    parser.add_argument("--overload", type=float, default=120, metavar="SECONDS")
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        soak = Soak(options, Path(scratch))
        try:
            soak.phase("warm-up", options.warm_up, 0, 32)
            first = soak.phase("capacity", options.capacity, 0, 32)
            capacity = first["answered a second"]
            found: dict[str, Any] = {
                "command": "python benchmarks/serving/soak.py " + " ".join(sys.argv[1:]),
                "capacity": capacity,
            }
            found["at 80 %"] = soak.phase("at 80 %", options.seconds, 0.8 * capacity, 64)
            many = 4 * options.queue
            found["at 300 %"] = soak.phase("at 300 %", options.overload, 3 * capacity, many)
            found["end"] = soak.end()
        finally:
            soak.stop.set()
            soak.process.kill()  # otherwise the server would keep the script's pipes open
            soak.process.wait()
    found["faults"] = faults(found)
    print(json.dumps(found, indent=2))
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(bool(found["faults"]))


if __name__ == "__main__":
    main()
