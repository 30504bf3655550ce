"""Pictures that change under a run: after they were listed, and while it trains; awful.py counts them.

A store of pixels has what was there when it was read; what cannot be read then is named, and the run goes on without.
A streamed run reads anew: it stops, saved, when a picture is not any more what was checked, and the same command ends
it as the run that nothing happened to, bit for bit, once the picture is put back.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from conftest import shapes_images
from faults import runs
from faults.tally import Tally, ended
from fewlabels.data import decode, pixels
from fewlabels.stages import loop

SECONDS = 300  # until a run counts as hung
STEP = 2  # of pretraining, in which a picture changes
VICTIM, OTHER = "train/unlabeled/40.jpg", "train/unlabeled/41.jpg"


@dataclass(frozen=True)
class Change:
    """What happens to a picture. In the process that reads it, where it cannot happen on the disk."""

    name: str
    act: Callable[[Path], None]
    bad: bool = True  # it cannot be read afterwards
    same: bool = False  # its pixels stay
    on_disk: bool = True


def _cut(picture: Path) -> None:
    picture.write_bytes(picture.read_bytes()[:-200])


def _replace(picture: Path) -> None:
    picture.write_bytes((picture.parents[2] / OTHER).read_bytes())


def _grow(picture: Path) -> None:
    with picture.open("ab") as file:
        file.write(bytes(5000))


def _pipe(picture: Path) -> None:
    picture.unlink()
    os.mkfifo(picture)


def _refusing(number: int) -> Callable[[Path], None]:
    """Opening it fails with this number from now on: root may read everything, and no disk fails on demand."""

    def act(picture: Path) -> None:
        real = decode._open

        def call(payload: Any) -> Any:
            if isinstance(payload, Path) and payload.name == picture.name:
                raise OSError(number, os.strerror(number), str(payload))
            return real(payload)

        decode._open = call

    return act


CHANGES = (
    Change("vanishes", Path.unlink),
    Change("is cut off", _cut),
    Change("is replaced", _replace, bad=False),
    Change("grows", _grow, bad=False, same=True),
    Change("becomes a pipe", _pipe),
    Change("may not be read", _refusing(errno.EACCES), on_disk=False),
    Change("lies on a bad sector", _refusing(errno.EIO), on_disk=False),
)


def changes(tally: Tally, folder: Path) -> None:
    """Every change, at both moments, with both stores."""
    photos = make_photos(folder)
    wanted = {}
    for store in ("pixels", "streamed"):
        (folder / store).mkdir()
        wanted[store], _ = runs.unbroken(photos, folder / store, "--store", store)
    assert wanted["pixels"] == wanted["streamed"], "a streamed run ends differently"
    for store in ("pixels", "streamed"):
        for change in CHANGES:
            for moment, check in (("listed", after_listing), ("trained on", while_training)):
                run = folder / "run"
                with tally.fault(f"{store}, {moment}, {change.name}"):
                    check(change, photos, run, store, wanted[store])
                make_photos(folder)
                shutil.rmtree(run, ignore_errors=True)


def make_photos(folder: Path) -> Path:
    """88 small JPEGs in folders: 24 labeled, 48 unlabeled, 16 held out. Always the same."""
    shutil.rmtree(folder / "photos", ignore_errors=True)
    images, labels = shapes_images(88, size=24, seed=3)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = f"test/{label}" if i >= 72 else f"train/{label}" if i < 24 else "train/unlabeled"
        path = folder / "photos" / place / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, quality=95)
    return folder / "photos"


def fit(photos: Path, run: Path, store: str, before: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """(exit code, what was said) of a run; it is killed by an alarm, and its code is negative, where it hangs."""
    log = run.with_suffix(".log")
    log.unlink(missing_ok=True)

    def alarmed() -> None:
        signal.alarm(SECONDS)
        before()

    code = ended(runs.start(runs.command(photos, run, "--store", store), log, alarmed))
    return code, log.read_text()


def after_listing(change: Change, photos: Path, run: Path, store: str, wanted: dict[str, str]) -> None:
    """It changes between the listing and the reading: the run goes on, and says so where it cannot be read."""

    def install() -> None:
        _first(pixels, "_decode_chunk", lambda *_: True, lambda: change.act(photos / VICTIM))

    code, said = fit(photos, run, store, install)
    assert code == 0, f"exit code {code}: {said[-2000:]}"
    with (run / "bad_images.csv").open(newline="") as file:
        bad = [row["name"] for row in csv.DictReader(file) if row["reason"]]
    assert bad == ([VICTIM] if change.bad else []), f"bad_images.csv names {bad}"
    found = runs.outcome(run)
    assert (found == wanted) == change.same, "the result is not that of the pictures that were read"


def while_training(change: Change, photos: Path, run: Path, store: str, wanted: dict[str, str]) -> None:
    """It changes during a step: what is kept as pixels does not care, and a streamed run stops where pixels changed."""
    original = (photos / VICTIM).read_bytes()

    def install() -> None:
        _first(loop, "step", lambda state, *_: state.step == STEP, lambda: change.act(photos / VICTIM))

    code, said = fit(photos, run, store, install)
    if store == "pixels" or change.same:
        assert code == 0, f"exit code {code}: {said[-2000:]}"
        runs.same_outcome(run, wanted)
        return
    assert code == 65, f"exit code {code}: {said[-2000:]}"
    assert VICTIM in said and "put it back as it was" in said and "Traceback" not in said, said[-2000:]
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and VICTIM in status["reason"], status
    saved = runs.newest(run)
    assert saved.get("pretrain", -1) >= STEP, f"saved is {saved}"
    if change.on_disk:
        code, said = fit(photos, run, store)
        assert code == 73 and "nothing was changed" in said, f"other pictures are mixed in: {code}, {said[-2000:]}"
        assert runs.newest(run) == saved, "the refused run has saved something"
        (photos / VICTIM).unlink(missing_ok=True)
        (photos / VICTIM).write_bytes(original)
    code, said = fit(photos, run, store)
    assert code == 0, f"put back, it ends with {code}: {said[-2000:]}"
    runs.same_outcome(run, wanted)


def _first(owner: Any, name: str, when: Callable[..., bool], act: Callable[[], None]) -> None:
    """act once, before the first call of owner.name for whose arguments `when` holds; other threads wait for it."""
    real, lock, done = getattr(owner, name), threading.Lock(), []

    def call(*arguments: Any, **options: Any) -> Any:
        with lock:
            if not done and when(*arguments):
                done.append(True)
                act()
        return real(*arguments, **options)

    setattr(owner, name, call)
