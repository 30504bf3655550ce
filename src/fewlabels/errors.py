"""What a user can do wrong. Every message says what was found, why it stops us, and what to do about it.

Each class carries the exit code the command line ends with (sysexits.h numbers where one fits).
Anything that is not a FewlabelsError is our bug and ends with exit code 1.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import signal
import sys
from collections.abc import Iterable, Sequence

# Of paths: no rights, a disk that is read only, a file in the place of a folder, too long a name
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
SHOWN_DETAILS = 12  # a file with 5,000 faults still fits on a screen; the count is always given


def tell(*lines: str, end: str = "\n") -> None:
    """Write to stderr. Where nobody reads it any more (`2>&1 | head`) or its disk is full, work goes on in silence."""
    with contextlib.suppress(OSError):
        print(*lines, sep="\n", end=end, file=sys.stderr, flush=True)


class FewlabelsError(Exception):
    """A fault that the user can mend.

    what: what was found, with the value and the place ("labels.csv line 17: ...").
    why: why that stops the work. fix: what to do, a command to paste where there is one.
    details: all faults of the same kind at once, one line each. Names in them come from anywhere: each is one printable
    line, whatever it was.
    """

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", fix: str = "", details: Sequence[str] = ()) -> None:
        self.what, self.why, self.fix = printable(what), printable(why), printable(fix)
        self.details = tuple(map(printable, details))
        super().__init__(self.text())

    def text(self) -> str:
        """The whole message as plain text, several lines."""
        lines = [self.what]
        lines += [f"  - {detail}" for detail in self.details[:SHOWN_DETAILS]]
        if len(self.details) > SHOWN_DETAILS:
            lines.append(f"  ... and {len(self.details) - SHOWN_DETAILS:,} more")
        if self.why:
            lines.append(f"why: {self.why}")
        if self.fix:
            lines.append(f"fix: {self.fix}")
        return "\n".join(lines)


class UsageError(FewlabelsError, ValueError):
    """A wrong option, recipe or argument."""

    exit_code = 2


class DataError(FewlabelsError, ValueError):
    """Images or labels that cannot be used as they are."""

    exit_code = 65


class MissingInput(FewlabelsError, FileNotFoundError):
    """A file or folder that is not there."""

    exit_code = 66


class Diverged(FewlabelsError):
    """The loss or the weights stopped being finite numbers; nothing of it was saved.

    step: the one that did it, counted from 1. rank: where, if not everywhere. images: names of what was seen there.
    """

    exit_code = 70

    def __init__(self, what: str, *, step: int, rank: int | None = None, images: Sequence[str] = ()) -> None:
        self.step, self.rank = step, rank
        super().__init__(
            what + (", with these images:" if images else ""),
            details=images,
            why="training diverged; nothing of this step is saved, the last checkpoint is good",
            fix="lower the stage's learning_rate, raise its warmup, or use precision fp32; give a new --out",
        )


class CannotCreate(FewlabelsError):
    """An output folder that cannot be used, for example because it holds another run."""

    exit_code = 73


class StorageError(FewlabelsError, OSError):
    """The disk is full, or reading or writing failed."""

    exit_code = 74


class RunAgain(FewlabelsError):
    """Something passing went wrong; the same command resumes."""

    exit_code = 75


class Stopped(FewlabelsError):
    """Ctrl-C, SIGTERM or SIGUSR1: everything was saved, the same command goes on.

    exit_code is 128 + signal, but that of RunAgain for SIGUSR1: a scheduler's word that it wants the machine back soon
    (Slurm's --signal=USR1@60), whose job script asks by the exit code whether to queue the job again.
    """

    def __init__(self, signal_number: int, where: str) -> None:
        self.exit_code = RunAgain.exit_code if signal_number == signal.SIGUSR1 else 128 + signal_number
        name = "Ctrl-C" if signal_number == signal.SIGINT else signal.Signals(signal_number).name
        super().__init__(f"stopped by {name} {where}", fix="run the same command again")


class RankFailed(FewlabelsError):
    """Another rank met an error before this one, and tells it; this rank ends with the same exit code.

    stopped: that error was Stopped.
    """

    def __init__(self, words: str, exit_code: int, *, stopped: bool = False) -> None:
        self.exit_code, self.stopped = exit_code, stopped
        super().__init__(words)


def printable(text: str) -> str:
    """text on one line for people, files and pages: what is not UTF-8 or not printable becomes %XX, so that no name
    moves a terminal's cursor, ends a line or turns the text around.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    is_raw = "\udc80" <= character <= "\udcff"  # a byte that was not UTF-8, as os.fsdecode keeps it
    raw = os.fsencode(character) if is_raw else character.encode("utf-8", "surrogatepass")
    return "".join(f"%{byte:02X}" for byte in raw)


def counted(number: int, one: str, many: str = "") -> str:
    """ "1 image", "2,000 images"; many: where it is not one + "s"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def nearest(word: str, choices: Iterable[str]) -> str:
    """' (did you mean "x"?)' when one of choices is close to word, else ''."""
    by_folded = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    return f' (did you mean "{by_folded[close[0]]}"?)' if close else ""
