"""Files of multipart forms."""

from __future__ import annotations

import email.policy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aoft_deploy.serving.protocol.refusals import Refusal
from aoft_deploy.serving.transport.uploads import uploaded_files


def form(*files: bytes, boundary: bytes = b"xyz", end: bytes = b"--") -> bytes:
    head = b'Content-Disposition: form-data; name="file"; filename="../../a.jpg"\r\n\r\n'
    parts = [b"--" + boundary + b"\r\n" + head + file + b"\r\n" for file in files]
    return b"".join(parts) + b"--" + boundary + end + b"\r\n"


KIND = "multipart/form-data; boundary=xyz"


def test_files_of_a_form_keep_their_order() -> None:
    files = [b"one", b"\r\n--xy\r\n", b"", bytes(range(256)) * 100]
    assert uploaded_files(form(*files), KIND, 4) == files


def field(name: str, value: bytes, more: bytes = b"") -> bytes:
    head = b'--xyz\r\nContent-Disposition: form-data; name="%s"\r\n%s\r\n' % (name.encode(), more)
    return head + value + b"\r\n"


IMAGE = b"Content-Type: image/png\r\n"

TEXT = b"Content-Type: text/plain; charset=utf-8\r\n"


@pytest.mark.parametrize(
    ("fields", "files"),
    [
        ([field("top", b"5"), form(b"one", b"two")], [b"one", b"two"]),
        ([field("a", b"5", TEXT), field("b", b"x" * 9000), form(b"one")], [b"one"]),
        ([field("picture", b"bytes", IMAGE), form(b"one")], [b"bytes", b"one"]),
        ([*[field("a", b"")] * 64, form(*[b"x"] * 4)], [b"x"] * 4),
    ],
)
def test_form_fields_are_not_read_as_files(fields: list[bytes], files: list[bytes]) -> None:
    assert uploaded_files(b"".join(fields), KIND, 4) == files


def test_a_form_without_files_is_refused() -> None:
    with pytest.raises(Refusal, match="has no file: give one with a filename") as caught:
        uploaded_files(field("top", b"5") + b"--xyz--\r\n", KIND, 4)
    assert caught.value.status == 400
    with pytest.raises(Refusal, match="more than 64 fields") as caught:
        uploaded_files(field("top", b"5") * 65 + form(b"one"), KIND, 4)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    "before",
    [b"", b"\r\n", b"This is a form.\r\n", b"a --xyz\r\n--xyzz\r\n--\r\n", b"-" * 99 + b"\r\n"],
)
@pytest.mark.parametrize("after", [b"", b"The end", b"\r\n\r\n--xyz\r\nmore\r\n"])
@pytest.mark.parametrize("padding", [b"", b" \t "])
def test_text_around_a_form_is_ignored_like_in_the_email_package(
    before: bytes, after: bytes, padding: bytes
) -> None:
    files = [b"one", b"\r\n--xy\r\n", bytes(range(48, 126)) * 9]
    whole = form(*files).replace(b"--xyz\r\n", b"--xyz" + padding + b"\r\n")
    head = b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=xyz\r\n\r\n"
    message = email.message_from_bytes(head + before + whole + after, policy=email.policy.HTTP)
    theirs = [part.get_payload(decode=True) for part in message.iter_parts()]
    assert uploaded_files(before + whole + after, KIND, 4) == theirs == files


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (form(b"a"), "multipart/form-data", 400),
        (form(b"a"), "multipart/form-data; boundary=" + "x" * 100, 400),
        (form(b"a"), "multipart/form-data; boundary=other", 400),
        (form(b"a")[:-10], KIND, 400),
        (form(), KIND, 400),
        (b"", KIND, 400),
        (b"junk", KIND, 400),
        (form(*[b"a"] * 5), KIND, 413),
        (b"--xyz\r\nA: " + b"b" * 9000 + b"\r\n\r\nc\r\n--xyz--\r\n", KIND, 400),
    ],
)
def test_a_malformed_form_is_refused(body: bytes, kind: str, status: int) -> None:
    with pytest.raises(Refusal) as caught:
        uploaded_files(body, kind, 4)
    assert caught.value.status == status


@settings(max_examples=200, deadline=None)
@given(cut=st.integers(0, 400), junk=st.binary(max_size=30))
def test_a_corrupted_form_gives_files_or_a_refusal(cut: int, junk: bytes) -> None:
    whole = form(b"one", b"two" * 20)
    try:
        files = uploaded_files(whole[:cut] + junk + whole[cut + len(junk) :], KIND, 4)
    except Refusal as refusal:
        assert refusal.status in (400, 413)
    else:
        assert all(isinstance(file, bytes) for file in files)
