"""The tiles of contrast.py on a GPU, compiled by Triton: each is made, used and forgotten without leaving the chip.

One program owns BLOCK_R anchors and passes over all candidates, so nothing is added from two sides and the result is
the same bit for bit each time. A triangle of tiles would need a third fewer products (16 R M d in place of 24), but not
serve the rows of several ranks and a queue alike. Products take the rows as they come (bf16, or float32 in three TF32
parts) and are summed in float32. Block sizes follow from what fits on a multiprocessor; no GPU has timed them yet.

Shapes: R anchors, M candidates, d projections, D = d filled up to a power of 2. Exponents are of 2: LOG2E / temperature
is in the scale.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def row_sums(anchors: Tensor, candidates: Tensor, temperature: float, own: int) -> Tensor:
    """The log-sum of exp(s_ij) over the negatives of each anchor, float32 (R,); see contrast.py for own.

    anchors: (R, d), candidates: (M, d), both bf16 or both float32.
    """
    out = torch.empty(len(anchors), dtype=torch.float32, device=anchors.device)
    blocks = _blocks(anchors)
    _row_sums[(triton.cdiv(len(anchors), blocks["BLOCK_R"]),)](
        anchors.contiguous(), candidates.contiguous(), out, len(anchors), len(candidates), anchors.shape[1], own,
        LOG2E.value / temperature, **blocks,
    )  # fmt: skip
    return out


def row_gradient(
    anchors: Tensor, candidates: Tensor, sums: Tensor, everyone: Tensor | None, temperature: float, own: int
) -> Tensor:
    """Sum over negatives j of (p_ij + p_ji) candidate_j, float32 (R, d); without everyone's lse (M,), of p_ij alone."""
    out = torch.empty(anchors.shape, dtype=torch.float32, device=anchors.device)
    blocks = _blocks(anchors)
    _row_gradient[(triton.cdiv(len(anchors), blocks["BLOCK_R"]),)](
        anchors.contiguous(), candidates.contiguous(), sums.contiguous(), sums if everyone is None else everyone, out,
        len(anchors), len(candidates), anchors.shape[1], own, LOG2E.value / temperature,
        BOTH=everyone is not None, **blocks,
    )  # fmt: skip
    return out


def _blocks(anchors: Tensor) -> dict[str, Any]:
    """Sizes of the tiles for (R, d): 32 KB of anchors, so that the candidates read ahead fit beside them (227 KB)."""
    width = max(16, triton.next_power_of_2(anchors.shape[1]))
    side = min(128, max(16, 128 * 256 // (width * anchors.element_size())))
    return {"D": width, "BLOCK_R": side, "BLOCK_M": min(side, 64), "num_warps": 8 if side == 128 else 4}


@triton.jit
def _similarities(anchor, candidates, i, j, R, M, d, own, scale, D: tl.constexpr):
    """Candidates j (BLOCK_M, D), and scaled similarities (BLOCK_R, BLOCK_M): minus infinity where j is no negative."""
    column = tl.arange(0, D)
    there = (j[:, None] < M) & (column[None] < d)
    candidate = tl.load(candidates + j[:, None].to(tl.int64) * d + column[None], mask=there, other=0.0)
    tile = tl.dot(anchor, tl.trans(candidate), input_precision="tf32x3") * scale
    positive = tl.where(i < R // 2, i + R // 2, i - R // 2)
    hidden = (j[None] >= M) | (j[None] == (own + i)[:, None]) | (j[None] == (own + positive)[:, None])
    return candidate, tl.where(hidden, float("-inf"), tile)


@triton.jit
def _row_sums(
    anchors, candidates, out, R, M, d, own, scale, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr
):
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, D)
    there = (i[:, None] < R) & (column[None] < d)
    anchor = tl.load(anchors + i[:, None].to(tl.int64) * d + column[None], mask=there, other=0.0)
    peak = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, M, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M)
        _, tile = _similarities(anchor, candidates, i, j, R, M, d, own, scale, D)
        highest = tl.maximum(peak, tl.max(tile, 1))
        level = tl.where(highest == float("-inf"), 0.0, highest)  # no negative yet: no infinity minus itself
        total = total * tl.exp2(peak - level) + tl.sum(tl.exp2(tile - level[:, None]), 1)
        peak = highest
    tl.store(out + i, (peak + tl.log2(total)) * LN2, mask=i < R)


@triton.jit
def _row_gradient(
    anchors, candidates, sums, everyone, out, R, M, d, own, scale,
    BOTH: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, D)
    there = (i[:, None] < R) & (column[None] < d)
    anchor = tl.load(anchors + i[:, None].to(tl.int64) * d + column[None], mask=there, other=0.0)
    lse = tl.load(sums + i, mask=i < R, other=0.0) * LOG2E
    found = tl.zeros((BLOCK_R, D), tl.float32)
    for start in range(0, M, BLOCK_M):
        j = start + tl.arange(0, BLOCK_M)
        candidate, tile = _similarities(anchor, candidates, i, j, R, M, d, own, scale, D)
        weights = tl.exp2(tile - lse[:, None])
        if BOTH:
            theirs = tl.load(everyone + j, mask=j < M, other=0.0) * LOG2E
            weights += tl.exp2(tile - theirs[None])
        found = tl.dot(weights.to(candidate.dtype), candidate, found, input_precision="tf32x3")
    tl.store(out + i[:, None].to(tl.int64) * d + column[None], found, mask=there)
