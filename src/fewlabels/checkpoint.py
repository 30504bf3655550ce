"""Tensors and plain values on disk: safetensors + JSON + a SHA-256 manifest, written atomically; never pickle.

A folder is published by one rename, after its files and their manifest are safely on disk, so a kill at any moment
leaves either the old folder or the new one. Neither safetensors nor torch.save notices a flipped bit (299 of 300
loaded silently wrong), so every file is checked against the manifest before it is used.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewlabels import __version__
from fewlabels.errors import CLOSED, DataError, FewlabelsError, StorageError

# Of all files of a run and a model together, apart from the package's version: see check_format
FORMAT_VERSION = 1
KEEP = 2  # the newest, and the one before it to fall back to
TENSORS, VALUES = "tensors.safetensors", "values.json"
STREAMS = ("/dev", "/dev/fd", "/proc/self/fd")  # folders of what is no file, though /dev/stdout may lead to one
MOST_TEXT = 1 << 30  # bytes; the confusions of 10,000 classes take 800 MB

# What reading JSON that anybody may have written can raise, if the answer is then used as what it should be
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Saved:
    """One checkpoint as read: its step, tensors (on the CPU) and plain values."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Damaged(DataError):
    """A folder whose files differ from its manifest."""


def check_format(contents: Mapping[str, Any], path: Path) -> None:
    """Refuse what path says where a newer fewlabels wrote it (DataError), or where it states no format (Damaged).

    FORMAT_VERSION rises when an older fewlabels would read such files wrongly. Every format from 1 on stays readable:
    the files of each are kept in tests/golden.
    """
    version = contents.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise Damaged(
            f"{path} says file format {version!r}, which never was",
            why="it is damaged, or of another program",
            fix="copy it again from where it came, or write it anew by the command that made it",
        )
    if version > FORMAT_VERSION:
        raise DataError(
            f"{path} is in file format {version}, this fewlabels ({__version__}) reads up to {FORMAT_VERSION}",
            why="a newer fewlabels wrote it",
            fix='pip install --upgrade "fewlabels"',
        )


# --- atomic files and folders --------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the many faces of a full or failing disk into one StorageError with the free megabytes."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, FewlabelsError | BrokenPipeError):  # told already; or nobody reads /dev/stdout any more
            raise
        if getattr(error, "errno", None) in CLOSED:
            fix = "give another path, or give yourself the right to use it"
            raise StorageError(f"{path} cannot be written: {error.strerror}", fix=fix) from error  # type: ignore[union-attr]
        place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
        try:
            free = f"{shutil.disk_usage(place).free / 1e6:,.0f} MB are free there; "
        except OSError:  # a disk that fails may not even say that
            free = ""
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        full = full or any(words in str(error) for words in ("No space left", "quota exceeded"))  # safetensors has none
        raise StorageError(
            f"{'the disk is full' if full else 'writing failed'}: {path} ({error})",
            why=f"{free}what was saved before is unharmed",
            fix="free some space (or mend the disk) and run the same command again: it goes on from the last save",
        ) from error


