"""Fixtures shared by all tests: where the golden arrays and sample data are, and small synthetic images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of arrays computed by the unmodified reference."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("the golden arrays of the reference are not beside this checkout")
    return SHARED / "golden"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of sample data: CIFAR-10 as JPEG, Imagenette, awful images."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the sample data are not beside this checkout")
    return SHARED / "data"


def shapes_images(count: int, size: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(count, size, size, 3) uint8 images of 4 visible classes (colour and shape), and their labels (count,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    images = rng.integers(0, 60, (count, size, size, 3), dtype=np.uint8)
    rows, columns = np.mgrid[0:size, 0:size]
    for image, label in zip(images, labels, strict=True):
        centre, radius = rng.uniform(0.35, 0.65, 2) * size, rng.uniform(0.2, 0.3) * size
        inside = (
            np.hypot(rows - centre[0], columns - centre[1]) < radius
            if label % 2
            else np.maximum(abs(rows - centre[0]), abs(columns - centre[1])) < radius
        )
        image[inside] = (220, 60, 40) if label < 2 else (40, 90, 230)
    return images, labels


@pytest.fixture
def visible_images() -> tuple[np.ndarray, np.ndarray]:
    """64 images of 16 pixels whose class can be seen."""
    return shapes_images(64)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Launches of Triton's kernels compile them for a Hopper GPU that need not be there, and do no more: those made."""
    triton, compiler = (pytest.importorskip(name) for name in ("triton", "triton.backends.compiler"))
    target = compiler.GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(
        get_current_device=lambda: "none", get_current_stream=lambda device: 0, get_current_target=lambda: target
    )
    made: list[Any] = []
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        made.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    return made


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
