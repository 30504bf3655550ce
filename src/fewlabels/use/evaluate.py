"""How good it is, said honestly: accuracy with its interval and the images behind it, calibration, cheap baselines.

Pure numpy and scikit-learn; only `evaluate_run` sees a model.

Shapes: N images, K classes, D features, B bins.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import NearestNeighbors

from fewlabels.data import parts
from fewlabels.data.source import Source
from fewlabels.data.sources import open_source
from fewlabels.data.tables import composed
from fewlabels.errors import DataError, printable
from fewlabels.use import learned
from fewlabels.use.predict import Model

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]

LONGEST_NAME = 40  # characters of a class in the table
MOST_CONFUSIONS = 5
NUM_BINS = 15  # equal-width confidence bins, as in Guo et al. 2017 (arXiv 1706.04599)
VOTE_TEMPERATURE = 0.1  # of the weighted kNN vote; Wu et al. 2018 (arXiv 1805.01978) use 0.07
COLDEST, HOTTEST = 0.05, 20.0
MAX_FOLDS = 10
CALIBRATION_IMAGES = 2000  # of the training images, for the mean confidence
LEAST_UNLABELED = 100  # of these that do without the labeled ones, of which a network is sure
PROBED_IMAGES = 5000  # labeled images that cross-validation and kNN look at
FITTED_IMAGES = 50_000  # labeled images that logistic regression is fitted on: 2,048 features of them take 3 GB
LEAST = 0.45  # of the way from chance to all right, that features must come for self-training


# --- measuring ---------------------------------------------------------------------------------------------


def wilson_interval(correct: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (JASA 1927), within [0, 1]; (0, 1) when total is 0.

    Unlike p +- 1.96 s it keeps its promise for few images and for accuracies near 0 or 1.
    """
    if total <= 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = correct / total
    shrink = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / shrink
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / shrink
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == total else min(1.0, centre + half)
    return low, high


