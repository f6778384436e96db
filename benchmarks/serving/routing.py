"""A simulation of routing: a million tasks on a thousand replicas.

Requests arrive at random, for tasks whose popularity follows Zipf's law. A replica answers one
request after the other and keeps the most recently used tasks. The policies are those that proxies
offer:

* ``least of two``: of two replicas drawn at random, the one with fewer requests;
* ``hash``: a consistent hash of the task's name (HAProxy's ``balance hash``, Envoy's ring_hash);
* ``bounded hash``: the same, but skipping replicas that hold more than --factor times the mean
  number of requests (HAProxy's and Envoy's ``hash-balance-factor``; Mirrokni and others, arXiv
  1608.01350).

After half of the counted requests, --die of the replicas end. The output for each policy: how often
the task was resident, for several sizes of a replica's memory; how long requests waited, in
multiples of the time of one request; and the hit rates of the last tenth before replicas end and of
the first tenth after.

    python benchmarks/serving/routing.py --out benchmarks/results/serving_routing.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from bisect import bisect
from collections import OrderedDict
from heapq import heappop, heappush
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

POINTS = 100
"""Points of a replica on the ring of hashes."""


class Ring:
    """Replicas at many points of a circle; a task belongs to the next point."""

    def __init__(self, replicas: int, rng: np.random.Generator) -> None:
        places = rng.random(replicas * POINTS)
        order = np.argsort(places)
        self.points: list[float] = places[order].tolist()
        self.owners: list[int] = (order % replicas).tolist()

    def next(self, place: float) -> int:
        """Index of the first point at or after a place."""
        return bisect(self.points, place) % len(self.points)


class Memory:
    """The most recently used tasks of a replica, for several sizes of memory at once."""

    def __init__(self, sizes: list[int]) -> None:
        self.kept: list[OrderedDict[int, None]] = [OrderedDict() for _ in sizes]
        self.sizes = sizes

    def ask(self, task: int) -> int:
        """Use a task; return in how many of the sizes, from the largest on, it was resident."""
        hits = 0
        for kept, size in zip(self.kept, self.sizes, strict=True):
            if task in kept:
                kept.move_to_end(task)
                hits += 1
                continue
            kept[task] = None
            if len(kept) > size:
                kept.popitem(last=False)
        return hits


def simulate(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Simulate one policy for all requests."""
    rng = np.random.default_rng(options.seed)
    replicas, tasks, requests = options.replicas, options.tasks, options.requests
    weights = np.arange(1, tasks + 1) ** -options.zipf
    cumulated = np.cumsum(weights / weights.sum())
    places = rng.random(tasks)
    ring, sizes = Ring(replicas, rng), sorted(options.resident, reverse=True)
    memories = [Memory(sizes) for _ in range(replicas)]
    free, held = (
        [0.0] * replicas,
        [0] * replicas,
    )  # when each replica is free; its number of requests
    alive, living = [True] * replicas, list(range(replicas))
    ends: list[tuple[float, int]] = []  # of requests in progress
    warm = requests // 2
    breaks = warm + (requests - warm) // 2
    window = (requests - warm) // 10
    hits = [0] * (len(sizes) + 1)
    around = {"before": [0] * (len(sizes) + 1), "after": [0] * (len(sizes) + 1)}
    waits: list[float] = []
    now = asked = 0.0
    number = 0
    while number < requests:
        count = min(1_000_000, requests - number)
        chunk = np.minimum(np.searchsorted(cumulated, rng.random(count)), tasks - 1)
        gaps = rng.exponential(1 / (options.load * len(living)), count).tolist()
        pairs = rng.random((count, 2)).tolist() if way == "least of two" else None
        where = places[chunk].tolist()
        for i, task in enumerate(chunk.tolist()):
            if number == breaks:
                for dead in range(options.die):
                    alive[dead] = False
                living = living[options.die :]
            now += gaps[i]
            while ends and ends[0][0] <= now:
                held[heappop(ends)[1]] -= 1
            if pairs:
                one, other = (living[int(p * len(living))] for p in pairs[i])
                chosen = one if held[one] <= held[other] else other
            else:
                point = ring.next(where[i])
                bound = ceil(options.factor * (len(ends) + 1) / len(living))
                while True:
                    chosen = ring.owners[point]
                    if alive[chosen] and (way == "hash" or held[chosen] < bound):
                        break
                    point = (point + 1) % len(ring.points)
                    asked += 1
            start = max(now, free[chosen])
            free[chosen] = start + 1
            held[chosen] += 1
            heappush(ends, (start + 1, chosen))
            found = memories[chosen].ask(task)
            if number >= warm:
                hits[found] += 1
                waits.append(start - now)
                if breaks - window <= number < breaks:
                    around["before"][found] += 1
                elif breaks <= number < breaks + window:
                    around["after"][found] += 1
            number += 1

    def shares(counts: list[int]) -> dict[str, float]:
        """Hit rates by size of memory; a hit in a small memory is a hit in all larger ones."""
        return {
            str(size): sum(counts[rank + 1 :]) / max(sum(counts), 1)
            for rank, size in enumerate(sizes)
        }

    p50, p99 = np.percentile(waits, [50, 99])
    return {
        "hits": shares(hits),
        "wait_p50": float(p50),
        "wait_p99": float(p99),
        "wait_max": max(waits),
        "passed_over": asked / requests,
        "hits_before_some_end": shares(around["before"]),
        "hits_after_some_end": shares(around["after"]),
    }


def main() -> None:
    """Simulate all policies, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=8_000_000)
    parser.add_argument("--resident", type=int, nargs="+", default=[1000, 2000, 10_000])
    parser.add_argument("--load", type=float, default=0.7, help="share of what replicas can answer")
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--factor", type=float, default=1.25)
    parser.add_argument("--die", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {"command": "python benchmarks/serving/routing.py " + " ".join(sys.argv[1:])}
    rows: dict[str, Any] = {}
    for way in ("least of two", "hash", "bounded hash"):
        start = time.perf_counter()
        rows[way] = simulate(way, options)
        print(f"{way} ({time.perf_counter() - start:.0f} s): {json.dumps(rows[way])}", flush=True)
    if options.out:
        options.out.write_text(json.dumps({**found, "ways": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
