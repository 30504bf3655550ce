"""Experiments with few labels, whose parts are made once and kept: pretrainings, fine-tuned networks, numbers.

A folder is a laboratory. Everything in it is named by the settings that made it, so a broken experiment goes on where
it was, and tables share their pretrainings. Stages, loop, loader and settings are those of `fewlabels fit`.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import io
import json
import struct
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from benchmarks import workload
from fewlabels import checkpoint, config, plan, random, recipes
from fewlabels.config import Recipe
from fewlabels.data import labels, views
from fewlabels.data.labels import Dataset
from fewlabels.data.loader import Batch
from fewlabels.data.pixels import survey
from fewlabels.data.source import Source
from fewlabels.data.sources import open_source
from fewlabels.errors import UsageError
from fewlabels.model.encoder import encoder
from fewlabels.model.heads import Classifier, ProjectionHead
from fewlabels.stages.distill import Distill
from fewlabels.stages.finetune import Finetune
from fewlabels.stages.loop import Stage
from fewlabels.stages.pretrain import Pretrain, PretrainWithMomentum, View
from fewlabels.use import compare, evaluate, propagate

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
SMALL, WORKING_SIZE = 48, {False: 96, True: 336}  # px, as the recipes have it; True: on a GPU
MOST_LABEL_STEPS = 1500  # of fine-tuning: with all labels 30 epochs would take most of a table's hour


@dataclass(frozen=True)
class Body:
    """A pretraining, by what tells it from others."""

    encoder: str
    layers: int = 3
    momentum: float = 0.0
    queue: int = 0
    views: int = 0  # of an image; 0 = the recipe's

    def __str__(self) -> str:
        memory = f", momentum {self.momentum:g}, queue {self.queue}" if self.momentum else ""
        return f"{self.encoder}, head of {self.layers}{memory}" + (f", {self.views} views" if self.views else "")


def images(name: str, *, train: int, test: int, seed: int = 0) -> Source:
    """The first `train` and `test` images of a set in random order, all labels known; 0 = all of them.

    name: "digits", "fashion", or a folder with train.parquet and test.parquet (`image`, `label`), or with train/ and
    val/, of which all are taken.
    """
    if name == "digits":
        return open_source("digits")
    if name == "fashion":
        return open_source(*_idx("train", train, seed), test=_idx("t10k", test, seed))
    if (Path(name) / "val").is_dir():
        return open_source(Path(name) / "train", test=Path(name) / "val")
    parts = Path(name) / "train.parquet", Path(name) / "test.parquet"
    return open_source(*_parquet(parts[0], train, seed), test=_parquet(parts[1], test, seed))


def _rows(there: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(there)[: count or there]


def _idx(part: str, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Pixels (N, H, W) and labels of some images of two idx files in MNIST's form."""
    with gzip.open(FASHION / f"{part}-images-idx3-ubyte.gz") as file:
        _, there, high, wide = struct.unpack(">4i", file.read(16))
        pixels = np.frombuffer(file.read(), np.uint8).reshape(there, high, wide)
    with gzip.open(FASHION / f"{part}-labels-idx1-ubyte.gz") as file:
        classes = np.frombuffer(file.read(), np.uint8, offset=8)
    rows = _rows(there, count, seed)
    return pixels[rows], [str(label) for label in classes[rows]]


