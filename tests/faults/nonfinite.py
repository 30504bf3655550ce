"""NaN and infinity, put into the loss, a gradient, a weight, a momentum or an input at a random step of every stage.

    python tests/faults/nonfinite.py

Each must stop the run with exit code 70 before anything of it is saved: every number of every checkpoint is finite,
and the message names the step and its images. Then the same command goes on from the last
checkpoint, and ends as the run that nothing happened to, bit for bit: what struck was not the data.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # forking a process whose threads have worked would hang its child

import csv
import json
import random
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from faults import runs
from faults.tally import Tally, conclude, ended, parser
from fewlabels import runtime
from fewlabels.errors import SHOWN_DETAILS
from fewlabels.stages import loop, runner

STAGES = ("pretrain", "finetune", "distill", "supervised")
PLACES = ("loss", "input", "gradient", "weight", "momentum")
VALUES = (float("nan"), float("inf"), float("-inf"))
OPTIONS = ("--pretrain.epochs", "8", "--finetune.epochs", "20", "--distill.epochs", "8")  # 41 to 121 steps a stage
UNSAVED = 6  # at most so many steps lie between two saves of these stages
DIVERGED = 70


class Poison:
    """In a child: one number that is not finite, some steps after the stage was begun or went on."""

    def __init__(self, struck: Path, stage: str, place: str, value: float, after: int, rng: random.Random) -> None:
        self.struck, self.stage, self.place, self.value, self.after, self.rng = struck, stage, place, value, after, rng

    def install(self) -> None:
        """Wait for the stage, then for its step."""
        run, step = runner.run, loop.step
        name, first = "", -1

        def entered(job: runner.Job, at: runner.Workplace) -> None:
            nonlocal name
            name = job.name
            run(job, at)

        def stepped(state: loop.TrainState, batch: Any, *rest: Any) -> Any:
            nonlocal first
            if name != self.stage:
                return step(state, batch, *rest)
            first = state.step if first < 0 else first
            if state.step - first == self.after:
                self.struck.write_text(
                    json.dumps({"step": state.step + 1, "images": batch.ids[:SHOWN_DETAILS].tolist()})
                )
                getattr(self, f"_{self.place}")(state)
            return step(state, batch, *rest)

        runner.run, loop.step = entered, stepped

    def _one(self, tensors: list[torch.Tensor]) -> None:
        """One number of one tensor."""
        tensor = self.rng.choice([t for t in tensors if t.is_floating_point() and t.numel()])
        with torch.no_grad():
            tensor[tuple(self.rng.randrange(size) for size in tensor.shape)] = self.value

    def _loss(self, state: loop.TrainState) -> None:
        forward = state.stage.forward

        def poisoned(batch: Any) -> dict[str, torch.Tensor]:
            scalars = forward(batch)
            return scalars | {"loss": scalars["loss"] * self.value}

        state.stage.forward = poisoned

    def _input(self, state: loop.TrainState) -> None:
        view: Callable[..., torch.Tensor] = state.stage.view

        def poisoned(*arguments: Any) -> torch.Tensor:
            images = view(*arguments)
            self._one([images])
            return images

        state.stage.view = poisoned

    def _gradient(self, state: loop.TrainState) -> None:
        average = runtime.average_gradients

        def poisoned(parameters: list[torch.nn.Parameter]) -> None:
            average(parameters)
            self._one([p.grad for p in parameters if p.grad is not None])

        runtime.average_gradients = poisoned

    def _weight(self, state: loop.TrainState) -> None:
        self._after(state, lambda: list(state.stage.trained().values()))

    def _momentum(self, state: loop.TrainState) -> None:
        self._after(state, lambda: [slot for found in state.optimizer.state.values() for slot in found.values()])

    def _after(self, state: loop.TrainState, tensors: Callable[[], list[torch.Tensor]]) -> None:
        after_step = state.stage.after_step

        def poisoned() -> None:
            after_step()
            self._one(tensors())

        state.stage.after_step = poisoned


def all_finite(run: Path) -> None:
    """Fails if a number in any saved file is not finite."""
    for file in run.rglob("*.safetensors"):
        bad = [n for n, t in load_file(file).items() if t.is_floating_point() and not bool(t.isfinite().all())]
        assert not bad, f"{file.relative_to(run)} holds numbers that are not finite: {bad[:3]}"


def one(run: Path, images: Path, poison: Poison, log: Path) -> None:
    """One fault and what must hold after it."""
    log.write_text("")
    poison.struck.unlink(missing_ok=True)
    code = ended(runs.start(runs.command(images, run, *OPTIONS), log, poison.install))
    said = log.read_text()
    assert poison.struck.exists(), f"the step was not reached: {said[-1000:]}"
    struck = json.loads(poison.struck.read_text())
    assert code == DIVERGED, f"exit code {code}: {said[-2000:]}"
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    all_finite(run)
    named = re.search(r"error: .* (?:at|after) step (\d+).*, with these images:\n((?:  - .*\n)+)", said)
    assert named is not None, f"no step, or no image, is named: {said[-1000:]}"
    late, images = int(named[1]) - struck["step"], re.findall("  - (.*)", named[2])
    with (run / "images.csv").open(encoding="utf-8", newline="") as file:
        names = [row["image"] for row in csv.DictReader(file)]
    if poison.place in ("weight", "momentum"):  # found in what is saved, or where it first spoils a loss or a gradient
        assert 0 <= late <= UNSAVED, f"struck in step {struck['step']}: {named[0]}"
    else:
        assert late == 0, f"struck in step {struck['step']}: {named[0]}"
        assert images == [names[row] for row in struck["images"]], f"other images are named: {named[0]}"


def main() -> int:
    """All of it."""
    asker = parser(__doc__)
    asker.add_argument("--faults", type=int, default=40)
    asked = asker.parse_args()
    torch.set_num_threads(1)
    rng, tally = random.Random(asked.seed), Tally("NaN and infinity")
    with tempfile.TemporaryDirectory(prefix="fewlabels-nonfinite-") as name:
        folder, run = Path(name), Path(name) / "run"
        images = runs.make_images(folder)
        wanted, _ = runs.unbroken(images, folder, *OPTIONS)
        for stage in STAGES:
            for k in range(asked.faults // len(STAGES)):
                place, value = PLACES[k % len(PLACES)], VALUES[k // len(PLACES) % len(VALUES)]
                poison = Poison(folder / "struck", stage, place, value, rng.randrange(3), rng)
                with tally.fault(f"{stage}: {value} in {place}"):
                    one(run, images, poison, folder / "log")
        with tally.fault("the end of the run"):
            tally.missed()  # no fault of its own
            assert ended(runs.start(runs.command(images, run, *OPTIONS), folder / "log")) == 0
            runs.same_outcome(run, wanted)
    return conclude([tally], asked)


if __name__ == "__main__":
    sys.exit(main())
