"""What our own optimisers share: a step a group of parameters, and values that are refused."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewlabels.errors import UsageError

LIMITS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("at least 0", lambda value: 0 <= value < math.inf),
    "momentum": ("at least 0 and below 1", lambda value: 0 <= value < 1),
    "weight_decay": ("at least 0", lambda value: 0 <= value < math.inf),
    "trust": ("above 0", lambda value: 0 < value < math.inf),
}


class GroupedOptimizer(torch.optim.Optimizer, abc.ABC):
    """An optimiser that takes its step group by group. Raises UsageError for a group's values out of LIMITS."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        faults = [
            f"{name} = {group[name]}; allowed: {allowed}"
            for name, (allowed, within) in LIMITS.items()
            if name in group and not within(group[name])
        ]
        if faults:
            self.param_groups.pop()
            raise UsageError(f"{type(self).__name__} cannot use these values", details=faults, fix="change them")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Returns the closure's loss, if one is given."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if weights:
                self.step_of_group(weights, group)
        return loss

    @abc.abstractmethod
    def step_of_group(self, weights: list[Any], group: dict[str, Any]) -> None:
        """One update of weights, all of them with a gradient, by the values of their group."""

    def zeros(self, weights: list[Any], name: str) -> list[Tensor]:
        """The buffer called name of each of weights: zeros at first."""
        for w in weights:
            if name not in self.state[w]:
                self.state[w][name] = torch.zeros_like(w)
        return [self.state[w][name] for w in weights]
