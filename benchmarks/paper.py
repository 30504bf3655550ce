"""The paper's claims in small, one command a table:

    python -m benchmarks.paper sizes --data FOLDER --out runs/paper

sizes: bigger models gain more the fewer labels there are (paper, figures 1 and 4). heads: deeper projection heads, and
from which of their layers to fine-tune (figure 5). unlabeled: distillation needs the unlabeled images (table 2).
students: a network taught by itself, and smaller students (table 2, figure 6). memory: momentum encoder and queue
(section 3.1). linear: linear evaluation against fine-tuning, over all these bodies (figure 7). teaching: not in the
paper; three teachers and mixed images for a small student.

Three draws of labels, the same in all rows; one pretraining a body. Numbers are % of the held-out images right after
the last step, mean and standard deviation over draws. What is made is kept in --out: a broken command goes on, and
tables share their pretrainings. FOLDER has train.parquet and test.parquet; --scale cpu takes 10,000 images of it,
--scale gpu all, wider networks and longer schedules. `all` makes every table in turn.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness, lab
from benchmarks.lab import Body, Ensemble, Lab, mean_and_spread
from fewlabels.model.heads import Classifier

LABELS = ("1%", "10%", "100%")
DRAWS = 3
LONGER = 5  # small students are taught so many times as long, too
Rows = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Scale:
    """How large a table is made."""

    train: int
    test: int
    epochs: float
    distill_epochs: float
    bodies: tuple[str, ...]  # from small to big; the middle one is the usual network
    queue: int


SCALES = {
    "toy": Scale(0, 0, 0.2, 0.2, ("resnet18_0.125x_small", "resnet18_0.125x_small"), 64),
    "cpu": Scale(
        10_000, 10_000, 40, 20,
        ("resnet18_0.125x_small", "resnet18_0.25x_small", "resnet34_0.25x_small", "resnet18_0.5x_small"), 4096,
    ),
    "gpu": Scale(
        0, 0, 100, 60,
        ("resnet18_0.25x_small", "resnet18_0.5x_small", "resnet18_small", "resnet34_small", "resnet18_2x_small"), 65536,
    ),
}  # fmt: skip


class Tables:
    """Every table as a method: rows of columns of numbers, one a draw."""

    def __init__(self, laboratory: Lab, scale: Scale, draws: int) -> None:
        self.lab, self.scale, self.draws = laboratory, scale, range(draws)
        self.usual, self.big = scale.bodies[(len(scale.bodies) - 1) // 2], scale.bodies[-1]

    def each(self, name: str, amount: str, make: Callable[[str, int], float]) -> list[float]:
        """make(amount, draw) of every draw; all labels can be drawn in one way only."""
        draws = self.draws if amount != "100%" else range(1)
        return [self.lab.cell(f"{name}, {amount}, draw {n}", functools.partial(make, amount, n)) for n in draws]

    def few(self, name: str, make: Callable[[str, int], float]) -> dict[str, list[float]]:
        """The same for 1 % and 10 % of the labels."""
        return {amount: self.each(name, amount, make) for amount in LABELS[:2]}

    def finetuned(self, body: Body, amount: str, tap: int = 1) -> list[float]:
        """After fine-tuning."""
        return self.each(
            f"fine-tuned, {body}, tap {tap}",
            amount,
            lambda a, n: self.lab.accuracy(self.lab.finetuned(body, tap, a, n)),
        )

    def alone(self, name: str, amount: str) -> list[float]:
        """From random weights, on the labels."""
        make = lambda a, n: self.lab.accuracy(self.lab.supervised(name, a, n))  # noqa: E731
        return self.each(f"labels alone, {name}", amount, make)

    def probed(self, body: Body, tap: int = 0) -> list[float]:
        """Linear evaluation with all labels."""
        return self.each(f"linear, {body}, tap {tap}", "100%", lambda a, n: self.lab.linear(body, a, n, tap))

    def sizes(self) -> Rows:
        """From random weights and fine-tuned, by size of the network and share of the labels."""
        rows: Rows = {}
        for name in self.scale.bodies:
            rows[f"{name}, labels alone"] = {amount: self.alone(name, amount) for amount in LABELS}
            rows[f"{name}, fine-tuned"] = {amount: self.finetuned(Body(name), amount) for amount in LABELS}
        for way in ("labels alone", "fine-tuned"):
            small, big = (rows[f"{name}, {way}"] for name in (self.scale.bodies[0], self.big))
            rows[f"gain of the biggest over the smallest in %, {way}"] = {
                amount: [100 * (np.mean(big[amount]) / np.mean(small[amount]) - 1)] for amount in LABELS
            }
        return rows

    def heads(self) -> Rows:
        """Layers of the projection head by the layer from which is fine-tuned."""
        return {
            f"{layers} layers, from layer {tap}": {
                amount: self.finetuned(Body(self.usual, layers), amount, tap) for amount in LABELS[:2]
            }
            for layers in (1, 2, 3, 4)
            for tap in range(min(layers, 3))
        }

    def unlabeled(self) -> Rows:
        """A student from random weights: which images and which answers it learns from."""
        body = Body(self.usual)

        def taught(amount: str, draw: int, *, way: str, only_labeled: bool, weight: float) -> float:
            few = self.lab.few(amount, draw)
            student = self.lab.distilled(
                self.usual, self.lab.finetuned(body, 1, amount, draw), f"{way} by {body}, {amount}, draw {draw}", few,
                draw, ids=few.labeled if only_labeled else few.train, label_weight=weight,
            )  # fmt: skip
            return self.lab.accuracy(student)

        rows: Rows = {
            "the teacher": {amount: self.finetuned(body, amount) for amount in LABELS[:2]},
            "labels alone": {amount: self.alone(self.usual, amount) for amount in LABELS[:2]},
        }
        for way, only_labeled, weight in (
            ("labels, and the teacher on labeled images", True, 0.5),
            ("labels, and the teacher on all images", False, 0.5),
            ("the teacher on all images", False, 0.0),
        ):
            rows[way] = self.few(
                f"{way}, {body}", functools.partial(taught, way=way, only_labeled=only_labeled, weight=weight)
            )
        return rows

    def students(self) -> Rows:
        """The big network, itself after self-distillation, and what that teaches smaller ones."""
        body = Body(self.big)

        def itself(amount: str, draw: int) -> Classifier:
            teacher, few = self.lab.finetuned(body, 1, amount, draw), self.lab.few(amount, draw)
            return self.lab.distilled(self.big, teacher, f"itself, {amount}, draw {draw}", few, draw, body=body)

        def student(amount: str, draw: int, *, name: str, longer: int = 1) -> float:
            taught = f"of {self.big} after itself, {amount}, draw {draw}" + f", {longer} x" * (longer > 1)
            few, epochs = self.lab.few(amount, draw), longer * self.scale.distill_epochs
            return self.lab.accuracy(self.lab.distilled(name, itself(amount, draw), taught, few, draw, epochs=epochs))

        rows: Rows = {f"{self.big}, fine-tuned": {amount: self.finetuned(body, amount) for amount in LABELS[:2]}}
        rows[f"{self.big}, distilled into itself"] = self.few(
            f"itself, {body}", lambda amount, draw: self.lab.accuracy(itself(amount, draw))
        )
        big, *smaller = [name for name in dict.fromkeys(self.scale.bodies[::-1]) if "18" in name]
        for name in (*smaller, big):
            rows[f"{name}, taught by it"] = self.few(f"taught by {body}, {name}", functools.partial(student, name=name))
            rows[f"{name}, fine-tuned itself"] = {a: self.finetuned(Body(name), a) for a in LABELS[:2]}
        for name in smaller:
            rows[f"{name}, taught by it {LONGER} times as long"] = self.few(
                f"taught by {body}, {name}, {LONGER} x", functools.partial(student, name=name, longer=LONGER)
            )
        return rows

    def teaching(self) -> Rows:
        """Not in the paper: three teachers, and mixed images (arXiv 2106.05237), for a small student."""
        small, body = self.scale.bodies[0], Body(self.big)

        def teacher(amount: str, draw: int, *, several: bool) -> Classifier | Ensemble:
            members = [self.lab.finetuned(body, tap, amount, draw) for tap in ((1, 0, 2) if several else (1,))]
            return Ensemble(members) if several else members[0]

        def student(amount: str, draw: int, *, several: bool, mixup: bool, longer: int) -> float:
            taught = f"of {self.big}" + ", three taps" * several + ", mixed" * mixup + f", {amount}, draw {draw}"
            network = self.lab.distilled(
                small, teacher(amount, draw, several=several), taught + f", {longer} x", self.lab.few(amount, draw),
                draw, epochs=longer * self.scale.distill_epochs, mixup=mixup,
            )  # fmt: skip
            return self.lab.accuracy(network)

        rows: Rows = {f"{self.big}, fine-tuned": {amount: self.finetuned(body, amount) for amount in LABELS[:2]}}
        rows["its taps 0, 1 and 2 averaged"] = self.few(
            f"taps averaged, {body}", lambda a, n: self.lab.accuracy(teacher(a, n, several=True))
        )
        for longer, several, mixup in itertools.product((1, LONGER), (False, True), (False, True)):
            name = f"{small}, taught by {'all three' if several else 'it'}" + ", mixed images" * mixup
            name += f", {longer} times as long" * (longer > 1)
            rows[name] = self.few(
                f"{name}, {body}", functools.partial(student, several=several, mixup=mixup, longer=longer)
            )
        return rows

    def memory(self) -> Rows:
        """Momentum encoder and memory of past keys."""
        # short schedules: 0.999 would still hold the first weights after a thousand steps
        momentum = 0.999 if self.scale.epochs >= 100 else 0.99
        queue = self.scale.queue
        bodies = {
            "no memory": Body(self.usual, views=2),
            f"momentum {momentum}": Body(self.usual, momentum=momentum, views=2),
            f"momentum {momentum}, {queue:,} past keys": Body(self.usual, momentum=momentum, queue=queue, views=2),
        }
        return {
            name: {amount: self.finetuned(body, amount) for amount in LABELS[:2]} | {"linear, 100%": self.probed(body)}
            for name, body in bodies.items()
        }

    def linear(self) -> Rows:
        """Linear evaluation (all labels; tap 0 and tap 1) against fine-tuning, and their correlation."""
        bodies = [Body(name) for name in dict.fromkeys(self.scale.bodies)]
        bodies += [Body(self.usual, layers) for layers in (2, 4)]
        rows: Rows = {}
        for body in bodies:
            rows[str(body)] = {f"linear, tap {tap}": self.probed(body, tap) for tap in (0, 1)}
            rows[str(body)] |= {f"fine-tuned, {amount}": self.finetuned(body, amount) for amount in LABELS[:2]}
        columns = {name: [float(np.mean(row[name])) for row in rows.values()] for name in next(iter(rows.values()))}
        for tap in (0, 1):
            along = columns[f"linear, tap {tap}"]
            rows[f"correlation with linear, tap {tap}"] = {
                name: [float(np.corrcoef(values, along)[0, 1])] for name, values in columns.items()
            }
        return rows


def told(title: str, rows: Rows) -> None:
    """Print rows as a Markdown table."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, row in rows.items():
        cells = [
            "" if c not in row else f"{row[c][0]:.2f}" if "correlation" in name else mean_and_spread(row[c])
            for c in columns
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


TABLES: dict[str, Callable[[Tables], Rows]] = {
    "sizes": Tables.sizes, "heads": Tables.heads, "unlabeled": Tables.unlabeled, "students": Tables.students,
    "memory": Tables.memory, "linear": Tables.linear, "teaching": Tables.teaching,
}  # fmt: skip


def main() -> None:
    """Make the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, "all"])
    parser.add_argument("--data", default="digits", help="digits, fashion, or a folder with train and test.parquet")
    parser.add_argument("--scale", choices=SCALES, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recipe", default="best", help="whose settings; simclrv2 is the faithful one")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--train", type=int, help="training images, in place of the scale's")
    parser.add_argument("--epochs", type=float, help="of pretraining, in place of the scale's")
    parser.add_argument("--bodies", nargs="+", help="encoders from small to big, in place of the scale's")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"))
    asked = parser.parse_args()
    scale = SCALES[asked.scale]
    scale = replace(
        scale, train=asked.train or scale.train, epochs=asked.epochs or scale.epochs,
        bodies=tuple(asked.bodies or scale.bodies),
    )  # fmt: skip
    source = lab.images(asked.data, train=scale.train, test=scale.test)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    laboratory = Lab(
        source, asked.out, epochs=scale.epochs, distill_epochs=scale.distill_epochs, recipe=asked.recipe, device=device
    )
    tables = Tables(laboratory, scale, asked.draws)
    for name in TABLES if asked.table == "all" else [asked.table]:
        rows = TABLES[name](tables)
        told(f"{Path(asked.data).name}, {name}", rows)
        harness.keep(
            f"paper-{Path(asked.data).name}-{name}", {"scale": asdict(scale), "recipe": asked.recipe, "rows": rows}
        )


if __name__ == "__main__":
    main()
