"""Labels over a neighbour graph: against the dense solution, and along rings that nearness alone would mix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fewlabels as fl
from conftest import shapes_images
from fewlabels.use import propagate


def rings(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (2 count, 3): two rings on a sphere, one around each pole, and which ring (2 count,)."""
    angle = np.tile(np.linspace(0, 2 * np.pi, count, endpoint=False), 2)
    ring = np.repeat([0, 1], count)
    height = np.where(ring == 0, 0.35, -0.35)
    return np.stack([np.cos(angle), np.sin(angle), height], axis=1).astype(np.float32), ring


def test_conjugate_gradients_are_the_dense_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same ties and the same flow, each computed alone and in float64."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 5)).astype(np.float32)
    monkeypatch.setattr(propagate, "NEIGHBOURS", 4)
    monkeypatch.setattr(propagate, "SHARPNESS", 3)
    monkeypatch.setattr(propagate, "STEPS", 200)
    rows = features.astype(np.float64)
    ties = np.zeros((60, 60))
    for i in range(60):
        cosine = [rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j]) for j in range(60)]
        for j in sorted((j for j in range(60) if j != i), key=lambda j: -cosine[j])[:4]:
            ties[i, j] = ties[j, i] = max(cosine[j], 0) ** 3
    normal = ties / np.sqrt(np.outer(ties.sum(axis=1), ties.sum(axis=1)))
    assert propagate.graph(features).toarray() == pytest.approx(normal, abs=1e-5)
    source = rng.random((60, 3)).astype(np.float32)
    expected = np.linalg.solve(np.eye(60) - propagate.ALPHA * normal, source)
    assert propagate.solve(propagate.graph(features), source) == pytest.approx(expected, rel=1e-2, abs=1e-3)


def test_one_label_a_ring_labels_the_whole_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels lie on opposite sides: half of each ring is nearer to the other ring's label."""
    features, ring = rings(200)
    labels = np.full(400, -1)
    labels[0], labels[300] = 0, 1
    nearer = (features @ features[[0, 300]].T).argmax(axis=1)
    assert (nearer == ring).mean() < 0.6
    monkeypatch.setattr(propagate, "STEPS", 200)
    monkeypatch.setattr(propagate, "NEIGHBOURS", 6)
    assert (propagate.propagate(features, labels, 2) == ring).all()


def test_labels_that_are_left_out_are_given_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    features, ring = rings(100)
    labels = np.full(200, -1)
    labels[[0, 50, 100, 150]] = ring[[0, 50, 100, 150]]
    monkeypatch.setattr(propagate, "NEIGHBOURS", 6)
    monkeypatch.setattr(propagate, "STEPS", 200)
    each = [np.array([row]) for row in (0, 50, 100, 150)]
    before = labels.copy()
    assert propagate.left_out(features, labels, 2, each) == (4, 4)
    assert propagate.left_out(features, labels, 2, [np.array([0, 50])]) == (0, 2), "no label of this ring is left"
    assert (labels == before).all()


def test_labels_stay_and_classes_without_one_are_never_given() -> None:
    rng = np.random.default_rng(1)
    labels = np.full(50, -1)
    labels[[3, 4, 5]] = [2, 0, 2]
    found = propagate.propagate(rng.normal(size=(50, 4)).astype(np.float32), labels, 4)
    assert found[[3, 4, 5]].tolist() == [2, 0, 2]
    assert set(found) <= {0, 2}
    apart = np.repeat(np.eye(3, dtype=np.float32), 30, axis=0)  # three places without a tie between them
    reached = propagate.propagate(apart, np.where(np.arange(90) == 40, 1, -1), 2)
    assert reached.tolist() == [-1] * 30 + [1] * 30 + [-1] * 30
    assert propagate.propagate(np.ones((2, 3), np.float32), np.array([1, -1]), 2).tolist() == [1, 1]


@pytest.mark.parametrize(("labels", "times"), [(4, 1), (40, 1), (44, 0)])
def test_fine_tuning_starts_from_it_where_labels_are_few(
    labels: int, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 10 labels a class; each training image is asked about once, with the labels that are known and no other."""
    images, classes = shapes_images(64)
    asked = []

    def recorded(features: np.ndarray, known: np.ndarray, num_classes: int) -> np.ndarray:
        asked.append((len(features), sorted(known[known >= 0].tolist()), num_classes))
        return honest(features, known, num_classes)

    honest = propagate.propagate
    monkeypatch.setattr(propagate, "propagate", recorded)
    y = [f"class{k}" if i < labels else None for i, k in enumerate(classes)]
    settings = {"pretrain": {"epochs": 1}, "finetune": {"epochs": 1, "start": "probe"}}
    fl.fit(images, y, out=tmp_path / "run", recipe="smoke", until="finetune", **settings)
    assert asked == [(64, sorted(classes[:labels].tolist()), 4)] * times
