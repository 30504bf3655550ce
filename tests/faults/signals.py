"""SIGTERM, SIGINT and SIGUSR1 in every phase of a run: saved and stopped at once, and no step is lost.

    python tests/faults/signals.py

The signal comes at a random moment after the process has told that it is inside the phase. Within 5 seconds the
process has ended with the agreed exit code, status.json says so, and where it trained the newest checkpoint is that of
the step it was in. Each run gets a signal in every phase, one start after another; then the same command ends it as
the run that nothing happened to, bit for bit. The same with two ranks, and under torchrun.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # forking a process whose threads have worked would hang its child

import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from faults import runs
from faults.tally import Tally, conclude, ended, parser
from fewlabels.data import pixels
from fewlabels.stages import loop, runner
from fewlabels.use import compare, report
from fewlabels.worker import Worker

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75}
TRAINING = {"pretrain": 13, "finetune": 9, "distill": 13, "supervised": 25}  # phase: steps of the smallest run
PHASES = ("decode", "try networks", *TRAINING, "compare", "report")
SECONDS = 5.0
MOST_DELAY = 0.02  # seconds between the sign of a phase and the signal


class Bell:
    """In a child: rings once, when the run is inside the phase, and a signal follows.

    who: which process is to get it, None = this one; else the parent sends it when it sees the file `rung`.
    """

    def __init__(self, rung: Path, phase: str, step: int, number: int | None, delay: float) -> None:
        self.rung, self.phase, self.at, self.number, self.delay = rung, phase, step, number, delay
        self.stage, self.step, self.done = "", 0, False

    def install(self) -> None:
        """Hang the bell where the phase comes by."""
        self._around(runner, "run", self._enter)
        self._around(loop, "step", self._count)
        places: dict[str, tuple[Any, str]] = {
            "decode": (pixels, "_decode_chunk"), "try networks": (Worker, "try_networks"),
            "compare": (compare, "outputs"), "report": (report, "render"),
        }  # fmt: skip
        if self.phase in places:
            self._around(*places[self.phase], lambda *_: self.ring())

    def _around(self, owner: Any, name: str, first: Callable[..., None]) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            first(*arguments)
            return real(*arguments, **options)

        setattr(owner, name, call)

    def _enter(self, job: runner.Job, at: runner.Workplace) -> None:
        self.stage = job.name

    def _count(self, state: loop.TrainState, *_: Any) -> None:
        self.step = state.step
        if self.stage == self.phase and state.step >= self.at:
            self.ring()

    def ring(self) -> None:
        """The first time: the signal comes a moment later."""
        if not self.done:
            self.done = True
            threading.Timer(self.delay, self._send).start()

    def _send(self) -> None:
        self.rung.write_text(json.dumps({"time": time.monotonic(), "step": self.step}))
        if self.number is not None:
            os.kill(os.getpid(), self.number)


def told(run: Path, rung: Path, phase: str, number: int) -> None:
    """Fails unless the run stopped at once, says so, and has saved where it was."""
    assert rung.exists(), "the phase was not reached"
    sent = json.loads(rung.read_text())
    seconds = time.monotonic() - sent["time"]
    assert seconds < SECONDS, f"it took {seconds:.1f} s to stop"
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped", f"status.json says {status['state']}"
    assert "Ctrl-C" in status["reason"] or signal.Signals(number).name in status["reason"], status["reason"]
    where = re.search(r"at step ([\d,]+) of [\d,]+ of (\w+)", status["reason"])
    if phase in TRAINING and where is not None:  # else it came between the last step and the next stage
        step, stage = int(where[1].replace(",", "")), where[2]
        assert runs.newest(run)[stage] == step, f"stopped at step {step}, saved at {runs.newest(run)[stage]}"
        # The step that the signal comes in is finished, and one may begin between the note of the step and the signal
        passed = step - sent["step"]
        assert stage != phase or 0 <= passed <= 2, f"signalled in step {sent['step']}, stopped after {step}"


# --- one process -------------------------------------------------------------------------------------------------


def alone(tally: Tally, folder: Path, rng: random.Random, rounds: int) -> None:
    """One process: every phase, with every signal in turn."""
    images = runs.make_images(folder)
    wanted, _ = runs.unbroken(images, folder)
    for k in range(rounds):
        run, log, rung = folder / f"run-{k}", folder / f"{k}.log", folder / "rung"
        words = runs.command(images, run)
        for phase in PHASES:
            number = rng.choice(list(CODES))
            rung.unlink(missing_ok=True)
            with tally.fault(f"{signal.Signals(number).name} in {phase}"):
                step = rng.randrange(1, TRAINING.get(phase, 3) - 1)
                bell = Bell(rung, phase, step, number, rng.uniform(0, MOST_DELAY))
                code = ended(runs.start(words, log, bell.install))
                assert code == CODES[number], f"exit code {code}: {log.read_text()[-2000:]}"
                told(run, rung, phase, number)
        with tally.fault("the end of the run"):
            tally.missed()  # no fault of its own
            assert ended(runs.start(words, log)) == 0, log.read_text()[-2000:]
            runs.same_outcome(run, wanted)
        shutil.rmtree(run, ignore_errors=True)


# --- two ranks ---------------------------------------------------------------------------------------------------


def free_port() -> str:
    """A TCP port that nobody uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def ranks(words: list[str], log: Path, before: Callable[[], None] = lambda: None) -> list[int]:
    """Two processes with what torchrun would tell them."""
    port, started = free_port(), []
    for rank in (0, 1):
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        mine = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}

        def prepare(mine: dict[str, str] = mine) -> None:
            os.environ |= mine
            before()

        started.append(runs.start(words, log.with_suffix(f".{rank}.log"), prepare))
    return started


