"""A child that runs the command line on files that may be hostile, and notes what no file may make it do.

Noted by Python's audit events: connections and names looked up, programs started, pickles that ask for a class, and
every file opened below a folder that nothing in the opened files should lead to. Its memory is bounded, so that what
asks for terabytes fails here and not on the machine, and it ends after a time, so that what waits for ever is seen.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.tally import ended, forked
from fewlabels import cli

NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty")
MEMORY = 3 << 30  # bytes beyond what the process had when it was forked
SECONDS = 240


@dataclass(frozen=True)
class Outcome:
    """How a child ended (minus a signal), what it said, and what it did that it should not have."""

    code: int
    text: str
    deeds: list[str]


def guarded(work: Any, folder: Path, forbidden: Path) -> Outcome:
    """The outcome of a command line (words), or of a function, in a child. forbidden: where no file may be opened."""
    log, notes = folder / "log", folder / "deeds"
    log.unlink(missing_ok=True)
    notes.write_text("")

    def guard() -> int:
        handle, away = os.open(notes, os.O_WRONLY | os.O_APPEND), f"{forbidden.resolve()}{os.sep}"

        def note(event: str, arguments: tuple[Any, ...]) -> None:
            if event in NETWORK or event in PROGRAMS or event == "pickle.find_class":
                os.write(handle, f"{event} {arguments!r:.200}\n".encode())
            elif event == "open" and isinstance(arguments[0], str | bytes):
                path = os.path.realpath(os.fsdecode(arguments[0]))
                if path.startswith(away):
                    os.write(handle, f"open {path}\n".encode())

        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        os.chdir(folder)
        signal.alarm(SECONDS)
        sys.addaudithook(note)
        return int(cli.main(work) if isinstance(work, list) else work() or 0)

    code = ended(forked(guard, log))
    return Outcome(code, log.read_text(errors="surrogateescape"), notes.read_text().splitlines())
