"""Ways to pretrain, at equal compute: which gives the better features for few labels?

    python -m benchmarks.pretraining --data FOLDER --ways "NT-Xent" "decoupled" --seeds 3 --out runs/pretraining

All ways pretrain the same network from the same weights on the same images; compute is counted in pixels that go
forward and backward through the network (a momentum encoder's forward is a third of that). Measured by logistic
regression on frozen features, 3 draws of labels, on held-out images. What is made is kept in --out: a broken command
goes on.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import harness, lab
from benchmarks.lab import Lab, mean_and_spread
from fewlabels.data import views
from fewlabels.data.loader import Batch
from fewlabels.model.encoder import Encoder, encoder
from fewlabels.model.heads import ProjectionHead
from fewlabels.model.losses import nt_xent
from fewlabels.stages.loop import follow
from fewlabels.stages.pretrain import Pretrain, View
from fewlabels.use import compare, evaluate

DRAWS = 3
TAPS = (0, 1, 2)
BEFORE = ("adamw", 2e-3)  # of photos: what all ways were compared with before Muon
TCR_EPS, TCR_INVARIANCE = 0.2, 200.0  # EMP-SSL (arXiv 2304.03977)

Loss = Callable[[Tensor, float], Tensor]  # projections (V, B, D), temperature -> ()


def by_pairs(z: Tensor, temperature: float) -> Tensor:
    """NT-Xent of every two of V views, in the mean: the product's."""
    return torch.stack([nt_xent(a, b, temperature) for a, b in itertools.combinations(z, 2)]).mean()


def decoupled(z: Tensor, temperature: float) -> Tensor:
    """Each other view of the image is a positive in turn, and none of them is among what an anchor is compared with
    (arXiv 2110.06848).
    """
    images = z.shape[1]
    flat = functional.normalize(z.float().flatten(0, 1), dim=1)
    similar = flat @ flat.T / temperature  # (V B, V B)
    number = torch.arange(len(flat), device=z.device) % images
    same = number[:, None] == number
    own = torch.eye(len(flat), dtype=torch.bool, device=z.device)
    return (similar.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True) - similar)[same & ~own].mean()


def coding_rate(z: Tensor, temperature: float) -> Tensor:
    """Total coding rate of each view's projections, and each view near the mean of its image (EMP-SSL)."""
    del temperature
    z = functional.normalize(z.float(), dim=2)
    _, images, width = z.shape
    spread = torch.eye(width, device=z.device) + width / (images * TCR_EPS) * z.transpose(1, 2) @ z
    near = functional.cosine_similarity(z, z.mean(dim=0, keepdim=True), dim=2).mean()
    return -0.5 * torch.logdet(spread).mean() - TCR_INVARIANCE * near


class Ways(Pretrain):
    """Pretraining by another loss."""

    def __init__(self, body: Encoder, head: ProjectionHead, *, loss: Loss, **more: Any) -> None:
        super().__init__(body, head, **more)
        self.loss = loss

    def compare(self, projections: Tensor, keys: Tensor | None) -> dict[str, Tensor]:
        del keys
        z = torch.stack(projections.chunk(self.num_views))
        with torch.autocast(z.device.type, enabled=False):
            return {"loss": self.loss(z, self.temperature)}