def together(tally: Tally, folder: Path, rng: random.Random, rounds: int) -> None:
    """Two ranks: every phase; the signal comes to both, as torchrun sends it, or while training to one."""
    images = runs.make_images(folder)
    whole = folder / "two"
    assert [ended(child) for child in ranks(runs.command(images, whole), folder / "two.log")] == [0, 0]
    wanted = runs.outcome(whole)
    for k in range(rounds):
        run, log, rung = folder / f"two-{k}", folder / f"two-{k}.log", folder / "rung"
        words = runs.command(images, run)
        for phase in PHASES:
            number = rng.choice(list(CODES))
            told_ranks = rng.choice(((0, 1), (0,), (1,))) if phase in TRAINING else (0, 1)
            rung.unlink(missing_ok=True)
            with tally.fault(f"{signal.Signals(number).name} in {phase} to {told_ranks} of two ranks"):
                step = rng.randrange(1, TRAINING.get(phase, 3) - 1)
                bell = Bell(rung, phase, step, None, rng.uniform(0, MOST_DELAY))
                children = ranks(words, log, lambda bell=bell: bell.install() if os.environ["RANK"] == "0" else None)
                _when(rung, children)
                for rank in told_ranks:
                    os.kill(children[rank], number)
                codes = [ended(child) for child in children]
                said = log.with_suffix(".0.log").read_text()[-2000:] + log.with_suffix(".1.log").read_text()[-2000:]
                assert codes == [CODES[number]] * 2, f"exit codes {codes}: {said}"
                told(run, rung, phase, number)
        with tally.fault("the end of the run of two ranks"):
            tally.missed()
            codes = [ended(child) for child in ranks(words, log)]
            assert codes == [0, 0], log.with_suffix(".0.log").read_text()[-2000:]
            runs.same_outcome(run, wanted)
        shutil.rmtree(run, ignore_errors=True)


def _when(rung: Path, children: list[int]) -> None:
    """Wait until rank 0 is inside the phase."""
    for _ in range(6000):
        if rung.exists() and rung.read_text():
            return
        assert os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None, "it ended before"
        time.sleep(0.01)
    raise AssertionError("the phase was not reached")


def under_torchrun(tally: Tally, folder: Path) -> None:
    """SIGTERM to torchrun itself while it pretrains: it passes it on; then the same command to the end."""
    images, run = runs.make_images(folder), folder / "torchrun"
    longer = ("--pretrain.epochs", "24")
    whole = folder / "torchrun-whole"
    assert [ended(c) for c in ranks(runs.command(images, whole, *longer), folder / "torchrun-whole.log")] == [0, 0]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    words = [*launcher, "-m", "fewlabels", *runs.command(images, run, *longer)]
    with tally.fault("SIGTERM to torchrun in pretrain"), (folder / "torchrun.log").open("w+") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
        while not runs.newest(run) and process.poll() is None:
            time.sleep(0.01)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = process.wait()
        said = (folder / "torchrun.log").read_text()[-2000:]
        assert code != 0, f"exit code {code}: {said}"
        assert time.monotonic() - began < 2 * SECONDS, f"it took {time.monotonic() - began:.1f} s to stop: {said}"
        status = json.loads((run / "status.json").read_text())
        assert status["state"] == "stopped" and "everything is saved" in status["reason"], f"{status}: {said}"
        assert subprocess.run(words, stdout=log, stderr=log, check=False).returncode == 0, log.name
        runs.same_outcome(run, runs.outcome(whole))


def main() -> int:
    """All of it."""
    asker = parser(__doc__)
    asker.add_argument("--rounds", type=int, default=5, help="runs of one process; a third as many of two ranks")
    asked = asker.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(asked.seed)
    one, two = Tally("signals"), Tally("signals, two ranks")
    with tempfile.TemporaryDirectory(prefix="fewlabels-signals-") as name:
        alone(one, Path(name), rng, asked.rounds)
        together(two, Path(name), rng, max(1, asked.rounds // 3))
        under_torchrun(two, Path(name))
    return conclude([one, two], asked)


if __name__ == "__main__":
    sys.exit(main())
