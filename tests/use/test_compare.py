"""The map of features where there is nothing to draw."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fewlabels.use import compare


@pytest.mark.parametrize(("spread", "points"), [(0.0, 0), (1e-9, 0), (1.0, 12)])
def test_features_that_are_all_alike_have_no_map(spread: float, points: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collapsed pretraining gives such, and t-SNE of them ended the process before its results were saved."""
    features = (1 + spread * np.random.default_rng(0).normal(size=(12, 8))).astype(np.float32)
    monkeypatch.setattr(compare, "outputs", lambda *_: [features])
    dataset: Any = SimpleNamespace(labels=np.arange(12) % 3)
    places, labels = compare.feature_map(dataset, np.arange(12), None, None)  # type: ignore[arg-type]
    assert (places.shape, labels.shape) == ((points, 2), (points,))
    assert np.isfinite(places).all()
