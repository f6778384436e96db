"""Pre-train the bundled backbone `aoft_vit_nano` on images drawn from formulas, on a CPU.

Formula-driven supervised learning: a figure is drawn from a formula and the formula gives the
labels, so no picture is downloaded and nobody annotates. The radial contours and fractals follow
Kataoka et al., "Replacing Labeled Real-image Datasets with Auto-generated Contours" (CVPR 2022,
arXiv 2206.09132) and "Pre-training without Natural Images" (ACCV 2020, arXiv 2101.08515); the
strokes and Lissajous curves are families of our own.

1. `draw_pool` draws a pool of figures, 512 formulas with many jittered instances, as ink maps.
2. `scene` turns ink into pictures afresh for each step: an affine map, one to four copies, colours,
   gradients, blur, loss of resolution, noise. It keeps the numbers that it drew as labels.
3. The class token predicts the formula, the family, the number of copies, pose, colours, damage
   and a 16 x 16 map of the ink; each patch token predicts the clean ink under its patch. The heads
   are linear and are thrown away.

    python tools/pretraining/train.py --minutes 25
    python tools/pretraining/train.py --check

The seed fixes every drawing and every scene. The schedule follows the clock where `--minutes` is
given and the step count where `--steps` is.
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
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from aoft_deploy.tuning.backbones import bundled

Array = NDArray[np.float64]

CANVAS = 80  # pixels of a figure's ink map; the figure itself fills about 60 of them
FAMILIES = {"stroke": 288, "contour": 112, "fractal": 64, "lissajous": 48}  # formulas of each
CLASSES = sum(FAMILIES.values())
MOST_COPIES = 4
SCENE_NUMBERS = 15  # see `scene`


# --- formulas -------------------------------------------------------------------------------
# A formula is drawn once per class; an instance of it is drawn with jitter. Points lie in [-1, 1].


def spline(points: Array, steps: int = 10) -> Array:
    """Sample the Catmull-Rom spline through `points`, [n, 2] to [(n - 1) * steps + 1, 2]."""
    p = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None, None]
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return np.concatenate([curve.transpose(1, 0, 2).reshape(-1, 2), points[-1:]])


def stroke_formula(rng: np.random.Generator) -> list[tuple[str, Array]]:
    """Draw a glyph: one to three strokes, each a spline, a polyline or an arc, with its numbers."""
    count = int(rng.choice([1, 2, 3], p=[0.45, 0.4, 0.15]))
    kinds = ["spline", "spline", "line"] if count == 1 else ["spline", "line", "arc"]
    strokes = []
    for kind in rng.choice(kinds, count):
        if kind == "arc":  # centre, radii, first angle, extent
            extent = rng.choice([2 * np.pi, rng.uniform(2, 5.5)])
            radii, first = rng.uniform(0.25, 0.6, 2), rng.uniform(0, 2 * np.pi)
            strokes.append((kind, np.array([*rng.uniform(-0.5, 0.5, 2), *radii, first, extent])))
        else:
            n = rng.integers(3, 7) if count == 1 else rng.integers(2, 5)
            strokes.append((kind, far_apart(rng.uniform(-1, 1, (50, 2)))[:n]))
    return strokes


def far_apart(points: Array) -> Array:
    """Drop the points that lie close to their predecessor."""
    kept = [points[0]]
    for p in points[1:]:
        if np.abs(p - kept[-1]).max() > 0.6:
            kept.append(p)
    return np.array(kept)


def draw_stroke(formula: list[tuple[str, Array]], rng: np.random.Generator) -> Image.Image:
    """Draw a glyph with jittered control points and a random pen."""
    image = blank()
    draw = ImageDraw.Draw(image)
    width, wobble, curves = int(rng.integers(5, 20)), rng.uniform(0.03, 0.12), []
    for kind, points in formula:
        p = points + rng.normal(0, wobble, points.shape)
        if kind == "arc":
            angle = p[4] + np.linspace(0, p[5], 40)
            p = np.stack([p[0] + p[2] * np.cos(angle), p[1] + p[3] * np.sin(angle)], 1)
        elif kind == "spline" and len(p) > 2:
            p = spline(p)
        curves.append(p)
    low, high = np.concatenate(curves).min(0), np.concatenate(curves).max(0)
    for p in curves:
        line(draw, 0.9 * (2 * p - low - high) / max(high - low), width)
    return image


def contour_formula(rng: np.random.Generator) -> dict[str, Any]:
    """Draw a radial contour: polygon or wave, how many rings, filled or not."""
    k = np.arange(2, 8)
    return {
        "n": int(rng.integers(3, 13)),
        "wave": rng.normal(0, 0.35, 6) / k * rng.choice([0, 1, 1]),
        "phase": rng.uniform(0, 6.28, 6),
        "smooth": bool(rng.random() < 0.4),
        "spike": float(rng.choice([0, 0, 0.3, 0.5])),
        "rings": int(rng.choice([1, 1, 1, 2, 3, 5])),
        "filled": bool(rng.random() < 0.4),
        "drift": rng.uniform(-0.25, 0.25, 2),
    }


def draw_contour(formula: dict[str, Any], rng: np.random.Generator) -> Image.Image:
    """Draw the rings of a radial contour, shrinking and drifting from ring to ring."""
    image = blank()
    draw = ImageDraw.Draw(image)
    n, width = formula["n"], int(rng.integers(3, 10))
    corners = 2 * n if formula["spike"] else n
    angle = np.linspace(0, 2 * np.pi, 72 if formula["smooth"] else corners, endpoint=False)
    k = np.arange(2, 8)[:, None]
    wave = formula["wave"] * (1 + rng.normal(0, 0.15, 6))
    radius = 1 + (wave[:, None] * np.cos(k * angle + formula["phase"][:, None])).sum(0)
    if formula["spike"]:
        comb = np.cos(n * angle) if formula["smooth"] else (-1.0) ** np.arange(len(angle))
        radius = radius - formula["spike"] * (0.5 - 0.5 * comb)
    radius = 0.9 * radius / radius.max() * (1 + rng.normal(0, 0.03, len(angle)))
    outline = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    for ring in range(formula["rings"]):
        scale = 1 - ring / (formula["rings"] + 0.5)
        p = outline * scale + formula["drift"] * (1 - scale)
        if formula["filled"]:
            draw.polygon(pixels(p), fill=0 if ring % 2 else 255)
        else:
            line(draw, np.concatenate([p, p[:2]]), width)
    return image


def fractal_formula(rng: np.random.Generator) -> dict[str, Array]:
    """Draw a contracting iterated function system of two to five affine maps."""
    m = int(rng.integers(2, 6))
    a, b = rng.uniform(-np.pi, np.pi, (2, m))
    s = np.sort(rng.uniform(0.25, 0.85, (m, 2)), 1)[:, ::-1]
    rotate = [np.stack([np.cos(t), -np.sin(t), np.sin(t), np.cos(t)], 1) for t in (a, b)]
    left, right = (r.reshape(m, 2, 2) for r in rotate)
    matrix = left @ (s[:, :, None] * right)
    share = np.abs(np.linalg.det(matrix)) + 0.05
    return {"A": matrix, "b": rng.uniform(-1, 1, (m, 2)), "p": share / share.sum()}


def draw_fractal(formula: dict[str, Array], rng: np.random.Generator) -> Image.Image:
    """Draw the attractor with 200 parallel walks of the chaos game, as thick dots."""
    matrix = formula["A"] * rng.uniform(0.92, 1.06, formula["A"].shape)
    x, seen = rng.normal(0, 0.1, (200, 2)), []
    for step in range(22):
        i = rng.choice(len(matrix), 200, p=formula["p"])
        x = np.clip((matrix[i] @ x[:, :, None])[:, :, 0] + formula["b"][i], -50, 50)
        if step > 7:
            seen.append(x)
    points = np.concatenate(seen)
    low, high = np.percentile(points, [1, 99], axis=0)
    points = (points - (low + high) / 2) / max((high - low).max() / 2, 1e-3) * 0.9
    ij = np.clip(np.rint((points + 1) / 2 * 60 + 10), 0, CANVAS - 1).astype(int)
    ink = np.zeros((CANVAS, CANVAS), np.uint8)
    ink[ij[:, 1], ij[:, 0]] = 255
    if rng.random() < 0.6:
        ink = np.maximum.reduce([ink, np.roll(ink, 1, 0), np.roll(ink, 1, 1)])
    return Image.fromarray(ink)


def lissajous_formula(rng: np.random.Generator) -> Array:
    """Draw (frequency x, frequency y, phase, inner frequency, inner amplitude)."""
    inner, amplitude = rng.integers(2, 8), rng.choice([0, rng.uniform(0.2, 0.5)])
    return np.array([*rng.integers(1, 5, 2), rng.uniform(0, 3.14), inner, amplitude])


def draw_lissajous(formula: Array, rng: np.random.Generator) -> Image.Image:
    """Draw one turn of a Lissajous curve with a smaller circle riding on it."""
    fx, fy, phase, inner, amplitude = formula
    t = np.linspace(0, 2 * np.pi, 120)
    phase, amplitude = phase + rng.normal(0, 0.08), amplitude * rng.uniform(0.8, 1.2)
    p = np.stack([np.sin(fx * t + phase), np.sin(fy * t)], 1)
    p += amplitude * np.stack([np.cos(inner * t), np.sin(inner * t)], 1)
    image = blank()
    line(ImageDraw.Draw(image), 0.9 * p / np.abs(p).max(), int(rng.integers(3, 10)))
    return image


def blank() -> Image.Image:
    """Return an empty canvas of twice the size, for smooth edges."""
    return Image.new("L", (2 * CANVAS, 2 * CANVAS))


def pixels(points: Array) -> list[tuple[float, float]]:
    """Map [-1, 1] to the middle three quarters of a double-size canvas."""
    return [(x, y) for x, y in (points + 1) * 60 + 20]


def line(draw: ImageDraw.ImageDraw, points: Array, width: int) -> None:
    """Draw a polyline with round joints."""
    draw.line(pixels(points), fill=255, width=width, joint="curve")


DRAW: dict[str, tuple[Any, Any]] = {
    "stroke": (stroke_formula, draw_stroke),
    "contour": (contour_formula, draw_contour),
    "fractal": (fractal_formula, draw_fractal),
    "lissajous": (lissajous_formula, draw_lissajous),
}


def draw_pool(instances: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw every formula `instances` times.

    Returns:
        Ink maps, uint8 [512, instances, 80, 80], and the family of each class, [512].
    """
    pool = np.zeros((CLASSES, instances, CANVAS, CANVAS), np.uint8)
    family: list[int] = []
    for number, (name, classes) in enumerate(FAMILIES.items()):
        make, draw = DRAW[name]
        for _ in range(classes):
            rng = np.random.default_rng([seed, len(family)])
            formula = make(rng)
            for i in range(instances):
                image = draw(formula, rng)
                pool[len(family), i] = image if image.width == CANVAS else image.reduce(2)
            family.append(number)
    return torch.from_numpy(pool), torch.tensor(family)


