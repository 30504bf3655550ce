"""Kill and stop ranks at every place of whole runs: each must end, by restarts alone, as the run that nobody harmed.

    python tests/faults/ranks.py --faults 50 --under-torchrun 4

Two ranks train. One of them gets SIGKILL, or SIGSTOP as one whose machine hangs: while it joins the others, opens the
images, reads a checkpoint, at a step of each stage, in the middle of a save, and while the results are made. (Batches
are read by threads: there is no process of a loader to kill.) The other rank must notice and end by itself with exit
code 75; then both start again, and go on to the next fault. Checked as well: no start has lost more steps than lie
between two saves. Checked at the end of every run: the tensors of every stage, the model, the losses and the table
equal those of the unharmed run, bit for bit.

Most ranks are forked from one process that has imported torch, and started again by this program: an import costs 3 s,
a fault 2. Some faults are met under the real torchrun. Ranks beat 5 times as often here as for users, and count as
silent after 3 seconds, not 60.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # forking a process whose threads have worked would hang its child
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"

import argparse
import collections
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from faults import runs
from faults.tally import Tally, before_forking, conclude, forked, parser
from fewlabels import checkpoint, cli, prepare, runtime, watch
from fewlabels.stages import loop, runner
from fewlabels.use import compare
from many_ranks import free_port, variables

RANKS, AGAIN = 2, 75
PATIENCE = 120.0  # seconds in which a start must end
NOTICE = 15.0  # seconds in which a rank must notice that another has ended
SILENCE = 3.0
STOPS = 0.25  # share of SIGSTOP
OPTIONS = ("--pretrain.epochs", "8", "--finetune.epochs", "20", "--distill.epochs", "8")  # 41 to 121 steps a stage
# In the order in which a run comes by them
PLACES = (
    "join", "images", "pretrain", "save", "pretrain", "resume", "finetune", "save", "finetune", "resume", "distill",
    "save", "distill", "resume", "supervised", "save", "supervised", "results",
)  # fmt: skip
FUNCTIONS: dict[str, tuple[Any, str]] = {
    "join": (runtime, "_meet"), "images": (prepare, "store_images"), "resume": (runner, "_resume"),
    "save": (checkpoint, "write_manifest"), "results": (compare, "compare"),
}  # fmt: skip
ELSEWHERE: dict[str, tuple[Any, str]] = {"save": (loop.Stage, "before_save")}  # on ranks that do not write
ALONE = ("results",)  # where only rank 0 works


@dataclass(frozen=True)
class Fault:
    """What happens in one start of a job: to which rank, and where. after: steps that the stage makes before."""

    signal: int
    rank: int
    place: str
    after: int

    def name(self) -> str:
        """In words."""
        return f"{self.who()}, {self.place}"

    def who(self) -> str:
        """Without the place."""
        return f"{signal.Signals(self.signal).name} rank {self.rank}"


def faults_of_a_run(rng: random.Random, most: int) -> list[Fault]:
    """One fault a start. Nobody can notice a rank that is stopped before it has joined."""
    found = []
    for place in PLACES if most >= len(PLACES) else sorted(rng.sample(PLACES, most), key=PLACES.index):
        number = signal.SIGSTOP if place != "join" and rng.random() < STOPS else signal.SIGKILL
        found.append(Fault(number, 0 if place in ALONE else rng.randrange(RANKS), place, rng.randrange(1, 8)))
    return found


# --- in a rank ---------------------------------------------------------------------------------------------------


class Life:
    """One start of one rank: it notes the first step that it makes, and meets its fault."""

    def __init__(self, folder: Path, number: int, rank: int, faults: list[Fault]) -> None:
        self.folder, self.number, self.rank = folder, number, rank
        self.fault = faults[number] if number < len(faults) and faults[number].rank == rank else None
        self.stage, self.step, self.made, self.save_every = "", -1, 0, 0

    def note(self, name: str) -> None:
        """Where this rank is, in a file of this start."""
        where = {"stage": self.stage, "step": self.step, "save_every": self.save_every, "time": time.monotonic()}
        checkpoint.write_json(self.folder / f"{name}-{self.number}.json", where)

    def meet(self) -> None:
        """The fault."""
        assert self.fault is not None
        self.note("struck")
        os.kill(os.getpid(), self.fault.signal)

    def install(self) -> None:
        """Put it where it happens."""
        watch.BEAT, watch.SILENCE, watch.GRACE = 0.2, SILENCE, 1.0
        run, pace, step = runner.run, runner.pace, loop.step

        def entered(job: runner.Job, at: runner.Workplace) -> None:
            self.stage, self.step, self.made = job.name, -1, 0
            run(job, at)

        def paced(*arguments: Any, **how: Any) -> loop.Plan:
            plan = pace(*arguments, **how)
            self.save_every = plan.save_every
            return plan

        def stepped(state: loop.TrainState, *rest: Any) -> Any:
            self.step = state.step
            if self.fault and (self.stage, self.made) == (self.fault.place, self.fault.after):
                self.meet()
            scalars = step(state, *rest)
            if self.rank == 0 and not (self.folder / f"trains-{self.number}.json").exists():
                self.note("trains")
            self.step, self.made = state.step, self.made + 1
            return scalars

        runner.run, runner.pace, loop.step = entered, paced, stepped
        if self.fault and self.fault.place in FUNCTIONS:
            owner, name = (FUNCTIONS if self.rank == 0 else FUNCTIONS | ELSEWHERE)[self.fault.place]
            function = getattr(owner, name)

            def met(*arguments: Any, **how: Any) -> Any:
                self.meet()
                return function(*arguments, **how)

            setattr(owner, name, met)


def one_rank(folder: Path, words: list[str]) -> int:
    """What torchrun starts."""
    faults = [Fault(**each) for each in json.loads((folder / "faults.json").read_text())]
    Life(folder, int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"]), faults).install()
    return cli.main(words)


# --- jobs --------------------------------------------------------------------------------------------------------


def start(folder: Path, number: int, words: list[str], faults: list[Fault]) -> list[int]:
    """One start of all ranks; their exit codes. Those that have not noticed in time that one ended are killed."""
    port = free_port()

    def rank_work(rank: int) -> int:
        os.environ.update(variables(rank, RANKS, port))
        Life(folder, number, rank, faults).install()
        return cli.main(words)

    log = folder.with_suffix(".log")
    ranks = {forked(lambda rank=rank: rank_work(rank), log): rank for rank in range(RANKS)}  # type: ignore[misc]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE
    while len(codes) < RANKS:
        for child in set(ranks) - set(codes):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
                deadline = min(deadline, time.monotonic() + NOTICE)
            elif time.monotonic() > deadline or _only_the_stopped_is_left(folder, number, codes, faults):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in ranks]


def _only_the_stopped_is_left(folder: Path, number: int, codes: dict[int, int], faults: list[Fault]) -> bool:
    """Or nobody is in a position to notice: as torchrun, end what is left."""
    met = number < len(faults) and (folder / f"struck-{number}.json").exists()
    return bool(codes) and met and (faults[number].signal == signal.SIGSTOP or faults[number].place == "join")


def starts(folder: Path, words: list[str], faults: list[Fault]) -> None:
    """Start all ranks until they end well. Checked: of each fault, that the other rank noticed it."""
    for number in range(len(faults) + 3):
        codes = start(folder, number, words, faults)
        if not any(codes):
            return
        if (folder / f"struck-{number}.json").exists():
            fault = faults[number]
            assert codes[fault.rank] == -signal.SIGKILL, f"{fault.name()}: exit codes {codes}"
            others = [code for rank, code in enumerate(codes) if rank != fault.rank]
            assert fault.place == "join" or others == [AGAIN] * len(others), f"{fault.name()}: exit codes {codes}"
    raise AssertionError(f"it does not end: exit codes {codes}")


def torchrun(folder: Path, words: list[str], faults: list[Fault]) -> None:
    """The same by torchrun, which starts all ranks again after every fault."""
    checkpoint.write_json(folder / "faults.json", [asdict(fault) for fault in faults])
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}",
        f"--max-restarts={len(faults) + 2}", "--shutdown-timeout=5", __file__, "--rank-part", str(folder), *words,
    ]  # fmt: skip
    with folder.with_suffix(".log").open("a") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        code = job.wait(PATIENCE * (len(faults) + 1))
    except subprocess.TimeoutExpired as error:
        raise AssertionError("it does not end") from error
    finally:
        job.terminate()
    assert code == 0, f"exit code {code}"


def met(folder: Path, faults: list[Fault]) -> tuple[list[Fault], list[float]]:
    """The faults that were met, and the seconds until all ranks trained again. Checked: how many steps were lost."""
    found, seconds = [], []
    for number, fault in enumerate(faults):
        struck, trains = (folder / f"{word}-{at}.json" for word, at in (("struck", number), ("trains", number + 1)))
        if not struck.exists():
            continue
        found.append(fault)
        if trains.exists():
            before, after = json.loads(struck.read_text()), json.loads(trains.read_text())
            seconds.append(after["time"] - before["time"])
            if before["step"] >= 0 and before["stage"] == after["stage"]:
                lost = before["step"] - after["step"]
                assert 0 <= lost <= before["save_every"], f"{fault.name()}: {lost} steps lost, {before}, {after}"
    return found, seconds


def harm(count: int, place: Path, wanted: dict[str, str], rng: random.Random, *, by_torchrun: bool) -> Tally:
    """Harm runs until `count` faults have been met."""
    tally = Tally("a rank killed or stopped" + (", under torchrun" if by_torchrun else ""))
    landed, recovered, number = collections.Counter[str](), list[float](), 0
    while tally.injected < count and len(tally.failures) < 3:
        folder, number = place / f"{'torchrun' if by_torchrun else 'run'}-{number}", number + 1
        folder.mkdir()
        faults = faults_of_a_run(rng, count - tally.injected)
        words = runs.command(place / "images.npz", folder / "run", *OPTIONS)
        with tally.fault(folder.name):
            tally.missed()  # the run; its faults count
            try:
                (torchrun if by_torchrun else starts)(folder, words, faults)
            finally:
                found, seconds = met(folder, faults)
                landed.update([fault.who() for fault in found] + [fault.place for fault in found])
                recovered += seconds
                tally.injected += len(found)
            runs.same_outcome(folder / "run", wanted)
        if tally.failures:
            print(folder.with_suffix(".log").read_text()[-3000:], flush=True)
    print(", ".join(f"{name} {times}" for name, times in sorted(landed.items())) + f", in {number} runs")
    if recovered:
        middle, longest = statistics.median(recovered), max(recovered)
        print(
            f"until all ranks trained again: median {middle:.1f} s, max {longest:.1f} s, {len(recovered)} times",
            flush=True,
        )
    return tally


def main() -> int:
    """Harm runs; prints the tallies, returns 1 if any run did not survive."""
    asker = parser(__doc__)
    asker.add_argument("--faults", type=int, default=50)
    asker.add_argument("--under-torchrun", type=int, default=4)
    asker.add_argument("--rank-part", nargs=argparse.REMAINDER)
    asked = asker.parse_args()
    if asked.rank_part:
        return one_rank(Path(asked.rank_part[0]), asked.rank_part[1:])
    before_forking()
    rng = random.Random(asked.seed)
    with tempfile.TemporaryDirectory(prefix="fewlabels-ranks-") as name:
        place = Path(name)
        images = runs.make_images(place)
        (place / "unharmed").mkdir()
        starts(place / "unharmed", runs.command(images, place / "unharmed" / "run", *OPTIONS), [])
        wanted = runs.outcome(place / "unharmed" / "run")
        print(f"the unharmed run is there; seed {asked.seed}", flush=True)
        tallies = [harm(asked.faults, place, wanted, rng, by_torchrun=False)]
        if asked.under_torchrun:
            tallies.append(harm(asked.under_torchrun, place, wanted, rng, by_torchrun=True))
    return conclude(tallies, asked)


if __name__ == "__main__":
    sys.exit(main())
