"""The table of methods: what its parts see, and the map of features where there is nothing to draw."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fewlabels as fl
from conftest import shapes_images
from fewlabels.use import compare, evaluate, propagate
from use.test_propagate import rings


@pytest.mark.parametrize(("spread", "points"), [(0.0, 0), (1e-9, 0), (1.0, 12)])
def test_features_that_are_all_alike_have_no_map(spread: float, points: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collapsed pretraining gives such, and t-SNE of them ended the process before its results were saved."""
    features = (1 + spread * np.random.default_rng(0).normal(size=(12, 8))).astype(np.float32)
    monkeypatch.setattr(compare, "outputs", lambda *_: [features])
    dataset: Any = SimpleNamespace(labels=np.arange(12) % 3)
    places, labels = compare.feature_map(dataset, np.arange(12), None, None)  # type: ignore[arg-type]
    assert (places.shape, labels.shape) == ((points, 2), (points,))
    assert np.isfinite(places).all()


@pytest.mark.parametrize(("name", "expected", "sure", "confidence"), [
    (compare.SELF_TRAINED, None, 80, 0.8), (compare.SELF_TRAINED, 0.5, 80, 0.8), (compare.SELF_TRAINED, 0.9, 80, 0.9),
    (compare.SELF_TRAINED, 0.5, 100, 0.978), ("distilled student", 0.5, 80, 0.5),
])  # fmt: skip
def test_a_self_trained_network_is_right_as_often_as_it_is_sure(
    name: str, expected: float | None, sure: int, confidence: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """80 of 100 images are sure; its probabilities say so, unless the frozen features were right more often. Where it
    is sure of all, it is not made surer than it was (every answer of 289 digits was certain: calibration error 0.20).
    """
    logits = np.zeros((100, 4), dtype=np.float32)
    logits[:, 0] = 4.9 if sure == 100 else 9.0  # 0.978 and 0.9996
    logits[sure:, 0] = 2.0
    monkeypatch.setattr(compare, "outputs", lambda *_: [logits])
    monkeypatch.setattr(compare, "costs", lambda *_: {})
    rows = np.arange(100)
    dataset: Any = SimpleNamespace(
        labeled=rows[:4], held_out=rows[:0], labels=rows % 4, train=rows, num_classes=4, once=lambda ids: ids
    )
    setting: Any = None
    comparison = compare.Comparison(dataset, setting, compare.NAMES | {"distill": name})
    network: Any = SimpleNamespace(eval=lambda: None)
    comparison.expected = expected
    for told in (name, "distilled student"):  # and so is the student that it teaches
        _, _, temperature = comparison.network("distill", network)
        softened = np.exp(logits / temperature)
        assert (softened.max(axis=1) / softened.sum(axis=1)).mean() == pytest.approx(confidence, abs=0.01)
        assert comparison.rows[-1]["name"] == told
        comparison.names = compare.NAMES


@pytest.mark.parametrize(("unlabeled", "first"), [(100, 100), (99, 0)])
def test_labels_known_by_heart_say_nothing_of_how_sure_to_be(
    unlabeled: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 100 of 300 images labeled, the calibration error on new ones was 26 %, and 21 by the others alone."""
    logits = np.zeros((100 + unlabeled, 4), dtype=np.float32)
    logits[:100, 0], logits[100:, 0] = 20.0, 2.0
    monkeypatch.setattr(compare, "outputs", lambda _, ids, *__: [logits[ids]])
    monkeypatch.setattr(compare, "costs", lambda *_: {})
    rows = np.arange(len(logits))
    dataset: Any = SimpleNamespace(
        labeled=rows[:100], held_out=rows[:0], labels=rows % 4, train=rows, num_classes=4, once=lambda ids: ids
    )
    nothing: Any = SimpleNamespace(eval=lambda: None)
    comparison = compare.Comparison(dataset, nothing)
    comparison.expected = 0.6
    softened = np.exp(logits / comparison.network("finetune", nothing)[2])
    mean = (softened.max(axis=1) / softened.sum(axis=1))[first:].mean()
    assert mean == pytest.approx(0.6, abs=0.01)


def test_where_labels_were_spread_they_say_how_good_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is left out once and given by the others; image 70 is the same picture as 60, and takes no part."""
    features, ring = rings(50)
    monkeypatch.setattr(propagate, "NEIGHBOURS", 6)
    monkeypatch.setattr(compare, "_projected", lambda *_: (ids, features[ids]))
    labeled = np.array([0, 10, 20, 30, 60, 70, 80])
    ids = np.concatenate([labeled, np.setdiff1d(np.arange(100), labeled)])
    labels = np.full(100, -1)
    labels[labeled] = ring[labeled]
    dataset: Any = SimpleNamespace(
        labeled=labeled, held_out=labeled[:0], labels=labels, train=np.arange(100), num_classes=2,
        once=lambda rows: np.setdiff1d(rows, [70]),
    )  # fmt: skip
    setting: Any = None
    comparison = compare.Comparison(dataset, setting)
    network: Any = None
    comparison.expect_of_spread(network, None)
    assert comparison.expected == (6 + 1) / (6 + 2)
    assert comparison.once.tolist() == [0, 1, 2, 3, 4, 6]
    with monkeypatch.context() as few:
        few.setattr(evaluate, "PROBED_IMAGES", 3)
        assert len(compare.Comparison(dataset, setting).once) == 3, "so many are cross-validated at most"
    features[70] = features[60]  # the only one of its ring beside 80, as another picture looked at in its place would
    labels[80], dataset.labeled = -1, labeled[:-1]
    ids = np.concatenate([labeled[:-1], np.setdiff1d(np.arange(100), labeled[:-1])])
    comparison = compare.Comparison(dataset, setting)
    comparison.expect_of_spread(network, None)
    assert comparison.expected == (4 + 1) / (5 + 2), "60 has none to tell it, though its copy has its label"


def test_of_very_many_labels_a_regression_sees_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuning's start and the table alike, and the table says so: ImageNet's would take 100 GB."""
    images, classes = shapes_images(64)
    seen, honest = [], evaluate.logistic_regression

    def recorded(features: np.ndarray, labels: np.ndarray, **settings: Any) -> evaluate.FittedLogistic:
        seen.append(len(features))
        return honest(features, labels, **settings)

    monkeypatch.setattr(evaluate, "logistic_regression", recorded)
    for most in ("FITTED_IMAGES", "PROBED_IMAGES"):
        monkeypatch.setattr(evaluate, most, 24)
    settings = {"pretrain": {"epochs": 1}, "finetune": {"epochs": 1, "start": "probe"}}
    run = fl.fit(
        images, classes, test=(images // 2, classes), out=tmp_path / "run", recipe="smoke", until="finetune", **settings
    )
    rows = {row["key"]: row for row in run.metrics["rows"]}
    assert {"pixels_logistic", "tap0_logistic", "tap1_logistic"} <= rows.keys()
    assert max(seen) == 24
    for key, row in rows.items():
        assert row["note"] == ("fitted on 24 of the labels" if key.endswith("logistic") else "")
    assert run.metrics["labels_used"] == 64
