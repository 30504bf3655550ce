"""How many faults were injected and how many were survived, told in one line a class and kept as JSON."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fewlabels.data import views


class Tally:
    """One class of faults."""

    def __init__(self, name: str) -> None:
        self.name, self.injected, self.skipped = name, 0, ""
        self.failures: list[str] = []
        self.began = time.monotonic()

    def missed(self) -> None:
        """The last fault came too late to be one."""
        self.injected -= 1

    @contextlib.contextmanager
    def fault(self, words: str) -> Iterator[None]:
        """Around one fault and what must hold after it: an AssertionError inside means it was not survived."""
        self.injected += 1
        try:
            yield
        except AssertionError as error:
            self.failures.append(f"{words}: {error}")
            print(f"{self.name}: NOT survived: {words}: {error}", flush=True)

    def line(self) -> str:
        """The result in words."""
        if self.skipped:
            return f"{self.name}: skipped, {self.skipped}"
        survived = self.injected - len(self.failures)
        return f"{self.name}: {self.injected:,} faults injected, {survived:,} survived"


def parser(about: str | None) -> argparse.ArgumentParser:
    """What every class of faults can be asked."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seed", type=int, default=int(time.time()))
    made.add_argument("--json", type=Path, help="file to write the tally into")
    return made


def conclude(tallies: Sequence[Tally], asked: argparse.Namespace) -> int:
    """Print and write the tallies; returns the exit code: 1 if a fault was not survived, or none was injected."""
    rows = []
    for tally in tallies:
        print(tally.line(), flush=True)
        rows.append({
            "name": tally.name, "injected": tally.injected, "survived": tally.injected - len(tally.failures),
            "skipped": tally.skipped, "failures": tally.failures, "seconds": round(time.monotonic() - tally.began, 1),
        })  # fmt: skip
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 1 if any(tally.failures or not (tally.injected or tally.skipped) for tally in tallies) else 0


def before_forking() -> None:
    """Load here, and not in every child, what a run loads late: torch's compiler, which an optimizer brings along
    (1 s), the report and its figures (2 s), the compiled views.
    """
    for name in ("torch._dynamo", "fewlabels.pipeline"):
        importlib.import_module(name)
    views.compiled()


def forked(work: Callable[[], int | None], log: Path) -> int:
    """Start work in a child process; returns its process id. The child's words go to log, its exit code is work's."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """The exit code of a child, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
