"""Muon: momentum of kernels, made orthogonal, with AdamW for everything else.

Letters of optim.py: w parameter, g gradient, v momentum buffer.
Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the length of a step: arXiv 2502.16982.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fewlabels import runtime
from fewlabels.model.grouped import GroupedOptimizer

# Newton-Schulz iteration of the source: five rounds bring singular values from 0.01 to 1 to within 0.7 and 1.2
ROUNDS, NEWTON_SCHULZ = 5, (3.4445, -4.7750, 2.0315)
LARGE_SIDE = 1024  # of a matrix whose products keep all threads of a CPU busy
MOST_WORKERS = 16  # each holds what the products of a kernel need
# Of kernels of one shape that step together: on a GPU, which would wait for the launch of each one's small kernels, so
# many that the larger ones wait for no launch (there are several copies); on a CPU each steps alone
MOST_NUMBERS = {"cuda": 2**24, "cpu": 1}


class Muon(GroupedOptimizer):
    """Momentum of kernels, made orthogonal:

        v <- momentum * v + (1 - momentum) * g
        u = orthogonal(momentum * v + (1 - momentum) * g) * 0.2 * sqrt(max(rows, columns))
        w <- w - lr * (weight_decay * w + u)

    A kernel (out, in, k, k) is a matrix of `out` rows (torch.optim.Muon takes matrices only). The root makes a step
    as long as one of AdamW (Liu et al. 2025, arXiv 2502.16982), which groups with adapt=False take at the same lr.
    params: parameters of two dimensions or more, or groups that may set lr, momentum, weight_decay and adapt. Raises
    UsageError for values out of range.
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "adapt": True})

    def step_of_group(self, weights: list[Any], group: dict[str, Any]) -> None:
        if not group["adapt"]:
            self._step_of_adam(weights, group)
            return
        self.zeros(weights, "momentum")
        # Collectives have one order on all ranks, and one large kernel would have all threads but one wait for it
        alone = weights[0].is_cuda or runtime.is_sharded(weights[0])
        in_turn: list[Callable[[], None]] = []
        beside: list[Callable[[], None]] = []
        for alike in sorted(_by_shape(weights), key=lambda bucket: -bucket[0].numel()):  # the longest work first
            rows, numbers = len(alike[0]), alike[0].numel()
            large = min(rows, numbers // rows) >= LARGE_SIDE
            (in_turn if alone or large else beside).append(functools.partial(self._step_of_kernels, alike, group))
        for task in in_turn:
            task()
        _side_by_side(beside)

    @torch.no_grad()  # a thread has its own
    def _step_of_kernels(self, weights: list[Any], group: dict[str, Any]) -> None:
        """weights: of one shape; their matrices are made orthogonal together."""
        lr, momentum = group["lr"], group["momentum"]
        gradients, buffers = [w.grad for w in weights], [self.state[w]["momentum"] for w in weights]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = [runtime.whole(torch.lerp(g, v, momentum)) for g, v in zip(gradients, buffers, strict=True)]
        by_place = [x.movedim(1, -1) for x in ahead]  # in the order in which channels_last keeps it: no copy
        rows = [x.flatten(1) for x in by_place]
        found = orthogonal(torch.stack(rows)) if len(rows) > 1 else orthogonal(rows[0])[None]
        updates = [torch.empty_like(w) for w in weights]
        for update, one, like in zip(updates, found, by_place, strict=True):
            runtime.fill(update, one.view_as(like).movedim(-1, 1))
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_sub_(weights, updates, alpha=lr * 0.2 * math.sqrt(max(rows[0].shape)))

    def _step_of_adam(self, weights: list[Any], group: dict[str, Any]) -> None:
        for w in weights:
            self.state[w].setdefault("step", torch.tensor(0.0))
        means, squares = (self.zeros(weights, name) for name in ("exp_avg", "exp_avg_sq"))
        steps = [self.state[w]["step"] for w in weights]
        adamw(
            weights, [w.grad for w in weights], means, squares, [], steps,
            lr=group["lr"], weight_decay=group["weight_decay"], beta1=0.9, beta2=0.999, eps=1e-8, amsgrad=False,
            maximize=False,
        )  # fmt: skip


def _side_by_side(tasks: Sequence[Callable[[], None]]) -> None:
    """All tasks, each on one thread: products of so small matrices take as long on two (58 ms a step of a ResNet-18 of
    width 0.5, on one 42, side by side 28).
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(tasks) < 2:
        for task in tasks:
            task()
        return
    pool = _workers(min(threads, MOST_WORKERS), os.getpid())  # threads do not outlive a fork
    begun = [pool.submit(_on_one_thread, task) for task in tasks]
    try:
        wait(begun)
    finally:  # a signal may come here
        for future in begun:
            future.cancel()
        torch.set_num_threads(threads)  # of threads to come too: their number is the one that was last set anywhere
    for future in begun:
        future.result()


def _on_one_thread(task: Callable[[], None]) -> None:
    if torch.get_num_threads() > 1:  # each thread has a number of its own, from its first question on
        torch.set_num_threads(1)
    task()


@functools.cache
def _workers(threads: int, process: int) -> ThreadPoolExecutor:
    del process
    return ThreadPoolExecutor(threads, thread_name_prefix="muon")


def _by_shape(weights: list[Any]) -> list[list[Any]]:
    found: dict[torch.Size, list[list[Any]]] = {}
    for w in weights:
        buckets = found.setdefault(w.shape, [[]])
        if len(buckets[-1]) * w.numel() >= MOST_NUMBERS.get(w.device.type, 1):
            buckets.append([])
        buckets[-1].append(w)
    return list(itertools.chain(*found.values()))


def orthogonal(matrices: Tensor) -> Tensor:
    """(rows, columns), or several -> the same: singular vectors, with singular values of about 1; zeros stay zeros."""
    high = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if high else matrices  # the products are of the shorter side
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    x = _rounds(x.bfloat16()).to(x.dtype) if x.is_cuda else _rounds_of_squares(x)
    return x.mT if high else x


def _rounds(x: Tensor) -> Tensor:
    """As the source has it, on a GPU in bfloat16; three products a round."""
    a, b, c = NEWTON_SCHULZ
    y = x.reshape(-1, *x.shape[-2:])
    for _ in range(ROUNDS):
        square = torch.bmm(y, y.mT)
        y = torch.baddbmm(y, torch.baddbmm(square, square, square, beta=b, alpha=c), y, beta=a)
    return y.view_as(x)


def _rounds_of_squares(x: Tensor) -> Tensor:
    """The same with two products of the longer side in place of ten: 2.2 to 2.6 times as fast for a ResNet-18's.

    Rounding grows twelvefold a round: in float32 to 2e-3 at worst, and no longer safe in TF32 or bfloat16.
    """
    a, b, c = NEWTON_SCHULZ
    square, factors = x @ x.mT, list[Tensor]()
    for number in range(ROUNDS):
        if number:
            square = factors[-1] @ square @ factors[-1]
        factors.append(b * square + c * square @ square)
        factors[-1].diagonal(dim1=-2, dim2=-1).add_(a)
    return functools.reduce(torch.matmul, factors[::-1]) @ x
