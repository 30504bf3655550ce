"""This process: its rank, device, number format and threads, and what it says to the other ranks.

The only file that says torch.distributed. Alone, every collective is the identity, so the rest of the code
has one path: `gather(x)` is x, `rank()` is 0.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fewlabels.errors import RankFailed, RunAgain, UsageError

T = TypeVar("T")

CLEARLY = 1.2  # times as fast: a measurement's noise must not decide

JOINING = timedelta(minutes=5)  # to wait for the other processes, which are started together
COLLECTIVE = timedelta(minutes=30)  # to wait for the other ranks in a collective

# The group of the hosts, over gloo: what is said in it never makes a host wait for its device. In it others wait for
# rank 0, which may decode or compare for hours; one that dies is noticed at once.
_hosts: list[Any] = []


def start(name: str = "auto") -> torch.device:
    """Join the process group when torchrun started us (WORLD_SIZE > 1), and return this rank's device.

    Raises RunAgain where not all of the processes come.
    """
    chosen = device(name)
    keep_freed_memory()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        try:
            store, number, world = next(dist.rendezvous("env://", timeout=JOINING))  # type: ignore[attr-defined]
            meeting = _meet(store, number, world)
        except dist.DistError as error:  # a time-out, or the store that rank 0 or torchrun holds is not there
            raise _not_all_came() from error
        except ValueError as error:  # WORLD_SIZE alone, as some clusters set it
            raise UsageError(str(error), fix="start with torchrun, or unset WORLD_SIZE") from error
        store.set_timeout(COLLECTIVE)
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo", timeout=COLLECTIVE, rank=number, world_size=world,
            store=dist.PrefixStore(meeting, store),  # type: ignore[attr-defined]
        )  # fmt: skip
        _hosts[:] = [dist.new_group(backend="gloo", timeout=timedelta(days=30))]
    return chosen


def _not_all_came() -> RunAgain:
    return RunAgain(
        f"not all of the {os.environ['WORLD_SIZE']} processes came",
        why="another failed to start, was stopped or cannot be reached",
        fix="run the same command (torchrun --max-restarts 3 does so by itself)",
    )


def _meet(store: Any, number: int, world: int) -> str:
    """A name that only the processes of this start of the job know.

    torchrun keeps one store over its restarts, in which the addresses of dead processes stand: gloo called those and
    failed ("connectFullMesh ... connection refused"). So every rank says a word that was never said before, and
    rank 0 answers each of them, until all have heard the name.
    """
    mine, until = secrets.token_hex(8), time.monotonic() + JOINING.total_seconds()
    if number > 0:
        store.set(f"hello {number}", mine)
        name: str = store.get(f"welcome {mine}").decode()
        store.add(f"heard {name}", 1)
        return name
    while store.add(f"heard {mine}", 0) < world - 1:
        if time.monotonic() > until:
            raise _not_all_came()
        for hello in (f"hello {other}" for other in range(1, world)):
            if store.check([hello]):
                store.set(f"welcome {store.get(hello).decode()}", mine)
        time.sleep(0.02)
    return mine


def device(name: str = "auto") -> torch.device:
    """This process's device. name: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N"."""
    if name not in ("auto", "cpu", "cuda") and not (name.startswith("cuda:") and name[5:].isdecimal()):
        raise UsageError(f'unknown device "{name}"', fix='use "auto", "cpu", "cuda" or "cuda:0"')
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f'device "{name}" was asked for, but torch sees no CUDA device', fix='use device "cpu"')
    if not (name.startswith("cuda") or (name == "auto" and torch.cuda.is_available())):
        return torch.device("cpu")
    chosen = torch.device(name if ":" in name else f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    processes, own = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if ":" in name and processes > 1 and chosen.index != own:
        raise UsageError(f'"{name}" is one GPU for {processes} processes', fix='use "cuda": each takes its own')
    if (chosen.index or 0) >= (there := torch.cuda.device_count()):
        raise UsageError(
            f'there is no "{chosen}"', fix=f"torch sees {there}, from cuda:0 on, and each process takes one"
        )
    torch.cuda.set_device(chosen)
    return chosen


def finish() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        _hosts.clear()
        dist.destroy_process_group()


def leave(code: int) -> None:
    """End a process of several that failed, at once; alone, do nothing.

    The threads of its groups may still hold tensors. Where Python has begun to end, freeing one there aborts the
    process ("terminate called without an active exception", pytorch issue 190489): seen once, exit code -6 for the 2
    that was due. And to leave the groups properly is to wait for ranks that may never answer.
    """
    if dist.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # its reader is gone; it was closed
                stream.flush()
        os._exit(code)


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
    """Bytes of a GPU's memory that nobody uses, torch's own spare ones too; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + spare


def keep_freed_memory() -> None:
    """Let glibc's malloc keep up to 2 GB of what a step frees for the next step; elsewhere nothing is done.

    Else it goes back to the system, which gives it again page by page, filled with zeros: a step of ResNet-18 of width
    0.25 took 145 to 160 ms on 2 cores, and 124 so, with the same peak of memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    mmap_threshold, trim_threshold = -3, -1  # glibc's malloc.h
    mallopt(mmap_threshold, 32 << 20)  # the largest it takes; larger ones are mapped and given back
    mallopt(trim_threshold, (1 << 31) - 1)


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


def precision(device: torch.device, name: str = "auto", *, channels_last: bool = True) -> Precision:
    """The number format for device. name: "bf16", "fp32", or "auto": bf16 on a GPU that has it, else measured.

    float16 is never used: it needs loss scaling, and on CPUs it is 1,000 times slower (0.3-2.4 GFLOP/s measured).
    """
    if name not in ("auto", "bf16", "fp32"):
        raise UsageError(f'unknown precision "{name}"', fix='use "auto", "bf16" or "fp32"')
    if name == "auto":
        return from_main(_fastest(device) if is_main() else Precision(None, channels_last=True))
    return Precision(torch.bfloat16 if name == "bf16" else None, channels_last)


def _fastest(device: torch.device) -> Precision:
    """On a GPU bf16 where it is to be had; on a CPU float32 in channels_last, unless another is clearly faster here."""
    there = _has_bf16(device)
    if not there or device.type == "cuda":  # small kernels only show how fast they are launched (H100: bf16 lost so)
        return Precision(torch.bfloat16 if there else None, channels_last=True)
    best = Precision(None, channels_last=True)
    least = _seconds_per_convolution(best)
    for dtype, channels_last in ((torch.bfloat16, True), (None, False), (torch.bfloat16, False)):
        other = Precision(dtype, channels_last)
        seconds = _seconds_per_convolution(other)
        if CLEARLY * seconds < least:
            best, least = other, seconds
    return best


def _has_bf16(device: torch.device) -> bool:
    """Whether the hardware says that it multiplies bfloat16. Some that do are slower than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capability.get("avx512_bf16") or capability.get("amx_bf16"))


def _seconds_per_convolution(form: Precision) -> float:
    """Forward and backward of a 3x3 convolution with batch norm and ReLU on the CPU, as in a ResNet's first group."""
    parts = torch.nn.Conv2d(64, 64, 3, padding=1), torch.nn.BatchNorm2d(64), torch.nn.ReLU()
    block = form.layout(torch.nn.Sequential(*parts))
    layout = torch.channels_last if form.channels_last else torch.contiguous_format
    x = torch.ones(8, 64, 28, 28).contiguous(memory_format=layout).requires_grad_()
    times = []
    for _ in range(4):
        began = time.perf_counter()
        with form.context(torch.device("cpu")):
            y = block(x)
        y.sum().backward()
        times.append(time.perf_counter() - began)
    return min(times[1:])  # the first one chooses kernels


# --- what ranks say to each other --------------------------------------------------------------------------


def gather(x: Tensor) -> Tensor:
    """(n, ...) of every rank -> (world_size * n, ...) in rank order, not differentiable. Alone: x itself."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of x over all ranks, not differentiable, in place where possible. Alone: x itself."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over ranks, all in one collective; sharded ones are that already.

    Every rank's loss is the mean over an equal share of the batch, so this is the gradient of the mean over
    the whole batch.
    """
    average([p.grad for p in parameters if p.grad is not None and not is_sharded(p)])


def average(tensors: list[Tensor]) -> None:
    """Replace each by its mean over ranks, all in one collective. Alone: nothing changes."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = torch.split(flat.div_(world_size()), [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def any_rank(*, flag: bool) -> bool:
    """Whether flag is true on at least one rank; every rank gets the same answer. No device is waited for."""
    if world_size() == 1:
        return flag
    vote = torch.tensor([int(flag)])
    dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=_hosts[0])
    return bool(vote.item())


def from_main(value: T) -> T:
    """Rank 0's value, on every rank. The value must be picklable and small; it never leaves this job."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_hosts[0])
    return box[0]


def from_all(value: T) -> list[T]:
    """Every rank's value in rank order, on every rank; picklable and small, as in from_main. Alone: [value]."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_hosts[0])
    return values


def board(timeout_seconds: float) -> Any:
    """A connection of its own to the store that all ranks write to and read (torchrun holds it, or rank 0).

    Its keys are those of this start of the job: torchrun keeps one store over restarts.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    connection = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=False, timeout=timedelta(seconds=timeout_seconds)
    )
    return dist.PrefixStore(from_main(secrets.token_hex(8)), connection)  # type: ignore[attr-defined]


