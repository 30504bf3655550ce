"""Where images lie, as things that stream: files, arrays in memory, .npy and .npz files, parquet files.

A part gives its images in order without ever holding more than a few megabytes of them, and a sample of them
spread over the whole.

Shapes: N images, H, W their height and width; arrays are (N, H, W), (N, H, W, 1) or (N, H, W, 3) uint8.
"""

from __future__ import annotations

import json
import mmap
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import numpy.typing as npt

from fewlabels import checkpoint
from fewlabels.data.decode import Payload
from fewlabels.errors import DataError, FewlabelsError, UsageError, nearest

CHUNK_BYTES = 4 << 20
ALLOWED_ARRAYS = "uint8 arrays of shape (N, H, W) for grey or (N, H, W, 3) for RGB images, values 0 to 255"
PARQUET_ROWS = 64
MOST_SMALL = 512 << 20  # bytes of labels or class names, which are held whole; a few kB of zip can stand for terabytes
# What reading an array that anybody may have written can raise: numpy evaluates its header as a Python literal, zipfile
# has RuntimeError for what is encrypted or compressed in an unknown way
UNREADABLE = (
    *checkpoint.UNREADABLE, EOFError, SyntaxError, RuntimeError, MemoryError, IndexError, zipfile.BadZipFile,
    zlib.error, tokenize.TokenError,
)  # fmt: skip


class Part(Protocol):
    """Images of one kind, in order."""

    def __len__(self) -> int: ...

    def payloads(self) -> Iterator[Payload]:
        """Every image in order, streaming."""

    def sample(self, count: int) -> Iterator[Payload]:
        """At most count images, from all over the part where that is cheap."""

    def at(self, row: int) -> Payload | None:
        """One image, from several threads at once; None where images come as a stream only."""

    def stamps(self) -> Iterator[bytes]:
        """What changes when the images do: sizes and times of files, the bytes of arrays."""


@dataclass(frozen=True)
class Files:
    """Picture files."""

    paths: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def payloads(self) -> Iterator[Payload]:
        """The paths."""
        return map(Path, self.paths)

    def sample(self, count: int) -> Iterator[Payload]:
        """Evenly spaced paths."""
        return (Path(self.paths[i]) for i in spread(len(self.paths), count))

    def at(self, row: int) -> Payload:
        """The path."""
        return Path(self.paths[row])

    def stamps(self) -> Iterator[bytes]:
        """Of every file."""
        return map(_stamp, self.paths)


@dataclass(frozen=True)
class Array:
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

    def sample(self, count: int) -> Iterator[Payload]:
        """Evenly spaced images."""
        return (self.images[i] for i in spread(len(self.images), count))

    def at(self, row: int) -> Payload:
        """A view."""
        image: npt.NDArray[np.uint8] = self.images[row]
        return image

    def stamps(self) -> Iterator[bytes]:
        """The pixels themselves."""
        return (image.tobytes() for image in self.payloads())  # type: ignore[union-attr]


@dataclass(frozen=True)
class ArrayFile:
    """An .npy file, or the member of an .npz file, read chunk by chunk (mapping it would count as our memory)."""

    path: Path
    member: str | None
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return self.shape[0]

    def payloads(self) -> Iterator[Payload]:
        """Images as they come out of the file."""
        step, size = rows_of(self.shape), prod(self.shape[1:])
        try:
            with ExitStack() as stack:
                stream = _stream(stack, self.path, self.member)
                _header(stream)
                for first in range(0, len(self), step):
                    count = min(step, len(self) - first)
                    raw = stream.read(count * size)
                    if len(raw) < count * size:
                        raise EOFError("it ends before its last image")
                    yield from np.frombuffer(raw, np.uint8).reshape(count, *self.shape[1:])
        except UNREADABLE as error:
            raise _damaged(self.path, error) from error

    def sample(self, count: int) -> Iterator[Payload]:
        """One image: they are all of one size."""
        for _, image in zip(range(min(count, 1)), self.payloads(), strict=False):
            yield image

    def at(self, row: int) -> Payload | None:
        """One image of an .npy file; the members of an .npz file may be compressed."""
        if self.member is not None:
            return None
        size = prod(self.shape[1:])
        try:
            with self.path.open("rb") as stream:
                _header(stream)
                stream.seek(row * size, 1)
                return np.frombuffer(stream.read(size), np.uint8).reshape(self.shape[1:])
        except UNREADABLE as error:
            raise _damaged(self.path, error) from error

    def stamps(self) -> Iterator[bytes]:
        """Of the file."""
        yield _stamp(self.path)


