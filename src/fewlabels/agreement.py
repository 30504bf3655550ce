"""What all ranks must have in common, compared before anything depends on it.

Ranks that differ would train two runs as one, or wait for each other for ever: one rank of another version, an option
changed in one of eight terminals, a run folder on a disk that only one machine sees.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fewlabels import config, runtime
from fewlabels.asked import Asked
from fewlabels.data.source import Source
from fewlabels.errors import DataError, FewlabelsError, UsageError
from fewlabels.prepare import versions
from fewlabels.prepared import Prepared
from fewlabels.runfolder import RunFolder

SAME_IMAGES = "give every process the same images and labels, on a disk that all machines see"


def on_wishes(asked: Asked) -> None:
    """The same program, asked for the same, before any file is read."""

    def facts() -> dict[str, Any]:
        where = "cuda" if torch.cuda.is_available() and asked.device != "cpu" else "cpu"
        program = {"code": _code(), **versions(), "processes": runtime.world_size(), "device": where}
        return program | asked.wishes() | {"until": asked.until}

    _compare(facts, UsageError, fix="start every process with the same command, the same fewlabels and the same torch")


def on_source(source: Source) -> None:
    """The same images by name, with the same labels and splits."""
    told = {"images": source.names, "labels": source.labels, "splits": source.splits}
    _compare(lambda: {name: _digest(each) for name, each in told.items()}, DataError, fix=SAME_IMAGES)


def on_folder(folder: RunFolder) -> None:
    """One run folder, not one on every machine."""
    runtime.barrier()  # rank 0 has made it
    try:
        with (folder.path / ".lock").open() as file:  # opening asks a network disk anew
            found = os.fstat(file.fileno())
        lock = f"its lock is file {found.st_ino}, made {int(found.st_mtime)} s after 1970"
    except OSError:
        lock = f"there is none at {folder.path.absolute()}"
    _compare(lambda: {"run folder": lock}, UsageError, fix="put --out on a disk that all machines see")


def on_plan(prepared: Prepared) -> None:
    """The same pixels, recipe and number format, before the first step."""
    labels = hashlib.sha256(prepared.dataset.labels[prepared.dataset.train].tobytes()).hexdigest()
    _compare(lambda: {"pixels": prepared.dataset.digest, "known labels": labels}, DataError, fix=SAME_IMAGES)
    recipe = {"precision": prepared.precision.name, "seed": prepared.seed, **asdict(prepared.recipe)}
    _compare(lambda: recipe, UsageError, fix="start every process with the same command")


def _compare(facts: Callable[[], dict[str, Any]], kind: type[FewlabelsError], fix: str) -> None:
    """Raise kind on every rank if a fact differs, naming it, rank 0's value, and the first rank with another one."""
    if runtime.world_size() == 1:
        return
    everyone = [config.flat(each) for each in runtime.from_all(facts())]
    details = []
    for name in sorted({name for each in everyone for name in each}):
        values = [str(each.get(name, "not given")) for each in everyone]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), 0)
        if other:
            details.append(f"{name}: rank 0: {values[0]}; rank {other}: {values[other]}")
    if details:
        raise kind(
            f"the {len(everyone)} processes of this job do not agree", details=details,
            why="they would train different runs as one; nothing was trained", fix=fix,
        )  # fmt: skip


def _code() -> str:
    """A name for the bytes of this package."""
    digest, folder = hashlib.sha256(), Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _digest(values: Any) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:16]
