"""Where images lie, as things that stream: files, arrays in memory, .npy and .npz files (parquet.py, shards.py: more).

A part gives its images in order without ever holding more than a few megabytes of them, and a sample of them
spread over the whole.

Shapes: N images, H, W their height and width; arrays are (N, H, W), (N, H, W, 1) or (N, H, W, 3) uint8.
"""

from __future__ import annotations

import itertools
import mmap
import tokenize
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from fewlabels import checkpoint
from fewlabels.data.decode import FAILING, Payload
from fewlabels.data.places import is_url, stamp
from fewlabels.errors import DataError, FewlabelsError, StorageError, nearest

CHUNK_BYTES = 4 << 20
ALLOWED_ARRAYS = "uint8 arrays of shape (N, H, W) for grey or (N, H, W, 3) for RGB images, values 0 to 255"
MOST_SMALL = 512 << 20  # bytes of labels or class names, which are held whole; a few kB of zip can stand for terabytes
# What reading an array that anybody may have written can raise: numpy evaluates its header as a Python literal, zipfile
# has RuntimeError for what is encrypted or compressed in an unknown way
UNREADABLE = (
    *checkpoint.UNREADABLE, EOFError, SyntaxError, RuntimeError, MemoryError, IndexError, zipfile.BadZipFile,
    zlib.error, tokenize.TokenError,
)  # fmt: skip


class Part(ABC):
    """Images of one kind, in order."""

    seekable = True  # whether one image is read without most of those before it
    has_addresses = False  # whether an image has a path, or is a span or a cell of a file, that can be written down
    away = False  # whether an image takes a request of its own

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def at(self, row: int) -> Payload:
        """One image, from several threads at once."""

    @abstractmethod
    def stamps(self) -> Iterator[bytes]:
        """What changes when the images do: sizes and times of files, the bytes of arrays."""

    def payloads(self) -> Iterator[Payload]:
        """Every image in order, streaming."""
        return map(self.at, range(len(self)))

    def sample(self, count: int) -> Iterator[Payload]:
        """At most count images, from all over the part where that is cheap, else the first ones."""
        if not self.seekable:
            return itertools.islice(self.payloads(), count)
        return map(self.at, sampled(len(self), count).tolist())


@dataclass(frozen=True)
class Files(Part):
    """Picture files."""

    has_addresses = True
    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def at(self, row: int) -> Payload:
        return Path(self.paths[row])

    def stamps(self) -> Iterator[bytes]:
        return map(stamp, self.paths)


@dataclass(frozen=True)
class Array(Part):
    """An array in memory, or a read-only np.memmap, whose pages are given back as they are done with."""

    images: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.images)

    def payloads(self) -> Iterator[Payload]:
        """Views of one image each."""
        step = rows_of(self.images.shape)
        for first in range(0, len(self.images), step):
            yield from self.images[first : first + step]
            _give_back(self.images)

    def at(self, row: int) -> Payload:
        return cast(npt.NDArray[np.uint8], self.images[row])

    def stamps(self) -> Iterator[bytes]:
        """The shape, as equal bytes are other images in another one, and the pixels themselves."""
        yield repr(self.images.shape).encode()
        yield from (image.tobytes() for image in self.payloads())  # type: ignore[union-attr]


@dataclass(frozen=True)
class ArrayFile(Part):
    """An .npy file, or the member of an .npz file, read chunk by chunk (mapping it would count as our memory)."""

    path: Path
    member: str | None
    shape: tuple[int, ...]
    seekable: bool  # not in an .npz file, whose members may be compressed

    def __len__(self) -> int:
        return self.shape[0]

    def payloads(self) -> Iterator[Payload]:
        step, size = rows_of(self.shape), prod(self.shape[1:])
        with _opened(self.path, self.member) as (stream, *_):
            for first in range(0, len(self), step):
                count = min(step, len(self) - first)
                raw = stream.read(count * size)
                if len(raw) < count * size:
                    raise EOFError("it ends before its last image")
                yield from np.frombuffer(raw, np.uint8).reshape(count, *self.shape[1:])

    def at(self, row: int) -> Payload:
        size = prod(self.shape[1:])
        with _opened(self.path, self.member) as (stream, *_):
            stream.seek(row * size, 1)
            return np.frombuffer(stream.read(size), np.uint8).reshape(self.shape[1:])

    def stamps(self) -> Iterator[bytes]:
        yield stamp(self.path)


def sampled(total: int, count: int) -> npt.NDArray[np.int64]:
    """At most count numbers below total, each once and in order: one of each of count equal stretches, drawn by a fixed
    key. At equal distances they could all be of one kind, where images come in turns.
    """
    count = min(total, count)
    edges = np.arange(count + 1) * total // max(1, count)
    return edges[:-1] + (np.random.default_rng(0).random(count) * np.diff(edges)).astype(np.int64)


