"""Views: what the network sees of an image, as a pure function of a whole batch.

A view is drawn and then made. draw_placement() and draw_paint() turn (seed, epoch, image id, view) into numbers;
place() cuts and resizes, paint() colours and blurs. Nothing else is random, so a view depends neither on the batch that
it is made in nor on workers, ranks or restarts. On a GPU all shapes are fixed and the host is never waited for.
Where numba can be used, data/fused.py makes the same views on a CPU image by image; where Triton can be used,
data/views_triton.py makes them on CUDA tile by tile.

Four kinds of images:

    photo       random crop, flip, colour jitter, grayscale, blur; antialiased
    gray        the same for images with three equal channels: brightness and contrast instead of colour
    glyph       digits, letters, drawings: small affine warps of the whole image, brightness and contrast; no flip
    reference   photo exactly as google-research/simclr makes it (TF2), with its quirks

photo departs from reference in three places: resizing is antialiased, crops reach the last row and column, and blur
does not darken the border. Both draw the blur's sigma for each image; google-research/simclr draws one for the whole
batch, which would make a view depend on its batch (shared_blur_sigma=True asks for it).

B = images, H, W = height and width of the canvas, S = side of the view. An extent is the valid top-left (h, w) of it.
"""

from __future__ import annotations

import functools
import importlib
import math
import subprocess
import types
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from fewlabels import random
from fewlabels.data import colour
from fewlabels.data.resample import matrices, resample, warp
from fewlabels.errors import DataError, UsageError, nearest

# Candidate crops per image; the reference tries 100 times. From 8 % of the area up a try fails with probability 0.06 on
# images of 3:4, 0.10 at 2:5, 0.16 at 1:4, 0.5 at 1:8 (measured), all ten with 1e-12 to 1e-3; from half of it up all
# fail at 2.7:1 and beyond. The reference then squashes the whole image into the square; our kinds take the largest crop
# of an allowed aspect, since evaluation does not squash (digits in images of 1:3: 73 % right, with squashed views 18).
TRIES = 10
ASPECT = (3 / 4, 4 / 3)  # width / height of a crop
# Of the smallest crop. The reference draws from 8 % up and then rejects what is below 10 %
AREA_DRAWN, AREA_KEPT = 0.08, 0.1
BLUR_SIGMA = (0.1, 2.0)
PLAIN = False  # True: the plain path even where a compiled one could run (tests, comparisons)
WHOLE = (torch.uint8, torch.int16, torch.int32, torch.int64)  # dtypes of an extent
T = TypeVar("T", "Placement", "Paint")
CHUNK_BYTES = 1 << 21  # CPU: views made at once, so that a chunk stays in the cache between operations


@dataclass(frozen=True)
class Kind:
    """What a kind of image can bear."""

    colour: bool = True  # hue and saturation mean something
    warp: bool = False  # a crop or a mirror image would be another class
    official: bool = False  # bit by bit as the reference
    resize: str = "antialias"  # which bicubic interpolation: see resample.matrices


KINDS = {
    "photo": Kind(),
    "gray": Kind(colour=False),
    "glyph": Kind(colour=False, warp=True),
    "reference": Kind(official=True, resize="tf2"),
    "reference_tf1": Kind(official=True, resize="tf1"),
}


@dataclass(frozen=True)
class Placement:
    """Where the pixels of a view come from: a crop, perhaps mirrored, then perhaps warped (glyphs)."""

    box: Tensor  # (B, 4) float32 top, left, height, width in whole pixels
    flip: Tensor  # (B,) bool
    affine: Tensor | None = None  # (B, 2, 3) float32, from output to input coordinates in [-1, 1]


@dataclass(frozen=True)
class Paint:
    """What is done to the colours of a view, and how much it is blurred."""

    jitter: Tensor  # (B,) bool
    order: Tensor  # (B, 4) int64, a permutation of colour.JITTER
    factors: Tensor  # (B, 4) float32 factors of brightness, contrast, saturation; turns of hue
    gray: Tensor  # (B,) bool
    blur: Tensor  # (B,) bool
    sigma: Tensor  # (B,) float32, pixels of the view


# --- the three views of the method ------------------------------------------------------------------------


