"""Colour and blur against the reference's arrays, colorsys and plain loops."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import pytest
import torch

from fewlabels.data import colour

NAMES = {
    "brightness_v2_mul": colour.brightness,
    "contrast": colour.contrast,
    "saturation": colour.saturation,
    "hue": colour.hue,
}


def batch(array: np.ndarray) -> torch.Tensor:
    """(H, W, 3) -> (1, 3, H, W)."""
    return torch.from_numpy(array).permute(2, 0, 1)[None]


@pytest.fixture(scope="module")
def arrays(golden: Path) -> dict[str, np.ndarray]:
    return dict(np.load(golden / "augment_tf2.npz"))


def close(made: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(made[0].permute(1, 2, 0).numpy(), expected, atol=tolerance)


@pytest.mark.parametrize("operation", NAMES)
def test_single_operations_equal_the_reference(arrays: dict[str, np.ndarray], operation: str) -> None:
    cases = [key.split("/") for key in arrays if f"/{operation}/" in key]
    assert len(cases) >= 15
    for image, _, number in cases:
        made = NAMES[operation](batch(arrays[f"img/{image}"]), torch.tensor([float(number)]))
        close(made, arrays[f"{image}/{operation}/{number}"], 3e-6)


@pytest.mark.parametrize("image", ["a", "b", "extreme"])
def test_grayscale_jitter_and_blur_equal_the_reference(arrays: dict[str, np.ndarray], image: str) -> None:
    pixels = batch(arrays[f"img/{image}"])
    close(colour.grayscale(pixels), arrays[f"{image}/grayscale"])
    factors, chosen = torch.tensor([[1.4, 0.5, 1.6, -0.12]]), torch.tensor([True])
    jitters = [key for key in arrays if key.startswith(f"{image}/jitter")]
    assert len(jitters) == 4
    for key in jitters:
        order = torch.tensor([[int(digit) for digit in key.split("/")[-1]]])
        close(colour.jitter(pixels, factors, order, chosen), arrays[key], 3e-6)
    blurs = [key for key in arrays if key.startswith(f"{image}/blur")]
    assert len(blurs) == 20
    for key in blurs:
        _, kernel, sigma = key.split("_")
        radius = int(kernel[1:]) // 2
        made = colour.blur(pixels, torch.tensor([float(sigma[1:])]), radius=radius, dark_border=True)
        close(made, arrays[key])


def corner_colours() -> torch.Tensor:
    """(1, 3, 9, 81): every mixture of nine levels a channel, so equal channels, black, white and pure colours too."""
    levels = torch.linspace(0, 1, 9)
    return torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 9, 81)


@pytest.mark.parametrize("factor", [0.0, 0.2, 1.0, 1.8])
def test_saturation_equals_colorsys(factor: float) -> None:
    pixels = corner_colours()
    made = colour.saturation(pixels, torch.tensor([factor])).flatten(2)[0].T
    for (r, g, b), got in zip(pixels.flatten(2)[0].T.tolist(), made.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        assert got == pytest.approx(colorsys.hsv_to_rgb(h, min(s * factor, 1), v), abs=1e-6)


@pytest.mark.parametrize("turns", [-0.5, -0.2, -0.01, 0.0, 0.13, 0.25, 0.5])
def test_hue_equals_colorsys(turns: float) -> None:
    pixels = corner_colours()
    made = colour.hue(pixels, torch.tensor([turns])).flatten(2)[0].T
    for (r, g, b), got in zip(pixels.flatten(2)[0].T.tolist(), made.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        assert got == pytest.approx(colorsys.hsv_to_rgb((h + turns) % 1, s, v), abs=3e-6)


def test_contrast_keeps_the_mean_of_each_channel() -> None:
    pixels = torch.rand(4, 3, 7, 5)
    made = colour.contrast(pixels, torch.tensor([0.0, 0.5, 1.0, 1.8]))
    torch.testing.assert_close(made.mean((2, 3)), pixels.mean((2, 3)))
    torch.testing.assert_close(made.std((2, 3))[3], 1.8 * pixels.std((2, 3))[3])
    assert made[0].std((1, 2)).max() < 1e-6


def draw_jitter(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    factors = torch.cat([0.2 + 1.6 * torch.rand(count, 3), 0.4 * torch.rand(count, 1) - 0.2], dim=1)
    return factors, torch.rand(count, 4).argsort(1), torch.rand(count) < 0.7


@pytest.mark.parametrize("operations", [2, 4])
def test_jitter_goes_through_each_images_own_order(operations: int) -> None:
    images = 1.2 * torch.rand(40, 3, 5, 6) - 0.1
    before = images.clone()
    factors, order, chosen = draw_jitter(40)
    made = colour.jitter(images, factors, order, chosen, operations=operations)
    assert torch.equal(images, before)
    for i in range(40):
        expected = images[i : i + 1]
        for number in order[i].tolist():
            if chosen[i] and number < operations:
                operation = [colour.brightness, colour.contrast, colour.saturation, colour.hue][number]
                expected = operation(expected, factors[i : i + 1, number]).clamp(0, 1)
        torch.testing.assert_close(made[i : i + 1], expected, atol=1e-6, rtol=0)


def test_all_rows_at_once_equal_the_chosen_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's form of the work (fixed shapes) on the CPU."""
    images, (factors, order, chosen) = torch.rand(30, 3, 6, 6), draw_jitter(30)
    by_rows = colour.jitter(images, factors, order, chosen)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    torch.testing.assert_close(colour.jitter(images, factors, order, chosen), by_rows, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dark_border", [True, False])
@pytest.mark.parametrize("radius", [1, 3, 11])
def test_blur_equals_a_loop(radius: int, dark_border: bool) -> None:
    images, sigmas = torch.rand(3, 3, 8, 9), [0.1, 0.7, 2.0]
    made = colour.blur(images, torch.tensor(sigmas), radius=radius, dark_border=dark_border).numpy()
    for image, sigma, got in zip(images.numpy(), sigmas, made, strict=True):
        taps = [np.exp(-(i**2) / (2 * sigma**2)) for i in range(-radius, radius + 1)]
        taps = np.array(taps) / np.sum(taps)
        for y in range(8):
            for x in range(9):
                total, mass = np.zeros(3), 0.0
                for i, down in enumerate(taps):
                    for j, across in enumerate(taps):
                        row, column = y + i - radius, x + j - radius
                        if 0 <= row < 8 and 0 <= column < 9:
                            total += down * across * image[:, row, column]
                            mass += down * across
                np.testing.assert_allclose(got[:, y, x], total if dark_border else total / mass, atol=1e-5)


def test_blur_without_dark_border_keeps_a_flat_image() -> None:
    flat, sigma = torch.full((2, 3, 20, 20), 0.7), torch.tensor([0.1, 2.0])
    torch.testing.assert_close(colour.blur(flat, sigma, radius=4, dark_border=False), flat)
    assert colour.blur(flat, sigma, radius=4, dark_border=True)[1, 0, 0, 0] < 0.4
