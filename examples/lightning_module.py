"""Fine-tune a timm model with AOFT* updates in Lightning; here with several labels per image.

    pip install "..[train,cpu]" lightning
    python lightning_module.py

Writes lightning_run/model.ckpt, the trained task, and lightning_run/model.onnx, verified.
"""

from pathlib import Path

import lightning
import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader

import aoft_deploy
from aoft_deploy.data import load_task

STEPS, BATCH, RUN = 40, 16, Path("lightning_run")
LABELS = {"even": "02468", "prime": "2357", "round": "03689"}  # a digit has any number of them


class Task(lightning.LightningModule):
    def __init__(self, tuned):
        super().__init__()
        self.tuned = tuned

    def training_step(self, batch):
        pixels, labels = batch
        loss = binary_cross_entropy_with_logits(self.tuned(pixels), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


def batch(rows):
    pixels = np.stack([tuned.preprocessing(image) for image, _ in rows])
    labels = [[data.classes[i] in digits for digits in LABELS.values()] for _, i in rows]
    return torch.from_numpy(pixels), torch.tensor(labels).float()


lightning.seed_everything(0)
data = load_task("digits")
backbone, identity = aoft_deploy.create_backbone("aoft_vit_nano", num_classes=3, img_size=32)
tuned = aoft_deploy.attach(backbone, "aoft-lora-star", backbone=identity).train()
tuned.classes, tuned.activation = tuple(LABELS), "sigmoid"

trainer = lightning.Trainer(max_steps=STEPS, logger=False, enable_checkpointing=False)
trainer.fit(Task(tuned), DataLoader(data.train, BATCH, shuffle=True, collate_fn=batch))

RUN.mkdir(exist_ok=True)
aoft_deploy.save(tuned, RUN / "model.ckpt")
exported = aoft_deploy.export_merged(RUN / "model.ckpt", RUN / "model.onnx", overwrite=True)
classifier = aoft_deploy.load_classifier(exported.path)
for image, label in (data.test[i] for i in range(5)):
    print(data.classes[label], *classifier.predict(image), sep="  ")
