"""Views on a CPU, compiled by numba: one image at a time, so that it stays in the cache from the crop to the blur.

Same numbers in, same views out as the plain path of views.py to 5e-4 (1e-5 is usual), which its tests hold it to. numba
comes as a wheel and needs no compiler; the first call compiles (about 20 s), later processes load that from
numba's cache. Without numba everything runs by the plain path.

Everything is float32: a Python float would silently widen an expression to float64 and halve its speed.
H, W = canvas, S = side of the view, T = taps: input pixels that one output pixel looks at.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from torch import Tensor

from fewlabels import random
from fewlabels.data import colour

if TYPE_CHECKING:
    from fewlabels.data.views import Kind, Paint, Placement

F = np.float32
U = np.uint64
ZERO, HALF, ONE, TWO, FOUR, SIX = F(0), F(0.5), F(1), F(2), F(4), F(6)
TINY = F(colour.TINY)
LUMA = tuple(F(weight) for weight in colour.LUMA)
RESIZE = {"antialias": 0, "tf2": 1, "tf1": 2}
PIXELS = 1024  # colour operations pass over so many at a time: three channels of them are 12 KiB of the first-level cache
FAINT = 1e-7  # blur weights below this share of the largest are left out: they move no view by more than 2e-6

exact = numba.njit(nogil=True, cache=True)
fast = numba.njit(nogil=True, cache=True, fastmath=True)


def uniforms(seed: int, epoch: int, ids: Tensor, stream: int, count: int) -> Tensor:
    """random.uniforms() of int64 ids on the CPU: the same numbers."""
    random.check_key(seed, epoch, stream, -(-count // 4))
    found = np.empty((len(ids), count), dtype=F)
    numbers = U(seed & random.MASK), U(seed >> 32), U(epoch), U(stream * 65536)
    _uniforms(ids.contiguous().numpy().view(U), *numbers, found)
    return torch.from_numpy(found)


def make(
    pixels: Tensor, placement: Placement, strokes: Paint | None, *, size: int, kind: Kind, warp: bool, radius: int
) -> Tensor:
    """The views of uint8 (B, 3, H, W) by these numbers, float32 (B, 3, size, size) in [0, 1].

    strokes: None for views that are only placed. radius: of the blur, 0 = none.
    """
    made = torch.empty(len(pixels), 3, size, size)
    arrays = [
        part.contiguous().numpy() for part in (pixels, placement.box, placement.flip, placement.affine)
    ]  # fmt: skip
    if strokes is None:
        nothing = np.zeros(len(pixels), dtype=bool)
        brush = [nothing, np.zeros((len(pixels), 4), dtype=np.int64), np.zeros((len(pixels), 4), dtype=F), nothing]
        brush += [nothing, np.ones(len(pixels), dtype=F)]
    else:
        fields = (strokes.jitter, strokes.order, strokes.factors, strokes.gray, strokes.blur, strokes.sigma)
        brush = [part.contiguous().numpy() for part in fields]
    settings = (RESIZE[kind.resize], warp, kind.colour, radius, kind.official)
    threads = min(torch.get_num_threads(), len(pixels))
    edges = [len(pixels) * i // threads for i in range(threads + 1)]

    def work(first: int, last: int) -> None:
        _views(first, last, *arrays, *brush, *settings, made.numpy())

    if threads == 1:
        work(0, len(pixels))
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="views") as pool:
            list(pool.map(work, edges[:-1], edges[1:]))
    return made


# --- random numbers ---------------------------------------------------------------------------------------------

MULTIPLIERS, KEY_STEPS = tuple(map(U, random.MULTIPLIERS)), tuple(map(U, random.KEY_STEPS))
ROUNDS, MASK, WORD, BYTE = random.ROUNDS, U(random.MASK), U(32), U(8)


@exact
def _uniforms(ids, key_low, key_high, epoch, block, found):  # type: ignore[no-untyped-def]
    """Philox4x32-10 as random.philox(); found: (B, count)."""
    for i in range(found.shape[0]):
        for k in range(0, found.shape[1], 4):
            a, b, c, d = ids[i] & MASK, ids[i] >> WORD, epoch, block + U(k // 4)
            low, high = key_low, key_high
            for _ in range(ROUNDS):
                one, two = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
                a, b, c, d = (two >> WORD) ^ b ^ low, two & MASK, (one >> WORD) ^ d ^ high, one & MASK
                low, high = (low + KEY_STEPS[0]) & MASK, (high + KEY_STEPS[1]) & MASK
            for t, word in enumerate((a, b, c, d)):
                if k + t < found.shape[1]:
                    found[i, k + t] = F(word >> BYTE) * F(2.0**-24)


# --- one view ---------------------------------------------------------------------------------------------------


@exact
def _views(  # type: ignore[no-untyped-def]  # noqa: PLR0913
    first, last, pixels, boxes, flips, affines, jitters, orders, factors, grays, blurs, sigmas, resize, warp,
    has_colour, radius, official, made,
):  # fmt: skip
    """made[first:last], image by image."""
    size = made.shape[-1]
    area = size * size
    bare = np.empty((3, size, size), dtype=F)  # before a warp
    padded = np.zeros((3, size + 2 * radius, size), dtype=F)  # between the two halves of a blur; its margins stay zero
    for i in range(first, last):
        view = made[i]
        _cut(pixels[i], boxes[i], flips[i], resize, bare if warp else view)
        if warp:
            _warp(bare, affines[i], view)
        planes = view.reshape(3, area)
        _colour(planes, jitters[i], orders[i], factors[i], 4 if has_colour else 2, grays[i] and has_colour)
        if blurs[i] and radius > 0:
            _blur(view, sigmas[i], radius, official, padded)


@exact
def _taps(start, length, flip, size, resize):  # type: ignore[no-untyped-def]
    """First input pixel (S,), counted from the canvas, and weights (T, S) of every output pixel; see resample.py."""
    step = F(length / F(size))
    scale = max(step, ONE) if resize == 0 else ONE
    count = int(np.ceil(FOUR * scale))
    first, weights = np.empty(size, dtype=np.int64), np.empty((count, size), dtype=F)
    for i in range(size):
        index = F(size - 1 - i if flip else i)
        if resize == 2:
            place = index * step
            left = np.floor(place)
            near = np.rint((place - left) * F(1024)) / F(1024)
            first[i] = int(start) + int(left) - 1
            for t in range(4):
                weights[t, i] = _legacy(abs(F(t - 1) - near))
            continue
        centre = (index + HALF) * step - HALF
        if resize == 1:
            centre = np.rint(centre * F(1024)) / F(1024)
        left = np.floor(centre - TWO * scale) + ONE
        first[i] = int(start) + int(left)
        total = ZERO
        for t in range(count):
            pixel = left + F(t)
            weight = ZERO
            if ZERO <= pixel < length:
                distance = abs((pixel - centre) / scale)
                outer, inner = max(TWO - distance, ZERO), max(ONE - distance, ZERO)
                weight = HALF * outer * outer * (outer - ONE) + inner * inner * (ONE - TWO * inner)
            weights[t, i] = weight
            total += weight
        for t in range(count):
            weights[t, i] /= total
    return first, weights


@exact
def _legacy(x):  # type: ignore[no-untyped-def]
    """TensorFlow 1's cubic, a = -0.75."""
    a = F(-0.75)
    if x <= ONE:
        return ((a + TWO) * x - (a + F(3))) * x * x + ONE
    return ((a * x - F(5) * a) * x + F(8) * a) * x - FOUR * a


