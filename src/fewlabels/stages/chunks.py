"""Gradient caching: a contrastive loss of a whole batch in the memory of a chunk (Gao et al. 2021, arXiv 2101.06983).

1. The projections of the whole batch, without gradients. 2. Their loss, and its gradient for each of them. 3. Chunk by
chunk the projections again, now with gradients, and backward from what step 2 gave. Views are made again too: they are
pure functions, and kept they would grow with the batch. Dropout draws in step 3 what it drew in step 1.

Exact, but for batch norm, where one of two things is given up:
"chunk": all views of a chunk's images (on all ranks) are normalised by their own statistics, in steps 1 and 3. It is
  the exact gradient of a network whose batch norm sees a chunk. Running statistics move once a step, to the mean of
  what the chunks would have made of them. The network is computed 4/3 times as much as in one piece.
"batch": step 1 shows the network the whole batch at once, and step 3 normalises by the statistics of that. Loss,
  projections and running statistics are those of the whole batch. The gradient is, but for this: of
  dx = (dy - M[dy] - n M[dy n]) scale / sigma, n the normalised x, the two means M are those over the chunk (on all
  ranks) in place of the batch. Constant statistics would leave them out, and nothing would then hold the weights'
  scale (Ioffe & Szegedy 2015, section 2). Step 1 needs the memory of the batch in the widest layer.

Shapes: B images of this rank, V views, D projections.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewlabels import runtime
from fewlabels.data.loader import Batch
from fewlabels.model import layers
from fewlabels.stages.loop import TIMMS_NORM, running_statistics

if TYPE_CHECKING:
    from fewlabels.stages.pretrain import Pretrain


@dataclass(frozen=True)
class Chunks:
    """images: at most so many in a chunk, over all ranks. norm: "chunk" or "batch"."""

    images: int
    norm: str = "chunk"

    def split(self, batch: Batch) -> list[Batch]:
        """batch in the fewest chunks, of sizes as equal as can be; the same on every rank."""
        count = -(-len(batch.ids) // max(1, self.images // runtime.world_size()))
        pieces = (x.tensor_split(count) for x in (batch.pixels, batch.extent, batch.ids, batch.labels))
        return [
            replace(batch, pixels=pixels, extent=extent, ids=ids, labels=labels)
            for pixels, extent, ids, labels in zip(*pieces, strict=True)
        ]

    def backward(self, stage: Pretrain, batch: Batch, precision: runtime.Precision) -> dict[str, Tensor]:
        """What Stage.backward does, chunk by chunk."""
        device, chunks, whole = batch.pixels.device, self.split(batch), self.norm == "batch"
        running = running_statistics(stage.modules(), layers.BatchNorm, TIMMS_NORM)
        seeds = torch.randint(1 << 62, (len(chunks),)).tolist()  # from the CPU's generator: the step has seeded it
        with torch.no_grad(), precision.context(device), layers.statistics(stage, "keep" if whole else "own"):
            projections, keys = stage.look(batch) if whole else _look(stage, chunks, seeds, running)
        projections.requires_grad_()
        with precision.context(device):
            scalars = stage.compare(projections, keys)
        (slopes,) = torch.autograd.grad(scalars["loss"], projections)  # (V B, D)
        parts = torch.split(_by_image(slopes, stage), [len(chunk.ids) for chunk in chunks], dim=1)
        with layers.statistics(stage, "given" if whole else "own"), _put_back(running):
            for chunk, seed, part in zip(chunks, seeds, parts, strict=True):
                torch.manual_seed(seed)
                with precision.context(device):
                    again = stage.project(stage.views(chunk))
                torch.autograd.backward(again, part.flatten(0, 1))
        return scalars


def _look(
    stage: Pretrain, chunks: Sequence[Batch], seeds: Sequence[int], running: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Projections and keys of all chunks, as stage.look gives them of a whole batch."""
    images = sum(len(chunk.ids) for chunk in chunks)
    moved = [torch.zeros_like(buffer) for buffer in running]
    projections, keys = [], []
    for chunk, seed in zip(chunks, seeds, strict=True):
        torch.manual_seed(seed)
        with _put_back(running):
            own, other = stage.look(chunk)
            torch._foreach_add_(moved, running, alpha=len(chunk.ids) / images)
        projections.append(_by_image(own, stage))
        keys += [] if other is None else [_by_image(other, stage)]
    torch._foreach_copy_(running, moved)
    return torch.cat(projections, 1).flatten(0, 1), torch.cat(keys, 1).flatten(0, 1) if keys else None


def _by_image(rows: Tensor, stage: Pretrain) -> Tensor:
    """(V B, D), first views before second ones -> (V, B, D)."""
    return rows.view(stage.num_views, len(rows) // stage.num_views, -1)


@contextlib.contextmanager
def _put_back(buffers: list[Tensor]) -> Iterator[None]:
    """After the block the buffers are what they were before."""
    before = [buffer.clone() for buffer in buffers]
    yield
    if buffers:
        torch._foreach_copy_(buffers, before)
