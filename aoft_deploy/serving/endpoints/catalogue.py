"""Endpoints about the server: health, metadata, statistics, metrics and the model repository."""

from __future__ import annotations

import hmac
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from aoft_deploy._version import __version__
from aoft_deploy.classes import Classes
from aoft_deploy.errors import UnknownNameError
from aoft_deploy.serving.endpoints.openapi import description, page
from aoft_deploy.serving.protocol.messages import OUTPUT, VERSION, read_json
from aoft_deploy.serving.protocol.refusals import Refusal, unknown_model
from aoft_deploy.serving.repository.models import Model
from aoft_deploy.serving.service import Service
from aoft_deploy.serving.transport.calls import Call
from aoft_deploy.texts import shortened

__all__ = ["Catalogue"]

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "statistics",
)


MAX_BODY = 65536
"""Maximum bytes of a request's body."""


class Catalogue:
    """The endpoints about a server.

    Args:
        service: The server's service.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def live(self, request: Request) -> Response:
        """``GET /v2/health/live``."""
        return _json({"live": True})

    async def ready(self, request: Request) -> Response:
        """``GET /v2/health/ready``."""
        if unready := self._service.unready:
            raise Refusal(503, f"The server is {unready}.")
        return _json({"ready": True})

    async def model_ready(self, request: Request) -> Response:
        """``GET /v2/models/{model}/ready``."""
        model = self._model(request)
        if self._service.state != "ready" or model.artefact.batcher.stuck:
            raise Refusal(503, f"The model {shortened(model.name)} is not ready.")
        return _json({"name": model.name, "ready": True})

    async def server(self, request: Request) -> Response:
        """``GET /v2``."""
        return _json({"name": "aoft-serve", "version": __version__, "extensions": EXTENSIONS})

    async def metadata(self, request: Request) -> Response:
        """``GET /v2/models/{model}``."""
        model = self._model(request)
        tensor = model.artefact.tensor
        shape = [-1, len(self._classes(model))]
        return _json(
            {
                "name": model.name,
                "versions": [VERSION],
                "platform": model.artefact.platform,
                "inputs": [
                    {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.full_shape}
                ],
                "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": shape}],
            }
        )

    async def config(self, request: Request) -> Response:
        """``GET /v2/models/{model}/config``, in Triton's form."""
        model, settings = self._model(request), self._service.settings
        tensor = model.artefact.tensor
        classes = self._classes(model)
        return _json(
            {
                "name": model.name,
                "platform": model.artefact.platform,
                "backend": model.artefact.platform.partition("_")[0],
                "max_batch_size": settings.max_batch,
                "input": [_tensor_config(tensor.name, tensor.datatype, tensor.shape)],
                "output": [_tensor_config(OUTPUT, "FP32", (len(classes),))],
                "instance_group": [
                    _instance_group(*entry) for entry in model.artefact.devices.items()
                ],
                "parameters": {"activation": {"string_value": classes.activation}},
                "version_policy": {"latest": {"num_versions": 1}},
                "dynamic_batching": {
                    "preferred_batch_size": [settings.max_batch],
                    "max_queue_delay_microseconds": int(settings.max_wait * 1e6),
                },
            }
        )

    async def statistics(self, request: Request) -> Response:
        """``GET /v2/models/stats`` and ``GET /v2/models/{model}/stats``."""
        found = self._service.observations.statistics
        if "model" not in request.path_params:
            return _json({"model_stats": [s.report(name) for name, s in found.items()]})
        name = self._model(request).name
        return _json({"model_stats": [found[name].report(name)]})

    async def index(self, request: Request) -> Response:
        """``POST /v2/repository/index``."""
        body = await self._body(request)
        entries = await self._service.repository.index()
        ready = body.get("ready", False)
        if not isinstance(ready, bool):
            raise Refusal(400, f"ready is {shortened(ready)}: give true or false.")
        return _json([e for e in entries if e["state"] == "READY"] if ready else entries)

    async def load(self, request: Request) -> Response:
        """``POST /v2/repository/models/{model}/load``."""
        parameters = await self._change(request)
        if parameters:
            raise Refusal(
                400, f"Load takes no parameters, but got {shortened(sorted(parameters))}."
            )
        await self._service.repository.load(request.path_params["model"])
        return _json({})

    async def unload(self, request: Request) -> Response:
        """``POST /v2/repository/models/{model}/unload``."""
        parameters = await self._change(request)
        if set(parameters) - {"unload_dependents"}:
            raise Refusal(400, f"Unknown parameters {shortened(sorted(parameters))}.")
        await self._service.repository.unload(request.path_params["model"])
        return _json({})

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``."""
        service = self._service
        observations = service.observations
        gpus = await observations.gpus.read(service.models.devices)
        text = observations.exposition(service.models, service.ready, gpus)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def openapi(self, request: Request) -> Response:
        """``GET /openapi.json``."""
        return _json(description(__version__))

    async def docs(self, request: Request) -> Response:
        """``GET /docs``."""
        return Response(page(__version__), media_type="text/html")

    def _model(self, request: Request) -> Model:
        names = request.path_params
        model = self._service.models.find(names["model"], names.get("version", VERSION))
        request.scope["aoft.call"].model = model.name
        return model

    def _classes(self, model: Model) -> Classes:
        try:
            return self._service.models.classes(model)
        except UnknownNameError:
            raise unknown_model(model.name) from None

    async def _body(self, request: Request) -> dict[str, Any]:
        call: Call = request.scope["aoft.call"]
        length = call.header(b"content-length")
        body = bytes(await self._service.bodies.read(request.receive, length))
        call.body, call.read = len(body), True
        if len(body) > MAX_BODY:
            raise Refusal(413, f"The body has more than {MAX_BODY} bytes.")
        return read_json(body) if body.strip() else {}

    async def _change(self, request: Request) -> dict[str, Any]:
        """Authorize a change of the repository, and read its parameters."""
        token = self._service.token
        if token is None:
            raise Refusal(403, "The repository cannot be changed over HTTP.", close=True)
        given = request.headers.get("authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, b"Bearer " + token):
            raise Refusal(403, "The token for changing the repository is wrong.", close=True)
        if self._service.state != "ready":
            raise Refusal(503, f"The server is {self._service.state}.")
        parameters = (await self._body(request)).get("parameters") or {}
        if not isinstance(parameters, dict):
            raise Refusal(400, f"Parameters are {shortened(parameters)}: give an object.")
        return parameters


def _tensor_config(name: str, datatype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"name": name, "data_type": f"TYPE_{datatype}", "dims": list(shape)}


def _instance_group(device: str, lanes: int) -> dict[str, Any]:
    """A device in Triton's form, with the number of batches that it computes at once."""
    kind, _, index = device.partition(":")
    if kind == "cpu":
        return {"name": device, "kind": "KIND_CPU", "count": lanes}
    return {"name": device, "kind": "KIND_GPU", "count": lanes, "gpus": [int(index or 0)]}


def _json(content: Any) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
