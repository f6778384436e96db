"""The visitor's picture: an example, or a picture that was uploaded, pasted or taken."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from aoft_demo.tasks.skills import Example, bundled_examples

__all__ = ["captions", "identity", "payload", "picture_field", "thumbnail"]

SCRIPT = Path(__file__).with_name("picture.js").read_text("utf-8")

FRAME = """
<div class="stage" tabindex="-1" aria-label="Your picture">
  <img class="shown" alt="" src="{first}"><video hidden playsinline muted></video>
  <p class="unseen">This file cannot be shown.</p>
  <p class="sending" hidden role="status">Sending the picture …</p>
</div>
<div class="sources">
  <button type="button" class="plain upload">Upload</button>
  <button type="button" class="plain camera">Camera</button>
  <button type="button" class="plain paste">Paste</button>
  <button type="button" class="strong snap" hidden>Take the picture</button>
  <input type="file" accept="image/*" aria-label="Upload a picture" tabindex="-1" hidden>
</div>
<div class="wrong" role="alert" hidden></div>
<div class="examples" role="group" aria-label="Example pictures">{examples}</div>
"""

SIDE = 1024
"""Longest side in pixels of an example as the page shows it."""


def captions(pictures: Sequence[Path]) -> list[Example]:
    """Captions of the example pictures; those that are not bundled have their files' names."""
    known = {example.file: example for example in bundled_examples()}
    return [known.get(path) or Example(path, path.stem[:24], path.stem) for path in pictures]


def thumbnail(path: Path, side: int = SIDE) -> bytes:
    """A picture as JPEG, with sides of at most ``side`` pixels."""
    with Image.open(path) as opened:
        opened.draft("RGB", (2 * side, 2 * side))
        small = ImageOps.exif_transpose(opened).convert("RGB")
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=82)
    return file.getvalue()


def picture_field(pictures: Sequence[Path]) -> Any:
    """The component, as ``gr.HTML``; handlers get the picture's path, or None without a picture.

    Args:
        pictures: The examples; the first one is shown at first.
    """
    import gradio as gr

    examples = captions(pictures)
    buttons = "".join(
        f'<button type="button" data-example="{number}" data-alt="{escape(example.alt)}" '
        f'aria-label="{escape(example.caption)}" aria-pressed="{str(number == 0).lower()}">'
        f'<img alt="" src="{_inline(thumbnail(example.file, 96))}">'
        f"<span>{escape(example.caption)}</span></button>"
        for number, example in enumerate(examples)
    )
    first = "aoft/example/0" if examples else "data:,"
    field: Any = gr.HTML(
        {"example": 0} if examples else None,
        html_template=_literal(FRAME.format(first=first, examples=buttons)),
        js_on_load=SCRIPT,
        apply_default_css=False,
        elem_id="picture",
    )
    field.preprocess = partial(_path, list(pictures))
    return field


def payload(picture: Path | None, pictures: Sequence[Path]) -> dict[str, Any] | None:
    """The component's value for a picture; the first example for None and for deleted files."""
    if picture is None or not picture.is_file():
        return {"example": 0} if pictures else None
    if picture in pictures:
        return {"example": list(pictures).index(picture)}
    return {"path": str(picture)}


def identity(picture: Path, pictures: Sequence[Path]) -> str:
    """A picture's name in the page; picture.js and the check for old answers make the same."""
    if picture in pictures:
        return f"example-{list(pictures).index(picture)}"
    return picture.parent.name


def _path(pictures: Sequence[Path], payload: Any) -> str | None:
    """The picture's path; only an example or a file among the uploads is one."""
    import gradio as gr

    if not isinstance(payload, dict):
        return None
    number = payload.get("example")
    if isinstance(number, int) and 0 <= number < len(pictures):
        return str(pictures[number])
    text = payload.get("path")
    folder = Path(gr.utils.get_upload_folder()).resolve()
    if isinstance(text, str) and "\0" not in text:
        path = Path(text).resolve()
        if path.is_relative_to(folder) and path.is_file():
            return str(path)
    raise gr.Error("This picture was not uploaded.", print_exception=False)


def _inline(picture: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"


def _literal(html: str) -> str:
    """HTML as a template without placeholders."""
    return (
        html.replace("\\", "&#92;")
        .replace("`", "&#96;")
        .replace("$", "&#36;")
        .replace("{{", "&#123;&#123;")
    )
