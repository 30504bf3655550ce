"""Pretraining on more views of an image than two."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor, nn

from fewlabels.data.loader import Batch
from fewlabels.stages.pretrain import Pretrain


def batch(rows: Tensor) -> Batch:
    return Batch(rows, torch.full((len(rows), 2), 1), torch.arange(len(rows)), torch.full((len(rows),), -1), 0)


def shifted(batch: Batch, number: int) -> Tensor:
    """Another view of the same rows."""
    return batch.pixels + 0.3 * number * batch.pixels.flip(1).sin()


def slow(views: list[Tensor], temperature: float) -> float:
    """Equation 1 for every two views, anchor by anchor; the mean of all."""
    losses = []
    for first, second in combinations(views, 2):
        rows = torch.cat([first, second])
        rows = rows / rows.norm(dim=1, keepdim=True)
        for i in range(len(rows)):
            scores = [math.exp(float(rows[i] @ rows[j]) / temperature) for j in range(len(rows)) if j != i]
            own = float(rows[i] @ rows[(i + len(first)) % len(rows)]) / temperature
            losses.append(math.log(sum(scores)) - own)
    return sum(losses) / len(losses)


def test_every_two_views_are_contrasted() -> None:
    torch.manual_seed(0)
    images = batch(torch.randn(5, 6, dtype=torch.float64))
    for count in (2, 3, 4):
        stage = Pretrain(nn.Identity(), nn.Identity(), view=shifted, temperature=0.3, num_views=count)  # type: ignore[arg-type]
        got = stage(images)["loss"].item()
        assert math.isclose(got, slow([shifted(images, number) for number in range(count)], 0.3), rel_tol=1e-9)
