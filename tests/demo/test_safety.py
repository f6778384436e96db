"""What a stranger may try at the demo's address: plain HTTP to the command in a process."""

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
from PIL import Image
from running_demo import Answer, Demo, Stranger, bomb, told

from aoft_demo.server import MAX_UPLOAD
from aoft_demo.tasks.shared_fleet import BUNDLED, bundled_checkpoints

pytestmark = pytest.mark.slow

TASKS = [path.stem for path in bundled_checkpoints()]
SECRET = "a secret of the host"
PASSWORDS = Path("/etc/passwd").read_text()

LOGGED = """
import os, sys

def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        with open(os.environ["AOFT_ASKED"], "a") as file:
            print(event, *map(repr, arguments[-5:]), file=file)

sys.addaudithook(note)
"""
"""A sitecustomize that writes down whom the process asks on any network."""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stranger]:
    folder = tmp_path_factory.mktemp("safety")
    cwd, home, log = folder / "cwd", folder / "home", folder / "demo" / "log"
    for made in (cwd, home, log.parent, folder / "site"):
        made.mkdir()
    (folder / "site" / "sitecustomize.py").write_text(LOGGED)
    for place in (cwd / "secret.txt", home / ".bashrc", folder / "demo" / "secret.txt"):
        place.write_text(SECRET)
    shutil.copyfile(BUNDLED / "digits-7.png", cwd / "picture.png")
    shutil.copyfile(BUNDLED / "digits.ckpt", cwd / "task.ckpt")
    paths = [str(folder / "site"), os.environ.get("PYTHONPATH")]
    environment = {
        "HOME": str(home),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "AOFT_ASKED": str(folder / "asked"),
    }
    demo = Demo(log, "--allow-host", "page.lan", cwd=cwd, environment=environment)
    try:
        yield Stranger(demo, cwd, home, folder / "asked")
    finally:
        demo.end()


@pytest.fixture(autouse=True)
def still_there(stranger: Stranger) -> Iterator[None]:
    """After each attempt the server lives, answers, and has asked nobody else."""
    stranger.forget()
    yield
    assert stranger.demo.process.poll() is None
    status, path = stranger.upload("digits.png", (BUNDLED / "digits-7.png").read_bytes())
    assert status == 200
    answer = stranger.classify(path)
    assert answer.success and 'data-task=\\"digits\\"' in answer.text
    assert stranger.asked == []


class Canary:
    """A server that only counts who comes."""

    def __init__(self) -> None:
        self.hits = 0
        self.heard = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.hits += 1
            self.heard.set()
            connection.close()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def canary() -> Iterator[Canary]:
    bird = Canary()
    yield bird
    bird.close()


def test_the_canary_would_be_heard(canary: Canary) -> None:
    socket.create_connection(("127.0.0.1", canary.port)).close()
    assert canary.heard.wait(60) and canary.hits == 1


def harmless(stranger: Stranger, path: str, allowed: tuple[int, ...] = (403, 404)) -> None:
    """Refused, and nothing of the host is in the refusal."""
    for method in ("GET", "HEAD"):
        status, _, content = stranger.ask(method, path)
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
def test_no_file_of_the_host_is_served(stranger: Stranger, prefix: str, path: str) -> None:
    harmless(stranger, f"/gradio_api/{prefix}{path}")


