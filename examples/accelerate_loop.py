"""Fine-tune a timm model with AOFT* updates in a loop of your own, with accelerate.

    pip install "..[train,cpu]"
    python accelerate_loop.py

Writes accelerate_run/model.ckpt, the trained task, and accelerate_run/model.onnx, verified.
"""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import aoft_deploy
from aoft_deploy.data import load_task

STEPS, BATCH, RUN = 40, 16, Path("accelerate_run")

torch.manual_seed(0)
data = load_task("digits")  # or load_folder(Path("photos")) for your own images
backbone, identity = aoft_deploy.create_backbone(
    "aoft_vit_nano", num_classes=len(data.classes), img_size=32
)  # small enough for a CPU; "vit_base_patch16_224.augreg_in21k" is a usual one
tuned = aoft_deploy.attach(backbone, "aoft-lora-star", backbone=identity)
tuned.classes = data.classes


def batch(rows):
    images, labels = zip(*rows, strict=True)
    pixels = np.stack([tuned.preprocessing(image) for image in images])
    return torch.from_numpy(pixels), torch.tensor(labels)


accelerator = Accelerator()
loader = DataLoader(data.train, BATCH, shuffle=True, collate_fn=batch)
optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
model, optimizer, loader = accelerator.prepare(tuned.train(), optimizer, loader)

for step, (pixels, labels) in zip(range(1, STEPS + 1), loader, strict=False):
    loss = cross_entropy(model(pixels), labels)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        accelerator.print(f"step {step}  loss {loss.item():.3f}")

if accelerator.is_main_process:
    RUN.mkdir(exist_ok=True)
    aoft_deploy.save(tuned, RUN / "model.ckpt")
    exported = aoft_deploy.export_merged(RUN / "model.ckpt", RUN / "model.onnx", overwrite=True)
    classifier = aoft_deploy.load_classifier(exported.path)
    images, labels = zip(*(data.test[i] for i in range(64)), strict=True)
    answers = [data.classes.index(row[0].label) for row in classifier.predict(images)]
    print(f"{exported.path}: {sum(np.equal(answers, labels))} of {len(images)} digits are right")
    print(*classifier.predict(images[0], top=3), sep="  ")
