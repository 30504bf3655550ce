"""Pillow's bicubic scaling of 8-bit RGB, bit by bit, compiled by numba: 4 times as fast.

Whole numbers all through, so that a picture gets the same pixels on every machine, with or without numba: weights of
22 bits, along rows first, rounded to 8 bits in between (libImaging/Resample.c).

H, W a picture's height and width, h, w what it is scaled to, T = taps: input pixels that one output pixel looks at.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
import numpy.typing as npt

BITS = 22
ROUND, LOWEST, HIGHEST, SHIFT = np.int32(1 << (BITS - 1)), np.int32(0), np.int32(255), np.int32(BITS)
INT, U = np.int32, np.uintp  # unsigned places are not tested for counting from the end

# While this module compiles: without it LLVM does not use one instruction for three channels
SLP_BEFORE, numba.config.SLP_VECTORIZE = numba.config.SLP_VECTORIZE, 1
fast = numba.njit(nogil=True, cache=True)


def shrink(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 -> (height, width, 3), as Image.resize with BICUBIC, along rows first."""
    columns, column_weights = _taps(image.shape[1], width)
    rows, row_weights = _taps(image.shape[0], height)
    lines = np.ascontiguousarray(image).reshape(len(image), -1)
    out = np.empty((height, 3 * width), np.uint8)
    _scale(lines, columns, column_weights, rows, row_weights, out)
    return out.reshape(height, width, 3)


@functools.lru_cache(maxsize=256)
def _taps(length: int, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """First input pixel (S,) and weights (S, T) of every output pixel; T is a multiple of 4, the last may be 0."""
    scale = length / size
    wider = max(scale, 1.0)
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum(centre - 2 * wider + 0.5, 0).astype(np.int64)
    count = np.minimum((centre + 2 * wider + 0.5).astype(np.int64), length) - first
    tap = np.arange(-(-int(count.max()) // 4) * 4)
    x = np.abs((tap + first[:, None] - centre[:, None] + 0.5) * (1.0 / wider))
    inner, outer = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    kernel = np.where(tap < count[:, None], np.where(x < 1, inner, np.where(x < 2, outer, 0.0)), 0.0)
    total = functools.reduce(np.add, kernel.T)  # one after the other, as Pillow adds
    whole = kernel / total[:, None] * (1 << BITS)
    return first, np.trunc(whole + np.copysign(0.5, whole)).astype(np.int32)


@fast
def _four_taps(tap, w):
    """Four channels of a weighed sum, of which the fourth is the next pixel's first: it fills the instruction."""
    a = w[0] * tap[0] + w[1] * tap[3] + w[2] * tap[6] + w[3] * tap[9]
    b = w[0] * tap[1] + w[1] * tap[4] + w[2] * tap[7] + w[3] * tap[10]
    c = w[0] * tap[2] + w[1] * tap[5] + w[2] * tap[8] + w[3] * tap[11]
    d = w[0] * tap[3] + w[1] * tap[6] + w[2] * tap[9] + w[3] * tap[12]
    return a, b, c, d


@fast
def _round(sums, out):
    for i in range(len(out)):
        out[i] = min(max(sums[i] >> SHIFT, LOWEST), HIGHEST)


@numba.njit(
    "void(Array(u1, 2, 'C', readonly=True), i8[::1], i4[:,::1], i8[::1], i4[:,::1], u1[:,::1])", nogil=True, cache=True
)
def _scale(image, columns, column_weights, rows, row_weights, out):
    """image (H, 3 * W) -> out (h, 3 * w)."""
    height, taps, size = image.shape[0], column_weights.shape[1], len(columns)
    line = np.zeros(image.shape[1] + 3 * taps + 1, dtype=INT)
    sums = np.empty(3 * size + 1, dtype=INT)
    narrow = np.empty((height, 3 * size), dtype=np.uint8)
    for y in range(height):
        row = image[y]
        for i in range(len(row)):
            line[i] = row[i]
        for x in range(size):
            a = b = c = d = ROUND
            for t in range(0, taps, 4):
                e, f, g, h = _four_taps(line[U(3 * (columns[x] + t)) :], column_weights[x, t:])
                a, b, c, d = INT(a + e), INT(b + f), INT(c + g), INT(d + h)
            k = U(3 * x)
            sums[k], sums[k + U(1)], sums[k + U(2)], sums[k + U(3)] = a, b, c, d
        _round(sums, narrow[y])
    for y in range(len(rows)):
        for i in range(len(sums)):
            sums[i] = ROUND
        for t in range(row_weights.shape[1]):
            # Beyond the last row weights are 0
            weight, row = row_weights[y, t], narrow[min(rows[y] + t, height - 1)]
            for i in range(len(row)):
                sums[i] += weight * INT(row[i])
        _round(sums, out[y])


numba.config.SLP_VECTORIZE = SLP_BEFORE