# --- scenes ---------------------------------------------------------------------------------


def scene(ink: Tensor, g: torch.Generator, hard: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Turn ink maps into pictures and keep what was drawn as labels.

    Args:
        ink: uint8 [batch, 80, 80].
        g: The source of all randomness.
        hard: From 0 to 1, how often pictures are damaged; training begins with easy ones.

    Returns:
        Pictures in [-1, 1], [batch, 3, 64, 64], and the labels: `copies` [batch], `numbers`
        [batch, 15] (rotation as cos and sin, size, aspect, shear, position, two colours, blur and
        lost resolution) and `ink`, the clean ink, [batch, 1, 64, 64].
    """
    b = len(ink)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(b, *shape, generator=g)

    def chance(p: float) -> Tensor:
        return torch.rand(b, generator=g) < p

    copies = torch.where(
        chance(0.12 * hard), torch.randint(2, MOST_COPIES + 1, (b,), generator=g), 1
    )
    angle = torch.where(chance(0.15 * hard), uniform(-math.pi, math.pi), uniform(-0.35, 0.35))
    size = torch.where(copies > 1, uniform(0.35, 0.5), uniform(0.55, 1.15))
    aspect, shear = uniform(-0.25, 0.25), uniform(-0.25, 0.25)
    room = (1.05 - size).clamp(min=0.1)[:, None]
    centre = torch.where((copies > 1)[:, None], torch.tensor(0.0), uniform(-1, 1, 2) * room)

    mask = place(ink, angle, size, aspect, shear, centre)
    corners = torch.tensor([[-0.5, -0.5], [0.5, 0.5], [0.5, -0.5], [-0.5, 0.5]])
    for i in (copies > 1).nonzero()[:, 0].tolist():
        n = int(copies[i])
        spot = corners[torch.randperm(4, generator=g)[:n]]
        spot = spot + 0.1 * torch.randn(n, 2, generator=g)
        own = slice(i, i + 1)
        turn, scale, wide, skew = (v[own].expand(n) for v in (angle, size, aspect, shear))
        mask[i] = place(ink[own].expand(n, -1, -1), turn, scale, wide, skew, spot).amax(0)

    paper, pen = uniform(0, 1, 3), uniform(0, 1, 3)
    grey = chance(0.5)[:, None]
    paper, pen = (torch.where(grey, c.mean(1, keepdim=True), c) for c in (paper, pen))
    weak = (pen - paper).abs().amax(1, keepdim=True) < 0.35
    pen = torch.where(weak, (paper + 0.6) % 1.0, pen)
    extreme = chance(0.7 - 0.35 * hard)[:, None]  # white on black, black on white
    flip = (paper.mean(1, keepdim=True) > 0.5).float()
    paper, pen = torch.where(extreme, flip, paper), torch.where(extreme, 1 - flip, pen)

    slope = torch.where(chance(0.5 * hard), uniform(0, 0.4), torch.tensor(0.0))
    heading = uniform(0, 2 * math.pi)
    axis = torch.linspace(-1, 1, 64)
    ramp = heading.cos()[:, None, None] * axis + heading.sin()[:, None, None] * axis[:, None]
    ground = paper[:, :, None, None] + (slope[:, None, None] * ramp)[:, None]
    picture = ground + (pen[:, :, None, None] - ground) * mask

    lost = torch.zeros(b)
    for step in (8, 10, 12, 16, 24, 32):  # as if scanned in `step` pixels
        pick = chance((0.12 if step == 8 else 0.08) * hard) & (lost == 0)
        if pick.any():
            small = F.interpolate(picture[pick], size=step, mode="area")
            picture[pick] = F.interpolate(small, size=64, mode="bicubic")
            lost[pick] = math.log2(64 / step)
    blurred = chance(0.3 * hard) & (lost == 0)
    if blurred.any():
        picture[blurred] = F.avg_pool2d(picture[blurred], 5, 1, 2, count_include_pad=False)
    noise = torch.where(chance(0.4 * hard), uniform(0, 0.15), torch.tensor(0.0))[
        :, None, None, None
    ]
    picture = picture + noise * torch.randn(picture.shape, generator=g)
    numbers = [2 * angle.cos() - 1, 2 * angle.sin(), 4 * size - 3, 4 * aspect, 4 * shear]
    numbers += [*(2 * centre).T, *(2 * paper - 1).T, *(2 * pen - 1).T]
    numbers += [2 * blurred.float() - 1, lost - 1]
    labels = {"copies": copies - 1, "numbers": torch.stack(numbers, 1), "ink": mask}
    return picture.clamp(0, 1) * 2 - 1, labels


def place(
    ink: Tensor, angle: Tensor, size: Tensor, aspect: Tensor, shear: Tensor, centre: Tensor
) -> Tensor:
    """Place figures on 64 x 64 pictures: rotated, sheared, stretched, scaled, moved.

    Returns:
        Ink in [0, 1], [batch, 1, 64, 64].
    """
    c, s = angle.cos(), angle.sin()
    rotate = torch.stack([torch.stack([c, s], 1), torch.stack([-s, c], 1)], 1)
    one, zero = torch.ones_like(c), torch.zeros_like(c)
    skew = torch.stack([torch.stack([one, shear], 1), torch.stack([zero, one], 1)], 1)
    stretch = torch.stack([aspect.exp(), (-aspect).exp()], 1)
    # grid_sample wants the map from picture to ink; 0.75 of the ink map holds the figure.
    inverse = stretch[:, :, None] * (skew @ rotate) * (0.75 / size)[:, None, None]
    theta = torch.cat([inverse, -inverse @ centre[:, :, None]], 2)
    grid = F.affine_grid(theta.float(), [len(ink), 1, 64, 64], align_corners=False)
    return F.grid_sample(ink[:, None].float() / 255, grid, align_corners=False)


# --- training -------------------------------------------------------------------------------


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Start where a trained ViT starts to be useful, which saves a small budget its slow beginning.

    Positions begin as two-dimensional sines and cosines as large as the content. Attention begins
    by likeness and takes away what it saw, WqᵀWk ∝ I and WoWv ∝ -I on each head's subspace, after
    Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers" (arXiv 2305.09828).
    """
    m: Any = model
    width, side = m.embed_dim, m.patch_embed.grid_size[0]
    wave = torch.arange(side)[:, None] * math.pi / side * torch.logspace(-1, 3, width // 4, 2)
    line = torch.cat([wave.sin(), wave.cos()], 1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    m.pos_embed[0, 1:] = 0.5 * torch.cat([rows, columns], 2).flatten(0, 1)
    for block in m.blocks:
        likeness, value = (nn.init.orthogonal_(torch.empty(width, width)) for _ in range(2))
        qkv, out = block.attn.qkv.weight, block.attn.proj.weight
        qkv.mul_(0.5).add_(torch.cat([0.5 * likeness, 0.5 * likeness, 0.6 * value]))
        out.mul_(0.5).sub_(0.6 * value.T)


class Heads(nn.Module):
    """The linear heads of pre-training; they are not shipped."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.formula = nn.Linear(width, CLASSES)
        self.family = nn.Linear(width, len(FAMILIES))
        self.copies = nn.Linear(width, MOST_COPIES)
        self.numbers = nn.Linear(width, SCENE_NUMBERS)
        self.ink = nn.Linear(width, 16 * 16)
        self.patch = nn.Linear(width, 8 * 8)


def encode(
    model: nn.Module, images: Tensor, keep: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Run the backbone on `keep` random patches of each image.

    Returns:
        The normed tokens, [batch, 1 + keep, width], and the kept patches, [batch, keep].
    """
    m: Any = model
    tokens = m._pos_embed(m.patch_embed(images))
    count = tokens.shape[1] - 1
    kept = torch.rand(len(images), count, generator=g).argsort(1)[:, :keep].sort(1).values
    if keep < count:
        patches = tokens[:, 1:].gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([tokens[:, :1], patches], 1)
    return m.norm(m.blocks(tokens)), kept


def losses(
    heads: Heads, tokens: Tensor, kept: Tensor, label: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Compute the loss of each head from the normed tokens."""
    z, ink = tokens[:, 0], label["ink"]
    patch = F.unfold(ink, 8, stride=8).transpose(1, 2)
    patch = patch.gather(1, kept[:, :, None].expand(-1, -1, 64))
    bce = F.binary_cross_entropy_with_logits
    return {
        "formula": F.cross_entropy(heads.formula(z), label["formula"], label_smoothing=0.05),
        "family": F.cross_entropy(heads.family(z), label["family"]),
        "copies": F.cross_entropy(heads.copies(z), label["copies"]),
        "numbers": F.mse_loss(heads.numbers(z), label["numbers"]),
        "ink": bce(heads.ink(z), F.avg_pool2d(ink, 4).flatten(1)),
        "patch": bce(heads.patch(tokens[:, 1:]), patch),
    }


WEIGHT = {"formula": 1.0, "family": 0.3, "copies": 0.3, "numbers": 1.0, "ink": 3.0, "patch": 1.0}


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised by five Newton-Schulz steps.

    After K. Jordan et al., "Muon" (2024), https://kellerjordan.github.io/posts/muon/, in float32.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all matrices; a fused query-key-value weight counts as three."""
        for group in self.param_groups:
            sizes: dict[Any, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(mean, group["momentum"])
                parts = 3 if p.shape[0] == 3 * p.shape[1] else 1
                for pair in zip(p.chunk(parts), update.chunk(parts), strict=True):
                    sizes.setdefault(pair[0].shape, []).append(pair)
            for pairs in sizes.values():
                updates = self.orthogonalise(torch.stack([update for _, update in pairs]))
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - group["lr"] * 0.05).add_(update, alpha=-group["lr"])

    @staticmethod
    def orthogonalise(m: Tensor) -> Tensor:
        """Return about U Vᵀ of each U S Vᵀ in `m`, [..., rows, columns], tall ones scaled."""
        tall = m.shape[-2] > m.shape[-1]
        x = m.mT if tall else m
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x.mT * (m.shape[-2] / m.shape[-1]) ** 0.5 if tall else x


def optimisers(model: nn.Module, heads: Heads, lr: float, muon_lr: float) -> list[Any]:
    """Give the blocks' matrices to Muon (if `muon_lr` > 0) and the rest to AdamW."""
    named = [*model.named_parameters(), *heads.named_parameters()]
    matrix = [p for n, p in named if n.startswith("blocks") and p.ndim == 2 and muon_lr > 0]
    taken = set(map(id, matrix))
    rest = [(n, p) for n, p in named if id(p) not in taken]
    groups = [
        {"params": [p for _, p in rest if p.ndim == 2 or p.ndim == 4], "weight_decay": 0.05},
        {"params": [p for _, p in rest if p.ndim not in (2, 4)], "weight_decay": 0.0},
    ]
    found: list[Any] = [torch.optim.AdamW(groups, lr, betas=(0.9, 0.95), fused=True)]
    return [*found, Muon(matrix, muon_lr)] if matrix else found


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


def train(args: argparse.Namespace) -> None:
    """Pre-train, log one JSON line now and then, write the weights every `--save-minutes`."""
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
    tuned = optimisers(model, heads, args.lr, args.muon_lr)
    mean = {name: value.clone() for name, value in model.state_dict().items()}
    start, saved, step, seen, sums = time.monotonic(), 0.0, 0, 0, dict[str, float]()
    args.log.write_text("")
    facts = {"script": "tools/pretraining/train.py", "seed": args.seed, "batch": args.batch}
    facts["script_sha256"] = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    done = 0.0
    while done < 1:
        seconds = time.monotonic() - start
        done = min(1.0, step / args.steps if args.steps else seconds / (60 * args.minutes))
        rate = min(1.0, done / 0.03 + 0.02) * (0.02 + 0.98 * min(1.0, (1 - done) / 0.6))
        for optimiser in tuned:
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
        for optimiser in tuned:
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


# --- checking -------------------------------------------------------------------------------


def digits() -> tuple[Tensor, NDArray[np.int64], int]:
    """Return scikit-learn's scanned digits at 64 pixels, shuffled, of which 1,000 are to train."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = torch.tensor(data.images[order], dtype=torch.float32)[:, None] / 16
    x = F.interpolate(x, size=64, mode="bicubic").clamp(0, 1).expand(-1, 3, -1, -1)
    return x * 2 - 1, data.target[order], 1000


def sketches(task: str) -> tuple[Tensor, NDArray[np.int64], int]:
    """Draw 2,000 pictures for one of three tasks, of which 1,000 are to train.

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
    """Return the outline of a simple shape, turned, [points, 2]."""
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
    """Print the accuracy of a linear probe on the class token, random against these weights.

    Of so many images of each task half, but at most 1,000, are to train the probe.
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
            made = [make_pipeline(StandardScaler(), p).fit(z[:n], y[:n]) for p in probes]
            row[kind] = round(max(100 * p.score(z[n:], y[n:]) for p in made), 2)
        print(json.dumps(row), flush=True)


def main() -> None:
    """Parse the command line; train, or check the weights that there are."""
    parser = argparse.ArgumentParser(
        description="Pre-train aoft_vit_nano on formula-driven images."
    )
    parser.add_argument("--out", type=Path, default=bundled.WEIGHTS, help="weights file to write")
    parser.add_argument("--log", type=Path, default=bundled.WEIGHTS.with_name("pretraining.jsonl"))
    parser.add_argument("--minutes", type=float, default=25, help="length of training by the clock")
    parser.add_argument("--steps", type=int, default=0, help="length in steps, instead of minutes")
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--instances", type=int, default=80, help="drawings of each formula")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW's")
    parser.add_argument("--muon-lr", type=float, default=0.02, help="0 leaves all to AdamW")
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--check", action="store_true", help="probe the weights in --out, no training"
    )
    parser.add_argument("--images", type=int, default=2000, help="of each task, to check with")
    args = parser.parse_args()
    check(args.out, args.images) if args.check else train(args)


if __name__ == "__main__":
    main()
