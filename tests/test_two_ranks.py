"""Two gloo processes are one process: losses, gradients and weights of every stage to 1e-5.

Run as a script it is one rank's part of that; see two_ranks.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import two_ranks
from conftest import shapes_images
from fewlabels import runtime
from fewlabels.config import Schedule
from fewlabels.data import labels, pixels, sources, views
from fewlabels.data.loader import Batch, Order, training_batches
from fewlabels.model.encoder import encoder
from fewlabels.model.heads import Classifier, ProjectionHead
from fewlabels.stages import loop
from fewlabels.stages.chunks import Chunks
from fewlabels.stages.distill import Distill
from fewlabels.stages.finetune import Finetune
from fewlabels.stages.loop import Stage
from fewlabels.stages.pretrain import Pretrain, PretrainWithMomentum
from fewlabels.stages.runner import Job
from fewlabels.stages.selftrain import SelfTrain

STAGES = ("pretrain", "views", "recompute", "momentum", "momentum of views", "chunk", "chunk of views", "batch")
STAGES += ("finetune", "distill", "selftrain")
TIMM = "selftrain of timm"  # whose batch norms are a rank's own: not one process
CHUNKED = ("chunk", "chunk of views", "batch")
STEPS = 3


def strong(batch: Batch, number: int) -> torch.Tensor:
    return views.pretrain(
        batch.pixels, batch.extent, batch.ids, size=16, epoch=batch.epoch, seed=1, view=number, blur=False
    ).double()


def crop(batch: Batch, number: int) -> torch.Tensor:
    view = views.finetune(batch.pixels, batch.extent, batch.ids, size=16, epoch=batch.epoch, seed=2, view=number)
    return view.double()


def nothing(_: int) -> Iterator[Batch]:
    """The labeled images of a stage that will be given others."""
    return iter(())


def build(name: str) -> Stage:
    torch.manual_seed(0)
    body = encoder("timm:test_resnet" if name == TIMM else "resnet18_0.125x_small")
    head = ProjectionHead(body.feature_dim, 16)
    count = 4 if "views" in name else 2
    if name in ("pretrain", "views", "recompute"):
        body.recompute(on=name == "recompute")
        return Pretrain(body, head, view=strong, temperature=0.2, num_views=count)
    if name in CHUNKED:
        chunks = Chunks(8, "batch" if name == "batch" else "chunk")
        return Pretrain(body, head, view=strong, temperature=0.2, num_views=count, chunks=chunks)
    if name.startswith("momentum"):
        queue = 24 if count == 2 else 100  # less and more than a step's keys
        return PretrainWithMomentum(
            body, head, view=strong, temperature=0.2, momentum=0.9, queue=queue, num_views=count
        )
    teacher = Classifier(body, head, tap=1, num_classes=4)
    torch.nn.init.normal_(teacher.linear.weight)
    if name == "finetune":
        return Finetune(teacher, view=crop)
    if name in ("selftrain", TIMM):
        return SelfTrain(
            teacher, labeled=nothing, weak=crop, strong=strong, threshold=0.5, expected=torch.full((4,), 0.25)
        )
    student = Classifier(encoder("resnet18_0.125x_small"), None, tap=0, num_classes=4)
    torch.nn.init.normal_(student.linear.weight)
    return Distill(teacher, student, view=crop, temperature=0.5, label_weight=0.3)


def with_the_chunks_of_two_ranks(batch: Batch) -> Batch:
    """16 images in such an order that the first 8 are the first 4 of either rank's 8."""
    order = torch.arange(16).view(2, 2, 4).transpose(0, 1).flatten()
    return Batch(batch.pixels[order], batch.extent[order], batch.ids[order], batch.labels[order], batch.epoch)


