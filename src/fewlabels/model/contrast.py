"""The mean cross-entropy of contrasted rows in O(rows x d) memory: tiles of similarities that are never all there.

Exact: the same sums as softmax over the whole matrix would give, in another order. The backward pass computes each tile
again in place of keeping it. On one process similarities are symmetric, and each tile above the diagonal serves its
rows and its columns.

Shapes: R anchors (both views of this rank's images), M candidates (the rows of all ranks, then any keys of a queue),
d projections, T rows of a tile. Letters: s_ij = anchor_i . candidate_j / temperature, p_ij = exp(s_ij - lse_i).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewlabels import runtime
from fewlabels.model.layers import full_precision

TILE = 512  # rows and columns on a CPU: 1 MB of float32, which stays in a core's cache
TILE_CUDA = 4096  # on a GPU launches count: 64 MB at a time, not measured
SHIFTABLE = 40.0  # up to this 1 / temperature exp(s - 1 / temperature) of unit rows is above 1e-35: no underflow


def contrast(anchors: Tensor, candidates: Tensor, temperature: float, *, unit: bool, symmetric: bool) -> Tensor:
    """Mean over the anchors of the cross-entropy to their positives; a scalar with gradients for the anchors.

    anchors: (R, d). candidates: (M, d) whose rows R * rank ... are this rank's: anchor i is masked at its own row, and
    its positive is the other view, R / 2 rows on or back. unit: all rows have length 1, so that similarities are
    bounded. symmetric: the candidates are the anchors of all ranks and pass gradients too; then every rank must call
    backward, with the same gradient of its loss, and each gets all that concerns its rows: no gradients travel.
    """
    return _Contrast.apply(anchors, candidates.detach(), temperature, unit, symmetric)  # type: ignore[no-any-return]


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        temperature: float,
        unit: bool,  # noqa: FBT001 - autograd functions take positions only
        symmetric: bool,  # noqa: FBT001
    ) -> Tensor:
        rows = len(anchors)
        own = runtime.rank() * rows
        positives = torch.arange(rows, device=anchors.device).roll(rows // 2) + own  # (R,)
        # Bounded similarities need no maximum before exp, and then a tile's sums hold for its columns as well
        fast = unit and symmetric and _tile(anchors) < rows == len(candidates) and 1 / temperature <= SHIFTABLE
        with full_precision(anchors):
            if fast:
                sums = _triangle_sums(anchors, temperature)
                similarity = (anchors * candidates[positives]).sum(1) / temperature
            else:
                sums, similarity = _row_sums(anchors, candidates, positives, temperature, own)
        ctx.save_for_backward(anchors, candidates, sums, positives)
        ctx.settings = temperature, own, fast, symmetric
        return (sums - similarity).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        anchors, candidates, sums, positives = ctx.saved_tensors
        temperature, own, fast, symmetric = ctx.settings
        with full_precision(anchors):
            if fast:
                found = _triangle_gradient(anchors, sums, temperature)
            else:
                everyone = runtime.gather(sums) if symmetric else None
                found = _row_gradient(anchors, candidates, sums, everyone, temperature, own)
        # The positive of my positive is me, so a symmetric loss pulls twice
        found.sub_(candidates[positives], alpha=2 if symmetric else 1)
        return found.mul_(gradients[0] / (temperature * len(anchors))), None, None, None, None


def _tile(rows: Tensor) -> int:
    return TILE_CUDA if rows.is_cuda else TILE


# --- rows against all columns: several ranks, a queue, or similarities without a bound ---------------------------


def _rows(anchors: Tensor, candidates: Tensor, temperature: float, own: int) -> Iterator[tuple[slice, Tensor]]:
    """Similarities (T, M) of a few anchors at a time, their own places at minus infinity."""
    step = max(1, _tile(anchors) ** 2 // len(candidates))
    for start in range(0, len(anchors), step):
        part = slice(start, min(start + step, len(anchors)))
        tile = (anchors[part] / temperature) @ candidates.T
        tile.diagonal(own + start).fill_(-torch.inf)
        yield part, tile


def _row_sums(
    anchors: Tensor, candidates: Tensor, positives: Tensor, temperature: float, own: int
) -> tuple[Tensor, Tensor]:
    """lse_i and the similarity of i to its positive, (R,) each, safe at any temperature."""
    sums, similarity = [], []
    for part, tile in _rows(anchors, candidates, temperature, own):
        sums.append(torch.logsumexp(tile, 1))
        similarity.append(tile.gather(1, positives[part, None])[:, 0])
    return torch.cat(sums), torch.cat(similarity)


def _row_gradient(
    anchors: Tensor, candidates: Tensor, sums: Tensor, everyone: Tensor | None, temperature: float, own: int
) -> Tensor:
    """Sum over j of (p_ij + p_ji) candidate_j: (R, d); without everyone's lse (M,), of p_ij alone."""
    found = torch.empty_like(anchors)
    for part, tile in _rows(anchors, candidates, temperature, own):
        weights = (tile - sums[part, None]).exp_()
        if everyone is not None:
            weights += tile.sub_(everyone).exp_()
        found[part] = weights @ candidates
    return found


# --- one process: the tiles above the diagonal -------------------------------------------------------------------


def _triangle(anchors: Tensor, temperature: float) -> Iterator[tuple[slice, slice, Tensor]]:
    """exp(s_ij - 1 / temperature) of every tile on and above the diagonal, 0 on the diagonal itself."""
    side = _tile(anchors)
    scaled, parts = anchors / temperature, [slice(k, k + side) for k in range(0, len(anchors), side)]
    shift = anchors.new_full((), -1 / temperature)
    for number, i in enumerate(parts):
        for j in parts[number:]:
            tile = torch.addmm(shift, scaled[i], anchors[j].T).exp_()
            if i == j:
                tile.fill_diagonal_(0)
            yield i, j, tile


def _triangle_sums(anchors: Tensor, temperature: float) -> Tensor:
    total = anchors.new_zeros(len(anchors))
    for i, j, tile in _triangle(anchors, temperature):
        total[i] += tile.sum(1)
        if i != j:
            total[j] += tile.sum(0)
    return total.log_().add_(1 / temperature)


def _triangle_gradient(anchors: Tensor, sums: Tensor, temperature: float) -> Tensor:
    found = torch.zeros_like(anchors)
    shares = (1 / temperature - sums).exp()  # (R,) exp(s_ij - 1 / temperature) * shares_i = p_ij
    for i, j, tile in _triangle(anchors, temperature):
        tile *= shares[i, None] + shares[j]
        found[i].addmm_(tile, anchors[j])
        if i != j:
            found[j].addmm_(tile.T, anchors[i])
    return found


def nearest_own_share(anchors: Tensor, candidates: Tensor, own: int) -> Tensor:
    """The share of anchors (R, d) i whose most similar candidate (M, d) is the one in row own + i; a scalar."""
    parts = [anchors[k : k + _tile(anchors)] for k in range(0, len(anchors), _tile(anchors))]
    nearest = torch.cat([(part @ candidates.T).argmax(1) for part in parts])  # (R,)
    return (nearest == own + torch.arange(len(anchors), device=anchors.device)).float().mean()
