"""LARS as the reference runs it, which parameters optimisers adapt, and the learning-rate curve. Muon: muon.py.

Letters of You et al. 2017: w parameter, g gradient, v momentum buffer.
Source: google-research/simclr at 383d414, `lars_optimizer.py` and `model.py: WarmUpAndCosineDecay`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fewlabels import runtime
from fewlabels.errors import UsageError
from fewlabels.model.grouped import GroupedOptimizer
from fewlabels.model.heads import Classifier
from fewlabels.model.muon import Muon


class LARS(GroupedOptimizer):
    """Layer-wise adaptive rate scaling, in the reference's form:

        g <- g + weight_decay * w
        trust' = trust * |w| / |g|, or 1 where the group says adapt=False or a norm is 0
        v <- momentum * v + (lr * trust') * g
        w <- w - v

    The learning rate is inside the buffer (unlike torch.optim.SGD), and the norms are of whole tensors, after decay.
    params: parameters, or groups that may set lr, momentum, weight_decay, trust and adapt. Raises UsageError for
    values out of range.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True}
        )

    def step_of_group(self, weights: list[Any], group: dict[str, Any]) -> None:
        gradients, buffers = [w.grad for w in weights], self.zeros(weights, "momentum")
        # One tensor at a time needs temporaries of one tensor, which a CPU's caches like; on a GPU thousands of
        # small kernels would wait for their launch.
        together = weights[0].is_cuda or runtime.is_sharded(weights[0])
        update = _update_together if together else _update_one_by_one
        update(weights, gradients, buffers, group)


def _update_one_by_one(
    weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], group: dict[str, Any]
) -> None:
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    for w, g, v in zip(weights, gradients, buffers, strict=True):
        if decay:
            g = g.add(w, alpha=decay)
        rate = lr
        if group["adapt"]:
            length, slope = float(torch.linalg.vector_norm(w)), float(torch.linalg.vector_norm(g))
            if length > 0 and slope > 0:
                rate = lr * group["trust"] * length / slope
        w.sub_(v.mul_(momentum).add_(g, alpha=rate))


def _update_together(
    weights: list[Tensor], gradients: list[Tensor], buffers: list[Tensor], group: dict[str, Any]
) -> None:
    """The same in few launches and without waiting for the device; of sharded tensors, with one collective for all."""
    sharded = runtime.is_sharded(weights[0])
    weights, gradients, buffers = ([runtime.part(x) for x in them] for them in (weights, gradients, buffers))
    if group["weight_decay"]:
        gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
    torch._foreach_mul_(buffers, group["momentum"])
    if group["adapt"]:
        norms = torch.stack(torch._foreach_norm([*weights, *gradients]))  # (2 x parameters,)
        if sharded:  # in float64: the square of a small norm is no number of float32
            norms = runtime.sum_over_ranks(norms.double().square_()).sqrt_().to(norms.dtype)
        lengths, slopes = norms.chunk(2)
        ratios = torch.where((lengths > 0) & (slopes > 0), group["trust"] * lengths / slopes, 1.0)
        gradients = list(torch._foreach_mul(gradients, list(ratios.unbind())))
    torch._foreach_add_(buffers, gradients, alpha=group["lr"])
    torch._foreach_sub_(weights, buffers)


# --- which parameters --------------------------------------------------------------------------------------


def parameter_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of module as groups for any torch optimiser: kernels, and all that is left alone.

    Left alone (no decay, no adaptation), as the reference does by name: batch norm, every bias, and the linear layer
    of a Classifier (the distillation notebook adapts the student's). Scales, shifts and biases are the parameters with
    one dimension, also in timm's models.
    Each group has "params", "names" in the same order, "weight_decay" and "adapt". Empty groups are left out.
    """
    classifiers = [part.linear for part in module.modules() if isinstance(part, Classifier)]
    alone = {id(p) for linear in classifiers for p in linear.parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [], "names": [], "weight_decay": weight_decay, "adapt": True},
        {"params": [], "names": [], "weight_decay": 0.0, "adapt": False},
    ]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            group = groups[parameter.dim() <= 1 or id(parameter) in alone]
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in groups if group["params"]]


def optimizer(name: str, module: nn.Module, *, lr: float, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """The optimiser `name` ("lars", "sgd" with Nesterov momentum, "adamw", "muon") over parameter_groups(module).

    Momentum is 0.9, Muon's own is 0.95. Where the reference's SGD decays biases too, ours does not.
    Raises UsageError when nothing in module is trainable.
    """
    groups = parameter_groups(module, weight_decay=weight_decay)
    if not groups:
        raise UsageError("there is nothing to train", why="every parameter is frozen", fix="freeze fewer blocks")
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True)
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"lars": LARS, "adamw": torch.optim.AdamW, "muon": Muon}
    return kinds[name](groups, lr)


# --- the learning rate -------------------------------------------------------------------------------------


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of update number step (0 is the first): linear from 0 to peak, then half a cosine to 0.

    The very first update of a warm-up has learning rate 0: only the statistics of batch norm move.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    rest = max(total_steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(step - warmup_steps, rest) / rest))


def peak_learning_rate(base: float, batch_size: int, scaling: str) -> float:
    """base * sqrt(batch) for "sqrt", base * batch / 256 for "linear", base for "none".

    batch_size counts images (not views) over all ranks.
    """
    return base * {"sqrt": math.sqrt(batch_size), "linear": batch_size / 256, "none": 1.0}[scaling]


def total_steps(images: int, epochs: float, batch: int) -> int:
    """images * epochs // batch + 1. The one more reproduces the step number of every published checkpoint."""
    return int(images * epochs // batch) + 1


def warmup_steps(images: int, epochs: float, batch: int) -> int:
    """images * epochs // batch for that many epochs of warm-up; 0 when that is less than a step."""
    return round(images * epochs // batch)
