"""Views on a CPU, compiled by numba: one image at a time, so that it stays in the cache from the crop to the blur.

Same numbers in, same views out as the plain path of views.py, to 5e-5: the tests hold both to all of it.
numba comes as a wheel and needs no compiler at the user's; the first import on a machine compiles (12 s), later ones
load that from numba's cache. Without numba everything runs by the plain path.

Everything is float32: a Python float would silently widen an expression to float64 and halve its speed.
H, W = canvas, S = side of the view, T = taps: input pixels that one output pixel looks at.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from torch import Tensor

from fewlabels.data import colour, resample
from fewlabels.data.philox import uniforms as uniforms

if TYPE_CHECKING:
    from fewlabels.data.views import Kind, Paint, Placement

F = np.float32
U = np.uint64
ZERO, HALF, ONE, TWO, FOUR, SIX = F(0), F(0.5), F(1), F(2), F(4), F(6)
UNIT = F(1 / 255)
TINY = F(colour.TINY)
LUMA = tuple(F(weight) for weight in colour.LUMA)
PIXELS = 1024  # that colour operations pass over at a time: their channels take 12 KiB of the first-level cache
FAINT = F(1e-6)  # blur weights below this share of the largest are left out: they move no view by more than 1e-5
MARGIN = 4  # a blur takes four pairs of taps at a time, the last of them perhaps of no weight

# While this module compiles: without it LLVM does not use one instruction for three channels
SLP_BEFORE, numba.config.SLP_VECTORIZE = numba.config.SLP_VECTORIZE, 1
fast = numba.njit(nogil=True, cache=True, fastmath=True)
# A function that LLVM does not inline by itself: the process that compiles would call a copy that was optimised alone,
# one that loads numba's cache the copy in _views. They differed in the last bit, and with them two runs of one command
inlined = numba.njit(nogil=True, cache=True, fastmath=True, forceinline=True)


def make(pixels: Tensor, placement: Placement, strokes: Paint | None, *, size: int, kind: Kind, radius: int) -> Tensor:
    """The views of uint8 (B, 3, H, W) by these numbers, float32 (B, 3, size, size) in [0, 1].

    strokes: None for views that are only placed. radius: of the blur, 0 = none.
    """
    host: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are
    made = torch.empty(len(pixels), 3, size, size, **host)
    affine = torch.zeros(len(pixels), 2, 3, **host) if placement.affine is None else placement.affine
    arrays = [part.contiguous().numpy() for part in (pixels, placement.box, placement.flip, affine)]
    no, four = placement.flip.new_zeros(len(pixels)), torch.zeros(len(pixels), 4, **host)
    unpainted = (no, four.long(), four, no, no, four[:, 0])
    arrays += [part.contiguous().numpy() for part in (vars(strokes).values() if strokes else unpainted)]
    settings = (resample.CODES[kind.resize], placement.affine is not None, kind.colour, radius, kind.official)
    threads = min(torch.get_num_threads(), len(pixels))
    edges = [len(pixels) * i // threads for i in range(threads + 1)]

    def work(first: int, last: int) -> None:
        _views(first, last, *arrays, *settings, made.numpy())

    if threads == 1:
        work(0, len(pixels))
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="views") as pool:
            list(pool.map(work, edges[:-1], edges[1:]))
    return made


# --- crop and resize -------------------------------------------------------------------------------------------------


@fast
def _taps(length, flip, size, resize):
    """First input pixel (S,), counted from the crop, and weights (S, T) of every output pixel; see resample.py.

    T is a multiple of 4, because four taps at once need one load and store of the sum; the last ones may weigh nothing.
    """
    step = F(length / F(size))
    scale = max(step, ONE) if resize == 0 else ONE
    narrower = ONE / scale
    count = int(np.ceil(FOUR * scale))
    first, weights = np.empty(size, dtype=np.int64), np.zeros((size, -(-count // 4) * 4), dtype=F)
    for i in range(size):
        index = F(size - 1 - i if flip else i)
        if resize == 2:
            place = index * step
            left = np.floor(place)
            near = np.rint((place - left) * F(1024)) / F(1024)
            first[i] = int(left) - 1
            for t in range(4):
                weights[i, t] = _legacy(abs(F(t - 1) - near))
            continue
        centre = (index + HALF) * step - HALF
        if resize == 1:
            centre = np.rint(centre * F(1024)) / F(1024)
        left = np.floor(centre - TWO * scale) + ONE
        first[i] = int(left)
        total = ZERO
        for t in range(count):
            pixel = left + F(t)
            weight = ZERO
            if ZERO <= pixel < length:
                distance = abs((pixel - centre) * narrower)
                outer, inner = max(TWO - distance, ZERO), max(ONE - distance, ZERO)
                weight = HALF * outer * outer * (outer - ONE) + inner * inner * (ONE - TWO * inner)
            weights[i, t] = weight
            total += weight
        share = ONE / total
        for t in range(count):
            weights[i, t] *= share
    return first, weights


@fast
def _legacy(x):
    """TensorFlow 1's cubic, a = -0.75."""
    a = F(-0.75)
    if x <= ONE:
        return ((a + TWO) * x - (a + F(3))) * x * x + ONE
    return ((a * x - F(5) * a) * x + F(8) * a) * x - FOUR * a


