"""Parquet files of encoded pictures, in the layout of Hugging Face: columns `image` (or `img`) and maybe `label`.

All images come in order by pages. One image alone comes from where its bytes are: in a column that is not compressed
pictures lie as they are, and are read like the members of a tar; of a compressed one its row group is read up to the
image, so row groups should be small there (Hugging Face's have 100 rows).
"""

from __future__ import annotations

import functools
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

from fewlabels.data.decode import Inside, Payload
from fewlabels.data.parts import UNREADABLE, Part, reading, sampled
from fewlabels.data.places import Span, is_url, open_file, patiently, stamp
from fewlabels.data.shards import called
from fewlabels.data.source import Source, unlabeled
from fewlabels.data.told import with_sequence
from fewlabels.errors import DataError, UsageError, nearest, printable

ROWS = 64
LARGEST_GROUP = 64 << 20  # bytes of pictures in a compressed row group; one picture costs all that stand before it
BETWEEN, PREFIX = 64 << 10, 4  # bytes that a page's header, and a value's length, take at most


@dataclass(frozen=True)
class Cell(Inside):
    """A picture as a row of a row group."""

    column: str
    group: int
    row: int

    def read(self) -> bytes:
        block, row = divmod(self.row, ROWS)
        where = self.place, self.column, self.group, _state(self.place)
        return patiently(self.place, lambda: _rows(*where, block), str(self))[row]


