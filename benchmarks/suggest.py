"""What `fewlabels suggest` is worth: logistic regression on suggested labels against random ones.

    fewlabels pretrain IMAGES --test TEST --keep-labels 100 --out RUN
    python -m benchmarks.suggest RUN --seeds 5

RUN only pretrained, on images whose labels are all known: here they are hidden, and told where they are asked for. Each
seed leaves out a random fifth of the training images, so that suggestions have a spread too; the held-out images
measure. Prints two Markdown tables (from no label at all; from random labels to twice as many) and writes
benchmarks/results/suggest-RUN.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness
from fewlabels import runtime
from fewlabels.data import labels
from fewlabels.data.sources import open_source
from fewlabels.errors import UsageError
from fewlabels.use import artefact, compare, evaluate, suggest

Floats = np.ndarray

FROM_NONE = (1, 2, 4, 10, 25)  # labels a class
TWICE = (4, 10, 25, 50, 100, 200)


class Bench:
    """A run's features, pretraining's own for choosing and the encoder's for classifying, and the truth."""

    def __init__(self, run: Path) -> None:
        if json.loads((run / "results.json").read_text())["final"] != "pretrain":
            why, fix = "it knows labels that are to be hidden here", "give one of `fewlabels pretrain`"
            raise UsageError(f"the model of {run} was fine-tuned", why=why, fix=fix)
        dataset, _ = suggest.open_run(run)
        resolved, note = (json.loads((run / name).read_text()) for name in ("resolved.json", "data.json"))
        source = open_source(resolved["inputs"]["images"], test=resolved["inputs"].get("test"))
        told = labels.assemble(source, dataset.store, np.asarray(note["kept"]))
        network, head, card = artefact.read_whole(artefact.place(run))
        device = torch.device("cpu")
        setting = compare.Setting(card.size, card.kind, device, runtime.precision(device, "auto"))
        see = compare.tapped(network.encoder, head)
        train, held = (compare.outputs(told, ids, setting, see) for ids in (told.train, told.held_out))
        self.encoded, self.compared, self.held = train[0], train[-1], held[0]
        self.labels, self.held_labels = told.labels[told.train], told.labels[told.held_out]
        self.classes = len(told.classes)

    def accuracy(self, rows: np.ndarray) -> float:
        """% of the held-out images that logistic regression on these labels gets right."""
        fitted = evaluate.logistic_regression(self.encoded[rows], self.labels[rows], num_classes=self.classes)
        return 100 * float((fitted.predict_proba(self.held).argmax(axis=1) == self.held_labels).mean())

    def from_none(self, count: int, seed: int) -> dict[str, float]:
        """Accuracy with `count` labels, and how many classes are among them."""
        some = np.random.default_rng(seed).permutation(len(self.labels))[: len(self.labels) * 4 // 5]
        asked = some[suggest.choose(self.compared[some], np.full(len(some), -1), count)]
        even = np.concatenate([some[self.labels[some] == k][: count // self.classes] for k in range(self.classes)])
        return {
            "random": self.accuracy(some[:count]), "random, as many a class": self.accuracy(even),
            "suggested": self.accuracy(asked), "classes, random": len(set(self.labels[some[:count]])),
            "classes, suggested": len(set(self.labels[asked])),
        }  # fmt: skip

    def twice(self, count: int, seed: int) -> dict[str, float]:
        """Accuracy with `count` random labels, and as many more in four ways."""
        some = np.random.default_rng(seed).permutation(len(self.labels))[: len(self.labels) * 4 // 5]
        known = np.where(np.arange(len(some)) < count, self.labels[some], -1)
        compared = self.compared[some] / np.linalg.norm(self.compared[some], axis=1, keepdims=True)
        more = {
            "as they are": np.arange(0), "random": np.arange(count, 2 * count),
            "typical": suggest.typical(compared, known, count), "unsure": suggest.unsure(compared, known, count),
            "suggested": suggest.choose(compared, known, count),
        }  # fmt: skip
        return {name: self.accuracy(some[np.concatenate([np.arange(count), rows])]) for name, rows in more.items()}


def table(title: str, found: dict[int, list[dict[str, float]]]) -> None:
    """Means over seeds, with the standard deviation."""
    names = list(next(iter(found.values()))[0])
    print(f"\n| {title} | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for count, seeds in found.items():
        columns = np.array([[seed[name] for name in names] for seed in seeds])
        cells = [f"{m:.1f} ({s:.1f})" for m, s in zip(columns.mean(0), columns.std(0, ddof=1), strict=True)]
        print(f"| {count:,} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    bench, seeds = Bench(options.run), range(options.seeds)
    none = {n * bench.classes: [bench.from_none(n * bench.classes, seed) for seed in seeds] for n in FROM_NONE}
    table("labels from none", none)
    most = len(bench.labels) * 4 // 5 // 2
    twice = {n: [bench.twice(n, s) for s in seeds] for n in (k * bench.classes for k in TWICE) if 2 * n <= most}
    table("twice as many labels as", twice)
    harness.keep(f"suggest-{options.run.name}", {"from_none": none, "twice": twice})


if __name__ == "__main__":
    main()