@fast
def _cut(pixels, box, flip, resize, narrow, view):
    """Crop, resize, flip: uint8 (3, H, W) -> view (3, S, S); narrow (H, 3 * S + 1) holds what is done along rows.

    In between, the channels of a pixel lie side by side: one instruction then weighs all three. Measured for a 224 px
    view of a 160 px crop: 57 us along rows instead of 115 channel by channel.
    """
    size = view.shape[-1]
    top, left, tall, wide = int(box[0]), int(box[1]), int(box[2]), int(box[3])
    row, row_weights = _taps(box[2], False, size, resize)
    column, column_weights = _taps(box[3], flip, size, resize)
    margin = 3 * (column_weights.shape[1] + 1)  # the crop's ends repeated: legacy taps look there
    end = margin + 3 * wide
    line = np.empty(end + margin + 1, dtype=F)
    places = np.empty(size, dtype=np.uintp)  # unsigned: not tested for counting from the end
    for x in range(size):
        places[x] = 3 * column[x] + margin
    for y in range(tall):
        red, green, blue = pixels[0, top + y], pixels[1, top + y], pixels[2, top + y]
        for x in range(wide):
            k = margin + 3 * x
            line[k], line[k + 1], line[k + 2] = F(red[left + x]), F(green[left + x]), F(blue[left + x])
        for k in range(margin):
            line[k], line[end + k] = line[margin + k % 3], line[end - 3 + k % 3]
        line[-1] = ZERO
        _along_row(line, places, column_weights, narrow[y])
    mixed = np.empty(3 * size, dtype=F)
    for y in range(size):
        _down_columns(narrow[:tall], row[y], row_weights[y], mixed)
        first, second, third = view[0, y], view[1, y], view[2, y]
        for x in range(size):
            first[x] = UNIT * mixed[3 * x]
            second[x] = UNIT * mixed[3 * x + 1]
            third[x] = UNIT * mixed[3 * x + 2]


@fast
def _along_row(line, places, weights, out):
    """One row of pixels (3 * S + 1,) from a row of the crop; a fourth value is written and then overwritten."""
    if weights.shape[1] == 4:
        for x in range(len(places)):
            a, b, c, d = _four_taps(line[places[x] :], weights[x])
            k = U(3 * x)
            out[k], out[k + U(1)], out[k + U(2)], out[k + U(3)] = a, b, c, d
        return
    for x in range(len(places)):
        a = b = c = d = ZERO
        for t in range(0, weights.shape[1], 4):
            e, f, g, h = _four_taps(line[places[x] + U(3 * t) :], weights[x, t:])
            a, b, c, d = a + e, b + f, c + g, d + h
        k = U(3 * x)
        out[k], out[k + U(1)], out[k + U(2)], out[k + U(3)] = a, b, c, d


@fast
def _four_taps(tap, w):
    a = w[0] * tap[0] + w[1] * tap[3] + w[2] * tap[6] + w[3] * tap[9]
    b = w[0] * tap[1] + w[1] * tap[4] + w[2] * tap[7] + w[3] * tap[10]
    c = w[0] * tap[2] + w[1] * tap[5] + w[2] * tap[8] + w[3] * tap[11]
    d = w[0] * tap[3] + w[1] * tap[6] + w[2] * tap[9] + w[3] * tap[12]
    return a, b, c, d


