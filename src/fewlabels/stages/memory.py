"""How large a batch the memory holds: the peaks of real steps at small batches, and the line through the last two.

On CUDA the peak is that of torch's allocator, on Linux that of the process (VmHWM); elsewhere nothing is said. It only
advises: no batch is ever changed by it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fewlabels import runtime
from fewlabels.config import PretrainRecipe
from fewlabels.data.loader import Order, fits, training_batches
from fewlabels.errors import UsageError
from fewlabels.model.encoder import Encoder
from fewlabels.model.heads import ProjectionHead
from fewlabels.stages.loop import Stage, TrainState, step

if TYPE_CHECKING:
    from fewlabels.stages.runner import Job, Workplace

FIRST = 4  # images of the first batch, on each rank
TELLING = 64_000_000  # bytes: two peaks this far apart say more about images than about an allocator's habits
SPARE = 0.9  # of the room is counted on: there are gaps between what is allocated
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# glibc's mallopt: from this size on an allocation is its own mapping, given back at once. With the threshold of
# training (runtime.keep_freed_memory) peaks of equal steps differed by 200 MB of 800
MMAP_THRESHOLD, MEASURING = -3, 1 << 18
SLOTS = {"lars": 1, "sgd": 1, "adamw": 2, "muon": 1}  # numbers an optimizer keeps for each weight
# Of the largest piece, while FSDP2 gathers one and reduces another: counted over the live storages of steps of
# ResNet-50 SK in float32 on one of 8 ranks, 4.03
ON_THE_WAY = 4
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def held(stage: Stage, optimizer: str, *, ranks: int, shard: bool, bf16: bool) -> dict[str, int]:
    """Bytes that one of so many ranks holds at the peak of a step in any case; stage may be on the meta device."""
    share = ranks if shard else 1
    trained = sum(p.nbytes for p in stage.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for name, p in stage.named_parameters() if name.startswith(stage.frozen))
    average = sum(p.nbytes for p in stage.parameters()) - trained - frozen
    pieces = [piece for part in stage.modules() if isinstance(part, Encoder) for piece in part.pieces]
    pieces += [part for part in stage.modules() if isinstance(part, ProjectionHead)]
    largest = max(sum(p.nbytes for p in piece.parameters()) for piece in pieces)
    return {
        "weights": trained // share,
        "weights of the moving average": average // share,
        "weights of a teacher": frozen,
        "bf16 copies, kept for the gradient": trained // 2 if bf16 else 0,
        "gradients": trained // share,
        "gradients in one piece for the all-reduce": trained if ranks > share else 0,
        "optimizer state": SLOTS[optimizer] * trained // share,
        "pieces that are gathered and reduced": ON_THE_WAY * largest if share > 1 else 0,
    }


def need(job: Job, at: Workplace) -> tuple[float, float] | None:
    """Bytes at the peak of a step: so many in any case, and so many for every image of a rank.

    Measured with steps of batches that grow until they tell; job.stage is spoiled by it. None: it cannot be.
    """
    most = job.derived.batch // runtime.world_size()
    first = FIRST
    if isinstance(job.schedule, PretrainRecipe) and 0 < job.schedule.chunk < job.derived.batch:
        first = min(2 * max(1, job.schedule.chunk // runtime.world_size()), most // 2)  # of more than one chunk
    if 2 * first > most or first < 1 or not runtime.from_main(_can_measure(at.device)):
        return None
    state = job.state()
    state.stage.train()
    with _exact_peaks():
        _peak_of_a_step(job, at, state, first)  # the optimizer gets its buffers
        before, images = _peak_of_a_step(job, at, state, first), 2 * first
        peak = _peak_of_a_step(job, at, state, images)
        while peak - before < TELLING and 2 * images <= most:
            before, images = peak, 2 * images
            peak = _peak_of_a_step(job, at, state, images)
    image = max(0.0, (peak - before) / (images - images // 2))
    return peak - image * images, image


def largest_batch(job: Job, at: Workplace) -> int | None:
    """About how many images over all ranks a step of the job can take; all there are at most. None: not to be known.

    job.stage is spoiled by it.
    """
    room = runtime.from_main(_room(at.device) if _can_measure(at.device) else 0.0)
    try:
        needed = need(job, at)
    except torch.OutOfMemoryError as error:
        if runtime.world_size() > 1:  # the others wait in a collective
            raise UsageError(
                f"the GPU of a process has too little memory to try {job.name}", fix="free some"
            ) from error
        return 0
    if needed is None:
        return None
    if at.device.type == "cuda" and fits(at.dataset, job.ids, job.schedule.epochs, int(room)):
        room -= len(job.ids) * 3 * at.dataset.store.canvas**2  # training keeps the images there
    fixed, image = needed
    images = (SPARE * room - fixed) / max(image, 1.0)
    return min(len(job.ids), max(0, int(images)) * runtime.world_size())


def _peak_of_a_step(job: Job, at: Workplace, state: TrainState, images: int) -> int:
    """Bytes, on rank 0; all ranks take the step."""
    order = Order(job.ids, images * runtime.world_size(), job.seed)
    for batch in training_batches(at.dataset, order, first_step=0, last_step=1, device=at.device):
        _forget_peak(at.device)
        step(state, batch, 1e-3 * job.derived.peak, at.precision)
    return runtime.from_main(_peak(at.device))


# --- of a device -----------------------------------------------------------------------------------------------------


def _can_measure(device: torch.device) -> bool:
    if device.type == "cuda":
        return True
    try:
        _forget_peak(device)
    except OSError:  # not Linux, or a container that may not
        return False
    return True


def _forget_peak(device: torch.device) -> None:
    """From now on the peak is that of what follows."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError, AttributeError):  # not glibc: what was freed may count as used
        ctypes.CDLL(None).malloc_trim(0)
    RESET.write_text("5")


@contextlib.contextmanager
def _exact_peaks() -> Iterator[None]:
    """What is freed in the block does not count as used any more. Nothing is changed where malloc is not glibc's."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    mallopt(MMAP_THRESHOLD, MEASURING)
    try:
        yield
    finally:
        runtime.keep_freed_memory()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _kilobytes(STATUS, "VmHWM")


def _room(device: torch.device) -> float:
    """Bytes that this process could come to hold, with those that it holds."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device))
    room = _kilobytes(Path("/proc/meminfo"), "MemAvailable") + _kilobytes(STATUS, "VmRSS")
    limits = [Path(name).read_text().strip() for name in LIMITS if Path(name).is_file()]
    return float(min([room, *(int(limit) for limit in limits if limit.isdecimal())]))


def _kilobytes(file: Path, name: str) -> int:
    """Bytes of the line "NAME: 123 kB"."""
    return next(1024 * int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(f"{name}:"))
