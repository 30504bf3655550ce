"""Makes the files that every later version must open, and the losses that it must repeat.

    python tests/golden/make.py run       tests/golden/run-format-N.zip, once for each file format N
    python tests/golden/make.py curves    tests/golden/curves.json, when the numbers are meant to change

The run is a real one of the command line, whole and half done, with what its model predicted. Left out to stay small
are the report and all checkpoints of a stage but the newest. An archive that was released is never made again: the
point of it is that an older fewlabels wrote it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

from fewlabels import checkpoint, cli, prepare, runfolder, runtime
from fewlabels.asked import Asked
from fewlabels.runfolder import Interrupts, RunFolder
from fewlabels.worker import Worker

HERE = Path(__file__).parent
CLASSES = ("bar", "frame", "pole")
TRAIN, LABELED, TEST = 24, 12, 12  # pictures; 12 of the 24 have their label
ENCODER = "resnet18_0.015625x_small"  # one channel in the stem: five checkpoints and a model in 185 KB
# Gentle enough for one channel: at the recipe's own rates, and with some seeds, all pictures look alike to it
COMMAND = (
    f"fit pictures --recipe smoke --encoder {ENCODER} --device cpu --seed 4 "
    "--pretrain.epochs 20 --pretrain.temperature 0.5 --pretrain.optimizer sgd --pretrain.learning-rate 0.01 "
    "--finetune.epochs 40 --finetune.optimizer sgd --finetune.learning-rate 0.02 "
    "--distill.epochs 20 --distill.start pretrained --distill.optimizer sgd --distill.learning-rate 0.02"
).split()
STOP = 20  # step of pretraining at which the half-done run gets a SIGTERM
STEPS = 20
# So low that rounding stays small: at the recipe's own rates 3e-6 of the first loss became 4 % and more of the fifth
CURVES = {
    "pretrain": {"learning_rate": 0.001, "temperature": 0.5},  # LARS
    "finetune": {"learning_rate": 0.0005, "optimizer": "sgd"},
    "distill": {
        "learning_rate": 0.002, "optimizer": "adamw", "scaling": "none", "start": "pretrained", "self_temperature": 0.1
    },
}  # fmt: skip
STAGES = tuple(CURVES)


def picture(number: int) -> np.ndarray:
    """(H, W, 3) uint8, 15 to 21 pixels a side, of the class number % 3; integers only, so that it never changes."""
    height, width, shift = 15 + number * 7 % 6, 15 + number * 5 % 7, number * 3 % 5
    row, column = np.mgrid[0:height, 0:width]
    ground = (3 * row + 5 * column + 11 * number) % 64
    across, along = abs(row - 5 - shift) <= 2, abs(column - 5 - shift) <= 2
    frame = (abs(row - 7) + shift // 2 > 4) | (abs(column - 7) > 4)
    shape = (across, frame, along)[number % 3]
    colour = np.array([(number * 37 + 80 * channel) % 128 + 100 for channel in range(3)])
    return np.where(shape[..., None], colour, ground[..., None]).astype(np.uint8)


def draw(folder: Path) -> None:
    """Pictures as a person has them: train/CLASS, train/unlabeled and test/CLASS."""
    for number in range(TRAIN + TEST):
        name = CLASSES[number % 3] if number < LABELED or number >= TRAIN else "unlabeled"
        place = folder / ("train" if number < TRAIN else "test") / name
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(place / f"{number:02d}.png")


def run(*words: str) -> int:
    """`fewlabels WORDS`, which is also what the run records as its command. The exit code."""
    with patch.object(sys, "argv", ["fewlabels", *words]):
        return cli.main()


# --- the run -----------------------------------------------------------------------------------------------------


def make_run() -> None:
    """A whole run, one that was stopped while it pretrained, and what the whole one's model says of all pictures."""
    target = HERE / f"run-format-{checkpoint.FORMAT_VERSION}.zip"
    if target.exists():
        sys.exit(f"{target} is there; if no version with it was released, remove it first")
    with _desk():
        draw(Path("pictures"))
        assert run(*COMMAND, "--out", "run") == 0
        with _stopping_at(STOP):
            assert run(*COMMAND, "--out", "half") == 128 + signal.SIGTERM
        assert run("predict", "run", "pictures", "--out", "predictions.csv") == 0
        with open("evaluation.json", "w") as file, contextlib.redirect_stdout(file):  # noqa: PTH123 - of the desk
            assert run("evaluate", "run", "pictures/test", "--json") == 0
        for stage in (stage for each in ("run", "half") for stage in Path(each).iterdir()):
            for older in sorted(stage.glob("step-*"))[:-1]:
                shutil.rmtree(older)
        _pack(target)
    print(f"{target}: {target.stat().st_size:,} bytes")


@contextlib.contextmanager
def _desk() -> Iterator[None]:
    """An empty folder to work in, of the same name everywhere: the run records where its pictures were."""
    folder = Path(tempfile.gettempdir()) / "fewlabels-golden"
    folder.mkdir()
    before = Path.cwd()
    try:
        os.chdir(folder)
        yield
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


@contextlib.contextmanager
def _stopping_at(step: int) -> Iterator[None]:
    """Send this process a SIGTERM when a stage logs that step."""
    log: Callable[..., None] = RunFolder.log

    def log_and_stop(self: RunFolder, stage: str, at: int, *rest: Any) -> None:
        log(self, stage, at, *rest)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with patch.object(runfolder.RunFolder, "log", log_and_stop):
        yield


def _pack(target: Path) -> None:
    """Everything on the desk but pictures, reports and locks, with one date for all."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(path for path in Path().rglob("*") if path.is_file()):
            if path.parts[0] != "pictures" and path.name not in ("report.html", ".lock"):
                archive.writestr(zipfile.ZipInfo(path.as_posix()), path.read_bytes(), zipfile.ZIP_DEFLATED, 9)


# --- the curves --------------------------------------------------------------------------------------------------


def curves(folder: Path, overrides: Mapping[str, Mapping[str, Any]] = CURVES) -> dict[str, list[float]]:
    """The losses of STEPS steps of every stage of a smoke run in folder/run, by stage."""
    draw(folder / "pictures")
    epochs = {stage: (STEPS - 1) * 12 / (LABELED if stage == "finetune" else TRAIN) for stage in STAGES}
    settings = {stage: {"epochs": epochs[stage], "batch": 12, **overrides[stage]} for stage in STAGES}
    asked = Asked(images=folder / "pictures", out=folder / "run", recipe="smoke", device="cpu", overrides=settings)
    place, device = RunFolder(asked.out), runtime.start("cpu")
    with place.locked():
        prepared = prepare.prepare(asked, prepare.open_images(asked), place, device)
        Worker(prepared, Interrupts()).distill()
    lines = runfolder.metrics(place.path)
    found = {stage: [line["loss"] for line in lines if line["stage"] == stage and "loss" in line] for stage in STAGES}
    assert all(len(losses) == STEPS for losses in found.values()), {stage: len(found[stage]) for stage in STAGES}
    return found


def make_curves() -> None:
    """curves.json, with what computed it."""
    with tempfile.TemporaryDirectory() as folder:
        found = curves(Path(folder))
    checkpoint.write_json(HERE / "curves.json", {"versions": prepare.versions(), "losses": found})


if __name__ == "__main__":
    {"run": make_run, "curves": make_curves}[sys.argv[1]]()
