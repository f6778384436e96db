"""Open a fleet's file as a graph that takes its tables as inputs, without parsing its weights.

The tables are some fields of the graph. They are cut out of the file's bytes, and inputs are put
in their place; the weights are only copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from aoft_deploy.artefacts.protobuf import Part, fields, header
from aoft_deploy.errors import ArtefactError
from aoft_exporters.graph.fleet_tables import FLEET_TABLES

__all__ = ["FleetFile", "read_fleet_file"]

GRAPH, INITIALIZER, INPUT, NAME = 7, 5, 11, 8
"""Numbers of the fields of onnx.proto: of a model's graph, its initialisers and inputs, and a
tensor's name."""


class FleetFile(NamedTuple):
    """The content of a fleet's file.

    Attributes:
        model: The serialised ONNX model that takes the tables as inputs.
        tables: The tables of the tasks in the file, as ONNX tensors by name.
    """

    model: bytes
    tables: dict[str, Any]


def read_fleet_file(path: Path) -> FleetFile:
    """Read a file that ``export_fleet`` wrote.

    Raises:
        ArtefactError: The file cannot be read, is damaged, or is no fleet.
    """
    try:
        content = memoryview(path.read_bytes())
        graphs = [(value, end) for number, value, end in fields(content) if number == GRAPH]
        (graph, end), tables = _only(graphs), dict[str, bytes]()
        kept, start = list[memoryview](), 0
        for number, value, stop in fields(graph):
            assert not isinstance(value, Part)
            tensor = value if number == INITIALIZER and isinstance(value, memoryview) else None
            name = "" if tensor is None else _name(tensor)
            if tensor is not None and name in FLEET_TABLES:
                tables[name] = bytes(tensor)
            else:
                kept.append(graph[start:stop])
            start = stop
        parsed = {name: _tensor(tensor) for name, tensor in tables.items()}
        inputs = [_input(name, parsed[name]) for name in FLEET_TABLES if name in parsed]
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # damaged bytes; protobuf raises its own classes
        raise ArtefactError(f"{path} is no ONNX model ({error}).") from error
    if set(tables) != set(FLEET_TABLES):
        raise ArtefactError(f"{path} is no fleet: export the checkpoints as a fleet first.")
    before = content[: end - len(graph) - len(header(GRAPH, len(graph)))]
    length = sum(map(len, kept)) + sum(map(len, inputs))
    pieces: list[bytes | memoryview] = [before, header(GRAPH, length), *kept, *inputs]
    return FleetFile(b"".join([*pieces, content[end:]]), parsed)


def _only(graphs: list[tuple[Any, int]]) -> tuple[memoryview, int]:
    """The graph of a model and its end."""
    if len(graphs) != 1 or not isinstance(graphs[0][0], memoryview):
        raise ValueError(f"it has {len(graphs)} graphs")
    return graphs[0]


def _name(tensor: memoryview) -> str:
    """Name of a serialised tensor."""
    for number, value, _ in fields(tensor):
        if number == NAME and isinstance(value, memoryview):
            return str(value, "utf-8")
    return ""


def _tensor(content: bytes) -> Any:
    import onnx

    return onnx.TensorProto.FromString(content)


def _input(name: str, tensor: Any) -> bytes:
    """The serialised field of an input in place of a table."""
    import onnx

    shape = [FLEET_TABLES[name], *tensor.dims[1:]]
    value = onnx.helper.make_tensor_value_info(name, tensor.data_type, shape)
    content = bytes(value.SerializeToString())
    return header(INPUT, len(content)) + content
