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

import argparse
import collections
import hashlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import shapes_images
from fewlabels import checkpoint, cli
from fewlabels.use import artefact

STAGES = ("pretrain", "finetune", "distill_self", "distill", "supervised")
KILLS_A_RUN = 8
EPOCHS = ("--pretrain.epochs", "12", "--finetune.epochs", "20", "--distill.epochs", "8")


def command(images: Path, out: Path) -> list[str]:
    """One run: seconds long, with a checkpoint every few steps."""
    return ["fit", str(images), "--out", str(out), "--recipe", "smoke", "--student", "resnet18_0.25x_small", *EPOCHS]


def start(words: list[str], log: Path) -> int:
    """A child that runs the command line; returns its process id."""
    child = os.fork()
    if child:
        return child
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 70
    try:
        code = cli.main(words)
    finally:
        os._exit(code)


def newest(run: Path) -> dict[str, int]:
    """The step of the newest save of every stage."""
    found = {}
    for stage in STAGES:
        steps = [int(path.name.removeprefix("step-")) for path in (run / stage).glob("step-*") if path.is_dir()]
        found |= {stage: max(steps)} if steps else {}
    return found


def outcome(run: Path) -> dict[str, str]:
    """Digests of everything that a run leaves behind and that must not depend on kills."""
    found = {}
    for stage in STAGES:
        saved, passed_over = checkpoint.latest(run / stage)
        assert saved is not None, f"{stage} has no checkpoint"
        assert not passed_over, passed_over
        digest = hashlib.sha256(str(saved.step).encode())
        for name in sorted(saved.tensors):
            digest.update(name.encode() + saved.tensors[name].contiguous().numpy().tobytes())
        found[stage] = digest.hexdigest()
    artefact.read(run / "model")  # every byte checked
    found["model"] = checkpoint.file_digest(run / "model" / "weights.safetensors")
    rows = json.loads((run / "results.json").read_text())["rows"]
    found["table"] = json.dumps([[row["key"], row["accuracy"], row["ece"]] for row in rows])
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found["losses"] = json.dumps([[s["stage"], s["step"], s.get("loss")] for s in steps if "loss" in s])
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert (run / "report.html").stat().st_size > 10_000
    return found


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
    for _ in range(kills):
        before, log = newest(run), run.with_suffix(".log")
        child = start(command(images, run), log)
        deadline = time.monotonic() + rng.uniform(0.05, 0.4 * seconds)
        while time.monotonic() < deadline and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, f"exit code {os.WEXITSTATUS(status)}, see {log}"
            break  # it was done before
        landed[where(run)] += 1
        after = newest(run)
        lost = {stage: step for stage, step in before.items() if after.get(stage, -1) < step}
        assert not lost, f"saves that were there are gone: {lost}"
    _, status = os.waitpid(start(command(images, run), run.with_suffix(".log")), 0)
    assert status == 0, f"the last start ended with {status}, see {run.with_suffix('.log')}"
    return landed


def main() -> int:
    """Kill until enough kills have landed; prints the tally, returns 1 if any run did not survive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rng, landed, failures, runs = random.Random(asked.seed), collections.Counter[str](), [], 0
    with tempfile.TemporaryDirectory(prefix="fewlabels-kills-") as name:
        folder = Path(name)
        images = folder / "images.npz"
        pixels, labels = shapes_images(96, size=16, seed=1)
        labels[32:] = -1
        test, truth = shapes_images(40, size=16, seed=2)
        np.savez(images, images=pixels, labels=labels, test_images=test, test_labels=truth)
        began = time.monotonic()
        _, status = os.waitpid(start(command(images, folder / "unbroken"), folder / "unbroken.log"), 0)
        assert status == 0, (folder / "unbroken.log").read_text()
        seconds = time.monotonic() - began
        wanted = outcome(folder / "unbroken")
        print(f"an unbroken run takes {seconds:.1f} s; seed {asked.seed}", flush=True)
        while sum(landed.values()) < asked.kills:
            run = folder / f"run-{runs}"
            runs += 1
            try:
                landed += killed_run(images, run, seconds, rng, KILLS_A_RUN)
                found = outcome(run)
                differ = [key for key in wanted if found[key] != wanted[key]]
                assert not differ, f"not the unbroken run's: {', '.join(differ)}"
            except AssertionError as error:
                failures.append(f"run {runs}: {error}")
                print(failures[-1], (run.with_suffix(".log")).read_text()[-2000:], flush=True)
                if len(failures) > 3:
                    break
            shutil.rmtree(run, ignore_errors=True)
    total = sum(landed.values())
    print(", ".join(f"{place} {count}" for place, count in sorted(landed.items())))
    survived = total if not failures else f"at most {total - len(failures)}"
    print(f"kill -9: {total} faults injected in {runs} runs, {survived} survived")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
