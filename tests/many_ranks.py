"""Whole commands on two gloo ranks, one of which is other than its fellow or meets a fault.

`python tests/many_ranks.py FOLDER` runs CASES and prints what became of both ranks as JSON; test_many_ranks.py holds
that against what must be. Ranks are forked from one process that has imported torch: an import costs 3 s.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # forking a process whose threads have worked would hang its child
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"

import functools
import json
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from conftest import shapes_images
from faults.tally import before_forking
from fewlabels import checkpoint, cli, watch
from fewlabels.data import loader, pixels
from fewlabels.errors import DataError, Stopped, StorageError
from fewlabels.stages import loop
from fewlabels.stages.finetune import Finetune
from fewlabels.stages.pretrain import Pretrain

PATIENCE = 60.0  # seconds until a rank that hangs is killed
STOPPED_STEP = 3
SPOILED = 0  # a row whose reading fails


def variables(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    return address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# --- faults: what a rank does before its command ------------------------------------------------------------------


def fail() -> None:
    raise ValueError("injected")


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


def in_the_survey(fault: Callable[[], None]) -> None:
    """Before any pixel is decoded."""
    pixels.survey = lambda source: fault()


def in_the_store(fault: Callable[[], None]) -> None:
    """Where rank 0 decodes and the others wait."""
    pixels.build = lambda *a, **k: fault()


def in_a_step(fault: Callable[[], None], kind: type = object) -> None:
    """After a few steps of a stage."""
    step = loop.step

    def spoiled(state: Any, *rest: Any) -> Any:
        if state.step == STOPPED_STEP and isinstance(state.stage, kind):
            fault()
        return step(state, *rest)

    loop.step = spoiled


def stay(fault: Callable[[], None]) -> None:
    """Fail and do not end, so that the others wait in a collective that never fails."""
    in_a_step(fault)
    watch.Ranks.leave = lambda self: time.sleep(2 * PATIENCE)


def asked_to_stop() -> None:
    raise Stopped(signal.SIGUSR1, "here")


def bad_data() -> None:
    raise DataError("injected", fix="none")


def in_reading(fault: Callable[[], None]) -> None:
    """Where a thread reads the images of a later step, once some were trained on."""
    share = loader.Order.share

    def spoiled(self: Any, step: int, *rest: Any) -> Any:
        rows = share(self, step, *rest)
        return rows if step < STOPPED_STEP else np.full_like(rows, SPOILED)

    def read(self: Any, ids: Any, **how: Any) -> Any:
        if SPOILED in ids:
            fault()
        return whole(self, ids, **how)

    whole, loader.Order.share, pixels.PixelStore.read = pixels.PixelStore.read, spoiled, read


def in_saving(fault: Callable[[], None]) -> None:
    """Where rank 0 writes a checkpoint and the others wait."""
    checkpoint.save = lambda *a: fault()


def before_saving(fault: Callable[[], None]) -> None:
    """Where every rank brings to the disk what a checkpoint counts on."""
    loop.Stage.before_save = lambda self: fault()


def full_disk() -> None:
    raise StorageError("injected", fix="none")


def a_loss_of_nan() -> None:
    """The loss of one step is no number, and the images of that step are told beside the messages."""
    backward = Pretrain.backward

    def spoiled(self: Any, batch: Any, *rest: Any) -> Any:
        scalars = backward(self, batch, *rest)
        if batch.epoch == 1:
            print("the bad images:", json.dumps(batch.ids.tolist()), file=sys.stderr)
            scalars["loss"] = scalars["loss"] * float("nan")
        return scalars

    Pretrain.backward = spoiled


# --- cases ----------------------------------------------------------------------------------------------------------


def cases(folder: Path) -> dict[str, tuple[list[str], list[str], dict[int, Callable[[], None]]]]:
    """Name -> words of rank 0, words of rank 1, faults."""
    images, classes = shapes_images(32, size=16, seed=1)
    classes[16:] = -1
    np.savez(folder / "images.npz", images=images, labels=classes)
    np.savez(folder / "other.npz", images=images, labels=classes[::-1])

    def words(name: str, *more: str, command: str = "pretrain", file: str = "images.npz") -> list[str]:
        return [command, str(folder / file), "--out", str(folder / name), "--recipe", "smoke", *more]

    def fault(name: str, rank: int, what: Callable[[], None], **how: str) -> Any:
        return words(name, **how), words(name, **how), {rank: what}

    at = functools.partial
    return {
        "option": (words("option"), words("option", "--pretrain.epochs", "3"), {}),
        "budget": (words("budget"), words("budget", "--budget", "5m"), {}),
        "labels": (words("labels"), words("labels", file="other.npz"), {}),
        "folder": (words("folder"), words("elsewhere"), {}),
        "nothing": (words("nothing", file="none.npz"), words("nothing", file="none.npz"), {}),
        "survey": fault("survey", 1, at(in_the_survey, fail)),
        "store": fault("store", 0, at(in_the_store, bad_data)),
        "pretrain": fault("pretrain", 1, at(in_a_step, bad_data)),
        "finetune": fault("finetune", 1, at(in_a_step, fail, Finetune), command="finetune"),
        "main": fault("main", 0, at(in_a_step, fail)),
        "signal": fault("signal", 1, at(in_a_step, asked_to_stop)),
        "stays": fault("stays", 1, at(stay, fail)),
        "reading": fault("reading", 1, at(in_reading, bad_data)),
        "saving": fault("saving", 0, at(in_saving, full_disk)),
        "before saving": fault("before-saving", 1, at(before_saving, bad_data)),
        "diverged": fault("diverged", 1, a_loss_of_nan),
        "check": fault("check", 1, at(in_the_store, fail), command="check"),
        "killed": fault("killed", 1, at(in_a_step, at(kill, signal.SIGKILL))),
        "main killed": fault("main-killed", 0, at(in_a_step, at(kill, signal.SIGKILL))),
        "stopped": fault("stopped", 1, at(in_a_step, at(kill, signal.SIGSTOP))),
        "main stopped": fault("main-stopped", 0, at(in_a_step, at(kill, signal.SIGSTOP))),
    }


def together(commands: list[list[str]], folder: Path, faults: dict[int, Callable[[], None]]) -> list[tuple[int, str]]:
    """(exit code, stdout and stderr) of every rank's command line."""
    port, children = free_port(), []
    for rank, words in enumerate(commands):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 99
        try:
            os.environ.update(variables(rank, len(commands), port))
            with (folder / f"{rank}.log").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            faults.get(rank, lambda: None)()
            code = cli.main(words)
            sys.stdout.flush()
        finally:
            os._exit(code)
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE
    while len(codes) < len(children):
        if all(rank in codes or rank in faults for rank in range(len(children))):
            deadline = min(deadline, time.monotonic() + 2)  # who met the fault may never end by itself
        for rank in set(range(len(children))) - set(codes):
            if time.monotonic() > deadline:
                os.kill(children[rank], signal.SIGKILL)
            ended, status = os.waitpid(children[rank], os.WNOHANG)
            if ended:
                codes[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [(codes[rank], (folder / f"{rank}.log").read_text()) for rank in range(len(children))]


def main() -> None:
    """Run the cases and print name -> [[exit code, stderr] of each rank, seconds, status.json."""
    folder = Path(sys.argv[1])
    before_forking()
    watch.BEAT, watch.GRACE, watch.SILENCE = 0.2, 2.0, 5.0
    found: dict[str, Any] = {}
    for name, (first, second, faults) in cases(folder).items():
        began = time.monotonic()
        ranks = together([first, second], folder, faults)
        status = Path(first[3], "status.json")
        state = json.loads(status.read_text()) if status.exists() else {}
        found[name] = {"ranks": ranks, "seconds": time.monotonic() - began, "status": state}
    print("\n" + json.dumps(found | {"left behind": [path.name for path in folder.glob(".*")]}))


if __name__ == "__main__":
    main()
