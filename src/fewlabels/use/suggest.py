"""Which images to label next, from a run's own pixels and network: `fewlabels suggest RUN -n 20`.

While labels are few, typical images of the features' clusters teach most (TypiClust, Hacohen et al. 2022, arXiv
2202.02794): k-means into as many clusters as there will be labels, then the most typical image of each cluster that has
no label yet, large clusters first. Where labels are many, the images that a classifier is least sure of do (margin
sampling), one from each of as many clusters, for otherwise they are all alike.

Shapes: N images, D features, n suggestions, K classes.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import NearestNeighbors
from torch import nn

from fewlabels import runtime
from fewlabels.data.labels import LEAKED, SPLIT_WORDS, TEST, TRAIN, VAL, Dataset, as_table
from fewlabels.data.tables import FORMULA_STARTS, through_links
from fewlabels.errors import DataError, UsageError
from fewlabels.runfolder import RunFolder
from fewlabels.use import artefact, compare, evaluate
from fewlabels.use.learned import open_run

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.integer[Any]]

MOST_IMAGES = 50_000  # looked at, drawn from all over them: 2,048 features of them are 400 MB
MOST_CLUSTERS = 500  # as in the paper's code
EXACT_CLUSTERS = 50  # k-means on all images up to here, on parts of them above
STARTS = 10  # of k-means; 10 labels on digits (8 draws): 76.4 % right from 1 start, 83.7 from 5, 86.2 from 20
NEIGHBOURS = 20  # that say how typical an image is
LEAST_CLUSTER = 5  # images of a cluster worth a label
# Labels a class from which the unsure images come: with weak features (CIFAR-10) typical ones are ahead at 10 and 25 a
# class and level from 50 to 200, with good ones (digits) unsure ones are ahead at 10 by less than the spread
FEW_LABELS = 50
UNSURE = 10  # times n images that count as unsure


@dataclass(frozen=True)
class Suggestions:
    """Rows of the store to label next, best first, and the images of the run that they are of."""

    dataset: Dataset
    rows: list[int]
    tested_apart: bool  # the held-out test images came by themselves, with labels of their own
    root: Path = Path(os.devnull)  # where names of files start

    @property
    def images(self) -> list[str]:
        """Their names."""
        return [self.dataset.names[row] for row in self.rows]

    def table(self, beside: Path = Path()) -> str:
        """A labels CSV to fill in: the suggestions without a label, then all that the run knows of its images.

        `fit --labels` takes such a file for all there is to know: a label that is not in it would be forgotten. A name
        that a spreadsheet would run, or whose first space would be lost, gets "./" before it, which leads to the same
        image; one that leads to another from the table's folder is a whole path. Labels stay as they are.
        """
        rows = list[tuple[str, str, str]]()
        known, splits, named = self.dataset.labels >= 0, self.dataset.splits, set(self.dataset.names)
        measures = np.isin(splits, (VAL,) if self.tested_apart else (VAL, TEST))
        told = measures | (known & np.isin(splits, (TRAIN, LEAKED)))
        for row in [*self.rows, *np.flatnonzero(told).tolist()]:
            name, label = self.dataset.names[row], self.dataset.labels[row]
            other = os.path.relpath(through_links(f"{beside.absolute()}/{name}"), self.root)
            name = f"{self.root}/{name}" if other != name and other in named else name
            name = f"./{name}" if name.startswith(FORMULA_STARTS) or name[:1].isspace() else name
            word = SPLIT_WORDS[TRAIN if splits[row] == LEAKED else int(splits[row])]
            rows.append((name, self.dataset.classes[label] if label >= 0 else "", word))
        return as_table(rows)


def suggest(run: Path, count: int, *, device: str = "auto") -> Suggestions:
    """The `count` images of the run to label next; fewer where there are no more.

    Only training images without a label, and none with the same pixels as one that is labeled or suggested. The same
    run gives the same answer. Raises MissingInput for what is no run, or has not pretrained yet.
    """
    if count < 1:
        raise UsageError(f"{count} images to label were asked for", fix="ask for at least 1")
    network, head, card = artefact.read_whole(artefact.place(run))
    dataset, tested_apart = open_run(run)
    known, pool = candidates(dataset)
    if not len(pool):
        raise DataError(f"every training image of {run} has a label", fix="to go on, give more images")
    rows, place = np.concatenate([known, pool]), runtime.device(device)
    # The space in which pretraining compares images: as good as the encoder's, better early in training (docs/LOG.md)
    body = nn.Sequential(network.encoder, head) if head is not None and card.whole_head else network.encoder
    body.to(place)
    setting = compare.Setting(card.size, card.kind, place, runtime.precision(place, "fp32"))
    (features,) = compare.outputs(dataset, rows, setting, lambda view: [body(view)])
    images = Path((RunFolder(run).resolved() or {})["inputs"].get("images", os.devnull))
    root = (images.parent if images.is_file() else images).resolve()  # a CSV's names start beside it
    return Suggestions(dataset, rows[choose(features, dataset.labels[rows], count)].tolist(), tested_apart, root)


def candidates(dataset: Dataset) -> tuple[Ints, Ints]:
    """Rows with a label and rows that may be suggested: one of each set of equal images, at most MOST_IMAGES in all."""
    train = dataset.train[np.argsort(dataset.labels[dataset.train] < 0, kind="stable")]  # those with a label first
    first = np.sort(dataset.once(train))
    known = evaluate.sampled(first[dataset.labels[first] >= 0], MOST_IMAGES // 2)
    return known, evaluate.sampled(first[dataset.labels[first] < 0], MOST_IMAGES - len(known))


def choose(features: Floats, labels: Ints, count: int) -> Ints:
    """(n,) rows to label next. features: (N, D). labels: (N,), -1 = none yet."""
    features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    classes = len(np.unique(labels[labels >= 0]))
    many = classes > 1 and (labels >= 0).sum() >= FEW_LABELS * classes
    return unsure(features, labels, count) if many else typical(features, labels, count)


def typical(features: Floats, labels: Ints, count: int) -> Ints:
    """(n,) rows without a label: the most typical of each cluster, fewest labels and largest clusters first.

    How typical an image is: the inverse of its mean distance to its NEIGHBOURS nearest without a label in its cluster.
    """
    known = labels >= 0
    cluster = clusters(features, min(int(known.sum()) + count, MOST_CLUSTERS))
    queues: list[tuple[bool, int, int, int, list[int]]] = []
    for number in np.unique(cluster[~known]).tolist():
        inside, labeled = np.flatnonzero((cluster == number) & ~known), int(known[cluster == number].sum())
        queue = inside[np.argsort(mean_distances(features[inside]), kind="stable")].tolist()
        queues.append((len(inside) < LEAST_CLUSTER, labeled, -len(inside), number, queue))
    turns = [queue for *_, queue in sorted(queues)]
    longest = max(map(len, turns))
    return np.array([queue[turn] for turn in range(longest) for queue in turns if turn < len(queue)][:count])


def unsure(features: Floats, labels: Ints, count: int) -> Ints:
    """(n,) rows without a label between whose two likeliest classes logistic regression decides least."""
    known, pool = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)
    fitted = evaluate.logistic_regression(features[known], labels[known], num_classes=int(labels.max()) + 1)
    likeliest = np.sort(fitted.predict_proba(features[pool]), axis=1)  # (N, K)
    order = pool[np.argsort(likeliest[:, -1] - likeliest[:, -2], kind="stable")]
    order = order[: UNSURE * count]
    cluster = clusters(features[order], min(count, len(order)))
    first = np.sort(np.unique(cluster, return_index=True)[1])
    rest = np.setdiff1d(np.arange(len(order)), first)
    return np.asarray(order[np.concatenate([first, rest])[:count]])


def clusters(features: Floats, count: int) -> npt.NDArray[np.int32]:
    """(N,) the k-means cluster of each row, at most `count`."""
    kind, starts = (KMeans, STARTS) if count <= EXACT_CLUSTERS else (MiniBatchKMeans, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct images than clusters
        fitted = kind(min(count, len(features)), n_init=starts, random_state=0).fit(features)
    return np.asarray(fitted.labels_, dtype=np.int32)


def mean_distances(features: Floats) -> Floats:
    """(N,) each row's mean distance to its NEIGHBOURS nearest others, of which there are at most half of all."""
    near = max(1, min(NEIGHBOURS, len(features) // 2))
    if len(features) < 2:
        return np.zeros(len(features), dtype=np.float32)
    apart, _ = NearestNeighbors(n_neighbors=near, algorithm="brute").fit(features).kneighbors()  # (N, near)
    return np.asarray(apart.mean(axis=1), dtype=np.float32)