def pretrain(
    pixels: Tensor, extent: Tensor, ids: Tensor, *, size: int, epoch: int, seed: int, view: int, strength: float = 1.0,
    blur: bool = True, kind: str = "photo", smallest_crop: float = AREA_DRAWN, shared_blur_sigma: bool = False,
) -> Tensor:  # fmt: skip
    """A view for contrastive learning (SimCLRv2's pretraining augmentation; tf2/data_util.py preprocess_for_train).

    Args:
        pixels: uint8 (B, 3, H, W).
        extent: int64 (B, 2), the valid top-left (h, w) of each image; what lies outside never shows.
        ids: int64 (B,), the numbers of the images, on the device of pixels.
        size: side of the view in pixels.
        epoch, seed, view: which random numbers; two views of an image differ in view.
        strength: of the colour jitter, 0 to 1.25; 1 for ImageNet, 0.5 for CIFAR in the paper.
        blur: blur half of the views. It does nothing below 20 px, where the reference's kernel has one tap.
        kind: "photo", "gray", "glyph", "reference" or "reference_tf1".
        smallest_crop: of the image's area, 0.08 (the reference) to 1, where 3:4 to 4:3 allows it. Glyphs have none.
        shared_blur_sigma: the reference's one sigma for the batch (its first image's): a view then depends on it.

    Returns:
        float32 (B, 3, size, size) in [0, 1].

    Raises:
        UsageError: an unknown kind, or a number out of range. DataError: pixels, extents or ids of another shape or
        type, and on a CPU extents that are not within the canvas (on a GPU nobody waits to see).
    """
    _check(pixels, extent, size, kind, ids)
    placement = draw_placement(extent, ids, epoch=epoch, seed=seed, view=view, kind=kind, smallest_crop=smallest_crop)
    strokes = draw_paint(ids, epoch=epoch, seed=seed, view=view, strength=strength)
    if shared_blur_sigma:
        strokes = replace(strokes, sigma=strokes.sigma[:1].expand_as(strokes.sigma))
    return _make(pixels, placement, strokes, size=size, kind=kind, blur=blur)


def finetune(
    pixels: Tensor, extent: Tensor, ids: Tensor, *, size: int, epoch: int, seed: int, view: int = 0,
    kind: str = "photo", smallest_crop: float = AREA_DRAWN,
) -> Tensor:  # fmt: skip
    """A view for finetuning and distillation: crop and flip only; for glyphs warps of half the strength.

    Arguments, result and errors as for pretrain(), whose crop it shares for equal (seed, epoch, id, view) and
    smallest_crop.
    """
    _check(pixels, extent, size, kind, ids)
    placement = draw_placement(
        extent, ids, epoch=epoch, seed=seed, view=view, kind=kind, smallest_crop=smallest_crop, amount=0.5
    )
    return _make(pixels, placement, None, size=size, kind=kind)


def evaluate(pixels: Tensor, extent: Tensor, *, size: int, kind: str = "photo", crop: float | None = None) -> Tensor:
    """The view for evaluation and prediction; nothing random.

    The central square of crop times the shorter side: 0.875 by default, or all of it for views of 32 px and less
    (docs/method.md). Glyphs are never cropped: the whole image is resized to the square.
    Arguments, result and errors as for pretrain().
    """
    _check(pixels, extent, size, kind)
    if crop is not None and not 0 < crop <= 1:
        raise UsageError(f"a crop of {crop:g} times the shorter side is out of range", fix="use more than 0, at most 1")
    box = _central_box(extent, size=size, kind=kind, crop=crop)
    stay = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
    return _make(pixels, Placement(box, stay), None, size=size, kind=kind)


def evaluate_image(pixels: Tensor, *, size: int, kind: str = "photo") -> Tensor:
    """evaluate() for images that fill their canvas, as a program that torch.export can trace with any H, W >= 2.

    uint8 (B, 3, H, W) -> float32 (B, 3, size, size) in [0, 1]. Basic operations only, for exported models.
    """
    _check_kind(kind, size)
    height, width = pixels.shape[2:]
    extent = torch.cat([torch.full((1, 1), side, device=pixels.device) for side in (height, width)], dim=1)
    box = _central_box(extent, size=size, kind=kind, crop=None)
    return _cut(pixels, box, None, size=size, kind=kind).clamp(0, 1)


