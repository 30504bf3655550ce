"""Two views of every image: ours in batches, compiled and plain, against the ways that other code makes them.

    python -m benchmarks views --peers lightly pillow torchvision torchvision_batched kornia --threads 1

Images are uint8 in memory. Sizes are (canvas, view): 32 without blur at strength 0.5 as for CIFAR, 96 and 224 with
blur at strength 1. Before any timing the compiled views are held against the plain ones, and the plain ones' crop,
resize and flip against torchvision's antialiased resize of the same crops; peers draw their own numbers, so of theirs
only shape and range are checked. Where there is a GPU, its rows follow: what is not made for one stays out.

lightly: its SimCLRTransform, on PIL images. pillow: what MoCo's, SwAV's and solo-learn's code does, torchvision on PIL
images. torchvision: its v2 on tensors, one by one. torchvision_batched: v2 on the whole batch, which gives all images
the same crop, flip and colours: less work than is wanted. kornia: a batch with its own numbers for every image, but one
order of colour operations, not antialiased. Ours resizes bicubically, as the paper, all others bilinearly, which is
their default and less work.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from benchmarks import harness, workload
from fewlabels.data import views

CASES = {  # side of the view: side of the image, images, strength, blur, rounds
    32: (32, 256, 0.5, False, 15),
    96: (96, 64, 1.0, True, 15),
    224: (256, 32, 1.0, True, 15),
}
CUDA_IMAGES = {32: 4096, 96: 1024, 224: 512}
ON_DEVICE = ("ours", "plain", "kornia", "torchvision_batched")
AGREE = 5e-4  # of [0, 1]: the bound of the tests of a GPU; the compiled views are ten times closer

Maker = Callable[..., Callable[[], Any]]


def ours(pixels: Tensor, size: int, strength: float, *, blur: bool) -> Callable[[], Any]:
    """Both views of a batch, other random numbers in each call."""
    extent = torch.tensor(pixels.shape[2:], device=pixels.device).expand(len(pixels), 2)
    ids = torch.arange(len(pixels), device=pixels.device)
    epoch = 0

    def work() -> list[Tensor]:
        nonlocal epoch
        epoch += 1
        settings = {"size": size, "epoch": epoch, "seed": 0, "strength": strength, "blur": blur}
        return [views.pretrain(pixels, extent, ids, view=number, **settings) for number in (0, 1)]

    return work


def plain(pixels: Tensor, size: int, strength: float, *, blur: bool) -> Callable[[], Any]:
    """The same by the plain path."""
    work = ours(pixels, size, strength, blur=blur)

    def slower() -> Any:
        with workload.plain_views():
            return work()

    return slower


def _pictures(pixels: Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())) for image in pixels]


def lightly(pixels: Tensor, size: int, strength: float, *, blur: bool) -> Callable[[], Any]:
    """lightly's transform, which its documentation trains SimCLR with."""
    module = importlib.import_module("lightly.transforms.simclr_transform")
    transform = module.SimCLRTransform(
        input_size=size, cj_strength=strength, gaussian_blur=0.5 if blur else 0.0, normalize=None
    )
    pictures = _pictures(pixels)
    return lambda: [torch.stack(view) for view in zip(*map(transform, pictures), strict=True)]


def pillow(pixels: Tensor, size: int, strength: float, *, blur: bool) -> Callable[[], Any]:
    """torchvision's transforms on PIL images, with PIL's blur."""
    t = importlib.import_module("torchvision.transforms")

    def soften(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(np.random.default_rng().uniform(0.1, 2.0))))

    transform = t.Compose([*_steps(t, size, strength, [soften] if blur else []), t.ToTensor()])
    pictures = _pictures(pixels)
    return lambda: [torch.stack([transform(picture) for picture in pictures]) for _ in range(2)]


def _steps(t: Any, size: int, strength: float, blur: list[Any]) -> list[Any]:
    amount = 0.8 * strength
    return [
        t.RandomResizedCrop(size, scale=(0.08, 1.0)), t.RandomHorizontalFlip(),
        t.RandomApply([t.ColorJitter(amount, amount, amount, 0.2 * strength)], p=0.8), t.RandomGrayscale(0.2),
        *([t.RandomApply(blur, p=0.5)] if blur else []),
    ]  # fmt: skip


