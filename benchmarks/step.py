"""A whole pretraining step on 32 px images in memory: ours against lightly's documented loop, and that loop tuned.

    python -m benchmarks step --peers lightly

Ours is what `fewlabels fit` runs: views, encoder, head, NT-Xent, LARS. lightly's loop is that of its SimCLR example:
its transform in a DataLoader, its head and loss, SGD; NCHW float32. Tuned: channels_last and one worker process that
makes the views ahead. All train one network (in a peer's loop with torch's BatchNorm2d). "network alone" is
forward and backward of the encoder on views that are there: what no loop can be faster than.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks import harness
from fewlabels import runtime
from fewlabels.data import views
from fewlabels.data.loader import Batch
from fewlabels.model import layers, optim
from fewlabels.model.encoder import encoder
from fewlabels.model.heads import ProjectionHead
from fewlabels.stages import loop
from fewlabels.stages.pretrain import Pretrain

CASES = {"resnet18_0.25x_small": 128, "resnet18_small": 64}  # images a step
STEPS = 2  # in one call of a contender
ROUNDS = 4


class Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """PIL images in memory through a transform."""

    def __init__(self, pixels: torch.Tensor, transform: Callable[[Any], Any]) -> None:
        self.pictures = [Image.fromarray(np.ascontiguousarray(p.permute(1, 2, 0).numpy())) for p in pixels]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.pictures[index])


def ours(name: str, pixels: torch.Tensor, batch: int) -> Callable[[], Any]:
    """The loop's own step on batches of the pixels."""
    torch.manual_seed(0)
    precision = runtime.precision(torch.device("cpu"))
    body = encoder(name)

    def view(part: Batch, number: int) -> torch.Tensor:
        made = views.pretrain(
            part.pixels, part.extent, part.ids, size=32, epoch=part.epoch, seed=0, view=number, strength=0.5, blur=False
        )
        return made.contiguous(memory_format=torch.channels_last)

    stage = Pretrain(body, ProjectionHead(body.feature_dim), view=view, temperature=0.5)
    precision.layout(stage).train()
    state = loop.TrainState(stage, optim.optimizer("lars", stage, lr=0.1, weight_decay=1e-4))
    extent = torch.full((batch, 2), 32)

    def work() -> None:
        for first in range(0, STEPS * batch, batch):
            ids = torch.arange(first, first + batch)
            part = Batch(pixels[first : first + batch], extent, ids, torch.full((batch,), -1), state.step)
            loop.step(state, part, 0.1, precision)

    return work


def network_alone(name: str, pixels: torch.Tensor, batch: int) -> Callable[[], Any]:
    """Forward and backward of ours on views that are there already."""
    body = encoder(name).to(memory_format=torch.channels_last)
    made = (pixels[: 2 * batch] / 255).contiguous(memory_format=torch.channels_last)

    def work() -> None:
        for _ in range(STEPS):
            body.zero_grad(set_to_none=True)
            body(made).sum().backward()

    return work


def _with_torch_norm(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, layers.BatchNorm):
            setattr(module, name, nn.BatchNorm2d(len(child.weight)))
        else:
            _with_torch_norm(child)
    return module


def lightly(name: str, pixels: torch.Tensor, batch: int, *, tuned: bool = False) -> Callable[[], Any]:
    """Its documented loop around the same network."""
    transforms = importlib.import_module("lightly.transforms.simclr_transform")
    heads = importlib.import_module("lightly.models.modules.heads")
    loss = importlib.import_module("lightly.loss").NTXentLoss()
    torch.manual_seed(0)
    body = encoder(name)
    width = body.feature_dim
    layout = torch.channels_last if tuned else torch.contiguous_format
    model = nn.Sequential(_with_torch_norm(body), heads.SimCLRProjectionHead(width, width, 128))
    model.to(memory_format=layout).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    transform = transforms.SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0, normalize=None)
    loader = torch.utils.data.DataLoader(
        Pictures(pixels, transform), batch_size=batch, shuffle=True, drop_last=True,
        num_workers=int(tuned), persistent_workers=tuned,
    )  # fmt: skip

    def work() -> None:
        for first, second in loader:
            # its example calls the model once a view
            projections = [model(view.contiguous(memory_format=layout)) for view in (first, second)]
            value = loss(*projections)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

    return work


def run(*, peers: list[str]) -> dict[str, Any]:
    """The suite."""
    found = {}
    for name, batch in CASES.items():
        pixels = torch.randint(0, 256, (STEPS * batch, 3, 32, 32), dtype=torch.uint8)
        calls = {"ours": ours(name, pixels, batch), "network alone": network_alone(name, pixels, batch)}
        if "lightly" in peers:
            calls |= {
                "lightly, as documented": lightly(name, pixels, batch),
                "lightly, tuned": lightly(name, pixels, batch, tuned=True),
            }
        title = f"{STEPS} steps of {batch} images of 32 px, {name}"
        found[name] = harness.table(title, harness.side_by_side(calls, rounds=ROUNDS))
        for contender, row in found[name]["rows"].items():
            row["pairs_per_second"] = 1000 * STEPS * batch / row["ms"]
            print(f"  {contender:<28} {row['pairs_per_second']:10,.0f} pairs/s")
    return found
