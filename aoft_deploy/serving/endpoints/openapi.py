"""The documentation of the endpoints: an OpenAPI description and an HTML page."""

from __future__ import annotations

import html
from typing import Any

__all__ = ["description", "page"]


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(schema: dict[str, Any], kind: str = "application/json") -> dict[str, Any]:
    return {kind: {"schema": schema}}


def _flag(name: str) -> dict[str, Any]:
    """An object whose field of this name is true."""
    properties = {name: {"type": "boolean", "const": True}}
    return _content({"type": "object", "required": [name], "properties": properties})


_ANY: dict[str, Any] = {"type": "object"}
_JSON_OBJECT = _content(_ANY)
_FAILURES = {
    "400": "The request is malformed",
    "403": "The repository may not be changed",
    "404": "There is no such model, version or artefact",
    "405": "The method is not allowed",
    "406": "The client accepts no encoding of the answer that the server supports",
    "408": "The body did not arrive in time",
    "413": "The body or image is too large",
    "415": "The image's format or the body's encoding is not supported",
    "429": "Too many requests wait; see Retry-After",
    "500": "The model failed",
    "503": "The server is starting, draining or stuck",
    "504": "The time for the request is up",
}

_SCHEMAS: dict[str, Any] = {
    "Error": {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "string"}},
    },
    "Tensor": {
        "type": "object",
        "required": ["name", "datatype", "shape"],
        "properties": {
            "name": {"type": "string", "examples": ["pixel_values", "image", "logits"]},
            "datatype": {"type": "string", "enum": ["FP32", "UINT8", "BYTES"]},
            "shape": {"type": "array", "items": {"type": "integer"}},
            "parameters": _ANY,
            "data": {"type": "array"},
        },
    },
    "InferRequest": {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "parameters": {
                "type": "object",
                "properties": {
                    "timeout": {"type": "integer", "description": "microseconds", "minimum": 0},
                    "binary_data_output": {"type": "boolean"},
                },
            },
            "inputs": {"type": "array", "minItems": 1, "maxItems": 1, "items": _ref("Tensor")},
            "outputs": {
                "type": "array",
                "maxItems": 1,
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"type": "string", "enum": ["logits"]},
                        "parameters": {
                            "type": "object",
                            "properties": {
                                "binary_data": {"type": "boolean"},
                                "classification": {"type": "integer", "minimum": 0},
                            },
                        },
                    },
                },
            },
        },
    },
    "InferAnswer": {
        "type": "object",
        "required": ["model_name", "model_version", "outputs"],
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "outputs": {"type": "array", "items": _ref("Tensor")},
        },
    },
    "Predictions": {
        "type": "object",
        "required": ["model_name", "model_version", "predictions"],
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "predictions": {
                "description": "The most probable classes of each image, best first; of labels "
                "(sigmoid) those above 0.5, or the `top` most probable; of plain values all",
                "type": "array",
                "items": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["label"],
                        "properties": {
                            "label": {"type": "string"},
                            "probability": {"type": "number", "minimum": 0, "maximum": 1},
                            "value": {"type": "number"},
                        },
                    },
                },
            },
        },
    },
}

_BYTES = {"type": "string", "format": "binary"}
_INFER = (
    "Logits of a batch. With the output's parameter `classification`, the best classes as "
    "`score:index:label`. Tensors may follow the JSON as bytes (binary tensor extension)."
)
_INFER_BODY = {
    **_content(_ref("InferRequest")),
    **_content(_BYTES, "application/octet-stream"),
}
_INFER_ANSWER = {
    **_content(_ref("InferAnswer")),
    **_content(_BYTES, "application/octet-stream"),
}
_IMAGES = {
    **{kind: {"schema": _BYTES} for kind in ("image/jpeg", "image/png", "image/webp")},
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "properties": {"file": {"type": "array", "items": _BYTES}},
        }
    },
}
_CHANGE = {"application/json": {"schema": {"type": "object", "properties": {"parameters": _ANY}}}}

