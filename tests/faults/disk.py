"""A disk that fails or a process that dies at the k-th operation, for every k: the operations are counted on their way.

Counted are the calls that change a folder (open for writing, mkdir, rename, unlink, rmdir, chmod, exchange), fsync
and every write of a file opened from Python, of which the first half reaches the disk when it fails.
safetensors writes from Rust, out of reach; here its bytes go through Python, in four writes. What is modelled is the
death of a process, not a power cut: the page cache lives on. Flipped bits and zeroed pages (damage.py) stand for that.
"""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

from fewlabels import checkpoint

CALLS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "chmod", "fsync", "posix_fallocate")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Disk:
    """Replaces the operations of this process by counted ones; meant for a child that ends soon.

    at: the number of the operation that fails, None = none. fault: ends the process or raises an OSError.
    exchange: whether the system can swap two names in one step.
    """

    def __init__(self, at: int | None, fault: Callable[[], None], *, exchange: bool = True) -> None:
        self.at, self.fault, self.count, self.exchange = at, fault, 0, exchange
        self.names: list[str] = []
        self.open, self.os_open = io.open, os.open

    def operation(self, name: str) -> None:
        """One more; the chosen one fails."""
        self.names.append(name)
        self.count += 1
        if self.count - 1 == self.at:
            self.fault()

    def install(self) -> Disk:
        """From now on every operation counts."""
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        os.open = self._os_open  # type: ignore[assignment]
        io.open = builtins.open = self._open  # type: ignore[assignment]
        swap = checkpoint._exchange
        checkpoint._exchange = self._counted("exchange", swap) if self.exchange else lambda first, second: False
        checkpoint.save_file = self._save_file
        return self

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.operation(name)
            return real(*arguments, **options)

        return call

    def _os_open(self, path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & WRITING:
            self.operation("open")
        return self.os_open(path, flags, *rest, **options)

    def _open(self, file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+"):
            return self.open(file, mode, *rest, **options)
        self.operation("open")
        buffered = io.BufferedWriter(_Counted(file, mode.replace("b", "").replace("t", ""), self))
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(
            buffered, **{k: v for k, v in options.items() if k in ("encoding", "errors", "newline")}
        )

    def _save_file(self, tensors: Any, path: Path) -> None:
        content = safetensors.torch.save(tensors)
        size = len(content) // 4 + 1
        with self._open(path, "wb") as file:
            for first in range(0, len(content), size):
                file.raw.write(content[first : first + size])


class _Counted(io.FileIO):
    """A file whose writes are counted; the one that fails has written half."""

    def __init__(self, file: Any, mode: str, disk: Disk) -> None:
        super().__init__(file, mode)
        self.disk = disk

    def write(self, content: Any) -> int:
        if self.disk.count == self.disk.at:
            super().write(memoryview(content)[: len(content) // 2])
        self.disk.operation("write")
        return super().write(content) or 0
