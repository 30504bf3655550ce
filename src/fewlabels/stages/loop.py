"""The one training loop. It knows no recipe, no path and no stage by name.

A stage is an nn.Module: forward(batch) returns {"loss": scalar, name: scalar...}. The loop asks for the gradient,
averages it over ranks, steps, and calls three plain functions: on_log, on_eval, on_save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewlabels import runtime
from fewlabels.data.loader import Batch
from fewlabels.errors import Diverged


class Stage(nn.Module):
    """What a stage may add to a plain module."""

    frozen: tuple[str, ...] = ()  # prefixes of tensors that this stage only reads: never trained, never saved

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss": mean over this rank's share of the batch, other names: scalars to log}."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after each optimizer step, e.g. to move an average."""

    def before_save(self) -> None:
        """Called before each checkpoint, to bring to the disk what it counts on."""

    def trained(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith(self.frozen or ("\0",))}

    def train(self, mode: bool = True) -> Stage:  # noqa: FBT001, FBT002 - nn.Module's signature
        """Like nn.Module.train, but frozen parts stay in inference mode."""
        super().train(mode)
        for name, module in self.named_children():
            if f"{name}.".startswith(self.frozen or ("\0",)):
                module.eval()
        return self


@dataclass
class TrainState:
    """The step and the tensors: all that a resumed run needs."""

    stage: Stage
    optimizer: torch.optim.Optimizer
    step: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Stage and optimizer as one flat dictionary of tensors."""
        found = {f"stage.{name}": t for name, t in self.stage.trained().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in slots.items()}
        return found

    def load(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave at that step."""
        mine = {n.removeprefix("stage."): t for n, t in tensors.items() if n.startswith("stage.")}
        missing, unexpected = self.stage.load_state_dict(mine, strict=False)
        missing = [name for name in missing if not name.startswith(self.stage.frozen or ("\0",))]
        assert not missing and not unexpected, f"missing {missing[:3]}, unexpected {unexpected[:3]}"
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, slot = name.split(".", 2)
                slots.setdefault(int(index), {})[slot] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        for parameter, found in self.optimizer.state.items():
            # Files keep no memory layout; a 512x512x3x3 kernel in channels_last with a contiguous buffer took 5 times
            # as long
            for slot, tensor in found.items():
                if tensor.shape == parameter.shape:
                    found[slot] = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        self.step = step


@dataclass(frozen=True)
class Plan:
    """How long a stage trains, and how often it speaks."""

    total_steps: int
    learning_rate: Callable[[int], float]  # finished updates -> learning rate of the next one
    log_every: int
    eval_every: int  # 0 = never
    save_every: int
    seed: int = 0  # of what draws from torch's own generator: dropout and stochastic depth of timm models


@dataclass(frozen=True)
class Listeners:
    """What happens besides training. on_log gets the step's scalars; should_stop is polled every step."""

    on_log: Callable[[int, dict[str, float]], None]
    on_eval: Callable[[TrainState], None]
    on_save: Callable[[TrainState], None]
    should_stop: Callable[[], bool]


def train(
    state: TrainState, batches: Iterable[Batch], plan: Plan, listeners: Listeners, precision: runtime.Precision
) -> bool:
    """Train from state.step to plan.total_steps. Returns False if it was asked to stop before (it has saved then).

    Raises Diverged as soon as a loss or a weight is not finite; nothing of that step is saved. torch's own generators
    are seeded every step.
    """
    state.stage.train()
    waited = 0.0  # seconds that the device waited for batches, since the last log
    mark = asked = time.perf_counter()
    for batch in batches:
        waited += time.perf_counter() - asked
        torch.manual_seed((plan.seed << 24) + state.step & (1 << 63) - 1)  # so that a resumed run drops the same
        scalars = step(state, batch, plan.learning_rate(state.step), precision)
        if state.step % plan.log_every == 0 or state.step == plan.total_steps:
            now = time.perf_counter()
            extra = {"seconds": now - mark, "wait_share": waited / max(now - mark, 1e-9)}
            listeners.on_log(state.step, _over_ranks(scalars) | extra)
            mark, waited = now, 0.0
        finished = state.step == plan.total_steps
        if not finished and plan.eval_every and state.step % plan.eval_every == 0:
            listeners.on_eval(state)
            state.stage.train()
        stopping = runtime.any_rank(flag=listeners.should_stop())
        if finished or stopping or state.step % plan.save_every == 0:
            check_finite(state)
            listeners.on_save(state)
        if stopping and not finished:
            return False
        asked = time.perf_counter()
    return True


def _over_ranks(scalars: dict[str, Tensor | float]) -> dict[str, float]:
    """Each rank computed its share's mean; the mean of those is what one process would have logged."""
    stacked = torch.stack([torch.as_tensor(value, dtype=torch.float64).cpu() for value in scalars.values()])
    means = runtime.mean_over_ranks(stacked)
    return dict(zip(scalars, means.tolist(), strict=True))


def step(
    state: TrainState, batch: Batch, learning_rate: float, precision: runtime.Precision
) -> dict[str, Tensor | float]:
    """One update in place; returns the stage's scalars and the learning rate."""
    with precision.context(batch.pixels.device):
        scalars = state.stage(batch)
    loss = scalars["loss"]
    _stop_if_not_finite(loss, state.step, batch)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    runtime.average_gradients(parameters)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.step()
    state.stage.after_step()
    state.step += 1
    return {name: value.detach() for name, value in scalars.items()} | {"learning_rate": learning_rate}


def _stop_if_not_finite(loss: Tensor, step: int, batch: Batch) -> None:
    # On CUDA reading the loss would make the host wait every step; there the weights are checked before every save.
    if loss.device.type == "cuda":
        return
    if runtime.any_rank(flag=not bool(torch.isfinite(loss))):
        rows = ", ".join(str(i) for i in batch.ids[:8].tolist())
        raise Diverged(
            f"the loss is {loss.item()} at step {step + 1} (images {rows}, ...)",
            why="training diverged; nothing of this step is saved, the last checkpoint is good",
            fix="lower the stage's learning_rate, raise its warmup, or use precision fp32; give a new --out",
        )


def check_finite(state: TrainState) -> None:
    """Raise Diverged if any tensor about to be saved is not finite."""
    bad = [n for n, t in state.tensors().items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise Diverged(
            f"{len(bad)} tensors are not finite after step {state.step}: {', '.join(bad[:3])}",
            why="training diverged; the last checkpoint is good and was not touched",
            fix="lower the stage's learning_rate, raise its warmup, or use precision fp32; give a new --out",
        )
