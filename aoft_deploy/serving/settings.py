"""The server's settings, with one definition for command-line options and TOML files."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from aoft_deploy.errors import SettingError
from aoft_deploy.processors import processors

__all__ = ["PARSERS", "Settings", "device_name", "read_toml"]

PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "str | None": str,
    "int": int,
    "int | None": int,
    "float": float,
    "Path | None": Path,
    "tuple[str, ...]": str,
}
"""Converts the text of a command-line option, by the annotation of the setting."""


def _about(help: str, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"help": help, "low": low, "high": high}


@dataclass(frozen=True)
class Settings:
    """Settings of a server; sizes in bytes, times in seconds. ``help`` describes each of them.

    Raises:
        SettingError: A value has another type or is outside its range.
    """

    host: str = field(default="127.0.0.1", metadata=_about("address to listen on"))
    port: int = field(
        default=8000, metadata=_about("port to listen on; 0 takes a free one", 0, 65535)
    )
    http: str = field(
        default="httptools",
        metadata=_about("HTTP parser: httptools, or h11, which is pure Python and half as fast"),
    )
    repository: Path | None = field(
        default=None,
        metadata=_about(
            "folder of artefacts and of checkpoints for the fleet, watched for changes"
        ),
    )
    store: Path | None = field(
        default=None,
        metadata=_about("more tasks of the fleet, read on demand: a folder or a packed file"),
    )
    budget: int | None = field(
        default=None,
        metadata=_about("bytes of memory that a fleet's tasks may take on each device", 1),
    )
    admin_token_file: Path | None = field(
        default=None,
        metadata=_about(
            "file with the token for loading and unloading models; default: both are refused"
        ),
    )
    engine: str | None = field(
        default=None,
        metadata=_about(
            "runtime of merged models: onnxruntime, openvino, tensorrt or torch; default: the one "
            "they were verified with"
        ),
    )
    device: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            "one device or several: cpu, cuda, cuda:1 …; each gets a replica of all models; "
            "default: the engine's choice"
        ),
    )
    lanes: int | None = field(
        default=None,
        metadata=_about(
            "batches that each device computes at once; default: 2 on a GPU, 1 on the CPU", 1, 64
        ),
    )
    threads: int | None = field(
        default=None,
        metadata=_about(
            "CPU threads for one batch; default: the cores, shared by the lanes", 1, 1024
        ),
    )
    max_batch: int = field(default=16, metadata=_about("maximum samples in a batch", 1, 4096))
    max_wait: float = field(
        default=0.002, metadata=_about("maximum seconds that a batch waits for more", 0, 10)
    )
    queue: int = field(
        default=256, metadata=_about("maximum requests in an engine's queue", 1, 1_000_000)
    )
    timeout: float = field(
        default=30.0,
        metadata=_about("seconds for a request that sets no time limit", 0.001, 3600),
    )
    engine_timeout: float = field(
        default=60.0, metadata=_about("seconds after which a running engine counts as stuck", 0.1)
    )
    max_body: int = field(
        default=64 * 2**20,
        metadata=_about("maximum bytes of a body, compressed or not", 1024, 2**31),
    )
    max_buffered: int = field(
        default=2**30, metadata=_about("maximum bytes of the bodies of all requests", 1024)
    )
    body_timeout: float = field(
        default=10.0, metadata=_about("seconds for a body to arrive", 0.1, 3600)
    )
    max_pixels: int = field(
        default=50_000_000, metadata=_about("maximum pixels of an image", 1, 500_000_000)
    )
    decoders: int = field(
        default=min(processors(), 256),
        metadata=_about("threads that decode images and large requests", 1, 256),
    )
    max_connections: int = field(default=1024, metadata=_about("maximum connections", 1, 100_000))
    keep_alive: float = field(
        default=75.0,
        metadata=_about("seconds that a connection may be idle between requests", 0.1, 86_400),
    )
    grace: float = field(
        default=30.0, metadata=_about("seconds for requests to end after SIGTERM", 0, 3600)
    )
    follow: float = field(
        default=2.0,
        metadata=_about("seconds between checks of the files for changes; 0: never", 0, 3600),
    )
    strict: bool = field(
        default=False,
        metadata=_about("be ready only if there is a model and none failed at the start"),
    )
    log_requests: bool = field(
        default=False, metadata=_about("log every request, not only server errors")
    )

    def __post_init__(self) -> None:
        for entry in fields(self):
            value, low, high = (
                getattr(self, entry.name),
                entry.metadata["low"],
                entry.metadata["high"],
            )
            kinds = _KINDS[str(entry.type)]
            if value is None and "None" in str(entry.type):
                continue
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise SettingError(f"`{entry.name}` is {value!r}: give {_WORDS[kinds[-1]]}.")
            if not (low is None or value >= low) or not (high is None or value <= high):
                limits = f"from {low} to {high}" if high is not None else f"{low} or more"
                raise SettingError(f"`{entry.name}` is {value!r}: use {limits}.")
        if self.http not in ("h11", "httptools"):
            raise SettingError(f"`http` is {self.http!r}: use h11 or httptools.")
        for device in self.device:
            if not (isinstance(device, str) and re.fullmatch(r"[a-z]+(:\d+)?", device)):
                raise SettingError(f"`device` has {device!r}: use cpu, cuda, cuda:1 …")
        names = [device_name(device) for device in self.device]
        for name in names:
            if names.count(name) > 1:
                raise SettingError(f"`device` has {name} twice: name each device once.")


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str,),
    "bool": (bool,),
    "int": (int,),
    "int | None": (int,),
    "float": (int, float),
    "Path | None": (Path,),
    "tuple[str, ...]": (tuple,),
}
_WORDS: dict[type, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Path: "a path",
    tuple: "a text or a list of texts",
}


def device_name(device: str) -> str:
    """A device's name with its number: ``cuda`` is ``cuda:0``, and the CPU has none."""
    kind, _, index = device.partition(":")
    return kind if kind == "cpu" else f"{kind}:{int(index or 0)}"


def read_toml(path: Path) -> dict[str, Any]:
    """Read settings and ``artefacts`` from a TOML file; its keys are the names of the options.

    Paths are relative to the file's folder.

    Raises:
        SettingError: The file cannot be read, or has an unknown setting.
    """
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(f"{path} cannot be read as TOML ({error}).") from error
    known = {entry.name: str(entry.type) for entry in fields(Settings)}
    found: dict[str, Any] = {}
    for key, value in data.items():
        name = key.replace("-", "_")
        if name == "artefacts":
            found[name] = _artefacts(value, path)
        elif name not in known:
            names = ", ".join(n.replace("_", "-") for n in sorted([*known, "artefacts"]))
            raise SettingError(f"{path} has an unknown setting {key!r}. Known: {names}.")
        elif "Path" in known[name] and isinstance(value, str):
            found[name] = path.parent / value
        elif "tuple" in known[name] and isinstance(value, str | list):
            found[name] = (value,) if isinstance(value, str) else tuple(value)
        else:
            found[name] = value
    return found


def _artefacts(value: object, path: Path) -> list[str]:
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return [str(path.parent / entry) for entry in value]
    if isinstance(value, Mapping) and all(isinstance(entry, str) for entry in value.values()):
        return [f"{name}={path.parent / entry}" for name, entry in value.items()]
    raise SettingError(f"artefacts in {path} must be a list of paths, or a table of them by name.")
