"""Pre-train the bundled backbone `aoft_vit_nano` on images drawn from formulas, on a CPU.

Formula-driven supervised learning: a figure is drawn from a formula, which also gives its labels,
so that it needs no downloads and no annotation. The radial contours and fractals follow
Kataoka et al., "Replacing Labeled Real-image Datasets with Auto-generated Contours" (CVPR 2022,
arXiv 2206.09132) and "Pre-training without Natural Images" (ACCV 2020, arXiv 2101.08515); the
strokes and Lissajous curves are our own.

1. `draw_pool` draws a pool of figures as ink maps: 512 formulas with many jittered instances.
2. `scene` turns ink maps into new pictures for each step: an affine map, one to four copies,
   colours, gradients, blur, loss of resolution, noise. Its random parameters become labels.
3. The class token predicts the formula, the family, the number of copies, pose, colours, damage
   and a 16 x 16 map of the ink; each patch token predicts the clean ink under its patch. The heads
   are linear and are discarded.

    python tools/pretraining/train.py --minutes 25
    python tools/pretraining/train.py --check

The seed determines every drawing and every scene. The schedule follows the clock with `--minutes`
and the number of steps with `--steps`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from figures import CLASSES, Array, draw_pool
from model import WEIGHT, Heads, encode, initialise, losses, optimisers
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from scenes import scene
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from aoft_deploy.tuning.backbones import bundled


def save(state: dict[str, Tensor], path: Path, facts: dict[str, Any]) -> None:
    """Write the backbone as float16 safetensors, to a temporary file first."""
    half = {name: value.detach().half().contiguous() for name, value in state.items()}
    digest = hashlib.sha256()
    for name in sorted(half):
        digest.update(name.encode() + half[name].numpy().tobytes())
    notes = {**facts, "sha256_of_tensors": digest.hexdigest(), "licence": "Apache-2.0"}
    temporary = path.with_suffix(".tmp")
    save_file(half, temporary, {"format": "pt", **{k: str(v) for k, v in notes.items()}})
    temporary.chmod(0o644)
    os.replace(temporary, path)


def source_digest() -> str:
    """SHA-256 of the modules in this folder, by name."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def train(args: argparse.Namespace) -> None:
    """Pre-train; log a JSON line every `--log-every` steps, save every `--save-minutes`."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    g = torch.Generator().manual_seed(args.seed)
    start = time.monotonic()
    pool, family = draw_pool(args.instances, args.seed)
    drawn = time.monotonic() - start
    opening = {"figures": pool.shape[:2].numel(), "draw_seconds": round(drawn, 1)}
    print(json.dumps(opening), flush=True)

    model = bundled.aoft_vit_nano()
    initialise(model)
    heads = Heads(192)
    both = optimisers(model, heads, args.lr, args.muon_lr)
    mean = {name: value.clone() for name, value in model.state_dict().items()}
    start, saved, step, seen, sums = time.monotonic(), 0.0, 0, 0, dict[str, float]()
    args.log.write_text("")
    facts = {"script": "tools/pretraining/train.py", "seed": args.seed, "batch": args.batch}
    facts["script_sha256"] = source_digest()
    done = 0.0
    while done < 1:
        seconds = time.monotonic() - start
        done = min(1.0, step / args.steps if args.steps else seconds / (60 * args.minutes))
        rate = min(1.0, done / 0.03 + 0.02) * (0.02 + 0.98 * min(1.0, (1 - done) / 0.6))
        for optimiser in both:
            for group in optimiser.param_groups:
                group["lr"] = group.setdefault("peak", group["lr"]) * rate
        keep = 32 if done < 0.85 else 64
        label = torch.randint(CLASSES, (args.batch,), generator=g)
        ink = pool[label, torch.randint(args.instances, (args.batch,), generator=g)]
        images, labels = scene(ink, g, min(1.0, done / 0.5))
        labels |= {"formula": label, "family": family[label]}
        part = losses(heads, *encode(model, images, keep, g), labels)
        loss = torch.stack([WEIGHT[name] * value for name, value in part.items()]).sum()
        loss.backward()
        for optimiser in both:
            optimiser.step()
            optimiser.zero_grad()
        step, seen = step + 1, seen + args.batch
        decay = min(args.ema, step / (step + 10))
        for name, value in model.state_dict().items():
            mean[name].lerp_(value, 1 - decay)
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        if step % args.log_every == 0 or done == 1:
            row = {"step": step, "images": seen, "seconds": round(seconds), "patches": keep}
            count = step % args.log_every or args.log_every
            row |= {"lr": rate, **{name: value / count for name, value in sums.items()}}
            text = json.dumps({k: round(v, 4) for k, v in row.items()})
            with args.log.open("a") as file:
                print(text, file=file)
            print(text, flush=True)
            sums = {}
        if seconds - saved > 60 * args.save_minutes or done == 1:
            saved = seconds
            counts = {"steps": step, "images": seen, "seconds": round(seconds)}
            save(mean, args.out, {**facts, **counts, "finished": done == 1})


def digits() -> tuple[Tensor, NDArray[np.int64], int]:
    """Return scikit-learn's scanned digits at 64 pixels, shuffled; 1,000 are for training."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = torch.tensor(data.images[order], dtype=torch.float32)[:, None] / 16
    x = F.interpolate(x, size=64, mode="bicubic").clamp(0, 1).expand(-1, 3, -1, -1)
    return x * 2 - 1, data.target[order], 1000