def _torchvision(size: int, strength: float, *, blur: bool) -> Callable[[Tensor], Tensor]:
    t = importlib.import_module("torchvision.transforms.v2")
    soften = [t.GaussianBlur(size // 20 * 2 + 1, (0.1, 2.0))] if blur else []
    made: Callable[[Tensor], Tensor] = t.Compose(
        [*_steps(t, size, strength, soften), t.ToDtype(torch.float32, scale=True)]
    )
    return made


def torchvision(pixels: Tensor, size: int, strength: float, *, blur: bool) -> Callable[[], Any]:
    """The same operations from torchvision v2, on tensors one by one."""
    transform = _torchvision(size, strength, blur=blur)
    return lambda: [torch.stack([transform(image) for image in pixels]) for _ in range(2)]


def torchvision_batched(pixels: Tensor, size: int, strength: float, *, blur: bool) -> Callable[[], Any]:
    """torchvision v2 on the whole batch: one draw for all images."""
    transform = _torchvision(size, strength, blur=blur)
    return lambda: [transform(pixels) for _ in range(2)]


def kornia(pixels: Tensor, size: int, strength: float, *, blur: bool) -> Callable[[], Any]:
    """kornia's batched augmentation, uint8 to [0, 1] first."""
    k = importlib.import_module("kornia.augmentation")
    amount, taps = 0.8 * strength, size // 20 * 2 + 1
    transform = k.AugmentationSequential(
        k.RandomResizedCrop((size, size), scale=(0.08, 1.0), cropping_mode="resample"), k.RandomHorizontalFlip(),
        k.ColorJitter(amount, amount, amount, 0.2 * strength, p=0.8), k.RandomGrayscale(p=0.2),
        *([k.RandomGaussianBlur((taps, taps), (0.1, 2.0), p=0.5)] if blur else []),
    )  # fmt: skip
    return lambda: [transform(pixels.float() / 255) for _ in range(2)]


MAKERS: dict[str, Maker] = {
    maker.__name__: maker for maker in (ours, plain, lightly, pillow, torchvision, torchvision_batched, kornia)
}


def differences(pixels: Tensor, size: int, strength: float, *, blur: bool) -> dict[str, float]:
    """Largest differences: this device's fast views from the plain ones; the plain placement from torchvision's."""
    functional = importlib.import_module("torchvision.transforms.v2.functional")
    fast, slow = ours(pixels, size, strength, blur=blur)(), plain(pixels, size, strength, blur=blur)()
    found = {"fast": max(float((a - b).abs().max()) for a, b in zip(fast, slow, strict=True))}
    extent = torch.tensor(pixels.shape[2:], device=pixels.device).expand(len(pixels), 2)
    ids, key = torch.arange(len(pixels), device=pixels.device), {"epoch": 1, "seed": 0, "view": 0}
    placed = views.finetune(pixels, extent, ids, size=size, **key)
    placement = views.draw_placement(extent, ids, **key)
    bicubic, worst = importlib.import_module("torchvision.transforms").InterpolationMode.BICUBIC, 0.0
    for image, box, flip, view in zip(
        pixels, placement.box.int().tolist(), placement.flip.tolist(), placed, strict=True
    ):
        twin = functional.resized_crop(image.float() / 255, *box, [size, size], bicubic, antialias=True).clamp(0, 1)
        worst = max(worst, float(((twin.flip(-1) if flip else twin) - view).abs().max()))
    return found | {"placement": worst}


def check(pixels: Tensor, size: int, strength: float, calls: dict[str, Callable[[], Any]], *, blur: bool) -> None:
    """Raise AssertionError where ours is wrong, or where a contender does not make two views of every image."""
    found = differences(pixels[:16], size, strength, blur=blur)
    assert max(found.values()) <= AGREE, found
    for name, call in calls.items():
        for view in call():
            assert view.shape == (len(pixels), 3, size, size), (name, view.shape)
            assert view.dtype == torch.float32 and view.min() >= -1e-3 and view.max() <= 1 + 1e-3, name


def measured(size: int, names: list[str], device: torch.device) -> dict[str, Any]:
    """One size on one device: checked, timed side by side, printed."""
    side, count, strength, blur, rounds = CASES[size]
    count = CUDA_IMAGES[size] if device.type == "cuda" else count
    pixels = workload.smooth_pictures(count, side).to(device)
    calls = {name: MAKERS[name](pixels, size, strength, blur=blur) for name in names}
    check(pixels, size, strength, calls, blur=blur)
    title = f"two views of {size} px of {count} images of {side} px on {device.type}"
    found = harness.table(title, harness.side_by_side(calls, rounds=rounds))
    for name, row in found["rows"].items():
        row["views_per_second"] = 2000 * count / row["ms"]
        print(f"  {name:<28} {row['views_per_second']:10,.0f} views/s")
    return found


def run(*, peers: list[str]) -> dict[str, Any]:
    """The suite."""
    names = ["ours", "plain", *(name for name in peers if name in MAKERS)]
    found = {str(size): measured(size, names, torch.device("cpu")) for size in CASES}
    if torch.cuda.is_available():
        device_names = [name for name in names if name in ON_DEVICE]
        found |= {f"cuda {size}": measured(size, device_names, torch.device("cuda")) for size in CASES}
    return found
