"""Batches: in which order images come, and how they get from the store to the device.

The order is a pure function of (seed, epoch), so there is nothing to save and a resumed run sees what it would have
seen. Each epoch is one permutation cut into whole batches (the remainder waits for another epoch's permutation, as
the reference drops it); rank r takes the r-th equal share of every batch, so the global batch does not depend on
the number of ranks.

Shapes: B images of this rank, C canvas side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fewlabels import random, runtime
from fewlabels.data.labels import Dataset
from fewlabels.errors import UsageError

AHEAD = 2  # batches read before they are asked for: one being copied, one ready


@dataclass(frozen=True)
class Batch:
    """What enters a stage."""

    pixels: Tensor  # (B, 3, C, C) uint8
    extent: Tensor  # (B, 2) int64, the valid top-left (h, w)
    ids: Tensor  # (B,) int64, row in the store
    labels: Tensor  # (B,) int64, -1 = unlabeled
    epoch: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on device."""
        return replace(
            self,
            pixels=self.pixels.to(device, non_blocking=True),
            extent=self.extent.to(device, non_blocking=True),
            ids=self.ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Order:
    """Which images make up step s: a pure function of the seed, the images and the batch size."""

    ids: np.ndarray  # (n,) int64, rows in the store
    batch: int  # images a step over all ranks
    seed: int

    def __post_init__(self) -> None:
        if len(self.ids) < self.batch:
            raise UsageError(
                f"batch {self.batch} is larger than the {len(self.ids)} images",
                why="a batch holds every image at most once",
                fix=f"set the stage's batch to at most {len(self.ids)}",
            )
        if self.batch % runtime.world_size():
            raise UsageError(
                f"batch {self.batch} cannot be shared equally by {runtime.world_size()} processes",
                fix=f"use a multiple of {runtime.world_size()}",
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass."""
        return len(self.ids) // self.batch

    def epoch(self, step: int) -> int:
        """The pass that step belongs to, counted from 0."""
        return step // self.steps_per_epoch

    def permutation(self, epoch: int) -> np.ndarray:
        """(n,) the images in the order of that pass."""
        shuffled: np.ndarray = self.ids[random.permutation(self.seed, epoch, len(self.ids))]
        return shuffled

    def share(self, step: int, permutation: np.ndarray) -> np.ndarray:
        """(batch / world_size,) this rank's part of step, given its epoch's permutation."""
        first = (step % self.steps_per_epoch) * self.batch
        size = self.batch // runtime.world_size()
        first += runtime.rank() * size
        mine: np.ndarray = permutation[first : first + size]
        return mine


def read(dataset: Dataset, ids: np.ndarray, epoch: int) -> Batch:
    """One batch of dataset by rows of its store, on the CPU."""
    pixels, extent = dataset.store.read(ids)
    return Batch(pixels, extent, torch.from_numpy(ids), torch.from_numpy(dataset.labels[ids]), epoch)


def training_batches(
    dataset: Dataset, order: Order, *, first_step: int, last_step: int, device: torch.device
) -> Generator[Batch, None, None]:
    """This rank's batches of steps first_step .. last_step - 1, read ahead by one thread."""

    def load() -> Iterator[Future[Batch]]:
        epoch, permutation = -1, order.ids
        for step in range(first_step, last_step):
            if order.epoch(step) != epoch:
                epoch = order.epoch(step)
                permutation = order.permutation(epoch)
            yield pool.submit(read, dataset, order.share(step, permutation), epoch)

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        waiting: deque[Future[Batch]] = deque()
        for future in load():
            waiting.append(future)
            if len(waiting) > AHEAD:
                yield waiting.popleft().result().to(device)
        while waiting:
            yield waiting.popleft().result().to(device)


def in_order(dataset: Dataset, ids: np.ndarray, *, batch: int, device: torch.device) -> Iterator[Batch]:
    """ids as they come, the last batch shorter: for features and predictions."""
    for first in range(0, len(ids), batch):
        yield read(dataset, ids[first : first + batch], 0).to(device)
