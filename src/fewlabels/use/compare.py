"""The method beside its cheap baselines, on the same held-out images: results.json and evaluation.npz.

Baselines: the most frequent class, logistic regression on raw pixels and on the frozen features at every tap of the
head, and the same network trained on the labels alone. Nothing here chooses anything: each row is the last
checkpoint of its stage, and held-out images are only counted.

Shapes: N images, D features, K classes, M points of the map.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor, nn

from fewlabels import checkpoint, runtime
from fewlabels.data import views
from fewlabels.data.labels import TEST, Dataset
from fewlabels.data.loader import in_order
from fewlabels.model.heads import Classifier, ProjectionHead
from fewlabels.use import evaluate, propagate

Floats = npt.NDArray[np.float32]

BATCH = 256
LARGEST_PIXELS = 32  # raw pixels are compared at up to this side: more only adds noise to 20 labels
MAP_POINTS = 1000
LATENCY_RUNS = 30
NAMES = {
    "finetune": "fine-tuned",
    "distill_self": "distilled into the same network",
    "distill": "distilled student",
    "supervised": "same network, labels alone",
}
SELF_TRAINED = "self-trained"  # in place of distilled
FLOWING_CLASSES = 100  # times folds that labels flow for: a thousand classes take 100 times as long as ten
SURE = 0.95  # the probability from which its answers are taken for sure


@dataclass(frozen=True)
class Setting:
    """How images become features: the evaluation view, the device and the number format."""

    size: int
    kind: str
    device: torch.device
    precision: runtime.Precision


def outputs(
    dataset: Dataset, ids: np.ndarray, setting: Setting, function: Callable[[Tensor], list[Tensor]]
) -> list[Floats]:
    """function on the evaluation views of images `ids`, each of its results as one float32 array (N, ...).

    Blocks that were compiled for training run as they are written: each new size of a batch would compile them anew
    (24 of the 152 s of a run on digits with one epoch).
    """
    parts: list[list[Tensor]] = []
    with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
        for batch in in_order(dataset, ids, batch=BATCH, device=setting.device):
            view = views.evaluate(batch.pixels, batch.extent, size=setting.size, kind=setting.kind)
            with torch.no_grad(), setting.precision.context(setting.device):
                parts.append([part.float().cpu() for part in function(view)])
    return [torch.cat(column).numpy() for column in zip(*parts, strict=True)]


def tapped(encoder: nn.Module, head: ProjectionHead | None) -> Callable[[Tensor], list[Tensor]]:
    """The encoder's features and the output of every layer of the head: taps 0, 1, ..."""
    encoder.eval()
    layers = list(head.eval().layers) if head is not None else []
    return lambda view: list(accumulate(layers, lambda below, layer: layer(below), initial=encoder(view)))


def known_features(dataset: Dataset, encoder: nn.Module, setting: Setting) -> tuple[Floats, np.ndarray]:
    """Frozen features (n, D) of labeled training images, of some where there are very many, and their labels (n,).

    Identical ones once: left out of a fit, one would be told by the other.
    """
    encoder.eval()
    ids = evaluate.sampled(dataset.once(dataset.labeled), evaluate.PROBED_IMAGES)
    (features,) = outputs(dataset, ids, setting, lambda view: [encoder(view)])
    return features, dataset.labels[ids]


def propagated(dataset: Dataset, encoder: nn.Module, head: ProjectionHead | None, setting: Setting) -> Dataset:
    """The images, some of whose training images have the class that labels give them over the projections' graph."""
    labeled, (ids, projections) = dataset.labeled, _projected(dataset, encoder, head, setting)
    known = dataset.labels[ids]
    given = propagate.propagate(projections, known, dataset.num_classes) if runtime.is_main() else known
    given = runtime.from_main(given)
    told = evaluate.sampled(np.flatnonzero(given[len(labeled) :] >= 0) + len(labeled), propagate.FITTED_IMAGES)
    labels = dataset.labels.copy()
    labels[ids[told]] = given[told]
    return replace(dataset, labels=labels)