@fast
def _cut(pixels, box, flip, resize, view):  # type: ignore[no-untyped-def]
    """Crop, resize, flip: uint8 (3, H, W) -> view (3, S, S). Along rows first, then along columns."""
    size = view.shape[-1]
    top, left, tall, wide = int(box[0]), int(box[1]), int(box[2]), int(box[3])
    row, row_weights = _taps(box[0], box[2], False, size, resize)
    column, column_weights = _taps(box[1], box[3], flip, size, resize)
    column_weights /= F(255)
    count, margin = len(column_weights), len(column_weights) + 1
    line = np.empty(wide + 2 * margin, dtype=F)  # a row of the crop, its ends repeated: legacy taps look there
    column += margin - left
    narrow = np.empty((tall, size), dtype=F)
    for channel in range(3):
        for y in range(tall):
            source = pixels[channel, top + y, left : left + wide]
            for x in range(wide):
                line[margin + x] = F(source[x])
            line[:margin], line[margin + wide :] = line[margin], line[margin + wide - 1]
            _along_row(line, column, column_weights, count, narrow[y])
        for y in range(size):
            _down_columns(narrow, row[y] - top, row_weights, y, view[channel, y])


@fast
def _along_row(line, column, weights, count, out):  # type: ignore[no-untyped-def]
    if count == 4:
        for x in range(len(out)):
            k = column[x]
            out[x] = (
                weights[0, x] * line[k] + weights[1, x] * line[k + 1]
                + weights[2, x] * line[k + 2] + weights[3, x] * line[k + 3]
            )  # fmt: skip
        return
    for x in range(len(out)):
        k, total = column[x], ZERO
        for t in range(count):
            total += weights[t, x] * line[k + t]
        out[x] = total


