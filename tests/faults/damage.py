"""Files damaged as a disk damages them: single bits flipped, pages zeroed, ends cut off.

    python tests/faults/damage.py

A damaged checkpoint is never used and never a traceback: the one before it is, and it is said. A damaged model is
refused in words. Then whole runs, killed and damaged in their newest checkpoint or in what they know of the images:
the same command says so and ends as the run that nothing happened to, bit for bit. Pixels that have changed are found
when they are first read, which ends the run with exit code 75: the command after that reads the images anew.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # forking a process whose threads have worked would hang its child

import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import same
from faults import runs
from faults.tally import Tally, conclude, ended, parser
from fewlabels import checkpoint
from fewlabels.errors import DataError, FewlabelsError
from fewlabels.use import artefact
from small_model import METRICS, small_card, small_network

PAGE = 4096
KNOWN = ("data/pixels.u8", "data/pixels.u8", "data/hashes.npy", "data/extents.npy", "data/index.json", "data.json")
AGAIN = 75  # exit code
T = TypeVar("T")
Damage = Callable[[bytes, random.Random], bytes]


def flipped(content: bytes, rng: random.Random) -> bytes:
    """One bit is another."""
    damaged, bit = bytearray(content), rng.randrange(len(content) * 8)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def zeroed(content: bytes, rng: random.Random) -> bytes:
    """One page was never written: what a power cut leaves of a file whose size was."""
    first = rng.randrange(0, len(content), PAGE)
    return content[:first] + bytes(len(content[first : first + PAGE])) + content[first + PAGE :]


def cut(content: bytes, rng: random.Random) -> bytes:
    """The end is missing, or all of it."""
    return content[: rng.randrange(len(content))]


KINDS: dict[str, Damage] = {"bit flipped": flipped, "page zeroed": zeroed, "cut off": cut}


def damages(files: list[Path], kind: str, count: int, rng: random.Random) -> Iterator[str]:
    """Damage one of the files at a time, as many each, and mend it again; yields what was done, in words."""
    whole = {file: file.read_bytes() for file in files}
    for k in range(count):
        file = files[k % len(files)]
        damaged = KINDS[kind](whole[file], rng)
        if damaged != whole[file]:
            file.write_bytes(damaged)
            yield f"{file.name}: {kind}, number {k}"
            file.write_bytes(whole[file])


# --- files -------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path, counts: dict[str, int], rng: random.Random, tally: Tally) -> None:
    """The newest of two checkpoints is damaged: the one before it is read, whole, and the newest is named."""
    torch.manual_seed(0)
    before, after = ({"weights": torch.randn(9, 2000), "steps": torch.tensor(step)} for step in (1, 2))
    values = {"identity": {"seed": 1, "recipe": {"encoder": "resnet18", "epochs": 12}}, "seconds": 3.25}
    checkpoint.save(folder, 1, before, values)
    newest = checkpoint.save(folder, 2, after, values)
    known = [{**values, "step": step} for step in (1, 2)]
    for kind, count in counts.items():
        for words in damages(sorted(newest.iterdir()), kind, count, rng):
            with tally.fault(words):
                saved, passed_over = _read(lambda: checkpoint.latest(folder))
                assert saved is not None, "the one before is not used"
                assert saved.step == 1 and same(saved.tensors, before), "the damaged one was used"
                assert len(passed_over) == 1 and newest.name in passed_over[0], f"it is not said: {passed_over}"
                assert checkpoint.glance(folder) in known, "damaged values were used"
    saved, passed_over = checkpoint.latest(folder)
    assert saved is not None and same(saved.tensors, after) and not passed_over


def models(folder: Path, counts: dict[str, int], rng: random.Random, tally: Tally) -> None:
    """Any file of a model is damaged: it is refused, with why and what to do."""
    artefact.save(folder, small_network(), small_card(metrics=METRICS))
    for kind, count in counts.items():
        for words in damages(sorted(folder.iterdir()), kind, count, rng):
            with tally.fault(words):
                try:
                    _read(lambda: artefact.read(folder))
                except DataError as error:
                    assert error.why and error.fix, f"no way out: {error}"
                else:
                    raise AssertionError("a damaged model was used")
    artefact.read(folder)


def _read(read: Callable[[], T]) -> T:
    try:
        return read()
    except FewlabelsError:
        raise
    except Exception as error:
        raise AssertionError(f"a traceback: {type(error).__name__}: {error}") from error


# --- whole runs --------------------------------------------------------------------------------------------------


def damaged_runs(folder: Path, count: int, rng: random.Random, tally: Tally) -> None:
    """A run is killed while it trains, its newest checkpoint is damaged, and the same command goes on."""
    images = runs.make_images(folder)
    wanted, seconds = runs.unbroken(images, folder)
    while tally.injected < count:
        run, log = folder / "run", folder / f"{tally.injected}.log"
        child = runs.start(runs.command(images, run), log)
        time.sleep(rng.uniform(0.2, 0.7) * seconds)
        os.kill(child, signal.SIGKILL)
        ended(child)
        begun = [stage for stage in runs.newest(run) if len(list((run / stage).glob("step-*"))) > 1]
        if begun:
            stage, kind = rng.choice(begun), rng.choice(list(KINDS))
            newest = max((run / stage).glob("step-*"))
            next(damages([rng.choice(sorted(newest.iterdir()))], kind, 1, rng))
            with tally.fault(f"{stage}/{newest.name}: {kind}"):
                status = ended(runs.start(runs.command(images, run), log))
                assert status == 0, f"exit code {status}: {log.read_text()[-2000:]}"
                assert f"{stage}/{newest.name}" in log.read_text(), "it is not said"
                runs.same_outcome(run, wanted)
        shutil.rmtree(run, ignore_errors=True)


def damaged_stores(folder: Path, count: int, rng: random.Random, tally: Tally) -> None:
    """A run is killed while it trains, what it knows of the images is damaged, and the same command goes on."""
    images = runs.make_images(folder)
    wanted, seconds = runs.unbroken(images, folder)
    while tally.injected < count:
        run, log = folder / "run", folder / f"{tally.injected}.log"
        child = runs.start(runs.command(images, run), log)
        time.sleep(rng.uniform(0.1, 0.8) * seconds)
        os.kill(child, signal.SIGKILL)
        ended(child)
        name, kind = KNOWN[tally.injected % len(KNOWN)], rng.choice(list(KINDS))
        if runs.newest(run) and next(damages([run / name], kind, 1, rng), None):
            with tally.fault(f"{name}: {kind}"):
                codes = [ended(runs.start(runs.command(images, run), log))]
                if codes == [AGAIN]:
                    codes.append(ended(runs.start(runs.command(images, run), log)))
                assert codes in ([0], [AGAIN, 0]), f"exit codes {codes}: {log.read_text()[-2000:]}"
                assert "the images are read anew" in log.read_text(), "it is not said"
                assert (AGAIN in codes) == (name == "data/pixels.u8" and kind != "cut off"), f"exit codes {codes}"
                runs.same_outcome(run, wanted)
        shutil.rmtree(run, ignore_errors=True)


def main() -> int:
    """All of it."""
    asker = parser(__doc__)
    asker.add_argument("--runs", type=int, default=6)
    asked = asker.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(asked.seed)
    saves, kept, whole = Tally("damaged checkpoint"), Tally("damaged model"), Tally("damaged checkpoint, whole runs")
    stores = Tally("damaged pixels and what is known of them")
    with tempfile.TemporaryDirectory(prefix="fewlabels-damage-") as name:
        checkpoints(Path(name) / "stage", {"bit flipped": 1000, "page zeroed": 200, "cut off": 200}, rng, saves)
        models(Path(name) / "model", {"bit flipped": 400, "page zeroed": 100, "cut off": 100}, rng, kept)
        damaged_runs(Path(name), asked.runs, rng, whole)
        damaged_stores(Path(name), 2 * asked.runs, rng, stores)
    return conclude([saves, kept, whole, stores], asked)


if __name__ == "__main__":
    sys.exit(main())
