"""colour.py for Triton: jitter and grayscale of a tile, clipped to [0, 1] after each operation.

Planes are red, green and blue, each (T, T) float32. A brush points at the numbers of one image. Contrast needs the mean
of a whole view: begin() is what comes before it, end() the rest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fewlabels.data import colour

TINY = tl.constexpr(colour.TINY)
RED, GREEN, BLUE = (tl.constexpr(weight) for weight in colour.LUMA)


class Brush(NamedTuple):
    """views.Paint as a kernel takes it."""

    jitter: Any
    order: Any
    factors: Any
    gray: Any
    blur: Any
    sigma: Any


@triton.jit
def of_image(brush, image):
    """The pointers of a brush at one image."""
    return Brush(
        brush.jitter + image, brush.order + 4 * image, brush.factors + 4 * image, brush.gray + image,
        brush.blur + image, brush.sigma + image,
    )  # fmt: skip


@triton.jit
def begin(planes, brush, COLOUR: tl.constexpr):
    """The operations before contrast."""
    if tl.load(brush.jitter):
        for step in range(_turn_of_contrast(brush)):
            planes = _operate(planes, tl.load(brush.order + step), brush, COLOUR)
    return planes


@triton.jit
def end(planes, means, brush, COLOUR: tl.constexpr):
    """Contrast about these means, the operations after it, and grayscale."""
    red, green, blue = planes
    if tl.load(brush.jitter):
        factor = tl.load(brush.factors + 1)
        red = clip(means[0] + factor * (red - means[0]))
        green = clip(means[1] + factor * (green - means[1]))
        blue = clip(means[2] + factor * (blue - means[2]))
        for step in range(_turn_of_contrast(brush) + 1, 4):
            red, green, blue = _operate((red, green, blue), tl.load(brush.order + step), brush, COLOUR)
    if tl.load(brush.gray) & COLOUR:
        red = RED * red + GREEN * green + BLUE * blue
        green = red
        blue = red
    return clip(red), clip(green), clip(blue)


@triton.jit
def _turn_of_contrast(brush):
    step = tl.arange(0, 4)
    return tl.sum(tl.where(tl.load(brush.order + step) == 1, step, 0))


@triton.jit
def _operate(planes, operation, brush, COLOUR: tl.constexpr):
    """Brightness, saturation or hue; gray images know the first alone."""
    factor = tl.load(brush.factors + operation)
    red, green, blue = planes
    if operation == 0:
        red, green, blue = clip(factor * red), clip(factor * green), clip(factor * blue)
    if COLOUR:
        if operation == 2:
            red, green, blue = _saturation(red, green, blue, factor)
        if operation == 3:
            red, green, blue = _hue(red, green, blue, factor)
    return red, green, blue


@triton.jit
def clip(plane):
    return tl.minimum(tl.maximum(plane, 0.0), 1.0)


@triton.jit
def _saturation(red, green, blue, factor):
    top, bottom = tl.maximum(tl.maximum(red, green), blue), tl.minimum(tl.minimum(red, green), blue)
    scale = tl.minimum(top / tl.maximum(top - bottom, TINY), factor)
    return clip(top + scale * (red - top)), clip(top + scale * (green - top)), clip(top + scale * (blue - top))


@triton.jit
def _hue(red, green, blue, turns):
    top, bottom = tl.maximum(tl.maximum(red, green), blue), tl.minimum(tl.minimum(red, green), blue)
    chroma = top - bottom
    inverse = 1 / tl.maximum(chroma, TINY)
    sixth = tl.where(top == green, 2 + (blue - red) * inverse, 4 + (red - green) * inverse)
    sixth = tl.where(top == red, (green - blue) * inverse, sixth) + 6 * turns
    sixth = tl.where(sixth < 0, sixth + 6, sixth)
    sixth = tl.where(sixth >= 6, sixth - 6, sixth)
    red, green = _ramp(bottom, chroma, tl.abs(sixth - 3) - 1), _ramp(bottom, chroma, 2 - tl.abs(sixth - 2))
    return red, green, _ramp(bottom, chroma, 2 - tl.abs(sixth - 4))


@triton.jit
def _ramp(bottom, chroma, share):
    return clip(bottom + chroma * clip(share))