@dataclass(frozen=True)
class Parquet:
    """A parquet file with encoded images: `column` is binary, or a struct with the field bytes."""

    path: Path
    column: str
    rows: int

    def __len__(self) -> int:
        return self.rows

    def payloads(self) -> Iterator[Payload]:
        """Each image's bytes."""
        return self._read(None)

    def sample(self, count: int) -> Iterator[Payload]:
        """Images of evenly spaced row groups."""
        with _parquet_file(self.path) as file:
            groups = [int(i) for i in spread(file.num_row_groups, 8)]
        for group in groups:
            for _, image in zip(range(max(1, count // len(groups))), self._read([group]), strict=False):
                yield image

    def at(self, row: int) -> Payload | None:
        """None: a row group would be read for one image."""

    def stamps(self) -> Iterator[bytes]:
        """Of the file."""
        yield _stamp(self.path)

    def _read(self, groups: list[int] | None) -> Iterator[Payload]:
        try:
            with _parquet_file(self.path) as file:
                batches = file.iter_batches(PARQUET_ROWS, row_groups=groups, columns=[self.column], use_threads=False)
                for batch in batches:
                    for value in batch.column(0).to_pylist():
                        yield (value.get("bytes") if isinstance(value, dict) else value) or b""
        except UNREADABLE as error:
            raise _damaged(self.path, error) from error


def _stamp(path: str | Path) -> bytes:
    with suppress(OSError):
        about = Path(path).stat()
        return f"{about.st_size} {about.st_mtime_ns}".encode()
    return b"missing"  # decoding will say why


def spread(total: int, count: int) -> npt.NDArray[np.int64]:
    """At most count numbers below total, evenly spaced, each once."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).astype(np.int64))


def rows_of(shape: Sequence[int]) -> int:
    """How many images make a chunk."""
    return max(1, CHUNK_BYTES // max(1, prod(shape[1:])))


def check_images(shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> None:
    """Refuse what are not images, saying what is allowed."""
    got = f"{where}: an array of {dtype} with shape {shape}"
    if dtype != np.uint8:
        hint = "multiply values from 0 to 1 by 255 and " if dtype.kind == "f" else ""
        raise DataError(got, why=f"images are {ALLOWED_ARRAYS}", fix=f"{hint}convert with .astype(np.uint8)")
    channels_first = len(shape) == 4 and shape[1] in (1, 3)
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        fix = "move the channels last: images.transpose(0, 2, 3, 1)" if channels_first else "reshape the array"
        raise DataError(got, why=f"images are {ALLOWED_ARRAYS}", fix=fix)
    if 0 in shape:
        raise DataError(got, why="there is not a single pixel in it", fix="give at least one image")


# --- .npy and .npz -----------------------------------------------------------------------------------------------


def open_npy(path: Path) -> ArrayFile:
    """The images of an .npy file; its header is checked."""
    return _array_file(path, None)


def open_npz(path: Path) -> tuple[dict[str, ArrayFile], dict[str, npt.NDArray[Any]]]:
    """(image parts, small arrays) of an .npz file by name: images, test_images; labels, test_labels, classes."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
    except UNREADABLE as error:
        raise _damaged(path, error) from error
    if "images" not in names:
        found = ", ".join(sorted(names)) or "nothing"
        raise DataError(
            f'{path}: no array "images"{nearest("images", names)}',
            why=f"it holds {found}",
            fix="np.savez(path, images=..., labels=...)",
        )
    pixels, others = sorted(names & {"images", "test_images"}), names & {"labels", "test_labels", "classes"}
    return {n: _array_file(path, f"{n}.npy") for n in pixels}, {n: _whole(path, f"{n}.npy") for n in others}


def _array_file(path: Path, member: str | None) -> ArrayFile:
    where = f"{path}" if member is None else f'{path}, "{member.removesuffix(".npy")}"'
    try:
        with ExitStack() as stack:
            stream = _stream(stack, path, member)
            shape, fortran, dtype = _header(stream)
            begin = stream.tell()
            size = (stream.seek(0, 2) if member is None else _member_size(path, member)) - begin
    except UNREADABLE as error:
        raise _damaged(path, error) from error
    check_images(shape, dtype, where)
    if fortran:
        raise DataError(f"{where}: saved in Fortran order", fix="save np.ascontiguousarray(images)")
    if size < prod(shape):
        raise _damaged(path, EOFError("it ends before its last image"))
    return ArrayFile(path, member, shape)


def _stream(stack: ExitStack, path: Path, member: str | None) -> BinaryIO:
    if member is None:
        return stack.enter_context(path.open("rb"))
    archive = stack.enter_context(zipfile.ZipFile(path))
    return cast(BinaryIO, stack.enter_context(archive.open(member)))


def _member_size(path: Path, member: str) -> int:
    with zipfile.ZipFile(path) as archive:
        return archive.getinfo(member).file_size


def _header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"unknown version {version} of the npy format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _whole(path: Path, member: str) -> npt.NDArray[Any]:
    try:
        with ExitStack() as stack:
            shape, _, dtype = _header(_stream(stack, path, member))
            if max(_member_size(path, member), prod(shape) * dtype.itemsize) > MOST_SMALL:
                raise ValueError(f'"{member}" would take more than {MOST_SMALL >> 20} MiB')
            return np.lib.format.read_array(_stream(stack, path, member), allow_pickle=False)
    except UNREADABLE as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> FewlabelsError:
    if isinstance(error, FewlabelsError):
        return error
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


# --- parquet -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetFacts:
    """What a parquet file says of its images besides their pixels."""

    part: Parquet
    names: tuple[str, ...]
    labels: list[Any] | None
    classes: tuple[str, ...] | None


def open_parquet(path: Path) -> ParquetFacts:
    """The images of a parquet file in the Hugging Face layout: columns `image` (or `img`) and maybe `label`."""
    try:
        with _parquet_file(path) as file:
            schema, rows = file.schema_arrow, int(file.metadata.num_rows)
            column = next((name for name in ("image", "img") if name in schema.names), None)
            if column is None:
                raise DataError(
                    f'{path}: no column "image"{nearest("image", schema.names)}',
                    why=f"its columns are {', '.join(schema.names)}",
                    fix="rename the column that holds the encoded pictures to image, and their classes to label",
                )
            labels = None
            if "label" in schema.names:
                labels = file.read(columns=["label"]).column(0).to_pylist()
            fields = [field.name for field in schema.field(column).type] if _is_struct(schema, column) else []
            _check_image_column(path, str(schema.field(column).type), fields)
            names: list[str | None] = [None] * rows
            if "path" in fields:
                names = [value["path"] for value in file.read(columns=[f"{column}.path"]).column(0).to_pylist()]
            shown = tuple(name or f"{path.name}:{row}" for row, name in enumerate(names))
            return ParquetFacts(Parquet(path, column, rows), shown, labels, _class_names(schema.metadata or {}))
    except UNREADABLE as error:
        raise _damaged(path, error) from error


def _is_struct(schema: Any, column: str) -> bool:
    return str(schema.field(column).type).startswith("struct")


def _check_image_column(path: Path, kind: str, fields: Sequence[str]) -> None:
    if "bytes" not in fields and kind not in ("binary", "large_binary"):
        raise DataError(
            f"{path}: the image column holds {kind}",
            why="it must hold encoded pictures: binary, or a struct with the field bytes",
            fix="write each picture's JPEG or PNG bytes into it",
        )


def _parquet_file(path: Path) -> Any:
    # a large buffer_size and no pre_buffer read page by page, so that a row group of 1 GB is never held whole
    return _pyarrow_parquet().ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


def _pyarrow_parquet() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            "parquet files need the package pyarrow, which is not installed",
            fix='pip install "fewlabels[data]"',
        ) from None
    return cast(ModuleType, pyarrow.parquet)


def _class_names(metadata: dict[bytes, bytes]) -> tuple[str, ...] | None:
    """Class names from a schema's metadata: a JSON list class_names, or Hugging Face's features."""
    try:
        if b"class_names" in metadata:
            names = json.loads(metadata[b"class_names"])
        else:
            names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except checkpoint.UNREADABLE:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names) or None
