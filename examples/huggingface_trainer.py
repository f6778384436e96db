"""Fine-tune a timm model with AOFT* updates in the Trainer of Hugging Face.

    pip install "..[train,cpu]" transformers
    python huggingface_trainer.py

Writes trainer_run/model.ckpt, the trained task, and trainer_run/model.onnx, verified.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

import aoft_deploy
from aoft_deploy.data import load_task

STEPS, BATCH, RUN = 40, 16, Path("trainer_run")

data = load_task("digits")  # or load_folder(Path("photos")) for your own images
backbone, identity = aoft_deploy.create_backbone(
    "aoft_vit_nano", num_classes=len(data.classes), img_size=32
)  # small enough for a CPU; "vit_base_patch16_224.augreg_in21k" is a usual one
tuned = aoft_deploy.attach(backbone, "aoft-lora-star", backbone=identity)
tuned.classes = data.classes


class ImageTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        logits = model(inputs["pixel_values"])
        loss = cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


def batch(rows):
    images, labels = zip(*rows, strict=True)
    pixels = np.stack([tuned.preprocessing(image) for image in images])
    return {"pixel_values": torch.from_numpy(pixels), "labels": torch.tensor(labels)}


arguments = TrainingArguments(
    str(RUN),
    max_steps=STEPS,
    per_device_train_batch_size=BATCH,
    learning_rate=1e-2,
    logging_steps=10,
    save_strategy="no",  # it would save the whole backbone; `save` below writes the task alone
    remove_unused_columns=False,
    report_to="none",
)
ImageTrainer(tuned, arguments, data_collator=batch, train_dataset=data.train).train()

aoft_deploy.save(tuned, RUN / "model.ckpt")
exported = aoft_deploy.export_merged(RUN / "model.ckpt", RUN / "model.onnx", overwrite=True)
classifier = aoft_deploy.load_classifier(exported.path)
images, labels = zip(*(data.test[i] for i in range(64)), strict=True)
answers = [data.classes.index(row[0].label) for row in classifier.predict(images)]
print(f"{exported.path}: {sum(np.equal(answers, labels))} of {len(images)} digits are right")