def rows_of(shape: Sequence[int]) -> int:
    """How many images make a chunk."""
    return max(1, CHUNK_BYTES // max(1, prod(shape[1:])))


def check_images(shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> None:
    """Refuse what are not images, saying what is allowed."""
    got = f"{where}: an array of {dtype} with shape {shape}"
    if dtype != np.uint8:
        paths = "give paths of pictures as a list: images.tolist()"
        fraction = "multiply values from 0 to 1 by 255 and convert with .astype(np.uint8)"
        special = {"b": "convert with images.astype(np.uint8) * 255", "f": fraction, "O": paths, "U": paths}
        whole = "multiply by 255 / images.max(), unless values are 0 to 255 already, and convert with .astype(np.uint8)"
        raise DataError(got, why=f"images are {ALLOWED_ARRAYS}", fix=special.get(dtype.kind, whole))
    channels_first = len(shape) == 4 and shape[1] in (1, 3)
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        fix = "move the channels last: images.transpose(0, 2, 3, 1)" if channels_first else "reshape the array"
        raise DataError(got, why=f"images are {ALLOWED_ARRAYS}", fix=fix)
    if 0 in shape:
        raise DataError(got, why="there is not a single pixel in it", fix="give at least one image")


# --- .npy and .npz -----------------------------------------------------------------------------------------------


def open_npz(path: Path) -> tuple[dict[str, ArrayFile], dict[str, npt.NDArray[Any]], list[str]]:
    """(image parts, small arrays) of an .npz file by name: images, test_images; labels, test_labels, classes; and the
    names of arrays that are not known.
    """
    with reading(path), zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
    if "images" not in names:
        found = ", ".join(sorted(names)) or "nothing"
        raise DataError(
            f'{path}: no array "images"{nearest("images", names)}',
            why=f"it holds {found}",
            fix="np.savez(path, images=..., labels=...)",
        )
    pixels = sorted(names & {"images", "test_images"})
    others = names & ({"labels", "classes"} | ({"test_labels"} if "test_images" in pixels else set()))
    images, small = {n: open_npy(path, f"{n}.npy") for n in pixels}, {n: _whole(path, f"{n}.npy") for n in others}
    return images, small, sorted(names - images.keys() - small.keys())


def open_npy(path: Path, member: str | None = None) -> ArrayFile:
    """The images of an .npy file, or of the member of an .npz file; its header is checked."""
    where = f"{path}" if member is None else f'{path}, "{member.removesuffix(".npy")}"'
    with _opened(path, member) as (_, size, shape, fortran, dtype):
        pass  # the header will do
    check_images(shape, dtype, where)
    if fortran:
        raise DataError(f"{where}: saved in Fortran order", fix="save np.ascontiguousarray(images)")
    if size < prod(shape):
        raise damaged(path, EOFError("it ends before its last image"))
    return ArrayFile(path, member, shape, seekable=member is None)


@contextmanager
def _opened(path: Path, member: str | None) -> Iterator[tuple[BinaryIO, int, tuple[int, ...], bool, np.dtype[Any]]]:
    """Stream behind its header, bytes left, shape, in Fortran order or not, dtype."""
    with reading(path), ExitStack() as stack:
        if member is None:
            stream: BinaryIO = stack.enter_context(path.open("rb"))
            size = path.stat().st_size
        else:
            archive = stack.enter_context(zipfile.ZipFile(path))
            stream = cast(BinaryIO, stack.enter_context(archive.open(member)))
            size = archive.getinfo(member).file_size
        header = _header(stream)
        yield stream, size - stream.tell(), *header


def _header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"unknown version {version} of the npy format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _whole(path: Path, member: str) -> npt.NDArray[Any]:
    with _opened(path, member) as (stream, size, shape, _, dtype):
        if max(size, prod(shape) * dtype.itemsize) > MOST_SMALL:
            raise ValueError(f'"{member}" would take more than {MOST_SMALL >> 20} MiB')
        stream.seek(0)  # read_array begins with the header
        return np.lib.format.read_array(stream, allow_pickle=False)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """What is met while a file of images is read is told as `damaged` has it."""
    try:
        yield
    except UNREADABLE as error:
        raise damaged(path, error) from error


def damaged(path: str | Path, error: Exception) -> FewlabelsError:
    """A DataError, a StorageError for what did not arrive, or the FewlabelsError that it is already."""
    if isinstance(error, FewlabelsError):
        return error
    away = is_url(str(path)) and not isinstance(error, FileNotFoundError)
    if isinstance(error, OSError) and (away or error.errno in FAILING):
        return StorageError(f"{path} could not be read: {error}", fix="run the same command again")
    return DataError(
        f"{path} cannot be read: {' '.join(str(error).split())}",
        why="the file is damaged, incomplete or holds Python objects, which are never loaded",
        fix="write or download it again",
    )


def _give_back(array: npt.NDArray[Any]) -> None:
    """Drop the mapped pages of a read-only np.memmap; they would count as our memory."""
    if not (isinstance(array, np.memmap) and array.mode == "r" and hasattr(mmap, "MADV_DONTNEED")):
        return
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    if base is not None:
        base.madvise(mmap.MADV_DONTNEED)