def measure(probabilities: Floats, labels: Integers, classes: Sequence[str]) -> dict[str, Any]:
    """All that is worth knowing about predictions, as plain JSON values.

    probabilities: (N, K), rows sum to 1. labels: (N,) in [0, K). Returns n, top1 (and top5 when K > 5) with
    interval, per_class, the mean of their recalls, confusion (rows are the truth), ece and its reliability bins, nll in
    nats, brier (sum over classes, 0 to 2). What is undefined (the precision of a class never predicted) is None.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)  # (N, K)
    labels = np.asarray(labels, dtype=np.int64)  # (N,)
    if not np.isfinite(probabilities).all():
        raise DataError("some probabilities are not finite numbers", fix="check the model; do not trust its output")
    n, k = probabilities.shape
    rows = np.arange(n)
    predicted = probabilities.argmax(axis=1)  # (N,)
    confusion = confusion_matrix(labels, predicted, labels=np.arange(k))
    truth = probabilities[rows, labels]  # (N,) probability given to the true class
    bins = reliability(probabilities.max(axis=1), predicted == labels)
    brier = (probabilities**2).sum(axis=1) - 2 * truth + 1
    result: dict[str, Any] = {
        "n": n,
        "classes": [str(name) for name in classes],
        "top1": _proportion(int(np.trace(confusion)), n),
        "per_class": (per_class := _per_class(labels, predicted, classes)),
        "mean_recall": float(np.mean([row["recall"] for row in per_class if row["n"]])),
        "confusion": confusion.tolist(),
        "ece": sum(b["n"] / n * abs(b["accuracy"] - b["confidence"]) for b in bins if b["n"]),
        "reliability": bins,
        "nll": float(-np.log(np.maximum(truth, np.finfo(np.float32).tiny)).mean()),
        "brier": float(brier.mean()),
    }
    if k > 5:
        better = (probabilities > truth[:, None]).sum(axis=1)  # (N,) classes strictly ahead of the true one
        tied_before = ((probabilities == truth[:, None]) & (np.arange(k) < labels[:, None])).sum(axis=1)
        result["top5"] = _proportion(int((better + tied_before < 5).sum()), n)
    return result


def reliability(confidence: Floats, is_correct: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Confidence (N,) against accuracy in NUM_BINS bins (low, high]; the first bin also holds 0."""
    place = np.clip(np.ceil(np.asarray(confidence, dtype=np.float64) * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    counts = np.bincount(place, minlength=NUM_BINS).tolist()
    sums = [np.bincount(place, weights=of, minlength=NUM_BINS).tolist() for of in (confidence, is_correct)]
    return [
        {
            "low": index / NUM_BINS,
            "high": (index + 1) / NUM_BINS,
            "n": n,
            "confidence": sure / n if n else None,
            "accuracy": right / n if n else None,
        }
        for index, (n, sure, right) in enumerate(zip(counts, *sums, strict=True))
    ]


def _proportion(correct: int, n: int) -> dict[str, Any]:
    low, high = wilson_interval(correct, n)
    return {"accuracy": correct / n, "interval": [low, high], "correct": correct, "n": n}


def _per_class(labels: Integers, predicted: Integers, classes: Sequence[str]) -> list[dict[str, Any]]:
    numbers = precision_recall_fscore_support(labels, predicted, labels=np.arange(len(classes)), zero_division=np.nan)
    *shares, counts = (column.tolist() for column in numbers)
    known = [[None if math.isnan(share) else share for share in column] for column in shares]
    return [
        {"name": str(name), "precision": precision, "recall": recall, "f1": f1, "n": int(n)}  # a float of absent ones
        for name, precision, recall, f1, n in zip(classes, *known, counts, strict=True)
    ]


# --- baselines and probes ----------------------------------------------------------------------------------


def most_frequent(labels: Integers, num_classes: int) -> npt.NDArray[np.float32]:
    """(K,) share of each class among labels (n,): the prediction of somebody who never looks at the image."""
    return np.asarray(np.bincount(labels, minlength=num_classes) / len(labels), dtype=np.float32)


@dataclass(frozen=True)
class FittedLogistic:
    """A fitted logistic regression with its normalisation. estimator is None when only one class was seen."""

    length: float  # usual length of a row before it is brought to 1
    mean: npt.NDArray[np.float64]  # (D,)
    scale: float
    seen: Integers  # (S,) class numbers in the training labels
    num_classes: int
    estimator: LogisticRegression | None

    def predict_proba(self, features: Floats) -> npt.NDArray[np.float32]:
        """features: (N, D) -> (N, K); classes without a training label get 0."""
        probabilities = np.zeros((len(features), self.num_classes), dtype=np.float32)
        if self.estimator is None:
            probabilities[:, self.seen] = 1.0
        else:
            probabilities[:, self.seen] = self.estimator.predict_proba((_unit(features) - self.mean) / self.scale)
        return probabilities

    def linear(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Weight (K, D) and bias (K,) of the linear layer on raw features that comes nearest to this regression.

        Equal to it for rows of the usual length; the others get sharper or softer probabilities. A class without a
        training label has weight 0 and a bias of -10.
        """
        weight = np.zeros((self.num_classes, len(self.mean)), dtype=np.float32)
        bias = np.full(self.num_classes, -10.0, dtype=np.float32)
        if self.estimator is None:
            bias[self.seen] = 0.0
        else:
            rows, shift = self.estimator.coef_ / self.scale, self.estimator.intercept_
            if len(self.seen) == 2:  # scikit-learn keeps one row for two classes
                rows, shift = np.concatenate([-rows, rows]) / 2, np.concatenate([-shift, shift]) / 2
            weight[self.seen], bias[self.seen] = rows / self.length, shift - rows @ self.mean
        return weight, bias


def logistic_regression(
    features: Floats, labels: Integers, *, num_classes: int, strength: float = 0.1
) -> FittedLogistic:
    """Multinomial logistic regression with an L2 penalty, fitted on features (N, D) and labels (N,).

    strength: weight of the penalty |W|^2 / 2 against the summed cross-entropy (scikit-learn's 1 / C).

    Rows are brought to length 1, centred, and divided by one number for all columns (their mean length), so
    that strength means the same for any D. Dividing each column by its own deviation, the usual way, fails with
    few labels, since 20 rows cannot say how much a column varies: measured on digits with 1 and 2 labels a class
    (8 draws), 59.8 and 70.3 % against 67.1 and 76.5 % here; with 25 a class 92.6 against 93.6 %. Strengths
    0.001 to 0.1 are within 0.5 points of each other from 1 to 25 labels a class, 1.0 and 10 are behind.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    if not len(labels):
        raise DataError("logistic regression needs at least one labeled image", fix="label some images")
    rows = _unit(features)
    length = float(np.linalg.norm(features, axis=1).mean()) or 1.0
    mean = rows.mean(axis=0)
    rows = rows - mean
    scale = float(np.sqrt((rows**2).sum(axis=1).mean())) or 1.0
    seen = np.unique(labels)
    estimator = None
    if len(seen) > 1:
        estimator = LogisticRegression(C=1.0 / strength, max_iter=2000).fit(rows / scale, labels)
    return FittedLogistic(length, mean, scale, seen, num_classes, estimator)


def cross_validated(features: Floats, labels: Integers) -> dict[str, Any]:
    """Accuracy of logistic regression on images left out of its fit, for runs without held-out images.

    Stratified folds, as many as the smallest class has images (at most 10). An image that is alone in its class is
    always wrong; with such classes the largest class decides the folds, so 1,000 labels are not 1,000 fits.
    Returns accuracy, interval (Wilson, pooled over folds; the folds share training images, so it is a little
    narrow) and n; accuracy and interval are None where the labels name one class or each has one label only. Each fit
    sees fewer labels than there are, so the number is on the low side.
    """
    n, classes = len(labels), np.unique(labels)
    if len(classes) < 2 or not (left_out := folds(labels)):
        return {"accuracy": None, "interval": None, "n": n}
    num_classes = int(classes.max()) + 1
    correct = 0
    for test in left_out:
        train = np.setdiff1d(np.arange(n), test)
        fitted = logistic_regression(features[train], labels[train], num_classes=num_classes)
        correct += int((fitted.predict_proba(features[test]).argmax(axis=1) == labels[test]).sum())
    return {"accuracy": correct / n, "interval": wilson_interval(correct, n), "n": n}


def folds(labels: Integers) -> list[Integers]:
    """The positions of labels (n,) in stratified folds, each to be left out in its turn; none if no class has two."""
    counts = np.unique(labels, return_counts=True)[1]
    smallest, largest = int(counts.min(initial=len(labels))), int(counts.max(initial=0))
    if largest < 2:
        return []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        count = min(smallest if smallest >= 2 else largest, MAX_FOLDS)
        return [test for _, test in StratifiedKFold(count, shuffle=True, random_state=0).split(labels, labels)]


def too_weak(features: Floats, labels: Integers) -> str:
    """Why features (n, D) are too weak for self-training, by labels (n,); "" where they are not, or nothing tells.

    They are where the upper end of the cross-validated accuracy's interval is less than LEAST of the way from chance to
    all right (0.505 of ten classes). Classes with one label take no part: none of it can be left out. Of 20 draws of
    labels it is below for 4 of CIFAR-10 (JPEG, 6,000 images) with 60 labels, 1 with 100, none with 250, 1 of Imagenette
    with 60 and none with 95. Before photos were pretrained with Muon it was for 15 of CIFAR with 250, where
    self-training gained 1.2 points. For digits and Fashion-MNIST it was for none.
    """
    _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    some = counts[place] > 1
    told = cross_validated(features[some], labels[some])
    chance = 1 / max(1, int((counts > 1).sum()))
    least = chance + LEAST * (1 - chance)
    if told["interval"] is None or told["interval"][1] >= least:
        return ""
    return (
        f"no self-training: frozen features tell {100 * told['accuracy']:.0f} % of the labels by the others, "
        f"{100 * told['interval'][1]:.1f} % at best, and below {100 * least:.1f} % it may be sure of wrong answers "
        "(to have it all the same, in a new --out: --distill.self-training 0.95)"
    )


def sampled(ids: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """At most count of ids (N,), drawn from all over them: an estimate need not read a million images."""
    return ids[parts.sampled(len(ids), count)]


def nearest_neighbours(features: Floats, labels: Integers, k: int = 10) -> float | None:
    """Leave-one-out accuracy of the weighted k-nearest-neighbour vote; None with fewer than two rows.

    features: (N, D). Neighbours by cosine similarity s, each voting with exp(s / 0.1) (Wu et al. 2018, section 3.4).
    Rows of length 1 are sqrt(2 - 2 s) apart.
    """
    n = len(labels)
    if n < 2:
        return None
    rows = _unit(features).astype(np.float32)  # (N, D)
    apart, nearest = NearestNeighbors(n_neighbors=min(k, n - 1), algorithm="brute").fit(rows).kneighbors()  # (N, k)
    votes = np.zeros((n, int(labels.max()) + 1))
    np.add.at(votes, (np.arange(n)[:, None], labels[nearest]), np.exp(-(apart**2) / 2 / VOTE_TEMPERATURE))
    return float((votes.argmax(axis=1) == labels).mean())


def temperature_for_confidence(logits: Floats, expected: float | None) -> float:
    """The temperature at which the mean largest probability of softmax(logits / T) is `expected`.

    logits: (N, K), labels are not needed. expected: an accuracy estimated elsewhere, or None for T = 1. The mean
    confidence falls in T, so it is bisected on a logarithmic scale between COLDEST and HOTTEST.
    """
    if expected is None or not len(logits):
        return 1.0
    rows = np.asarray(logits, dtype=np.float64)
    rows = rows - rows.max(axis=1, keepdims=True)  # (N, K)
    low, high = COLDEST, HOTTEST
    for _ in range(40):
        middle = math.sqrt(low * high)
        confidence = float((1 / np.exp(rows / middle).sum(axis=1)).mean())
        low, high = (middle, high) if confidence > expected else (low, middle)
    return math.sqrt(low * high)


def _unit(features: Floats) -> npt.NDArray[np.float64]:
    rows = np.asarray(features, dtype=np.float64).reshape(len(features), -1)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


# --- a run on new images -----------------------------------------------------------------------------------


def evaluate_run(model: Model, images: object, labels: object = None) -> dict[str, Any]:
    """`measure` of model on labeled images of any source, with what was passed over.

    A source with splits is measured on its labeled test images, else on its val images, else on all; a picture that is
    there twice counts once. Adds "images" (the source), "split", "unlabeled", "copies", "unreadable" (name and reason)
    and "trained_on": how many of them the run of the model was trained on, None = it does not say.
    """
    model.check_classifies()
    source = open_source(images, labels)
    numbers = _class_numbers(source, model.classes)
    labeled = {split for split, number in zip(source.splits, numbers, strict=True) if number >= 0}
    there = [name for name in ("test", "val", "train") if name in source.splits]
    # Images to train on never stand in for held-out ones without labels
    split = next((name for name in there if name in labeled and name != "train"), there[0] if there else "train")
    rows, truth, first = [], [], dict[bytes, int]()  # first: of each picture, by its pixels
    conflicts, unreadable, copies, unlabeled = [], [], 0, 0
    keep = [s == split and n >= 0 for s, n in zip(source.splits, numbers, strict=True)]
    for index, prediction in enumerate(model.each(source, keep=keep, digests=True)):
        if prediction.error:
            unreadable.append({"name": prediction.name, "reason": prediction.error})
        elif prediction.probabilities is None:
            unlabeled += source.splits[index] == split
        elif (same := first.setdefault(prediction.digest, index)) == index:
            rows.append(prediction.probabilities)
            truth.append(numbers[index])
        else:
            copies += 1
            if numbers[same] != numbers[index]:
                conflicts.append(" and ".join(f'{source.named(i)} is "{source.labels[i]}"' for i in (same, index)))
    if conflicts:
        raise DataError(
            f"pictures with two labels, though their pixels are the same: {len(conflicts):,}", details=conflicts,
            why="one of the two is wrong, and would be an error", fix="correct or empty the wrong label of each pair",
        )  # fmt: skip
    if not rows:
        raise DataError(
            f"{source.description}: none of its images has a label that can be read",
            why="accuracy can only be measured on labeled images",
            fix="use class folders or a CSV with the columns image,label",
        )
    result = measure(np.stack(rows), np.asarray(truth), model.classes)
    seen, _, whole = learned.by(model.path, model.card.longest_side) if model.path else (np.zeros(0, "V32"), 0, False)
    trained_on = int(np.isin(np.frombuffer(b"".join(first), "V32"), seen).sum())
    return result | {
        "balanced": model.card.balanced,
        "images": source.description,
        "split": split,
        "unlabeled": unlabeled,
        "copies": copies,
        "unreadable": unreadable,
        "trained_on": trained_on if trained_on or whole else None,
    }


def _class_numbers(source: Source, classes: Sequence[str]) -> list[int]:
    """One class number for each image, -1 = unlabeled. All unknown classes are named at once."""
    number = {composed(name): i for i, name in enumerate(classes)}  # an older model has names as macOS writes them
    unknown = sorted({label for label in source.labels if label not in (None, "") and label not in number})
    if unknown:
        raise DataError(
            f"{source.description}: {len(unknown):,} of its classes are not among the model's {len(classes):,}",
            why="a prediction cannot be right for a class that the model does not know",
            fix="rename or leave out these classes; the model knows: " + ", ".join(list(classes)[:20]),
            details=[f'"{name}"' for name in unknown],
        )
    return [number.get(label or "", -1) for label in source.labels]


def percent(part: dict[str, Any]) -> str:
    """A proportion as "87.4 % (84.5-89.9, n=597)"."""
    low, high = part["interval"]
    return f"{100 * part['accuracy']:.1f} % ({100 * low:.1f}-{100 * high:.1f}, n={part['n']:,})"


def format_table(measurement: dict[str, Any]) -> str:
    """A measurement as plain text for the terminal; class names are made printable and short."""
    lines = [f"accuracy            {percent(measurement['top1'])}"]
    if "top5" in measurement:
        lines.append(f"top-5 accuracy      {percent(measurement['top5'])}")
    lines.append(f"mean over classes   {100 * measurement['mean_recall']:.1f} % (of their recalls)")
    lines.append(f"calibration error   {100 * measurement['ece']:.1f} % (expected, {NUM_BINS} bins)")
    lines.append(f"log loss, Brier     {measurement['nll']:.3f}, {measurement['brier']:.3f}")
    if learned := measurement.get("trained_on"):
        lines.append(f"note                it was trained on {learned:,} of these images: new ones are judged worse")
    elif measurement.get("trained_on", 0) is None:
        lines.append("note                the model does not say which images it was trained on")
    counts = {**measurement, "unreadable": len(measurement.get("unreadable", ()))}
    passed = [name for name in ("copies", "unlabeled", "unreadable") if counts.get(name)]
    lines += [f"{name:20}{counts[name]:,} images passed over" for name in passed]
    names = [printable(row["name"]) for row in measurement["per_class"]]
    names = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "~" for name in names]
    width = max([len(name) for name in names] + [5])
    lines += ["", f"{'class':{width}}  precision  recall      f1       n"]
    for name, row in zip(names, measurement["per_class"], strict=True):
        cells = [f"{100 * row[key]:.1f}" if row[key] is not None else "-" for key in ("precision", "recall", "f1")]
        lines.append(f"{name:{width}}  {cells[0]:>9}  {cells[1]:>6}  {cells[2]:>6}  {row['n']:>6,}")
    confusion = np.array(measurement["confusion"])  # (K, K)
    wrong = confusion - np.diag(np.diag(confusion))
    largest = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS]
    pairs = [(t, p) for t, p in zip(*np.unravel_index(largest, wrong.shape), strict=True) if wrong[t, p]]
    lines += [""] if pairs else []
    lines += [f"{names[t]} taken for {names[p]}: {wrong[t, p]:,} of {confusion[t].sum():,}" for t, p in pairs]
    return "\n".join(lines)
