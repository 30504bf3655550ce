"""A step never waits for its device, and what is logged is told in order, before anything is saved."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fewlabels import runtime
from fewlabels.data.loader import Batch
from fewlabels.model import optim
from fewlabels.model.encoder import encoder
from fewlabels.model.heads import ProjectionHead
from fewlabels.stages import loop
from fewlabels.stages.loop import Listeners, Stage, TrainState
from fewlabels.stages.pretrain import PretrainWithMomentum

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


class Square(Stage):
    """The loss is the square of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.weight.square(), "weight": self.weight}


def batches(count: int, device: str) -> Iterator[Batch]:
    for step in range(count):
        rows = torch.arange(8)
        pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
        yield Batch(pixels, torch.full((8, 2), 16), rows, torch.full((8,), -1), step).to(torch.device(device))


@pytest.mark.parametrize("device", DEVICES)
def test_told_in_order_before_every_save_evaluation_and_end(device: str) -> None:
    stage = Square().to(device)
    state = TrainState(stage, torch.optim.SGD(stage.parameters(), lr=0.0))
    events: list[tuple[str, int]] = []
    losses: list[float] = []

    def on_log(step: int, values: dict[str, float]) -> None:
        events.append(("log", step))
        losses.append(values["loss"])

    listeners = Listeners(
        on_log=on_log,
        on_eval=lambda state: events.append(("eval", state.step)),
        on_save=lambda state: events.append(("save", state.step)),
        should_stop=lambda: state.step == 10,
    )
    plan = loop.Plan(99, lambda step: 0.1, log_every=2, eval_every=6, save_every=4)
    assert not loop.train(state, batches(99, device), plan, listeners, runtime.precision(torch.device("cpu"), "fp32"))
    assert events == [
        ("log", 2), ("log", 4), ("save", 4), ("log", 6), ("eval", 6), ("log", 8), ("save", 8),
        ("log", 10), ("save", 10),
    ]  # fmt: skip
    assert losses == pytest.approx([0.8 ** (2 * step) for step in (1, 3, 5, 7, 9)], rel=1e-5)


@needs_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw", "muon"])
def test_a_step_on_cuda_waits_for_nothing(optimizer: str) -> None:
    torch.manual_seed(0)
    body = encoder("resnet18_0.125x_small")
    stage = PretrainWithMomentum(
        body, ProjectionHead(body.feature_dim, 16), view=lambda batch, number: batch.pixels / 255 + number,
        temperature=0.2, momentum=0.9, queue=24,
    ).to("cuda")  # fmt: skip
    state = TrainState(stage.train(), optim.optimizer(optimizer, stage, lr=0.1, weight_decay=1e-4))
    precision = runtime.precision(torch.device("cuda"), "bf16")
    told: list[int] = []
    log = loop._Log(lambda step, values: told.append(step))
    ready = list(batches(4, "cuda"))
    loop.step(state, ready[0], 0.1, precision)  # buffers are made, kernels loaded
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for batch in ready[1:]:
            log.take(state.step, loop.step(state, batch, 0.1, precision), {})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert told == [1, 2]
    log.tell()
    assert told == [1, 2, 3]
