"""The one training loop. It knows no recipe, no path and no stage by name.

A stage is an nn.Module: forward(batch) returns {"loss": scalar, name: scalar...}. The loop asks for the gradient,
averages it over ranks, steps, and calls three plain functions: on_log, on_eval, on_save. On CUDA the host runs ahead
of the device: nothing in a step waits for a number, and what is logged is told when it has arrived.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewlabels import runtime
from fewlabels.data.loader import Batch
from fewlabels.errors import Diverged

TIMMS_NORM = nn.modules.batchnorm._BatchNorm  # the base of torch's own batch norms


class Stage(nn.Module):
    """What a stage may add to a plain module."""

    frozen: tuple[str, ...] = ()  # prefixes of tensors that this stage only reads: never trained, never saved

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss": mean over this rank's share of the batch, other names: scalars to log}."""
        raise NotImplementedError

    def backward(self, batch: Batch, precision: runtime.Precision) -> dict[str, Tensor]:
        """Adds the gradient of the loss to every parameter's; returns what forward does."""
        with precision.context(batch.pixels.device):
            scalars = self(batch)
        scalars["loss"].backward()
        return scalars  # type: ignore[no-any-return]

    def after_step(self) -> None:
        """Called after each optimizer step, e.g. to move an average."""

    def before_save(self) -> None:
        """Called before each checkpoint, to bring to the disk what it counts on."""

    def trained(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith(self.frozen)}

    def train(self, mode: bool = True) -> Stage:  # noqa: FBT001, FBT002 - nn.Module's signature
        """Like nn.Module.train, but frozen parts stay in inference mode."""
        super().train(mode)
        for name, module in self.named_children():
            if f"{name}.".startswith(self.frozen):
                module.eval()
        return self


@torch.no_grad()
def follow(average: nn.Module, live: nn.Module, share: float | Tensor) -> None:
    """average <- average + share x (live - average), weights and batch norm statistics alike; counters are copied.

    share: a number, or a scalar tensor on their device. Sharded tensors move part by part.
    """
    found = live.state_dict()
    for name, tensor in average.state_dict().items():
        mine, theirs = runtime.part(tensor), runtime.part(found[name])
        if tensor.is_floating_point():
            mine.lerp_(theirs, share.to(mine.dtype) if isinstance(share, Tensor) else share)
        else:
            mine.copy_(theirs)


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

    @torch.no_grad()
    def load(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave at that step, with any number of ranks, sharded or not.

        Raises ValueError or IndexError for tensors of another network or optimizer.
        """
        mine = {n.removeprefix("stage."): t for n, t in tensors.items() if n.startswith("stage.")}
        ours = self.stage.trained()
        if mine.keys() != ours.keys():
            raise ValueError(f"only one of the two has {', '.join(sorted(mine.keys() ^ ours.keys())[:3])}")
        for name, tensor in ours.items():
            runtime.fill(tensor, mine[name])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, slot = name.split(".", 2)
                parameter = parameters[int(index)]
                if tensor.shape == parameter.shape:
                    # Files keep no memory layout; a 512x512x3x3 kernel in channels_last with a contiguous buffer took
                    # 5 times as long
                    laid_out = torch.empty_like(parameter, dtype=tensor.dtype)
                    runtime.fill(laid_out, tensor)
                    tensor = laid_out
                elif tensor.dim():
                    raise ValueError(f"{name} is of a parameter of another shape")
                slots.setdefault(int(index), {})[slot] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
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

    on_log: Callable[[int, dict[str, float]], None]  # on CUDA a log later, but before any evaluation, save or end
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
    log, losses = _Log(listeners.on_log), _Losses(state)
    waited = 0.0  # seconds that the host waited for batches, since the last log
    mark = asked = time.perf_counter()
    for batch in batches:
        waited += time.perf_counter() - asked
        # so that a resumed run drops the same, and no two ranks or stages do: a CPU's generator takes 32 bits of a seed
        torch.manual_seed(zlib.crc32(f"{plan.seed} {state.step} {runtime.rank()}".encode()))
        scalars = step(state, batch, plan.learning_rate(state.step), precision)
        losses.take(scalars["loss"])
        finished = state.step == plan.total_steps
        if state.step % plan.log_every == 0 or finished:
            now = time.perf_counter()
            log.take(state.step, scalars, {"seconds": now - mark, "wait_share": waited / max(now - mark, 1e-9)})
            mark, waited = now, 0.0
        if not finished and plan.eval_every and state.step % plan.eval_every == 0:
            log.tell()
            losses.check()
            listeners.on_eval(state)
            state.stage.train()
        stopping = runtime.any_rank(flag=listeners.should_stop())
        if finished or stopping or state.step % plan.save_every == 0:
            log.tell()  # a run that goes on from this save logs what comes after it, and no more
            losses.check()
            listeners.on_save(state)
        if stopping and not finished:
            return False
        asked = time.perf_counter()
    return True


class _Log:
    """One step's scalars between the device and on_log. They are copied at once, and told before the next are taken.

    On a CPU they are told at once. On CUDA the copy joins the device's queue, and by the next log it is long there.
    """

    def __init__(self, on_log: Callable[[int, dict[str, float]], None]) -> None:
        self.on_log = on_log
        self.untold: Callable[[], None] | None = None

    def take(self, step: int, scalars: dict[str, Tensor | float], extra: dict[str, float]) -> None:
        """The scalars of a step, and numbers that are known already."""
        self.tell()
        tensors = {name: value for name, value in scalars.items() if isinstance(value, Tensor)}
        on_device = torch.stack([value.to(torch.float64) for value in tensors.values()])
        values = on_device.to("cpu", non_blocking=True)  # into pinned memory, which `to` takes for such a copy
        copied = torch.cuda.Event() if on_device.is_cuda else None  # type: ignore[no-untyped-call]
        if copied is not None:
            copied.record()
        known = {name: value for name, value in scalars.items() if not isinstance(value, Tensor)} | extra

        def told() -> None:
            if copied is not None:
                copied.synchronize()
            # Each rank computed its share's mean; the mean of those is what one process would have logged
            means = torch.stack(runtime.from_all(values)).mean(0).tolist()
            self.on_log(step, dict(zip(tensors, means, strict=True)) | known)

        self.untold = told
        if copied is None:
            self.tell()

    def tell(self) -> None:
        """Tell what was taken last, if it was not told yet. Ranks do so together."""
        if self.untold is not None:
            self.untold()
            self.untold = None


def step(
    state: TrainState, batch: Batch, learning_rate: float, precision: runtime.Precision
) -> dict[str, Tensor | float]:
    """One update in place; returns the stage's scalars and the learning rate."""
    state.optimizer.zero_grad(set_to_none=True)
    scalars = state.stage.backward(batch, precision)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    runtime.average_gradients(parameters)
    moved = (module for module in state.stage.modules() if module.training)
    runtime.average(running_statistics(moved, TIMMS_NORM))  # ours are of all ranks' images already
    _stop_if_not_finite(state, scalars["loss"])
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.step()
    state.stage.after_step()
    state.step += 1
    return {name: value.detach() for name, value in scalars.items()} | {"learning_rate": learning_rate}


def running_statistics(modules: Iterable[nn.Module], *kinds: type[nn.Module]) -> list[Tensor]:
    """Of those modules that are batch norms of these kinds."""
    norms = (module for module in modules if isinstance(module, kinds))
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False) if buffer.is_floating_point()]