def run(folder: Path) -> dict[str, Any]:
    """STEPS steps of every stage in float64 on this rank's share; what came of it."""
    images, classes = shapes_images(48)
    # Labels fall unevenly on the two ranks: every third image
    known = [str(c) if i % 3 == 0 else None for i, c in enumerate(classes)]
    source = sources.open_source(images, known)
    store, kept, _ = pixels.build(
        source, folder / "data", working_size=None, max_bad_share=0.05, threads=1, bad_csv=folder / "bad.csv"
    )
    dataset = labels.assemble(source, store, kept)
    found: dict[str, Any] = {}
    for name in (*STAGES, TIMM):
        stage = build(name).double()
        schedule = Schedule(epochs=9, batch=16, optimizer="lars", learning_rate=0.5, scaling="none", warmup=0.0)
        ids = dataset.labeled if name == "finetune" else dataset.train
        if isinstance(stage, SelfTrain):
            stage.labeled = lambda first: training_batches(
                dataset, Order(dataset.labeled, 4, 7), first_step=first, last_step=STEPS, device=torch.device("cpu")
            )
        work = Job(name=name, stage=stage, schedule=schedule, ids=ids, seed=3, identity={})
        state = work.state()
        stage.train()
        batches = training_batches(dataset, work.order(), first_step=0, last_step=STEPS, device=torch.device("cpu"))
        precision = runtime.precision(torch.device("cpu"), "fp32")
        for step, batch in enumerate(batches):
            found[f"{name} ids {step}"] = runtime.gather(batch.ids)
            if name in CHUNKED and runtime.world_size() == 1:
                batch = with_the_chunks_of_two_ranks(batch)
            scalars = loop.step(state, batch, work.derived.learning_rate(step), precision)
            loss = torch.as_tensor(scalars["loss"]).clone()
            found[f"{name} loss {step}"] = runtime.sum_over_ranks(loss) / runtime.world_size()
            for key, parameter in stage.named_parameters():
                if parameter.grad is not None:
                    found[f"{name} gradient {step} {key}"] = parameter.grad.clone()
        found |= {f"{name} after {key}": tensor.clone() for key, tensor in stage.trained().items()}
    return found


class Drawing(Stage):
    """Keeps what torch's own generator gives it in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.drawn = list[torch.Tensor]()

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        self.drawn.append(torch.rand(4))
        return {"loss": self.weight.sum()}


def drawn() -> torch.Tensor:
    """(STEPS, 4) what this rank's dropout would draw from."""
    stage, nothing = Drawing(), torch.zeros(1)
    state = loop.TrainState(stage, torch.optim.SGD(stage.parameters(), lr=0.1))
    listeners = loop.Listeners(lambda *_: None, lambda _: None, lambda _: None, lambda: False)
    plan = loop.Plan(STEPS, lambda _: 0.1, log_every=1, eval_every=0, save_every=STEPS, seed=3)
    batches = [Batch(nothing, nothing, nothing, nothing, 0)] * STEPS
    loop.train(state, batches, plan, listeners, runtime.precision(torch.device("cpu"), "fp32"))
    return torch.stack(stage.drawn)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    alone = run(tmp_path_factory.mktemp("alone"))
    return alone, two_ranks.results(__file__, tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("what", ["ids", "loss", "gradient", "after"])
def test_two_ranks_are_one_process(name: str, what: str, both: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    alone, together = both
    keys = [key for key in alone if key.startswith(f"{name} {what} ")]
    assert len(keys) >= STEPS
    for key in keys:
        for rank in together:
            scale = max(1e-3, float(alone[key].abs().max()))
            difference = float((alone[key].double() - rank[key].double()).abs().max()) / scale
            assert difference <= 1e-5, f"{key}: {difference}"


def test_recomputed_is_the_same(both: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    alone, together = both
    for found in (alone, *together):
        for key in (key for key in alone if key.startswith("pretrain ")):
            again = found[key.replace("pretrain", "recompute", 1)]
            torch.testing.assert_close(again, found[key], rtol=0, atol=1e-12, msg=key)


def test_ranks_end_with_the_same_weights(both: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    _, (first, second) = both
    for key in first.keys() - {"drawn"}:
        assert np.array_equal(first[key].numpy(), second[key].numpy()), key
    assert any(key.startswith(TIMM) and key.endswith("running_var") for key in first)


def test_no_two_ranks_drop_the_same(both: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    _, (first, second) = both
    torch.testing.assert_close(first["drawn"], drawn(), rtol=0, atol=0)
    rows = torch.cat([first["drawn"], second["drawn"]])
    assert len(rows.unique(dim=0)) == 2 * STEPS


if __name__ == "__main__":
    runtime.start("cpu")
    mine = run(Path(sys.argv[1]) / f"rank{runtime.rank()}") | {"drawn": drawn()}
    torch.save(mine, Path(sys.argv[1]) / f"{runtime.rank()}.pt")
    runtime.finish()
