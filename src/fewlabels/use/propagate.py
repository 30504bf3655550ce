"""Labels spread over the neighbour graph of all training images' features, for where labels are very few.

Iscen et al. 2019 (arXiv 1904.04717), section 3.2: every image is tied to its nearest by their cosine similarity, and
labels flow along these ties, (I - alpha S) Z = Y. Shapes: N images, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse
from sklearn.neighbors import NearestNeighbors

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

FEW_LABELS = 10  # a class, up to which the graph knows more than the labels alone (docs/LOG.md); at 25 it may not
MOST_IMAGES = 20_000  # in the graph, drawn from all over them
FITTED_IMAGES = 5_000  # of these that the probe is fitted on, and that are learned
STRENGTH = 1.0  # of the probe's penalty then
NEIGHBOURS = 20
SHARPNESS = 8  # power of the similarity; the paper takes 3 (docs/LOG.md)
ALPHA = 0.99  # how far labels flow, as in the paper
STEPS = 30  # of conjugate gradients; the paper takes 20


def propagate(features: Floats, labels: Ints, num_classes: int) -> Ints:
    """(N,) a class for every row of features (N, D), from labels (N,), -1 = none; -1 where no label reaches.

    Labeled rows keep theirs.
    Every class that has a label flows out equally much, so that what is typical of one does not drown the others.
    """
    return np.where(labels >= 0, labels, _flowed(graph(features), labels, num_classes))


def left_out(features: Floats, labels: Ints, num_classes: int, folds: Sequence[Ints]) -> tuple[int, int]:
    """(how many, of how many) labels the other ones give over the graph. features, labels: as for `propagate`; folds:
    rows whose labels are left out together.
    """
    ties, right = graph(features), 0
    for rows in folds:
        hidden = labels.copy()
        hidden[rows] = -1
        right += int((_flowed(ties, hidden, num_classes)[rows] == labels[rows]).sum())
    return right, sum(map(len, folds))


def _flowed(ties: sparse.csr_matrix, labels: Ints, num_classes: int) -> Ints:
    """(N,) the class whose labels flow most into each row; -1 where none reaches."""
    source = np.zeros((len(labels), num_classes), dtype=np.float32)  # Y
    known = np.flatnonzero(labels >= 0)
    source[known, labels[known]] = 1 / np.bincount(labels[known], minlength=num_classes)[labels[known]]
    flow = solve(ties, source)
    classes = (flow / np.maximum(flow.sum(axis=0), 1e-20)).argmax(axis=1)
    return np.where(flow.max(axis=1) > 0, classes, -1)


def graph(features: Floats) -> sparse.csr_matrix:
    """S (N, N): cosine similarities to the NEIGHBOURS nearest, symmetric and normalised by D^-1/2 W D^-1/2."""
    near = min(NEIGHBOURS, len(features) - 1)
    rows = (features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)).astype(np.float32)
    ties = NearestNeighbors(n_neighbors=near, algorithm="brute").fit(rows).kneighbors_graph(mode="distance")
    ties.data = np.maximum(1 - ties.data**2 / 2, 0) ** SHARPNESS
    ties = ties.maximum(ties.T)
    scale = sparse.diags(1 / np.sqrt(np.maximum(np.asarray(ties.sum(axis=1)).reshape(-1), 1e-12)))
    return sparse.csr_matrix(scale @ ties @ scale).astype(np.float32)


def solve(ties: sparse.csr_matrix, source: Floats) -> Floats:
    """Z (N, K) of (I - ALPHA S) Z = Y by conjugate gradients, each column by itself."""
    found, rest = np.zeros_like(source), source.copy()
    step, size = rest.copy(), (rest**2).sum(axis=0)
    for _ in range(STEPS):
        moved = step - ALPHA * (ties @ step)
        length = size / np.maximum((step * moved).sum(axis=0), 1e-30)
        found, rest = found + length * step, rest - length * moved
        before, size = size, (rest**2).sum(axis=0)
        step = rest + size / np.maximum(before, 1e-30) * step
    positive: Floats = np.maximum(found, 0)
    return positive
