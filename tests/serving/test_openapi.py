"""Requests generated from the server's description neither fail nor hang the server."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

schemathesis: Any = importlib.import_module("schemathesis")
TOKEN = "a token of more than sixteen bytes"


@pytest.fixture(scope="module")
def served(
    serve: Callable[..., Any],
    artefact: Path,
    fleet_artefact: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(TOKEN)
    return serve(artefact, fleet_artefact, "--admin-token-file", token, "--body-timeout", 2)


def test_the_description_and_the_page_contain_every_endpoint(served: Any) -> None:
    status, headers, content = served.ask("GET", "/openapi.json")
    assert status == 200 and headers["content-type"] == "application/json"
    found = json.loads(content)
    assert found["openapi"] == "3.1.0" and len(found["paths"]) == 14
    status, headers, content = served.ask("GET", "/docs")
    assert status == 200 and headers["content-type"].startswith("text/html")
    for address in found["paths"]:
        assert f"<code>{address}</code>" in content.decode()
    assert b"http://" not in content and b"https://" not in content


@pytest.mark.parametrize("model", ["task", "pets", "nobody"])
def test_requests_from_the_description_never_fail_the_server(served: Any, model: str) -> None:
    description = json.loads(served.ask("GET", "/openapi.json")[2])
    for path in description["paths"].values():
        for operation in path.values():
            for parameter in operation["parameters"]:
                if parameter["name"] == "model":
                    parameter["schema"]["enum"] = [model]
    schema = schemathesis.openapi.from_dict(description)
    wanted = [
        importlib.import_module("schemathesis.checks").not_a_server_error,
        *(
            getattr(importlib.import_module("schemathesis.specs.openapi.checks"), name)
            for name in (
                "status_code_conformance",
                "content_type_conformance",
                "response_schema_conformance",
            )
        ),
    ]
    found: dict[str, set[int]] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        strategies = [operation.as_strategy(mode) for mode in schemathesis.GenerationMode]

        @settings(
            max_examples=25,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=st.one_of(strategies))
        def run(case: Any) -> None:
            response = case.call(
                base_url=f"http://127.0.0.1:{served.port}",
                headers={"Authorization": f"Bearer {TOKEN}"},
                timeout=5,
            )
            found.setdefault(case.path, set()).add(response.status_code)
            case.validate_response(response, checks=wanted)

        run()
    assert len(found) == len(description["paths"])
    assert served.process.poll() is None and served.ask("GET", "/v2/health/ready")[0] == 200
