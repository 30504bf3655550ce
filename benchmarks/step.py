"""A whole pretraining step on 32 px images in memory: ours against lightly's documented loop, and that loop tuned.

    python -m benchmarks step --peers lightly --threads 2

Ours is what `fewlabels fit` runs: loader, views, encoder, head, NT-Xent, LARS, in bfloat16 and channels_last where
the processor multiplies it. lightly's loop is that of its SimCLR example: its transform in a DataLoader, its head and
loss, SGD; float32, NCHW. Tuned: the same under ours' autocast and in channels_last, without and with a worker process
that makes the views ahead. All train one network (in a peer's loop with torch's BatchNorm2d). "network alone" is
forward and backward of the encoder on views that are there, under the same autocast: what no loop can be faster than.
Ours keeps freed memory (runtime.keep_freed_memory), peers have glibc's own ways. Then one step is taken apart by
hooks (parts.py): what is not the encoder's forward or backward, as a share of it.

solo-learn, the other widely used loop, is not here: its release on the package index (1.0.2) asks for torch 1.9.1.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks import harness, workload
from benchmarks.parts import Parts
from fewlabels import runtime
from fewlabels.data.labels import Dataset
from fewlabels.model import layers
from fewlabels.model.encoder import encoder
from fewlabels.stages import loop

CASES = {"resnet18_0.25x_small": (128, 12), "resnet18_small": (64, 7)}  # images a step, rounds
STEPS = 2  # in one call of a contender
WATCHED, SKIPPED = 16, 3  # steps taken apart, and how many first ones are not counted
CPU = torch.device("cpu")
VIEWS: dict[str, Any] = {"size": 32, "strength": 0.5, "blur": False}  # the paper's for CIFAR


class Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """PIL images in memory through a transform."""

    def __init__(self, pixels: torch.Tensor, transform: Callable[[Any], Any]) -> None:
        self.pictures = [Image.fromarray(np.ascontiguousarray(p.permute(1, 2, 0).numpy())) for p in pixels]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.pictures[index])


def ours(name: str, dataset: Dataset, batch: int) -> Callable[[], Any]:
    """The loop's own step on the loader's own batches."""
    state, precision = workload.pretraining(name, CPU, **VIEWS), workload.precision(CPU)
    batches = workload.batches(dataset, batch, CPU)

    def work() -> None:
        runtime.keep_freed_memory()
        for _ in range(STEPS):
            loop.step(state, next(batches), 0.1, precision)

    return work


def network_alone(name: str, pixels: torch.Tensor, batch: int) -> Callable[[], Any]:
    """Forward and backward of ours on views that are there already."""
    precision = workload.precision(CPU)
    body = precision.layout(encoder(name))
    made = (pixels[:batch].repeat(2, 1, 1, 1) / 255).contiguous(memory_format=workload.layout(precision))

    def work() -> None:
        runtime.keep_freed_memory()
        for _ in range(STEPS):
            body.zero_grad(set_to_none=True)
            with precision.context(CPU):
                total = body(made).sum()
            total.backward()

    return work


def _with_torch_norm(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, layers.BatchNorm):
            setattr(module, name, nn.BatchNorm2d(len(child.weight)))
        else:
            _with_torch_norm(child)
    return module


def lightly(
    name: str, pixels: torch.Tensor, batch: int, *, precision: runtime.Precision, workers: int
) -> Callable[[], Any]:
    """Its documented loop around the same network; an epoch of pixels is a call."""
    transforms = importlib.import_module("lightly.transforms.simclr_transform")
    heads = importlib.import_module("lightly.models.modules.heads")
    loss = importlib.import_module("lightly.loss").NTXentLoss()
    torch.manual_seed(0)
    body = encoder(name)
    width = body.feature_dim
    model = nn.Sequential(_with_torch_norm(body), heads.SimCLRProjectionHead(width, width, 128))
    precision.layout(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    transform = transforms.SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0, normalize=None)
    loader = torch.utils.data.DataLoader(
        Pictures(pixels, transform), batch_size=batch, shuffle=True, drop_last=True,
        num_workers=workers, persistent_workers=workers > 0,
    )  # fmt: skip

    def work() -> None:
        harness.usual_malloc()
        for made in loader:
            with precision.context(CPU):
                # its example calls the model once a view
                first, second = [model(view.contiguous(memory_format=workload.layout(precision))) for view in made[:2]]
            value = loss(first.float(), second.float())
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

    return work


def contenders(
    name: str, pixels: torch.Tensor, dataset: Dataset, batch: int, peers: list[str]
) -> dict[str, Callable[[], Any]]:
    """By name, all for one network."""
    calls = {"ours": ours(name, dataset, batch), "network alone": network_alone(name, pixels, batch)}
    if "lightly" in peers:
        documented, tuned = runtime.Precision(None, channels_last=False), workload.precision(CPU)
        calls |= {
            "lightly, as documented": lightly(name, pixels, batch, precision=documented, workers=0),
            "lightly, tuned": lightly(name, pixels, batch, precision=tuned, workers=0),
            "lightly, tuned, a worker": lightly(name, pixels, batch, precision=tuned, workers=1),
        }
    return calls


def taken_apart(name: str, dataset: Dataset, batch: int, folder: Path) -> dict[str, float]:
    """Shares of the step's parts in the training loop itself, which logs each step: more often than `fit` does."""
    runtime.keep_freed_memory()
    state = workload.pretraining(name, CPU, **VIEWS)
    parts = Parts(state)
    batches = workload.batches(dataset, batch, CPU, steps=WATCHED)
    with (folder / f"{name}.log").open("w") as log:
        plan, listeners = workload.brief(WATCHED, lambda step, values: print(step, values, file=log, flush=True))
        loop.train(state, parts.watched(batches), plan, listeners, workload.precision(CPU))
    return parts.told(f"a step of {batch} images of 32 px, {name}, taken apart", skip=SKIPPED)


def run(*, peers: list[str]) -> dict[str, Any]:
    """The suite."""
    found = {}
    precision = workload.precision(CPU)
    print(f"ours computes in {precision.name}")
    with tempfile.TemporaryDirectory() as temporary:
        for name, (batch, rounds) in CASES.items():
            pixels = workload.smooth_pictures(STEPS * batch, 32)
            dataset = workload.stored(pixels.permute(0, 2, 3, 1).numpy(), Path(temporary) / name)
            calls = contenders(name, pixels, dataset, batch, peers)
            title = f"{STEPS} steps of {batch} images of 32 px, {name}"
            found[name] = harness.table(title, harness.side_by_side(calls, rounds=rounds))
            for contender, row in found[name]["rows"].items():
                row["pairs_per_second"] = 1000 * STEPS * batch / row["ms"]
                print(f"  {contender:<28} {row['pairs_per_second']:10,.0f} pairs/s")
            del calls
            found[name]["shares"] = taken_apart(name, dataset, batch, Path(temporary))
    return {"precision": precision.name, **found}
