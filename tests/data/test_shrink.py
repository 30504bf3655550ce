"""Scaling compiled by numba against Pillow's, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fewlabels.data import decode

pytest.importorskip("numba")
from fewlabels.data.shrink import shrink


def by_pillow(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Down columns, then along rows: in one call Pillow 13 would choose the order."""
    low = Image.fromarray(image).resize((image.shape[1], height), Image.Resampling.BICUBIC)
    return np.asarray(low.resize((width, height), Image.Resampling.BICUBIC))


def test_every_size_as_pillow() -> None:
    rng = np.random.default_rng(0)
    for number in range(120):
        height, width = rng.integers(1, 300, 2)
        target = np.maximum(1, np.array([height, width]) * rng.uniform(0.15, 1.2, 2)).astype(int).tolist()
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if number % 2:
            image = image // 128 * 255  # black and white overshoot most
        assert np.array_equal(shrink(image, *target), by_pillow(image, *target)), (image.shape, target)


def test_pictures_that_are_not_writable_or_not_contiguous() -> None:
    image = np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    wanted = by_pillow(image, 30, 40)
    image.setflags(write=False)
    assert np.array_equal(shrink(image, 30, 40), wanted)
    assert np.array_equal(shrink(np.asfortranarray(image), 30, 40), wanted)


def test_a_picture_has_the_same_pixels_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    # tall and wide, in one and in two steps; Pillow 13 itself would turn the order for (268, 152)
    for shape in ((268, 152), (500, 375), (90, 400), (40, 900)):
        image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        ours = decode.decode(image, 100)
        with monkeypatch.context() as patch:
            patch.setattr(decode, "_shrink", lambda: None)
            assert np.array_equal(ours, decode.decode(image, 100)), shape
