"""The fine-tuning methods by name, with a line for each. Imports no torch."""

from __future__ import annotations

__all__ = ["SUMMARIES"]

SUMMARIES = {
    "adapter": "adapter without activation after attention and MLP (arXiv 1902.00751, 2410.22952)",
    "aoft-adapter": "AOFT on the output of attention and MLP",
    "aoft-adapter-star": "AOFT* on the output of attention and MLP, one scale per rank component",
    "aoft-lora": "AOFT as LoRA: one vector generates each projection (arXiv 2507.13260)",
    "aoft-lora-star": "AOFT* as LoRA: one scale per rank component (arXiv 2507.13260)",
    "aoft-vpt": "AOFT as prompts: one vector generates all prompts of a block",
    "aoft-vpt-star": "AOFT* as prompts: one vector for a block, one scale per rank component",
    "bitfit": "every bias (arXiv 2106.10199)",
    "full": "full fine-tuning: every parameter",
    "linear": "linear probing: only the classifier",
    "lora": "LoRA (arXiv 2106.09685)",
    "rlrr": "residual low-rank rescaling of every linear map, SSF on norms (arXiv 2403.19067)",
    "ssf": "scale and shift of every map's output (arXiv 2210.08823)",
    "vpt": "visual prompt tuning (arXiv 2203.12119)",
}
"""What each method trains, by name."""
