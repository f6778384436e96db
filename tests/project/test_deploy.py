"""Files for deployment agree with the command and with each other."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

from aoft_deploy.cli.serve import parser

yaml: Any = importlib.import_module("yaml")  # has no types
ROOT = Path(__file__).parents[2]


def test_arguments_parse_and_packages_are_the_extra_s() -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text().replace("\\\n", " ")
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", text, re.M)
    command = re.search(r"^CMD (\[.*\])$", text, re.M)
    assert entry is not None and command is not None
    arguments = yaml.safe_load(entry[1])[1:] + yaml.safe_load(command[1])
    assert parser().parse_args(arguments).host == "0.0.0.0"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    installed = set(re.findall(r'"([^"]+)"', text))
    assert {*extras["serve"], *extras["cpu"]} <= installed


def test_manifests_are_read() -> None:
    runtime, service = yaml.safe_load_all((ROOT / "deploy" / "kserve.yaml").read_text())
    (container,) = runtime["spec"]["containers"]
    options = parser().parse_args(container["args"])
    assert options.grace == 30 and options.strict
    assert service["spec"]["predictor"]["model"]["runtime"] == runtime["metadata"]["name"]
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    served = compose["services"]["serve"]
    assert served["build"]["dockerfile"] == "deploy/Dockerfile"
    assert parser().parse_args(served["command"]).strict
