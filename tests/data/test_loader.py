"""The order of images: a pure function of seed and epoch, shared by ranks, every image once a pass."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fewlabels import runtime
from fewlabels.data import labels, loader, pixels, sources
from fewlabels.errors import UsageError

CPU = torch.device("cpu")


@pytest.fixture
def dataset(tmp_path: Path, visible_images: tuple[np.ndarray, np.ndarray]) -> labels.Dataset:
    images, classes = visible_images
    source = sources.open_source(images, [str(c) if i < 16 else None for i, c in enumerate(classes)])
    store, kept, _ = pixels.build(
        source, tmp_path / "data", working_size=None, max_bad_share=0.05, threads=2, bad_csv=tmp_path / "bad.csv"
    )
    return labels.assemble(source, store, kept)


def ids_of(order: loader.Order, steps: range) -> list[list[int]]:
    return [order.share(s, order.permutation(order.epoch(s))).tolist() for s in steps]


def test_every_image_at_most_once_a_pass() -> None:
    order = loader.Order(np.arange(100, 203), batch=10, seed=3)
    first = np.concatenate(ids_of(order, range(10)))
    assert len(set(first.tolist())) == 100
    assert set(first.tolist()) <= set(range(100, 203))
    assert ids_of(order, range(10)) != ids_of(order, range(10, 20))


def test_a_resumed_order_is_the_order_there_would_have_been(dataset: labels.Dataset) -> None:
    order = loader.Order(dataset.train, batch=12, seed=1)
    whole = list(loader.training_batches(dataset, order, first_step=0, last_step=13, device=CPU))
    for start in (1, 5, 12):
        rest = list(loader.training_batches(dataset, order, first_step=start, last_step=13, device=CPU))
        assert len(rest) == 13 - start
        for mine, other in zip(rest, whole[start:], strict=True):
            assert torch.equal(mine.ids, other.ids)
            assert torch.equal(mine.pixels, other.pixels)
            assert mine.epoch == other.epoch


def test_ranks_share_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    order = loader.Order(np.arange(50), batch=12, seed=7)
    whole = ids_of(order, range(9))
    for world in (2, 3, 4):
        monkeypatch.setattr(runtime, "world_size", lambda world=world: world)
        shares = []
        for rank in range(world):
            monkeypatch.setattr(runtime, "rank", lambda rank=rank: rank)
            shares.append(ids_of(order, range(9)))
        assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == whole


def test_batches_hold_what_the_store_holds(
    dataset: labels.Dataset, visible_images: tuple[np.ndarray, np.ndarray]
) -> None:
    images, classes = visible_images
    order = loader.Order(dataset.train, batch=16, seed=0)
    batch = next(iter(loader.training_batches(dataset, order, first_step=0, last_step=1, device=CPU)))
    for row, i in enumerate(batch.ids.tolist()):
        assert np.array_equal(batch.pixels[row].permute(1, 2, 0).numpy(), images[i])
        assert batch.labels[row] == (classes[i] if i < 16 else -1)
    assert batch.extent.tolist() == [[16, 16]] * 16


def test_too_few_images_for_the_batch() -> None:
    with pytest.raises(UsageError, match="larger than the 5 images"):
        loader.Order(np.arange(5), batch=6, seed=0)


def test_a_batch_that_ranks_cannot_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    with pytest.raises(UsageError, match="cannot be shared equally"):
        loader.Order(np.arange(50), batch=7, seed=0)


def test_images_on_the_device_give_the_batches_of_the_store(
    dataset: labels.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = loader.Order(np.random.default_rng(0).permutation(dataset.train)[:40], batch=12, seed=1)
    read = list(loader.training_batches(dataset, order, first_step=2, last_step=9, device=CPU))
    reads = []
    monkeypatch.setattr(loader, "read", lambda *asked, real=loader.read: reads.append(asked) or real(*asked))
    monkeypatch.setattr(runtime, "free_memory", lambda _: 40 * 3 * 16 * 16 * 4)
    monkeypatch.setattr(loader, "CHUNK", 15)
    picked = list(loader.training_batches(dataset, order, first_step=2, last_step=9, device=CPU))
    assert len(reads) == 3  # 40 images in chunks, and nothing while training
    for mine, other in zip(picked, read, strict=True):
        assert mine.epoch == other.epoch
        for name in ("pixels", "extent", "ids", "labels"):
            assert torch.equal(getattr(mine, name), getattr(other, name)), name


def test_a_copy_beside_the_step_is_waited_for_by_the_stream_and_kept_until_it_is_done(
    dataset: labels.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls and their order, on stand-ins: what a GPU makes of them is torch's word."""
    told: list[tuple[object, ...]] = []
    copies = SimpleNamespace(record_event=lambda: told.append(("copied",)) or "event")
    current = SimpleNamespace(wait_event=lambda event: told.append(("wait", event)))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: copies)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(told.append(("on", stream is copies))))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda part, stream: told.append(("keep", len(part), stream)))
    read, to = loader.read, loader.Batch.to
    monkeypatch.setattr(loader, "read", lambda *asked, pinned: told.append(("read", pinned)) or read(*asked))
    monkeypatch.setattr(loader.Batch, "to", lambda batch, device: told.append(("copy",)) or to(batch, device))
    take = loader.uploading(dataset, CPU)(np.arange(5), 3)
    before = [("on", True), ("read", True), ("copy",), ("copied",)]
    assert told == before
    batch = take()
    assert told == [*before, ("wait", "event"), *[("keep", 5, current)] * 4]
    assert batch.epoch == 3
    assert torch.equal(batch.pixels, dataset.store.read(np.arange(5))[0])


def test_threads_that_read_for_a_gpu_begin_on_it(dataset: labels.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else those of every rank would begin on the first GPU, and take its memory for a context each."""
    begun: dict[str, int] = {}
    device, order = torch.device("cuda", 1), loader.Order(dataset.train, batch=12, seed=1)

    def start(ids: np.ndarray, epoch: int) -> object:
        assert begun[threading.current_thread().name] == 1
        return lambda: loader.read(dataset, ids, epoch)

    monkeypatch.setattr(torch.cuda, "set_device", lambda told: begun.update({threading.current_thread().name: told}))
    monkeypatch.setattr(runtime, "free_memory", lambda _: 0)
    monkeypatch.setattr(loader, "uploading", lambda *_: start)
    assert len(list(loader.training_batches(dataset, order, first_step=0, last_step=4, device=device))) == 4
    assert threading.current_thread().name not in begun


def test_which_images_go_onto_the_device() -> None:
    dataset = SimpleNamespace(store=SimpleNamespace(canvas=10))
    ids, size = np.arange(100), 100 * 300
    assert loader.fits(dataset, ids, passes=1.0, free=int(size / 0.3) + 1)
    assert not loader.fits(dataset, ids, passes=1.0, free=int(size / 0.3) - 1)
    assert not loader.fits(dataset, ids, passes=0.9, free=10 * size)  # it would read more than it saves
    assert runtime.free_memory(CPU) == 0


def test_a_fault_while_reading_reaches_the_loop() -> None:
    def broken(ids: np.ndarray, *, pinned: bool) -> None:
        raise OSError("the disk is gone")

    dataset = SimpleNamespace(store=SimpleNamespace(read=broken, canvas=8), labels=np.zeros(50, dtype=np.int64))
    order = loader.Order(np.arange(50), batch=10, seed=0)
    with pytest.raises(OSError, match="the disk is gone"):
        next(iter(loader.training_batches(dataset, order, first_step=0, last_step=3, device=CPU)))
