"""Batches: in which order images come, and how they get from the store to the device.

The order is a pure function of (seed, epoch), so there is nothing to save and a resumed run sees what it would have
seen. Each epoch is one permutation cut into whole batches (the remainder waits for another epoch's permutation, as
the reference drops it); rank r takes the r-th equal share of every batch, so the global batch does not depend on
the number of ranks.

Images that fit are put onto the GPU once and never leave it. Others are read ahead by threads, into memory that the
GPU copies from by itself while it computes the step before.

Shapes: B images of this rank, C canvas side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fewlabels import random, runtime
from fewlabels.data.labels import Dataset
from fewlabels.errors import UsageError

AHEAD = 2  # batches read before they are asked for: one being copied, one ready
READERS = 4  # threads beside a GPU; on a CPU one is enough and the others belong to the step
RESIDENT_SHARE = 0.3  # of the GPU's free memory, that a stage's images may take
CHUNK = 256  # images put onto the GPU at once


@dataclass(frozen=True)
class Batch:
    """What enters a stage."""

    pixels: Tensor  # (B, 3, C, C) uint8
    extent: Tensor  # (B, 2) int64, the valid top-left (h, w)
    ids: Tensor  # (B,) int64, row in the store
    labels: Tensor  # (B,) int64, -1 = unlabeled
    epoch: int

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with each of its tensors changed."""
        return Batch(change(self.pixels), change(self.extent), change(self.ids), change(self.labels), self.epoch)

    def to(self, device: torch.device) -> Batch:
        """The same batch on device."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pick(self, rows: Tensor, epoch: int) -> Batch:
        """The images in these places, on the device where all are."""
        return replace(self.each(lambda tensor: tensor[rows]), epoch=epoch)


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

    def share(self, step: int, permutation: np.ndarray, rank: int | None = None) -> np.ndarray:
        """(batch / world_size,) a rank's part of step (this one's), given its epoch's permutation."""
        first = (step % self.steps_per_epoch) * self.batch
        size = self.batch // runtime.world_size()
        first += (runtime.rank() if rank is None else rank) * size
        mine: np.ndarray = permutation[first : first + size]
        return mine


def read(dataset: Dataset, ids: np.ndarray, epoch: int, *, pinned: bool = False) -> Batch:
    """One batch of dataset by rows of its store, on the CPU; pinned: in memory that a GPU copies from by itself."""
    pixels, extent = dataset.store.read(ids, pinned=pinned)
    return Batch(pixels, extent, torch.from_numpy(ids), torch.from_numpy(dataset.labels[ids]), epoch)


Reader = Callable[[np.ndarray, int], Callable[[], Batch]]  # (ids, epoch) -> what the loop calls to get the batch


def training_batches(
    dataset: Dataset, order: Order, *, first_step: int, last_step: int, device: torch.device
) -> Generator[Batch, None, None]:
    """This rank's batches of steps first_step .. last_step - 1, read ahead by threads."""
    reader = _reader(dataset, order.ids, (last_step - first_step) * order.batch / len(order.ids), device)
    threads = 1 if device.type == "cpu" else min(READERS, runtime.threads_while_training())

    def load() -> Iterator[Future[Callable[[], Batch]]]:
        epoch, permutation = -1, order.ids
        for step in range(first_step, last_step):
            if order.epoch(step) != epoch:
                epoch = order.epoch(step)
                permutation = order.permutation(epoch)
            yield pool.submit(reader, order.share(step, permutation), epoch)

    # A thread begins on the first GPU, whichever the process has chosen: every rank would take memory of that one
    chosen = partial(torch.cuda.set_device, device.index or 0) if device.type == "cuda" else None
    with ThreadPoolExecutor(threads, thread_name_prefix="batches", initializer=chosen) as pool:
        waiting: deque[Future[Callable[[], Batch]]] = deque()
        try:
            for future in load():
                waiting.append(future)
                if len(waiting) > AHEAD + threads - 1:
                    yield waiting.popleft().result()()
            while waiting:
                yield waiting.popleft().result()()
        finally:
            pool.shutdown(cancel_futures=True)


def _reader(dataset: Dataset, ids: np.ndarray, passes: float, device: torch.device) -> Reader:
    """The one for images ids, each of which is seen so many times."""
    if fits(dataset, ids, passes, runtime.free_memory(device)):
        return resident(dataset, ids, device)
    if device.type == "cuda":
        return uploading(dataset, device)
    return lambda chosen, epoch: partial(read(dataset, chosen, epoch).to, device)  # no copy


def fits(dataset: Dataset, ids: np.ndarray, passes: float, free: int) -> bool:
    """Whether to put images ids onto a device with free bytes: they are few enough, and each is seen at least once."""
    return passes >= 1 and len(ids) * 3 * dataset.store.canvas**2 <= RESIDENT_SHARE * free


def resident(dataset: Dataset, ids: np.ndarray, device: torch.device) -> Reader:
    """Batches picked on the device from a copy of all images ids."""
    ids = np.sort(ids)  # the place of an image in the copy is that of its row in here
    everything = Batch(
        torch.empty(len(ids), 3, dataset.store.canvas, dataset.store.canvas, dtype=torch.uint8, device=device),
        torch.empty(len(ids), 2, dtype=torch.int64, device=device),
        torch.from_numpy(ids).to(device), torch.from_numpy(dataset.labels[ids]).to(device), 0,
    )  # fmt: skip
    for first in range(0, len(ids), CHUNK):
        part = read(dataset, ids[first : first + CHUNK], 0)
        everything.pixels[first : first + CHUNK] = part.pixels.to(device)
        everything.extent[first : first + CHUNK] = part.extent.to(device)

    def start(chosen: np.ndarray, epoch: int) -> Callable[[], Batch]:
        places = torch.from_numpy(np.searchsorted(ids, chosen))
        # Picked when the loop asks, on its own stream
        return lambda: everything.pick(places.to(device, non_blocking=True), epoch)

    return start


def uploading(dataset: Dataset, device: torch.device) -> Reader:
    """Batches copied to a GPU on a stream of their own, which the loop's stream waits for, not the host.

    torch gives a pinned block to the next batch only when its copy is done, and memory of the GPU only when the loop's
    stream, too, is done with it (record_stream).
    """
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(ids: np.ndarray, epoch: int) -> Callable[[], Batch]:
        with torch.cuda.stream(copies):
            batch = read(dataset, ids, epoch, pinned=True).to(device)
            done = copies.record_event()

        def take() -> Batch:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(done)
            for part in (batch.pixels, batch.extent, batch.ids, batch.labels):
                part.record_stream(stream)
            return batch

        return take

    return start


def in_order(dataset: Dataset, ids: np.ndarray, *, batch: int, device: torch.device) -> Iterator[Batch]:
    """ids as they come, the last batch shorter: for features and predictions."""
    for first in range(0, len(ids), batch):
        yield read(dataset, ids[first : first + batch], 0).to(device)
