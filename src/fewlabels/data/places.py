"""Where bytes lie: in a file of this disk or behind a URL, and a picture as a span of such a file.

A place is a path, or a URL that fsspec understands (s3://bucket/a.tar, gs://, https://, hf://, ...). fsspec comes with
torch; the driver of a protocol (s3fs, gcsfs, ...) and what lets one in are the user's. "simplecache::s3://..." makes
fsspec keep whole files on this disk.

What fails on its way from a URL is tried TRIES times, then it is a StorageError: a network that fails says nothing
about the picture. A file of this disk is asked once, as pictures in folders are.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from fewlabels.data.decode import MAX_BYTES, BadPicture, Inside
from fewlabels.errors import FewlabelsError, StorageError, UsageError

URL = re.compile(r"([a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://", re.IGNORECASE)  # in a path it means nothing
T = TypeVar("T")

TRIES = 4
PAUSE = 0.5  # seconds before the second try, four times as many before each further one: 10.5 in all
AT_ONCE = 16  # requests to URLs under way together: what one waits for is not the processor
BLOCK = 4 << 20  # bytes that a file behind a URL is read ahead
TAGS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True)
class Span(Inside):
    """A picture as bytes of a file. fault: why it is refused, "" if it is not."""

    begin: int
    length: int
    fault: str = ""

    def read(self) -> bytes:
        if self.fault:
            raise BadPicture(self.fault)
        if self.length > MAX_BYTES:
            raise BadPicture(f"{self.length >> 20:,} MB, more than the {MAX_BYTES >> 20} MB allowed")
        if not is_url(self.place):
            with open(self.place, "rb", buffering=0) as file:  # noqa: PTH123 - opening takes 3 us: none is kept open
                return self._whole(os.pread(file.fileno(), self.length, self.begin))
        files, path = reach(self.place)
        end = self.begin + self.length
        return patiently(self.place, lambda: self._whole(files.cat_file(path, start=self.begin, end=end)), str(self))

    def _whole(self, raw: bytes) -> bytes:
        if len(raw) != self.length:
            raise OSError(0, f"{len(raw):,} of its {self.length:,} bytes came (is its file cut off?)")
        return raw


def real(word: str) -> str:
    """One name for a path, from whatever folder and through whatever links it is called; a URL as it is."""
    return word if is_url(word) else os.path.realpath(word)


def at_home(path: str | Path) -> Any:
    """path with the home folder in place of its ~, of the same kind."""
    return type(path)(os.path.expanduser(path))  # noqa: PTH111 - which raises where there is no such user


def is_url(place: str) -> bool:
    """Whether fsspec is to be asked."""
    return URL.match(place) is not None


def reach(place: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it) of a URL."""
    folder, _, name = place.rpartition("/")
    files, root = _file_system(folder + "/" if folder.endswith(":/") else folder)
    return files, f"{root.rstrip('/')}/{name}"


@functools.cache
def _file_system(folder: str) -> tuple[Any, str]:
    """One for all files of a folder and all threads, as each of a driver's has connections of its own."""
    try:
        from fsspec.core import url_to_fs

        return cast(tuple[Any, str], url_to_fs(folder))
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"{folder} cannot be reached: {error}",
            why="URLs are opened by fsspec, with a driver for each protocol",
            fix="install the driver, such as s3fs for s3:// or gcsfs for gs://",
        ) from error


def patiently(place: str, work: Callable[[], T], what: str = "") -> T:
    """What work on a file returns; behind a URL it is tried TRIES times before a StorageError names what (or place)."""
    if not is_url(place):
        return work()
    problem: Exception | None = None
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 4 ** (attempt - 1))
        try:
            return work()
        except (FileNotFoundError, FewlabelsError):
            raise
        except Exception as error:  # drivers let any kind out
            problem = error
    words = " ".join(str(problem).split()) or type(problem).__name__
    raise StorageError(
        f"{what or place} could not be read in {TRIES} tries: {words}",
        why="what does not arrive may be sound, so it is not passed over",
        fix="run the same command again: it goes on from the last save",
    ) from problem


def open_file(place: str) -> BinaryIO:
    """A file for reading."""
    if not is_url(place):
        return Path(place).open("rb")
    files, path = reach(place)
    return cast(BinaryIO, files.open(path, "rb", block_size=BLOCK))


def stamp(place: str | Path) -> bytes:
    """What changes when the file does: its size and its time, or what a server calls its state; b"missing" if gone."""
    if not is_url(str(place)):
        with suppress(OSError):
            about = os.stat(place)  # noqa: PTH116
            return f"{about.st_size} {about.st_mtime_ns}".encode()
        return b"missing"  # decoding will say why
    files, path = reach(str(place))
    with suppress(FileNotFoundError):
        facts = patiently(str(place), lambda: files.info(path))
        return f"{facts.get('size')} {next((facts[tag] for tag in TAGS if facts.get(tag)), '')}".encode()
    return b"missing"


def below(folder: str, endings: tuple[str, ...]) -> list[str]:
    """The files with these endings below a folder's URL, as paths relative to it, sorted; not the hidden ones."""
    files, root = _file_system(folder)
    found = (path[len(root.rstrip("/")) :].lstrip("/") for path in patiently(folder, lambda: files.find(root)))
    return sorted(n for n in found if n.lower().endswith(endings) and not n.rpartition("/")[2].startswith("."))
