"""What the suites train on and with: synthetic images in a real store, the real loader, and plain twins of the loss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewlabels import runtime
from fewlabels.config import Schedule
from fewlabels.data import labels, pixels, views
from fewlabels.data.labels import Dataset
from fewlabels.data.loader import Batch, Order, training_batches
from fewlabels.data.source import Source
from fewlabels.data.sources import open_source
from fewlabels.model import optim
from fewlabels.model.encoder import encoder
from fewlabels.model.heads import ProjectionHead
from fewlabels.plan import Derived
from fewlabels.stages import loop
from fewlabels.stages.loop import Listeners, Plan, Stage, TrainState
from fewlabels.stages.pretrain import Pretrain, View

FOREVER = 10**6  # steps
CLASSES = 10


def smooth_pictures(count: int, side: int, seed: int = 0) -> Tensor:
    """uint8 (count, 3, side, side): smooth with some noise, as photos are. Speed does not depend on what is seen."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")
    return (smooth * 235 + 20 * torch.rand(count, 3, side, side, generator=generator)).to(torch.uint8)


def stored(images: Any, folder: Path, *, working_size: int | None = None) -> Dataset:
    """The dataset that `fewlabels fit` makes in folder of images: an array (N, H, W, 3), a path, a source."""
    if isinstance(images, Source):
        source = images
    elif isinstance(images, np.ndarray):
        source = open_source(images, [str(number % CLASSES) for number in range(len(images))])
    else:
        source = open_source(images)
    folder.mkdir(parents=True, exist_ok=True)
    store, kept, _ = pixels.build(
        source, folder / "data", working_size=working_size, max_bad_share=0.0, threads=runtime.threads(),
        bad_csv=folder / "bad.csv",
    )  # fmt: skip
    return labels.assemble(source, store, kept)


@functools.cache
def precision(device: torch.device) -> runtime.Precision:
    """What `fewlabels fit` computes in there; the same for all contenders of this process."""
    return runtime.precision(device)


def batches(dataset: Dataset, batch: int, device: torch.device, *, steps: int = FOREVER) -> Iterator[Batch]:
    """The loader's own batches of so many steps."""
    return training_batches(dataset, Order(dataset.train, batch, 0), first_step=0, last_step=steps, device=device)


def layout(form: runtime.Precision) -> torch.memory_format:
    """The memory layout of views."""
    return torch.channels_last if form.channels_last else torch.contiguous_format


def viewer(make: Callable[..., Tensor], form: runtime.Precision, *, again: int = 0, **settings: Any) -> View:
    """make (of fewlabels.data.views) as a stage wants it. again: as many epochs of views, then the same ones."""

    def view(batch: Batch, number: int) -> Tensor:
        epoch = batch.epoch % again if again else batch.epoch
        made = make(batch.pixels, batch.extent, batch.ids, epoch=epoch, view=number, **settings)
        return made.contiguous(memory_format=layout(form))

    return view


@contextmanager
def plain_views(plain: bool = True) -> Iterator[None]:
    """The plain path of the views inside, if asked for."""
    views.PLAIN = plain
    try:
        yield
    finally:
        views.PLAIN = False


def pretraining(
    name: str, device: torch.device, *, size: int, strength: float, blur: bool, count: int = 2, optimizer: str = "lars"
) -> TrainState:
    """A pretraining stage of encoder `name` on so many views, on device as `fewlabels fit` puts it there."""
    torch.manual_seed(0)
    form = precision(device)
    with device:  # 800 million weights are drawn in seconds there
        body = encoder(name)
        head = ProjectionHead(body.feature_dim)
    view = viewer(views.pretrain, form, size=size, seed=0, strength=strength, blur=blur)
    return started(Pretrain(body, head, view=view, temperature=0.5, num_views=count), form, device, optimizer)


def started(stage: Stage, form: runtime.Precision, device: torch.device, optimizer: str = "lars") -> TrainState:
    """Step 0 of a stage."""
    form.layout(stage.to(device)).train()
    return TrainState(stage, optim.optimizer(optimizer, stage, lr=0.1, weight_decay=1e-4))


def brief(steps: int, on_log: Callable[[int, dict[str, float]], None], *, log_every: int = 1) -> tuple[Plan, Listeners]:
    """Plan and listeners of loop.train for so many steps, nothing evaluated or saved."""

    def nothing(_: TrainState) -> None:
        pass

    plan = Plan(steps, learning_rate=lambda _: 1e-3, log_every=log_every, eval_every=0, save_every=FOREVER)
    return plan, Listeners(on_log=on_log, on_eval=nothing, on_save=nothing, should_stop=lambda: False)


def trained(
    stage: Stage, settings: Schedule, schedule: Derived, form: runtime.Precision, dataset: Dataset, ids: np.ndarray,
    seed: int, device: torch.device | None = None,
) -> list[float]:  # fmt: skip
    """Train stage on the images `ids` through the loop and the loader of `fewlabels fit`; the loss of every step."""
    device = device or torch.device("cpu")
    form.layout(stage.to(device)).train()
    optimizer = optim.optimizer(settings.optimizer, stage, lr=schedule.peak, weight_decay=settings.weight_decay)
    losses: list[float] = []
    rhythm, listeners = brief(schedule.total_steps, lambda _, values: losses.append(values["loss"]))
    rhythm = dataclasses.replace(rhythm, learning_rate=schedule.learning_rate, seed=seed)
    order = Order(ids, schedule.batch, seed)
    seen = training_batches(dataset, order, first_step=0, last_step=schedule.total_steps, device=device)
    loop.train(TrainState(stage, optimizer), seen, rhythm, listeners, form)
    return losses


def whole_matrix(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent by all similarities at once and torch's own cross-entropy, in the precision of its arguments."""
    z = torch.nn.functional.normalize(torch.cat([first, second]), dim=1)
    with torch.autocast(z.device.type, enabled=False):
        logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
        return torch.nn.functional.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z) // 2))
