"""Everything that can be set about a server: one list for flags and for the TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from aoft_deploy.errors import SettingError
from aoft_deploy.processors import processors

__all__ = ["PARSERS", "Settings", "read_toml"]

LOCAL = "127.0.0.1"


def _about(help: str, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"help": help, "low": low, "high": high}


@dataclass(frozen=True)
class Settings:
    """How artefacts are served; sizes in bytes, times in seconds.

    Raises:
        SettingError: A value of another type or outside its range.
    """

    host: str = field(default=LOCAL, metadata=_about("address to listen on"))
    port: int = field(
        default=8000, metadata=_about("port to listen on; 0 takes a free one", 0, 65535)
    )
    http: str = field(
        default="httptools",
        metadata=_about("HTTP parser: httptools, or h11, in Python and half as fast"),
    )
    repository: Path | None = field(
        default=None,
        metadata=_about(
            "folder of artefacts and of checkpoints for the fleet, followed as it changes"
        ),
    )
    store: Path | None = field(
        default=None,
        metadata=_about("more tasks of the fleet, read when asked for: folder or packed file"),
    )
    budget: int | None = field(
        default=None, metadata=_about("bytes that a fleet's tasks may take in memory", 1)
    )
    admin_token_file: Path | None = field(
        default=None,
        metadata=_about(
            "file with the token that load and unload take; without one they are refused"
        ),
    )
    engine: str | None = field(
        default=None, metadata=_about("runtime of merged models; else what they were verified with")
    )
    device: str | None = field(
        default=None, metadata=_about("device of merged models, such as cuda:1; else the engine's")
    )
    threads: int | None = field(default=None, metadata=_about("threads of an engine", 1, 1024))
    max_batch: int = field(default=16, metadata=_about("samples in a batch", 1, 4096))
    max_wait: float = field(
        default=0.002, metadata=_about("longest that a batch waits for more", 0, 10)
    )
    queue: int = field(
        default=256, metadata=_about("requests that may wait for an engine", 1, 1_000_000)
    )
    timeout: float = field(
        default=30.0, metadata=_about("time for a request that names none", 0.001, 3600)
    )
    engine_timeout: float = field(
        default=60.0, metadata=_about("time for a batch until the engine counts as stuck", 0.1)
    )
    max_body: int = field(
        default=64 * 2**20, metadata=_about("largest body, compressed or not", 1024, 2**31)
    )
    max_buffered: int = field(
        default=2**30, metadata=_about("largest sum of the bodies of all requests", 1024)
    )
    body_timeout: float = field(
        default=10.0, metadata=_about("time for a body to arrive", 0.1, 3600)
    )
    max_pixels: int = field(
        default=50_000_000, metadata=_about("most pixels of an image", 1, 500_000_000)
    )
    decoders: int = field(
        default=min(processors(), 256),
        metadata=_about("threads that decode images and large requests", 1, 256),
    )
    max_connections: int = field(default=1024, metadata=_about("most connections", 1, 100_000))
    keep_alive: float = field(
        default=75.0,
        metadata=_about("time that a connection may rest between requests", 0.1, 86_400),
    )
    grace: float = field(
        default=30.0, metadata=_about("time for requests to end after SIGTERM", 0, 3600)
    )
    follow: float = field(
        default=2.0,
        metadata=_about("how often files are looked at for changes; 0 leaves it out", 0, 3600),
    )
    strict: bool = field(
        default=False,
        metadata=_about("be ready only with a model to ask, and none that failed at the start"),
    )
    log_requests: bool = field(
        default=False, metadata=_about("log every request, not only failures of the server")
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
                raise SettingError(f"{entry.name} is {value!r}: give {_WORDS[kinds[-1]]}.")
            if not (low is None or value >= low) or not (high is None or value <= high):
                limits = f"from {low}" + (f" to {high}" if high is not None else " on")
                raise SettingError(f"{entry.name} is {value!r}: use {limits}.")
        if self.http not in ("h11", "httptools"):
            raise SettingError(f"http is {self.http!r}: use h11 or httptools.")


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str,),
    "bool": (bool,),
    "int": (int,),
    "int | None": (int,),
    "float": (int, float),
    "Path | None": (Path,),
}
_WORDS: dict[type, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Path: "a path",
}
PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "str | None": str,
    "int": int,
    "int | None": int,
    "float": float,
    "Path | None": Path,
}
"""How a flag's text becomes a value, by the field's annotation."""


def read_toml(path: Path) -> dict[str, Any]:
    """Settings and ``artefacts`` of a TOML file, under the names of the flags.

    Paths are relative to the file's folder.

    Raises:
        SettingError: It cannot be read, or names an unknown setting.
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
        else:
            found[name] = value
    return found


def _artefacts(value: object, path: Path) -> list[str]:
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return [str(path.parent / entry) for entry in value]
    if isinstance(value, Mapping) and all(isinstance(entry, str) for entry in value.values()):
        return [f"{name}={path.parent / entry}" for name, entry in value.items()]
    raise SettingError(f"artefacts in {path} must be a list of paths, or a table of them by name.")
