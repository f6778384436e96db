"""The application inside this process, as another server would run it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from aoft_deploy.serving.application import Application
from aoft_deploy.serving.service import Service
from aoft_deploy.serving.settings import Settings

SETTINGS = Settings(threads=1, follow=0, engine_timeout=0.2, max_batch=4)


@asynccontextmanager
async def living(application: Application) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application that was started, and is drained in the end."""
    inbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    outbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    send: Any = outbox.put
    task = asyncio.create_task(application({"type": "lifespan"}, inbox.get, send))
    await inbox.put({"type": "lifespan.startup"})
    told = await outbox.get()
    assert told["type"] == "lifespan.startup.complete", told
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
    await inbox.put({"type": "lifespan.shutdown"})
    assert (await outbox.get())["type"] == "lifespan.shutdown.complete"
    await task


def inside(
    given: list[tuple[str, Path]],
    play: Callable[[httpx.AsyncClient, Service], Awaitable[None]],
) -> None:
    async def run() -> None:
        service = Service(SETTINGS, given)
        async with living(Application(service)) as client:
            await play(client, service)
        assert service.state == "draining"

    asyncio.run(run())


def asking(value: float = 0.5) -> dict[str, Any]:
    entry = {"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 16, 16]}
    return {"inputs": [{**entry, "data": [value] * 768}]}


def test_any_server_of_asgi_runs_it(artefact: Path) -> None:
    async def play(client: httpx.AsyncClient, service: Service) -> None:
        answers = await asyncio.gather(
            *(client.post("/v2/models/a/infer", json=asking(i / 20)) for i in range(20))
        )
        logits = [answer.json()["outputs"][0]["data"] for answer in answers]
        assert len({tuple(row) for row in logits}) == 20
        assert (await client.get("/v2/health/ready")).status_code == 200
        service.state = "starting"
        answer = await client.post("/v2/models/a/infer", json=asking())
        assert (answer.status_code, answer.json()) == (503, {"error": "The server is starting."})
        assert (await client.get("/v2/health/ready")).status_code == 503
        assert (await client.get("/v2/models/a/ready")).status_code == 503
        assert (await client.get("/v2/health/live")).status_code == 200

    inside([("a", artefact)], play)


def test_what_cannot_be_served_is_told_to_the_server(tmp_path: Path) -> None:
    async def run() -> None:
        application = Application(Service(SETTINGS, [("a", tmp_path / "none.onnx")]))
        sent: list[Any] = []

        async def receive() -> dict[str, str]:
            return {"type": "lifespan.startup"}

        async def send(message: Any) -> None:
            sent.append(message)

        await application({"type": "lifespan"}, receive, send)
        (message,) = sent
        assert message["type"] == "lifespan.startup.failed"
        assert "There is no file" in message["message"]

    asyncio.run(run())


def test_a_stuck_model_is_not_ready_and_says_so_and_the_others_answer(artefact: Path) -> None:
    async def play(client: httpx.AsyncClient, service: Service) -> None:
        batcher: Any = service.models.artefacts["a"].batcher
        gate, run, stopped = threading.Event(), batcher._run, threading.Event()

        def wait(images: Any, tasks: Any) -> Any:
            assert gate.wait(10)
            return run(images, tasks)

        batcher._run, batcher._stop = wait, stopped.set
        answer = await client.post("/v2/models/a/infer", json=asking())
        assert answer.status_code == 504 and "did not answer in time" in answer.json()["error"]
        assert stopped.is_set()
        assert (await client.get("/v2/models/a/ready")).status_code == 503
        assert (await client.get("/v2/health/ready")).status_code == 503
        assert (await client.post("/v2/models/a/infer", json=asking())).status_code == 503
        index = {e["name"]: e for e in (await client.post("/v2/repository/index")).json()}
        assert index["a"]["state"] == "UNAVAILABLE" and "stuck" in index["a"]["reason"]
        assert 'aoft_engine_stuck{artefact="a"} 1' in (await client.get("/metrics")).text
        assert (await client.post("/v2/models/b/infer", json=asking())).status_code == 200
        gate.set()
        while (await client.get("/v2/health/ready")).status_code != 200:
            await asyncio.sleep(0.01)
        assert (await client.post("/v2/models/a/infer", json=asking())).status_code == 200

    inside([("a", artefact), ("b", artefact)], play)


def test_a_failure_of_our_own_is_logged_and_told_without_detail(
    artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def play(client: httpx.AsyncClient, service: Service) -> None:
        def broken(name: str) -> None:
            raise RuntimeError("/secret/path")

        service.models.find = broken  # type: ignore[method-assign, assignment]
        answer = await client.post("/v2/models/a/infer", json=asking())
        assert (answer.status_code, answer.json()) == (
            500,
            {"error": "The server failed on this request."},
        )

    inside([("a", artefact)], play)
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (event,) = [event for event in events if event["event"] == "request failed"]
    assert "/secret/path" in event["error"] and "broken" in event["traceback"]


def test_two_artefacts_with_the_same_task_are_refused(fleet_artefact: Path, artefact: Path) -> None:
    async def run() -> None:
        application = Application(Service(SETTINGS, [("one", fleet_artefact), ("pets", artefact)]))
        with pytest.raises(AssertionError, match="has models of the same names as"):
            async with living(application):
                pass

    asyncio.run(run())


def test_too_many_pictures_are_refused_before_they_are_decoded(
    artefact: Path, photos: list[Path]
) -> None:
    async def play(client: httpx.AsyncClient, service: Service) -> None:
        gate = threading.Event()
        blockers = [asyncio.create_task(service.aside(gate.wait, 10)) for _ in range(256)]
        await asyncio.sleep(0)
        answer = await client.post("/v2/models/a/classify", content=photos[0].read_bytes())
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        gate.set()
        assert all(await asyncio.gather(*blockers))
        answer = await client.post("/v2/models/a/classify", content=photos[0].read_bytes())
        assert answer.status_code == 200

    inside([("a", artefact)], play)


def test_bodies_that_were_answered_are_let_go(artefact: Path) -> None:
    async def play(client: httpx.AsyncClient, service: Service) -> None:
        pixels = np.zeros((2, 3, 16, 16), np.float32).tobytes()
        for content in (b"{}", pixels, json.dumps(asking()).encode()):
            for address in ("infer", "classify"):
                await client.post(f"/v2/models/a/{address}", content=content)
                await client.post(f"/v2/models/none/{address}", content=content)
        assert service.bodies.bytes == 0 and service.observations.in_flight == 0

    inside([("a", artefact)], play)