def _projected(
    dataset: Dataset, encoder: nn.Module, head: ProjectionHead | None, setting: Setting
) -> tuple[np.ndarray, Floats]:
    """The images of the neighbour graph, labeled ones first, and the head's output (N, D) for each."""
    others = evaluate.sampled(np.setdiff1d(dataset.train, dataset.labeled), propagate.MOST_IMAGES)
    ids, see = np.concatenate([dataset.labeled, others]), tapped(encoder, head)
    (projections,) = outputs(dataset, ids, setting, lambda view: see(view)[-1:])
    return ids, projections


def feature_scores(dataset: Dataset, encoder: nn.Module, setting: Setting) -> dict[str, float]:
    """kNN and linear accuracy of frozen features on labeled training images, each left out in its turn."""
    features, known = known_features(dataset, encoder, setting)
    linear = evaluate.cross_validated(features, known)["accuracy"]
    scores = {"knn": evaluate.nearest_neighbours(features, known), "linear": linear}
    return {name: value for name, value in scores.items() if value is not None}


# --- rows of the table ---------------------------------------------------------------------------------------


def row(key: str, name: str, measured: Mapping[str, Any] | None, **facts: Any) -> dict[str, Any]:
    """One row of results.json; measured is what evaluate.measure or cross_validated returned."""
    top1 = (measured or {}).get("top1", measured) or {"accuracy": None, "interval": None}
    low, high = top1["interval"] or (None, None)
    numbers = {
        "accuracy": top1["accuracy"], "low": low, "high": high, "n": measured["n"] if measured else 0,
        "ece": measured.get("ece") if measured else None,
    }  # fmt: skip
    empty = {"parameters": None, "megabytes": None, "latency_ms": None, "note": ""}
    cross_validated = measured is not None and "top1" not in measured
    return {"key": key, "name": name, **numbers, "cross_validated": cross_validated, **empty, **facts}


def costs(network: nn.Module, setting: Setting) -> dict[str, Any]:
    """Parameters, size on disk as float32, and the median milliseconds for one image on this machine."""
    parameters = sum(p.numel() for p in network.parameters())
    bytes_on_disk = 4 * sum(t.numel() for t in network.state_dict().values())
    image = torch.rand(1, 3, setting.size, setting.size, device=setting.device)
    network.eval()
    times = []
    with torch.no_grad():
        for _ in range(LATENCY_RUNS + 3):
            began = time.perf_counter()
            network(image).cpu()
            times.append(time.perf_counter() - began)
    return {
        "parameters": parameters, "megabytes": bytes_on_disk / 1e6, "latency_ms": 1000 * float(np.median(times[3:])),
    }  # fmt: skip


