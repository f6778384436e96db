"""The page's theme and style sheet: system fonts, one accent colour, a light and a dark scheme."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

__all__ = ["CSS", "theme"]

FOLDER = Path(__file__).parent
CSS = "\n".join(
    file.read_text("utf-8") for file in [FOLDER / "style.css", *sorted(FOLDER.glob("*/style.css"))]
)
"""The page's own style sheet, followed by those of the views."""


def theme() -> gr.themes.Base:
    """Gradio's base theme with our colours and the system's fonts; it downloads nothing."""
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"],
        radius_size="md",
        spacing_size="sm",
        text_size="md",
    ).set(
        body_background_fill="#f5f7f8",
        body_background_fill_dark="#0f1518",
        block_background_fill="#ffffff",
        block_background_fill_dark="#172025",
        block_border_width="1px",
        block_label_text_size="*text_sm",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#0f766e",
        button_primary_text_color="#ffffff",
    )
