"""What all ranks must have in common, compared before anything depends on it.

Ranks that differ would train two runs as one, or wait for each other for ever: one rank of another version, an option
changed in one of eight terminals, a run folder on a disk that only one machine sees.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
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


def on_wishes(asked: Asked) -> None:
    """The same program, asked for the same, before any file is read."""
    if runtime.world_size() == 1:
        return
    where = "cuda" if torch.cuda.is_available() and asked.device != "cpu" else "cpu"
    facts = {
        "code": _code(), **versions(), "processes": runtime.world_size(), "device": where,
        **asked.wishes(), "until": asked.until,
    }  # fmt: skip
    _compare(facts, UsageError, fix="start every process with the same command, the same fewlabels and the same torch")


def on_source(source: Source) -> None:
    """The same images by name, with the same labels and splits."""
    if runtime.world_size() == 1:
        return
    facts = {"images": _digest(source.names), "labels": _digest(source.labels), "splits": _digest(source.splits)}
    _compare(facts, DataError, fix="give every process the same images and labels, on a disk that all machines see")


def on_folder(folder: RunFolder) -> None:
    """One run folder, not one on every machine."""
    if runtime.world_size() == 1:
        return
    runtime.barrier()  # rank 0 has made it
    try:
        with (folder.path / ".lock").open() as file:  # opening asks a network disk anew
            found = os.fstat(file.fileno())
        lock = f"its lock is file {found.st_ino}, made {int(found.st_mtime)} s after 1970"
    except OSError:
        lock = f"there is none at {folder.path.absolute()}"
    _compare({"run folder": lock}, UsageError, fix="put --out on a disk that all machines see")


def on_plan(prepared: Prepared) -> None:
    """The same pixels, recipe and number format, before the first step."""
    if runtime.world_size() == 1:
        return
    labels = prepared.dataset.labels[prepared.dataset.train]
    data = {"pixels": prepared.dataset.digest, "known labels": hashlib.sha256(labels.tobytes()).hexdigest()}
    _compare(data, DataError, fix="give every process the same images and labels, on a disk that all machines see")
    recipe = {"precision": prepared.precision.name, "seed": prepared.seed, **asdict(prepared.recipe)}
    _compare(recipe, UsageError, fix="start every process with the same command")


def _compare(facts: Mapping[str, Any], kind: type[FewlabelsError], fix: str) -> None:
    """Raise kind on every rank if a fact differs, naming it, rank 0's value, and the first rank with another one."""
    everyone = [config.flat(each) for each in runtime.from_all(dict(facts))]
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
