"""Views on a GPU, compiled by Triton: small views by one kernel, larger ones by two.

Same numbers in, same views out as the plain path of views.py, to 5e-5: the tests hold both together in Triton's
interpreter, and compile every kernel for a Hopper GPU.

A view is made in square tiles, one program each. _place() resamples a tile as rows @ pixels @ columns^T, reading only
the blocks of pixels that have weight, and applies the colour operations before contrast. Contrast needs the mean of the
whole view, so _finish() does the rest: it paints a tile with as much around it as the blur reaches, and blurs that as
rows @ tile @ columns^T again. A view of up to WHOLE pixels is one tile, and _place() finishes it in registers.

B = images, H, W = height and width of the canvas, S = side of the view, T = side of a tile, K = side of a block, which
is what a program reads at once. Planes are red, green and blue, each (T, T) or (K, K); y, x (T,) and row, column (K,)
number the lines of the view and of what is read. Pointers to numbers of images are moved to an image's own first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewlabels import random
from fewlabels.data import resample
from fewlabels.data.colour_triton import Brush, begin, clip, end, of_image

if TYPE_CHECKING:
    from fewlabels.data.views import Kind, Paint, Placement

WHOLE = 64  # views up to this side are one tile
SIDE = 32  # of a block, and of a tile of larger views: the largest whose numbers a program keeps in registers
UNIT = tl.constexpr(2.0**-24)


class Source(NamedTuple):
    """What views are cut from, and where."""

    pixels: Any  # uint8 (B, 3, H, W)
    box: Any  # float32 (B, 4), as in views.Placement
    centres: Any  # float32 (B, 2, S), resample.centres() of rows and of columns


def make(pixels: Tensor, placement: Placement, strokes: Paint | None, *, size: int, kind: Kind, radius: int) -> Tensor:
    """The views of uint8 (B, 3, H, W) by these numbers, float32 (B, 3, size, size) in [0, 1].

    strokes: None for views that are only placed. radius: of the blur, 0 = none.
    """
    tall, wide = placement.box[:, 2:].unbind(1)
    rows = resample.centres(tall, None, out_size=size, resize=kind.resize)
    columns = resample.centres(wide, placement.flip, out_size=size, resize=kind.resize)
    source = Source(pixels.contiguous(), placement.box.contiguous(), torch.stack([rows, columns], dim=1))
    brush = Brush(*(part.contiguous() for part in vars(strokes).values())) if strokes else None
    with torch.cuda.device_of(pixels), torch.autocast(pixels.device.type, enabled=False):
        if placement.affine is None:
            return _made(source, brush, size=size, kind=kind, radius=radius)
        bare = _made(source, None, size=size, kind=kind, radius=0, clip=False)
        images = resample.warp(bare, placement.affine)
        return images.clamp_(0, 1) if brush is None else _made(images, brush, size=size, kind=kind, radius=radius)


def _made(
    source: Source | Tensor, brush: Brush | None, *, size: int, kind: Kind, radius: int, clip: bool = True
) -> Tensor:
    """Views cut from a source, or the placed views (B, 3, S, S) themselves; painted with a brush, if any."""
    images = source.pixels if isinstance(source, Source) else source
    num_images, _, height, width = images.shape
    whole = size <= WHOLE
    tile = max(16, triton.next_power_of_2(size)) if whole else SIDE
    tiles = triton.cdiv(size, tile) ** 2
    grid = (num_images * tiles,)
    made = torch.empty(num_images, 3, size, size, device=images.device)
    sums = None if whole or brush is None else made.new_empty(num_images, tiles, 3)
    # Warps share a product by its rows, 16 each: more of them would do the same work twice, but for 64 rows, where
    # half as many run out of registers
    settings: dict[str, Any] = {"TILE": tile, "BLOCK": min(tile, SIDE), "num_warps": max(1, tile * tile // 512)}
    settings |= {"COLOUR": kind.colour, "DARK": kind.official, "num_stages": 1}
    _place[grid](
        source, brush, made, sums, height, width, size, radius, RESIZE=resample.CODES[kind.resize],
        PLACED=source is images, PAINTED=brush is not None, WHOLE=whole, CLIP=clip, **settings,
    )  # fmt: skip
    if sums is None:
        return made
    finished = torch.empty_like(made)
    _finish[grid](made, sums, brush, finished, size, radius, TILES=triton.next_power_of_2(tiles), **settings)
    return finished


def uniforms(seed: int, epoch: int, ids: Tensor, stream: int, count: int) -> Tensor:
    """random.uniforms() of ids on a GPU: the same numbers."""
    blocks = triton.cdiv(count, 4)
    random.check_key(seed, epoch, stream, blocks)
    found = torch.empty(len(ids), count, device=ids.device)
    with torch.cuda.device_of(ids):
        grid = (triton.cdiv(len(ids) * blocks, 256),)
        _uniforms[grid](ids.contiguous(), found, len(ids), seed, epoch, stream * 65536, BLOCKS=blocks, COUNT=count)
    return found


@triton.jit(do_not_specialize=["num_images", "seed", "epoch", "first"])
def _uniforms(ids, found, num_images, seed, epoch, first, BLOCKS: tl.constexpr, COUNT: tl.constexpr):
    """Philox4x32-10 as random.philox(), a block of four numbers for each of 256 elements."""
    element = tl.program_id(0) * 256 + tl.arange(0, 256)
    image, block = element // BLOCKS, element % BLOCKS
    number = tl.load(ids + image, mask=image < num_images, other=0)
    low, high = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    words = tl.philox(seed, low, high, (block * 0 + epoch).to(tl.uint32), (first + block).to(tl.uint32))
    for t in tl.static_range(4):
        place = 4 * block + t
        number = (words[t] >> 8).to(tl.float32) * UNIT
        tl.store(found + image * COUNT + place, number, mask=(image < num_images) & (place < COUNT))


# --- one tile -----------------------------------------------------------------------------------------------------


@triton.jit
def _place(
    source, brush, made, sums, height, width, size, radius, RESIZE: tl.constexpr, PLACED: tl.constexpr,
    PAINTED: tl.constexpr, COLOUR: tl.constexpr, DARK: tl.constexpr, WHOLE: tl.constexpr,
    CLIP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of the view: finished where nothing is painted or where it is whole; else to be gone on with at contrast.

    PLACED: source holds what is placed already. sums: (B, tiles, 3) of what is to be gone on with.
    """
    image, y, x = _where(size, TILE)
    if PLACED:
        planes = _read(source + image * 3 * size * size, y, x, size)
    else:
        planes = _cut(source, image, y, x, height, width, size, RESIZE, TILE, BLOCK)
    if PAINTED:
        brush = of_image(brush, image)
        planes = begin(planes, brush, COLOUR)
        inside = (y < size)[:, None] & (x < size)
        totals = _totals(planes, inside)
        if WHOLE:
            area = size * size
            planes = end(planes, (totals[0] / area, totals[1] / area, totals[2] / area), brush, COLOUR)
            if tl.load(brush.blur) & (radius > 0):
                planes = _blur_whole(planes, inside, y, tl.load(brush.sigma), radius, size, DARK)
        else:
            place = sums + 3 * tl.program_id(0)
            for channel in tl.static_range(3):
                tl.store(place + channel, totals[channel])
    elif CLIP:
        planes = (clip(planes[0]), clip(planes[1]), clip(planes[2]))
    _write(made + image * 3 * size * size, planes, y, x, size)