@fast
def _down_columns(narrow, first, weights, out):
    """One row of the view (3 * S,) from the rows of narrow; beyond the crop count its first and last row."""
    last = len(narrow) - 1
    for t in range(0, len(weights), 4):
        k, start = first + t, t == 0
        a, b = narrow[min(max(k, 0), last)], narrow[min(max(k + 1, 0), last)]
        c, d = narrow[min(max(k + 2, 0), last)], narrow[min(max(k + 3, 0), last)]
        p, q, r, s = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
        for x in range(len(out)):
            out[x] = (ZERO if start else out[x]) + p * a[x] + q * b[x] + r * c[x] + s * d[x]


@inlined
def _warp(image, affine, out):
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
def _colour(planes, jitter, order, factors, operations, gray):
    """Jitter, grayscale and the final clip of one view (3, S * S), in place.

    Contrast needs the mean of what the operations before it made: one pass up to it, one from it on.
    """
    barrier = 0
    while jitter and order[barrier] != 1:
        barrier += 1
    means = np.zeros(3, dtype=F)
    area = planes.shape[1]
    for start in range(0, area if jitter else 0, PIXELS):
        chunk = _chunk(planes, start)
        for step in range(barrier):
            if order[step] < operations:
                _operate(order[step], factors[order[step]], chunk)
        for channel in range(3):
            means[channel] += _sum(chunk[channel]) / F(area)
    for start in range(0, area, PIXELS):
        chunk = _chunk(planes, start)
        if jitter:
            for channel in range(3):
                _contrast(chunk[channel], means[channel], factors[1])
            for step in range(barrier + 1, 4):
                if order[step] < operations:
                    _operate(order[step], factors[order[step]], chunk)
        if gray:
            _grayscale(chunk)
        if gray or not jitter:
            for plane in chunk:
                _brightness(plane, ONE)


@fast
def _chunk(planes, start):
    end = min(start + PIXELS, planes.shape[1])
    return planes[0, start:end], planes[1, start:end], planes[2, start:end]


@fast
def _operate(operation, factor, chunk):
    if operation == 0:
        for plane in chunk:
            _brightness(plane, factor)
    elif operation == 2:
        _saturation(chunk, factor)
    else:
        _hue(chunk, factor)


@fast
def _sum(values):
    total = ZERO
    for i in range(len(values)):
        total += values[i]
    return total


@fast
def _brightness(values, factor):
    for i in range(len(values)):
        values[i] = min(max(values[i] * factor, ZERO), ONE)


@fast
def _contrast(values, mean, factor):
    for i in range(len(values)):
        values[i] = min(max(mean + factor * (values[i] - mean), ZERO), ONE)


@fast
def _grayscale(chunk):
    red, green, blue = chunk
    for i in range(len(red)):
        red[i] = green[i] = blue[i] = LUMA[0] * red[i] + LUMA[1] * green[i] + LUMA[2] * blue[i]


@fast
def _saturation(chunk, factor):
    red, green, blue = chunk
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        top, bottom = max(r, g, b), min(r, g, b)
        scale = min(top / max(top - bottom, TINY), factor)
        red[i] = min(max(top + scale * (r - top), ZERO), ONE)
        green[i] = min(max(top + scale * (g - top), ZERO), ONE)
        blue[i] = min(max(top + scale * (b - top), ZERO), ONE)


@fast
def _hue(chunk, turns):
    red, green, blue = chunk
    shift = SIX * turns
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        top, bottom = max(r, g, b), min(r, g, b)
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
def _ramp(bottom, chroma, share):
    return min(max(bottom + chroma * min(max(share, ZERO), ONE), ZERO), ONE)


# --- blur -------------------------------------------------------------------------------------------------------


@fast
def _blur(view, sigma, radius, dark_border, padded):
    """colour.blur() of one view (3, S, S) in place. padded: (3, (S + 2 * (radius + MARGIN)) * S)."""
    size, edge = view.shape[-1], radius + MARGIN
    kernel, covered, reach = _kernel(sigma, radius, size, dark_border)
    line = np.zeros(size + 2 * edge, dtype=F)
    for channel in range(3):
        rows = padded[channel]
        for y in range(size):
            source, out = view[channel, y], rows[(edge + y) * size : (edge + y + 1) * size]
            for x in range(size):
                line[edge + x] = source[x]
            for k in range(1, reach + 1, 4):
                _four_pairs(line, edge, 1, kernel, k, out)
            for x in range(size):
                out[x] *= covered[x]
        for y in range(size):
            out, scale = view[channel, y], covered[y]
            for k in range(1, reach + 1, 4):
                _four_pairs(rows, (edge + y) * size, size, kernel, k, out)
            for x in range(size):
                out[x] = min(max(scale * out[x], ZERO), ONE)


