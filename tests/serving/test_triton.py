"""NVIDIA's HTTP client against a server process: every call that it has."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aoft_deploy.artefacts.prediction import load_classifier
from aoft_deploy.fleet.fleet import Fleet

triton: Any = importlib.import_module("tritonclient.http")  # has no type annotations
triton_aio: Any = importlib.import_module("tritonclient.http.aio")
InferenceServerException: type[Exception] = importlib.import_module(
    "tritonclient.utils"
).InferenceServerException

TOKEN = "a token of more than sixteen bytes"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def served(
    serve: Callable[..., Any],
    artefact: Path,
    pixel_artefact: Path,
    fleet_artefact: Path,
    fleet_tasks: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    folder = tmp_path_factory.mktemp("repository")
    (folder / "zürich.ckpt").write_bytes(fleet_tasks["zürich"].read_bytes())
    token = folder / "token"
    token.write_text(TOKEN + "\n")
    options = ["--admin-token-file", token, "--repository", folder, "--follow", "0"]
    return serve(artefact, pixel_artefact, fleet_artefact, *options)


@pytest.fixture
def client(served: Any) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{served.port}", concurrency=4) as client:
        yield client


@pytest.fixture(scope="module")
def images() -> Any:
    return np.random.default_rng(5).normal(size=(3, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(artefact: Path, fleet_artefact: Path, images: Any) -> dict[str, Any]:
    fleet = Fleet(fleet_artefact, threads=1)
    found = {
        name: np.stack([a.logits for a in fleet.predict(images, [name] * 3)])
        for name in fleet.tasks
    }
    return {"task": load_classifier(artefact).engine.run(images), **found}


def given(images: Any, binary: bool) -> list[Any]:
    name, kind = ("image", "UINT8") if images.dtype == np.uint8 else ("pixel_values", "FP32")
    tensor = triton.InferInput(name, images.shape, kind)
    tensor.set_data_from_numpy(images, binary_data=binary)
    return [tensor]


def test_health_metadata_and_configuration(client: Any) -> None:
    assert client.is_server_live() and client.is_server_ready()
    metadata = client.get_server_metadata()
    assert metadata["name"] == "aoft-serve" and "binary_tensor_data" in metadata["extensions"]
    for name in ("task", "pixels", "pets"):
        assert client.is_model_ready(name) and client.is_model_ready(name, "1")
        model = client.get_model_metadata(name, "1")
        assert model["name"] == name and model["versions"] == ["1"]
        assert model["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 5]}]
        config = client.get_model_config(name)
        assert config["max_batch_size"] == 16 and config["output"][0]["dims"] == [5]
    assert client.get_model_metadata("pixels")["inputs"] == [
        {"name": "image", "datatype": "UINT8", "shape": [-1, 16, 16, 3]}
    ]
    assert client.get_model_config("pets")["input"] == [
        {"name": "pixel_values", "data_type": "TYPE_FP32", "dims": [3, 16, 16]}
    ]
    assert not client.is_model_ready("nobody") and not client.is_model_ready("pets", "2")


@pytest.mark.parametrize("model", ["task", "pets", "birds"])
@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_inference_in_json_and_bytes_in_every_mix(
    client: Any, model: str, binary_in: bool, binary_out: bool | None, images: Any, expected: Any
) -> None:
    outputs = None
    if binary_out is not None:
        outputs = [triton.InferRequestedOutput("logits", binary_data=binary_out)]
    for count in (1, 3):
        inputs = given(images[:count], binary_in)
        result = client.infer(model, inputs, "1", outputs, request_id="mine")
        assert np.abs(result.as_numpy("logits") - expected[model][:count]).max() < 1e-5
        response = result.get_response()
        assert (response["model_name"], response["id"]) == (model, "mine")


def test_pixels(client: Any, pixel_artefact: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), np.uint8)
    own = load_classifier(pixel_artefact).engine.run(pixels)
    for binary in (True, False):
        logits = client.infer("pixels", given(pixels, binary)).as_numpy("logits")
        assert np.abs(logits - own).max() < 1e-5


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression_both_ways(client: Any, algorithm: str, images: Any, expected: Any) -> None:
    many = np.concatenate([images] * 30)  # an answer large enough to be compressed
    result = client.infer(
        "pets",
        given(many, True),
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert np.abs(result.as_numpy("logits") - np.concatenate([expected["pets"]] * 30)).max() < 1e-5


def test_many_at_once(client: Any, images: Any, expected: Any) -> None:
    handles = [client.async_infer(name, given(images, True)) for name in ["pets", "task"] * 20]
    for handle, name in zip(handles, ["pets", "task"] * 20, strict=True):
        assert np.abs(handle.get_result().as_numpy("logits") - expected[name]).max() < 1e-5


def test_the_asynchronous_client(served: Any, images: Any, expected: Any) -> None:
    async def run() -> None:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{served.port}") as client:
            assert await client.is_server_ready()
            results = await asyncio.gather(
                *(client.infer(name, given(images, True)) for name in ["birds", "task"] * 10)
            )
            for result, name in zip(results, ["birds", "task"] * 10, strict=True):
                assert np.abs(result.as_numpy("logits") - expected[name]).max() < 1e-5

    asyncio.run(run())


@pytest.mark.parametrize("binary", [True, False])
def test_classes(client: Any, binary: bool, images: Any, expected: Any, classes: Any) -> None:
    outputs = [triton.InferRequestedOutput("logits", binary_data=binary, class_count=2)]
    found = client.infer("pets", given(images, True), outputs=outputs).as_numpy("logits")
    assert found.shape == (3, 2)
    for row, logits in zip(found.tolist(), expected["pets"], strict=True):
        for text, index in zip(row, np.argsort(-logits)[:2].tolist(), strict=True):
            score, place, label = (text.decode() if binary else text).split(":")
            assert abs(float(score) - logits[index]) < 1e-4
            assert (int(place), label) == (index, classes[index])


def test_timeouts(client: Any, images: Any, expected: Any) -> None:
    result = client.infer("pets", given(images, True), timeout=10_000_000)
    assert np.abs(result.as_numpy("logits") - expected["pets"]).max() < 1e-5
    assert client.infer("pets", given(images, True), priority=1, parameters={"mine": "x"})


def test_statistics(client: Any, images: Any) -> None:
    def counts() -> tuple[int, int, int]:
        (stats,) = client.get_inference_statistics("birds")["model_stats"]
        success = stats["inference_stats"]["success"]
        assert success["ns"] >= stats["inference_stats"]["compute_infer"]["ns"] > 0
        assert sum(batch["compute_infer"]["count"] for batch in stats["batch_stats"]) > 0
        return stats["inference_count"], stats["execution_count"], success["count"]

    client.infer("birds", given(images, True))
    before = counts()
    for _ in range(4):
        client.infer("birds", given(images, True))
    assert tuple(now - then for now, then in zip(counts(), before, strict=True)) == (12, 4, 4)
    names = {stats["name"] for stats in client.get_inference_statistics()["model_stats"]}
    assert "birds" in names


def test_errors_have_the_form_that_the_client_expects(client: Any, images: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"\[404\] There is no model 'nobody'"):
        client.infer("nobody", given(images, True))
    with pytest.raises(InferenceServerException, match=r"\[404\] There is no version '2'"):
        client.infer("pets", given(images, True), "2")
    with pytest.raises(InferenceServerException, match=r"\[400\] Shape of pixel_values"):
        client.infer("pets", given(images[:, :2], True))
    with pytest.raises(InferenceServerException, match=r"\[403\]"):
        client.load_model("pets")


def test_the_repository(client: Any, images: Any, expected: Any) -> None:
    def states() -> dict[str, str]:
        return {entry["name"]: entry["state"] for entry in client.get_model_repository_index()}

    assert states() == dict.fromkeys(["birds", "pets", "pixels", "task", "zürich"], "READY")
    for name in ("task", "pets", "zürich"):
        client.unload_model(name, headers=ADMIN)
        assert not client.is_model_ready(name) and name not in states()
        with pytest.raises(InferenceServerException, match=r"\[404\]"):
            client.infer(name, given(images, True))
    with pytest.raises(InferenceServerException, match=r"\[404\]"):
        client.unload_model("task", headers=ADMIN)
    for name in ("task", "zürich", "fleet"):
        client.load_model(name, headers=ADMIN)
        client.load_model(name, headers=ADMIN)
    for name in ("task", "pets"):
        logits = client.infer(name, given(images, True)).as_numpy("logits")
        assert np.abs(logits - expected[name]).max() < 1e-5
    assert states() == dict.fromkeys(["birds", "pets", "pixels", "task", "zürich"], "READY")


@pytest.mark.parametrize(
    "load",
    [
        {"config": '{"backend": "python"}'},
        {"config": "{}", "files": {"file:../../x": b"content"}},
        {"config": "{}", "files": {"file:1/model.onnx": b"content"}},
    ],
)
def test_load_accepts_no_parameters(client: Any, load: dict[str, Any]) -> None:
    with pytest.raises(InferenceServerException, match=r"\[400\] Load takes no parameters"):
        client.load_model("task", headers=ADMIN, **load)
    assert client.is_model_ready("task")
