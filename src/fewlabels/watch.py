"""The ranks of a job look after each other: the first error ends all of them, and so does a rank that is silent.

Every rank beats once a second on a board that all can read, and listens to the rank after it: three small messages a
rank and second, whatever the number of ranks. A rank that fails writes on the board what it met, if it is the first;
the others then end too, with its exit code and without a word, even from inside a collective that would wait for half
an hour. A rank that was killed or stopped ends the others with exit code 75: the same command goes on, and
`torchrun --max-restarts` gives it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from fewlabels import runtime
from fewlabels.errors import FewlabelsError, RankFailed, RunAgain, Stopped, tell

BEAT = 1.0  # seconds between two beats, and between two looks at the board
SILENCE = 60.0  # seconds without a beat: the process is stopped, or its machine is gone
# Seconds in which a rank may end by itself, once it is known that another has failed. With a beat less than the 5
# seconds that a stopped job has; nothing is lost by an end at any moment
GRACE = 2.5
LEFT = b"left"


class Ranks:
    """This rank among the others; alone it does nothing."""

    def __init__(self) -> None:
        self.number, self.world = runtime.rank(), runtime.world_size()
        self.record: Callable[[Exception], None] = lambda _: None  # what this rank writes down of an end
        self._done, self._looks = threading.Event(), 0
        self._threads = [threading.Thread(target=f, name="watch", daemon=True) for f in (self._look, self._guard)]
        self._board: Any = None
        if self.world > 1:
            self._board = runtime.board(SILENCE)
            self._board.set(f"beat {self.number}", "0")
            runtime.barrier()  # every rank has beaten once
            for thread in self._threads:
                thread.start()

    # --- what went wrong ---

    def first(self, error: BaseException) -> BaseException:
        """The error to raise: error, or what another rank met before."""
        if self.world == 1 or isinstance(error, RankFailed):
            return error
        _deaf()
        try:
            if not isinstance(error, FewlabelsError) and runtime.of_a_collective(error):
                gone = self._gone()
                error = _killed(gone) if gone and self._note() is None else error
            if isinstance(error, FewlabelsError):
                return self._post(error, error.what, error.exit_code)
            return self._post(error, f"{type(error).__name__}: {error}", 1)
        except RuntimeError:
            return self._orphaned()

    def _post(self, error: BaseException, words: str, code: int) -> BaseException:
        """Write down that this rank failed, unless another did before: then the error is that one's."""
        self._board.compare_set("failure", "", json.dumps([self.number, words, code, isinstance(error, Stopped)]))
        rank, of_others = self._note() or (self.number, None)
        return of_others if of_others and rank != self.number else self._telling(error)

    def _telling(self, error: BaseException) -> BaseException:
        """error, marked as the one that is told to the user."""
        if not getattr(error, "__notes__", None):
            error.add_note(f"met by rank {self.number} of {self.world} first; all of them end")
        return error

    def _orphaned(self) -> FewlabelsError:
        """The board is gone, and so is rank 0 that held it; of those that are left rank 1 says so."""
        error = _killed([0])
        self._telling(error)
        return error if self.number == 1 else RankFailed(error.what, error.exit_code)

    def _note(self) -> tuple[int, RankFailed] | None:
        """The rank that failed first, and the error with which the others end."""
        if not self._board.check(["failure"]):
            return None
        rank, words, code, stopped = json.loads(self._board.get("failure"))
        return rank, RankFailed(words if stopped else f"rank {rank} failed: {words}", code, stopped=stopped)

    def _gone(self) -> list[int]:
        """The ranks that beat no more; looked for until they can be told from living ones, or one has spoken."""
        keys = [f"beat {rank}" for rank in range(self.world)]
        before = self._board.multi_get(keys)
        for _ in range(3):
            time.sleep(BEAT)
            if self._note() is not None:
                break
        now = self._board.multi_get(keys)
        return [rank for rank in range(self.world) if rank != self.number and before[rank] == now[rank] != LEFT]

    # --- the thread ---

    def _look(self) -> None:
        neighbour = (self.number + 1) % self.world
        heard, last = time.monotonic(), b""
        while not self._done.wait(BEAT):
            self._looks += 1
            try:
                self._board.set(f"beat {self.number}", str(self._looks))
                beat = self._board.get(f"beat {neighbour}")
                if beat != last or beat == LEFT:
                    heard, last = time.monotonic(), beat
                note = self._note()
                if note is not None and note[0] != self.number:
                    self._end(note[1])
                elif note is None and time.monotonic() - heard > SILENCE:
                    error = _killed([neighbour])
                    self._end(self._post(error, error.what, error.exit_code))
            except RuntimeError:
                self._end(self._orphaned())

    def _guard(self) -> None:
        """End where the board answers no more: a call to a process that is stopped never returns, whatever its timeout.

        Nor does any later one, so nothing is written on it. Counted, and not timed: a job may be suspended as a whole.
        """
        before, beats = self._looks, 0
        while not self._done.wait(BEAT):
            before, beats = self._looks, beats + 1 if self._looks == before else 0
            if beats * BEAT > SILENCE:
                error = self._orphaned()
                self._tell(error)
                os._exit(error.exit_code)

    def _tell(self, error: FewlabelsError) -> None:
        """What an end says that does not come out of the main thread."""
        self.record(error)
        if not isinstance(error, RankFailed):
            tell(f"\nerror: {error.text()}", *error.__notes__)

    def _end(self, error: BaseException) -> None:
        """Leave, if the main thread does not: it may wait in a collective for ranks that will never come."""
        assert isinstance(error, FewlabelsError)
        if self._done.wait(GRACE):
            return
        self._tell(error)
        with contextlib.suppress(RuntimeError):
            self._board.add("left", 1)
        os._exit(error.exit_code)

    # --- the block ---

    def leave(self) -> None:
        """Stop looking. Rank 0 may hold the board, so it is the last to go, for as long as others can be waited for."""
        if self.world == 1:
            return
        until = time.monotonic() + 2 * GRACE
        with contextlib.suppress(RuntimeError):
            left = self._board.add("left", 1)
            while self.number == 0 and left < self.world and time.monotonic() < until:
                time.sleep(0.02)
                left = self._board.add("left", 0)
        self._done.set()
        for thread in self._threads:
            thread.join()
        with contextlib.suppress(RuntimeError):
            self._board.set(f"beat {self.number}", LEFT)

    @contextlib.contextmanager
    def recording(self, record: Callable[[Exception], None]) -> Iterator[None]:
        """An end inside the block, also one that another rank caused, is written down by record."""
        self.record = record
        try:
            yield
        except BaseException as error:
            found = self.first(error)
            if isinstance(found, Exception):
                record(found)
            if found is error:
                raise
            raise found from error
        finally:
            self.record = lambda _: None


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """Watch the other ranks during the block, which raises what the first of them met."""
    mine = Ranks()
    try:
        with mine.recording(lambda _: None):
            yield mine
    finally:
        mine.leave()


def _killed(gone: list[int]) -> RunAgain:
    names = ", ".join(map(str, gone))
    return RunAgain(
        f"rank {names} ended without a word" if len(gone) == 1 else f"ranks {names} ended without a word",
        why="its process was killed or stopped, or its machine or network is gone",
        fix="run the same command: it goes on from the last save (torchrun --max-restarts 3 does so by itself)",
    )


def _deaf() -> None:
    """This rank is ending: a signal that asks for just that must not cut short what it says."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
