"""Stage 1: a big encoder from images without labels (SimCLRv2 section 2, "Self-supervised pretraining").

Two views of every image, or more, go through the encoder and a deep projection head in one forward pass, so that batch
norm sees all; NT-Xent pulls each two views of an image together and pushes all others apart.

A batch too large for the memory is taken in chunks (chunks.py).

Shapes: B images of this rank, V views, D projections, Q keys in the memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from fewlabels import random, runtime
from fewlabels.data.loader import Batch
from fewlabels.model.encoder import Encoder
from fewlabels.model.heads import ProjectionHead
from fewlabels.model.losses import contrast_accuracy, nt_xent, nt_xent_with_queue
from fewlabels.stages.chunks import Chunks
from fewlabels.stages.loop import Stage, follow

View = Callable[[Batch, int], Tensor]  # (batch, number of the view) -> (B, 3, size, size) in [0, 1]


class Pretrain(Stage):
    """SimCLRv2 pretraining: forward(batch) -> NT-Xent of two views, or its mean over every two of more.

    More than two are not the paper's: see recipes.best.
    """

    def __init__(
        self, encoder: Encoder, head: ProjectionHead, *, view: View, temperature: float = 0.1, num_views: int = 2,
        chunks: Chunks | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.head, self.num_views = encoder, head, num_views
        self.view, self.temperature, self.chunks = view, temperature, chunks

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.compare(*self.look(batch))

    def backward(self, batch: Batch, precision: runtime.Precision) -> dict[str, Tensor]:
        if self.chunks is None or len(self.chunks.split(batch)) == 1:
            return super().backward(batch, precision)
        return self.chunks.backward(self, batch, precision)

    def look(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The projections (V B, D) of all views, first views before second ones; and keys, if the stage has any."""
        return self.project(self.views(batch)), None

    def views(self, batch: Batch) -> Tensor:
        """All views in one tensor (V B, 3, size, size)."""
        return torch.cat([self.view(batch, number) for number in range(self.num_views)])

    def project(self, views: Tensor) -> Tensor:
        """(V B, D)"""
        return self.head(self.encoder(views))  # type: ignore[no-any-return]

    def compare(self, projections: Tensor, keys: Tensor | None) -> dict[str, Tensor]:
        """The loss and what is logged, of what look gives."""
        del keys
        seen = projections.chunk(self.num_views)
        return self.over_pairs(seen, lambda a, b: nt_xent(seen[a], seen[b], self.temperature))

    def over_pairs(self, seen: Sequence[Tensor], loss: Callable[[int, int], Tensor]) -> dict[str, Tensor]:
        """The mean of loss(a, b), each the paper's mean over 2N anchors, over every two views, and what is logged."""
        losses = [loss(a, b) for a, b in combinations(range(self.num_views), 2)]
        return {"loss": torch.stack(losses).mean(), "contrast_accuracy": contrast_accuracy(*seen[:2])}


class PretrainWithMomentum(Pretrain):
    """The same with a momentum encoder and a memory of past keys (SimCLRv2 section 3.1, "memory").

    The authors did not release theirs. Here keys are the moving average's projections of both views in train-mode
    batch norm; an anchor's positive is the other view's key, its negatives are all other keys of the batch and the
    memory. After the step the average moves, weights and batch norm statistics alike, and the keys enter the memory.
    """

    queue: Tensor  # (Q, D)
    next_row: Tensor  # ()

    def __init__(
        self, encoder: Encoder, head: ProjectionHead, *, view: View, temperature: float, momentum: float, queue: int,
        num_views: int = 2, chunks: Chunks | None = None,
    ) -> None:  # fmt: skip
        super().__init__(encoder, head, view=view, temperature=temperature, num_views=num_views, chunks=chunks)
        self.momentum = momentum
        self.average = copy.deepcopy(nn.ModuleDict({"encoder": encoder, "head": head})).requires_grad_(False)
        # Random unit vectors until real keys fill the memory, as in MoCo
        noise = random.uniforms(0, 0, torch.arange(queue), stream=99, count=head.width()) - 0.5
        self.register_buffer("queue", nn.functional.normalize(noise, dim=1) if queue else noise)  # (Q, D)
        self.register_buffer("next_row", torch.zeros((), dtype=torch.long))
        self._keys = torch.empty(0)

    def look(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        views = self.views(batch)
        projections = self.project(views)
        with torch.no_grad():
            keys = nn.functional.normalize(self.average["head"](self.average["encoder"](views)).float(), dim=1)
        return projections, keys

    def compare(self, projections: Tensor, keys: Tensor | None) -> dict[str, Tensor]:
        assert keys is not None
        seen, keys_seen = projections.chunk(self.num_views), keys.chunk(self.num_views)
        # View by view, so that the memory's order does not depend on the number of ranks
        self._keys = torch.cat([runtime.gather(part) for part in keys_seen])[-len(self.queue) :]

        def loss(a: int, b: int) -> Tensor:
            return nt_xent_with_queue(seen[a], seen[b], keys_seen[a], keys_seen[b], self.queue, self.temperature)

        return self.over_pairs(seen, loss)

    @torch.no_grad()
    def after_step(self) -> None:
        follow(self.average, nn.ModuleDict({"encoder": self.encoder, "head": self.head}), 1 - self.momentum)
        if len(self.queue):
            rows = (self.next_row + torch.arange(len(self._keys), device=self._keys.device)) % len(self.queue)
            self.queue[rows] = self._keys.to(self.queue.dtype)
            self.next_row.copy_((self.next_row + len(self._keys)) % len(self.queue))
