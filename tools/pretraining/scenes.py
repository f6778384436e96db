"""Scenes: ink maps turned into pictures with known pose, colours and damage."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_COPIES = 4
SCENE_NUMBERS = 15  # length of the label `numbers`, see `scene`


def scene(ink: Tensor, g: torch.Generator, hard: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Turn ink maps into pictures, with the random parameters as labels.

    Args:
        ink: uint8 [batch, 80, 80].
        g: Generator of all random numbers.
        hard: Frequency of damage, from 0 to 1; training starts with easy pictures.

    Returns:
        Pictures in [-1, 1], [batch, 3, 64, 64], and the labels: `copies` [batch], `numbers`
        [batch, 15] (rotation as cos and sin, size, aspect, shear, position, two colours, blur and
        loss of resolution) and `ink`, the clean ink, [batch, 1, 64, 64].
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
    extreme = chance(0.7 - 0.35 * hard)[:, None]  # white on black or black on white
    flip = (paper.mean(1, keepdim=True) > 0.5).float()
    paper, pen = torch.where(extreme, flip, paper), torch.where(extreme, 1 - flip, pen)

    slope = torch.where(chance(0.5 * hard), uniform(0, 0.4), torch.tensor(0.0))
    heading = uniform(0, 2 * math.pi)
    axis = torch.linspace(-1, 1, 64)
    ramp = heading.cos()[:, None, None] * axis + heading.sin()[:, None, None] * axis[:, None]
    ground = paper[:, :, None, None] + (slope[:, None, None] * ramp)[:, None]
    picture = ground + (pen[:, :, None, None] - ground) * mask

    lost = torch.zeros(b)
    for step in (8, 10, 12, 16, 24, 32):  # as if scanned at `step` x `step` pixels
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
    """Place figures on 64 x 64 pictures: rotate, shear, stretch, scale and move them.

    Returns:
        Ink in [0, 1], [batch, 1, 64, 64].
    """
    c, s = angle.cos(), angle.sin()
    rotate = torch.stack([torch.stack([c, s], 1), torch.stack([-s, c], 1)], 1)
    one, zero = torch.ones_like(c), torch.zeros_like(c)
    skew = torch.stack([torch.stack([one, shear], 1), torch.stack([zero, one], 1)], 1)
    stretch = torch.stack([aspect.exp(), (-aspect).exp()], 1)
    # grid_sample needs the map from picture to ink; the figure fills 0.75 of the ink map.
    inverse = stretch[:, :, None] * (skew @ rotate) * (0.75 / size)[:, None, None]
    theta = torch.cat([inverse, -inverse @ centre[:, :, None]], 2)
    grid = F.affine_grid(theta.float(), [len(ink), 1, 64, 64], align_corners=False)
    return F.grid_sample(ink[:, None].float() / 255, grid, align_corners=False)
