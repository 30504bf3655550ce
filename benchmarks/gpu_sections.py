"""The sections of gpu.py: each a generator of rows, which keeps within its time by itself where it can.

Times are medians of calls between two events on the device. Everything runs through what `fewlabels fit` runs: the
real store, loader, stages and loop, in the precision that it chooses. "by blocks" is torch.compile of each residual
block: a whole network takes minutes to compile, and equal blocks share what was compiled.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import distill, harness, views, workload
from benchmarks.parts import Parts
from fewlabels.data import views as making
from fewlabels.data.loader import Batch
from fewlabels.model.losses import nt_xent
from fewlabels.stages import loop
from fewlabels.stages.pretrain import Pretrain

T = TypeVar("T")
Rows = Iterator[dict[str, Any]]

WIDTH, TEMPERATURE = 128, 0.1
SPARE = 0.94  # of the device's memory: what an allocator can use of it


@dataclass(frozen=True)
class Place:
    """Where a section runs, at which sizes, and until when."""

    device: torch.device
    toy: bool
    ends: float  # of time.perf_counter

    def pick(self, real: T, toy: T) -> T:
        """The size to take."""
        return toy if self.toy else real

    def left(self) -> float:
        """Seconds."""
        return self.ends - time.perf_counter()

    def seconds(self, work: Callable[[], Any], *, within: float = 2.0) -> float:
        """Median seconds of a call: as many calls as fit, from 3 to 50, after one to warm up."""
        work()
        began, found = time.perf_counter(), []
        while len(found) < 3 or (len(found) < 50 and time.perf_counter() - began < self.pick(within, 0.0)):
            found.append(harness.seconds_of(work))
        return float(np.median(found))


def row(name: str, value: float | None, unit: str = "", note: str = "") -> dict[str, Any]:
    """What a section finds."""
    return {"name": name, "value": value, "unit": unit, "note": note}


def peak_bytes(work: Callable[[], Any], device: torch.device) -> float:
    """What work adds to the allocated memory of the device; on a CPU to that of the process."""
    gc.collect()
    if device.type != "cuda":
        return harness.added_peak(work)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated() - before)


# --- what the device can do, and whether ours is right on it -----------------------------------------------------


def ceilings(at: Place) -> Rows:
    """A large matrix product and a large copy: what nothing can exceed."""
    name = torch.cuda.get_device_name() if at.device.type == "cuda" else "cpu"
    yield row("device", torch.get_num_threads(), "threads", name)
    n = at.pick(8192, 256)
    a, b = (torch.randn(n, n, device=at.device, dtype=torch.bfloat16) for _ in range(2))
    yield row("bf16 matrix product", 2 * n**3 / at.seconds(lambda: a @ b) / 1e12, "TFLOP/s", f"{n} x {n}")
    source = torch.randn(at.pick(2**29, 2**18), device=at.device)
    target = torch.empty_like(source)
    moved = 2 * 4 * len(source)
    yield row("copy", moved / at.seconds(lambda: target.copy_(source)) / 1e12, "TB/s", "bytes read and written")


def correct(at: Place) -> Rows:
    """The device's views against the plain ones, its loss against float64."""
    for size, canvas in at.pick([(32, 32), (96, 120), (224, 256)], [(16, 20)]):
        pixels = workload.smooth_pictures(at.pick(32, 4), canvas).to(at.device)
        for kind in making.KINDS:
            worst = _views_apart(pixels, size, kind)
            yield row(f"views {size} {kind}, largest error", worst, "of 1", _verdict(worst, views.AGREE))
        placement = views.differences(pixels, size, 1.0, blur=True)["placement"]
        yield row(f"views {size} against torchvision", placement, "of 1", _verdict(placement, views.AGREE))
    for pairs, temperature in at.pick([(1000, 0.1), (4096, 0.5), (4096, 0.1)], [(60, 0.1)]):
        for name, autocast, bounds in (("fp32", False, (1e-5, 1e-4)), ("bf16", True, (1e-3, 2e-2))):
            apart = _loss_apart(at, pairs, temperature, autocast=autocast)
            for what, error, bound in zip(("loss", "gradient"), apart, bounds, strict=True):
                title = f"NT-Xent {name}, {pairs} pairs at {temperature}, {what}"
                yield row(title, error, "relative", _verdict(error, bound))