def test_no_file_beside_the_uploads_is_served(stranger: Stranger) -> None:
    scratch = stranger.uploads.parent
    (scratch / "secret.txt").write_text(SECRET)
    places = [scratch / "secret.txt", stranger.demo.log, stranger.cwd / "secret.txt"]
    places += [stranger.home / ".bashrc", BUNDLED / "digits.ckpt", scratch, stranger.uploads]
    for place in places:
        harmless(stranger, f"/gradio_api/file={place}")
        harmless(stranger, f"/gradio_api/file={stranger.uploads}/../../../{place}")
    harmless(stranger, f"/gradio_api/file={stranger.uploads}/../secret.txt")
    harmless(stranger, f"/gradio_api/file={stranger.uploads}/%2e%2e/secret.txt")


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
def test_nothing_beside_gradio_s_own_files_is_served(stranger: Stranger, path: str) -> None:
    harmless(stranger, path)


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
def test_no_address_is_fetched(stranger: Stranger, canary: Canary, url: str) -> None:
    url = url.format(port=canary.port)
    harmless(stranger, f"/gradio_api/file={url}")
    harmless(stranger, f"/gradio_api/proxy={url}", (400, 403, 404))
    harmless(stranger, f"/gradio_api/proxy=/{url}", (400, 403, 404))
    _, path = stranger.upload("good.png", (BUNDLED / "digits-7.png").read_bytes())
    for picture in (told(url), told(url, url=url), {"path": url}, told(path, url=url)):
        answer = stranger.call("picture", "change", picture, ["digits"])
        if picture["path"] == url:
            assert not answer.success or "data-task" not in answer.text
    for place in ("add", "look"):
        data = (told(url), "") if place == "add" else ("digits", told(url))
        assert not stranger.call(place, "click", *data).success
    assert canary.hits == 0 and stranger.asked == []


def foreign(stranger: Stranger, suffix: str) -> list[str]:
    """Files of the host that were never uploaded, by every way to spell them."""
    name = "picture.png" if suffix == ".png" else "task.ckpt"
    bundled = BUNDLED / ("digits-7.png" if suffix == ".png" else "digits.ckpt")
    place, uploads = stranger.cwd / name, stranger.uploads
    return [
        str(place),
        name,
        f"./{name}",
        f"../cwd/{name}",
        f"{uploads}/../../../cwd/{name}",
        f"{uploads}/{os.path.relpath(place, uploads)}",
        f"file={place}",
        f"file://{place}",
        str(bundled),
        "/etc/passwd",
        "/proc/self/environ",
        str(stranger.home / ".bashrc"),
        "~/.bashrc",
        "C:/Windows/win.ini",
        str(uploads),
        "",
    ]


def test_no_picture_of_the_host_is_taken_for_an_uploaded_one(stranger: Stranger) -> None:
    for path in foreign(stranger, ".png"):
        for picture in (told(path), {"path": path}, {"path": path, "url": path}, {"url": path}):
            answer = stranger.call("picture", "change", picture, ["digits"])
            assert not answer.success or "data-task" not in answer.text, picture
            assert SECRET not in answer.text and PASSWORDS[:40] not in answer.text
            looked = stranger.call("look", "click", "digits", picture)
            shown = looked.success and "Where the class token" in looked.text
            assert shown is ("path" not in picture), picture  # then it is an example


def test_no_checkpoint_of_the_host_is_taken_for_an_uploaded_one(stranger: Stranger) -> None:
    for path in foreign(stranger, ".ckpt"):
        for file in (told(path), {"path": path}, {"path": path, "url": path}, [told(path)]):
            answer = stranger.call("add", "click", file, "mine")
            assert not answer.success or "joined the fleet" not in answer.text, file
            assert SECRET not in answer.text and PASSWORDS[:40] not in answer.text


def test_no_pictures_of_the_host_are_trained_with(stranger: Stranger) -> None:
    for path in foreign(stranger, ".png"):
        classes: list[Any] = ["a", [told(path)] * 3, "b", [told(path)] * 3, "", None, "", None]
        start = ("My pictures", "shape", 60, "stolen", "quick", *classes)
        assert refused(stranger.call("train", "click", *start)), path


def test_nobody_watches_the_visitors(stranger: Stranger) -> None:
    for path in ("/monitoring", "/monitoring/", "/monitoring/summary", "/monitoring/key"):
        assert stranger.ask("GET", path)[0] in (403, 307)
    assert stranger.ask("GET", "/monitoring/summary")[0] == 403
    assert stranger.ask("GET", "/monitoring/key")[0] == 403