# Path, method, summary, contents of the body, contents of the answer.
_ENDPOINTS: tuple[tuple[str, str, str, Any, Any], ...] = (
    ("/v2/models/{model}/infer", "post", _INFER, _INFER_BODY, _INFER_ANSWER),
    (
        "/v2/models/{model}/classify",
        "post",
        "Labels and probabilities, or values, of images: JPEG, PNG or WebP, as the body or in a "
        "form. `top` is the number of classes: 5 if it is not given.",
        _IMAGES,
        _content(_ref("Predictions")),
    ),
    ("/v2/health/live", "get", "Whether the process answers.", None, _flag("live")),
    ("/v2/health/ready", "get", "Whether the server accepts requests.", None, _flag("ready")),
    ("/v2", "get", "Name, version and extensions of the server.", None, _JSON_OBJECT),
    ("/v2/models/stats", "get", "Statistics of all models.", None, _JSON_OBJECT),
    ("/v2/models/{model}", "get", "Inputs and outputs of a model.", None, _JSON_OBJECT),
    ("/v2/models/{model}/ready", "get", "Whether a model is ready.", None, _flag("ready")),
    ("/v2/models/{model}/config", "get", "Triton's configuration.", None, _JSON_OBJECT),
    ("/v2/models/{model}/stats", "get", "Statistics of a model.", None, _JSON_OBJECT),
    (
        "/v2/repository/index",
        "post",
        "All models, whether they are ready, and why not.",
        _content({"type": "object", "properties": {"ready": {"type": "boolean"}}}),
        _content({"type": "array", "items": _ANY}),
    ),
    (
        "/v2/repository/models/{model}/load",
        "post",
        "Load or reload a model; needs the admin token.",
        _CHANGE,
        _JSON_OBJECT,
    ),
    (
        "/v2/repository/models/{model}/unload",
        "post",
        "Unload a model; needs the admin token.",
        _CHANGE,
        _JSON_OBJECT,
    ),
    (
        "/metrics",
        "get",
        "Metrics for Prometheus.",
        None,
        _content({"type": "string"}, "text/plain"),
    ),
)


def description(version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    paths: dict[str, Any] = {}
    for path, method, summary, body, answer in _ENDPOINTS:
        error = _content(_ref("Error"))
        operation: dict[str, Any] = {
            "summary": summary,
            "operationId": method + path.replace("/", "_").replace("{", "").replace("}", ""),
            "parameters": [
                *(
                    [_parameter("model", "path", {"type": "string", "minLength": 1})]
                    if "{model}" in path
                    else []
                ),
                *(
                    [_parameter("top", "query", {"type": "integer", "minimum": 1})]
                    if path.endswith("/classify")
                    else []
                ),
            ],
            "responses": {
                "200": {"description": "The answer", "content": answer},
                **{code: {"description": d, "content": error} for code, d in _FAILURES.items()},
            },
        }
        if body is not None:
            required = "/repository/" not in path
            operation["requestBody"] = {"content": body, "required": required}
        if path.endswith("load"):
            operation["security"] = [{"token": []}]
        paths[path] = {method: operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "aoft-serve", "version": version},
        "paths": paths,
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def page(version: str) -> str:
    """An HTML page about the endpoints, without external resources."""
    rows = "".join(
        f"<tr><td>{method.upper()}</td><td><code>{html.escape(path)}</code></td>"
        f"<td>{html.escape(summary)}</td></tr>"
        for path, method, summary, _, _ in _ENDPOINTS
    )
    failures = "".join(f"<li><b>{code}</b> {html.escape(t)}</li>" for code, t in _FAILURES.items())
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>aoft-serve</title>"
        "<style>body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "td{padding:.3em .8em .3em 0;vertical-align:top}</style>"
        f"<h1>aoft-serve {html.escape(version)}</h1>"
        "<p>The Open Inference Protocol v2, and classification of images. "
        "<a href='openapi.json'>openapi.json</a> is the complete description. The paths of a model "
        "may have <code>/versions/1</code> after its name.</p>"
        f"<table>{rows}</table>"
        '<p>Every error is answered with <code>{"error": "…"}</code>:</p>'
        f"<ul>{failures}</ul></html>"
    )


def _parameter(name: str, where: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": where, "required": where == "path", "schema": schema}
