"""How to measure the same without the page."""

from __future__ import annotations

from shlex import quote

__all__ = ["python_snippet", "shell_snippet"]


def shell_snippet(first: str) -> str:
    """Commands that export the skills of the current folder and time the artefacts.

    Args:
        first: Name of a skill, whose merged model stands for all separate models.
    """
    checkpoint, model = quote(f"{first}.ckpt"), quote(f"{first}.onnx")
    return f"""
aoft-export --fleet *.ckpt -o fleet.onnx
aoft-export --merge {checkpoint} -o {model}
aoft-bench fleet.onnx {model} --batches 1 8 32
"""


def python_snippet(threads: int, rank: int) -> str:
    """A script that times one pass, separate models and PEFT in turn.

    Args:
        threads: Threads of each contestant.
        rank: Rank of PEFT's LoRA.
    """
    return f"""
import statistics, time
from pathlib import Path

import numpy as np, peft, torch
from aoft_deploy import create_backbone, export_fleet, export_merged
from aoft_deploy.artefacts import EngineOptions, load_artefact
from aoft_deploy.fleet import Fleet

THREADS, PER_SKILL = {threads}, 4
skills = sorted(Path().glob("*.ckpt"))
names = [skill.stem for skill in skills] * PER_SKILL

# One pass: every picture with the weights of its own skill.
fleet = Fleet(export_fleet(skills, "race/fleet.onnx").path, threads=THREADS)
size = fleet.preprocessing
pictures = np.random.default_rng(0).normal(size=(len(names), 3, size.height, size.width))
pictures = pictures.astype(np.float32)

# Separate models: each skill merged into weights of its own.
models = [
    load_artefact(
        export_merged(skill, f"race/{{skill.stem}}.onnx").path, EngineOptions(threads=THREADS)
    )
    for skill in skills
]

# PEFT: one LoRA and one classifier per skill on the same backbone.
torch.set_num_threads(THREADS)
base, _ = create_backbone(fleet.kind.backbone, num_classes=10, **fleet.kind.args)
config = peft.LoraConfig(r={rank}, target_modules=["qkv"], modules_to_save=["head"])
mixed = peft.get_peft_model(base, config, adapter_name=skills[0].stem)
for skill in skills[1:]:
    mixed.add_adapter(skill.stem, config)
mixed.eval()


@torch.inference_mode()
def peft_batch():
    mixed(torch.from_numpy(pictures), adapter_names=names)


ways = {{
    "one pass": lambda: fleet.predict(pictures, names),
    "separate models": lambda: [
        model.run(pictures[i :: len(skills)]) for i, model in enumerate(models)
    ],
    "PEFT": peft_batch,
}}
seconds = {{name: [] for name in ways}}
for turn in range(11):
    for name, run in ways.items():
        start = time.perf_counter()
        run()
        if turn:  # the first round warms up
            seconds[name].append(time.perf_counter() - start)
for name, measured in seconds.items():
    print(f"{{name}}: {{1000 * statistics.median(measured):.1f}} ms")
"""
