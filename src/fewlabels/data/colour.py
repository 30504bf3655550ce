"""Colour distortion and blur of a batch, as in SimCLR (tf2/data_util.py of google-research/simclr).

images: float32 (B, 3, S, S). Single operations do not clip; jitter() clips to [0, 1] after each of them, as the
reference does. Per-image numbers are (B,) tensors. Nothing here is random.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)
TINY = 1e-20


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """images * factor: the multiplicative form of SimCLRv2 (v1 added a number)."""
    return images * factor[:, None, None, None]


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Distance from each channel's own spatial mean, times factor (torchvision takes the mean of the gray image)."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    return torch.lerp(mean, images, factor[:, None, None, None])


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """HSV saturation times factor, clipped to [0, 1].

    Hue and value stay, so it is value + f * (x - value) with f = min(factor, 1 / saturation): no HSV round trip.
    """
    top, bottom = _extremes(images)  # (B, S, S) each
    limit = top / (top - bottom).clamp(min=TINY)
    scale = torch.minimum(limit, factor[:, None, None])
    return torch.lerp(top[:, None], images, scale[:, None])


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """HSV hue plus turns, modulo 1. turns in [-0.5, 0.5]."""
    red, green, blue = images.unbind(1)
    top, bottom = _extremes(images)
    chroma = top - bottom
    inverse = 1 / chroma.clamp(min=TINY)
    beyond_red = torch.where(top == green, 2 + (blue - red) * inverse, 4 + (red - green) * inverse)
    sixth = torch.where(top == red, (green - blue) * inverse, beyond_red)  # hue in sixths of a turn, [-1, 5]
    sixth = sixth + 6 * turns[:, None, None]
    # One comparison each way is enough for half a turn; torch.remainder takes 3 times as long
    sixth = torch.where(sixth < 0, sixth + 6, sixth)
    sixth = torch.where(sixth >= 6, sixth - 6, sixth)
    ramps = [(sixth - 3).abs() - 1, 2 - (sixth - 2).abs(), 2 - (sixth - 4).abs()]
    return torch.stack([bottom + chroma * ramp.clamp(0, 1) for ramp in ramps], dim=1)


def grayscale(images: Tensor) -> Tensor:
    """Luma of the image in all three channels."""
    red, green, blue = images.unbind(1)
    gray = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    return gray[:, None].expand_as(images)


JITTER = (brightness, contrast, saturation, hue)


def jitter(images: Tensor, factors: Tensor, order: Tensor, chosen: Tensor, *, operations: int = 4) -> Tensor:
    """The colour operations in each image's own order, clipped to [0, 1] after each.

    Args:
        images: (B, 3, S, S).
        factors: (B, 4) brightness, contrast and saturation factors, hue turns.
        order: (B, 4) int64, a permutation of 0..3 (indices of JITTER): what is done first, second, ...
        chosen: (B,) bool, the images to change; the others stay as they are, unclipped.
        operations: 4, or 2 for brightness and contrast alone.
    """
    images = images.clone()
    for step in range(4):
        for number, operation in enumerate(JITTER[:operations]):

            def clipped(rows: Tensor, factor: Tensor, operation: Operation = operation) -> Tensor:
                return operation(rows, factor).clamp_(0, 1)

            images = on_rows(clipped, images, factors[:, number], chosen & (order[:, step] == number))
    return images


Operation = Callable[[Tensor, Tensor], Tensor]


def on_rows(operation: Operation, images: Tensor, numbers: Tensor, chosen: Tensor) -> Tensor:
    """images with operation(images, numbers) in the chosen rows. numbers, chosen: (B,). May change images in place.

    On a CPU only the chosen rows are computed. On a GPU finding them would wait for the device, so all rows are.
    """
    if images.is_cuda:
        return torch.where(chosen[:, None, None, None], operation(images, numbers), images)
    rows = chosen.nonzero()[:, 0]
    return images.index_copy_(0, rows, operation(images[rows], numbers[rows])) if len(rows) else images


def blur(images: Tensor, sigma: Tensor, *, radius: int, dark_border: bool) -> Tensor:
    """Separable Gaussian blur with 2 * radius + 1 taps and a standard deviation for each image.

    dark_border: True counts what lies outside as black, as the reference does; False leaves it out of the mean.
    """
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-offsets.square() / (2 * sigma[:, None].square()))  # (B, taps)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    for axis in (3, 2):
        images = _blur_rows(images, kernel, axis, dark_border=dark_border)
    return images


def _blur_rows(images: Tensor, kernel: Tensor, axis: int, *, dark_border: bool) -> Tensor:
    """Blur along axis 2 or 3, as a sum of shifted images.

    Measured on 2 cores: as fast as a grouped convolution on small views; at 96 to 128 px 1.5 to 1.8 times slower.
    """
    size, radius = images.shape[axis], kernel.shape[1] // 2
    padding = (radius, radius) if axis == 3 else (0, 0, radius, radius)
    padded = F.pad(images, padding)
    total = torch.zeros_like(images)
    for tap, weight in enumerate(kernel[:, :, None, None, None].unbind(1)):
        total.addcmul_(padded.narrow(axis, tap, size), weight)
    if dark_border:
        return total
    # What fraction of the kernel lies on the image, (B, S): cumulative sums of the kernel at both ends
    index = torch.arange(size, device=images.device)
    sums = F.pad(kernel.cumsum(dim=1), (1, 0))
    last = (size - 1 - index + radius).clamp(max=2 * radius) + 1
    covered = sums[:, last] - sums[:, (radius - index).clamp(min=0)]
    return total / covered[:, None, None, :].transpose(3, axis)


def _extremes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and smallest channel, (B, S, S) each; pairwise, because amax over a strided axis is 4 times slower."""
    red, green, blue = images.unbind(1)
    top = torch.maximum(torch.maximum(red, green), blue)
    return top, torch.minimum(torch.minimum(red, green), blue)