# --- drawing ----------------------------------------------------------------------------------------------


def draw_placement(
    extent: Tensor, ids: Tensor, *, epoch: int, seed: int, view: int, kind: str = "photo", amount: float = 1.0,
    smallest_crop: float = AREA_DRAWN,
) -> Placement:  # fmt: skip
    """Where the views of these images come from. amount scales the warps of glyphs."""
    if not AREA_DRAWN <= smallest_crop <= 1:
        raise UsageError(
            f"a smallest crop of {smallest_crop} of the image", fix=f"use a share of its area from {AREA_DRAWN} to 1"
        )
    numbers = _uniforms(seed, epoch, ids, 2 * view, 3 + 2 * TRIES)  # (B, 23)
    if KINDS[kind].warp:
        flip = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        return Placement(_whole(extent), flip, _draw_affine(numbers, amount))
    flip = numbers[:, 0] < 0.5
    boxes = _draw_boxes(extent, numbers[:, 1:], smallest_crop, official=KINDS[kind].official)
    return Placement(boxes, flip)


def draw_paint(ids: Tensor, *, epoch: int, seed: int, view: int, strength: float = 1.0) -> Paint:
    """How the views of these images are coloured: jitter with probability 0.8, gray 0.2, blur 0.5."""
    if not 0 <= strength <= 1.25:
        raise UsageError(
            f"colour strength {strength} is out of range",
            why="brightness and contrast factors are drawn from 1 - 0.8 * strength up, and must not be negative",
            fix="use a strength from 0 to 1.25",
        )
    numbers = _uniforms(seed, epoch, ids, 2 * view + 1, 12)  # (B, 12)
    signed = 2 * numbers[:, 4:8] - 1
    factors = torch.cat([1 + 0.8 * strength * signed[:, :3], 0.2 * strength * signed[:, 3:]], dim=1)
    low, high = BLUR_SIGMA
    return Paint(
        jitter=numbers[:, 0] < 0.8, order=numbers[:, 8:12].argsort(dim=1, stable=True), factors=factors,
        gray=numbers[:, 1] < 0.2, blur=numbers[:, 2] < 0.5, sigma=low + (high - low) * numbers[:, 3],
    )  # fmt: skip


def _draw_boxes(extent: Tensor, numbers: Tensor, smallest: float, *, official: bool) -> Tensor:
    """Random crops (B, 4): TensorFlow's sample_distorted_bounding_box, as the reference calls it, without its loop.

    Aspect and height are uniform, not area: from 8 % on the mean area is 0.39 to 0.43 of the image (method.md 5.1).
    numbers: (B, 2 + 2 * TRIES) uniform.
    """
    height, width = extent.to(torch.float32)[:, :, None].unbind(1)  # (B, 1) each
    area = height * width
    aspect = ASPECT[0] + (ASPECT[1] - ASPECT[0]) * numbers[:, 2 : 2 + TRIES]  # (B, TRIES)
    tallest = torch.round((area / aspect).sqrt())
    fitting = torch.floor((width + 0.5) / aspect)
    tallest = torch.where(torch.round(tallest * aspect) > width, fitting, tallest).minimum(height)
    lowest = torch.round((smallest * area / aspect).sqrt()).minimum(tallest)
    tall = lowest + torch.floor(numbers[:, 2 + TRIES :] * (tallest - lowest + 1))
    # Rounding may leave the allowed areas by a row; the reference mends that before it judges
    tall = tall + (tall * torch.round(tall * aspect) < smallest * area).float()
    tall = tall - (tall * torch.round(tall * aspect) > area).float()
    wide = torch.round(tall * aspect)
    accepted = (tall * wide >= max(smallest, AREA_KEPT) * area) & (wide <= width) & (tall <= height)
    turn = torch.arange(TRIES, 0, -1, device=extent.device) * accepted  # (B, TRIES), largest where accepted first
    first = turn.argmax(dim=1, keepdim=True)
    found = accepted.gather(1, first)
    most_tall, most_wide = torch.floor(width / ASPECT[0]), torch.floor(height * ASPECT[1])
    tall = torch.where(found, tall.gather(1, first), height if official else height.minimum(most_tall))
    wide = torch.where(found, wide.gather(1, first), width if official else width.minimum(most_wide))
    room = torch.cat([height - tall, width - wide], dim=1)  # (B, 2)
    # The reference never draws the last offset (TensorFlow's Uniform(n) excludes n): its crops miss the last row
    corner = torch.floor(numbers[:, :2] * (room if official else room + 1)).minimum(room)
    return torch.cat([corner, tall, wide], dim=1)


