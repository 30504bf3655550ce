"""kill -9 at random moments of whole runs: each must end, by the same command, as the run that nobody killed.

    python tests/faults/kills.py --kills 100

A run is pretraining, fine-tuning, distillation into itself and into a student, the baseline, the comparison, the model
and the report, in a process of its own, forked from one that has imported torch (an import costs 3 s, a kill 1).
Every process but the last of a run is killed after a random time. Checked after each kill: no stage lost a save.
Checked at the end: the tensors of every stage's last checkpoint, the model's weights, the losses and the table
equal the unbroken run's, bit for bit.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # forking a process whose threads have worked would hang its child

import collections
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from faults import runs
from faults.tally import Tally, conclude, ended, parser

KILLS_A_RUN = 8
OPTIONS = (
    "--student", "resnet18_0.25x_small", "--pretrain.epochs", "12", "--finetune.epochs", "20", "--distill.epochs", "8",
)  # fmt: skip


def where(run: Path) -> str:
    """What the run was doing, as its own status says."""
    try:
        status = json.loads((run / "status.json").read_text())
    except FileNotFoundError:
        return "start"
    return str(status["stage"] or status["state"])


def killed_run(images: Path, run: Path, seconds: float, rng: random.Random, kills: int) -> collections.Counter[str]:
    """One run with up to `kills` kills, then left alone; returns where they landed."""
    landed: collections.Counter[str] = collections.Counter()
    words, log = runs.command(images, run, *OPTIONS), run.with_suffix(".log")
    for _ in range(kills):
        before = runs.newest(run)
        child = runs.start(words, log)
        deadline = time.monotonic() + rng.uniform(0.05, 0.4 * seconds)
        while time.monotonic() < deadline and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        status = ended(child)
        if status != -signal.SIGKILL:
            assert status == 0, f"exit code {status}, see {log}"
            break  # it was done before
        landed[where(run)] += 1
        after = runs.newest(run)
        lost = {stage: step for stage, step in before.items() if after.get(stage, -1) < step}
        assert not lost, f"saves that were there are gone: {lost}"
    status = ended(runs.start(words, log))
    assert status == 0, f"the last start ended with {status}, see {log}"
    return landed


def main() -> int:
    """Kill until enough kills have landed; prints the tally, returns 1 if any run did not survive."""
    asker = parser(__doc__)
    asker.add_argument("--kills", type=int, default=100)
    asked = asker.parse_args()
    torch.set_num_threads(1)
    rng, landed, tally, number = random.Random(asked.seed), collections.Counter[str](), Tally("kill -9"), 0
    with tempfile.TemporaryDirectory(prefix="fewlabels-kills-") as name:
        folder = Path(name)
        images = runs.make_images(folder)
        wanted, seconds = runs.unbroken(images, folder, *OPTIONS)
        print(f"an unbroken run takes {seconds:.1f} s; seed {asked.seed}", flush=True)
        while tally.injected < asked.kills and len(tally.failures) <= 3:
            run, number = folder / f"run-{number}", number + 1
            with tally.fault(f"run {number}"):
                tally.missed()  # the run; its kills count
                here = killed_run(images, run, seconds, rng, KILLS_A_RUN)
                landed += here
                tally.injected += here.total()
                runs.same_outcome(run, wanted)
            if tally.failures:
                print(run.with_suffix(".log").read_text()[-2000:], flush=True)
            shutil.rmtree(run, ignore_errors=True)
    print(", ".join(f"{place} {count}" for place, count in sorted(landed.items())) + f", in {number} runs")
    return conclude([tally], asked)


if __name__ == "__main__":
    sys.exit(main())
