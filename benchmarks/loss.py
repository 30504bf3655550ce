"""NT-Xent, forward and backward, against the whole matrix at once and against peers: time and memory.

    python -m benchmarks loss --peers lightly --threads 1

The whole matrix is what the reference and most libraries compute. Peers are used where they can be imported. "bf16" is
under bf16 autocast, as a step computes where that is faster; pytorch-metric-learning needs O(N^3) memory, so it is
asked for 256 pairs only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, workload
from fewlabels.model.losses import nt_xent

TEMPERATURE, WIDTH = 0.1, 128
SIZES = {256: 60, 1024: 30, 4096: 8}  # pairs: rounds
MEMORY_PAIRS = 8192
CUBIC = "pytorch_metric_learning"
MOST_CUBIC = 256  # pairs: 512 need more than 10 GB
HALF = ", bf16"
whole_matrix = partial(workload.whole_matrix, temperature=TEMPERATURE)


def losses(peers: list[str]) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Contenders by name."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ours": lambda a, b: nt_xent(a, b, TEMPERATURE),
        "whole matrix": whole_matrix,
    }
    if "lightly" in peers:
        found["lightly"] = importlib.import_module("lightly.loss").NTXentLoss(temperature=TEMPERATURE)
    found |= {name + HALF: _in_bf16(loss) for name, loss in found.items() if name != "whole matrix"}
    if CUBIC in peers:
        theirs = importlib.import_module("pytorch_metric_learning.losses").NTXentLoss(temperature=TEMPERATURE)
        found[CUBIC] = lambda a, b: theirs(torch.cat([a, b]), torch.arange(len(a)).repeat(2))
    return found


def _in_bf16(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def cast(first: Tensor, second: Tensor) -> Tensor:
        with torch.autocast(first.device.type, dtype=torch.bfloat16):
            return loss(first, second)

    return cast


def once(loss: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward: the loss and the gradient of the first view."""
    a, b = first.clone().requires_grad_(), second.clone().requires_grad_()
    value = loss(a, b)
    value.backward()
    assert a.grad is not None
    return value.detach(), a.grad


def run(*, peers: list[str]) -> dict[str, Any]:
    """The suite."""
    everyone = losses(peers)
    found: dict[str, Any] = {}
    for pairs, rounds in SIZES.items():
        contenders = {name: loss for name, loss in everyone.items() if name != CUBIC or pairs <= MOST_CUBIC}
        torch.manual_seed(0)
        views = torch.randn(pairs, WIDTH), torch.randn(pairs, WIDTH)
        wanted, gradient = once(whole_matrix, *(view.double() for view in views))
        for name, loss in contenders.items():
            value, slope = once(loss, *views)
            half = name.endswith(HALF)
            assert torch.allclose(value.double(), wanted, rtol=1e-2 if half else 1e-5), name
            assert (slope - gradient).norm() < (5e-2 if half else 1e-4) * gradient.norm(), name
        calls = {name: (lambda loss=loss, views=views: once(loss, *views)) for name, loss in contenders.items()}
        seconds = harness.side_by_side(calls, rounds=rounds)
        found[str(pairs)] = harness.table(f"NT-Xent, {pairs:,} pairs of {WIDTH}, forward and backward", seconds)
        found[str(pairs)]["against_ours_bf16"] = {
            name: harness.ratio(seconds[name], seconds["ours" + HALF]) for name in contenders
        }
        print("  against ours, bf16: " + ", ".join(
            f"{name} {times[0]:.2f} x" for name, times in found[str(pairs)]["against_ours_bf16"].items()
        ))  # fmt: skip
    found["memory_mb"] = {
        name: harness.peak_megabytes("loss", f"memory({name!r}, {peers!r})") for name in everyone if name != CUBIC
    }
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
