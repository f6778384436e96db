"""Servers for the tests of failures; after each test they must be alive, ready and correct.

Where the rows of the survey of failures are tested, by their numbers:

    1-11, 18, 19    test_requests.py, and ../test_protocol.py
    12-17           test_bodies.py, ../test_bodies.py, ../test_encodings.py, ../test_connections.py
    20-23, 42       test_reload.py
    24-27, 30-33    test_overload.py, ../test_batcher.py, ../test_application.py; 33 also in
                    ``Served.refused`` of tests/conftest.py for every refusal
    28, 29          ../test_server.py
    34-37           test_images.py, ../test_images.py, and of the decoder alone tests/data
    38, 39          tests/checkpoints, tests/fleet/test_store.py, tests/project/test_sources.py
    40              test_reload.py, tests/checkpoints, tests/fleet/test_store.py
    41              test_reload.py, tests/artefacts
    43              tests/checkpoints: only single arrays of a backbone's .npz are read, nothing is
                    unpacked to the disk, and no other archive is opened; ../test_settings.py: TOML
    44              tests/project, tests/checkpoints
    45              tests/exporters/tensorrt
    46              tests/demo

Differences from the survey:

    31              The test requests 400 TB, since some machines have the survey's 40 GB.
    34              Files that are not images of a recorded kind (random bytes, HTML, SVG, PDF) get
                    415, as HTTP specifies; a damaged image gets the survey's 400.
    38-40, 42       A command that refuses a file exits with 1; the survey's 2 means wrong usage.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failure_requests import (
    HARMLESS,
    IMAGES,
    TOKEN,
)
from faulty_model import expected_logits, metadata_of, write_faulty_model

ROOM = 20 * 2**20
"""Maximum growth of a server's memory in bytes after any of the tests.

The maximum observed is nine MiB: blocks of a MiB that still contain some Python object.
"""


@pytest.fixture(scope="module")
def made_artefact(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_faulty_model(tmp_path_factory.mktemp("made") / "made.onnx", metadata_of(artefact))


@pytest.fixture(scope="module")
def repository(
    artefact: Path, fleet_tasks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("outer") / "repository"
    folder.mkdir()
    shutil.copy(artefact, folder / "changing.onnx")
    shutil.copy(fleet_tasks["zürich"], folder / "zürich.ckpt")
    shutil.copy(artefact, folder.parent / "outside.onnx")
    return folder


def recorded(server: Any, **models: Any) -> Any:
    """Record a server's answers and its memory once it is warm."""
    server.expected = {name: (each, server.logits(name, each)) for name, each in models.items()}
    for _ in range(50):
        server.logits("task", IMAGES)
    server.baseline = server.memory()
    return server


@pytest.fixture(scope="module")
def served(
    serve: Callable[..., Any],
    artefact: Path,
    made_artefact: Path,
    fleet_artefact: Path,
    repository: Path,
) -> Any:
    token = repository.parent / "token"
    token.write_text(TOKEN)
    options = ["--admin-token-file", token, "--repository", repository, "--follow", "0"]
    options += ["--queue", 64, "--body-timeout", 2, "--max-body", 4 * 2**20]
    options += ["--max-pixels", 10**7, "--engine-timeout", 3]
    server = serve(f"task={artefact}", made_artefact, fleet_artefact, *options)
    assert np.allclose(server.logits("made", HARMLESS), expected_logits(HARMLESS), atol=1e-4)
    return recorded(server, task=IMAGES, made=HARMLESS)


@pytest.fixture(scope="module", params=["httptools", "h11"])
def wire(request: pytest.FixtureRequest, serve: Callable[..., Any], artefact: Path) -> Any:
    """A server without a token, once for each HTTP parser."""
    options = ["--http", request.param, "--body-timeout", 5, "--max-body", 4 * 2**20]
    return recorded(serve(f"task={artefact}", *options), task=IMAGES)


@pytest.fixture(autouse=True)
def alive_ready_and_right(request: pytest.FixtureRequest, served: Any) -> Iterator[None]:
    servers = [served]
    if "wire" in request.fixturenames:
        servers.append(request.getfixturevalue("wire"))
    yield
    for server in servers:
        server.check()
        for model, (images, logits) in server.expected.items():
            assert np.array_equal(server.logits(model, images), logits)
        assert server.memory() < server.baseline + ROOM