@contextmanager
def text_file(path: Path) -> Iterator[TextIO]:
    """To write into; replaces path by one rename at the end. /dev/stdout, a pipe or a device is written to itself."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        stream = str(path.absolute().parent) in STREAMS or (path.exists() and not (path.is_file() or path.is_dir()))
        try:
            # backslashreplace: JSON's own form of odd bytes
            target = path if stream else temporary
            with target.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                yield file
            if not stream:
                sync(temporary)
                temporary.replace(path)
                sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a small file by one rename, as text_file does."""
    with text_file(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file by one rename."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_text(path: Path, *, errors: str = "strict") -> str:
    """A text file of a folder that may come from anywhere. ValueError for a pipe, where reading would wait for ever, a
    device, which may never end, and for a file of absurd size.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode) or about.st_size > MOST_TEXT:
        raise ValueError(f"{path.name} is not a plain file of at most {MOST_TEXT >> 20:,} MiB")
    return path.read_text(encoding="utf-8", errors=errors)


@contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """A draft to write into; at the end it gets a manifest and becomes `folder` by one rename."""
    with storage_errors(folder), replacing(folder) as draft:
        yield draft
        write_manifest(draft)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A draft beside `folder` that takes its place, flushed to disk, when the block ends well; else it goes.

    The draft of a killed process has the same name, so the next one clears it away.
    """
    draft, old = (folder.with_name(f".{folder.name}.{word}") for word in ("draft", "old"))
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        for path in [*(p for p in draft.rglob("*") if p.is_file()), draft]:
            sync(path)
        if not (folder.exists() and _exchange(draft, folder)):
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            draft.rename(folder)
        sync(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap the names of two folders in one step. False where the system cannot; between two steps there is neither."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return call is not None and call(here, os.fsencode(first), here, os.fsencode(second), swap) == 0


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file with the tensors, read by whoever may read its folder (safetensors makes it 0600)."""
    save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, path)
    path.chmod(path.parent.stat().st_mode & 0o666)


def write_manifest(folder: Path) -> None:
    """folder/manifest.json: size and SHA-256 of every file in it, and a SHA-256 of that."""
    files = {name: {"bytes": p.stat().st_size, "sha256": file_digest(p)} for name, p in sorted(_inside(folder).items())}
    contents = {"format_version": FORMAT_VERSION, "files": files}
    text = json.dumps({**contents, "sha256": _seal(contents)}, indent=1)
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(contents: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, to stand among them: one flipped bit in a version would pass for a newer format."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, contents: Mapping[str, Any]) -> None:
    """The same as write_json, with the SHA-256 of contents among them."""
    write_json(path, {**contents, "sha256": _seal(contents)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What write_sealed or write_manifest wrote; files of older versions have no SHA-256. Raises one of UNREADABLE."""
    found = {**json.loads(read_text(path))}
    if found.pop("sha256", None) not in (None, _seal(found)):
        raise ValueError("it differs from its own SHA-256")
    digests = [name for name, value in found.items() if isinstance(value, str) and len(value) == 64]
    if any(found[name] == _seal({k: v for k, v in found.items() if k != name}) for name in digests):
        raise ValueError("its SHA-256 stands under a damaged name")
    return found


def _inside(folder: Path) -> dict[str, Path]:
    """The files of folder by name, without links that lead out of it."""
    home = folder.resolve()
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path for name, path in found.items() if path.resolve().is_relative_to(home)}


def verify(folder: Path, needed: Collection[str] = ()) -> None:
    """Check folder against its manifest, which must list the files needed; Damaged names all that differs."""
    path = folder / "manifest.json"
    try:
        manifest = read_sealed(path)
        check_format(manifest, path)
        files = {name: (facts["bytes"], facts["sha256"]) for name, facts in manifest["files"].items()}
    except DataError:
        raise
    except UNREADABLE as error:
        raise Damaged(f"{folder} has no readable manifest.json ({error})", why="it was not written whole") from error
    present = _inside(folder)
    faults = [f"the manifest does not vouch for {name}" for name in needed if name not in files]
    for name, facts in files.items():
        try:
            if name not in present:
                faults.append(f"{name} is missing")
            elif (present[name].stat().st_size, file_digest(present[name])) != facts:
                faults.append(f"{name} differs from its SHA-256 in the manifest")
        except OSError as error:
            faults.append(f"{name} cannot be read ({error.strerror})")
    if faults:
        raise Damaged(f"{folder} is damaged", details=faults, why="its files are not what was written")


# --- checkpoints ---------------------------------------------------------------------------------------------


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Path:
    """Write folder/step-00001234, and remove all but it and the KEEP - 1 before it. Returns the new one's path.

    Later ones go too: a stage is at an earlier step because they could not be used.
    """
    target = folder / f"step-{step:08d}"
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = sum(t.nbytes for t in tensors.values()), shutil.disk_usage(folder).free
    if free < needed * 1.1 + 1e6:
        raise StorageError(
            f"{folder} needs {needed / 1e6:,.0f} MB for a checkpoint, {free / 1e6:,.0f} MB are free",
            fix="free some space and run the same command again: it goes on from the last save",
        )
    with publish(target) as temporary:
        write_tensors(temporary / TENSORS, tensors)
        (temporary / VALUES).write_text(json.dumps({**values, "step": step}, indent=1), encoding="utf-8")
    there = _checkpoints(folder)
    own = there.index(target)
    for rest in (*there[:own], *there[own + KEEP :], *folder.glob(".step-*")):  # and the drafts of killed processes
        shutil.rmtree(rest, ignore_errors=True)
    return target


def _checkpoints(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def read(path: Path) -> Saved:
    """Read one checkpoint folder after verifying it."""
    verify(path, (TENSORS, VALUES))
    try:
        values = json.loads(read_text(path / VALUES))
        return Saved(int(values["step"]), load_file(path / TENSORS), values)
    except (*UNREADABLE, SafetensorError) as error:
        raise Damaged(f"{path} is no checkpoint ({error})", why="its files are not what this program writes") from error


def latest(folder: Path) -> tuple[Saved | None, list[str]]:
    """The newest checkpoint that verifies, or None if there is none; and what had to be passed over, in words."""
    passed_over: list[str] = []
    for path in _checkpoints(folder):
        try:
            return read(path), passed_over
        except Damaged as error:
            passed_over.append(f"{error.what}: {'; '.join(error.details) or error.why}")
    return None, passed_over


def glance(folder: Path) -> dict[str, Any] | None:
    """The plain values of the newest checkpoint whose manifest vouches for them; its tensors are left alone."""
    for path in _checkpoints(folder):
        try:
            text, vouched = read_text(path / VALUES), read_sealed(path / "manifest.json")["files"][VALUES]["sha256"]
            if hashlib.sha256(text.encode()).hexdigest() == vouched:
                return {**json.loads(text)}
        except UNREADABLE:
            continue
    return None
