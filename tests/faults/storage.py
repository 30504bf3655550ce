"""A process that dies, and a disk that is full or fails, at every single I/O operation of everything a run writes.

    python tests/faults/storage.py

For each kind of file and each operation k of writing a new one over an old one: the process dies at k; the k-th
operation fails with ENOSPC, EIO, EDQUOT. After each of them the old one or the new one is there, whole, and writing
again works and leaves nothing else behind; a failing disk is a StorageError with exit code 74. Then whole runs on a
small real disk (tmpfs) that is full from some moment on: they end with 74, and once there is space the same command
ends as the run that had enough from the start, bit for bit.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # forking a process whose threads have worked would hang its child

import contextlib
import errno
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import shapes_images
from faults import runs
from faults.disk import Disk
from faults.tally import Tally, conclude, ended, forked, parser
from fewlabels import checkpoint, runfolder
from fewlabels.data import pixels
from fewlabels.data.sources import open_source
from fewlabels.errors import MissingInput, StorageError
from fewlabels.use import artefact, compare, predict
from small_model import small_card, small_network

CRASHED = 9
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


@dataclass(frozen=True)
class Writing:
    """Something that a run writes: how an old one comes to be, how the new one is written, what is there to see.

    look returns "old" or "new", and fails where neither is whole. exchange: whether folders can be swapped at once.
    """

    name: str
    before: Callable[[Path], Any]
    write: Callable[[Path], Any]
    look: Callable[[Path], str]
    exchange: bool = True


# --- what a run writes -------------------------------------------------------------------------------------------


def _save(folder: Path, step: int, value: float | None = None) -> Path:
    tensors = {"x": torch.full((300,), float(step if value is None else value)), "empty": torch.zeros(0, 4)}
    return checkpoint.save(folder, step, tensors, {"identity": {"seed": step}})


def _two_saves(folder: Path) -> None:
    _save(folder, 1), _save(folder, 2)


def _newest(folder: Path) -> str:
    saved, passed_over = checkpoint.latest(folder)
    assert saved is not None, f"no checkpoint left, {passed_over}"
    assert not passed_over, passed_over
    assert saved.values == {"identity": {"seed": saved.step}, "step": saved.step}
    assert saved.tensors["x"].tolist() == [float(saved.step)] * 300
    return {2: "old", 3: "new"}[saved.step]


def _damaged_save(folder: Path) -> None:
    _save(folder, 1)
    file = _save(folder, 2, value=7.0) / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def _newest_after_damage(folder: Path) -> str:
    saved, _ = checkpoint.latest(folder)
    assert saved is not None, "no checkpoint left"
    assert saved.tensors["x"].tolist() == [float(saved.step)] * 300
    return {1: "old", 2: "new"}[saved.step]


def _model(folder: Path, classes: str) -> None:
    artefact.save(folder / "model", NETWORK, small_card(classes=tuple(classes)))


def _which_model(folder: Path) -> str:
    network, card = artefact.read(folder / "model")
    assert torch.equal(network.linear.weight, NETWORK.linear.weight)
    return {"abcd": "old", "efgh": "new"}["".join(card.classes)]


def _which_model_if_any(folder: Path) -> str:
    """Where two names cannot be swapped in one step, there is a moment with neither: then the next run writes it."""
    return _which_model(folder) if (folder / "model").exists() else "old"


def _pixels(folder: Path) -> None:
    pixels.build(open_source(IMAGES), folder / "data", working_size=None, bad_csv=folder / "bad.csv", threads=1)


def _which_pixels(folder: Path) -> str:
    try:
        store = pixels.open_store(folder / "data")
    except MissingInput:
        return "old"
    read, _ = store.read(np.arange(len(IMAGES)))
    assert np.array_equal(read.numpy(), IMAGES.transpose(0, 3, 1, 2))
    return "new"


def _status(folder: Path, state: str) -> None:
    runfolder.RunFolder(folder).status(state, "pretrain")


def _which_status(folder: Path) -> str:
    return {"running": "old", "finished": "new"}[(runfolder.read_json(folder / "status.json") or {})["state"]]


def _log(folder: Path, step: int) -> None:
    run = runfolder.RunFolder(folder)
    run.cut_metrics("pretrain", step - 1)  # as every start of a stage does
    run.log("pretrain", step, 9, {"loss": 1 / step})


def _which_log(folder: Path) -> str:
    steps = [line["step"] for line in runfolder.metrics(folder)]
    return {(1, 2): "old", (1, 2, 3): "new"}[tuple(steps)]


def _results(folder: Path, number: int) -> None:
    compare.write(folder, {"number": number}, {"ids": np.full(400, number)})


def _which_results(folder: Path) -> str:
    with np.load(folder / "evaluation.npz", allow_pickle=False) as found:
        assert set(found["ids"].tolist()) <= {1, 2}
    return {1: "old", 2: "new"}[json.loads((folder / "results.json").read_text())["number"]]


def _predictions(folder: Path, count: int) -> None:
    model = predict.Model(NETWORK, small_card(), device="cpu")
    predict.write_predictions(model, IMAGES[:count], folder / "predictions.csv")


def _which_predictions(folder: Path) -> str:
    return {2: "old", 4: "new"}[len((folder / "predictions.csv").read_text().splitlines()) - 1]


IMAGES, _ = shapes_images(6, size=16)
NETWORK = small_network()
WRITINGS = [
    Writing("checkpoint", _two_saves, lambda f: _save(f, 3), _newest),
    Writing("checkpoint over a damaged one", _damaged_save, lambda f: _save(f, 2), _newest_after_damage),
    Writing("model", lambda f: _model(f, "abcd"), lambda f: _model(f, "efgh"), _which_model),
    Writing("model, two renames", lambda f: _model(f, "abcd"), lambda f: _model(f, "efgh"), _which_model_if_any, False),
    Writing("pixels", lambda f: None, _pixels, _which_pixels),
    Writing("status", lambda f: _status(f, "running"), lambda f: _status(f, "finished"), _which_status),
    Writing("metrics", lambda f: [_log(f, 1), _log(f, 2)], lambda f: _log(f, 3), _which_log),
    Writing("results", lambda f: _results(f, 1), lambda f: _results(f, 2), _which_results),
    Writing("predictions", lambda f: _predictions(f, 2), lambda f: _predictions(f, 4), _which_predictions),
]


# --- every operation ---------------------------------------------------------------------------------------------


def every_operation(writing: Writing, folder: Path, crashes: Tally, failures: Tally) -> int:
    """Inject all faults into one kind of writing; returns how many operations it has."""
    (folder / "before").mkdir(parents=True)
    writing.before(folder / "before")
    assert writing.look(folder / "before") == "old"
    shutil.copytree(folder / "before", folder / "whole")
    log, operations = folder / "log", folder / "operations"

    def counted() -> None:
        disk = Disk(None, lambda: None, exchange=writing.exchange).install()
        writing.write(folder / "whole")
        operations.write_text(json.dumps(disk.names))

    assert ended(forked(counted, log)) == 0, log.read_text()
    names = json.loads(operations.read_text())
    count = len(names)
    left = _files(folder / "whole")
    assert writing.look(folder / "whole") == "new"
    for k in range(count):
        for code in (None, *ERRORS):
            tally, fault = (crashes, "dies") if code is None else (failures, errno.errorcode[code])
            with tally.fault(f"{writing.name}: {fault} at operation {k}, {names[k]}"):
                shutil.copytree(folder / "before", folder / "run")
                try:
                    _one(writing, folder, k, code, left)
                finally:
                    shutil.rmtree(folder / "run")
    return count


def _one(writing: Writing, folder: Path, k: int, code: int | None, left: set[str]) -> None:
    run, log = folder / "run", folder / "log"
    log.write_text("")

    def broken() -> int:
        def fault() -> None:
            if code is None:
                os._exit(CRASHED)
            raise OSError(code, os.strerror(code))

        Disk(k, fault, exchange=writing.exchange).install()
        try:
            writing.write(run)
        except StorageError as error:
            print(error.text())
            return error.exit_code
        return 0

    status = ended(forked(broken, log))
    found = writing.look(run)
    if code is None:
        assert status == CRASHED, f"it ended with {status}: {log.read_text()}"
    else:
        assert status in (0, 74), f"it ended with {status}: {log.read_text()}"
        full = "the disk is full" in log.read_text()
        assert status == 0 or full == (code != errno.EIO), f"the words are wrong: {log.read_text()}"
        assert status == 74 or found == "new", "it ended well, and the old one is there"
    writing.write(run)
    assert writing.look(run) == "new", "writing again did not work"
    # A text that a killed process was writing beside its place keeps its process number, and is small
    rest = {name for name in _files(run) - left if not (code is None and name.endswith(".tmp"))}
    assert not rest, f"left behind: {rest}"


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# --- a small real disk -------------------------------------------------------------------------------------------


def small_disk(folder: Path, megabytes: int) -> str:
    """Mount a tmpfs of so many megabytes at folder; returns why that does not work, or ""."""
    folder.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "fewlabels-faults", str(folder)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError as error:
        return f"no small disk can be mounted here ({error})"
    return f"no small disk can be mounted here ({done.stderr.strip()})" if done.returncode else ""


def full_disks(tally: Tally, folder: Path, rng: random.Random, count: int) -> None:
    """Whole runs on a disk that has too little space from the start, or is filled by others on the way."""
    tally.skipped = small_disk(folder / "disk", 64)
    if tally.skipped:
        return
    try:
        images = runs.make_images(folder)
        wanted, seconds = runs.unbroken(images, folder)
        run, filler = folder / "disk" / "run", folder / "disk" / "filler"
        size = sum(path.stat().st_size for path in (folder / "unbroken").rglob("*") if path.is_file())
        for k in range(count):
            started_full = k % 2 == 0
            free = int(rng.uniform(0.02, 0.9) * size) if started_full else rng.choice([0, 4096, 40_000])
            words = f"{free:,} bytes free " + ("from the start" if started_full else "from a moment on")
            with tally.fault(words):
                _fill(filler, free if started_full else 2 * size)
                log = folder / f"full-{k}.log"
                child = runs.start(runs.command(images, run), log)
                if not started_full:
                    time.sleep(rng.uniform(0.1, 0.7) * seconds)
                    _fill(filler, free)
                code = ended(child)
                filler.unlink()
                assert code == 74 or (code == 0 and not started_full), f"exit code {code}: {log.read_text()[-2000:]}"
                if code == 0:  # it was done before the disk was full
                    tally.missed()
                else:
                    assert "error: " in log.read_text() and "fix: " in log.read_text(), log.read_text()
                assert ended(runs.start(runs.command(images, run), log)) == 0, log.read_text()[-2000:]
                runs.same_outcome(run, wanted)
            shutil.rmtree(run, ignore_errors=True)
    finally:
        subprocess.run(["umount", "-l", str(folder / "disk")], check=False)


def _fill(filler: Path, free: int) -> None:
    """Grow the file filler until so many bytes of its disk are free. A run may write meanwhile: then measure again."""
    with filler.open("ab") as file:
        while (grow := shutil.disk_usage(filler.parent).free - free) > 0:
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, grow)
                return


def main() -> int:
    """All of it, or only what is named."""
    asker = parser(__doc__)
    asker.add_argument("--only", choices=[writing.name for writing in WRITINGS], help="one kind of file, no whole runs")
    asker.add_argument("--full-disks", type=int, default=12, metavar="N")
    asked = asker.parse_args()
    torch.set_num_threads(1)
    crashes = Tally("process dies at an I/O operation")
    failures = Tally("I/O operation fails (ENOSPC, EIO, EDQUOT)")
    with tempfile.TemporaryDirectory(prefix="fewlabels-storage-") as name:
        for k, writing in enumerate(WRITINGS):
            if asked.only in (None, writing.name):
                count = every_operation(writing, Path(name) / str(k), crashes, failures)
                print(f"{writing.name}: {count} operations", flush=True)
        if asked.only:
            return conclude([crashes, failures], asked)
        full = Tally("disk full, a real one")
        full_disks(full, Path(name), random.Random(asked.seed), asked.full_disks)
    return conclude([crashes, failures, full], asked)


if __name__ == "__main__":
    sys.exit(main())