@fast
def _four_pairs(values, place, step, kernel, k, out):
    """Taps k to k + 3 on both sides of values[place:], step apart, into out (S,); at k = 1 the middle one too.

    One load and store of the sum for all of them. Eight slices instead of eight offsets would take twice as long.
    """
    p, q, r, s = kernel[k], kernel[k + 1], kernel[k + 2], kernel[k + 3]
    o, k, step, first, centre = U(place), U(k), U(step), k == 1, kernel[0]
    a, b, c, d = o - k * step, o - (k + U(1)) * step, o - (k + U(2)) * step, o - (k + U(3)) * step
    e, f, g, h = o + k * step, o + (k + U(1)) * step, o + (k + U(2)) * step, o + (k + U(3)) * step
    if first:
        for i in range(len(out)):
            x = U(i)
            outer = r * (values[c + x] + values[g + x]) + s * (values[d + x] + values[h + x])
            inner = p * (values[a + x] + values[e + x]) + q * (values[b + x] + values[f + x])
            out[x] = centre * values[o + x] + (inner + outer)
    else:
        for i in range(len(out)):
            x = U(i)
            outer = r * (values[c + x] + values[g + x]) + s * (values[d + x] + values[h + x])
            inner = p * (values[a + x] + values[e + x]) + q * (values[b + x] + values[f + x])
            out[x] += inner + outer


@fast
def _kernel(sigma, radius, size, dark_border):
    """Weights by distance (radius + MARGIN,), what to multiply each place with (S,), and how far weights count."""
    kernel, total = np.zeros(radius + MARGIN, dtype=F), -ONE
    for k in range(radius + 1):
        kernel[k] = np.exp(-F(k * k) / (TWO * sigma * sigma))
        total += TWO * kernel[k]
    reach = radius
    while reach > 1 and kernel[reach] < FAINT:
        kernel[reach] = ZERO
        reach -= 1
    for k in range(reach + 1):
        kernel[k] /= total
    covered = np.empty(size, dtype=F)
    for x in range(size):
        inside = ZERO
        for k in range(-reach, reach + 1):
            inside += kernel[abs(k)] if 0 <= x + k < size else ZERO
        covered[x] = ONE if dark_border else ONE / inside
    return kernel, covered, reach


# --- one view ---------------------------------------------------------------------------------------------------


@numba.njit(
    "void(i8, i8, u1[:,:,:,::1], f4[:,::1], b1[::1], f4[:,:,::1], b1[::1], i8[:,::1], f4[:,::1], b1[::1], b1[::1],"
    "f4[::1], i8, b1, b1, i8, b1, f4[:,:,:,::1])",
    nogil=True, cache=True,
)  # fmt: skip
def _views(
    first, last, pixels, boxes, flips, affines, jitters, orders, factors, grays, blurs, sigmas, resize, warp,
    has_colour, radius, official, made,
):  # fmt: skip
    """made[first:last], image by image."""
    size = made.shape[-1]
    area = size * size
    narrow = np.empty((pixels.shape[2], 3 * size + 1), dtype=F)  # between the two halves of a resize
    bare = np.empty((3, size, size), dtype=F)  # before a warp
    # Between the two halves of a blur: three planes with margins above and below that stay zero
    padded = np.zeros((3, (size + 2 * (radius + MARGIN)) * size), dtype=F)
    for i in range(first, last):
        view = made[i]
        _cut(pixels[i], boxes[i], flips[i], resize, narrow, bare if warp else view)
        if warp:
            _warp(bare, affines[i], view)
        planes = view.reshape((3, area))
        _colour(planes, jitters[i], orders[i], factors[i], 4 if has_colour else 2, grays[i] and has_colour)
        if blurs[i] and radius > 0:
            _blur(view, sigmas[i], radius, official, padded)


numba.config.SLP_VECTORIZE = SLP_BEFORE
