"""Self-training on weak and strong views, from a pretrained network and (FixMatch, arXiv 2001.07685) from nothing:

    python -m benchmarks.selftraining --data digits --labels 20 40 100 --out runs/selftraining

The network tells the class of a weak view (crop and flip) and learns it from a strong one (that of pretraining), beside
the labels. Default rows: logistic regression and fine-tuning on one pretraining, then distillation into itself and
self-training for as many views as that, and FixMatch from random weights for as many views as pretraining and
self-training together. Draws of labels are the same in all rows; numbers are of the last step. What is made is kept
in --out. --pool long: the most frequent class has 20 times as many unlabeled images as the rarest, and labels come
equally often; steep: 100 times as many; reversed: the rarest has the most labels. Held-out images are those of the
even pool. --pool pure: the first seven of ten classes; foreign: unlabeled images of the other three beside them (equal
compute needs the same pretrain.batch, and 0.7 times the --epochs and --again). Classes of a steep pool that have fewer
images than their part of the labels are labeled whole. --pool tail: steep, and labels come as the images do, at least
one a class. --balanced: every network once more as `fewlabels predict --balanced` has it (at a temperature of 1), which
divides its answers by the shares of the labels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import harness, lab
from benchmarks.lab import Body, Lab
from benchmarks.paper import Rows, told
from benchmarks.pools import POOLS
from fewlabels import plan
from fewlabels.data.loader import Order, training_batches
from fewlabels.model.heads import Classifier
from fewlabels.stages.selftrain import SelfTrain, expected_classes
from fewlabels.use import compare, propagate

# Of the network forward and backward for an image: its strong view, a third for its weak one, and labeled images
PASSES = 1 + 1 / 3 + 1 / plan.LABELED_SHARE
THRESHOLD = 0.95
ALONE, PIXELS, PROBED = "labels alone", "logistic regression on pixels", "logistic regression, tap 0"
TUNED, DISTILLED, SELF_TRAINED = "fine-tuned", "distilled into itself", "self-trained"
UNSHIFTED, FIXMATCH = "self-trained, answers as they are", "FixMatch from random weights"
BALANCED = ", balanced"


class Unshifted(SelfTrain):
    """Answers count as they are: nothing corrects how often classes come."""

    def shifted(self, answers: Tensor) -> Tensor:
        return answers.softmax(dim=1)


class FixMatch(Unshifted):
    """As in the paper: the network itself answers, in one batch with what it learns."""

    def look(self, shown: list[Tensor], weak: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(torch.cat([*shown, weak])).float()
        return logits[: -len(weak)], logits[-len(weak) :].detach()


class Comparison:
    """The rows of the table, each a number a draw of labels. propagates: very few labels are spread first, as in
    `fewlabels fit`: before self-training on photos only.
    """

    def __init__(self, laboratory: Lab, body: Body, draws: int, *, propagates: bool = False) -> None:
        self.lab, self.body, self.draws, self.propagates = laboratory, body, range(draws), propagates

    def rows(self, amounts: list[int], ways: Iterable[str], *, balanced: bool = False) -> Rows:
        """These ways to learn, by the number of labels. balanced: as --balanced has it."""
        words = BALANCED * balanced
        return {
            name + words: {
                f"{a} labels": [
                    self.lab.cell(self._named(name, a, n) + words, partial(self._right, name, a, n, balanced=balanced))
                    for n in self.draws
                ]
                for a in amounts
            }
            for name in ways
        }

    def _right(self, name: str, amount: int, draw: int, *, balanced: bool) -> float:
        """% of the held-out images that are told right in this way."""
        found, few = WAYS[name](self, amount, draw), self.lab.few(amount, draw)
        if isinstance(found, float):
            return found
        known = few.labels[few.labeled]
        return self.lab.accuracy(found, np.bincount(known) / len(known) if balanced else None)

    def _named(self, name: str, amount: int, draw: int) -> str:
        begins = (TUNED, DISTILLED, "itself") + (SELF_TRAINED,) * (self.lab.general.kind != "glyph")
        spread = ", on propagated labels" * (name in begins and self._spreads(amount))
        return f"{name}, {self.body}, {amount} labels, draw {draw}{spread}"

    def _spreads(self, amount: int) -> bool:
        return self.propagates and amount <= propagate.FEW_LABELS * self.lab.dataset.num_classes

    def _alone(self, amount: int, draw: int) -> nn.Module:
        return self.lab.supervised(self.body.encoder, amount, draw)

    def _pixels(self, amount: int, draw: int) -> float:
        return self.lab.regressed(compare.pixels_as_features, amount, draw)

    def _probed(self, amount: int, draw: int) -> float:
        return self.lab.linear(self.body, amount, draw)

    def _teacher(self, amount: int, draw: int) -> Classifier:
        return self.lab.finetuned(self.body, 1, amount, draw, start="propagated" if self._spreads(amount) else None)

    def _finetuned(self, amount: int, draw: int) -> Classifier:
        return self.lab.finetuned(self.body, 1, amount, draw)

    def _distilled(self, amount: int, draw: int) -> nn.Module:
        few, teacher = self.lab.few(amount, draw), self._teacher(amount, draw)
        epochs = self.lab.distill_epochs * PASSES / (1 + 1 / 3)
        start = self.lab.recipe(len(few.labeled)).distill.start
        return self.lab.distilled(
            self.body.encoder, teacher, self._named("itself", amount, draw) + f", {epochs:g} epochs", few, draw,
            body=self.body if start == "pretrained" else None, epochs=epochs,
        )  # fmt: skip

    def _selftrained(self, amount: int, draw: int) -> nn.Module:
        start = self._finetuned if self.lab.general.kind == "glyph" else self._teacher
        name = f"self-trained {self.body}, {amount}, draw {draw}, {self.lab.distill_epochs:g} epochs"
        name += ", on propagated labels" * (start == self._teacher and self._spreads(amount))
        return self._trained(name, SelfTrain, start(amount, draw), amount, draw, self.lab.distill_epochs)

    def _unshifted(self, amount: int, draw: int) -> nn.Module:
        name = f"self-trained, not shifted, {self.body}, {amount}, draw {draw}, {self.lab.distill_epochs:g} epochs"
        return self._trained(name, Unshifted, self._finetuned(amount, draw), amount, draw, self.lab.distill_epochs)

    def _fixmatch(self, amount: int, draw: int) -> nn.Module:
        epochs = self.lab.distill_epochs + 2 * self.lab.epochs / PASSES
        name = f"FixMatch {self.body.encoder}, {amount}, draw {draw}, {epochs:g} epochs"
        return self._trained(name, FixMatch, self.lab.fresh(self.body.encoder, draw), amount, draw, epochs)

    def _trained(
        self, name: str, kind: Callable[..., SelfTrain], network: Classifier, amount: int, draw: int, epochs: float,
    ) -> nn.Module:  # fmt: skip
        few = self.lab.few(amount, draw)
        settings = replace(self.lab.recipe(len(few.labeled)).distill, epochs=epochs)
        beside = plan.beside(plan.derive(settings, len(few.train), 1).batch, len(few.labeled), 1)
        order = Order(few.labeled, beside, 1000 + draw)
        stage = kind(
            network, weak=self.lab.weak_view(4), threshold=THRESHOLD,
            strong=self.lab.strong_view(5),
            labeled=lambda first: training_batches(
                few, order, first_step=first, last_step=sys.maxsize, device=self.lab.device
            ),
            expected=expected_classes(few.labels[few.labeled], few.num_classes),
        )  # fmt: skip
        return self.lab.kept(name, stage.average, lambda: self.lab.train(stage, settings, few, few.train, draw))


# Each gives a network, or % of the held-out images that are told right where there is none
WAYS: dict[str, Callable[[Comparison, int, int], nn.Module | float]] = {
    ALONE: Comparison._alone,
    PIXELS: Comparison._pixels,
    PROBED: Comparison._probed,
    TUNED: Comparison._teacher,
    DISTILLED: Comparison._distilled,
    SELF_TRAINED: Comparison._selftrained,
    UNSHIFTED: Comparison._unshifted,
    FIXMATCH: Comparison._fixmatch,
}
NO_NETWORK = {PIXELS, PROBED}
USUAL = [PIXELS, PROBED, TUNED, DISTILLED, SELF_TRAINED, UNSHIFTED, FIXMATCH]


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, fashion, or a folder with train and test.parquet")
    parser.add_argument("--labels", type=int, nargs="+", default=[20, 40, 100])
    parser.add_argument("--encoder", default="resnet18_0.25x_small")
    parser.add_argument("--train", type=int, default=10_000, help="training images")
    parser.add_argument("--epochs", type=float, default=60.0, help="of pretraining")
    parser.add_argument("--again", type=float, default=30.0, help="epochs of self-training")
    parser.add_argument("--set", nargs="+", default=[], help="recipe values, as pretrain.batch=128")
    parser.add_argument("--gpu-settings", action="store_true", help="those of a GPU, on a CPU too")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--pool", choices=POOLS, default="even")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=USUAL)
    parser.add_argument("--balanced", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/selftraining"))
    asked = parser.parse_args()
    source = lab.images(asked.data, train=asked.train, test=asked.train)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pool, choose = POOLS[asked.pool]
    place = asked.out / asked.pool
    laboratory = Lab(
        source, place, epochs=asked.epochs, distill_epochs=asked.again, changes=asked.set, device=device, pool=pool,
        choose=choose, on_gpu=asked.gpu_settings or None,
    )  # fmt: skip
    comparison = Comparison(laboratory, Body(asked.encoder), asked.draws)
    rows = comparison.rows(asked.labels, asked.ways)
    if asked.balanced:
        rows |= comparison.rows(asked.labels, [way for way in asked.ways if way not in NO_NETWORK], balanced=True)
    told(f"{Path(asked.data).name}, {asked.pool} pool, {asked.encoder}", rows)
    harness.keep_beside(f"selftraining-{Path(asked.data).name}-{asked.pool}", vars(asked), rows)


if __name__ == "__main__":
    main()
