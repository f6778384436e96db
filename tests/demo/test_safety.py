"""Attacks on the demo with plain HTTP; the command runs in a subprocess."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bombs import flat
from PIL import Image
from running_demo import Answer, Demo, DemoClient, uploaded_file
from teaching import add_picture, taught_classes

from aoft_demo.server import MAX_UPLOAD
from aoft_demo.tasks.shared_fleet import BUNDLED, bundled_checkpoints
from aoft_demo.tasks.skills import bundled_examples

pytestmark = pytest.mark.slow

PICTURE, CHECKPOINT = bundled_examples()[0].file, bundled_checkpoints()[0]
TASK = CHECKPOINT.stem

SECRET = "a secret of the host"
PASSWORDS = Path("/etc/passwd").read_text()

LOG_NETWORK_ACCESS = """
import os, sys

def log(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        with open(os.environ["NETWORK_LOG"], "a") as file:
            print(event, *map(repr, arguments[-5:]), file=file)

sys.addaudithook(log)
"""
"""A sitecustomize.py that logs all network access of the process."""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoClient]:
    folder = tmp_path_factory.mktemp("safety")
    cwd, home, log = folder / "cwd", folder / "home", folder / "demo" / "log"
    for new in (cwd, home, log.parent, folder / "site"):
        new.mkdir()
    (folder / "site" / "sitecustomize.py").write_text(LOG_NETWORK_ACCESS)
    for path in (cwd / "secret.txt", home / ".bashrc", folder / "demo" / "secret.txt"):
        path.write_text(SECRET)
    shutil.copyfile(PICTURE, cwd / "picture.png")
    shutil.copyfile(CHECKPOINT, cwd / "task.ckpt")
    paths = [str(folder / "site"), os.environ.get("PYTHONPATH")]
    environment = {
        "HOME": str(home),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "NETWORK_LOG": str(folder / "network.log"),
    }
    demo = Demo(log, "--allow-host", "page.lan", cwd=cwd, environment=environment)
    try:
        yield DemoClient(demo, cwd, home, folder / "network.log")
    finally:
        demo.end()


@pytest.fixture(autouse=True)
def still_works(client: DemoClient) -> Iterator[None]:
    """After each attack the server still classifies, and it has accessed no other machine."""
    client.clear_network_log()
    yield
    assert client.demo.process.poll() is None
    status, path = client.upload(PICTURE.name, PICTURE.read_bytes())
    assert status == 200
    answer = client.classify(path)
    assert answer.success and f'data-task=\\"{TASK}\\"' in answer.text
    assert client.network_access == []


class Canary:
    """A server that counts its connections."""

    def __init__(self) -> None:
        self.connections = 0
        self.connected = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            self.connected.set()
            connection.close()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def canary() -> Iterator[Canary]:
    server = Canary()
    yield server
    server.close()


def test_the_canary_counts_a_connection(canary: Canary) -> None:
    socket.create_connection(("127.0.0.1", canary.port)).close()
    assert canary.connected.wait(60) and canary.connections == 1


def assert_refused(client: DemoClient, path: str, allowed: tuple[int, ...] = (403, 404)) -> None:
    """Assert that a request is refused, and that the answer shows no file of the host."""
    for method in ("GET", "HEAD"):
        status, _, content = client.ask(method, path)
        assert status in (allowed if method == "GET" else (*allowed, 405)), (path, content[:200])
        text = content.decode("utf-8", "replace")
        assert SECRET not in text and PASSWORDS[:40] not in text
        assert "Traceback" not in text


FILES = (
    "/etc/passwd",
    "//etc/passwd",
    "etc/passwd",
    "../../../../../../../../etc/passwd",
    "..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd",
    "%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "%2e%2e%2f%2e%2e%2f%2e%2e%2f%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "%252e%252e%252fetc%252fpasswd",
    "%2fetc%2fpasswd",
    "/proc/self/environ",
    "C:/Windows/win.ini",
    "C:%5CWindows%5Cwin.ini",
    "file:///etc/passwd",
    "file:/etc/passwd",
    "~/.bashrc",
    "secret.txt",
    "./secret.txt",
    ".",
    "",
    "%00",
    "/etc/passwd%00.png",
)


@pytest.mark.parametrize("prefix", ["file=", "file/"])
@pytest.mark.parametrize("path", FILES)
def test_no_file_of_the_host_is_served(client: DemoClient, prefix: str, path: str) -> None:
    assert_refused(client, f"/gradio_api/{prefix}{path}")


def test_no_file_outside_of_the_uploads_is_served(client: DemoClient) -> None:
    temporary = client.uploads.parent
    (temporary / "secret.txt").write_text(SECRET)
    paths = [temporary / "secret.txt", client.demo.log, client.cwd / "secret.txt"]
    paths += [client.home / ".bashrc", CHECKPOINT, temporary, client.uploads]
    for path in paths:
        assert_refused(client, f"/gradio_api/file={path}")
        assert_refused(client, f"/gradio_api/file={client.uploads}/../../../{path}")
    assert_refused(client, f"/gradio_api/file={client.uploads}/../secret.txt")
    assert_refused(client, f"/gradio_api/file={client.uploads}/%2e%2e/secret.txt")


@pytest.mark.parametrize(
    "path",
    [
        "/static/../../../../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/static/..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/static//etc/passwd",
        "/assets/../../../../../../../etc/passwd",
        "/assets/..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/assets//etc/passwd",
        "/svelte/..%2f..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/gradio_api/custom_component/x/client/component/..%2f..%2fetc%2fpasswd",
    ],
)
def test_only_gradios_own_files_are_static(client: DemoClient, path: str) -> None:
    assert_refused(client, path)


URLS = (
    "http://127.0.0.1:{port}/x.png",
    "http://localhost:{port}/x.png",
    "http://[::1]:{port}/x.png",
    "http://0.0.0.0:{port}/x.png",
    "http://2130706433:{port}/x.png",
    "http://127.1:{port}/x.png",
    "http://169.254.169.254/latest/meta-data/",
    "http://user@127.0.0.1:{port}/x.png",
    "https://127.0.0.1:{port}/x.png",
    "http://192.0.2.1/x.png",
    "http://1.1.1.1/x.png",
    "https://huggingface.co/x.png",
    "ftp://127.0.0.1:{port}/x.png",
)


@pytest.mark.parametrize("url", URLS)
def test_no_address_is_downloaded(client: DemoClient, canary: Canary, url: str) -> None:
    url = url.format(port=canary.port)
    assert_refused(client, f"/gradio_api/file={url}")
    assert_refused(client, f"/gradio_api/proxy={url}", (400, 403, 404))
    assert_refused(client, f"/gradio_api/proxy=/{url}", (400, 403, 404))
    _, path = client.upload("good.png", PICTURE.read_bytes())
    for picture in (
        uploaded_file(url),
        uploaded_file(url, url=url),
        {"path": url},
        uploaded_file(path, url=url),
    ):
        answer = client.call("picture", "change", picture)
        if picture["path"] == url:
            assert not answer.success or "data-task" not in answer.text
        assert not client.call("look", "click", TASK, {"path": url}).success
    assert refused(add(client, uploaded_file(url)))
    assert canary.connections == 0 and client.network_access == []


def host_files(client: DemoClient, suffix: str) -> list[str]:
    """Files of the host that were not uploaded, as paths in many spellings."""
    name = "picture.png" if suffix == ".png" else "task.ckpt"
    bundled = CHECKPOINT if suffix == ".ckpt" else BUNDLED / "no example.png"
    path, uploads = client.cwd / name, client.uploads
    return [
        str(path),
        name,
        f"./{name}",
        f"../cwd/{name}",
        f"{uploads}/../../../cwd/{name}",
        f"{uploads}/{os.path.relpath(path, uploads)}",
        f"file={path}",
        f"file://{path}",
        str(bundled),
        "/etc/passwd",
        "/proc/self/environ",
        str(client.home / ".bashrc"),
        "~/.bashrc",
        "C:/Windows/win.ini",
        str(uploads),
        "",
    ]


def test_no_picture_of_the_host_is_classified(client: DemoClient) -> None:
    for path in host_files(client, ".png"):
        for picture in (
            uploaded_file(path),
            {"path": path},
            {"path": path, "url": path},
            {"url": path},
        ):
            answer = client.call("picture", "change", picture)
            assert not answer.success or "data-task" not in answer.text, picture
            assert SECRET not in answer.text and PASSWORDS[:40] not in answer.text
            assert (
                "data-task"
                not in client.call("rows", "proved", picture, event_data={"name": TASK}).text
            )


def test_no_checkpoint_of_the_host_is_added(client: DemoClient) -> None:
    for path in host_files(client, ".ckpt"):
        for file in (
            uploaded_file(path),
            {"path": path},
            {"path": path, "url": path},
            [uploaded_file(path)],
        ):
            answer = add(client, file)
            assert not answer.success or "joined the fleet" not in answer.text, file
            assert SECRET not in answer.text and PASSWORDS[:40] not in answer.text


def test_no_picture_of_the_host_is_used_for_training(client: DemoClient) -> None:
    _, others = client.upload("picture.png", red_png())
    for path in [*host_files(client, ".png"), others, None, 7, [others], "\0", "x" * 5000]:
        before = client.cwd.joinpath("picture.png").read_bytes(), Path(others).read_bytes()
        id = "0" * 32
        added = add_picture(client, id, path)
        assert "was not uploaded" in added or '"error"' in added, ascii(path)  # Gradio's or ours
        attempt = {"number": 1, "path": path, "name": "a", "skill": "shape"}
        answer = client.call("teach-trial", "attempt", event_data=attempt)
        known = "was not uploaded" in answer.text or not answer.success
        assert known and "data-task" not in answer.text, path
        assert (client.cwd / "picture.png").read_bytes() == before[0]
        assert Path(others).read_bytes() == before[1]  # not deleted either
    assert not list(client.uploads.parent.glob("session-*/pictures/*.png"))


@pytest.mark.parametrize("id", ["", "../../evil", "a" * 31, "A" * 32, "/etc/passwd", None, 7])
def test_a_pictures_name_leads_nowhere_else(client: DemoClient, id: Any) -> None:
    status, path = client.upload(f"teach-{'1' * 32}.png", red_png())
    assert status == 200
    assert "not the name of a picture" in add_picture(client, id, path)
    assert not list(client.uploads.parent.glob("session-*/pictures/*.png"))
    data = {"number": 1, "add": [], "remove": [id, {"a": 1}]}
    assert client.call("teach-tiles", "pictures", event_data=data).success


@pytest.mark.parametrize(
    "classes",
    [
        "",
        "7",
        "[7, 8]",
        "[" * 20_000,
        '[{"name": "a"}]',
        '[{"name": "a", "pictures": [["../../x", 0]]}]',
        '[{"name": "a", "pictures": [["x", 1e999]]}]',
        '[{"name": "a", "pictures": [["x"]]}]',
        "[" + "0," * 50_000 + "0]",
    ],
    ids=lambda text: text[:20],
)
def test_odd_classes_are_refused(client: DemoClient, classes: str) -> None:
    before = client.demo.log.read_text()
    assert refused(client.call("train", "click", "odd", classes))
    assert client.demo.log.read_text() == before  # no traceback


def test_gradios_monitoring_is_off(client: DemoClient) -> None:
    for path in ("/monitoring", "/monitoring/", "/monitoring/summary", "/monitoring/key"):
        assert client.ask("GET", path)[0] in (403, 307)
    assert client.ask("GET", "/monitoring/summary")[0] == 403
    assert client.ask("GET", "/monitoring/key")[0] == 403


def test_gradios_run_history_is_off(client: DemoClient) -> None:
    for path in ("runs", "run-history/buckets", "run-history/records?bucket_id=a/b"):
        headers = {"Authorization": "Bearer hf_x", "X-HF-Token": "hf_x"}
        assert client.ask("GET", f"/gradio_api/{path}", None, headers)[0] == 404
    body = b'{"bucket_id": "someone/bucket"}'
    headers = {"Content-Type": "application/json", "Authorization": "Bearer hf_x"}
    status = client.ask("POST", "/gradio_api/run-history/connect", body, headers)[0]
    assert status in (404, 405)


@pytest.mark.parametrize("path", ["vibe-edit", "vibe-code", "undo-vibe-edit"])
def test_gradios_code_editor_is_off(client: DemoClient, path: str) -> None:
    headers = {"Content-Type": "application/json"}
    body = json.dumps({"prompt": "a", "code": "import os"}).encode()
    assert client.ask("POST", f"/gradio_api/{path}", body, headers)[0] in (403, 404, 422)


@pytest.mark.parametrize(
    "name",
    [
        "../../evil.png",
        "a/../../../evil.png",
        "..%2f..%2fevil.png",
        "..\\\\..\\\\evil.png",
        "/etc/evil.png",
        "C:/evil.png",
        "~/evil.png",
        "..",
        ".",
        "...",
        "",
        "evil.png\x01.txt",
        "x" * 3000 + "evil.png",
        "\udcff\udcfeevil.png",
    ],
    ids=lambda name: ascii(name)[:24],
)
def test_an_uploaded_file_is_stored_among_the_uploads(client: DemoClient, name: str) -> None:
    before = {path for path in client.demo.folder.parent.rglob("*") if path.is_file()}
    raw = name.encode("utf-8", "surrogateescape")
    status, path = client.upload(raw, b"an evil picture")
    assert status in (200, 400), path
    now = {path for path in client.demo.folder.parent.rglob("*") if path.is_file()}
    assert all(new.is_relative_to(client.uploads) for new in now - before)
    if status == 200:
        assert Path(path).resolve().is_relative_to(client.uploads.resolve())
        assert Path(path).read_bytes() == b"an evil picture"
    assert not Path("/etc/evil.png").exists()


@pytest.mark.parametrize("name", ["a.html", "a.svg", "a.xhtml", "a.xml", "a.js", "a.htm", "a"])
def test_an_uploaded_page_is_served_as_a_download(client: DemoClient, name: str) -> None:
    status, path = client.upload(name, b"<html><script>alert(1)</script></html>")
    assert status == 200
    for headers in ({}, {"Range": "bytes=0-20"}):
        status, received, _ = client.ask("GET", f"/gradio_api/file={path}", None, headers)
        assert status in (200, 206)
        assert received["content-type"].startswith("application/octet-stream")
        assert received["content-disposition"].startswith("attachment")


def add(client: DemoClient, file: Any) -> Answer:
    """Add a task from a file as if the page had uploaded it."""
    named = {"name": "mine.ckpt", **file} if isinstance(file, dict) else file
    return client.call("rows", "added", event_data={"files": [named]})


def assert_no_host_file_after_an_update(client: DemoClient) -> None:
    """Gradio makes components anew when an event updates them: our check of paths stays."""
    for picture in (str(client.cwd / "picture.png"), {"path": str(client.cwd / "picture.png")}):
        answer = client.call("picture", "change", picture)
        assert not answer.success or "data-task" not in answer.text


def refused(answer: Answer) -> bool:
    """Whether an event failed: its handler did not run, or shows an error and gives no file."""
    no_result = '"path"' not in answer.text and "joined the fleet" not in answer.text
    return not answer.success or ('role=\\"alert\\"' in answer.text and no_result)


def red_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "PNG")
    return file.getvalue()


def test_values_outside_of_the_choices_are_refused(client: DemoClient) -> None:
    _, path = client.upload("a.png", red_png())
    for picture in ({"example": 99}, {"example": -1}, {"example": "0"}, {"path": [path]}, path, 7):
        answer = client.call("picture", "change", picture)
        assert not answer.success or "data-task" not in answer.text, picture
    for name in ("nothing", "../x", [TASK], {"a": 1}, 7, None):
        for event, inputs in (("switched", ()), ("removed", ()), ("proved", ({"example": 0},))):
            wrong = {"name": name, "on": True}
            assert refused(client.call("rows", event, *inputs, event_data=wrong)), (event, name)
    odd: list[Any] = [None, 7, "text", ["a"], {}, {"files": "x"}, {"files": [7]}, {"files": [{}]}]
    for files in odd:
        assert refused(client.call("rows", "added", event_data=files)), files
    for part, data in (
        ("look", ["nothing", None]),
        ("export", ["nothing", False]),
        ("export", ["../../shape", True]),
    ):
        answer = client.call(part, "click", *data)
        assert refused(answer), (part, data)
    for name in ("", "../x", "x" * 41, None):
        assert refused(client.call("train", "click", name, taught_classes(client, 3))), name


def test_a_client_cannot_use_another_sessions_tasks(client: DemoClient) -> None:
    key = "0123456789abcdef" * 2
    assert client.attach(key).success
    _, path = client.upload("mine.ckpt", CHECKPOINT.read_bytes())
    assert "joined the fleet" in add(client, {"path": path, "name": "mine.ckpt"}).text
    for guess in (None, "", key[:-1], key.upper(), f" {key}", [key], {"key": key}):
        other = DemoClient(client.demo, client.cwd, client.home, client.cwd / "none")
        assert other.attach(guess).success
        for event, inputs in (("removed", ()), ("proved", ({"example": 0},))):
            assert refused(other.call("rows", event, *inputs, event_data={"name": "mine"}))
    assert refused(other.call("export", "click", "mine", False))
    _, picture_path = other.upload("a.png", red_png())
    assert "mine" not in other.classify(picture_path).text
    tab = DemoClient(client.demo, client.cwd, client.home, client.cwd / "none")
    assert "mine" in tab.attach(key).text  # the tab that has the key, after a reload
    assert_no_host_file_after_an_update(tab)
    (copy,) = client.uploads.parent.glob("session-*/1/mine.ckpt")
    assert_refused(client, f"/gradio_api/file={copy}")


ORIGINS = ("http://evil.example", "https://evil.example", "null", "http://127.0.0.1.evil.example")


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/info", "/gradio_api/upload"])
def test_another_websites_page_may_read_nothing(client: DemoClient, path: str, origin: str) -> None:
    plain = {"Origin": origin}
    preflight = {**plain, "Access-Control-Request-Method": "POST"}
    for method, headers in (("GET", plain), ("POST", plain), ("OPTIONS", preflight)):
        received = client.ask(method, path, b"" if method == "POST" else None, headers)[1]
        assert "access-control-allow-origin" not in received, (method, path)


def test_the_page_itself_may_read(client: DemoClient) -> None:
    headers = {"Origin": client.demo.address}
    received = client.ask("GET", "/config", None, headers)[1]
    assert received["access-control-allow-origin"] == client.demo.address


@pytest.mark.parametrize("name", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/queue/join"])
def test_unknown_host_names_are_refused(client: DemoClient, path: str, name: str) -> None:
    body = b"{}" if path.endswith("join") else None
    headers = {"Host": name, "Origin": f"http://{name}", "Content-Type": "application/json"}
    status, _, content = client.ask("POST" if body else "GET", path, body, headers)
    assert (status, content) == (400, b"Invalid host header")


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST:9", "127.0.0.1", "[::1]:80", "page.lan"])
def test_loopback_names_and_allowed_hosts_are_answered(client: DemoClient, name: str) -> None:
    assert client.ask("GET", "/config", None, {"Host": name})[0] == 200


def test_too_large_uploads_are_refused_and_not_stored(client: DemoClient) -> None:
    limit = int(MAX_UPLOAD.removesuffix("mb")) * 2**20
    before = sum(path.stat().st_size for path in client.uploads.rglob("*") if path.is_file())
    for _ in range(3):
        status, message = client.upload("large.png", bytes(limit + 2**20))
        assert status == 413 and "maximum allowed size" in message
    after = sum(path.stat().st_size for path in client.uploads.rglob("*") if path.is_file())
    assert after - before < 2**20
    assert client.upload("large.png", bytes(limit - 2**20))[0] == 200


def test_a_decompression_bomb_is_refused_before_decoding(client: DemoClient) -> None:
    _, path = client.upload("bomb.png", flat(13_000, 13_000))
    memory = client.memory()
    answer = client.classify(path)
    assert "No answer" in answer.text and "pixels" in answer.text
    assert "aoft-demo-" not in answer.text
    assert client.memory() - memory < 50e6