def of_a_collective(error: BaseException) -> bool:
    """Whether error came out of a collective: another rank is gone, or did not come in time."""
    names = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.startswith("torch.distributed") for name in names)


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 runs the block before the others, which then find its files. A failure of rank 0 reaches all ranks."""
    failure: BaseException | None = None
    if is_main():
        try:
            yield
        except BaseException as error:
            failure = error
    code = getattr(failure, "exit_code", 1)
    problem = from_main(None if failure is None else (f"rank 0 failed: {type(failure).__name__}: {failure}", code))
    if failure is not None:
        raise failure
    if not is_main():
        if problem is not None:
            raise RankFailed(*problem)
        yield


# --- tensors of which each rank keeps a part ---------------------------------------------------------------


def shard(module: torch.nn.Module) -> None:
    """From now on each rank keeps 1 / world_size of the rows of every parameter of module, and of its gradient.

    FSDP2 (arXiv 2304.11277; stage 3 of arXiv 1910.02054): they are whole while module computes. Parameters of inner
    modules that are sharded already stay as they are, so inner ones go first.
    """
    # 1.2 s of imports: only those pay who shard
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for parameter in module.parameters():
        if not parameter.is_contiguous():  # channels_last, which FSDP2 refuses
            parameter.data = parameter.data.contiguous()
    device = next(module.parameters()).device
    fully_shard(module, mesh=init_device_mesh(device.type, (world_size(),)), reshard_after_forward=True)


def is_sharded(x: Tensor) -> bool:
    """Whether x stands for a tensor of which each rank has a part (a DTensor, whose import costs 0.9 s)."""
    return hasattr(x, "full_tensor")


def part(x: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, perhaps none, in the same memory; any other tensor itself."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def whole(x: Tensor) -> Tensor:
    """A sharded tensor with all its rows, on every rank: a collective; any other tensor itself."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]


def whole_on_main(x: Tensor) -> Tensor:
    """The same, but only on rank 0, in the host's memory; the other ranks keep their part, and never hold more."""
    if not is_sharded(x):
        return x
    mine, share = part(x.detach()), -(-len(x) // world_size())  # ranks have as many rows each, the last ones fewer
    padded = torch.cat([mine, mine.new_zeros(share - len(mine), *x.shape[1:])])
    parts = [torch.empty_like(padded) for _ in range(world_size())] if is_main() else None
    dist.gather(padded, parts)
    return torch.cat(parts)[: len(x)].cpu() if parts else mine


def fill(x: Tensor, rows: Tensor) -> None:
    """x <- rows, a whole tensor that every rank has; a sharded x takes its part. ValueError for another shape."""
    if x.shape != rows.shape:
        raise ValueError(f"{tuple(rows.shape)} does not fit into {tuple(x.shape)}")
    if is_sharded(x):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = x.device_mesh, x.placements  # type: ignore[attr-defined]
        rows = distribute_tensor(rows.to(x.device), mesh, placements, src_data_rank=None)  # None: nothing is sent
    x.copy_(rows)
