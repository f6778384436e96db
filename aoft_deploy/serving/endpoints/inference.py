"""The addresses that answer: tensors in the protocol, and pictures."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.datastructures import QueryParams
from starlette.types import Receive, Scope, Send

from aoft_deploy.artefacts.prediction import ranked
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import AoftError, SettingError, UnknownNameError
from aoft_deploy.serving.batching.batcher import Answer, NotFiniteError
from aoft_deploy.serving.endpoints.pictures import sample
from aoft_deploy.serving.log import log
from aoft_deploy.serving.protocol.messages import VERSION, format_answer, parse_request
from aoft_deploy.serving.protocol.refusals import Refusal, shown
from aoft_deploy.serving.repository.models import Model
from aoft_deploy.serving.service import Service
from aoft_deploy.serving.transport.calls import Call, Departure
from aoft_deploy.serving.transport.encodings import acceptable, compressed, decompressed
from aoft_deploy.serving.transport.uploads import uploaded

__all__ = ["Inference"]

INLINE = 64 * 1024
"""Bytes of JSON up to which a request is read without a thread."""

JSON = (b"content-type", b"application/json")
BINARY = (b"content-type", b"application/octet-stream")


class Inference:
    """Endpoints of a service.

    Args:
        service: What they are of.
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
                asked = parse_request(*arguments)
            else:
                asked = await service.aside(parse_request, *arguments)
            parsed = time.perf_counter()
            model, answer = await self._answer(model, call, asked.images, asked.timeout)
        begun = time.perf_counter()
        text, length = format_answer(model.name, asked, answer.logits, answer.classes)
        headers = [JSON]
        if length is not None:
            headers = [BINARY, (b"inference-header-content-length", b"%d" % length)]
        self._count(model, call, answer, parsed, begun)
        await _send(send, text, headers, encodings)

    async def classify(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``POST /v2/models/{model}/classify``: a picture, or a form of several."""
        service, call = self._service, scope["aoft.call"]
        model = self._model(scope, call)
        encodings = acceptable(call.header(b"accept-encoding"))
        top = _top(QueryParams(scope["query_string"]).get("top", "5"))
        body = bytes(await self._body(receive, call))
        async with Departure(receive, service.deadlines):
            kind = call.header(b"content-type") or ""
            if kind.lower().startswith("multipart/form-data"):
                files = await service.aside(uploaded, body, kind, service.settings.max_batch)
            else:
                files = [body]
            artefact = model.artefact
            limits = (artefact.prepare, artefact.size, service.settings.max_pixels)
            left = call.start + service.settings.timeout - time.perf_counter()
            try:
                async with asyncio.timeout(left):
                    samples = await asyncio.gather(
                        *(service.aside(sample, file, *limits) for file in files)
                    )
            except TimeoutError:
                raise Refusal(504, "The time for this request is up.") from None
            parsed = time.perf_counter()
            service.observations.stages.observe(parsed - call.start, artefact.name, "decode")
            preprocessing = artefact.preprocessing
            model, answer = await self._answer(
                model, call, np.stack(samples), None, prepared=preprocessing
            )
        begun = time.perf_counter()
        classes = [
            [{"label": p.label, "probability": p.probability} for p in row]
            for row in ranked(answer.logits, answer.classes, top)
        ]
        content = {"model_name": model.name, "model_version": VERSION, "predictions": classes}
        self._count(model, call, answer, parsed, begun)
        await _send(send, orjson.dumps(content), [JSON], encodings)

    def _model(self, scope: Scope, call: Call) -> Model:
        if self._service.state != "ready":
            after = {"Retry-After": "1"}
            raise Refusal(503, f"The server is {self._service.state}.", headers=after, close=True)
        names = scope["path_params"]
        if names.get("version", VERSION) != VERSION:
            raise Refusal(404, f"There is no version {shown(names['version'])}.")
        model = self._service.models.find(names["model"])
        call.model = model.name
        return model

    async def _body(self, receive: Receive, call: Call) -> bytes | memoryview:
        service = self._service
        length = call.header(b"content-length")
        body = await service.bodies.read(receive, length, call.inflow)
        call.body, call.read = len(body), True
        encoding = call.header(b"content-encoding")
        if encoding is not None:
            packed = call.body
            body = await service.aside(decompressed, body, encoding, service.bodies.limit)
            call.body = len(body)
            service.bodies.bytes += call.body - packed
        return body

    async def _answer(
        self,
        model: Model,
        call: Call,
        images: NDArray[Any],
        timeout: float | None,
        prepared: Preprocessing | None = None,
    ) -> tuple[Model, Answer]:
        """The model as it is now, and its answer.

        Args:
            model: As it was when the images were read.
            call: The request.
            images: Samples of its input.
            timeout: Seconds that the client gives it; None: it names none.
            prepared: How the server made the samples of pictures; None: the client made them.
        """
        settings = self._service.settings
        seconds = settings.timeout if timeout is None else min(timeout, settings.timeout)
        left = call.start + seconds - time.perf_counter()
        found = self._service.models.find(model.name)  # it may have been exchanged meanwhile
        if found.artefact.tensor != model.artefact.tensor or (
            prepared is not None and found.artefact.preprocessing != prepared
        ):
            after = {"Retry-After": "1"}
            message = f"The model {shown(model.name)} was exchanged: ask again."
            raise Refusal(503, message, headers=after)
        try:
            return found, await found.artefact.batcher.answer(images, found.task, left)
        except Refusal as refusal:
            if refusal.status >= 500:
                self._failed(found, call)
            raise
        except UnknownNameError:
            raise Refusal(404, f"There is no model {shown(model.name)}.") from None
        except Exception as error:
            self._failed(found, call)
            log("engine failed", request=call.id, model=model.name, error=error)
            if isinstance(error, SettingError):
                raise Refusal(503, "There is no memory left for this model's task.") from None
            if isinstance(error, AoftError):
                raise Refusal(500, "The model's task cannot be read.") from None
            if isinstance(error, NotFiniteError):
                told = "The model's logits on this request are NaN or infinite: no answer is given."
                raise Refusal(500, told) from None
            raise Refusal(500, "The model failed on this request.") from None

    def _failed(self, model: Model, call: Call) -> None:
        spent = time.perf_counter() - call.start
        self._service.observations.statistics[model.name].failed(int(spent * 1e9))

    def _count(self, model: Model, call: Call, answer: Answer, parsed: float, begun: float) -> None:
        now, artefact = time.perf_counter(), model.artefact.name
        observations = self._service.observations
        observe = observations.stages.observe
        observe(answer.queued, artefact, "queue")
        observe(answer.computed, artefact, "engine")
        observe(now - call.start, artefact, "request")
        stages = (answer.queued, parsed - call.start, answer.computed, now - begun)
        queued, given, inferred, written = (int(seconds * 1e9) for seconds in stages)
        observations.statistics[model.name].succeeded(
            len(answer.logits), answer.rows, answer.first, (queued, given, inferred, written)
        )


async def _send(
    send: Send, body: bytes, headers: list[tuple[bytes, bytes]], encodings: list[str]
) -> None:
    body, encoding = compressed(body, encodings)
    if encoding is not None:
        headers = [*headers, (b"content-encoding", encoding.encode())]
    headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _top(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 6 and int(text) >= 1):
        raise Refusal(400, f"top is {shown(text)}: give a whole number from 1.")
    return int(text)