def test_no_history_of_runs_is_kept_or_sent_elsewhere(stranger: Stranger) -> None:
    for path in ("runs", "run-history/buckets", "run-history/records?bucket_id=a/b"):
        headers = {"Authorization": "Bearer hf_x", "X-HF-Token": "hf_x"}
        assert stranger.ask("GET", f"/gradio_api/{path}", None, headers)[0] == 404
    body = b'{"bucket_id": "someone/bucket"}'
    headers = {"Content-Type": "application/json", "Authorization": "Bearer hf_x"}
    status = stranger.ask("POST", "/gradio_api/run-history/connect", body, headers)[0]
    assert status in (404, 405)


@pytest.mark.parametrize("path", ["vibe-edit", "vibe-code", "undo-vibe-edit"])
def test_nobody_edits_the_code(stranger: Stranger, path: str) -> None:
    headers = {"Content-Type": "application/json"}
    body = json.dumps({"prompt": "a", "code": "import os"}).encode()
    assert stranger.ask("POST", f"/gradio_api/{path}", body, headers)[0] in (403, 404, 422)


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
def test_an_uploaded_file_stays_among_the_uploads(stranger: Stranger, name: str) -> None:
    before = {path for path in stranger.demo.folder.parent.rglob("*") if path.is_file()}
    raw = name.encode("utf-8", "surrogateescape")
    status, path = stranger.upload(raw, b"an evil picture")
    assert status in (200, 400), path
    now = {path for path in stranger.demo.folder.parent.rglob("*") if path.is_file()}
    assert all(new.is_relative_to(stranger.uploads) for new in now - before)
    if status == 200:
        assert Path(path).resolve().is_relative_to(stranger.uploads.resolve())
        assert Path(path).read_bytes() == b"an evil picture"
    assert not Path("/etc/evil.png").exists()


@pytest.mark.parametrize("name", ["a.html", "a.svg", "a.xhtml", "a.xml", "a.js", "a.htm", "a"])
def test_an_uploaded_page_is_never_shown_as_one(stranger: Stranger, name: str) -> None:
    status, path = stranger.upload(name, b"<html><script>alert(1)</script></html>")
    assert status == 200
    for headers in ({}, {"Range": "bytes=0-20"}):
        status, found, _ = stranger.ask("GET", f"/gradio_api/file={path}", None, headers)
        assert status in (200, 206)
        assert found["content-type"].startswith("application/octet-stream")
        assert found["content-disposition"].startswith("attachment")


def refused(answer: Answer) -> bool:
    """Whether an event came to nothing: its handler did not run, or shows a fault and no file."""
    alone = '"path"' not in answer.text and "joined the fleet" not in answer.text
    return not answer.success or ('role=\\"alert\\"' in answer.text and alone)


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "PNG")
    return file.getvalue()


def test_a_value_that_is_no_choice_is_refused(stranger: Stranger) -> None:
    _, path = stranger.upload("a.png", picture())
    for tasks in (["nothing"], ["../digits"], [{"a": 1}], "digits", 7):
        answer = stranger.call("picture", "change", told(path), tasks)
        assert not answer.success or "data-task" not in answer.text, tasks
    answer = stranger.call("picture", "change", told(path), ["digits", "left meanwhile"])
    assert answer.text.count("data-task") == 1 and "left meanwhile" not in answer.text
    for part, data in (
        ("remove", ["nothing"]),
        ("remove", [["digits"]]),
        ("verify", ["nothing"]),
        ("look", ["nothing", None]),
        ("export", ["nothing", False]),
        ("export", ["../../digits", True]),
    ):
        answer = stranger.call(part, "click", *data)
        assert refused(answer), (part, data)
    good: list[Any] = ["Drawn for you", "shape", 60, "mine", "quick", *["", None] * 4]
    for place, value in (
        (0, "Elsewhere"),
        (1, "nothing"),
        (1, "../shape"),
        (2, 10**9),
        (2, -1),
        (2, "many"),
        (4, "endless"),
        (4, ["quick"]),
    ):
        data = [*good[:place], value, *good[place + 1 :]]
        assert refused(stranger.call("train", "click", *data)), (place, value)


