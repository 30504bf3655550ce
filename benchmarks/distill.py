"""A step of distillation whose teacher's answers are kept, against asking the teacher, and against plain training.

    python -m benchmarks distill --threads 2

All three train one student on the same views, from the real loader, in the real stages: Distill with the Answers of
`distill.teacher_epochs` (epochs after the first ones, which read them from their file), Distill with the teacher in
every step, Finetune on labels. CASES are 32 px images; what asking costs depends on how heavy the teacher is beside
the student, so the forward pass of the teacher is timed as well. Before timing, both distillations must have equal
losses on the same batch.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, workload
from fewlabels.data import views
from fewlabels.data.labels import Dataset
from fewlabels.data.loader import Batch, Order
from fewlabels.model.encoder import encoder
from fewlabels.model.heads import Classifier
from fewlabels.stages import loop
from fewlabels.stages.answers import Answers
from fewlabels.stages.distill import Distill
from fewlabels.stages.finetune import Finetune

CASES = {  # teacher, student: images a step, rounds
    ("resnet50_small", "resnet18_0.25x_small"): (128, 10),
    ("resnet50_small", "resnet18_0.5x_small"): (128, 7),
}
SIZE = 32
BATCHES = 4  # an epoch
CLASSES = 1000
TEMPERATURE = 1.0


class Contest:
    """One teacher and one student, and the contenders that train a copy of the student each."""

    def __init__(
        self, names: tuple[str, str], dataset: Dataset, batch: int, folder: Path, device: torch.device, *, size: int
    ) -> None:
        self.names, self.dataset, self.batch, self.folder, self.device = names, dataset, batch, folder, device
        self.precision = workload.precision(device)
        self.view = workload.viewer(views.finetune, self.precision, again=1, size=size, seed=0)
        self.teacher = self._network(names[0], seed=1)

    def _network(self, name: str, *, seed: int) -> Classifier:
        torch.manual_seed(seed)
        with self.device:
            network = Classifier(encoder(name), None, tap=0, num_classes=CLASSES)
            torch.nn.init.normal_(network.linear.weight, std=0.01)  # zeros would make every answer the same
        self.precision.layout(network)
        return network

    def _batches(self) -> Iterator[Batch]:
        return workload.batches(self.dataset, self.batch, self.device)

    def _distill(self, answers: Answers | None) -> loop.TrainState:
        student = self._network(self.names[1], seed=2)
        stage = Distill(self.teacher, student, view=self.view, temperature=TEMPERATURE, answers=answers)
        return workload.started(stage, self.precision, self.device)

    def _repeated(self, state: loop.TrainState, batches: Iterator[Batch]) -> Callable[[], Tensor]:
        def work() -> Tensor:
            loss = loop.step(state, next(batches), 0.1, self.precision)["loss"]
            assert isinstance(loss, Tensor)
            return loss

        return work

    def cached(self) -> Callable[[], Tensor]:
        """Steps of the second epoch and on: the first one is gone through here, and asks the teacher."""
        order = Order(self.dataset.train, self.batch, 0)
        answers = Answers(self.folder, order, 1, CLASSES)
        state, batches = self._distill(answers), self._batches()
        for batch in itertools.islice(batches, order.steps_per_epoch):
            with torch.no_grad(), self.precision.context(self.device):
                state.stage(batch)
        return self._repeated(state, batches)

    def online(self) -> Callable[[], Tensor]:
        """The teacher in every step; of the same epoch on."""
        batches = self._batches()
        for _ in range(Order(self.dataset.train, self.batch, 0).steps_per_epoch):
            next(batches)
        return self._repeated(self._distill(None), batches)

    def supervised(self) -> Callable[[], Tensor]:
        """The student on labels: what no distillation can be faster than."""
        stage = Finetune(self._network(self.names[1], seed=2), view=self.view)
        return self._repeated(workload.started(stage, self.precision, self.device), self._batches())

    def teacher_alone(self) -> Callable[[], Tensor]:
        """Its forward pass over a batch of views that are there."""
        made = self.view(next(self._batches()), 0)

        def work() -> Tensor:
            with torch.no_grad(), self.precision.context(self.device):
                logits: Tensor = self.teacher(made)
            return logits

        return work

    def contenders(self) -> dict[str, Callable[[], Tensor]]:
        """By name; the losses of the first step of both distillations are equal, or this raises."""
        cached, online = self.cached(), self.online()
        first, second = float(cached()), float(online())
        assert abs(first - second) < 1e-3 * abs(second), (first, second)
        calls = {"ours": cached, "teacher in every step": online, "student on labels": self.supervised()}
        return calls | {"teacher's forward alone": self.teacher_alone()}


def run(*, peers: list[str]) -> dict[str, Any]:  # noqa: ARG001 - no peer keeps a teacher's answers
    """The suite."""
    found = {}
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as temporary:
        for names, (batch, rounds) in CASES.items():
            title = f"{names[1]} taught by {names[0]}"
            folder = Path(temporary) / title
            pictures = workload.smooth_pictures(BATCHES * batch, SIZE).permute(0, 2, 3, 1).numpy()
            dataset = workload.stored(pictures, folder)
            contest = Contest(names, dataset, batch, folder, device, size=SIZE)
            calls = contest.contenders()
            found[title] = harness.table(
                f"{title}, {batch} images of {SIZE} px, a step", harness.side_by_side(calls, rounds=rounds)
            )
            for contender, row in found[title]["rows"].items():
                row["images_per_second"] = 1000 * batch / row["ms"]
                print(f"  {contender:<28} {row['images_per_second']:10,.0f} images/s")
    return {"precision": workload.precision(device).name, **found}
