"""The files in deploy/ agree with the command's parser and with each other."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

from aoft_deploy.cli.serve import parser

yaml: Any = importlib.import_module("yaml")  # has no types


def test_the_dockerfile_has_valid_arguments_and_all_packages(root: Path) -> None:
    text = (root / "deploy" / "Dockerfile").read_text().replace("\\\n", " ")
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", text, re.M)
    command = re.search(r"^CMD (\[.*\])$", text, re.M)
    assert entry is not None and command is not None
    arguments = yaml.safe_load(entry[1])[1:] + yaml.safe_load(command[1])
    assert parser().parse_args(arguments).host == "0.0.0.0"
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    installed = re.search(r"pip install .*\"/srv/source\[(.+)\]\"", text)
    runtime = re.search(r"^ARG RUNTIME=(\w+)$", text, re.M)
    assert installed is not None and runtime is not None
    assert installed[1] == "${RUNTIME},serve" and runtime[1] == "cpu"
    assert {"cpu", "gpu", "serve"} <= set(project["optional-dependencies"])


def test_the_manifests_have_valid_arguments(root: Path) -> None:
    runtime, service = yaml.safe_load_all((root / "deploy" / "kserve.yaml").read_text())
    (container,) = runtime["spec"]["containers"]
    options = parser().parse_args(container["args"])
    assert options.grace == 30 and options.strict
    assert service["spec"]["predictor"]["model"]["runtime"] == runtime["metadata"]["name"]
    compose = yaml.safe_load((root / "deploy" / "compose.yaml").read_text())
    served = compose["services"]["serve"]
    assert served["build"]["dockerfile"] == "deploy/Dockerfile"
    assert parser().parse_args(served["command"]).strict