def _draw_affine(numbers: Tensor, amount: float) -> Tensor:
    """Random warps (B, 2, 3): rotation up to 15 degrees, shear up to 10, area 0.6 to 1, aspect up to 1.2, shift."""
    signed = 2 * numbers - 1  # (B, many)
    angle = torch.deg2rad(15 * amount * signed[:, 0])
    shear = torch.tan(torch.deg2rad(10 * amount * signed[:, 1]))
    zoom = (1 - 0.4 * amount * numbers[:, 2]).sqrt()
    stretch = (math.log(1.2) / 2 * amount * signed[:, 3]).exp()  # pow's last bits would depend on the place in a batch
    across, down = zoom * stretch, zoom / stretch  # sides of the window, 1 = the image's own
    cos, sin = torch.cos(angle), torch.sin(angle)
    # rotation @ shear @ scale; the window stays on the image but for what rotation and shear turn out of it
    first = torch.stack([across * cos, down * (shear * cos - sin), signed[:, 4] * (1 - across).clamp(min=0)], dim=1)
    second = torch.stack([across * sin, down * (shear * sin + cos), signed[:, 5] * (1 - down).clamp(min=0)], dim=1)
    return torch.stack([first, second], dim=1)


def _whole(extent: Tensor) -> Tensor:
    """(B, 4) the boxes that hold whole images."""
    sides = extent.to(torch.float32)
    return torch.cat([torch.zeros_like(sides), sides], dim=1)


def _central_box(extent: Tensor, *, size: int, kind: str, crop: float | None) -> Tensor:
    """(B, 4) the crops of evaluate(); rounding half to even and offsets as in the reference's center_crop."""
    if KINDS[kind].warp and crop is None:
        return _whole(extent)
    share = (0.875 if size > 32 else 1.0) if crop is None else crop
    sides = extent.to(torch.float32)
    side = torch.round(share * sides.amin(dim=1, keepdim=True)).clamp(min=1)
    corner = torch.floor((sides - side + 1) / 2)
    return torch.cat([corner, side, side], dim=1)


# --- making -----------------------------------------------------------------------------------------------


