"""The server's application as a deployment of Ray Serve with several replicas.

    export RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1
    serve run aoft_deploy.serving.ray:app config=serve.toml replicas=2

Every replica serves everything that the TOML file names, so any replica answers requests for any
task. Ray decides on address and port, and the settings about connections are not used. A replica
gets as many GPUs as ``device`` names, and numbers them from 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aoft_deploy.errors import SettingError
from aoft_deploy.serving.endpoints.application import Application
from aoft_deploy.serving.repository.names import artefact_name
from aoft_deploy.serving.service import Service
from aoft_deploy.serving.settings import Settings, read_toml

__all__ = ["app"]


def app(arguments: dict[str, str]) -> Any:
    """Build the application, for Ray Serve.

    Args:
        arguments: ``config``, a TOML file of settings and artefacts; ``replicas``, default 1;
            ``cpus`` of each replica, default 1.

    Raises:
        SettingError: An argument is missing, unknown or not a number.
    """
    unknown = set(arguments) - {"config", "replicas", "cpus"}
    if unknown or "config" not in arguments:
        raise SettingError(
            f"Arguments are {', '.join(sorted(arguments)) or 'none'}: give config=FILE, and "
            "optionally replicas=N and cpus=N."
        )
    try:
        replicas, cpus = int(arguments.get("replicas", 1)), float(arguments.get("cpus", 1))
    except ValueError as error:
        raise SettingError(f"replicas and cpus must be numbers ({error}).") from error
    found = read_toml(Path(arguments["config"]).absolute())
    given = [artefact_name(path) for path in found.pop("artefacts", [])]
    settings = Settings(**found)
    gpus = sum(device != "cpu" for device in settings.device)
    from ray import serve

    def build() -> Application:
        return Application(Service(settings, given))

    @serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=2 * settings.queue,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        graceful_shutdown_timeout_s=settings.grace,
    )
    @serve.ingress(build)
    class Served:
        """The application in a replica."""

    deployment: Any = Served
    return deployment.bind()