def _parquet(path: Path, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Pixels (N, H, W, 3) and labels of some pictures of one shape."""
    read = pq.read_table(path, columns=["image", "label"])
    some = read.take(_rows(len(read), count, seed))
    pictures = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in some["image"].to_pylist()]
    return np.stack(pictures), [str(label) for label in some["label"].to_pylist()]


class Ensemble(nn.Module):
    """Teachers whose probabilities are averaged: (B, 3, H, W) -> their logarithm (B, K)."""

    def __init__(self, members: Sequence[Classifier]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    @property
    def encoder(self) -> nn.Module:
        """That of the first of them."""
        return self.members[0].encoder  # type: ignore[return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([member(x).softmax(dim=1) for member in self.members]).mean(dim=0).log()


def mixed(view: View) -> View:
    """view, each image with a random part of another one of the batch in it (mixup, arXiv 1710.09412)."""

    def mix(batch: Batch, number: int) -> torch.Tensor:
        seen = view(batch, number)
        drawn = random.uniforms(number, batch.epoch, batch.ids, stream=98, count=2)  # (B, 2)
        share = drawn[:, :1, None, None].to(seen.dtype)
        return seen.lerp(seen[drawn[:, 1].argsort()], share)

    return mix


class Lab:
    """One set of images, one recipe, one folder; see the file's docstring.

    Images that are not held out are all labeled; `few` hides labels. Pretrainings have seed 0, label draws their own.
    """

    def __init__(
        self, source: Source, folder: Path, *, epochs: float, distill_epochs: float, recipe: str = "best",
        changes: Sequence[str] = (), device: torch.device | None = None, on_gpu: bool | None = None,
        pool: Callable[[Dataset], Dataset] = lambda whole: whole,
        choose: Callable[[Dataset, str | int, int], Dataset] = labels.keep_labels,
    ) -> None:  # fmt: skip
        """changes: other values of the recipe, as "distill.batch=256" each. on_gpu: whether it is the recipe of a GPU,
        in place of whether it runs on one. pool: leaves images out of training. choose: the dataset with an amount of
        its labels, by the draw.
        """
        self.folder, self.device, self.choose = folder, device or torch.device("cpu"), choose
        self.on_gpu = self.device.type == "cuda" if on_gpu is None else on_gpu
        self.precision = workload.precision(self.device)
        self.side, self.gray = survey(source)
        working_size = None if self.side <= SMALL else min(self.side, WORKING_SIZE[self.on_gpu])
        self.dataset = pool(workload.stored(source, folder, working_size=working_size))
        self.epochs, self.distill_epochs, self.recipe_name = epochs, distill_epochs, recipe
        self.changes = nested(changes)
        self.general = self.recipe(len(self.dataset.labeled))
        self._keep_to({"recipe": asdict(self.general), "images": self.dataset.digest})
        self.setting = compare.Setting(self.general.size, self.general.kind, self.device, self.precision)
        self.truth = self.dataset.labels[self.dataset.held_out]
        self._draws: dict[tuple[str, int], Dataset] = {}

    def recipe(self, labeled: int) -> Recipe:
        """The recipe that `fewlabels fit` has for so many labels, with this laboratory's epochs and batch."""
        facts = recipes.Facts(
            images=len(self.dataset.train), labeled=labeled, classes=self.dataset.num_classes, side=self.side,
            gray=self.gray, on_gpu=self.on_gpu, threads=torch.get_num_threads(),
        )  # fmt: skip
        found = recipes.named(self.recipe_name, facts)
        lengths = {"pretrain": {"epochs": self.epochs}, "distill": {"epochs": self.distill_epochs}}
        return config.override(config.override(found, lengths), self.changes)

    # --- what is kept ---

    def _keep_to(self, settings: dict[str, Any]) -> None:
        """Refuse a folder whose numbers were made with other settings: their names do not tell all of them."""
        place = self.folder / "recipe.json"
        if place.exists() and json.loads(place.read_text()) != settings:
            raise UsageError(f"{self.folder} was made with other settings (recipe.json)", fix="give a new --out")
        checkpoint.write_json(place, settings)

    def cell(self, name: str, make: Callable[[], float]) -> float:
        """The number called name: the kept one, or that of make()."""
        place = self.folder / "cells.json"
        kept = json.loads(place.read_text()) if place.exists() else {}
        if name not in kept:
            began = time.perf_counter()
            value = make()
            kept = json.loads(place.read_text()) if place.exists() else {}  # make() may have kept others
            checkpoint.write_json(place, kept | {name: value})
            print(f"  {name}: {value:.2f}   ({time.perf_counter() - began:.0f} s)", flush=True)
            return value
        return float(kept[name])

    def kept(self, name: str, module: nn.Module, train: Callable[[], Any]) -> nn.Module:
        """module with the kept weights of that name, or after train()."""
        module.to(self.device)
        place = self.folder / "networks" / f"{hashlib.sha256(name.encode()).hexdigest()[:20]}.safetensors"
        place.parent.mkdir(exist_ok=True)
        if place.exists():
            module.load_state_dict(load_file(place))
        else:
            train()
            checkpoint.write_tensors(place, {key: value.cpu() for key, value in module.state_dict().items()})
        return self.precision.layout(module)

    # --- images ---

    def few(self, amount: str | int, draw: int) -> Dataset:
        """The images with only so many labels: "1%", or a number of them."""
        if (str(amount), draw) not in self._draws:
            self._draws[str(amount), draw] = self.choose(self.dataset, amount, draw)
        return self._draws[str(amount), draw]

    def accuracy(self, network: nn.Module, shares: np.ndarray | None = None) -> float:
        """% of the held-out images that a classifier gets right. shares: (K,), by which its answers are divided."""
        network.eval()
        (logits,) = compare.outputs(self.dataset, self.dataset.held_out, self.setting, lambda view: [network(view)])
        if shares is not None:
            logits = logits - np.log(shares)
        return 100 * float((logits.argmax(axis=1) == self.truth).mean())

    # --- the three stages ---

    def pretrained(self, body: Body) -> tuple[nn.Module, ProjectionHead]:
        """Encoder and head of a pretraining; of more views than two in fewer epochs, of small ones in more."""
        settings = self.general.pretrain
        count = body.views or settings.views
        settings = replace(settings, epochs=settings.epochs * 2 / count / self.general.resolution**2)
        torch.manual_seed(0)
        network = encoder(body.encoder)
        head = ProjectionHead(network.feature_dim, settings.head_out, body.layers)
        view = self.strong_view(0, self.general.pretrain_size)

        def train() -> None:
            stage: Stage = Pretrain(network, head, view=view, temperature=settings.temperature, num_views=count)
            if body.momentum:
                stage = PretrainWithMomentum(
                    network,
                    head,
                    view=view,
                    temperature=settings.temperature,
                    momentum=body.momentum,
                    queue=body.queue,
                    num_views=count,
                )
            self.train(stage, settings, self.dataset, self.dataset.train, 0)

        several = "" if count == 2 else f", {count} views of {settings.batch}, crops from {settings.smallest_crop:g}"
        several += f", resolution {self.general.resolution:g}" * (self.general.resolution != 1)
        self.kept(f"{body}, {self.epochs:g} epochs{several}", nn.ModuleDict({"encoder": network, "head": head}), train)
        return network, head

    def finetuned(self, body: Body, tap: int, amount: str | int, draw: int, *, start: str | None = None) -> Classifier:
        """A pretrained network after fine-tuning from a tap of its head. start: also "propagated", as `fewlabels fit`
        does up to propagate.FEW_LABELS a class.
        """
        few = self.few(amount, draw)
        settings = self.recipe(len(few.labeled)).finetune
        start = start or settings.start
        settings = replace(settings, tap=tap, start="zero" if start == "zero" else "probe")
        network, head = copy.deepcopy(nn.ModuleList(self.pretrained(body)))
        classifier = Classifier(network, head, tap=tap, num_classes=few.num_classes)

        def train() -> None:
            spread = compare.propagated(few, *self.pretrained(body), self.setting) if start == "propagated" else few
            if settings.start == "probe":
                self._start_from_probe(classifier, spread, propagate.STRENGTH if start == "propagated" else 0.1)
            self._on_labels(classifier, settings, spread, draw, count=len(few.labeled))

        name = f"finetuned {body}, {self.epochs:g} epochs, tap {tap}, {amount}, draw {draw}, from {start}"
        name += " and on propagated labels" * (start == "propagated")
        self.kept(name, classifier, train)
        return classifier

    def supervised(self, name: str, amount: str | int, draw: int) -> Classifier:
        """The same network from random weights, on the labels alone, three times the steps of fine-tuning."""
        few = self.few(amount, draw)
        classifier = self.fresh(name, draw)
        settings = plan.baseline(self.recipe(len(few.labeled)), len(few.labeled), 1)
        self.kept(
            f"supervised {name}, {amount}, draw {draw}", classifier,
            lambda: self._on_labels(classifier, settings, few, draw, longer=plan.BASELINE_LENGTH),
        )  # fmt: skip
        return classifier

    def distilled(
        self, name: str, teacher: Classifier | Ensemble, taught: str, few: Dataset, draw: int, *,
        ids: np.ndarray | None = None, label_weight: float = 0.0, body: Body | None = None, epochs: float | None = None,
        mixup: bool = False,
    ) -> Classifier:  # fmt: skip
        """A student called `name` of a teacher; taught names both what it learned from. body: pretrained start. mixup:
        both see images mixed with others of the batch.
        """
        settings = self.recipe(len(few.labeled)).distill
        settings = replace(settings, epochs=epochs or settings.epochs)
        student = self.fresh(name, draw)
        if body is not None:
            student = Classifier(
                copy.deepcopy(self.pretrained(body)[0]), None, tap=0, num_classes=self.dataset.num_classes
            )
        same = [tuple(p.shape) for p in teacher.encoder.parameters()] == [
            tuple(p.shape) for p in student.encoder.parameters()
        ]
        view = self.weak_view(3)
        stage = Distill(
            copy.deepcopy(teacher), student, view=mixed(view) if mixup else view, label_weight=label_weight,
            temperature=settings.self_temperature if same else settings.temperature,
        )  # fmt: skip
        ids = few.train if ids is None else ids
        # as many steps whatever the images are: few images are seen more often
        settings = replace(settings, epochs=settings.epochs * len(few.train) / len(ids))
        self.kept(f"distilled {name}, {taught}", student, lambda: self.train(stage, settings, few, ids, draw))
        return student

    def fresh(self, name: str, draw: int) -> Classifier:
        """Encoder `name` from random weights, the same for all rows of a draw, and a classifier at zero."""
        torch.manual_seed(1000 + draw)
        return Classifier(encoder(name), None, tap=0, num_classes=self.dataset.num_classes)

    def _start_from_probe(self, network: Classifier, few: Dataset, strength: float) -> None:
        """The classifier becomes the logistic regression on what it sees of the labeled images."""
        network.to(self.device).eval()
        (features,) = compare.outputs(few, few.labeled, self.setting, lambda view: [network.features(view)])
        known = few.labels[few.labeled]
        fitted = evaluate.logistic_regression(features, known, num_classes=few.num_classes, strength=strength)
        with torch.no_grad():
            for mine, found in zip((network.linear.weight, network.linear.bias), fitted.linear(), strict=True):
                mine.copy_(torch.from_numpy(found))

    def _on_labels(
        self, classifier: Classifier, settings: Any, few: Dataset, draw: int, *, longer: int = 1, count: int = 0
    ) -> None:
        """Fine-tuning on the labeled images of few, in as many steps as for `count` of them."""
        derived = plan.derive(settings, count or len(few.labeled), 1)
        steps = derived.total_steps * min(1.0, longer * MOST_LABEL_STEPS / derived.total_steps)
        settings = replace(settings, batch=derived.batch, epochs=(steps - 0.5) * derived.batch / len(few.labeled))
        self.train(Finetune(classifier, view=self.weak_view(2)), settings, few, few.labeled, draw)

    def train(self, stage: Stage, settings: Any, dataset: Dataset, ids: np.ndarray, seed: int) -> None:
        """All steps of a stage on the images ids."""
        derived = plan.derive(settings, len(ids), 1)
        workload.trained(stage, settings, derived, self.precision, dataset, ids, seed, self.device)

    def view(self, make: Callable[..., torch.Tensor], stream: int, **more: Any) -> Any:
        """make (of fewlabels.data.views) for this laboratory's images, with random numbers of its own a stream."""
        settings = {"size": self.general.size, "kind": self.general.kind, "seed": stream << 32} | more
        return workload.viewer(make, self.precision, **settings)

    def weak_view(self, stream: int) -> Any:
        """The view of stages 2 and 3, as the recipe has it."""
        return self.view(views.finetune, stream, smallest_crop=self.general.finetune.smallest_crop)

    def strong_view(self, stream: int, size: int | None = None) -> Any:
        """The view of pretraining, as the recipe has it, of `size` pixels in place of all."""
        settings = self.general.pretrain
        return self.view(
            views.pretrain, stream, size=size or self.general.size, strength=settings.strength, blur=settings.blur,
            smallest_crop=settings.smallest_crop,
        )  # fmt: skip

    # --- without training ---

    def linear(self, body: Body, amount: str | int, draw: int, tap: int = 0) -> float:
        """% right of logistic regression on the frozen features of a tap."""
        see = compare.tapped(*self.pretrained(body))
        return self.regressed(lambda view: [see(view)[tap]], amount, draw)

    def regressed(self, see: Callable[[torch.Tensor], list[torch.Tensor]], amount: str | int, draw: int) -> float:
        """% right of logistic regression on what `see` makes of a view."""
        few = self.few(amount, draw)
        known, held = (compare.outputs(few, ids, self.setting, see)[0] for ids in (few.labeled, few.held_out))
        fitted = evaluate.logistic_regression(known, few.labels[few.labeled], num_classes=few.num_classes)
        return 100 * float((fitted.predict_proba(held).argmax(axis=1) == self.truth).mean())


def nested(changes: Sequence[str]) -> dict[str, Any]:
    """["distill.batch=256"] as config.override takes it; values are in TOML, or a text."""
    found: dict[str, Any] = {}
    for change in changes:
        name, _, value = change.partition("=")
        try:
            told = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            told = value
        section, _, knob = name.rpartition(".")
        (found.setdefault(section, {}) if section else found)[knob] = told
    return found


def mean_and_spread(values: Sequence[float]) -> str:
    """As a cell of a table: "54.3 (1.2)"; of one value only that."""
    return f"{np.mean(values):.1f}" + (f" ({np.std(values, ddof=1):.1f})" if len(values) > 1 else "")