@triton.jit
def _finish(
    begun, sums, brush, made, size, radius, COLOUR: tl.constexpr, DARK: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """A tile of the view from what _place() began. TILES: tiles of a view, as the next power of two."""
    image, y, x = _where(size, TILE)
    brush = of_image(brush, image)
    begun += image * 3 * size * size
    tiles, tile = tl.cdiv(size, TILE) * tl.cdiv(size, TILE), tl.arange(0, TILES)
    place, area = sums + 3 * (image * tiles + tile), size * size
    red = tl.sum(tl.load(place, mask=tile < tiles, other=0.0)) / area
    green = tl.sum(tl.load(place + 1, mask=tile < tiles, other=0.0)) / area
    blue = tl.sum(tl.load(place + 2, mask=tile < tiles, other=0.0)) / area
    means = (red, green, blue)
    if tl.load(brush.blur) & (radius > 0):
        planes = _end_and_blur(begun, means, brush, y, x, radius, size, COLOUR, DARK, TILE, BLOCK)
    else:
        planes = end(_read(begun, y, x, size), means, brush, COLOUR)
    _write(made + image * 3 * size * size, planes, y, x, size)


@triton.jit
def _where(size, TILE: tl.constexpr):
    """Which image this program works on (int64, as three planes of all images may exceed 2^31 numbers), and where."""
    across = tl.cdiv(size, TILE)
    tile = tl.program_id(0) % (across * across)
    line = tl.arange(0, TILE)
    image = (tl.program_id(0) // (across * across)).to(tl.int64)
    return image, tile // across * TILE + line, tile % across * TILE + line


@triton.jit
def _zeros(HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    plane = tl.zeros((HEIGHT, WIDTH), tl.float32)
    return plane, plane, plane


@triton.jit
def _read(view, row, column, size):
    """The planes of a view, zero beside it."""
    inside = ((row >= 0) & (row < size))[:, None] & (column >= 0) & (column < size)
    place = view + row[:, None] * size + column
    red = tl.load(place, mask=inside, other=0.0)
    green = tl.load(place + size * size, mask=inside, other=0.0)
    return red, green, tl.load(place + 2 * size * size, mask=inside, other=0.0)


@triton.jit
def _write(view, planes, y, x, size):
    inside = (y < size)[:, None] & (x < size)
    place = view + y[:, None] * size + x
    for channel in tl.static_range(3):
        tl.store(place + channel * size * size, planes[channel], mask=inside)


@triton.jit
def _totals(planes, inside):
    red, green = tl.sum(tl.where(inside, planes[0], 0.0)), tl.sum(tl.where(inside, planes[1], 0.0))
    return red, green, tl.sum(tl.where(inside, planes[2], 0.0))


@triton.jit
def _product(a, b, total):
    """total + a @ b in float32 on tensor cores, with each number as the sum of two float16 (pixels are one already)."""
    a_high, b_high = a.to(tl.float16), b.to(tl.float16)
    total = tl.dot(a_high, b_high, total)
    total = tl.dot(a_high, (b - b_high).to(tl.float16), total)
    if a.dtype == tl.float32:
        total = tl.dot((a - a_high).to(tl.float16), b_high, total)
    return total


# --- crop and resize ----------------------------------------------------------------------------------------------


@triton.jit
def _cut(source, image, y, x, height, width, size, RESIZE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Crop, resize and flip: the planes of a tile, a little beyond [0, 1] where the bicubic kernel overshoots."""
    box, centres = source.box + 4 * image, source.centres + 2 * image * size
    top, left, tall, wide = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
    down = tl.load(centres + tl.minimum(y, size - 1))
    across = tl.load(centres + size + tl.minimum(x, size - 1))
    first_row, last_row, tall_scale = _reach(down, top, tall, size, RESIZE)
    first_column, last_column, wide_scale = _reach(across, left, wide, size, RESIZE)
    first_column = first_column // 16 * 16  # so that a thread may read 16 bytes at once
    area, pixels = height * width, source.pixels + image * 3 * height * width
    planes, total = _zeros(TILE, TILE), tl.zeros((TILE,), tl.float32)
    for first in range(first_row, last_row + 1, BLOCK):
        row = first + tl.arange(0, BLOCK)
        narrow, covered = _zeros(BLOCK, TILE), tl.zeros((TILE,), tl.float32)
        for start in range(first_column, last_column + 1, BLOCK):
            column = start + tl.arange(0, BLOCK)
            weights = _taps((column - left)[:, None], across, wide_scale, wide, RESIZE)  # (K, T)
            covered += tl.sum(weights, 0)
            # Pixels of the canvas beside the crop are read and have no weight
            place, inside = pixels + row[:, None] * width + column, (row < height)[:, None] & (column < width)
            red = _product(tl.load(place, mask=inside, other=0).to(tl.float16), weights, narrow[0])
            green = _product(tl.load(place + area, mask=inside, other=0).to(tl.float16), weights, narrow[1])
            blue = _product(tl.load(place + 2 * area, mask=inside, other=0).to(tl.float16), weights, narrow[2])
            narrow = (red, green, blue)
        weights = _taps(row - top, down[:, None], tall_scale, tall, RESIZE)  # (T, K)
        total += tl.sum(weights, 1)
        planes = _down(weights, narrow, 255 * covered, planes)
    total = total[:, None]
    return planes[0] / total, planes[1] / total, planes[2] / total


@triton.jit
def _down(weights, narrow, covered, planes):
    """planes + weights @ (narrow / covered)"""
    share = 1 / covered
    red = _product(weights, narrow[0] * share, planes[0])
    green = _product(weights, narrow[1] * share, planes[1])
    return red, green, _product(weights, narrow[2] * share, planes[2])


@triton.jit
def _reach(centre, start, length, size, RESIZE: tl.constexpr):
    """First and last pixel of the canvas that weigh anything for these centres, and the width of the kernel."""
    scale = tl.maximum(length / size, 1.0) if RESIZE == 0 else 1.0
    first = tl.maximum(tl.floor(tl.min(centre, 0) - 2 * scale), 0.0)
    last = tl.minimum(tl.ceil(tl.max(centre, 0) + 2 * scale), length - 1)
    return (start + first).to(tl.int32), (start + last).to(tl.int32), scale


@triton.jit
def _taps(pixel, centre, scale, length, RESIZE: tl.constexpr):
    """Weights of pixels for outputs with these centres, both counted from the crop; resample.py says which."""
    if RESIZE == 2:
        first = tl.floor(centre) - 1
        weights = pixel * 0.0 + centre * 0.0
        for t in tl.static_range(4):
            x = tl.abs(first + t - centre)
            weight = tl.where(x <= 1, (1.25 * x - 2.25) * x * x + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3)
            weights += tl.where(pixel == tl.minimum(tl.maximum(first + t, 0.0), length - 1), weight, 0.0)
        return weights
    distance = tl.abs(pixel - centre) / scale
    outer, inner = tl.maximum(2 - distance, 0.0), tl.maximum(1 - distance, 0.0)
    weights = 0.5 * outer * outer * (outer - 1) + inner * inner * (1 - 2 * inner)
    return tl.where((pixel >= 0) & (pixel < length), weights, 0.0)


# --- blur ---------------------------------------------------------------------------------------------------------


@triton.jit
def _gauss(source, target, sigma, radius, size, DARK: tl.constexpr):
    """Weights of lines of the view for others; where DARK, what is beside the view weighs too, and is black."""
    offset = source - tl.minimum(target, size - 1)  # what is beyond the view is as its end, lest nothing weigh anything
    counts = tl.abs(offset) <= radius
    if not DARK:
        counts &= (source >= 0) & (source < size)
    offset = offset.to(tl.float32)
    return tl.where(counts, tl.exp(-(offset * offset) / (2 * sigma * sigma)), 0.0)


@triton.jit
def _blur_whole(planes, inside, line, sigma, radius, size, DARK: tl.constexpr):
    """The blur of a view that is one tile; line (T,)."""
    rows = _gauss(line, line[:, None], sigma, radius, size, DARK)
    columns = _gauss(line[:, None], line, sigma, radius, size, DARK)
    covered, total = tl.sum(columns, 0), tl.sum(rows, 1)
    if DARK:  # so does what is beside the tile
        total = line * 0.0 + 2 * tl.sum(_gauss(line, line * 0, sigma, radius, size, DARK)) - 1
        covered = total
    zero = planes[0] * 0.0
    red = _product(tl.where(inside, planes[0], 0.0), columns, zero)
    green = _product(tl.where(inside, planes[1], 0.0), columns, zero)
    blue = _product(tl.where(inside, planes[2], 0.0), columns, zero)
    red, green, blue = _down(rows, (red, green, blue), covered, (zero, zero, zero))
    total = total[:, None]
    return clip(red / total), clip(green / total), clip(blue / total)


@triton.jit
def _end_and_blur(
    begun, means, brush, y, x, radius, size, COLOUR: tl.constexpr, DARK: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """end() of a tile and what the blur reaches around it, and the blur."""
    sigma, line = tl.load(brush.sigma), tl.arange(0, BLOCK)
    planes, total = _zeros(TILE, TILE), tl.zeros((TILE,), tl.float32)
    first_column = tl.min(x, 0) - (radius + 15) // 16 * 16  # so that a thread may read 16 bytes at once
    for first in range(tl.min(y, 0) - radius, tl.max(y, 0) + radius + 1, BLOCK):
        row = first + line
        narrow, covered = _zeros(BLOCK, TILE), tl.zeros((TILE,), tl.float32)
        for start in range(first_column, tl.max(x, 0) + radius + 1, BLOCK):
            column = start + line
            weights = _gauss(column[:, None], x, sigma, radius, size, DARK)  # (K, T)
            covered += tl.sum(weights, 0)
            red, green, blue = end(_read(begun, row, column, size), means, brush, COLOUR)
            inside = ((row >= 0) & (row < size))[:, None] & (column >= 0) & (column < size)
            red = _product(tl.where(inside, red, 0.0), weights, narrow[0])
            green = _product(tl.where(inside, green, 0.0), weights, narrow[1])
            narrow = (red, green, _product(tl.where(inside, blue, 0.0), weights, narrow[2]))
        weights = _gauss(row, y[:, None], sigma, radius, size, DARK)  # (T, K)
        total += tl.sum(weights, 1)
        planes = _down(weights, narrow, covered, planes)
    total = total[:, None]
    return clip(planes[0] / total), clip(planes[1] / total), clip(planes[2] / total)
