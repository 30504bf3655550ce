"""Kill and stop ranks of whole runs under torchrun: it must end, with nobody's help, as the run that nobody harmed.

    python tests/faults/ranks.py --faults 50

Two ranks train under `torchrun --max-restarts`. At random moments one of them gets SIGKILL, or SIGSTOP as one whose
machine hangs; the others must notice, torchrun starts all again, and the next fault comes once they train again.
Checked at the end of every run: exit code 0, and the tensors of every stage, the model, the losses and the table equal
those of the unharmed run, bit for bit. The ranks count as silent after 5 seconds here, not after 60.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import collections
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from faults import kills, runs
from faults.tally import Tally, conclude, parser

RANKS, FAULTS_A_RUN = 2, 4
PATIENCE = 180.0  # seconds in which a harmed run must train again
STOPS = 0.25  # share of SIGSTOP


def one_rank(folder: Path, words: list[str]) -> int:
    """What torchrun starts: the command line, with a sign of life at every step."""
    from fewlabels import cli, watch
    from fewlabels.stages import loop

    watch.SILENCE, watch.GRACE = 5.0, 3.0
    step, mine = loop.step, folder / f"rank{os.environ['RANK']}"

    def visible(state: Any, *rest: Any) -> Any:
        mine.write_text(str(os.getpid()))
        time.sleep(0.02)  # so that a fault lands inside
        return step(state, *rest)

    loop.step = visible
    return cli.main(words)


def torchrun(folder: Path, words: list[str]) -> subprocess.Popen[bytes]:
    """A job of RANKS ranks that is started again after every fault."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}",
        f"--max-restarts={FAULTS_A_RUN}", "--shutdown-timeout=5", __file__, "--rank-part", str(folder), *words,
    ]  # fmt: skip
    with folder.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def training(folder: Path, job: subprocess.Popen[bytes], gone: set[int]) -> list[int] | None:
    """The process ids of all ranks, once they train and none of them is one of gone; None when the job is over."""
    deadline = time.monotonic() + PATIENCE
    while job.poll() is None:
        assert time.monotonic() < deadline, "the job neither trains nor ends"
        signs = [folder / f"rank{rank}" for rank in range(RANKS)]
        found = [int(sign.read_text() or 0) if sign.exists() else 0 for sign in signs]
        if all(found) and not gone & set(found):
            return found
        time.sleep(0.05)
    return None


def harmed_run(images: Path, folder: Path, rng: random.Random, most: int) -> tuple[collections.Counter[str], float]:
    """One run with up to `most` faults; where they landed, and the longest time until it trained again."""
    folder.mkdir()
    job = torchrun(folder, runs.command(images, folder / "run", *kills.OPTIONS))
    landed: collections.Counter[str] = collections.Counter()
    gone: set[int] = set()
    longest, began = 0.0, time.monotonic()
    try:
        while (ranks := training(folder, job, gone)) is not None:
            longest = max(longest, time.monotonic() - began) if landed else 0.0
            if sum(landed.values()) >= most:
                break
            time.sleep(rng.uniform(0, 2))
            victim, number = rng.choice(ranks), signal.SIGSTOP if rng.random() < STOPS else signal.SIGKILL
            where = kills.where(folder / "run")
            try:
                os.kill(victim, number)
            except ProcessLookupError:  # it had just finished
                break
            landed[f"{number.name} in {where}"] += 1
            gone, began = set(ranks), time.monotonic()
        code = job.wait(PATIENCE)
    finally:
        job.kill()
    assert code == 0, f"exit code {code}, see {folder.with_suffix('.log')}"
    return landed, longest


def main() -> int:
    """Harm runs until enough faults have landed; prints the tally, returns 1 if any run did not survive."""
    asker = parser(__doc__)
    asker.add_argument("--faults", type=int, default=6)
    asker.add_argument("--rank-part", nargs=argparse.REMAINDER)
    asked = asker.parse_args()
    if asked.rank_part:
        return one_rank(Path(asked.rank_part[0]), asked.rank_part[1:])
    rng, landed, longest, number = random.Random(asked.seed), collections.Counter[str](), 0.0, 0
    tally = Tally("a rank killed or stopped under torchrun")
    with tempfile.TemporaryDirectory(prefix="fewlabels-ranks-") as name:
        place = Path(name)
        images = runs.make_images(place)
        harmed_run(images, place / "unharmed", rng, 0)
        wanted = runs.outcome(place / "unharmed" / "run")
        print(f"the unharmed run is there; seed {asked.seed}", flush=True)
        while tally.injected < asked.faults and len(tally.failures) < 3:
            folder, number = place / f"run-{number}", number + 1
            with tally.fault(f"run {number}"):
                tally.missed()  # the run; its faults count
                here, slowest = harmed_run(images, folder, rng, min(FAULTS_A_RUN, asked.faults - tally.injected))
                landed, longest = landed + here, max(longest, slowest)
                tally.injected += here.total()
                runs.same_outcome(folder / "run", wanted)
            if tally.failures:
                print(folder.with_suffix(".log").read_text()[-3000:], flush=True)
    print(", ".join(f"{where} {count}" for where, count in sorted(landed.items())) + f", in {number} runs")
    print(f"the longest time until all ranks trained again: {longest:.1f} s")
    return conclude([tally], asked)


if __name__ == "__main__":
    sys.exit(main())
