"""One run is one folder: the only memory between the stages, and all that `use/` reads.

Only rank 0 writes. Text files are replaced by one rename; metrics.jsonl is appended, and cut back to the step that
a resumed stage starts from, so that a resumed run's metrics are those of an unbroken one.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from fewlabels import checkpoint, runtime
from fewlabels.errors import CannotCreate, DataError, FewlabelsError, Stopped, printable, tell

LOG_SECONDS = 30.0  # one plain line this often where stderr is not a terminal
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
OUTSIDE = "outside of training; finished stages are saved"

WISHES = {
    "recipe": str, "student": str | None, "budget": int | float | None, "seed": int, "keep_labels": str | int | None,
    "overrides": dict,
}  # fmt: skip


class RunFolder:
    """The files of a run by name, and the few ways to change them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data, self.model, self.report = path / "data", path / "model", path / "report.html"
        self.resolved_file, self.status_file = path / "resolved.json", path / "status.json"
        self.metrics_file, self.results_file = path / "metrics.jsonl", path / "results.json"
        self.images_file = path / "images.csv"
        self.rests = False  # a run that is there keeps its status until what was asked of it begins

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder if need be, and keep every other process of this machine out of it until the end."""
        if not runtime.is_main():
            yield
            return
        self._check_ours()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / ".lock").open("w")
        except OSError as error:
            raise CannotCreate(f"cannot write into {self.path}: {error.strerror}", fix="give another --out") from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CannotCreate(
                    f"another process is working in {self.path}", fix="wait for it, or give another --out"
                ) from error
            except OSError as error:  # Lustre without -o flock, some NFS
                say(f"  warning: {self.path} cannot be locked ({error.strerror}): let no other process work in it")
            yield

    def _check_ours(self) -> None:
        if self.path.is_file():
            raise CannotCreate(f"{self.path} is a file", fix="give the name of a folder as --out")
        is_run = (self.path / ".lock").exists() or self.resolved_file.exists()  # a copy may lack what begins with a dot
        if self.path.is_dir() and any(self.path.iterdir()) and not is_run:
            raise CannotCreate(
                f"{self.path} is a folder with other things in it",
                why="a run needs a folder of its own",
                fix="give a new folder as --out",
            )
        odd = [p for p in self.path.rglob("*") if not p.is_dir() and (p.is_symlink() or not p.is_file())]
        if odd:
            raise CannotCreate(
                f"{self.path} holds links, pipes or devices in place of files",
                details=list(map(str, odd)),
                why="a run writes its files, and would write elsewhere",
                fix="put the files themselves there, or give a new folder as --out",
            )

    def stage(self, name: str) -> Path:
        """The folder of a stage's checkpoints."""
        return self.path / name

    def resolved(self) -> dict[str, Any] | None:
        """resolved.json of an earlier start, or None.

        Raises DataError for one that a newer fewlabels wrote, or that does not say what was begun.
        """
        found = read_json(self.resolved_file)
        if found is None:
            return None
        checkpoint.check_format(found, self.resolved_file)
        found = {"inputs": {}, "budget": [], "too_weak": ""} | found
        kinds = {
            "asked": dict, "recipe": dict, "understood": dict, "inputs": dict, "budget": list, "precision": str,
            "too_weak": str,
        }  # fmt: skip
        wrong = [name for name, kind in kinds.items() if not isinstance(found.get(name), kind)]
        if not wrong:
            found["asked"] = {"overrides": {}, "seed": 0} | found["asked"]
            wrong = [f"asked.{name}" for name, kind in WISHES.items() if not isinstance(found["asked"].get(name), kind)]
        if wrong or "labeled" not in found["understood"]:
            raise DataError(
                f"{self.resolved_file} does not say what was begun: {', '.join(wrong) or 'the labels'}",
                fix="give a new --out, or restore the file",
            )
        return found

    def status(
        self, state: str, stage: str = "", reason: str = "", *,
        seconds: dict[str, float] | None = None, waited: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        """Replace status.json. state: running, finished, stopped or failed. seconds: what stages took in all; waited:
        how many of these they stood waiting for images, since their last start.
        """
        if runtime.is_main() and self.path.is_dir():
            clocks = {"seconds": seconds or {}, "waited": waited or {}}
            with suppress(DataError, TypeError):  # it only informs: what cannot be read of it is left out
                before = read_json(self.status_file) or {}
                if self.rests and before.get("state", "running") != "running":
                    return
                clocks = {name: before.get(name, {}) | values for name, values in clocks.items()}
            checkpoint.write_json(self.status_file, {"state": state, "stage": stage, "reason": reason, **clocks})

    def log(self, stage: str, step: int, total: int, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl."""
        if runtime.is_main():
            with checkpoint.storage_errors(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
                record = {"stage": stage, "step": step, "total_steps": total}
                file.write(json.dumps(record | {name: float(f"{v:.6g}") for name, v in values.items()}) + "\n")

    def cut_metrics(self, stage: str, step: int) -> None:
        """Drop what a killed process logged of `stage` after `step`, which will be done again."""
        if runtime.is_main() and self.metrics_file.exists():
            kept = [r for r in metrics(self.path) if r["stage"] != stage or r["step"] <= step]
            checkpoint.write_text(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file of the run, None if it is not there."""
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = {**json.loads(checkpoint.read_text(path))}
    except checkpoint.UNREADABLE as error:
        raise DataError(f"{path} is not readable: {error}", fix="give a new --out, or restore the file") from error
    return found


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a torn one (a kill while it was written) or a damaged one is left out."""
    path = run / "metrics.jsonl"
    found = []
    for line in checkpoint.read_text(path, errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            record = json.loads(line)
            whole = isinstance(record["stage"], str) and isinstance(record["step"], int)
            found += [record] if whole and record["step"] <= record["total_steps"] else []
    return found


# --- signals -----------------------------------------------------------------------------------------------------


class _Signal(BaseException):
    """Raised where a signal comes. An Exception is swallowed in places: matplotlib draws on, an image is unreadable."""

    def __init__(self, number: int) -> None:
        self.exit_code = Stopped(number, OUTSIDE).exit_code
        super().__init__(Stopped(number, OUTSIDE).what)


class Interrupts:
    """Ctrl-C, SIGTERM and SIGUSR1: while a stage trains they only raise a flag, elsewhere they stop rank 0 at once.

    Outside training nothing is lost by stopping anywhere: every file is published by one rename. Other ranks wait for
    rank 0 there; if they left first, it would meet a broken connection instead of its own end.
    """

    def __init__(self, where: str = OUTSIDE) -> None:
        self.where = where
        self.received: int | None = None
        self.patient = False  # a loop polls `received`

    @contextmanager
    def watching(self) -> Iterator[Interrupts]:
        """Install the handlers (main thread only) and put the old ones back at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        with self.naming(), ExitStack() as before:
            for number in SIGNALS:
                before.callback(signal.signal, number, signal.signal(number, self._handle))
            yield self

    @contextmanager
    def naming(self) -> Iterator[None]:
        """After a signal the block is Stopped, whatever it met: an import raises its own error, __del__ none."""
        cause: BaseException | None = None
        try:
            yield
        except (Exception, _Signal) as error:
            if self.received is None or isinstance(error, FewlabelsError):
                raise
            cause = error
        if self.received is not None and (cause or runtime.is_main()):
            # Another rank ends together with rank 0, which has gone, and so has the connection
            raise Stopped(self.received, self.where if runtime.is_main() else "together with rank 0") from cause

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        # What a weak reference's callback raises, Python prints and forgets: 7 % of the signals in a report met one
        if not (self.patient or (frame and "weakref" in frame.f_globals.get("__name__", ""))) and runtime.is_main():
            raise _Signal(number)


# --- progress ----------------------------------------------------------------------------------------------------


def say(text: str = "") -> None:
    """One line for the person, on stderr (stdout carries results), from rank 0."""
    if runtime.is_main():
        tell(printable(text))


class Progress:
    """A stage's progress on stderr: a live line on a terminal, one plain line now and then in a log."""

    def __init__(self, stage: str, total: int, first: int, images_per_step: int) -> None:
        self.stage, self.total, self.first, self.batch = stage, total, first, images_per_step
        self.live = sys.stderr.isatty() and runtime.is_main() and os.environ.get("TERM") != "dumb"
        self.began = self.last = time.perf_counter()

    def update(self, step: int, values: dict[str, float]) -> None:
        """Show where the stage stands, if it is time to."""
        now = time.perf_counter()
        done = step >= self.total
        if not (self.live or done or now - self.last >= LOG_SECONDS):
            return
        self.last = now
        speed = (step - self.first) / max(now - self.began, 1e-9)
        shown = "  ".join(f"{name} {values[name]:.4g}" for name in ("loss", "accuracy", "agreement") if name in values)
        left = "done" if done else f"{duration((self.total - step) / max(speed, 1e-9))} left"
        line = (
            f"{self.stage:<10} step {step:,}/{self.total:,} ({step / self.total:.0%})  {shown}  "
            f"{speed * self.batch:,.0f} images/s  {left}"
        )
        if self.live:
            tell(f"\r\x1b[2K{line}", end="\n" * done)
        else:
            say(line)


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
