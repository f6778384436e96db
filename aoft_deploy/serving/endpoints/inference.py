"""The inference endpoints: tensors in the protocol's form, and images."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.datastructures import QueryParams
from starlette.types import Receive, Scope, Send

from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import AoftError, SettingError, UnknownNameError
from aoft_deploy.serving.batching.worker import Answer, NotFiniteError
from aoft_deploy.serving.endpoints.images import decode_sample
from aoft_deploy.serving.log import log
from aoft_deploy.serving.protocol.messages import VERSION, format_answer, parse_request
from aoft_deploy.serving.protocol.refusals import OUT_OF_TIME, Refusal, unknown_model
from aoft_deploy.serving.repository.models import Model
from aoft_deploy.serving.repository.opened_artefact import Artefact
from aoft_deploy.serving.service import Service
from aoft_deploy.serving.transport.calls import Call, Departure
from aoft_deploy.serving.transport.encodings import acceptable, compressed, decompressed
from aoft_deploy.serving.transport.uploads import uploaded_files
from aoft_deploy.texts import shortened

__all__ = ["Inference"]

USUAL = 5
"""Number of classes in an answer about images, unless the client asks for another."""

INLINE = 64 * 1024
"""Requests with up to this many bytes of JSON are parsed in the event loop."""

JSON = (b"content-type", b"application/json")
BINARY = (b"content-type", b"application/octet-stream")


class Inference:
    """The inference endpoints of a server.

    Args:
        service: The server's service.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /v2/models/{model}/infer``."""
        service, call = self._service, scope["aoft.call"]
        model = self._model(scope, call)
        encodings = acceptable(call.header(b"accept-encoding"))
        body = await self._body(receive, call)
        async with Departure(receive, service.deadlines):
            json_length = call.header(b"inference-header-content-length")
            arguments = (body, json_length, model.artefact.tensor)
            if len(json_length or "") < 6 and (json_length or len(body) <= INLINE):
                infer_request = parse_request(*arguments)
            else:
                infer_request = await service.in_pool(parse_request, *arguments)
            parsed = time.perf_counter()
            model, answer = await self._answer(
                model, call, infer_request.images, infer_request.timeout
            )
        answered = time.perf_counter()
        text, length = format_answer(model.name, infer_request, answer.logits, answer.classes)
        headers = [JSON]
        if length is not None:
            headers = [BINARY, (b"inference-header-content-length", b"%d" % length)]
        self._count(model, call, answer, parsed, answered)
        await _send(send, text, headers, encodings)

    async def classify(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /v2/models/{model}/classify``: an image, or a form with several."""
        service, call = self._service, scope["aoft.call"]
        model = self._model(scope, call)
        encodings = acceptable(call.header(b"accept-encoding"))
        top = _top(QueryParams(scope["query_string"]).get("top"))
        body = bytes(await self._body(receive, call))
        async with Departure(receive, service.deadlines):
            samples = await self._decode(call, body, model.artefact)
            parsed = time.perf_counter()
            service.observations.stages.observe(parsed - call.start, model.artefact.name, "decode")
            preprocessing = model.artefact.preprocessing
            model, answer = await self._answer(
                model, call, samples, None, preprocessing=preprocessing
            )
        answered = time.perf_counter()
        rows = answer.classes.answers(answer.logits, top, usual=USUAL)
        predictions = [[each._asdict() for each in row] for row in rows]
        content = {"model_name": model.name, "model_version": VERSION, "predictions": predictions}
        self._count(model, call, answer, parsed, answered)
        await _send(send, orjson.dumps(content), [JSON], encodings)

    def _model(self, scope: Scope, call: Call) -> Model:
        if self._service.state != "ready":
            message = f"The server is {self._service.state}."
            raise Refusal(503, message, retry_after=1, close=True)
        names = scope["path_params"]
        model = self._service.models.find(names["model"], names.get("version", VERSION))
        call.model = model.name
        return model

    async def _body(self, receive: Receive, call: Call) -> bytes | memoryview:
        service = self._service
        length = call.header(b"content-length")
        body = await service.bodies.read(receive, length, call.inflow)
        call.body, call.read = len(body), True
        encoding = call.header(b"content-encoding")
        if encoding is not None:
            compressed_size = call.body
            body = await service.in_pool(decompressed, body, encoding, service.bodies.limit)
            call.body = len(body)
            service.bodies.bytes += call.body - compressed_size
        return body

    async def _decode(self, call: Call, body: bytes, artefact: Artefact) -> NDArray[Any]:
        """Decode the images of a request into samples of the artefact's input."""
        service = self._service
        content_type = call.header(b"content-type") or ""
        if content_type.lower().startswith("multipart/form-data"):
            max_files = service.settings.max_batch
            files = await service.in_pool(uploaded_files, body, content_type, max_files)
        else:
            files = [body]
        size = max(artefact.preprocessing.height, artefact.preprocessing.width)
        arguments = (artefact.prepare, size, service.settings.max_pixels)
        left = call.start + service.settings.timeout - time.perf_counter()
        try:
            async with asyncio.timeout(left):
                samples = await asyncio.gather(
                    *(service.in_pool(decode_sample, file, *arguments) for file in files)
                )
        except TimeoutError:
            raise Refusal(504, OUT_OF_TIME) from None
        return np.stack(samples)

    async def _answer(
        self,
        model: Model,
        call: Call,
        images: NDArray[Any],
        timeout: float | None,
        preprocessing: Preprocessing | None = None,
    ) -> tuple[Model, Answer]:
        """Run a model of the current version.

        Args:
            model: The version for which the images were prepared.
            call: The request.
            images: Samples of its input.
            timeout: Seconds that the client allows; None if it sets no limit.
            preprocessing: The preprocessing with which the server prepared the images; None if the
                client prepared them.

        Returns:
            The current version, and its answer.

        Raises:
            Refusal: 503 if the images do not fit the current version, or a failure of the model.
        """
        settings = self._service.settings
        seconds = settings.timeout if timeout is None else min(timeout, settings.timeout)
        left = call.start + seconds - time.perf_counter()
        current = self._service.models.find(model.name)  # it may have been replaced meanwhile
        if current.artefact.tensor != model.artefact.tensor or (
            preprocessing is not None and current.artefact.preprocessing != preprocessing
        ):
            message = f"The model {shortened(model.name)} was replaced: send the request again."
            raise Refusal(503, message, retry_after=1)
        try:
            return current, await current.artefact.batcher.answer(images, current.task, left)
        except Refusal as refusal:
            if refusal.status >= 500:
                self._count_failure(current, call)
            raise
        except UnknownNameError:
            raise unknown_model(model.name) from None
        except Exception as error:
            self._count_failure(current, call)
            log("engine failed", request=call.id, model=model.name, error=error)
            raise _failure(error) from None

    def _count_failure(self, model: Model, call: Call) -> None:
        spent = time.perf_counter() - call.start
        self._service.observations.statistics[model.name].failed(int(spent * 1e9))

    def _count(
        self, model: Model, call: Call, answer: Answer, parsed: float, answered: float
    ) -> None:
        """Count an answered request.

        Args:
            model: The model.
            call: The request.
            answer: The model's answer.
            parsed: Time at which the request was parsed.
            answered: Time at which the model had answered.
        """
        now, artefact = time.perf_counter(), model.artefact.name
        observations = self._service.observations
        observe = observations.stages.observe
        observe(answer.queued, artefact, "queue")
        observe(answer.computed, artefact, "engine")
        observe(now - call.start, artefact, "request")
        stages = (answer.queued, parsed - call.start, answer.computed, now - answered)
        queued, inputs, inference, outputs = (int(seconds * 1e9) for seconds in stages)
        observations.statistics[model.name].succeeded(
            len(answer.logits), answer.rows, answer.first, (queued, inputs, inference, outputs)
        )


def _failure(error: Exception) -> Refusal:
    """What the client learns about an exception of the engine."""
    if isinstance(error, SettingError):
        return Refusal(503, "There is no memory left for this model's task.")
    if isinstance(error, AoftError):
        return Refusal(500, "The model's task cannot be read.")
    if isinstance(error, NotFiniteError):
        return Refusal(500, "The model's logits for this request are NaN or infinite.")
    return Refusal(500, "The model failed on this request.")


async def _send(
    send: Send, body: bytes, headers: list[tuple[bytes, bytes]], encodings: list[str]
) -> None:
    body, encoding = compressed(body, encodings)
    if encoding is not None:
        headers = [*headers, (b"content-encoding", encoding.encode())]
    headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _top(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 6 and int(text) >= 1):
        raise Refusal(400, f"top is {shortened(text)}: give a whole number from 1.")
    return int(text)
