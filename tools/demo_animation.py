"""Drive aoft-demo in a browser and write an animated picture of it.

    python tools/demo_animation.py [--out docs/assets/demo.gif]

It needs Playwright and Chromium, as the demo's tests do.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "support"))

from browser import browser  # noqa: E402
from demo_page import DemoPage  # noqa: E402
from running_demo import Demo  # noqa: E402

SIZE = {"width": 1120, "height": 700}
WIDTH = 960
"""Pixels of the animation's width; pages are drawn larger and reduced."""
COLOURS = 160


def scenes(page: DemoPage) -> Iterator[int]:
    """Use the demo; yield after each step the milliseconds to show it."""
    for number in (0, 2, 4):
        page.click(f"[data-example='{number}']")
        page.answered()
        yield 1800
    page.click("#answers .strip a[href='#prove']")
    page.see("#proof .scale")
    page.shows("#proof", "The answers are the same")
    yield 2600
    page.tab("How it works")
    page.click("#look")
    page.see("#inside .chart")
    yield 2400
    page.tab("Take home")
    page.click("#export")
    page.shows("#exported", "verified")
    yield 2800


def main() -> None:
    """Start the demo, take the pictures, and write them as a GIF."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "assets" / "demo.gif")
    options = parser.parse_args()
    frames: list[Image.Image] = []
    times: list[int] = []
    with tempfile.TemporaryDirectory() as folder, browser() as chrome:
        demo = Demo(Path(folder, "log"))
        try:
            page = DemoPage(chrome, demo.address, viewport=SIZE)
            for milliseconds in scenes(page):
                picture = Image.open(io.BytesIO(page.playwright.screenshot())).convert("RGB")
                height = round(picture.height * WIDTH / picture.width)
                frames.append(picture.resize((WIDTH, height), Image.Resampling.LANCZOS))
                times.append(milliseconds)
        finally:
            demo.end()
    strip = Image.new("RGB", (WIDTH, sum(frame.height for frame in frames)))
    for number, frame in enumerate(frames):
        strip.paste(frame, (0, number * frame.height))
    palette = strip.quantize(COLOURS)  # one palette for all frames, so that nothing flickers
    shown = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    shown[0].save(
        options.out, save_all=True, append_images=shown[1:], duration=times, loop=0, optimize=True
    )
    print(f"{options.out}: {len(frames)} pictures, {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
