"""NT-Xent, forward and backward, against the whole matrix at once and against peers: time and memory.

    python -m benchmarks loss --peers lightly --threads 1

The whole matrix is what the reference and most libraries compute. Peers are used where they can be imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from fewlabels.model.losses import nt_xent

TEMPERATURE, WIDTH = 0.1, 128
SIZES = {256: 60, 1024: 30, 4096: 8}  # pairs: rounds
MEMORY_PAIRS = 8192


def whole_matrix(first: Tensor, second: Tensor) -> Tensor:
    """All similarities at once, torch's own cross-entropy."""
    z = torch.nn.functional.normalize(torch.cat([first, second]), dim=1)
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


def losses(peers: list[str]) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Contenders by name."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ours": lambda a, b: nt_xent(a, b, TEMPERATURE),
        "whole matrix": whole_matrix,
    }
    if "lightly" in peers:
        found["lightly"] = importlib.import_module("lightly.loss").NTXentLoss(temperature=TEMPERATURE)
    return found


def once(loss: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward: the loss and the gradient of the first view."""
    a, b = first.clone().requires_grad_(), second.clone().requires_grad_()
    value = loss(a, b)
    value.backward()
    assert a.grad is not None
    return value.detach(), a.grad


def run(*, peers: list[str]) -> dict[str, Any]:
    """The suite."""
    contenders = losses(peers)
    found: dict[str, Any] = {}
    for pairs, rounds in SIZES.items():
        torch.manual_seed(0)
        views = torch.randn(pairs, WIDTH), torch.randn(pairs, WIDTH)
        wanted, gradient = once(whole_matrix, *(view.double() for view in views))
        for name, loss in contenders.items():
            value, slope = once(loss, *views)
            assert torch.allclose(value.double(), wanted, rtol=1e-5), name
            assert (slope - gradient).abs().max() < 1e-4 * gradient.abs().max(), name
        calls = {name: (lambda loss=loss, views=views: once(loss, *views)) for name, loss in contenders.items()}
        found[str(pairs)] = harness.table(
            f"NT-Xent, {pairs:,} pairs of {WIDTH}, forward and backward", harness.side_by_side(calls, rounds=rounds)
        )
    found["memory_mb"] = {name: harness.peak_megabytes("loss", f"memory({name!r}, {peers!r})") for name in contenders}
    print(f"\npeak memory above the inputs, {MEMORY_PAIRS:,} pairs")
    for name, megabytes in found["memory_mb"].items():
        print(f"  {name:<28} {megabytes:10,.0f} MB  {megabytes / found['memory_mb']['ours']:6.1f} x")
    return found


def memory(name: str, peers: list[str]) -> Callable[[], Any]:
    """One contender on MEMORY_PAIRS, warmed up on a few."""
    loss = losses(peers)[name]
    once(loss, torch.randn(64, WIDTH), torch.randn(64, WIDTH))
    views = torch.randn(MEMORY_PAIRS, WIDTH), torch.randn(MEMORY_PAIRS, WIDTH)
    return lambda: once(loss, *views)
