"""Health checks and clients reach the server, even if proxy variables are set."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running_demo import Demo

UNREACHABLE = "http://127.0.0.1:9"
PROXIES = {
    name: UNREACHABLE
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY")
}


@pytest.fixture(scope="module")
def served(serve: Callable[..., Any], artefact: Path) -> Any:
    return serve(artefact)


def test_the_containers_health_check_ignores_proxies(served: Any, root: Path) -> None:
    text = (root / "deploy" / "Dockerfile").read_text().replace("\\\n", " ")
    check = re.search(r"^HEALTHCHECK .*CMD\s+(\[.*\])$", text, re.M)
    assert check is not None
    program, *arguments = json.loads(check[1])
    assert program == "python" and ":8000/" in arguments[-1]
    arguments[-1] = arguments[-1].replace(":8000/", f":{served.port}/")

    def healthy(*command: str) -> bool:
        environment = {**os.environ, **PROXIES, "no_proxy": ""}
        return subprocess.run([sys.executable, *command], env=environment).returncode == 0

    assert healthy(*arguments)
    arguments[-1] = arguments[-1].replace(f":{served.port}/", ":9/")
    assert not healthy(*arguments)


@pytest.mark.slow
def test_the_demo_starts_with_proxy_variables(tmp_path: Path) -> None:
    socks = dict.fromkeys(("all_proxy", "ALL_PROXY"), "socks5://127.0.0.1:9")
    environment = {**PROXIES, **socks, "no_proxy": "", "NO_PROXY": ""}
    demo = Demo(tmp_path / "log", environment=environment)
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(demo.address, timeout=60) as answer:
            assert answer.status == 200
    finally:
        demo.end()


KSERVE_CLIENT = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

async def main(base):
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0, timeout=60))
    states = [await client.is_server_live(base), await client.is_server_ready(base)]
    states += [await client.is_model_ready(base, name) for name in ("task", "unknown")]
    images = np.linspace(-1, 1, 768, dtype=np.float32).reshape(1, 3, 16, 16)
    answers = []
    for binary in (False, True):
        tensor = InferInput("pixel_values", list(images.shape), "FP32")
        tensor.set_data_from_numpy(images, binary_data=binary)
        request = InferRequest(model_name="task", infer_inputs=[tensor], request_id="7")
        answer = await client.infer(base, request, model_name="task")
        answers.append(answer.outputs[0].as_numpy().ravel().tolist())
    print(json.dumps([states, answers]))

asyncio.run(main(sys.argv[1]))
"""
PACKAGES = [
    "kserve==0.21.0",
    "cloudevents==1.13.0",
    "deprecation==2.1.0",
    "durationpy==0.11",
    "google-auth==2.63.0",
    "grpc-interceptor==0.15.4",
    "kubernetes==37.0.2",
    "oauthlib==4.0.1",
    "pandas==2.3.3",
    "python-dateutil==4.0.0",
    "pytz==2026.6",
    "requests-oauthlib==2.0.0",
    "timing-asgi==0.3.2",
    "tzdata==2026.6",
    "websocket-client==1.9.2",
]
"""KServe's client with its dependencies; pip's resolver would install older versions of ours."""


@pytest.mark.slow
def test_kserves_client_works(served: Any, tmp_path: Path) -> None:
    import numpy as np

    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, str(tmp_path), *PACKAGES], check=True, timeout=900)
    command = [sys.executable, "-c", KSERVE_CLIENT, f"http://127.0.0.1:{served.port}"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    states, answers = json.loads(done.stdout)
    assert states == [True, True, True, False]
    images = np.linspace(-1, 1, 768, dtype=np.float32).reshape(1, 3, 16, 16)
    expected = served.logits("task", images).ravel()
    for answer in answers:
        assert np.allclose(answer, expected, atol=1e-6)