@fast
def _down_columns(narrow, first, weights, y, out):  # type: ignore[no-untyped-def]
    last = len(narrow) - 1
    for t in range(0, len(weights), 4):
        left = min(4, len(weights) - t)
        # A fifth to seventh tap that is not there: any row, weight zero
        a = narrow[min(max(first + t, 0), last)]
        b = narrow[min(max(first + t + 1, 0), last)]
        c = narrow[min(max(first + t + 2, 0), last)]
        d = narrow[min(max(first + t + 3, 0), last)]
        p = weights[t, y]
        q = weights[t + 1, y] if left > 1 else ZERO
        r = weights[t + 2, y] if left > 2 else ZERO
        s = weights[t + 3, y] if left > 3 else ZERO
        if t == 0:
            for x in range(len(out)):
                out[x] = p * a[x] + q * b[x] + r * c[x] + s * d[x]
        else:
            for x in range(len(out)):
                out[x] += p * a[x] + q * b[x] + r * c[x] + s * d[x]


@fast
def _warp(image, affine, out):  # type: ignore[no-untyped-def]
    """resample.warp() of one image (3, S, S)."""
    size = image.shape[-1]
    end, half = F(size - 1), HALF * F(size)
    for y in range(size):
        for x in range(size):
            u, v = (F(x) + HALF) / half - ONE, (F(y) + HALF) / half - ONE
            across = (affine[0, 0] * u + affine[0, 1] * v + affine[0, 2] + ONE) * half - HALF
            down = (affine[1, 0] * u + affine[1, 1] * v + affine[1, 2] + ONE) * half - HALF
            across, down = min(max(across, ZERO), end), min(max(down, ZERO), end)
            j, i = min(int(across), max(size - 2, 0)), min(int(down), max(size - 2, 0))
            right, below = min(j + 1, size - 1), min(i + 1, size - 1)
            s, t = across - F(j), down - F(i)
            for channel in range(3):
                plane = image[channel]
                upper = plane[i, j] + s * (plane[i, right] - plane[i, j])
                lower = plane[below, j] + s * (plane[below, right] - plane[below, j])
                out[channel, y, x] = upper + t * (lower - upper)


# --- colour -----------------------------------------------------------------------------------------------------


@fast
def _colour(planes, jitter, order, factors, operations, gray):  # type: ignore[no-untyped-def]
    """Jitter, grayscale and the final clip of one view (3, S * S), in place.

    Contrast needs the mean of what the operations before it made: one pass up to it, one from it on.
    """
    steps = 4 if jitter else 0
    barrier = 0
    while barrier < steps and order[barrier] != 1:
        barrier += 1
    means = np.zeros(3, dtype=F)
    area = planes.shape[1]
    if jitter:
        for start in range(0, area, PIXELS):
            red, green, blue = _chunk(planes, start)
            for step in range(barrier):
                if order[step] < operations:
                    _operate(order[step], factors[order[step]], red, green, blue)
            means[0] += _sum(red)
            means[1] += _sum(green)
            means[2] += _sum(blue)
        means /= F(area)
    for start in range(0, area, PIXELS):
        red, green, blue = _chunk(planes, start)
        if jitter:
            _contrast(red, means[0], factors[1])
            _contrast(green, means[1], factors[1])
            _contrast(blue, means[2], factors[1])
            for step in range(barrier + 1, steps):
                if order[step] < operations:
                    _operate(order[step], factors[order[step]], red, green, blue)
        if gray:
            _grayscale(red, green, blue)
        if gray or not jitter:
            _clip(red)
            _clip(green)
            _clip(blue)


@fast
def _chunk(planes, start):  # type: ignore[no-untyped-def]
    end = min(start + PIXELS, planes.shape[1])
    return planes[0, start:end], planes[1, start:end], planes[2, start:end]


@fast
def _operate(operation, factor, red, green, blue):  # type: ignore[no-untyped-def]
    if operation == 0:
        _brightness(red, factor)
        _brightness(green, factor)
        _brightness(blue, factor)
    elif operation == 2:
        _saturation(red, green, blue, factor)
    else:
        _hue(red, green, blue, factor)


@fast
def _sum(values):  # type: ignore[no-untyped-def]
    total = ZERO
    for i in range(len(values)):
        total += values[i]
    return total


@fast
def _clip(values):  # type: ignore[no-untyped-def]
    for i in range(len(values)):
        values[i] = min(max(values[i], ZERO), ONE)


@fast
def _brightness(values, factor):  # type: ignore[no-untyped-def]
    for i in range(len(values)):
        values[i] = min(max(values[i] * factor, ZERO), ONE)


@fast
def _contrast(values, mean, factor):  # type: ignore[no-untyped-def]
    for i in range(len(values)):
        values[i] = min(max(mean + factor * (values[i] - mean), ZERO), ONE)


