"""The mean cross-entropy of contrasted rows in O(rows x d) memory: tiles of similarities that are never all there.

Exact: the same sums as softmax over the whole matrix would give, in another order. The backward pass computes each tile
again in place of keeping it. On one process similarities are symmetric, and each tile above the diagonal serves its
rows and its columns. On CUDA one kernel makes the tiles and uses them where they are: contrast_triton.py.

The positive is left out of the tiles and added apart, always from float32 rows: loss_i = log(1 + exp(n_i - s_ip)). A
trained network has p_ip near 1, where log-sum - s_ip and p_ip - 1 would cancel. That is what lets the tiles' products
take bf16 operands under bf16 autocast: see FLOOR_BF16.

Shapes: R anchors (both views of this rank's images), M candidates (the rows of all ranks, then any keys of a queue),
d projections, T rows of a tile. Letters: s_ij = anchor_i . candidate_j / temperature, p = i's positive, n_i = the
log-sum of exp(s_ij) over i's negatives, lse_i = that over all but itself, p_ij = exp(s_ij - lse_i).
"""

from __future__ import annotations

import functools
import importlib
import subprocess
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fewlabels import runtime
from fewlabels.errors import UsageError
from fewlabels.model.layers import full_precision

TILE = 512  # rows and columns on a CPU: 1 MB of float32, which stays in a core's cache
TILE_CUDA = 4096  # on a GPU launches count: 64 MB at a time, not measured
SHIFTABLE = 40.0  # up to this 1 / temperature sums of exp(s) of unit rows lie within e-40 and M e40: no overflow
# The lowest temperature of bf16 products. There they moved the loss of 700 pairs by at most 9e-5 of it and its gradient
# by 6e-3 (random, clustered and learned rows; of collapsed ones, which are lost, 2e-3 and 1e-2)
FLOOR_BF16 = 0.05


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
        operands = _operands(anchors, temperature, unit=unit)
        # Bounded similarities need no maximum before exp, and then a tile's sums hold for its columns as well
        fast = unit and symmetric and _tile(anchors) < rows == len(candidates) and 1 / temperature <= SHIFTABLE
        kernels = compiled(anchors.device.type, anchors.shape[1], operands) if anchors.dtype == torch.float32 else None
        # Triton launches on the current device
        with full_precision(anchors), torch.cuda.device_of(anchors):  # type: ignore[no-untyped-call]
            if kernels:
                negatives = kernels.row_sums(anchors.to(operands), candidates.to(operands), temperature, own)
            elif fast:
                negatives = _triangle_sums(anchors, temperature, operands)
            else:
                negatives = _row_sums(anchors, candidates, temperature, own, operands)
            similarity = (anchors * _positives(candidates, rows, own)).sum(1) / temperature  # (R,) s_ip
            losses = torch.logaddexp(negatives - similarity, negatives.new_zeros(()))
        ctx.save_for_backward(anchors, candidates, similarity, losses)
        ctx.settings = temperature, own, operands, fast, symmetric, kernels
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph; once_differentiable lets it pass, with wrong second derivatives
            raise UsageError("nt_xent has no second derivative", fix="leave out create_graph=True")
        anchors, candidates, similarity, losses = ctx.saved_tensors
        temperature, own, operands, fast, symmetric, kernels = ctx.settings
        rows, sums = len(anchors), similarity + losses  # lse_i
        with full_precision(anchors), torch.cuda.device_of(anchors):  # type: ignore[no-untyped-call]
            everyone = runtime.gather(sums) if symmetric else None
            if kernels:
                rows_in, all_in = anchors.to(operands), candidates.to(operands)
                found = kernels.row_gradient(rows_in, all_in, sums, everyone, temperature, own)
            elif fast:
                found = _triangle_gradient(anchors, sums, temperature, operands)
            else:
                found = _row_gradient(anchors, candidates, sums, everyone, temperature, own, operands)
        pull = -torch.expm1(-losses)  # (R,) 1 - p_ip
        if symmetric:  # the positive of my positive is me
            pull = pull + pull.roll(rows // 2)
        found.sub_(pull[:, None] * _positives(candidates, rows, own))
        return found.mul_(gradients[0] / (temperature * rows)), None, None, None, None


@functools.cache
def compiled(device: str, width: int, dtype: torch.dtype) -> types.ModuleType | None:
    """contrast_triton.py on "cuda"; None elsewhere, where Triton or the C compiler that it needs is missing, and where
    its tiles of projections (N, width) do not fit into a multiprocessor, as float32 ones of 128 do not on a T4.
    """
    if device != "cuda":
        return None
    try:
        found = importlib.import_module("fewlabels.model.contrast_triton")
        rows = torch.zeros(2, width, dtype=dtype, device=device)
        sums = found.row_sums(rows, rows, 1.0, 0)
        found.row_gradient(rows, rows, sums, sums, 1.0, 0)
        return found
    except (ImportError, RuntimeError, OSError, subprocess.SubprocessError):
        return None
    except Exception as error:
        if type(error).__name__ != "OutOfResources":  # triton's, of an own kind
            raise
        return None


def _tile(rows: Tensor) -> int:
    return TILE_CUDA if rows.is_cuda else TILE


def _operands(anchors: Tensor, temperature: float, *, unit: bool) -> torch.dtype:
    """What the tiles' products multiply: bf16 under bf16 autocast where that is accurate, else the rows' dtype."""
    kind = anchors.device.type
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return torch.bfloat16 if half and unit and temperature >= FLOOR_BF16 else anchors.dtype


def _positives(candidates: Tensor, rows: int, own: int) -> Tensor:
    """(R, d): the candidate of each anchor's other view."""
    return candidates[own : own + rows].roll(rows // 2, 0)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x (A, k), y (B, k) -> x @ y.T (A, B), as accurate as x's dtype.

    On a CPU float32 goes to oneDNN: MKL, which torch's own matmul asks, gives an AMD EPYC 113 GFLOP/s a core, oneDNN
    250.
    """
    on_cpu = x.dtype == torch.float32 and x.device.type == "cpu"
    return _onednn(x, y) if on_cpu and _has_onednn() else x @ y.T


def _onednn(x: Tensor, y: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], "")  # type: ignore[no-any-return]


@functools.cache
def _has_onednn() -> bool:
    """Tried, since torch makes no promise of a private operation: it may be missing, or take other arguments."""
    try:
        x = torch.ones(2, 2, dtype=torch.float32, device="cpu")
        return torch.equal(_onednn(x, x), x @ x)
    except (AttributeError, RuntimeError, TypeError):
        return False


# --- rows against all columns: several ranks, a queue, or similarities without a bound ---------------------------


def _rows(
    anchors: Tensor, candidates: Tensor, temperature: float, own: int, operands: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Similarities (T, M) of a few anchors at a time, minus infinity at their own places and their positives'."""
    step, rows = max(1, _tile(anchors) ** 2 // len(candidates)), len(anchors)
    places = own + torch.arange(rows, device=anchors.device)
    places = torch.stack([places, places.roll(rows // 2)], dim=1)  # (R, 2)
    scaled, others = (anchors / temperature).to(operands), candidates.to(operands)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        tile = _product(scaled[part], others).to(anchors.dtype)
        yield part, tile.scatter_(1, places[part], -torch.inf)


def _row_sums(anchors: Tensor, candidates: Tensor, temperature: float, own: int, operands: torch.dtype) -> Tensor:
    """n_i (R,), safe at any temperature."""
    return torch.cat([tile.logsumexp(1) for _, tile in _rows(anchors, candidates, temperature, own, operands)])


def _row_gradient(
    anchors: Tensor, candidates: Tensor, sums: Tensor, everyone: Tensor | None,
    temperature: float, own: int, operands: torch.dtype,
) -> Tensor:  # fmt: skip
    """Sum over negatives j of (p_ij + p_ji) candidate_j: (R, d); without everyone's lse (M,), of p_ij alone."""
    found, others = torch.empty_like(anchors), candidates.to(operands)
    for part, tile in _rows(anchors, candidates, temperature, own, operands):
        weights = (tile - sums[part, None]).exp_()
        if everyone is not None:
            weights += tile.sub_(everyone).exp_()
        found[part] = _product(weights.to(operands), others.T)
    return found


# --- one process: the tiles above the diagonal -------------------------------------------------------------------


def _triangle(anchors: Tensor, temperature: float, operands: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """exp(s_ij) of every tile on and above the diagonal, 0 at the places of the anchor itself and its positive."""
    side, half = _tile(anchors), len(anchors) // 2
    scaled, others = (anchors / temperature).to(operands), anchors.to(operands)
    starts = range(0, len(anchors), side)
    for a in starts:
        for b in starts[a // side :]:
            i, j = slice(a, a + side), slice(b, b + side)
            tile = _product(scaled[i], others[j]).to(anchors.dtype).exp_()
            tile.diagonal(half + a - b).zero_()  # empty where the tile has no such place
            if a == b:
                tile.fill_diagonal_(0)
                tile.diagonal(-half).zero_()
            yield i, j, tile


def _triangle_sums(anchors: Tensor, temperature: float, operands: torch.dtype) -> Tensor:
    """n_i (R,)."""
    total = anchors.new_zeros(len(anchors))
    for i, j, tile in _triangle(anchors, temperature, operands):
        total[i] += tile.sum(1)
        if i != j:
            total[j] += tile.sum(0)
    return total.log_()


def _triangle_gradient(anchors: Tensor, sums: Tensor, temperature: float, operands: torch.dtype) -> Tensor:
    """Sum over negatives j of (p_ij + p_ji) anchor_j: (R, d)."""
    found, others = torch.zeros_like(anchors), anchors.to(operands)
    shares = (-sums).exp()  # (R,) exp(s_ij) * shares_i = p_ij
    for i, j, tile in _triangle(anchors, temperature, operands):
        weights = tile.mul_(shares[i, None] + shares[j]).to(operands)
        found[i] += _product(weights, others[j].T)
        if i != j:
            found[j] += _product(others[i].T, weights.T).T
    return found


def nearest_own_share(anchors: Tensor, candidates: Tensor, own: int) -> Tensor:
    """The share of anchors (R, d) whose most similar candidate (M, d) is the one in row own + i; a scalar.

    Another as similar counts against it, so that a collapsed network has 0. By maxima: argmax takes 13 times as long.
    """
    right = anchors.new_zeros(())
    for start in range(0, len(anchors), _tile(anchors)):
        similarity = _product(anchors[start : start + _tile(anchors)], candidates)
        mine = similarity.diagonal(own + start).clone()
        similarity.diagonal(own + start).fill_(-torch.inf)
        right += (mine > similarity.amax(1)).sum()
    return right / len(anchors)