def _make(
    pixels: Tensor, placement: Placement, strokes: Paint | None, *, size: int, kind: str, blur: bool = False
) -> Tensor:
    """The views by these numbers: compiled on a CPU where numba is there, else place() and paint() in chunks."""
    if fused := _fused(pixels.device):
        radius = _blur_radius(size) if blur else 0
        return fused.make(pixels, placement, strokes, size=size, kind=KINDS[kind], radius=radius)  # type: ignore

    chunk, parts = len(pixels) if pixels.is_cuda else max(4, CHUNK_BYTES // (12 * size * size)), list[Tensor]()
    with torch.autocast(pixels.device.type, enabled=False):  # bfloat16 would cost 1.6 grey levels
        for part in (slice(first, first + chunk) for first in range(0, len(pixels), chunk)):
            images = place(pixels[part], _rows(placement, part), size=size, kind=kind)
            parts.append(paint(images, _rows(strokes, part), blur=blur, kind=kind) if strokes else images.clamp_(0, 1))
    return torch.cat(parts) if len(parts) > 1 else parts[0]  # on a GPU all of a batch is one


def _rows(numbers: T, part: slice) -> T:
    """These rows of every tensor of a Placement or Paint."""
    found = (None if tensor is None else tensor[part] for tensor in vars(numbers).values())
    return type(numbers)(*found)  # type: ignore[arg-type]


def _fused(device: torch.device) -> types.ModuleType | None:
    """The compiled twin of this module, None where it is not to run."""
    return None if PLAIN else compiled(device.type)


@functools.cache
def compiled(device: str = "cpu") -> types.ModuleType | None:
    """What makes views on a device: data/fused.py on "cpu", compiled now if it never was on this machine (12 s), and
    data/views_triton.py on "cuda". None where numba, or Triton with the C compiler that it needs, cannot be used.
    """
    name = {"cpu": "fused", "cuda": "views_triton"}.get(device)
    try:
        found = importlib.import_module(f"fewlabels.data.{name}")
        found.uniforms(0, 0, torch.zeros(1, dtype=torch.int64, device=device), 0, 1)
        return found
    # No such module; numba that does not fit numpy or has no folder for what it compiles; no compiler for Triton
    except (ImportError, RuntimeError, OSError, subprocess.SubprocessError):
        return None


def _uniforms(seed: int, epoch: int, ids: Tensor, stream: int, count: int) -> Tensor:
    return (_fused(ids.device) or random).uniforms(seed, epoch, ids, stream, count)  # type: ignore[no-any-return]


def place(pixels: Tensor, placement: Placement, *, size: int, kind: str = "photo") -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, size, size), a little beyond [0, 1] where the bicubic kernel overshoots."""
    images = _cut(pixels, placement.box, placement.flip, size=size, kind=kind)
    return images if placement.affine is None else warp(images, placement.affine)


def paint(images: Tensor, strokes: Paint, *, blur: bool = True, kind: str = "photo") -> Tensor:
    """Colour jitter, grayscale and blur: float32 (B, 3, S, S) -> the same in [0, 1]."""
    has_colour = KINDS[kind].colour
    images = colour.jitter(images, strokes.factors, strokes.order, strokes.jitter, operations=4 if has_colour else 2)
    if has_colour:
        images = colour.on_rows(lambda rows, _: colour.grayscale(rows), images, strokes.sigma, strokes.gray)
    images = images.clamp(0, 1)
    radius = _blur_radius(images.shape[-1])
    if blur and radius > 0:
        soften = functools.partial(colour.blur, radius=radius, dark_border=KINDS[kind].official)
        images = colour.on_rows(soften, images, strokes.sigma, strokes.blur).clamp_(0, 1)
    return images


def _blur_radius(size: int) -> int:
    """Half the reference's kernel, a tenth of the view."""
    return size // 10 // 2


def _cut(pixels: Tensor, box: Tensor, flip: Tensor | None, *, size: int, kind: str) -> Tensor:
    """Crop, resize and flip: uint8 (B, 3, H, W) -> float32 (B, 3, size, size). H, W may be symbolic (torch.export)."""
    top, left, tall, wide = box.unbind(1)
    height, width = pixels.shape[2:]
    resize = KINDS[kind].resize
    rows = matrices(top, tall, in_size=height, out_size=size, resize=resize)
    columns = matrices(left, wide, flip, in_size=width, out_size=size, resize=resize)
    return resample(pixels.to(torch.float32), rows, columns / 255)


def _check_kind(kind: str, size: int) -> None:
    if kind not in KINDS:
        raise UsageError(f'unknown kind of views "{kind}"{nearest(kind, KINDS)}', fix=f"use one of {', '.join(KINDS)}")
    if size < 1:
        raise UsageError(f"views of {size} px cannot be made", fix="use a size of at least 1")


def _check(pixels: Tensor, extent: Tensor, size: int, kind: str, ids: Tensor | None = None) -> None:
    _check_kind(kind, size)
    if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[1] != 3 or len(pixels) == 0:
        raise DataError(
            f"pixels are {pixels.dtype} of shape {tuple(pixels.shape)}", fix="pass uint8 (B, 3, H, W) with B > 0"
        )
    if extent.shape != (len(pixels), 2) or extent.dtype not in WHOLE:
        raise DataError(
            f"extents are {extent.dtype} of shape {tuple(extent.shape)} for {len(pixels)} images",
            fix="pass whole numbers (B, 2): valid h, w",
        )
    canvas = torch.tensor(pixels.shape[2:], device="cpu")
    if extent.device.type == "cpu" and ((extent < 1) | (extent > canvas)).any():  # compiled views would leave memory
        raise DataError(
            f"extents are not all between 1 and the canvas of {tuple(canvas.tolist())}", fix="pass the valid h, w"
        )
    if ids is not None and (ids.dtype != torch.int64 or ids.shape != (len(pixels),)):
        raise DataError(
            f"ids are {ids.dtype} of shape {tuple(ids.shape)} for {len(pixels)} images", fix="pass int64 (B,)"
        )