def test_a_stranger_sees_and_removes_no_task_of_another(stranger: Stranger) -> None:
    _, path = stranger.upload("model.ckpt", (BUNDLED / "digits.ckpt").read_bytes())
    assert "joined the fleet" in stranger.call("add", "click", told(path), "mine").text
    other = Stranger(stranger.demo, stranger.cwd, stranger.home, stranger.cwd / "none")
    assert refused(other.call("remove", "click", "mine"))
    assert refused(other.call("verify", "click", "mine"))
    assert refused(other.call("export", "click", "mine", False))
    _, picture_path = other.upload("a.png", picture())
    answer = other.classify(picture_path, ["mine"])
    assert not answer.success or "mine" not in answer.text.partition("choices")[0]
    (kept,) = stranger.uploads.parent.glob("visitor-*/1/mine.ckpt")
    harmless(stranger, f"/gradio_api/file={kept}")


ORIGINS = ("http://evil.example", "https://evil.example", "null", "http://127.0.0.1.evil.example")


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/info", "/gradio_api/upload"])
def test_a_foreign_page_may_read_nothing(stranger: Stranger, path: str, origin: str) -> None:
    asked = {"Origin": origin}
    before = {**asked, "Access-Control-Request-Method": "POST"}
    for method, headers in (("GET", asked), ("POST", asked), ("OPTIONS", before)):
        found = stranger.ask(method, path, b"" if method == "POST" else None, headers)[1]
        assert "access-control-allow-origin" not in found, (method, path)


def test_the_page_itself_may_read(stranger: Stranger) -> None:
    headers = {"Origin": stranger.demo.address}
    found = stranger.ask("GET", "/config", None, headers)[1]
    assert found["access-control-allow-origin"] == stranger.demo.address


@pytest.mark.parametrize("name", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/queue/join"])
def test_a_name_that_was_pointed_here_is_refused(stranger: Stranger, path: str, name: str) -> None:
    body = b"{}" if path.endswith("join") else None
    headers = {"Host": name, "Origin": f"http://{name}", "Content-Type": "application/json"}
    status, _, content = stranger.ask("POST" if body else "GET", path, body, headers)
    assert (status, content) == (400, b"Invalid host header")


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST:9", "127.0.0.1", "[::1]:80", "page.lan"])
def test_own_names_are_answered_and_a_proxys_that_was_given(stranger: Stranger, name: str) -> None:
    assert stranger.ask("GET", "/config", None, {"Host": name})[0] == 200


def test_an_upload_above_the_limit_is_refused_and_not_kept(stranger: Stranger) -> None:
    limit = int(MAX_UPLOAD.removesuffix("mb")) * 2**20
    before = sum(path.stat().st_size for path in stranger.uploads.rglob("*") if path.is_file())
    for _ in range(3):
        status, told = stranger.upload("large.png", bytes(limit + 2**20))
        assert status == 413 and "maximum allowed size" in told
    after = sum(path.stat().st_size for path in stranger.uploads.rglob("*") if path.is_file())
    assert after - before < 2**20
    assert stranger.upload("large.png", bytes(limit - 2**20))[0] == 200


def test_a_picture_that_is_a_bomb_is_refused_from_its_header(stranger: Stranger) -> None:
    _, path = stranger.upload("bomb.png", bomb())
    memory = stranger.memory()
    answer = stranger.classify(path)
    assert "No answer" in answer.text and "pixels" in answer.text
    assert "aoft-demo-" not in answer.text
    assert stranger.memory() - memory < 50e6