def sketches(task: str) -> tuple[Tensor, NDArray[np.int64], int]:
    """Draw 2,000 pictures for one of three tasks; 1,000 are for training.

    `shape`: disc, box, triangle, cross, half-disc or bar at any angle; `count`: one to six discs;
    `orientation`: a bar in one of eight directions.
    """
    rng, images, labels = np.random.default_rng(1), [], []
    for _ in range(2000):
        label = int(rng.integers({"shape": 6, "count": 6, "orientation": 8}[task]))
        paper, pen = rng.integers(0, 100, 3), rng.integers(156, 256, 3)
        paper, pen = (paper, pen) if rng.random() < 0.5 else (pen, paper)
        image = Image.new("RGB", (128, 128), tuple(int(c) for c in paper))
        draw, ink = ImageDraw.Draw(image), tuple(int(c) for c in pen)
        turn, (x, y), r = rng.uniform(0, 6.28), rng.uniform(45, 83, 2), rng.uniform(18, 40)
        if task == "count":
            spots = [(i % 3, i // 3) for i in rng.permutation(9)[: label + 1]]
            for u, v in spots:
                x, y = np.array([24, 24]) + 40 * np.array([u, v]) + rng.uniform(-6, 6, 2)
                r = rng.uniform(7, 13)
                draw.ellipse([x - r, y - r, x + r, y + r], fill=ink)
        else:
            if task == "orientation":
                turn, shape = (label + rng.uniform(-0.3, 0.3)) * np.pi / 8, 5
            else:
                shape = label
            draw.polygon([(x + r * u, y + r * v) for u, v in outline(shape, turn)], fill=ink)
        noisy = np.asarray(image.reduce(2), np.float32) + rng.normal(0, 12, (64, 64, 3))
        images.append(noisy.clip(0, 255).astype(np.float32) / 127.5 - 1)
        labels.append(label)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), np.array(labels), 1000


def outline(shape: int, turn: float) -> Array:
    """Return the outline of a simple shape, rotated, [points, 2]."""
    a = np.linspace(0, 2 * np.pi, 40)
    cross = [(1, 3), (1, 1), (3, 1), (3, -1), (1, -1), (1, -3), (-1, -3), (-1, -1), (-3, -1)]
    points = [
        np.stack([np.cos(a), np.sin(a)], 1),
        np.array([(1, 1), (1, -1), (-1, -1), (-1, 1)]) * 0.8,
        np.array([(1, 0), (-0.5, 0.87), (-0.5, -0.87)]) * 1.2,
        np.array([*cross, (-3, 1), (-1, 1), (-1, 3)]) / 3,
        np.stack([np.cos(a / 2), np.sin(a / 2) - 0.4], 1),
        np.array([(1, 0.2), (1, -0.2), (-1, -0.2), (-1, 0.2)]),
    ][shape]
    c, s = math.cos(turn), math.sin(turn)
    return np.asarray(points @ np.array([[c, s], [-s, c]]))


def check(weights: Path, images: int) -> None:
    """Print the accuracy of linear probes on the class token, for random and for these weights.

    Half of the `images` of each task, but at most 1,000, train the probe.
    """
    torch.manual_seed(0)
    overlay = {"file": str(weights)}
    models = {
        "random": timm.create_model("aoft_vit_nano", num_classes=0).eval(),
        "pretrained": timm.create_model(
            "aoft_vit_nano", pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay
        ).eval(),
    }
    tasks = {"digits": digits(), **{t: sketches(t) for t in ("shape", "count", "orientation")}}
    for name, (x, y, most) in tasks.items():
        x, y, n = x[:images], y[:images], min(most, images // 2)
        row: dict[str, Any] = {"task": name, "train": n, "test": len(y) - n}
        for kind, model in models.items():
            with torch.inference_mode():
                z = torch.cat([model(part) for part in x.split(100)]).numpy()
            probes = (LogisticRegression(C=c, max_iter=3000) for c in (0.01, 0.1, 1.0))
            fitted = [make_pipeline(StandardScaler(), p).fit(z[:n], y[:n]) for p in probes]
            row[kind] = round(max(100 * p.score(z[n:], y[n:]) for p in fitted), 2)
        print(json.dumps(row), flush=True)


def main() -> None:
    """Parse the command line; train, or check existing weights."""
    parser = argparse.ArgumentParser(
        description="Pre-train aoft_vit_nano on formula-driven images."
    )
    parser.add_argument("--out", type=Path, default=bundled.WEIGHTS, help="weights file to write")
    parser.add_argument("--log", type=Path, default=bundled.WEIGHTS.with_name("pretraining.jsonl"))
    parser.add_argument("--minutes", type=float, default=25, help="length of training in minutes")
    parser.add_argument("--steps", type=int, default=0, help="length in steps instead of minutes")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--instances", type=int, default=80, help="drawings of each formula")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of AdamW")
    parser.add_argument(
        "--muon-lr", type=float, default=0.02, help="0 uses AdamW for all parameters"
    )
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--check", action="store_true", help="probe the weights in --out without training"
    )
    parser.add_argument("--images", type=int, default=2000, help="images of each task for --check")
    args = parser.parse_args()
    check(args.out, args.images) if args.check else train(args)


if __name__ == "__main__":
    main()
