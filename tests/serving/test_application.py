"""The ASGI application, run in this process as another server would run it."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
import torch
from faulty_model import metadata_of
from numpy.typing import NDArray

from aoft_deploy.artefacts.registry import load_artefact
from aoft_deploy.checkpoints.backbone_source import BackboneSource
from aoft_deploy.checkpoints.checkpoint import save
from aoft_deploy.checkpoints.opening import open_checkpoint
from aoft_deploy.cli.export import main as export_main
from aoft_deploy.data.images import read_image
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.serving.batching.worker import Replica
from aoft_deploy.serving.endpoints.application import Application
from aoft_deploy.serving.service import Service
from aoft_deploy.serving.settings import Settings

PREPROCESSING = Preprocessing(
    16, crop_pct=0.9, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
SETTINGS = Settings(threads=1, follow=0, engine_timeout=0.2, max_batch=4)


@asynccontextmanager
async def living(application: Application) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a started application, which is drained at the end."""
    inbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    outbox: asyncio.Queue[dict[str, str]] = asyncio.Queue()
    send: Any = outbox.put
    task = asyncio.create_task(application({"type": "lifespan"}, inbox.get, send))
    await inbox.put({"type": "lifespan.startup"})
    message = await outbox.get()
    assert message["type"] == "lifespan.startup.complete", message
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
    await inbox.put({"type": "lifespan.shutdown"})
    assert (await outbox.get())["type"] == "lifespan.shutdown.complete"
    await task


def inside(
    given: list[tuple[str, Path]],
    scenario: Callable[[httpx.AsyncClient, Service], Awaitable[None]],
) -> None:
    async def run() -> None:
        service = Service(SETTINGS, given)
        async with living(Application(service)) as client:
            await scenario(client, service)
        assert service.state == "draining"

    asyncio.run(run())