def _stop_if_not_finite(state: TrainState, loss: Tensor) -> None:
    """Raise Diverged before the update, on all ranks, if the loss of one or a gradient is not finite."""
    # On CUDA reading the loss would make the host wait every step; there _Losses reads them before every save.
    if loss.device.type == "cuda":
        return
    gradients = {n: runtime.part(p.grad) for n, p in state.stage.named_parameters() if p.grad is not None}
    # A sum is not finite if one of its numbers is not, or too large: then each is looked at, which takes 75 times as
    # long (ResNet-50 on one core: 250 ms, and 3 ms for the sums)
    sums = torch.stack([loss.detach().double(), *(g.sum().double() for g in gradients.values())])
    if not runtime.any_rank(flag=not bool(sums.isfinite().all())):
        return
    check_finite(state, [name for name, _ in state.stage.named_buffers()])  # this forward pass has spoiled the buffers
    at = f"at step {state.step + 1}"
    _agree(None if loss.isfinite() else (state.step + 1, f"the loss is {loss.item()} {at}"))
    bad = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    _agree((state.step + 1, f"{len(bad)} gradients are not finite {at}: {', '.join(bad[:3])}") if bad else None)


class _Losses:
    """The losses since all was finite, where they are: to find the first bad one when something is bad."""

    def __init__(self, state: TrainState) -> None:
        self.state, self.kept = state, list[Tensor]()

    def take(self, loss: Tensor | float) -> None:
        """The one of the step that was just done."""
        self.kept.append(torch.as_tensor(loss))

    def check(self) -> None:
        """Raise Diverged, on all ranks, if any tensor about to be saved is not finite on one of them."""
        values = torch.stack(self.kept).tolist() if self.kept else []
        first = self.state.step - len(values) + 1
        bad = [(step, value) for step, value in enumerate(values, first) if not math.isfinite(value)]
        _agree((bad[0][0], f"the loss is {bad[0][1]} at step {bad[0][0]}") if bad else None)
        check_finite(self.state)
        self.kept.clear()


def check_finite(state: TrainState, besides: Collection[str] = ()) -> None:
    """Raise Diverged, on all ranks, if any tensor to be saved is not finite on one of them; besides: left out."""
    tensors = {n: runtime.part(t) for n, t in state.tensors().items() if n.removeprefix("stage.") not in besides}
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    words = f"{len(bad)} tensors are not finite after step {state.step}: {', '.join(bad[:3])}"
    _agree((state.step, words) if bad else None)


def _agree(found: tuple[int, str] | None) -> None:
    """Raise Diverged on all ranks with the earliest step that one of them found bad, if one did."""
    everyone = [(*each, rank) for rank, each in enumerate(runtime.from_all(found)) if each is not None]
    if everyone:
        step, words, rank = min(everyone, key=lambda each: each[0])
        raise Diverged(words, step=step, rank=rank if len(everyone) < runtime.world_size() else None)
