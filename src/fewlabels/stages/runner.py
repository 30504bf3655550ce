"""A stage in a run folder: trained from its last checkpoint to the end of its schedule, saved and logged on the way."""

from __future__ import annotations

import shlex
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fewlabels import checkpoint, runtime
from fewlabels.config import Schedule
from fewlabels.data.labels import Dataset
from fewlabels.data.loader import Batch, Order, training_batches
from fewlabels.errors import DataError, Diverged, RunAgain, Stopped, UsageError
from fewlabels.model import optim
from fewlabels.plan import TRAINED, Derived, derive
from fewlabels.runfolder import Interrupts, Progress, RunFolder, duration, say
from fewlabels.stages import memory, sharded
from fewlabels.stages.loop import Listeners, Plan, Stage, TrainState, check_finite, step, train

LOGS, EVALUATIONS, SAVES = 100, 8, 20  # of each, about so many a stage
MOST_STEPS_SILENT = 50
MOST_STEPS_UNSAVED = 500
TIMED_STEPS = 4
MOST_WAITING = 0.05  # share of a stage that may pass in waiting for images without a word


@dataclass(frozen=True)
class Workplace:
    """Where stages run: the folder, the images, the machine."""

    folder: RunFolder
    dataset: Dataset
    device: torch.device
    precision: runtime.Precision
    interrupts: Interrupts


@dataclass(frozen=True)
class Job:
    """One stage to run: under which name, on which images, how long, and whose results it is."""

    name: str
    stage: Stage
    schedule: Schedule
    ids: np.ndarray  # (n,) rows of the store
    seed: int
    identity: dict[str, Any]
    scores: Callable[[Stage], dict[str, float]] | None = None  # logged now and then while training
    shard: bool = False  # each rank keeps a part of weights, gradients and optimizer state

    @property
    def sharded(self) -> bool:
        """One process has nobody to share with."""
        return self.shard and runtime.world_size() > 1

    @property
    def derived(self) -> Derived:
        """The numbers that follow."""
        return derive(self.schedule, len(self.ids), runtime.world_size())

    def state(self) -> TrainState:
        """Step 0. Where it is sharded, of a copy, and until `sharded.collect` self.stage is empty."""
        stage = sharded.share_out(self.stage) if self.sharded else self.stage
        optimizer = optim.optimizer(
            self.schedule.optimizer, stage, lr=self.derived.peak, weight_decay=self.schedule.weight_decay
        )
        return TrainState(stage, optimizer)

    def order(self) -> Order:
        """Which images make up which step."""
        return Order(self.ids, self.derived.batch, self.seed)


