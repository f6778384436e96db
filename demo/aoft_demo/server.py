"""The demo's server. It makes no requests to other machines and leaves no files."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from aoft_demo.shutdown import interrupt_on_signals, temporary_folder
from aoft_deploy.errors import OutputError, optional_imports

__all__ = ["MAX_UPLOAD", "demo_server", "serve"]

MAX_UPLOAD = "50mb"
"""Size limit of an uploaded file; photographs of 50 megapixels have up to 40 MB."""

MAX_EXAMPLES = 24
"""Example pictures that are shown at most."""

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


def serve(server: contextlib.AbstractContextManager[str]) -> None:
    """Run a server until a signal arrives.

    The process ends even if handlers still run, as nobody can see their results.

    Args:
        server: A ``demo_server``.
    """
    print("Opening the tasks; the first start takes about half a minute …", flush=True)
    interrupt_on_signals()
    with contextlib.suppress(KeyboardInterrupt), server as address:
        print(f"aoft-demo is at {address} (Ctrl-C stops it)", flush=True)
        never = threading.Event()
        while not never.wait(0.5):  # a signal to another thread does not end the wait
            pass
    sys.stdout.flush()
    if threading.active_count() > 1:
        os._exit(0)


@contextlib.contextmanager
def demo_server(
    paths: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    weights: Path | None = None,
    examples: Path | None = None,
    threads: int | None = None,
    allowed_hosts: Sequence[str] = (),
) -> Iterator[str]:
    """Context manager: serve the page.

    Args:
        paths: See ``open_shared_fleet``.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        weights: File with the backbone's weights; None takes timm's own.
        examples: Folder of example pictures; None takes the bundled ones.
        threads: Threads of the runtime; None lets the runtime choose.
        allowed_hosts: Further host names of requests, such as a proxy's. If ``host`` is a loopback
            address, other names are refused. Otherwise a website could point its name to 127.0.0.1
            and read the page through a user's browser (DNS rebinding).

    Yields:
        The page's address.

    Raises:
        MissingExtraError: Gradio or ONNX Runtime is not installed.
        OutputError: The port is taken.
        AoftError: A path is neither a fleet nor a checkpoint.
    """
    port = _free_port(host, port)
    with temporary_folder() as folder:
        _set_environment(folder)
        with optional_imports():
            import gradio  # noqa: F401
            import onnxruntime  # noqa: F401

        import PIL.Image

        from aoft_demo.actions.pictures import MAX_PIXELS
        from aoft_demo.tasks.session_registry import SessionRegistry
        from aoft_demo.tasks.shared_fleet import open_shared_fleet
        from aoft_demo.views.page import build
        from aoft_deploy.data.listing import image_files

        PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS
        _refuse_downloads()
        pictures = None if examples is None else image_files([examples])[:MAX_EXAMPLES]
        shared = open_shared_fleet(
            paths, folder, weights=weights, examples=pictures, threads=threads
        )
        sessions = SessionRegistry(shared)
        page: Any = build(sessions).queue(max_size=64)
        try:
            _launch(page, host, port, allowed_hosts, shared.examples)
            # Import torch in the background: several tabs need it later.
            modules = ["aoft_deploy.checkpoints.opening"]
            threading.Thread(target=importlib.import_module, args=modules, daemon=True).start()
            yield f"http://{host}:{port}"
        finally:
            sessions.close()
            _close(page)


def _set_environment(folder: Path) -> None:
    """Set the variables that Gradio and ONNX Runtime read when they are imported."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]  # Gradio would check through the proxy whether its page answers
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False",
        GRADIO_RUN_HISTORY="False",  # keeps pictures in the browser, or uploads them
        GRADIO_TEMP_DIR=str(folder / "uploads"),
        HF_HUB_OFFLINE="1",
        ORT_DISABLE_TELEMETRY="1",
    )


def _launch(
    page: Any, host: str, port: int, allowed_hosts: Sequence[str], examples: Sequence[Path]
) -> None:
    """Start Gradio's server in a thread."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from aoft_demo.views.ask.picture import thumbnail
    from aoft_demo.views.page import SCRIPT
    from aoft_demo.views.style import CSS, theme
    from aoft_demo.web import Additions

    names = [*LOOPBACK, *allowed_hosts] if host in LOOPBACK else ["*"]
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)
    additions = Middleware(Additions, examples=[thumbnail(path) for path in examples])
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        show_error=False,
        prevent_thread_lock=True,
        max_file_size=MAX_UPLOAD,
        footer_links=[],
        enable_monitoring=False,
        ssr_mode=False,
        theme=theme(),
        css=CSS,
        head=f"<script>{SCRIPT}</script>",
        app_kwargs={"middleware": [trusted, additions]},
    )


def _close(page: Any) -> None:
    """Stop Gradio's server without waiting for open pages."""
    server: Any = getattr(page, "server", None)
    if server is not None:
        server.force_exit = True
        logging.getLogger("uvicorn.error").disabled = True  # it would log each open connection
    page.close(verbose=False)


def _refuse_downloads() -> None:
    """Replace the function with which Gradio downloads a file from an address in a request."""
    safehttpx: Any = importlib.import_module("safehttpx")

    async def refuse(*_: object, **__: object) -> NoReturn:
        raise PermissionError("The demo downloads nothing.")

    safehttpx.get = safehttpx.async_validate_url = refuse


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        OutputError: The port is taken.
    """
    try:
        with socket.create_server((host, port)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # Python adds the address in brackets
        raise OutputError(
            f"Cannot listen on {host}:{port} ({reason}): choose another `port`."
        ) from error
