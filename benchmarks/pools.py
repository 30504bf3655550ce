"""Unlabeled images whose classes do not come equally often, and labels that come otherwise than they do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fewlabels.data import labels
from fewlabels.data.labels import LEAKED, Dataset

RATIO = 20  # the most frequent class comes so many times as often as the rarest
LABELS_RATIO = 10  # the same of labels that come the other way round


def _shares(classes: int, ratio: float) -> np.ndarray:
    """(K,) from 1 down to 1 / ratio, each the same part of the one before."""
    return ratio ** -(np.arange(classes) / max(1, classes - 1))


def _ranked(dataset: Dataset, seed: int) -> list[np.ndarray]:
    """The labeled images of each class in random order, the classes in that in which they get rarer."""
    rng = np.random.default_rng(seed)
    known = dataset.labels[dataset.labeled]
    rows = [rng.permutation(dataset.labeled[known == number]) for number in range(dataset.num_classes)]
    order = np.random.default_rng(7).permutation(len(rows))  # the same for all seeds
    return [rows[number] for number in order]


def long_tailed(dataset: Dataset) -> Dataset:
    """dataset with fewer and fewer training images a class; held-out images stay as they are."""
    ranked, splits = _ranked(dataset, 0), dataset.splits.copy()
    most = min(map(len, ranked))
    for rows, share in zip(ranked, _shares(len(ranked), RATIO), strict=True):
        splits[rows[max(1, round(most * share)) :]] = LEAKED
    return replace(dataset, splits=splits)


def most_of_the_rarest(dataset: Dataset, amount: str | int, draw: int) -> Dataset:
    """dataset with amount labels, about: the rarer a class is in a long-tailed pool, the more of them it has."""
    ranked, kept = _ranked(dataset, draw), np.full_like(dataset.labels, -1)
    kept[dataset.held_out] = dataset.labels[dataset.held_out]
    shares = _shares(len(ranked), LABELS_RATIO)[::-1]
    for rows, wanted in zip(ranked, np.round(int(amount) * shares / shares.sum()), strict=True):
        some = rows[: max(1, int(wanted))]
        kept[some] = dataset.labels[some]
    return replace(dataset, labels=kept)


# How the training images come, and which of them get labels
POOLS = {
    "even": (lambda whole: whole, labels.keep_labels),
    "long": (long_tailed, labels.keep_labels),
    "reversed": (long_tailed, most_of_the_rarest),
}
