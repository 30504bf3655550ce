"""Two views of every image: ours in batches, compiled and plain, against lightly's SimCLR transform, one by one.

    python -m benchmarks views --peers lightly torchvision --threads 1

Images are uint8 in memory. Sizes are (canvas, view): 32 without blur at strength 0.5 as for CIFAR, 96 and 224 with
blur at strength 1. Correctness is the tests' business (tests/data/test_views.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import harness
from fewlabels.data import views

CASES = {  # side of the view: side of the image, images, strength, blur
    32: (32, 256, 0.5, False),
    96: (96, 64, 1.0, True),
    224: (256, 32, 1.0, True),
}
ROUNDS = 15


def ours(pixels: torch.Tensor, size: int, strength: float, *, blur: bool) -> Callable[[], Any]:
    """Both views of a batch, other random numbers in each call."""
    extent = torch.tensor(pixels.shape[2:]).expand(len(pixels), 2)
    ids = torch.arange(len(pixels))
    epoch = 0

    def work() -> list[torch.Tensor]:
        nonlocal epoch
        epoch += 1
        settings = {"size": size, "epoch": epoch, "seed": 0, "strength": strength, "blur": blur}
        return [views.pretrain(pixels, extent, ids, view=number, **settings) for number in (0, 1)]

    return work


def plain(pixels: torch.Tensor, size: int, strength: float, *, blur: bool) -> Callable[[], Any]:
    """The same by the plain path."""
    work = ours(pixels, size, strength, blur=blur)

    def slower() -> Any:
        views.PLAIN = True
        try:
            return work()
        finally:
            views.PLAIN = False

    return slower


def lightly(pixels: torch.Tensor, size: int, strength: float, *, blur: bool) -> Callable[[], Any]:
    """lightly's transform, which its documentation trains SimCLR with."""
    module = importlib.import_module("lightly.transforms.simclr_transform")
    transform = module.SimCLRTransform(
        input_size=size, cj_strength=strength, gaussian_blur=0.5 if blur else 0.0, normalize=None
    )
    pictures = [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())) for image in pixels]
    return lambda: [torch.stack(view) for view in zip(*map(transform, pictures), strict=True)]


def torchvision(pixels: torch.Tensor, size: int, strength: float, *, blur: bool) -> Callable[[], Any]:
    """The same operations from torchvision v2, on tensors."""
    t = importlib.import_module("torchvision.transforms.v2")
    amount = 0.8 * strength
    steps = [
        t.RandomResizedCrop(size, scale=(0.08, 1.0), antialias=True), t.RandomHorizontalFlip(),
        t.RandomApply([t.ColorJitter(amount, amount, amount, 0.2 * strength)], p=0.8), t.RandomGrayscale(0.2),
        *([t.RandomApply([t.GaussianBlur(size // 20 * 2 + 1, (0.1, 2.0))], p=0.5)] if blur else []),
        t.ToDtype(torch.float32, scale=True),
    ]  # fmt: skip
    transform = t.Compose(steps)
    return lambda: [torch.stack([transform(image) for image in pixels]) for _ in range(2)]


def run(*, peers: list[str]) -> dict[str, Any]:
    """The suite."""
    found = {}
    for size, (side, count, strength, blur) in CASES.items():
        torch.manual_seed(0)
        # Smooth pictures with noise: pure noise is unlike photos for nobody but JPEG, smoothness costs nobody time
        coarse = torch.rand(count, 3, 8, 8)
        smooth = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")
        pixels = (smooth * 235 + 20 * torch.rand(count, 3, side, side)).to(torch.uint8)
        makers = {"ours": ours, "plain": plain} | {
            name: globals()[name] for name in peers if name in ("lightly", "torchvision")
        }
        calls = {name: make(pixels, size, strength, blur=blur) for name, make in makers.items()}
        title = f"two views of {size} px of {count} images of {side} px"
        found[str(size)] = harness.table(title, harness.side_by_side(calls, rounds=ROUNDS))
        for name, row in found[str(size)]["rows"].items():
            row["views_per_second"] = 2000 * count / row["ms"]
            print(f"  {name:<28} {row['views_per_second']:10,.0f} views/s")
    return found
