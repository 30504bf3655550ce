"""Interpolation matrices against Pillow and TensorFlow, the warp against a loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewlabels.data.resample import matrices, resample, warp

BOXES = [(0, 0, 40, 50), (3, 7, 20, 11), (39, 49, 1, 1), (10, 0, 30, 50), (0, 45, 2, 5), (5, 5, 13, 17)]  # y x h w


def cut(images: torch.Tensor, boxes: list, size: int, resize: str, flip: torch.Tensor | None = None) -> torch.Tensor:
    top, left, tall, wide = torch.tensor(boxes, dtype=torch.float32).unbind(1)
    rows = matrices(top, tall, in_size=images.shape[2], out_size=size, resize=resize)
    columns = matrices(left, wide, flip, in_size=images.shape[3], out_size=size, resize=resize)
    return resample(images, rows, columns)


@pytest.mark.parametrize("size", [1, 9, 16, 45, 64])
def test_crop_and_resize_equal_pillow(size: int) -> None:
    images = torch.rand(len(BOXES), 3, 40, 50)
    made = cut(images, BOXES, size, "antialias")
    for image, (y, x, h, w), got in zip(images, BOXES, made, strict=True):
        for channel in range(3):
            picture = Image.fromarray(image[channel].numpy()).crop((x, y, x + w, y + h))
            expected = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
            np.testing.assert_allclose(got[channel].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("version", ["tf1", "tf2"])
def test_crop_and_resize_equal_tensorflow(golden: Path, version: str) -> None:
    arrays = dict(np.load(golden / "augment_tf2.npz")) | dict(np.load(golden / "augment_tf1.npz"))
    for i in range(7):
        image = torch.from_numpy(arrays[f"crop_u8/{i}"]).permute(2, 0, 1)[None].float() / 255
        made = cut(image, [arrays[f"crop_box_yxhw/{i}"].tolist()], int(arrays[f"crop_size/{i}"]), version)
        expected = arrays[f"{version}_crop_resize_bicubic/{i}"]
        np.testing.assert_allclose(made[0].permute(1, 2, 0).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize(("in_size", "out_size"), [(9, 4), (4, 9), (13, 13), (1, 3), (50, 7)])
def test_legacy_resize_equals_a_loop(in_size: int, out_size: int) -> None:
    """TensorFlow 1 in plain numbers: pixel i looks at i * in / out, four taps, the border repeated."""
    line = torch.rand(in_size)
    expected = []
    for i in range(out_size):
        place = i * in_size / out_size
        first = int(place)
        near = round((place - first) * 1024) / 1024
        value = 0.0
        for k in range(-1, 3):
            x = abs(k - near)
            weight = 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3
            value += weight * float(line[min(max(first + k, 0), in_size - 1)])
        expected.append(value)
    box = torch.zeros(1), torch.full((1,), float(in_size))
    (weights,) = matrices(*box, in_size=in_size, out_size=out_size, resize="tf1")
    np.testing.assert_allclose((weights @ line).numpy(), expected, atol=1e-5)


def test_flip_mirrors_the_chosen_images() -> None:
    images, flip = torch.rand(6, 3, 40, 50), torch.tensor([True, False, True, True, False, True])
    plain, mirrored = cut(images, BOXES, 16, "antialias"), cut(images, BOXES, 16, "antialias", flip)
    assert torch.equal(mirrored, torch.where(flip[:, None, None, None], plain.flip(3), plain))


@pytest.mark.parametrize("resize", ["antialias", "tf2", "tf1"])
@pytest.mark.parametrize(("in_size", "out_size"), [(160, 128), (160, 33), (7, 32), (32, 32), (2, 1), (1, 5)])
def test_rows_sum_to_one_and_nothing_beside_the_crop_counts(in_size: int, out_size: int, resize: str) -> None:
    length = torch.randint(1, in_size + 1, (50,)).float()
    start = ((in_size - length + 1) * torch.rand(50)).floor().clamp(max=in_size - 1)
    flip = torch.rand(50) < 0.5
    sizes = {"in_size": in_size, "out_size": out_size, "resize": resize}
    dense = matrices(start, length, flip, **sizes)
    pixel = torch.arange(in_size)
    outside = (pixel < start[:, None]) | (pixel >= (start + length)[:, None])
    assert (dense * outside[:, None]).abs().max() == 0
    torch.testing.assert_close(dense.sum(2), torch.ones(50, out_size))


def test_the_whole_image_at_its_own_size_stays_as_it_is() -> None:
    images = torch.rand(2, 3, 32, 32)
    for resize in ("antialias", "tf2", "tf1"):
        torch.testing.assert_close(cut(images, [(0, 0, 32, 32)] * 2, 32, resize), images, atol=1e-6, rtol=0)


def test_warp_equals_a_loop() -> None:
    images, size = torch.rand(3, 3, 6, 6), 6
    affine = torch.tensor([[1.0, 0, 0], [0, 1, 0]]) + 0.3 * torch.randn(3, 2, 3)
    made = warp(images, affine).numpy()
    for b in range(3):
        picture = images[b].numpy()
        for row in range(size):
            for column in range(size):
                out = np.array([(2 * column + 1) / size - 1, (2 * row + 1) / size - 1, 1.0])
                x, y = ((affine[b].numpy() @ out + 1) * size - 1) / 2
                x, y = min(max(x, 0), size - 1), min(max(y, 0), size - 1)
                x0, y0 = int(x), int(y)
                x1, y1 = min(x0 + 1, size - 1), min(y0 + 1, size - 1)
                upper = picture[:, y0, x0] * (x0 + 1 - x) + picture[:, y0, x1] * (x - x0)
                lower = picture[:, y1, x0] * (x0 + 1 - x) + picture[:, y1, x1] * (x - x0)
                expected = upper * (y0 + 1 - y) + lower * (y - y0)
                np.testing.assert_allclose(made[b, :, row, column], expected, atol=1e-5)


def test_a_quarter_turn_is_exact() -> None:
    images = torch.rand(2, 3, 8, 8)
    quarter = torch.tensor([[0.0, -1, 0], [1, 0, 0]]).expand(2, 2, 3)
    torch.testing.assert_close(warp(images, quarter), images.rot90(1, (2, 3)), atol=1e-5, rtol=0)