class Comparison:
    """Collects rows on one dataset: measured on held-out images where there are any, else cross-validated."""

    def __init__(
        self, dataset: Dataset, setting: Setting, names: Mapping[str, str] = NAMES, *, learned_before: bool = False
    ) -> None:
        self.dataset, self.setting, self.names, self.learned_before = dataset, setting, names, learned_before
        self.labeled, self.held = evaluate.sampled(dataset.labeled, evaluate.FITTED_IMAGES), dataset.held_out
        fewer = len(self.labeled) < len(dataset.labeled)
        self.fitted_on = f"fitted on {len(self.labeled):,} of the labels" if fewer else ""
        self.known, self.truth = dataset.labels[self.labeled], dataset.labels[self.held]
        once = np.flatnonzero(np.isin(self.labeled, dataset.once(self.labeled)))
        self.once = evaluate.sampled(once, evaluate.PROBED_IMAGES)  # of known, to cross-validate
        self.expected: float | None = None  # accuracy of the next network
        self.rows: list[dict[str, Any]] = []

    def measure(self, probabilities: Floats) -> dict[str, Any]:
        """Predictions of the held-out images against their labels."""
        return evaluate.measure(probabilities, self.truth, self.dataset.classes)

    def expect(self, known: list[Floats]) -> None:
        """Expect the cross-validated accuracy of logistic regression inside the labels, the mean over several features
        of them.
        """
        told = [evaluate.cross_validated(features[self.once], self.known[self.once])["accuracy"] for features in known]
        count = len(self.once)
        self.expected = _careful(float(np.mean(told)) * count, count) if None not in told else None

    def expect_of_spread(self, encoder: nn.Module, head: ProjectionHead | None) -> None:
        """Expect what labels give each other over the neighbour graph, where they were spread over it."""
        classes, labeled = self.dataset.num_classes, self.dataset.labeled
        ids, projections = _projected(self.dataset, encoder, head, self.setting)
        places = np.flatnonzero(np.isin(labeled, self.dataset.once(labeled)))
        known = np.full(len(ids), -1)
        known[places] = self.dataset.labels[labeled[places]]  # a copy of a labeled image would tell it
        folds = [places[rows] for rows in evaluate.folds(known[places])]
        folds = folds[: max(1, FLOWING_CLASSES // classes)]  # with many classes one fold holds many labels
        if folds:
            self.expected = _careful(*propagate.left_out(projections, known, classes, folds))

    def most_frequent(self) -> None:
        """Always the class with the most labels."""
        shares = evaluate.most_frequent(self.dataset.labels[self.dataset.labeled], self.dataset.num_classes)
        measured = self.measure(np.repeat(shares[None], len(self.truth), axis=0)) if len(self.held) else None
        self.rows.append(row("most_frequent", "most frequent class", measured))

    def logistic(
        self, key: str, name: str, function: Callable[[Tensor], list[Tensor]], *, learned: bool = True
    ) -> list[Floats]:
        """Logistic regression on each result of function; {index} in key and name counts them. Of learned ones that may
        have learned these labels before, cross-validation inside them says nothing.

        Returns the results of function for the labeled images that it was fitted on, (N, D) each.
        """
        known = outputs(self.dataset, self.labeled, self.setting, function)
        held = outputs(self.dataset, self.held, self.setting, function) if len(self.held) else known
        for index, (fit_on, tell) in enumerate(zip(known, held, strict=True)):
            if len(self.held):
                fitted = evaluate.logistic_regression(fit_on, self.known, num_classes=self.dataset.num_classes)
                measured = self.measure(fitted.predict_proba(tell))
            elif not (learned and self.learned_before):
                measured = evaluate.cross_validated(fit_on[self.once], self.known[self.once])
            else:
                measured = None
            note = self.fitted_on if measured else "the given model may have learned these labels"
            self.rows.append(row(key.format(index=index), name.format(index=index), measured, note=note))
        return known

    def network(self, key: str, network: Classifier) -> tuple[Any, Floats, float]:
        """A trained classifier: its measurement, its probabilities (N, K) of the held-out images, its temperature.

        Trained on soft targets or for a few steps, a network says nothing of how sure to be (54 % calibration error
        on digits). With labels too few to hold out, its temperature is the one at which its mean confidence on
        training images, unlabeled ones where there are some, since it knows the others by heart (digits, 100 labels
        of 300: calibration error 26 %, without them 21), equals the accuracy that is expected of it. A self-trained
        network may be far better than frozen features: it is expected to be right as often as it is sure, if that is
        more, but never surer than it is (digits, 20 labels: sure 94 to 97 %, right 97 to 99; Fashion-MNIST, 40 labels:
        sure 78 to 85 %, right 67 to 74; 289 digits, 100 to 1: sure 100 %, right 97), and so is its student.
        """
        network.eval()
        others = np.setdiff1d(self.dataset.train, self.dataset.labeled)
        some = others if len(others) >= evaluate.LEAST_UNLABELED else self.dataset.train
        some = evaluate.sampled(some, evaluate.CALIBRATION_IMAGES)
        (logits,) = outputs(self.dataset, some, self.setting, lambda view: [network(view)])
        if self.names[key] == SELF_TRAINED and not self.learned_before:
            sure = torch.from_numpy(logits).softmax(dim=1).amax(dim=1)
            share = (sure >= SURE).float().mean()  # of small pools all, of whose answers it would be made certain
            self.expected = max(self.expected or 0.0, float(min(share, sure.mean()))) or None
        temperature = evaluate.temperature_for_confidence(logits, self.expected)
        measured, probabilities = None, np.zeros((0, self.dataset.num_classes), dtype=np.float32)
        if len(self.held):
            softened = lambda view: [(network(view).float() / temperature).softmax(dim=1)]  # noqa: E731
            (probabilities,) = outputs(self.dataset, self.held, self.setting, softened)
            measured = self.measure(probabilities)
        name = self.names[key] if key != "finetune" or len(self.labeled) else "the given model"
        self.rows.append(row(key, name, measured, **costs(network, self.setting)))
        return measured, probabilities, temperature


def _careful(right: float, of: int) -> float:
    """(right + 1) / (of + 2), Laplace's rule: 20 labels all right do not make a network certain."""
    return (right + 1) / (of + 2)


def pixels_as_features(view: Tensor) -> list[Tensor]:
    """(N, 3, S, S) -> (N, 3 * s * s) with s = min(S, LARGEST_PIXELS)."""
    small = nn.functional.adaptive_avg_pool2d(view, min(view.shape[-1], LARGEST_PIXELS))
    return [small.flatten(1)]


def compare(
    dataset: Dataset, pretrained: tuple[nn.Module, ProjectionHead | None], networks: Mapping[str, Classifier],
    final: str, setting: Setting, names: Mapping[str, str] = NAMES, *, spread: bool = False,
    learned_before: bool = False,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:  # fmt: skip
    """Every row of the table, and the arrays that the report draws.

    final: the key of the deployed network. spread: whether labels were spread over the neighbour graph before
    fine-tuning. learned_before: whether the pretrained network may have learned them already.
    """
    comparison = Comparison(dataset, setting, names, learned_before=learned_before)
    measured, probabilities, temperature = None, np.zeros((0, dataset.num_classes), dtype=np.float32), 1.0
    if len(comparison.labeled):
        comparison.most_frequent()
        comparison.logistic("pixels_logistic", "logistic regression on pixels", pixels_as_features, learned=False)
        if "supervised" in networks:
            comparison.network("supervised", networks["supervised"])
        elif "finetune" in networks:
            comparison.rows.append(row("supervised", names["supervised"], None, note="not trained: nothing held out"))
        taps = "tap{index}_logistic", "logistic regression on frozen features, tap {index}", tapped(*pretrained)
        known = comparison.logistic(*taps)
        if not learned_before:
            comparison.expect(known)
        if spread and "finetune" in networks:
            comparison.expect_of_spread(*pretrained)
    for key in ("finetune", "distill_self", "distill"):
        if key in networks:
            found = comparison.network(key, networks[key])
            if key == final:
                measured, probabilities, temperature = found
    held = comparison.held
    split = "test" if (dataset.splits[held] == TEST).all() else "val"
    results: dict[str, Any] = {
        "format_version": checkpoint.FORMAT_VERSION,
        "classes": list(dataset.classes),
        "held_out": {"n": len(held), "split": split} if len(held) else None,
        "rows": comparison.rows,
        "final": final,
        "measurement": measured,
        "temperature": temperature,
        "labels_used": len(dataset.labeled),
        "images_used": len(dataset.train),
    }
    body = networks[final].features if final in networks else pretrained[0].eval()
    points, of = feature_map(dataset, held if len(held) else dataset.train, setting, body)
    arrays: dict[str, np.ndarray] = {"ids": held, "labels": comparison.truth, "probabilities": probabilities}
    return results, arrays | {"map": points, "map_labels": of}


def feature_map(
    dataset: Dataset, ids: np.ndarray, setting: Setting, body: Callable[[Tensor], Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """(M, 2) places of up to MAP_POINTS images by t-SNE of body's features, and their labels (M,)."""
    ids = evaluate.sampled(ids, MAP_POINTS)
    (features,) = outputs(dataset, ids, setting, lambda view: [body(view)])
    if len(ids) < 10 or np.ptp(features, axis=0).max() < 1e-6:  # t-SNE of points in one place is a segmentation fault
        return np.zeros((0, 2), dtype=np.float32), np.zeros(0, dtype=np.int64)
    features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-6)
    flat = PCA(min(30, *features.shape), random_state=0).fit_transform(features)
    perplexity = min(30.0, (len(ids) - 1) / 3)
    places = TSNE(2, perplexity=perplexity, init="pca", random_state=0, max_iter=500).fit_transform(flat)
    return places.astype(np.float32), dataset.labels[ids]


def write(run: Path, results: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """results.json and evaluation.npz, each replaced by one rename."""
    temporary = run / ".evaluation.tmp.npz"
    with checkpoint.storage_errors(run):
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
        temporary.replace(run / "evaluation.npz")
    checkpoint.write_json(run / "results.json", results)
