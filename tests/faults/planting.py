"""What hostile files are made of, and where they are planted: for payloads.py and the files that it reads."""

from __future__ import annotations

import io
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from faults import runs
from fewlabels import checkpoint

DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE_KEYS = {"__reduce__": ["os.system", ["touch canary"]], "py/object": "subprocess.Popen", "__class__": "os"}


class Evil:
    """Unpickled, it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.canary)!r}, 'w').close()",)


@dataclass(frozen=True)
class Place:
    """Where one payload is planted. here: its own folder; outside: what nothing may lead to."""

    here: Path
    outside: Path
    good: Path  # a finished run, its images, and a model, all of them to be copied

    @property
    def canary(self) -> Path:
        return self.outside.parent / "canary"

    @property
    def images(self) -> str:
        return str(self.good / "images.npz")

    def run(self) -> Path:
        return Path(shutil.copytree(self.good / "unbroken", self.here / "run"))

    def model(self) -> Path:
        return Path(shutil.copytree(self.good / "model", self.here / "model"))

    def pickled(self) -> bytes:
        return pickle.dumps(Evil(self.canary))

    def torch_pickled(self) -> bytes:
        buffer = io.BytesIO()
        torch.save({"weights": Evil(self.canary)}, buffer)
        return buffer.getvalue()

    def object_array(self, count: int = 1) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, np.array([Evil(self.canary)] * count, dtype=object))
        return buffer.getvalue()

    def predict(self, model: Path, images: str = "") -> list[str]:
        return ["predict", str(model), images or self.images, "--out", str(self.here / "predictions.csv")]

    def fit(self, images: str = "", *options: str, out: str = "run") -> list[str]:
        return runs.command(Path(images or self.images), self.here / out, *options)


@dataclass(frozen=True)
class Payload:
    """What it is, how it is planted (returns the command line), how the command ends, and a word of what it says."""

    words: str
    plant: Callable[[Place], list[str]]
    code: int
    says: str


PAYLOADS: list[Payload] = []
Plant = Callable[[Place], list[str]]


def payload(words: str, code: int, says: str = "") -> Callable[[Plant], Plant]:
    """Add the planted payload to the list."""

    def add(plant: Plant) -> Plant:
        PAYLOADS.append(Payload(words, plant, code, says))
        return plant

    return add


def in_each(words: str, code: int, says: str, cases: dict[str, Any], plant: Callable[[Place, Any], list[str]]) -> None:
    """One payload for each case."""
    for name, case in cases.items():
        PAYLOADS.append(Payload(f"{words}: {name}", lambda place, case=case: plant(place, case), code, says))


def vouch(folder: Path) -> None:
    """Write the manifest again: whoever can plant a file can do that."""
    (folder / "manifest.json").unlink(missing_ok=True)
    checkpoint.write_manifest(folder)


# --- bytes -----------------------------------------------------------------------------------------------------------


def bomb(shape: str, kind: str = "<f4") -> bytes:
    """An .npy file of a header only."""
    head = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head) + 1) + head + b"\n"


def npz(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def zeros(count: int) -> bytes:
    return bomb(f"({count},)", "|u1") + bytes(count)


def name_array(*names: str) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(names))
    return buffer.getvalue()