def asking(value: float = 0.5) -> dict[str, Any]:
    entry = {"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 16, 16]}
    return {"inputs": [{**entry, "data": [value] * 768}]}


def test_another_asgi_server_can_run_the_application(artefact: Path) -> None:
    async def scenario(client: httpx.AsyncClient, service: Service) -> None:
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

    inside([("a", artefact)], scenario)


def test_a_failed_start_is_reported_to_the_asgi_server(tmp_path: Path) -> None:
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


def test_a_stuck_model_is_not_ready_and_the_others_answer(artefact: Path) -> None:
    async def scenario(client: httpx.AsyncClient, service: Service) -> None:
        batcher: Any = service.models.artefacts["a"].batcher
        (worker,) = batcher._workers
        gate, run, stopped = threading.Event(), worker.replica.run, threading.Event()

        def wait(images: Any, tasks: Any) -> Any:
            assert gate.wait(10)
            return run(images, tasks)

        worker.replica = Replica(wait, stop=stopped.set)
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

    inside([("a", artefact), ("b", artefact)], scenario)


def test_an_internal_error_is_logged_and_answered_without_detail(
    artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(client: httpx.AsyncClient, service: Service) -> None:
        def broken(*_: str) -> None:
            raise RuntimeError("/secret/path")

        service.models.find = broken  # type: ignore[method-assign, assignment]
        answer = await client.post("/v2/models/a/infer", json=asking())
        assert (answer.status_code, answer.json()) == (
            500,
            {"error": "The server failed on this request."},
        )

    inside([("a", artefact)], scenario)
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


def test_too_many_images_are_refused_before_they_are_decoded(
    artefact: Path, photos: list[Path]
) -> None:
    async def scenario(client: httpx.AsyncClient, service: Service) -> None:
        gate = threading.Event()
        blockers = [asyncio.create_task(service.in_pool(gate.wait, 10)) for _ in range(256)]
        await asyncio.sleep(0)
        answer = await client.post("/v2/models/a/classify", content=photos[0].read_bytes())
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        gate.set()
        assert all(await asyncio.gather(*blockers))
        answer = await client.post("/v2/models/a/classify", content=photos[0].read_bytes())
        assert answer.status_code == 200

    inside([("a", artefact)], scenario)


def test_answered_bodies_are_released(artefact: Path) -> None:
    async def scenario(client: httpx.AsyncClient, service: Service) -> None:
        pixels = np.zeros((2, 3, 16, 16), np.float32).tobytes()
        for content in (b"{}", pixels, json.dumps(asking()).encode()):
            for address in ("infer", "classify"):
                await client.post(f"/v2/models/a/{address}", content=content)
                await client.post(f"/v2/models/none/{address}", content=content)
        assert service.bodies.bytes == 0 and service.observations.in_flight == 0

    inside([("a", artefact)], scenario)


def until(true: Callable[[], bool]) -> Awaitable[None]:
    """Wait for a condition."""

    async def waiting() -> None:
        while not true():
            await asyncio.sleep(0.001)

    return waiting()


class Gate:
    """Blocks a batcher's engine until it is opened."""

    def __init__(self, batcher: Any) -> None:
        (worker,) = batcher._workers
        self.reached, self._opened = threading.Event(), threading.Event()
        self._run, worker.replica = worker.replica.run, Replica(self)

    def __call__(self, images: Any, tasks: Any) -> Any:
        found = list(self._run(images, tasks))
        self.reached.set()
        assert self._opened.wait(60)
        return found

    async def open(self) -> None:
        self._opened.set()


def serving(
    given: list[tuple[str, Path]],
    scenario: Callable[[httpx.AsyncClient, Service], Awaitable[None]],
    **settings: Any,
) -> None:
    async def run() -> None:
        options = {"threads": 1, "follow": 0, "max_batch": 4, "grace": 1.0, **settings}
        service = Service(Settings(**options), given)
        async with living(Application(service)) as client:
            await scenario(client, service)

    asyncio.run(run())


def ranked_by(logits: NDArray[np.float32], classes: Sequence[str]) -> list[str]:
    return [classes[i] for i in np.argsort(-logits, kind="stable")]


@pytest.fixture(scope="module")
def versions(
    make_tuned: Callable[..., Any],
    classes: tuple[str, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[Path, tuple[str, ...]]]:
    """Two versions of a task: different parameters, the same classes in different order."""
    folder, found = tmp_path_factory.mktemp("versions"), []
    for seed, step in ((21, 1), (22, -1)):
        path, ordered = folder / f"{seed}.ckpt", classes[::step]
        save(
            make_tuned("aoft-lora-star", seed=seed),
            path,
            classes=ordered,
            preprocessing=PREPROCESSING,
        )
        found.append((path, ordered))
    return found


@pytest.fixture(scope="module")
def merged_versions(
    versions: list[tuple[Path, tuple[str, ...]]],
    backbone_weights: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[Path, tuple[str, ...]]]:
    folder, found = tmp_path_factory.mktemp("merged"), []
    for path, classes in versions:
        output = folder / f"{path.stem}.onnx"
        options = ["--merge", path, "--backbone-weights", backbone_weights, "-o", output]
        assert export_main([str(option) for option in options]) == 0
        found.append((output, classes))
    return found


def expected(path: Path, weights: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits by PyTorch, of a checkpoint that is not merged."""
    tuned, _ = open_checkpoint(path, BackboneSource(weights=weights))
    with torch.inference_mode():
        found: NDArray[np.float32] = tuned.eval()(torch.from_numpy(images)).numpy()
    return found


def many(images: NDArray[np.float32], top: int = 5) -> dict[str, Any]:
    """A request for the best classes of each image."""
    entry = {"name": "pixel_values", "datatype": "FP32", "shape": list(images.shape)}
    output = {"name": "logits", "parameters": {"classification": top}}
    return {"inputs": [{**entry, "data": images.ravel().tolist()}], "outputs": [output]}


def labels(answer: httpx.Response) -> list[list[str]]:
    assert answer.status_code == 200, answer.text
    (output,) = answer.json()["outputs"]
    rows = np.reshape(output["data"], output["shape"])
    return [[text.split(":")[2] for text in row] for row in rows]


@pytest.mark.parametrize("activation", ["sigmoid", "none"])
def test_images_are_answered_as_the_activation_says_and_tensors_with_logits(
    activation: str, artefact: Path, classes: tuple[str, ...], photos: list[Path], tmp_path: Path
) -> None:
    model = onnx.load(artefact)
    changed = metadata_of(artefact) | {"activation": activation}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, changed)
    onnx.save(model, tmp_path / "task.onnx")
    image = PREPROCESSING(read_image(photos[0]))[None]
    logits = dict(zip(classes, load_artefact(artefact).run(image)[0].tolist(), strict=True))

    async def scenario(client: httpx.AsyncClient, service: Service) -> None:
        photo = photos[0].read_bytes()
        answer = await client.post("/v2/models/task/classify", content=photo)
        (found,) = answer.json()["predictions"]
        if activation == "sigmoid":
            positive = [name for name, logit in logits.items() if logit > 0]
            assert {p["label"] for p in found} == set(positive)
            for p in found:
                assert p["probability"] == pytest.approx(1 / (1 + np.exp(-logits[p["label"]])))
            answer = await client.post("/v2/models/task/classify?top=4", content=photo)
            assert len(answer.json()["predictions"][0]) == 4
        else:
            wanted = [{"label": name, "value": pytest.approx(x)} for name, x in logits.items()]
            assert found == wanted
        config = (await client.get("/v2/models/task/config")).json()
        assert config["parameters"] == {"activation": {"string_value": activation}}
        ((best, *_),) = labels(await client.post("/v2/models/task/infer", json=many(image)))
        assert best == max(logits, key=lambda name: logits[name])

    serving([("task", tmp_path / "task.onnx")], scenario)


@pytest.mark.parametrize("address", ["infer", "classify"])
@pytest.mark.parametrize("kind", ["fleet", "merged"])
def test_labels_belong_to_the_version_that_computed_the_logits(
    kind: str,
    address: str,
    versions: list[tuple[Path, tuple[str, ...]]],
    merged_versions: list[tuple[Path, tuple[str, ...]]],
    fleet_artefact: Path,
    backbone_weights: Path,
    photos: list[Path],
    tmp_path: Path,
) -> None:
    images = np.random.default_rng(5).normal(size=(6, 3, 16, 16)).astype(np.float32)
    photo = np.stack([PREPROCESSING(read_image(photos[0]))])

    def expected_labels(version: int, pictures: NDArray[np.float32]) -> list[list[str]]:
        path, classes = versions[version]
        return [ranked_by(row, classes) for row in expected(path, backbone_weights, pictures)]

    async def ask(client: httpx.AsyncClient) -> list[list[str]]:
        if address == "infer":
            return labels(await client.post("/v2/models/task/infer", json=many(images)))
        answer = await client.post("/v2/models/task/classify", content=photos[0].read_bytes())
        return [[p["label"] for p in row] for row in answer.json()["predictions"]]

    given = images if address == "infer" else photo
    assert expected_labels(0, given) != expected_labels(1, given)
    fleet = kind == "fleet"
    files = versions if fleet else merged_versions
    path = tmp_path / ("task.ckpt" if fleet else "task.onnx")
    shutil.copy(files[0][0], path)

    async def scenario(client: httpx.AsyncClient, service: Service) -> None:
        models = service.models
        for version in (0, 1, 0, 1):
            other = 1 - version
            gate = Gate(models.find("task").artefact.batcher)
            asked = asyncio.create_task(ask(client))
            await asyncio.to_thread(gate.reached.wait)
            shutil.copy(files[other][0], path)
            await service.repository.load("task")  # after the engine, before the classes are read
            await gate.open()
            assert await asked == expected_labels(version, given)
            assert await ask(client) == expected_labels(other, given)

    serving([("fleet", fleet_artefact)] if fleet else [], scenario, repository=tmp_path)


def test_a_request_that_runs_in_parts_is_answered_by_one_version(
    versions: list[tuple[Path, tuple[str, ...]]],
    fleet_artefact: Path,
    backbone_weights: Path,
    tmp_path: Path,
) -> None:
    images = np.random.default_rng(6).normal(size=(11, 3, 16, 16)).astype(np.float32)
    shutil.copy(versions[0][0], tmp_path / "task.ckpt")

    async def scenario(client: httpx.AsyncClient, service: Service) -> None:
        fleet: Any = service.models.find("task").artefact.fleet
        (only,) = fleet.fleets
        run, rows = only._engine.run, list[int]()

        def exchanging(part: Any, *rest: Any) -> Any:
            rows.append(len(part))
            fleet.add(versions[len(rows) % 2][0], "task")
            return run(part, *rest)

        only._engine.run = exchanging
        found = labels(await client.post("/v2/models/task/infer", json=many(images)))
        path, classes = versions[0]
        logits = expected(path, backbone_weights, images)
        assert found == [ranked_by(row, classes) for row in logits]
        assert rows == [4, 4, 3]  # max_batch bounds each call of the engine

    serving([("fleet", fleet_artefact)], scenario, repository=tmp_path)


def test_labels_stay_right_while_a_task_is_replaced_in_a_loop(
    versions: list[tuple[Path, tuple[str, ...]]],
    fleet_artefact: Path,
    backbone_weights: Path,
    tmp_path: Path,
) -> None:
    images = np.random.default_rng(7).normal(size=(5, 3, 16, 16)).astype(np.float32)
    shutil.copy(versions[0][0], tmp_path / "task.ckpt")
    right = [
        [ranked_by(row, classes) for row in expected(path, backbone_weights, images)]
        for path, classes in versions
    ]

    async def scenario(client: httpx.AsyncClient, service: Service) -> None:
        done = False

        async def exchange() -> None:
            fleet: Any = service.models.find("task").artefact.fleet
            turn = 0
            while not done:
                turn += 1
                await asyncio.to_thread(fleet.add, versions[turn % 2][0], "task")

        async def ask() -> None:
            for _ in range(40):
                found = labels(await client.post("/v2/models/task/infer", json=many(images)))
                assert found in right

        changing = asyncio.create_task(exchange())
        try:
            await asyncio.gather(*(ask() for _ in range(4)))
        finally:
            done = True
            await changing

    serving([("fleet", fleet_artefact)], scenario, repository=tmp_path)


def test_a_request_is_refused_if_its_model_was_replaced_by_one_with_another_input(
    artefact: Path, pixel_artefact: Path, photos: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "a.onnx"
    shutil.copy(artefact, path)

    async def scenario(client: httpx.AsyncClient, service: Service) -> None:
        in_pool = service.in_pool

        async def exchanging(function: Any, *arguments: Any) -> Any:
            found = await in_pool(function, *arguments)
            shutil.copy(pixel_artefact, path)
            await service.repository.load("a")
            return found

        service.in_pool = exchanging  # type: ignore[method-assign, assignment]
        large = many(np.zeros((40, 3, 16, 16), np.float32))  # parsed in a thread
        for address, content in (
            ("infer", json.dumps(large).encode()),
            ("classify", photos[0].read_bytes()),
        ):
            shutil.copy(artefact, path)
            await service.repository.load("a")
            answer = await client.post(f"/v2/models/a/{address}", content=content)
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            assert answer.json() == {"error": "The model 'a' was replaced: send the request again."}

    serving([], scenario, repository=tmp_path)


def test_an_image_is_refused_if_its_model_was_replaced_by_one_with_other_preprocessing(
    artefact: Path, photos: list[Path], tmp_path: Path
) -> None:
    path, proto = tmp_path / "a.onnx", onnx.load(artefact)
    metadata = metadata_of(artefact)
    changed = {**json.loads(metadata["preprocessing"]), "mean": [0.1, 0.2, 0.3]}
    onnx.helper.set_model_props(proto, {**metadata, "preprocessing": json.dumps(changed)})
    shutil.copy(artefact, path)

    async def scenario(client: httpx.AsyncClient, service: Service) -> None:
        in_pool = service.in_pool

        async def exchanging(function: Any, *arguments: Any) -> Any:
            found = await in_pool(function, *arguments)
            path.write_bytes(proto.SerializeToString())
            await service.repository.load("a")
            return found

        service.in_pool = exchanging  # type: ignore[method-assign, assignment]
        content = photos[0].read_bytes()
        answer = await client.post("/v2/models/a/classify", content=content)
        assert answer.json() == {"error": "The model 'a' was replaced: send the request again."}
        service.in_pool = in_pool  # type: ignore[method-assign]
        assert (await client.post("/v2/models/a/classify", content=content)).status_code == 200

    serving([], scenario, repository=tmp_path)


def test_a_client_timeout_can_only_shorten_the_server_timeout(artefact: Path) -> None:
    async def scenario(client: httpx.AsyncClient, service: Service) -> None:
        gate = Gate(service.models.artefacts["a"].batcher)
        first = asyncio.create_task(client.post("/v2/models/a/infer", json=asking()))
        await asyncio.to_thread(gate.reached.wait)
        batcher, given = service.models.artefacts["a"].batcher, list[float]()
        answer = batcher.answer

        async def noted(images: Any, task: str, seconds: float) -> Any:
            given.append(seconds)
            return await answer(images, task, min(seconds, 0.001))

        batcher.answer = noted  # type: ignore[method-assign]
        for microseconds in (None, 0, 3_000_000, 10**12):
            parameters = {} if microseconds is None else {"timeout": microseconds}
            body = {**asking(), "parameters": parameters}
            late = await client.post("/v2/models/a/infer", json=body)
            assert (late.status_code, first.done()) == (504, False)
        ours, unnamed, short, long = given
        assert 0 < short <= 3 and all(3 < each <= 1000 for each in (ours, unnamed, long))
        await gate.open()
        assert (await first).status_code == 200

    serving([("a", artefact)], scenario, timeout=1000.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_refused_with_the_reason(
    artefact: Path, photos: list[Path], value: float
) -> None:
    async def scenario(client: httpx.AsyncClient, service: Service) -> None:
        batcher: Any = service.models.artefacts["a"].batcher
        (worker,) = batcher._workers
        run = worker.replica.run

        def overflowing(images: Any, tasks: Any) -> Any:
            for logits, classes in run(images, tasks):
                logits = logits.copy()
                logits[-1] = value
                yield logits, classes

        worker.replica = Replica(overflowing)
        for address, content in (
            ("infer", json.dumps(asking()).encode()),
            ("infer", json.dumps(many(np.zeros((1, 3, 16, 16), np.float32))).encode()),
            ("classify", photos[0].read_bytes()),
        ):
            answer = await client.post(f"/v2/models/a/{address}", content=content)
            assert answer.status_code == 500
            message = "The model's logits for this request are NaN or infinite."
            assert answer.json() == {"error": message}

    serving([("a", artefact)], scenario)


@pytest.mark.parametrize("queue", [1, 64])
def test_overload_is_refused_while_the_engine_is_busy(artefact: Path, queue: int) -> None:
    async def scenario(client: httpx.AsyncClient, service: Service) -> None:
        batcher = service.models.artefacts["a"].batcher
        gate = Gate(batcher)
        running = asyncio.create_task(client.post("/v2/models/a/infer", json=asking()))
        await asyncio.to_thread(gate.reached.wait)
        asked = [
            asyncio.create_task(client.post("/v2/models/a/infer", json=asking(i / 200)))
            for i in range(queue)
        ]
        await until(lambda: batcher.waiting == queue)
        for _ in range(100):
            answer = await client.post("/v2/models/a/infer", json=asking())
            assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert not running.done() and not any(task.done() for task in asked)
        await gate.open()
        assert (await running).status_code == 200
        found = [(await task).json()["outputs"][0]["data"] for task in asked]
        images = np.stack([np.full((3, 16, 16), i / 200, np.float32) for i in range(queue)])
        np.testing.assert_allclose(found, load_artefact(artefact).run(images), atol=1e-5, rtol=0)

    serving([("a", artefact)], scenario, queue=queue)
