"""Unlabeled images whose classes do not come equally often, and labels that come otherwise than they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from fewlabels.data import labels
from fewlabels.data.labels import LEAKED, TRAIN, Dataset

RATIO, STEEP_RATIO = 20, 100  # the most frequent class comes so many times as often as the rarest
LABELS_RATIO = 10  # the same of labels that come the other way round
OWN = 0.7  # of the classes are to be told apart where there are foreign images; of the rest nobody knows


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


def long_tailed(dataset: Dataset, ratio: float = RATIO) -> Dataset:
    """dataset with fewer and fewer training images a class; held-out images stay as they are."""
    ranked, splits = _ranked(dataset, 0), dataset.splits.copy()
    most = min(map(len, ranked))
    for rows, share in zip(ranked, _shares(len(ranked), ratio), strict=True):
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


def as_they_come(dataset: Dataset, amount: str | int, draw: int) -> Dataset:
    """dataset with amount labels of images at random, and one more of each class that none is of."""
    chosen = np.random.default_rng(draw).permutation(dataset.labeled)
    known = dataset.labels[chosen]
    _, first = np.unique(known, return_index=True)
    some = np.union1d(chosen[: int(amount)], chosen[first])
    kept = np.full_like(dataset.labels, -1)
    for ids in (some, dataset.held_out):
        kept[ids] = dataset.labels[ids]
    return replace(dataset, labels=kept)


def some_classes(dataset: Dataset, *, foreign: bool) -> Dataset:
    """dataset with the first classes only, in training and held out. foreign: the unlabeled pool has images of the
    others too.
    """
    own = round(OWN * dataset.num_classes)
    others, splits = dataset.labels >= own, dataset.splits.copy()
    splits[others if not foreign else others & (splits != TRAIN)] = LEAKED
    return replace(
        dataset, splits=splits, labels=np.where(others, -1, dataset.labels), classes=dataset.classes[:own]
    )  # fmt: skip


# How the training images come, and which of them get labels
POOLS: dict[str, tuple[Callable[[Dataset], Dataset], Callable[[Dataset, str | int, int], Dataset]]] = {
    "even": (lambda whole: whole, labels.keep_labels),
    "long": (long_tailed, labels.keep_labels),
    "steep": (partial(long_tailed, ratio=STEEP_RATIO), labels.keep_labels),
    "tail": (partial(long_tailed, ratio=STEEP_RATIO), as_they_come),
    "reversed": (long_tailed, most_of_the_rarest),
    "pure": (partial(some_classes, foreign=False), labels.keep_labels),
    "foreign": (partial(some_classes, foreign=True), labels.keep_labels),
}