@dataclass(frozen=True)
class Parquet(Part):
    """A parquet file with encoded images: `column` is binary, or a struct with the field bytes."""

    has_addresses = True
    place: str
    column: str
    ends: tuple[int, ...]  # rows up to the end of each row group
    seekable: bool  # whether no row group is so large that one image of it takes too long

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def payloads(self, groups: list[int] | None = None) -> Iterator[Payload]:
        """Each image of these row groups, or of all."""
        with reading(self.place), _file(self.place) as file:
            yield from _images(file, self.column, groups)

    def sample(self, count: int) -> Iterator[Payload]:
        """At most count images, of at most 8 row groups from all over the file."""
        groups = sampled(len(self.ends), min(8, count)).tolist()
        for group in groups:
            yield from islice(self.payloads([group]), count // len(groups))

    def at(self, row: int) -> Payload:
        """A span of the file, where the image lies in it as it is, else a cell."""
        group = bisect_right(self.ends, row)
        inside = row - (self.ends[group - 1] if group else 0)
        with reading(self.place):
            spans = patiently(self.place, lambda: _spans(self.place, self.column, group, _state(self.place)))
        if spans is None:
            return Cell(self.place, f":{row}", self.column, group, inside)
        return Span(self.place, f":{row}", *spans[inside])

    def stamps(self) -> Iterator[bytes]:
        yield stamp(self.place)


def _state(place: str) -> bytes:
    """The state of a file; that of one behind a URL is not asked for with each image, which is compared in any case."""
    return b"" if is_url(place) else stamp(place)


def _images(file: Any, column: str, groups: list[int] | None) -> Iterator[bytes]:
    for batch in file.iter_batches(ROWS, row_groups=groups, columns=[column], use_threads=False):
        for value in batch.column(0).to_pylist():
            yield (value.get("bytes") if isinstance(value, dict) else value) or b""


@functools.lru_cache(maxsize=8)
def _rows(place: str, column: str, group: int, state: bytes, block: int) -> list[bytes]:  # noqa: ARG001
    """The images of a block of ROWS rows; state: with another one they are read anew."""
    with _file(place) as file:
        return list(islice(_images(file, column, [group]), block * ROWS, (block + 1) * ROWS))


@functools.lru_cache(maxsize=8)
def _spans(place: str, column: str, group: int, state: bytes) -> list[tuple[int, int]] | None:  # noqa: ARG001
    """(begin, length) of each image of a row group in the file; None where one does not lie there as it is.

    Found by its bytes and not by the headers of pages: whatever lies between, equal bytes are the image.
    """
    with _file(place) as file, open_file(place) as raw:
        chunk = _chunk(file.metadata.row_group(group), column)
        if chunk.compression != "UNCOMPRESSED":
            return None
        begin = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
        raw.seek(begin)
        dictionary = raw.read(chunk.data_page_offset - begin)
        found, end = [], int(chunk.data_page_offset)
        for image in _images(file, column, [group]):
            if not image:  # none is stored where there is none
                found.append((end, 0))
                continue
            raw.seek(end)
            ahead = raw.read(len(image) + BETWEEN)
            # A plain value stands behind its length of 4 bytes; at a page's first one there is a header before that
            at = PREFIX if ahead.startswith(image, PREFIX) else ahead.find(image)
            if at >= 0:
                end += at + len(image)
                found.append((end - len(image), len(image)))
            elif (at := dictionary.find(image)) >= 0:
                found.append((begin + at, len(image)))
            else:
                return None
        return found


def _chunk(group: Any, column: str) -> Any:
    """What the metadata of a row group say of the pictures."""
    chunks = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    return chunks[f"{column}.bytes" if f"{column}.bytes" in chunks else column]


# --- opening ------------------------------------------------------------------------------------------------------


def open_parquet(place: str) -> Source:
    """The images of a parquet file in the Hugging Face layout: columns `image` (or `img`) and maybe `label`.

    Raises DataError for a damaged or empty file, UsageError without pyarrow.
    """
    with reading(place), _file(place) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
        column, has_paths = _pictures(place, schema)
        labels = _values(file, "label") if "label" in schema.names else None
        paths = [v and v["path"] for v in _values(file, f"{column}.path")] if has_paths else [None] * rows
        source = unlabeled(f"parquet {printable(place)}", _names(place, paths), _part(place, column, file.metadata))
        source = replace(source, classes=_class_names(schema.metadata or {}))
        if not rows:
            raise DataError(f"{place} has no rows", fix="give a file with at least one image")
    if labels is not None:
        return with_sequence(source, labels)
    passed = ", ".join(printable(name) for name in schema.names if name != column)
    words = f"there is no column label, so nothing is labeled by {passed}; rename the one, or give labels"
    return replace(source, notes=(words,) if passed else ())


def _pictures(place: str, schema: Any) -> tuple[str, bool]:
    """The column of encoded pictures, and whether it has their paths too. Raises DataError where there is none."""
    column = next((name for name in ("image", "img") if name in schema.names), None)
    if column is None:
        raise DataError(
            f'{place}: no column "image"{nearest("image", schema.names)}',
            why=f"its columns are {', '.join(schema.names)}",
            fix="rename the column that holds the encoded pictures to image, and their classes to label",
        )
    kind = schema.field(column).type
    fields = [field.name for field in kind] if str(kind).startswith("struct") else []
    if "bytes" not in fields and str(kind) not in ("binary", "large_binary"):
        raise DataError(
            f"{place}: the image column holds {kind}",
            why="it must hold encoded pictures: binary, or a struct with the field bytes",
            fix="write each picture's JPEG or PNG bytes into it",
        )
    return column, "path" in fields


def _values(file: Any, column: str) -> list[Any]:
    return file.read(columns=[column]).column(0).to_pylist()  # type: ignore[no-any-return]


def _names(place: str, paths: list[str | None]) -> tuple[str, ...]:
    """What images are called: as their paths, or as file:row where a path is missing or comes twice."""
    once, file = Counter(paths), called(place).rpartition("/")[2]  # a name that comes twice could be in no table
    shown = (path if path and once[path] == 1 else f"{file}:{row}" for row, path in enumerate(paths))
    return tuple(map(printable, shown))


def _part(place: str, column: str, metadata: Any) -> Parquet:
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [_chunk(group, column) for group in groups]
    small = all(c.compression == "UNCOMPRESSED" or c.total_uncompressed_size <= LARGEST_GROUP for c in chunks)
    return Parquet(place, column, tuple(accumulate(int(group.num_rows) for group in groups)), small)


def _file(place: str) -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UsageError(
            "parquet files need the package pyarrow, which is not installed", fix='pip install "fewlabels[data]"'
        ) from None
    # a large buffer_size and no pre_buffer read page by page, so that a row group of 1 GB is never held whole
    source = open_file(place) if is_url(place) else place
    return parquet.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)


def _class_names(metadata: dict[bytes, bytes]) -> tuple[str, ...] | None:
    """Class names from a schema's metadata: a JSON list class_names, or Hugging Face's features."""
    try:
        if b"class_names" in metadata:
            names = json.loads(metadata[b"class_names"])
        else:
            names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except UNREADABLE:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names) or None
