"""Crop, resize, flip and warp: where the pixels of a view come from.

Crop, resize and flip are one linear map per axis, so a view is rows @ image @ columns^T with two small matrices for
each image. That is exact for images of different shapes in one batch, and only pixels inside the crop have any weight.

B = images, H, W = height and width of the canvas, S = side of the view, I, O = pixels in and out along one axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CODES = {"antialias": 0, "tf2": 1, "tf1": 2}  # what compiled views call the ways to resize


def matrices(
    start: Tensor, length: Tensor, flip: Tensor | None = None, *, in_size: int, out_size: int, resize: str
) -> Tensor:
    """Bicubic interpolation matrices of one axis: each row holds the weights of one output pixel and sums to 1.

    The crop counts as an image of its own: what lies beside it has no weight.

    Args:
        start, length: (B,) float32, the crop in whole pixels.
        flip: (B,) bool, mirror the result; None for no mirroring.
        in_size, out_size: pixels of the canvas and of the view. in_size may be symbolic (torch.export).
        resize: "antialias": as Pillow, Keys' cubic with a = -0.5, half-pixel centres and a kernel as wide as the
            scale; "tf2": as tf.image.resize, the same without ever widening the kernel, its offsets rounded to
            1/1024 as in TensorFlow's table; "tf1": as TensorFlow 1's legacy resize, which the published models were
            trained with: a = -0.75, pixel i at i * in/out, and the border repeated (the others drop taps outside the
            crop and renormalise).

    Returns:
        (B, out_size, in_size) float32.
    """
    pixel = (torch.arange(in_size, device=start.device, dtype=torch.float32) - start[:, None])[:, None]  # (B, 1, I)
    centre = centres(length, flip, out_size=out_size, resize=resize)[..., None]  # (B, O, 1)
    if resize == "tf1":
        taps = torch.floor(centre) + torch.arange(-1, 3, device=length.device, dtype=torch.float32)  # (B, O, 4)
        x, a = (taps - centre).abs(), -0.75
        weights = torch.where(x <= 1, ((a + 2) * x - (a + 3)) * x * x + 1, ((a * x - 5 * a) * x + 8 * a) * x - 4 * a)
        taps = taps.clamp(min=0).minimum(length[:, None, None] - 1)
        return sum((pixel == taps[..., t : t + 1]) * weights[..., t : t + 1] for t in range(4))  # type: ignore
    step = length / out_size if resize == "antialias" else torch.ones_like(length)
    # In widths of the kernel, which is at least as wide as a pixel
    distance = ((pixel - centre) / step.clamp(min=1.0)[:, None, None]).abs()  # (B, O, I)
    # Keys' two cubic pieces as truncated powers: a third of the passes over memory that torch.where would take
    outer, inner = (2 - distance).clamp(min=0), (1 - distance).clamp(min=0)
    weights = 0.5 * outer * outer * (outer - 1) + inner * inner * (1 - 2 * inner)
    weights = weights * ((pixel >= 0) & (pixel < length[:, None, None]))
    return weights / weights.sum(dim=2, keepdim=True)


def centres(length: Tensor, flip: Tensor | None, *, out_size: int, resize: str) -> Tensor:
    """Where the centre of each output pixel falls in the crop, (B, O), counted from the centre of its first pixel."""
    index = torch.arange(out_size, device=length.device, dtype=torch.float32)[None]  # (1, O)
    if flip is not None:
        index = torch.where(flip[:, None], out_size - 1 - index, index)
    step = (length / out_size)[:, None]
    if resize == "antialias":
        return (index + 0.5) * step - 0.5
    if resize == "tf2":
        return torch.round(((index + 0.5) * step - 0.5) * 1024) / 1024
    place = index * step
    first = torch.floor(place)
    return first + torch.round((place - first) * 1024) / 1024


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ images @ columns^T: float32 (B, 3, H, W), (B, S, H), (B, S, W) -> (B, 3, S, S)."""
    num_images, channels, height, width = images.shape
    narrow = images.reshape(num_images, channels * height, width) @ columns.mT  # (B, 3H, S)
    return rows[:, None] @ narrow.view(num_images, channels, height, -1)


def warp(images: Tensor, affine: Tensor) -> Tensor:
    """Bilinear affine warp; what lies beyond the border repeats the border.

    images: float32 (B, 3, S, S). affine: (B, 2, 3), from output to input coordinates, both in [-1, 1].
    """
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)  # (B, S, S, 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
