"""This process: its rank, device, number format and threads, and what it says to the other ranks.

The only file that says torch.distributed. Alone, every collective is the identity, so the rest of the code
has one path: `gather(x)` is x, `rank()` is 0.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fewlabels.errors import FewlabelsError, MainFailed, UsageError

T = TypeVar("T")

# The group in which others wait for rank 0, which may decode or compare for hours. One that dies is noticed at once.
_patient: list[Any] = []


def start(name: str = "auto", *, timeout_minutes: float = 30.0) -> torch.device:
    """Join the process group when torchrun started us (WORLD_SIZE > 1), and return this rank's device."""
    chosen = device(name)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(minutes=timeout_minutes))
        _patient[:] = [dist.new_group(backend="gloo", timeout=timedelta(days=30))]
    return chosen


def device(name: str = "auto") -> torch.device:
    """This process's device. name: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N"."""
    if name not in ("auto", "cpu", "cuda") and not (name.startswith("cuda:") and name[5:].isdecimal()):
        raise UsageError(f'unknown device "{name}"', fix='use "auto", "cpu", "cuda" or "cuda:0"')
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f'device "{name}" was asked for, but torch sees no CUDA device', fix='use device "cpu"')
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise UsageError(f'there is no "{name}"', fix=f"torch sees {torch.cuda.device_count()}, from cuda:0 on")
    if not (name.startswith("cuda") or (name == "auto" and torch.cuda.is_available())):
        return torch.device("cpu")
    chosen = torch.device(name if ":" in name else f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    torch.cuda.set_device(chosen)
    return chosen


def finish() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        _patient.clear()
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this rank writes files and talks to the user."""
    return rank() == 0


def threads() -> int:
    """CPU threads that this process may use: its affinity, not the machine's count."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_while_training() -> int:
    """This process's share of threads(): torchrun starts several on one machine, and all of them decode."""
    return max(1, threads() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that nobody uses; 0 on a CPU, where images need no second place."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


# --- number format ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """How the network computes: autocast's dtype (None = plain float32) and the memory layout of images."""

    autocast: torch.dtype | None
    channels_last: bool

    @property
    def name(self) -> str:
        """ "bf16" or "fp32"."""
        return "fp32" if self.autocast is None else "bf16"

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The autocast context for a forward pass on device."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)

    def layout(self, module: torch.nn.Module) -> torch.nn.Module:
        """module with its 4-D weights in the chosen memory layout."""
        return module.to(memory_format=torch.channels_last) if self.channels_last else module


def precision(device: torch.device, name: str = "auto") -> Precision:
    """The number format for device. name: "auto" (bf16 where the hardware multiplies it fast), "bf16" or "fp32".

    float16 is never used: it needs loss scaling, and on CPUs it is 1,000 times slower (0.3-2.4 GFLOP/s measured).
    """
    if name not in ("auto", "bf16", "fp32"):
        raise UsageError(f'unknown precision "{name}"', fix='use "auto", "bf16" or "fp32"')
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
            fast = bool(capability.get("avx512_bf16") or capability.get("amx_bf16"))
        name = "bf16" if fast else "fp32"
    return Precision(torch.bfloat16 if name == "bf16" else None, channels_last=True)


# --- what ranks say to each other --------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """All-gather along dim 0 whose backward sums what every rank's loss says about our rows.

    A plain all_gather would drop those cross terms (method.md section 8).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        first = dist.get_rank() * ctx.rows
        return total[first : first + ctx.rows]


def gather(x: Tensor) -> Tensor:
    """(n, ...) of every rank -> (world_size * n, ...) in rank order, differentiable. Alone: x itself."""
    if world_size() == 1:
        return x
    return _Gather.apply(x)  # type: ignore[no-any-return]


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of x over all ranks, not differentiable, in place where possible. Alone: x itself."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of a CPU tensor over all ranks, for numbers that are told; not differentiable. Alone: x itself."""
    if world_size() == 1:
        return x
    total = x.to(_collective_device())
    dist.all_reduce(total)
    return (total / world_size()).cpu()


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over ranks, in one collective per dtype.

    Every rank's loss is the mean over an equal share of the batch, so this is the gradient of the mean over
    the whole batch.
    """
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    for dtype in {g.dtype for g in gradients}:
        same = [g for g in gradients if g.dtype == dtype]
        flat = torch.cat([g.reshape(-1) for g in same])
        dist.all_reduce(flat)
        flat /= world_size()
        offset = 0
        for g in same:
            g.copy_(flat[offset : offset + g.numel()].view_as(g))
            offset += g.numel()


def any_rank(*, flag: bool) -> bool:
    """Whether flag is true on at least one rank; every rank gets the same answer."""
    if world_size() == 1:
        return flag
    vote = torch.tensor([1.0 if flag else 0.0], device=_collective_device())
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item() > 0)


def from_main(value: T) -> T:
    """Rank 0's value, on every rank. The value must be picklable and small; it never leaves this job."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_patient[0])
    return box[0]


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def _collective_device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block before the others, which then find its files. A failure of rank 0 reaches all ranks."""
    failure: BaseException | None = None
    if is_main():
        try:
            yield
        except BaseException as error:
            failure = error
    known = failure.exit_code if isinstance(failure, FewlabelsError) else None
    problem = from_main(None if failure is None else (f"rank 0 failed: {type(failure).__name__}: {failure}", known))
    if failure is not None:
        raise failure
    if not is_main():
        if problem is not None:
            words, code = problem
            raise RuntimeError(words) if code is None else MainFailed(words, code)
        yield