def pace(derived: Derived, seed: int, *, evaluate: bool) -> Plan:
    """How often a stage logs, evaluates and saves. The same on every rank, so that all of them save together."""
    total = derived.total_steps
    return Plan(
        total_steps=total, learning_rate=derived.learning_rate, seed=seed,
        log_every=max(1, min(MOST_STEPS_SILENT, total // LOGS)),
        eval_every=max(1, total // EVALUATIONS) if evaluate else 0,
        save_every=max(1, min(MOST_STEPS_UNSAVED, total // SAVES)),
    )  # fmt: skip


def run(job: Job, at: Workplace) -> None:
    """Train job.stage in place. A finished stage only gets its weights back. Raises Stopped after a signal."""
    state = job.state()
    _run(job, at, state)
    sharded.collect(job.stage, state.stage)


def _run(job: Job, at: Workplace, state: TrainState) -> None:
    total = job.derived.total_steps
    spent = _resume(job, at, state)
    if len(steps := set(runtime.from_all(state.step))) > 1:  # a disk gave one of them an older listing, or an error
        raise RunAgain(
            f"the processes found different checkpoints of {job.name}: of the steps {sorted(steps)}",
            why="they would train different weights as one",
            fix="run the same command again; if it stays, compare what the machines see in the run folder",
        )
    if state.step >= total:
        return
    at.folder.status("running", job.name)
    at.folder.cut_metrics(job.name, state.step)
    say(f"{job.name}: " + (f"going on from step {state.step:,} of {total:,}" if state.step else f"{total:,} steps"))
    began, waits = time.perf_counter(), list[float]()
    seconds: Callable[[], float] = lambda: spent + time.perf_counter() - began  # noqa: E731 - over all starts
    batches = training_batches(at.dataset, job.order(), first_step=state.step, last_step=total, device=at.device)
    listeners = _listeners(job, at, state, seconds, waits)
    at.interrupts.patient = True
    try:
        rhythm = pace(job.derived, job.seed, evaluate=job.scores is not None)
        spare_rng = torch.random.fork_rng(devices=[at.device] if at.device.type == "cuda" else [])
        with spare_rng, _enough_memory(job, at, state, batches):
            train(state, batches, rhythm, listeners, at.precision)
    except Diverged as error:
        raise Diverged(error.what, step=error.step, images=_seen(job, at.dataset, error)) from error
    except DataError:
        if runtime.world_size() == 1:  # several processes save together, and only this one knows
            check_finite(state)
            listeners.on_save(state)
        raise
    finally:
        at.interrupts.patient = False
        batches.close()
    at.folder.status("running", job.name, seconds={job.name: seconds()}, waited={job.name: sum(waits)})
    # The same number on all ranks, though perhaps one of them got the signal
    if number := max(runtime.from_all(at.interrupts.received or 0)):
        raise Stopped(number, f"at step {state.step:,} of {total:,} of {job.name}; everything is saved")
    say(f"{job.name}: done in {duration(seconds())}{_waited(sum(waits), seconds() - spent, at.dataset)}")


@contextmanager
def _enough_memory(job: Job, at: Workplace, state: TrainState, batches: Generator[Batch, None, None]) -> Iterator[None]:
    """If it is not, says what to do; on one process with the batch that fits. Finding that spoils job.stage."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        # What training held would count beside what measuring holds itself: the step's tensors, the images on the
        # device, the optimizer's buffers
        traceback.clear_frames(error.__traceback__)
        batches.close()
        state.optimizer.state.clear()
        fits = memory.largest_batch(job, at) if runtime.world_size() == 1 else None
        chunks = " or --pretrain.chunk" if job.name == "pretrain" else ""
        raise UsageError(
            f"the GPU has too little memory for {job.name} with batches of {job.derived.batch}",
            why="" if fits is None else f"the largest batch that fits: about {fits:,}",
            fix="repeat the command with --recompute; or, and with a new --out, with a smaller "
            f"--{TRAINED[job.name]}.batch or --size{chunks}",
        ) from error


def _seen(job: Job, dataset: Dataset, error: Diverged) -> list[str]:
    """The names of the images of that step, of one rank or of all."""
    order, step = job.order(), error.step - 1
    permutation = order.permutation(order.epoch(step))
    ranks = range(runtime.world_size()) if error.rank is None else [error.rank]
    return [dataset.names[row] for rank in ranks for row in order.share(step, permutation, rank)]


def _waited(seconds: float, of: float, dataset: Dataset) -> str:
    """A remark where much of a stage passed in waiting for images."""
    if seconds <= MOST_WAITING * of or seconds < 1:
        return ""
    slow = "decoding on more cores, or --store pixels, would help" if dataset.store.streamed else "the disk is slow"
    return f"; waited {seconds / of:.0%} of it for images: {slow}"


def _surroundings(job: Job, at: Workplace) -> dict[str, Any]:
    """What must not change for a resumed run to be bit-identical."""
    kind = torch.cuda.get_device_name(at.device) if at.device.type == "cuda" else "cpu"
    found = {"device": kind, "threads": torch.get_num_threads(), "ranks": runtime.world_size()}
    return found | {"torch": torch.__version__} | ({"sharded": True} if job.sharded else {})


def reached(saved: checkpoint.Saved | None, total: int) -> int:
    """Where a stage goes on: as far as it was in the steps it had then, which other numbers of processes change."""
    if saved is None:
        return 0
    before: int = saved.values.get("total_steps", total)  # an older version did not keep it
    return min(total, saved.step * total // before)


def _resume(job: Job, at: Workplace, state: TrainState) -> float:
    """Put the last good checkpoint into state; returns the seconds that were spent before it."""
    saved, passed_over = checkpoint.latest(at.folder.stage(job.name))
    for words in passed_over:
        left = f"{job.name} begins anew, no other is left" if saved is None else f"that of step {saved.step:,} is used"
        say(f"  warning: {words}; {left}")
    if saved is None:
        return 0.0
    try:
        state.load(reached(saved, job.derived.total_steps), saved.tensors)
        before, seconds = {**saved.values["surroundings"]}, float(saved.values["seconds"])
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the checkpoints of {at.folder.stage(job.name)} are of another network: {error}",
            why="going on would mix two runs; nothing was changed",
            fix=f"rm -r {shlex.quote(str(at.folder.stage(job.name)))} to do this stage anew, or give a new --out",
        ) from error
    now = _surroundings(job, at)
    names = [name for name in now | before if before.get(name) != now.get(name)]
    moved = [f"{name} {before.get(name)} -> {now.get(name)}" for name in names]
    if moved and state.step < job.derived.total_steps:
        say(f"  note: resuming elsewhere ({', '.join(moved)}): results will be close, not bit-identical")
    return seconds


def _listeners(
    job: Job, at: Workplace, state: TrainState, seconds: Callable[[], float], waits: list[float]
) -> Listeners:
    """seconds: spent on the stage over all its starts. waits gets those that training waited for images, log by log."""
    derived = job.derived
    progress = Progress(job.name, derived.total_steps, state.step, derived.batch)

    def on_log(step: int, values: dict[str, float]) -> None:
        at.folder.log(job.name, step, derived.total_steps, values)
        progress.update(step, values)
        waits.append(values["wait_share"] * values["seconds"])

    def on_eval(state: TrainState) -> None:
        if job.scores is not None:
            at.folder.log(job.name, state.step, derived.total_steps, job.scores(state.stage))

    def on_save(state: TrainState) -> None:
        values = {"identity": job.identity, "seconds": seconds(), "surroundings": _surroundings(job, at)}
        values["total_steps"] = derived.total_steps
        state.stage.before_save()
        tensors = {name: runtime.whole_on_main(tensor) for name, tensor in state.tensors().items()}
        with runtime.main_first():
            if runtime.is_main():
                checkpoint.save(at.folder.stage(job.name), state.step, tensors, values)

    return Listeners(
        on_log=on_log, on_eval=on_eval, on_save=on_save, should_stop=lambda: at.interrupts.received is not None
    )


def seconds_per_step(job: Job, at: Workplace) -> float:
    """Measured: the median of a few steps after a warm-up one. job.stage is spoiled by it: give a throwaway."""
    state, order = job.state(), job.order()
    state.stage.train()
    last = min(TIMED_STEPS + 1, order.steps_per_epoch * 4)
    batches = training_batches(at.dataset, order, first_step=0, last_step=last, device=at.device)

    def timed(batch: Batch) -> float:
        began = time.perf_counter()
        step(state, batch, job.derived.peak * 1e-3, at.precision)
        if at.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    with _enough_memory(job, at, state, batches):
        times = [timed(batch) for batch in batches]
    return float(np.median(times[1:] or times))