def _verdict(error: float, bound: float) -> str:
    return f"within {bound:g}" if error <= bound else f"WRONG: above {bound:g}"


def _views_apart(pixels: Tensor, size: int, kind: str) -> float:
    extent = torch.tensor(pixels.shape[2:], device=pixels.device).repeat(len(pixels), 1)
    extent[::2] -= 3  # not all of the canvas is the image
    ids, key = torch.arange(len(pixels), device=pixels.device), {"epoch": 3, "seed": 1, "view": 1}

    def both() -> list[Tensor]:
        pretrain = making.pretrain(pixels, extent, ids, size=size, kind=kind, **key)
        return [
            pretrain,
            making.finetune(pixels, extent, ids, size=size, kind=kind, **key),
            making.evaluate(pixels, extent, size=size, kind=kind),
        ]

    fast = both()
    with workload.plain_views():
        slow = both()
    return max(float((a - b).abs().max()) for a, b in zip(fast, slow, strict=True))


def _projections(at: Place, pairs: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(pairs)
    first = torch.randn(pairs, WIDTH, device=at.device)
    return first, first + 2 * torch.randn(pairs, WIDTH, device=at.device)


def _contrast(at: Place, first: Tensor, second: Tensor, temperature: float, *, autocast: bool) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the first views."""
    a, b = first.clone().requires_grad_(), second.clone().requires_grad_()
    with torch.autocast(at.device.type, dtype=torch.bfloat16, enabled=autocast):
        loss = nt_xent(a, b, temperature)
    loss.backward()
    assert a.grad is not None
    return loss.detach(), a.grad


def _loss_apart(at: Place, pairs: int, temperature: float, *, autocast: bool) -> tuple[float, float]:
    first, second = _projections(at, pairs)
    loss, gradient = _contrast(at, first, second, temperature, autocast=autocast)
    exact = first.double().requires_grad_()
    wanted = workload.whole_matrix(exact, second.double(), temperature)
    (slope,) = torch.autograd.grad(wanted, exact)
    wanted = wanted.detach()
    return float((loss - wanted).abs() / wanted), float((gradient - slope).norm() / slope.norm())


# --- the loss and the views --------------------------------------------------------------------------------------


def loss(at: Place) -> Rows:
    """Forward and backward at growing sizes under autocast and without, then a million pairs."""
    size, ms = 0, 0.0
    for size in at.pick((4096, 16384, 32768), (64, 128)):
        first, second = _projections(at, size)
        for name, autocast in ((f"loss {size} fp32", False), (f"loss {size}", True)):
            call = functools.partial(_contrast, at, first, second, TEMPERATURE, autocast=autocast)
            ms = 1000 * at.seconds(call)
            yield row(name, ms, "ms", f"{peak_bytes(call, at.device) / 1e6:,.0f} MB more than the inputs")
        yield _dense(at, first, second)
    million = at.pick(1 << 20, 256)
    expected = ms / 1000 * (million / size) ** 2
    if 1.5 * expected > at.left():
        yield row(f"loss {million}", None, "ms", f"left out: about {expected:.0f} s, {at.left():.0f} are left")
        return
    first, second = _projections(at, million)
    spent = harness.seconds_of(lambda: _contrast(at, first, second, TEMPERATURE, autocast=True))
    yield row("loss largest", million, "pairs")
    yield row(f"loss {million}", 1000 * spent, "ms", "one call, the first of this size")


def _dense(at: Place, first: Tensor, second: Tensor) -> dict[str, Any]:
    """The whole matrix at once, where it fits."""
    name = f"loss {len(first)}, the whole matrix"

    def call() -> None:
        a = first.clone().requires_grad_()
        workload.whole_matrix(a, second, TEMPERATURE).backward()

    try:
        return row(name, 1000 * at.seconds(call), "ms", f"{peak_bytes(call, at.device) / 1e6:,.0f} MB")
    except torch.OutOfMemoryError:
        return row(name, None, "ms", "out of memory")


def view_speed(at: Place) -> Rows:
    """Two views of a batch: ours, the plain path, kornia."""
    rivals = ["kornia"] if importlib.util.find_spec("kornia") else []
    if not rivals:
        yield row("kornia", None, "", "not installed here")
    for size, (side, _, strength, blur, _) in views.CASES.items():
        count = at.pick(views.CUDA_IMAGES[size], 2)
        pixels = workload.smooth_pictures(count, side).to(at.device)
        spent = {
            name: at.seconds(views.MAKERS[name](pixels, size, strength, blur=blur))
            for name in ("ours", "plain", *rivals)
        }
        for name, value in spent.items():
            yield row(f"views {size} {name}", 1e6 * value / (2 * count), "us/view", f"two views of {count} images")
            if name != "ours":
                yield row(f"views {size} against {name}", value / spent["ours"], "x")


# --- whole steps -------------------------------------------------------------------------------------------------


def speed(state: loop.TrainState, batches: Iterable[Batch], *, steps: int, warm: int) -> tuple[float, float]:
    """(seconds a step, share that the loop says it waited for batches) of loop.train, logging as often as `fit`."""
    moments: list[Any] = []
    waits: list[float] = []

    def watched() -> Iterator[Batch]:
        for batch in batches:
            moments.append(harness.moment())
            yield batch

    device = next(state.stage.parameters()).device
    plan, listeners = workload.brief(steps, lambda _, said: waits.append(said["wait_share"]), log_every=50)
    loop.train(state, watched(), plan, listeners, workload.precision(device))
    return harness.elapsed(moments[warm], moments[-1]) / (len(moments) - 1 - warm), waits[-1]


def _shares(at: Place, title: str, state: loop.TrainState, dataset: Any, batch: int, steps: int) -> Rows:
    """The step taken apart, rows "TITLE: part"."""
    parts = Parts(state)
    plan, listeners = workload.brief(steps, lambda *_: None, log_every=50)
    batches = parts.watched(workload.batches(dataset, batch, at.device, steps=steps))
    loop.train(state, batches, plan, listeners, workload.precision(at.device))
    for part, share in parts.told(title, skip=min(3, steps // 2)).items():
        if part != "step":
            yield row(f"{title}: {part}", 100 * share, "%", "of the eager step")


def _ways(at: Place, name: str, *, least: float, **settings: Any) -> Iterator[tuple[str, loop.TrainState]]:
    """A network to pretrain as it is, and another compiled by blocks where `least` seconds are left for it."""
    for way in at.pick(("eager", "by blocks"), ("eager",)):
        if way != "eager" and at.left() < least:
            return
        state = workload.pretraining(name, at.device, **settings)
        if way != "eager":
            state.stage.encoder.compile_blocks()  # type: ignore[union-attr, operator]
        yield way, state
        del state  # before the next one takes memory


def cifar(at: Place) -> Rows:
    """ResNet-18 on 50,000 random images of 32 px through the real loader: eager and compiled by blocks."""
    count, batch, steps = at.pick((50_000, 512, 200), (24, 8, 4))
    name, settings = at.pick("resnet18_small", "resnet18_0.125x_small"), {"size": 32, "strength": 0.5, "blur": False}
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as temporary:
        dataset = workload.stored(images, Path(temporary))
        found: dict[str, float] = {}
        for way, state in _ways(at, name, least=30, **settings):
            batches = workload.batches(dataset, batch, at.device, steps=steps)
            found[way], waited = speed(state, batches, steps=steps, warm=steps // 4)
            yield row(f"cifar {way}", batch / found[way], "pairs/s", f"waited {100 * waited:.2f} %")
        best = min(found, key=lambda way: found[way])
        yield row("cifar pairs", batch / found[best], "pairs/s", best)
        yield row("cifar minutes", 1000 * (50_000 // batch) * found[best] / 60, "minutes", f"projected, {best}")
        state = workload.pretraining(name, at.device, **settings)
        eager = {}
        for share in _shares(at, "cifar", state, dataset, batch, steps // 4 + 2):
            eager[share["name"]] = share["value"]
            yield share
        # Views cost what they cost; the step that they are a share of is the faster one
        yield row("views share 32", eager["cifar: views"] * found["eager"] / found[best], "%", f"of the step {best}")


def optimizers(at: Place) -> Rows:
    """Steps on a batch that is there with the paper's optimizer and with that of our recipe for photos."""
    real = [
        ("resnet18_0.25x_small", 32, 1024, 2), ("resnet18_0.25x_small", 24, 512, 4), ("resnet18_small", 32, 1024, 2),
        ("resnet18_small", 24, 512, 4), ("resnet50", 224, 256, 2),
    ]  # fmt: skip
    for name, size, images, count in at.pick(real, [("resnet18_0.125x_small", 16, 4, 4)]):
        for optimizer in ("lars", "muon"):
            state = workload.pretraining(
                name, at.device, size=size, strength=0.5, blur=size > 48, count=count, optimizer=optimizer
            )
            took = at.seconds(functools.partial(_step_of, at, state, images, size), within=1.0)
            yield row(f"step {name} {size} px, {images} x {count} views, {optimizer}", 1e3 * took, "ms")
            del state


def _photos(folder: Path, count: int) -> None:
    """So many JPEG files of 500 x 375: smooth with texture, 88 KB each."""
    rng = np.random.default_rng(0)
    texture = rng.integers(-24, 25, (16, 375, 500, 3), dtype=np.int16)

    def write(number: int) -> None:
        coarse = np.random.default_rng(number).integers(0, 256, (8, 10, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        picture = np.clip(smooth + texture[number % 16], 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{number:05}.jpg", quality=91)

    folder.mkdir()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(count)))


def imagenet(at: Place) -> Rows:
    """ResNet-50 on a folder of JPEG files through store and loader, and on one batch that is there again and again.

    Less than one pass over the files: like those of a set too large to stay on the device.
    """
    count, batch, steps, size = at.pick((8192, 256, 30, 224), (20, 4, 4, 32))
    name = at.pick("resnet50", "resnet50_0.125x")
    with tempfile.TemporaryDirectory() as temporary:
        _photos(Path(temporary) / "photos", count)
        bytes_each = np.mean([path.stat().st_size for path in (Path(temporary) / "photos").iterdir()])
        began = time.perf_counter()
        dataset = workload.stored(Path(temporary) / "photos", Path(temporary) / "run", working_size=at.pick(256, 40))
        rate = count / (time.perf_counter() - began)
        yield row(
            "JPEG files into the store", rate, "images/s", f"{bytes_each / 1000:.0f} KB each, {os.cpu_count()} cores"
        )
        found: dict[str, float] = {}
        for way, state in _ways(at, name, least=60, size=size, strength=1.0, blur=True):
            batches = workload.batches(dataset, batch, at.device, steps=steps)
            found[way], waited = speed(state, batches, steps=steps, warm=steps // 3)
            yield row(f"imagenet {way}", 2 * batch / found[way], "views/s", f"the loop waited {100 * waited:.2f} %")
            again = itertools.repeat(next(iter(workload.batches(dataset, batch, at.device, steps=1))), steps)
            there, _ = speed(loop.TrainState(state.stage, state.optimizer), again, steps=steps, warm=steps // 3)
            lost = 100 * max(0.0, 1 - there / found[way])
            yield row(f"imagenet {way}, one batch again", 2 * batch / there, "views/s")
            yield row("imagenet wait", lost, "%", f"what the loader costs beside one batch again and again, {way}")
        best = min(found, key=lambda way: found[way])
        yield row("imagenet views", 2 * batch / found[best], "views/s", best)
        state = workload.pretraining(name, at.device, size=size, strength=1.0, blur=True)
        eager = {}
        for share in _shares(at, "imagenet", state, dataset, batch, steps // 2 + 2):
            eager[share["name"]] = share["value"]
            yield share
        of_step = eager["imagenet: views"] * found["eager"] / found[best]
        yield row("views share 224", of_step, "%", f"of the step {best}")


def distillation(at: Place) -> Rows:
    """distill.py's contest on 256 px images: an R50 and an R18, and the paper's largest teacher with an R50."""
    cases = at.pick(
        [("resnet50", "resnet18", 256), ("resnet152_3x_sk", "resnet50", 128)],
        [("resnet50_0.125x", "resnet18_0.125x", 4)],
    )
    size, canvas, epoch = at.pick((224, 256, 4), (32, 40, 2))
    for number, (teacher, student, batch) in enumerate(cases):
        if at.left() < at.pick(20, 0):
            break
        with tempfile.TemporaryDirectory() as temporary:
            pictures = workload.smooth_pictures(epoch * batch, canvas).permute(0, 2, 3, 1).numpy()
            dataset = workload.stored(pictures, Path(temporary))
            contest = distill.Contest((teacher, student), dataset, batch, Path(temporary), at.device, size=size)
            spent = {name: at.seconds(call, within=3.0) for name, call in contest.contenders().items()}
        ours = spent.pop("ours")
        title = f"{student} taught by {teacher}"
        yield row(f"{title}, cached", batch / ours, "images/s")
        for name, value in spent.items():
            yield row(f"{title}: {name}", value / ours, "x ours")
        if number == 0:
            yield row("distill online", spent["teacher in every step"] / ours, "x")
            yield row("distill supervised", spent["student on labels"] / ours, "x")


# --- the widest network ------------------------------------------------------------------------------------------


def wide(at: Place) -> Rows:
    """ResNet-152 3x SK: the most views of a step in the device's memory without checkpointing, and their speed."""
    name, size = at.pick(("resnet152_3x_sk", 224), ("resnet50_0.125x_sk", 32))
    memory = torch.cuda.get_device_properties(at.device).total_memory if at.device.type == "cuda" else 1 << 30
    most, best = 0, 0.0
    for way, state in _ways(at, name, least=60, size=size, strength=1.0, blur=True):
        pairs, note = _largest(at, state, memory, size)
        yield row(f"wide {way}, most views", 2 * pairs, "views", note)
        spent = at.seconds(functools.partial(_step_of, at, state, pairs, size), within=5.0)
        yield row(f"wide {way}", 2 * pairs / spent, "views/s", f"{2 * pairs} views a step")
        most, best = max(most, 2 * pairs), max(best, 2 * pairs / spent)
        del state
        gc.collect()
    yield row("wide views", most, "views", f"{memory / 2**30:.1f} GiB on the device")
    yield row("wide speed", best, "views/s")


def _step_of(at: Place, state: loop.TrainState, pairs: int, size: int) -> None:
    """One step on random images that are there."""
    canvas = size * 8 // 7
    batch = Batch(
        torch.randint(0, 256, (pairs, 3, canvas, canvas), dtype=torch.uint8, device=at.device),
        torch.full((pairs, 2), canvas, device=at.device),
        torch.arange(pairs, device=at.device),
        torch.full((pairs,), -1, device=at.device),
        0,
    )
    assert isinstance(state.stage, Pretrain)
    loop.step(state, batch, 1e-3, workload.precision(at.device))


def _largest(at: Place, state: loop.TrainState, memory: int, size: int) -> tuple[int, str]:
    """The most pairs that a step was made with: foreseen from two small steps, lowered while it does not fit."""
    few, more = at.pick((8, 24), (2, 4))
    _step_of(at, state, few, size)  # gradients and the optimizer's buffers are there from now on
    held = torch.cuda.memory_allocated() if at.device.type == "cuda" else 0
    first, second = (peak_bytes(functools.partial(_step_of, at, state, n, size), at.device) for n in (few, more))
    a_pair = max((second - first) / (more - few), 1e5)
    pairs = max(1, int((SPARE * memory - held - first) / a_pair) + few)
    note = f"{a_pair / 2e6:.0f} MB a view, {held / 2**30:.1f} GiB held between steps"
    pairs = at.pick(pairs, 4)
    while True:
        try:
            _step_of(at, state, pairs, size)
            return pairs, note
        except torch.OutOfMemoryError:
            pairs = pairs * 24 // 25
        gc.collect()
        torch.cuda.empty_cache()


SECTIONS: dict[str, tuple[Callable[[Place], Rows], float]] = {  # name: what it does, its seconds at most
    "ceilings": (ceilings, 30),
    "correct": (correct, 80),
    "loss": (loss, 60),
    "views": (view_speed, 50),
    "cifar": (cifar, 100),
    "optimizers": (optimizers, 60),
    "imagenet": (imagenet, 140),
    "distill": (distillation, 70),
    "wide": (wide, 180),
}