@fast
def _grayscale(red, green, blue):  # type: ignore[no-untyped-def]
    for i in range(len(red)):
        gray = LUMA[0] * red[i] + LUMA[1] * green[i] + LUMA[2] * blue[i]
        red[i] = gray
        green[i] = gray
        blue[i] = gray


@fast
def _saturation(red, green, blue, factor):  # type: ignore[no-untyped-def]
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        top, bottom = max(max(r, g), b), min(min(r, g), b)
        scale = min(top / max(top - bottom, TINY), factor)
        red[i] = min(max(top + scale * (r - top), ZERO), ONE)
        green[i] = min(max(top + scale * (g - top), ZERO), ONE)
        blue[i] = min(max(top + scale * (b - top), ZERO), ONE)


@fast
def _hue(red, green, blue, turns):  # type: ignore[no-untyped-def]
    shift = SIX * turns
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        top, bottom = max(max(r, g), b), min(min(r, g), b)
        chroma = top - bottom
        inverse = ONE / max(chroma, TINY)
        sixth = (r - g) * inverse + FOUR
        sixth = (b - r) * inverse + TWO if top == g else sixth
        sixth = (g - b) * inverse if top == r else sixth
        sixth += shift
        sixth = sixth + SIX if sixth < ZERO else sixth
        sixth = sixth - SIX if sixth >= SIX else sixth
        red[i] = _ramp(bottom, chroma, abs(sixth - F(3)) - ONE)
        green[i] = _ramp(bottom, chroma, TWO - abs(sixth - TWO))
        blue[i] = _ramp(bottom, chroma, TWO - abs(sixth - FOUR))


@fast
def _ramp(bottom, chroma, share):  # type: ignore[no-untyped-def]
    return min(max(bottom + chroma * min(max(share, ZERO), ONE), ZERO), ONE)


# --- blur -------------------------------------------------------------------------------------------------------


@fast
def _blur(view, sigma, radius, dark_border, padded):  # type: ignore[no-untyped-def]
    """colour.blur() of one view (3, S, S) in place. padded: (3, S + 2 * radius, S), zero above and below."""
    size = view.shape[-1]
    kernel, covered, reach = _kernel(sigma, radius, size, dark_border)
    line = np.zeros(size + 2 * radius + 2, dtype=F)
    for channel in range(3):
        for y in range(size):
            line[radius : radius + size] = view[channel, y]
            out = padded[channel, radius + y]
            for x in range(size):
                out[x] = kernel[0] * line[radius + x]
            for k in range(1, reach + 1, 2):  # two pairs of taps a pass: fewer loads and stores of the sum
                lower, upper = line[radius - k :], line[radius + k :]
                lower_next, upper_next = line[max(radius - k - 1, 0) :], line[radius + k + 1 :]
                for x in range(size):
                    out[x] += kernel[k] * (lower[x] + upper[x]) + kernel[k + 1] * (lower_next[x] + upper_next[x])
            for x in range(size):
                out[x] *= covered[x]
        for y in range(size):
            out = view[channel, y]
            middle, scale = padded[channel, radius + y], covered[y]
            for x in range(size):
                out[x] = kernel[0] * middle[x]
            for k in range(1, reach + 1, 2):
                lower, upper = padded[channel, radius + y - k], padded[channel, radius + y + k]
                lower_next = padded[channel, max(radius + y - k - 1, 0)]
                upper_next = padded[channel, min(radius + y + k + 1, size + 2 * radius - 1)]
                for x in range(size):
                    out[x] += kernel[k] * (lower[x] + upper[x]) + kernel[k + 1] * (lower_next[x] + upper_next[x])
            for x in range(size):
                out[x] = min(max(scale * out[x], ZERO), ONE)


@exact
def _kernel(sigma, radius, size, dark_border):  # type: ignore[no-untyped-def]
    """Weights by distance (radius + 2,), what to multiply each place with (S,), and how far weights count."""
    kernel = np.zeros(radius + 2, dtype=F)
    for k in range(radius + 1):
        kernel[k] = np.exp(-F(k * k) / (TWO * sigma * sigma))
    kernel /= kernel[0] + TWO * kernel[1:].sum()
    reach = radius
    while reach > 1 and kernel[reach] < FAINT * kernel[0]:
        reach -= 1
    kernel[reach + 1 :] = ZERO
    covered = np.ones(size, dtype=F)
    if not dark_border:
        for x in range(size):
            inside = ZERO
            for k in range(-radius, radius + 1):
                inside += kernel[abs(k)] if 0 <= x + k < size else ZERO
            covered[x] = ONE / inside
    return kernel, covered, reach
