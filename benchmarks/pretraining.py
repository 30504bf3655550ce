"""Ways to pretrain, at equal compute: which gives the better features for few labels?

    python -m benchmarks.pretraining --data FOLDER --ways "NT-Xent" "decoupled" --seeds 3 --out runs/pretraining

All ways pretrain the same network from the same weights on the same images; compute is counted in views that go
forward and backward through the network. Measured by logistic regression on frozen features, 3 draws of labels, on
held-out images. What is made is kept in --out: a broken command goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
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
from fewlabels.model.encoder import Encoder, encoder
from fewlabels.model.heads import ProjectionHead
from fewlabels.model.losses import nt_xent
from fewlabels.stages.pretrain import Pretrain
from fewlabels.use import compare, evaluate

DRAWS = 3
TAPS = (0, 1, 2)
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


@dataclass(frozen=True)
class Way:
    """A way to pretrain: its loss, and what differs from the recipe."""

    loss: Loss = by_pairs
    count: int = 2  # views of an image
    batch: int = 256
    strength: float | None = None
    area: float = views.AREA_DRAWN  # smallest crop
    kind: str | None = None  # of images (views.KINDS)
    photo: bool = False  # optimiser and temperature that the recipe has for photos


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
        if way.photo:
            settings = replace(settings, optimizer="adamw", learning_rate=2e-3, scaling="none", temperature=0.2)
        torch.manual_seed(self.seed)
        body = encoder(self.lab.general.encoder)
        head = ProjectionHead(body.feature_dim, settings.head_out, settings.head_layers)
        strength = settings.strength if way.strength is None else way.strength
        stage = Ways(
            body, head, loss=way.loss, num_views=way.count, temperature=settings.temperature,
            view=self.lab.view(
                views.pretrain, self.seed, strength=strength, blur=settings.blur, smallest_crop=way.area,
                kind=way.kind or self.lab.general.kind,
            ),
        )  # fmt: skip
        settings = replace(settings, epochs=settings.epochs * 2 / way.count, batch=way.batch)

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
    words = {key: str(value) for key, value in vars(asked).items()}
    suite = f"pretraining-{Path(asked.data).name}"
    place = harness.RESULTS / f"{suite}.json"  # of other ways, asked for before
    before = json.loads(place.read_text())["rows"] if place.exists() else {}
    harness.keep(suite, {"asked": words, "rows": before | rows})


if __name__ == "__main__":
    main()
