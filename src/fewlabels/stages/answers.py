"""What a frozen teacher said of views that come again: each is asked for once, then read from a file.

Views are pure functions of (seed, epoch, image), so with `teacher_epochs` = T the views of epoch e are those of epoch
e mod T, and only the first T epochs pay the teacher. The file is one row of logits for an image and epoch, beside the
stage's checkpoints and written out before each of them; a resumed stage reads what the unbroken one would have read.

K classes, n images of the stage, B images of this rank's batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fewlabels import checkpoint, runtime
from fewlabels.data.loader import Batch, Order


class Answers:
    """The teacher's logits for T epochs of views: float32 (T, n, K) in folder/teacher-logits-BATCH.f32.

    By the batch, which follows the number of ranks: other batches leave out other images at an epoch's end.
    """

    def __init__(self, folder: Path, order: Order, epochs: int, num_classes: int) -> None:
        self.path, self.order, self.epochs = folder / f"teacher-logits-{order.batch}.f32", order, epochs
        self.sorted = np.sort(order.ids)  # the row of an image is its place in here
        self.shape = (epochs, len(order.ids), num_classes)
        self.rows: np.memmap[Any, Any] | None = None
        self.asked: dict[int, np.ndarray] = {}  # epoch below T -> (n,) bool, whose views it held
        self.bytes = 4 * int(np.prod(self.shape))
        self.readable = False  # by every rank
        whole = self.path.is_file() and self.path.stat().st_size == self.bytes
        # Somebody removed the file of a begun stage: the teacher is asked to the end. All look before one makes it
        self.lost = runtime.any_rank(flag=not whole and any(folder.glob("step-*")))
        # Nor may rows be read later that another batch passed by
        self._delete(*(p for p in folder.glob("teacher-logits*") if self.lost or p != self.path))

    def __call__(self, batch: Batch, ask: Callable[[slice | Tensor], Tensor]) -> Tensor:
        """Logits (B, K) of the batch's views. ask(rows) gives the teacher's own for these rows of the batch."""
        epoch = batch.epoch % self.epochs
        places = np.searchsorted(self.sorted, batch.ids.cpu().numpy())
        if self.lost or batch.epoch < self.epochs:
            answers = ask(slice(None))
            if not self.lost:
                self._write(epoch, places, answers)
            return answers
        if not self.readable:  # rank 0 has the last rows in its memory, and a file opened before them may stay without
            self.sync()
            runtime.barrier()
            self.readable = True
        answers = torch.from_numpy(self._open()[epoch, places]).to(batch.pixels.device)
        # An epoch leaves out what does not fill a batch; those images are asked for whenever their turn comes, and
        # never kept, so that what is read does not depend on where a run was broken
        missing = torch.from_numpy(np.flatnonzero(~self._asked(epoch)[places])).to(batch.pixels.device)
        if len(missing):
            answers[missing] = ask(missing)
        return answers

    def sync(self) -> None:
        """Bring what was written to the disk: before a checkpoint that counts on it."""
        if self.rows is not None and runtime.is_main():
            with checkpoint.storage_errors(self.path):
                self.rows.flush()

    def remove(self) -> None:
        """Delete the file: the stage is done."""
        self.rows = None
        self._delete(*self.path.parent.glob("teacher-logits*"))

    def _delete(self, *paths: Path) -> None:
        for path in paths if runtime.is_main() else ():
            path.unlink()

    def _write(self, epoch: int, places: np.ndarray, answers: Tensor) -> None:
        """Rank 0 writes the rows of all ranks. It reads them in a later epoch only: many collectives lie in between."""
        rows = torch.from_numpy(places).to(answers.device)
        everywhere, said = runtime.gather(rows), runtime.gather(answers.float())
        if runtime.is_main():
            self._open()[epoch, everywhere.cpu().numpy()] = said.cpu().numpy()

    def _open(self) -> np.memmap[Any, Any]:
        if self.rows is None:
            with checkpoint.storage_errors(self.path):
                if runtime.is_main():
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    with self.path.open("ab") as file:
                        file.truncate(self.bytes)
                        # Reserved now: a disk that fills later would end the process with SIGBUS
                        if hasattr(os, "posix_fallocate"):  # not on macOS
                            os.posix_fallocate(file.fileno(), 0, self.bytes)
                mode: Literal["r+", "r"] = "r+" if runtime.is_main() else "r"
                self.rows = np.memmap(self.path, dtype=np.float32, mode=mode, shape=self.shape)
        return self.rows

    def _asked(self, epoch: int) -> np.ndarray:
        """(n,) whether the epoch's whole batches held an image."""
        if epoch not in self.asked:
            held = self.order.permutation(epoch)[: self.order.steps_per_epoch * self.order.batch]
            self.asked[epoch] = np.zeros(len(self.sorted), dtype=bool)
            self.asked[epoch][np.searchsorted(self.sorted, held)] = True
        return self.asked[epoch]
