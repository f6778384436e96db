"""How one task works inside, in words and charts."""

from __future__ import annotations

import numpy as np

from aoft_demo.actions.analysis import Family, TaskAnalysis
from aoft_demo.actions.attention import Attention
from aoft_demo.actions.changes import Change, LayerWeights
from aoft_demo.views.explain.cards import attention_card, inside_cards


def family(name: str, sd: float, near: int) -> Family:
    counts = [0] * 180
    counts[90], counts[20] = near, 100 - near
    return Family(name, 100, 90.0, sd, 70.0, tuple(counts))


BACKBONE = family("backbone, rows", 4.0, 80)


def test_the_sentences_say_what_the_charts_show() -> None:
    families = (BACKBONE, family("aoft-lora, down", 20.0, 40), family("LoRA, down", 13.0, 30))
    layers = (("0", "q", 0.5), ("1", "v", 2.25))
    layer = LayerWeights(
        "blocks.1.attn.qkv.v",
        (192, 192),
        np.full((40, 40), 0.5, np.float32),
        np.full((40, 40), -0.01, np.float32),
        0.02,
    )
    analysis = TaskAnalysis(families, layers, 4, "aoft-lora", (), "rank 8, trained on digits")
    html = inside_cards("it's", analysis, Change(5_000, 300, 1_000_000, layer))
    for text in (
        "Inside it&#x27;s",
        "Training set 5,000 numbers for it&#x27;s; the model has 1,000,000",
        "That is 0.5 %.",
        "Training changed 2 of 6 layers, most strongly v of block 1: there the change acts 2.2",
        "the change is 2 % of the length",
        "the change, 50 × stronger",
        "of the model&#x27;s own 80%, of this skill&#x27;s 40% and of a LoRA&#x27;s 30%",
        "The spread of all angles is 4.0°, 20.0° and 13.0°.",
        "rank 8, trained on digits",
    ):
        assert text in html, text


def test_a_method_without_changed_weights_has_no_empty_charts() -> None:
    analysis = TaskAnalysis((BACKBONE,), (), 6, "vpt", ("vpt changes no weight: there is no ΔW.",))
    html = inside_cards("a", analysis, Change(100, 10, 1000, None))
    assert "This method adds no vectors of its own" in html and "no ΔW" in html
    assert "Where it changes" not in html and "One layer" not in html and "LoRA" not in html


def test_the_attention_is_described_in_words() -> None:
    before, after = np.zeros((2, 8, 8), np.float32)
    before[0, 0], after[0, 0], after[7, 7] = 1.0, 0.25, 0.75
    pixels = np.zeros((64, 64, 3), np.uint8)
    html = attention_card("<a>", Attention(before, after, "the class token", pixels))
    assert "For &lt;a&gt;, fine-tuning moved 75 % of the attention" in html
    assert "was on the upper left of the picture, and is now on the lower right" in html
    assert "highest at row 8 of 8, column 8 of 8, with 75.0 %" in html and "100 %" in html
    same = attention_card("a", Attention(before, before, "all patches", pixels))
    assert "moved 0 %" in same and "still on the upper left" in same