class Momentum(Pretrain):
    """The prediction of a view's key by another view: keys are a moving average's, of the batch alone (MoCo v3, arXiv
    2104.02057).
    """

    def __init__(self, body: Encoder, head: ProjectionHead, *, momentum: float, **more: Any) -> None:
        super().__init__(body, head, **more)
        self.momentum = momentum
        self.average = copy.deepcopy(nn.ModuleList([body, head])).requires_grad_(False)
        wide, narrow = head.in_features, head.out_features
        self.predictor = nn.Sequential(
            nn.Linear(narrow, wide, bias=False), nn.BatchNorm1d(wide), nn.ReLU(), nn.Linear(wide, narrow)
        )

    def look(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        seen = self.views(batch)
        with torch.no_grad():
            keys = self.average[1](self.average[0](seen))
        return self.predictor(self.project(seen)), keys

    def compare(self, projections: Tensor, keys: Tensor | None) -> dict[str, Tensor]:
        assert keys is not None
        asked, told = (functional.normalize(z.float(), dim=1).chunk(self.num_views) for z in (projections, keys))
        own = torch.arange(len(told[0]), device=projections.device)
        losses = [
            functional.cross_entropy(asked[a] @ told[b].T / self.temperature, own)
            for a, b in itertools.permutations(range(self.num_views), 2)
        ]
        return {"loss": torch.stack(losses).mean()}

    def after_step(self) -> None:
        follow(self.average, nn.ModuleList([self.encoder, self.head]), 1 - self.momentum)


class SmallCrops(Pretrain):
    """Views of full size and small ones (SwAV, arXiv 2006.09882): NT-Xent of every two of which one is of full size."""

    def __init__(self, body: Encoder, head: ProjectionHead, *, small: int, small_view: View, **more: Any) -> None:
        super().__init__(body, head, **more)
        self.small, self.small_view = small, small_view

    def look(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        few = torch.cat([self.small_view(batch, self.num_views + number) for number in range(self.small)])
        features = torch.cat([self.encoder(self.views(batch)), self.encoder(few)])
        return self.head(features), None

    def compare(self, projections: Tensor, keys: Tensor | None) -> dict[str, Tensor]:
        del keys
        z = projections.chunk(self.num_views + self.small)
        pairs = [(a, b) for a, b in itertools.combinations(range(len(z)), 2) if a < self.num_views]
        return {"loss": torch.stack([nt_xent(z[a], z[b], self.temperature) for a, b in pairs]).mean()}


@dataclass(frozen=True)
class Way:
    """A way to pretrain: its loss, and what differs from the recipe."""

    loss: Loss = by_pairs
    count: int = 2  # views of an image
    batch: int = 256
    strength: float | None = None
    area: float = views.AREA_DRAWN  # smallest crop
    kind: str | None = None  # of images (views.KINDS)
    photo: bool = False  # optimiser and temperature as for photos
    optimizer: tuple[str, float] | None = None  # and its learning rate; None: BEFORE for photos, else the recipe's
    temperature: float | None = None
    size: float = 1.0  # side of the views, in parts of that of evaluation
    small: int = 0  # more views of half the side
    small_area: float = 0.1  # their smallest crop
    momentum: float = 0.0  # of the encoder that makes the keys

    @property
    def cost(self) -> float:
        """Of an image, in views of full size that go forward and backward."""
        return (self.count + self.small / 4) * self.size**2 * (4 / 3 if self.momentum else 1)


RECIPE: dict[str, Any] = {"count": 4, "batch": 64, "area": 0.25, "size": 0.75}  # for small photos on a CPU
WAYS = {
    "NT-Xent": Way(),
    "batch 128": Way(batch=128),
    "batch 64": Way(batch=64),
    "decoupled": Way(decoupled),
    "decoupled, batch 128": Way(decoupled, batch=128),
    "decoupled, 4 views of 64": Way(decoupled, count=4, batch=64),
    "coding rate, 4 views of 64": Way(coding_rate, count=4, batch=64),
    "4 views of 64": Way(count=4, batch=64),
    "crops from 0.25": Way(area=0.25),
    "batch 128, crops from 0.25": Way(batch=128, area=0.25),
    "batch 128, crops from 0.4": Way(batch=128, area=0.4),
    "batch 128, crops from 0.25, strength 0.25": Way(batch=128, area=0.25, strength=0.25),
    "4 views of 64, crops from 0.25": Way(count=4, batch=64, area=0.25),
    "4 views of 64, crops from 0.25, strength 0.25": Way(count=4, batch=64, area=0.25, strength=0.25),
    "4 views of 64, crops from 0.25, strength 0": Way(count=4, batch=64, area=0.25, strength=0.0),
    "4 views of 64, crops from 0.4": Way(count=4, batch=64, area=0.4),
    "8 views of 32, crops from 0.25": Way(count=8, batch=32, area=0.25),
    "4 views of 64, crops from 0.25, keys of momentum 0.99": Way(count=4, batch=64, area=0.25, momentum=0.99),
    "128 images, crops from 0.25, keys of momentum 0.99": Way(batch=128, area=0.25, momentum=0.99),
    "2 views and 4 small ones of 64, crops from 0.25": Way(batch=64, area=0.25, small=4),
    "4 views of 64 of 3/4 the side, crops from 0.25": Way(count=4, batch=64, area=0.25, size=0.75),
    "4 views of 64 of 3/4 the side, crops from 0.4": Way(count=4, batch=64, area=0.4, size=0.75),
    "4 views of 64 of half the side, crops from 0.25": Way(count=4, batch=64, area=0.25, size=0.5),
    "the recipe's views, AdamW at 0.005": Way(**RECIPE, optimizer=("adamw", 5e-3)),
    "the recipe's views, AdamW at 0.01": Way(**RECIPE, optimizer=("adamw", 1e-2)),
    "the recipe's views, Muon at 0.002": Way(**RECIPE, optimizer=("muon", 2e-3)),
    "the recipe's views, Muon at 0.005": Way(**RECIPE, optimizer=("muon", 5e-3)),
    "the recipe's views, Muon at 0.01": Way(**RECIPE, optimizer=("muon", 1e-2)),
    "the recipe's views, Muon at 0.02": Way(**RECIPE, optimizer=("muon", 2e-2)),
    "as photos": Way(photo=True),
    "as photos, 4 views of 64": Way(count=4, batch=64, photo=True),
    "gray": Way(area=0.25, kind="gray"),
    "gray as photos, 4 views of 64": Way(count=4, batch=64, area=0.25, kind="gray", photo=True),
}


class Trial:
    """The numbers of one way and one seed."""

    def __init__(self, laboratory: Lab, name: str, seed: int) -> None:
        self.lab, self.name, self.way, self.seed = laboratory, name, WAYS[name], seed

    def features(self) -> tuple[nn.Module, ProjectionHead]:
        """Encoder and head."""
        way, settings = self.way, self.lab.general.pretrain
        photos = way.photo or self.lab.general.kind == "photo"
        if told := way.optimizer or (BEFORE if photos else None):
            settings = replace(settings, optimizer=told[0], learning_rate=told[1], scaling="none")
        if way.photo:
            settings = replace(settings, temperature=0.2)
        torch.manual_seed(self.seed)
        body = encoder(self.lab.general.encoder)
        head = ProjectionHead(body.feature_dim, settings.head_out, settings.head_layers)
        strength = settings.strength if way.strength is None else way.strength
        size = round(way.size * self.lab.general.size)
        view = partial(
            self.lab.view, views.pretrain, self.seed, strength=strength, blur=settings.blur,
            kind=way.kind or self.lab.general.kind,
        )  # fmt: skip
        make: Callable[..., Pretrain] = partial(Ways, loss=way.loss)
        if way.momentum:
            make = partial(Momentum, momentum=way.momentum)
        elif way.small:
            make = partial(SmallCrops, small=way.small, small_view=view(size=size // 2, smallest_crop=way.small_area))
        stage = make(
            body, head, num_views=way.count, temperature=way.temperature or settings.temperature,
            view=view(size=size, smallest_crop=way.area),
        )  # fmt: skip
        settings = replace(settings, epochs=settings.epochs * 2 / way.cost, batch=way.batch)

        def train() -> None:
            self.lab.train(stage, settings, self.lab.dataset, self.lab.dataset.train, self.seed)

        name = f"{self.name}, {self.lab.epochs:g} epochs, seed {self.seed}"
        self.lab.kept(name, nn.ModuleDict({"encoder": body, "head": head}), train)
        return body, head

    def numbers(self, amounts: list[int]) -> dict[str, list[float]]:
        """% right of logistic regression, by labels and tap, a number a draw."""
        found: dict[str, list[float]] = {}
        trial = f"{self.name}, {self.lab.epochs:g} epochs, seed {self.seed}"
        for amount in amounts:
            for tap in TAPS:
                found[f"{amount}, tap {tap}"] = [
                    self.lab.cell(
                        f"{trial}, {amount} labels, tap {tap}, draw {n}", partial(self._probed, amount, tap, n)
                    )
                    for n in range(DRAWS)
                ]
        return found

    def _seen(self) -> list[np.ndarray]:
        """The features (N, F) of all images, by tap."""
        if not hasattr(self, "_kept"):
            see = compare.tapped(*self.features())
            ids = np.arange(len(self.lab.dataset.labels))
            setting = replace(self.lab.setting, kind=self.way.kind or self.lab.general.kind)
            self._kept = compare.outputs(self.lab.dataset, ids, setting, see)
        return self._kept

    def _probed(self, amount: int, tap: int, draw: int) -> float:
        few, seen = self.lab.few(amount, draw), self._seen()[tap]
        fitted = evaluate.logistic_regression(seen[few.labeled], few.labels[few.labeled], num_classes=few.num_classes)
        return 100 * float((fitted.predict_proba(seen[few.held_out]).argmax(axis=1) == self.lab.truth).mean())


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, fashion, or a folder with train and test.parquet")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--labels", type=int, nargs="+", default=[40, 250, 4000])
    parser.add_argument("--train", type=int, default=10_000, help="training images")
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/pretraining"))
    asked = parser.parse_args()
    source = lab.images(asked.data, train=asked.train, test=10_000)
    laboratory = Lab(source, asked.out, epochs=asked.epochs, distill_epochs=1.0)
    rows: dict[str, dict[str, list[list[float]]]] = {}
    for seed in range(asked.seeds):
        for name in asked.ways:
            for column, values in Trial(laboratory, name, seed).numbers(asked.labels).items():
                rows.setdefault(name, {}).setdefault(column, []).append(values)
    for name, columns in rows.items():
        print(name, *(mean_and_spread([float(np.mean(v)) for v in values]) for values in columns.values()), sep="  ")
    harness.keep_beside(f"pretraining-{Path(asked.data).name}", vars(asked), rows)


if __name__ == "__main__":
    main()
