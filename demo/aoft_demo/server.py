"""The page's server: on this machine alone, no call to any other, nothing left behind."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from aoft_deploy.errors import MissingExtraError, OutputError

__all__ = ["MAX_UPLOAD", "running", "serve"]

MAX_UPLOAD = "50mb"
"""Of a file; photographs of 50 megapixels have up to 40 MB."""
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


def serve(page: contextlib.AbstractContextManager[str]) -> None:
    """Serve what ``running`` gives until interrupted.

    A handler that still computes by then has nobody to show its result to: the process ends.
    """
    print("Opening the tasks; the first time that takes about half a minute …", flush=True)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as below nohup
            signal.signal(number, _end)
    with contextlib.suppress(KeyboardInterrupt), page as address:
        print(f"aoft-demo is at {address} (Ctrl-C ends it)", flush=True)
        never = threading.Event()
        while not never.wait(0.5):  # the system may give a signal to a thread that does not wake us
            pass
    sys.stdout.flush()
    if threading.active_count() > 1:
        os._exit(0)


@contextlib.contextmanager
def running(
    paths: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    weights: Path | None = None,
    examples: Path | None = None,
    threads: int | None = None,
    allowed_hosts: Sequence[str] = (),
) -> Iterator[str]:
    """A page that is served while the block runs.

    Args:
        paths: See ``open_stage``.
        host: Address to listen on.
        port: 0 takes a free one.
        weights: File with the backbone's weights; None takes timm's own.
        examples: Folder of pictures to offer; None takes the bundled ones.
        threads: Of the runtime; None lets it choose.
        allowed_hosts: Further names by which a page on this machine's own address may be asked for,
            such as a proxy's. Other names are refused: a website whose name was pointed to
            127.0.0.1 would reach the page from a visitor's browser.

    Yields:
        The page's address.

    Raises:
        MissingExtraError: Gradio is not installed.
        OutputError: The port is taken.
        AoftError: A path that cannot be shown.
    """
    port = _free(host, port)
    with _scratch() as scratch:
        for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
            del os.environ[name]  # by which Gradio would look whether its own page is there
        os.environ.update(
            GRADIO_ANALYTICS_ENABLED="False",
            GRADIO_RUN_HISTORY="False",  # which keeps pictures in the browser, or sends them on
            GRADIO_TEMP_DIR=str(scratch / "uploads"),
            HF_HUB_OFFLINE="1",
            ORT_DISABLE_TELEMETRY="1",  # which onnxruntime reads when it is imported
        )
        try:
            import gradio  # noqa: F401
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(str(error.name), "demo") from error

        import PIL.Image
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from aoft_demo.actions.classify import MAX_PIXELS
        from aoft_demo.tasks.shared_fleet import open_stage
        from aoft_demo.tasks.visitors import Visitors
        from aoft_demo.views.page import build
        from aoft_demo.views.style import CSS, theme
        from aoft_deploy.data.listing import image_files

        names = [*LOOPBACK, *allowed_hosts] if host in LOOPBACK else ["*"]
        trusted = Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)
        PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS
        _fetch_nothing()
        pictures = None if examples is None else image_files([examples])[:24]
        stage = open_stage(paths, scratch, weights=weights, examples=pictures, threads=threads)
        visitors = Visitors(stage)
        page = build(visitors).queue(max_size=64)
        try:
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
                app_kwargs={"middleware": [trusted]},
            )
            # While people look at the page, for the tabs that need it.
            torch = ["aoft_deploy.export.merged"]
            threading.Thread(target=importlib.import_module, args=torch, daemon=True).start()
            yield f"http://{host}:{port}"
        finally:
            visitors.close()
            server: Any = getattr(page, "server", None)
            if server is not None:
                server.force_exit = True  # pages that are open hold connections
                logging.getLogger("uvicorn.error").disabled = True  # which would tell of each
            page.close(verbose=False)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for all temporary files of this process and those that it starts; it goes."""
    before, named = tempfile.tempdir, os.environ.get("TMPDIR")
    folder = Path(tempfile.mkdtemp(prefix="aoft-demo-")).resolve()
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    try:
        yield folder
    finally:
        _hear_no_signal()
        tempfile.tempdir = before
        os.environ.pop("TMPDIR")
        os.environ.update({} if named is None else {"TMPDIR": named})
        for _ in range(10):  # a handler that still computes may write while we remove
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.05)


def _end(number: int, frame: FrameType | None) -> None:
    """End by the first signal; a second one must not interrupt the removal of processes."""
    _hear_no_signal()
    raise KeyboardInterrupt


def _nothing(number: int, frame: FrameType | None) -> None:
    """Python tells of a signal that comes while it begins to be ignored; so it has a handler."""


def _hear_no_signal() -> None:
    """An impatient second one would end the process before its files are removed."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _nothing)


def _fetch_nothing() -> None:
    """Gradio would fetch an address that a visitor names as the place of a file."""
    fetcher: Any = importlib.import_module("safehttpx")

    async def refuse(*_: object, **__: object) -> NoReturn:
        raise PermissionError("Nothing is fetched from elsewhere.")

    fetcher.get = fetcher.async_validate_url = refuse


def _free(host: str, port: int) -> int:
    """The port, or a free one for 0."""
    try:
        with socket.create_server((host, port)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        raise OutputError(
            f"Cannot listen on {host}:{port} ({error.strerror}): choose another with --port."
        ) from error
