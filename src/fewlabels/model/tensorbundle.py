"""TensorFlow's checkpoint format (TensorBundle V2) without TensorFlow: names, shapes, checksums, arrays.

    PREFIX.index                      a LevelDB table: name -> where its bytes are, sorted by name
    PREFIX.data-00000-of-00001 ...    the bytes

The files may come from anywhere. Nothing in them is run, no path is taken from them, every length is checked against
the file before it is used, every checksum is compared, and an index may be no larger than 16 MiB.
Sources: tensorflow/core/util/tensor_bundle, tensorflow/core/protobuf/tensor_bundle.proto, the LevelDB table format.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewlabels.errors import DataError, MissingInput

MAGIC = 0xDB4775248B80FB57
FOOTER = 48
MOST_INDEX_BYTES = 16 << 20  # a ResNet-152 with selective kernels, optimizer and averages needs 0.4 MB
MOST_ENTRIES, LONGEST_NAME, MOST_AXES, MOST_SHARDS = 100_000, 1024, 8, 1000
MOST_TEXT_BYTES = 64 << 20
TYPES = {1: "<f4", 2: "<f8", 3: "<i4", 7: "text", 9: "<i8", 10: "?", 14: "bfloat16", 19: "<f2"}
ITEM_BYTES = {"<f4": 4, "<f8": 8, "<i4": 4, "<i8": 8, "?": 1, "bfloat16": 2, "<f2": 2}


@dataclass(frozen=True)
class Entry:
    """Where one variable is. dtype: a numpy dtype, "bfloat16", or "text"."""

    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int | None


class Bundle:
    """A checkpoint: `entries` by variable name, and `read` for one of them."""

    def __init__(self, prefix: Path, entries: Mapping[str, Entry], shards: int) -> None:
        self.prefix, self.entries, self.shards = prefix, dict(entries), shards

    def shard(self, number: int) -> Path:
        """The file of one shard; its name is made here and never read from a file."""
        return self.prefix.with_name(f"{self.prefix.name}.data-{number:05d}-of-{self.shards:05d}")

    def read(self, name: str) -> np.ndarray:
        """One variable as an array (bfloat16 as float32), after its checksum was compared. Raises DataError."""
        entry = self.entries[name]
        if entry.dtype == "text":
            raise _bad(self.prefix, f'"{name}" is text, not numbers')
        raw = self._bytes(entry)
        _compare(self.prefix, f'"{name}"', entry.checksum, crc32c(raw))
        if entry.dtype == "bfloat16":  # the upper half of a float32
            return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(entry.shape)
        return raw.view(entry.dtype).reshape(entry.shape)

    def text(self, name: str) -> bytes:
        """A variable that is a single string: its length, the length's checksum, its bytes."""
        entry = self.entries[name]
        if entry.dtype != "text" or math.prod(entry.shape) != 1 or entry.size > MOST_TEXT_BYTES:
            raise _bad(self.prefix, f'"{name}" is not one text of at most {MOST_TEXT_BYTES >> 20} MiB')
        raw = self._bytes(entry).tobytes()
        length, start = _varint(raw, 0, self.prefix)
        text = raw[start + 4 :]
        if len(text) != length:
            raise _bad(self.prefix, f'"{name}" says it has {length:,} bytes and has {len(text):,}')
        counted = struct.pack("<I", length) + raw[start : start + 4] + text
        _compare(self.prefix, f'"{name}"', entry.checksum, crc32c(np.frombuffer(counted, np.uint8)))
        return text

    def _bytes(self, entry: Entry) -> np.ndarray:
        with self.shard(entry.shard).open("rb") as file:
            file.seek(entry.offset)
            raw = np.fromfile(file, np.uint8, entry.size)
        if len(raw) != entry.size:
            raise _bad(self.prefix, f"{self.shard(entry.shard).name} became shorter while it was read")
        return raw


def open_bundle(prefix: Path) -> Bundle:
    """The checkpoint PREFIX.index with its shards, the index checked end to end. Raises MissingInput, DataError."""
    index = prefix.with_name(prefix.name + ".index")
    if not index.is_file():
        raise MissingInput(f"{index} is not there", fix="give the path of a checkpoint, e.g. DIR/model.ckpt-250228")
    size = index.stat().st_size
    if size > MOST_INDEX_BYTES:
        raise _bad(index, f"it has {size:,} bytes, an index of variables has at most {MOST_INDEX_BYTES:,}")
    records = dict(_table(index.read_bytes(), index))
    header = records.pop(b"", None)
    if header is None:
        raise _bad(index, "it has no header")
    about = dict(_fields(header, index))
    shards = _whole(about.get(1, 1), index)
    if not 1 <= shards <= MOST_SHARDS:
        raise _bad(index, f"it speaks of {shards:,} files of data")
    if about.get(2, 0) != 0:
        raise _bad(index, "it was written on a big-endian machine")
    named = ((key.decode("utf-8", "backslashreplace"), value) for key, value in records.items())
    bundle = Bundle(prefix, {name: _entry(name, value, index) for name, value in named}, shards)
    _check_places(bundle)
    return bundle


def _check_places(bundle: Bundle) -> None:
    """Every variable lies within its shard, and no two of them on the same bytes."""
    paths = [bundle.shard(number) for number in range(bundle.shards)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise MissingInput(
            f"{bundle.prefix} lacks {len(missing)} of its {bundle.shards} files of data",
            details=missing,
            fix="copy all files of the checkpoint into one folder",
        )
    sizes = [path.stat().st_size for path in paths]
    ends = [0] * bundle.shards
    for name, entry in sorted(bundle.entries.items(), key=lambda item: (item[1].shard, item[1].offset)):
        if entry.shard >= bundle.shards:
            raise _bad(bundle.prefix, f'"{name}" is in file {entry.shard} of {bundle.shards}')
        if entry.offset + entry.size > sizes[entry.shard]:
            raise _bad(
                bundle.prefix,
                f'"{name}" ends at byte {entry.offset + entry.size:,} of {paths[entry.shard].name}, '
                f"which has {sizes[entry.shard]:,}",
            )
        if entry.size and entry.offset < ends[entry.shard]:
            raise _bad(bundle.prefix, f'"{name}" lies on the bytes of another variable')
        ends[entry.shard] = max(ends[entry.shard], entry.offset + entry.size)


def _entry(name: str, value: bytes, path: Path) -> Entry:
    found = dict(_fields(value, path))
    if 7 in found:
        raise _bad(path, f'"{name}" is a variable in slices, which the reference does not write')
    kind = _whole(found.get(1, 0), path)
    shape = tuple(_shape(found.get(2, b""), path))
    shard, offset, size = (_whole(found.get(number, 0), path) for number in (3, 4, 5))
    checksum = _whole(found[6], path) if 6 in found else None
    if kind not in TYPES:
        raise _bad(path, f'"{name}" has the data type {kind}, which is no number that we know')
    if TYPES[kind] != "text" and math.prod(shape) * ITEM_BYTES[TYPES[kind]] != size:
        raise _bad(path, f'"{name}" has the shape {shape}, which does not make {size:,} bytes')
    return Entry(TYPES[kind], shape, shard, offset, size, checksum)


def _shape(proto: object, path: Path) -> Iterator[int]:
    axes = [value for number, value in _fields(_raw(proto, path), path) if number == 2]
    if len(axes) > MOST_AXES:
        raise _bad(path, f"a shape has {len(axes)} axes")
    for axis in axes:
        length = _whole(dict(_fields(_raw(axis, path), path)).get(1, 0), path)
        if not 0 <= length < 1 << 40:
            raise _bad(path, f"a shape has an axis of {length}")
        yield length


# --- the table -------------------------------------------------------------------------------------------------


def _table(data: bytes, path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Every (key, value) of a LevelDB table, keys strictly rising."""
    if len(data) < FOOTER or struct.unpack("<Q", data[-8:])[0] != MAGIC:
        raise _bad(path, "it does not end as the index of a TensorFlow checkpoint does")
    footer, last, before, count = data[-FOOTER:], None, 0, 0
    _, _, start = _handle(footer, 0, path)  # of the meta index, which is empty
    offset, size, _ = _handle(footer, start, path)
    for _, handle in _block(data, offset, size, path):
        offset, size, _ = _handle(handle, 0, path)
        if offset < before:  # also what keeps a block from being listed twice, or for ever
            raise _bad(path, "its blocks are not in order")
        before = offset + size
        for key, value in _block(data, offset, size, path):
            count += 1
            if (last is not None and key <= last) or count > MOST_ENTRIES:
                raise _bad(path, "its names are not in order" if count <= MOST_ENTRIES else "it has too many names")
            last = key
            yield key, value


def _block(data: bytes, offset: int, size: int, path: Path) -> Iterator[tuple[bytes, bytes]]:
    """The records of one block: keys share their beginning with the key before."""
    if offset + size + 5 > len(data) - FOOTER:
        raise _bad(path, "a block reaches past the end")
    kind, checksum = struct.unpack_from("<BI", data, offset + size)
    if kind != 0:
        raise _bad(path, "its blocks are compressed, which TensorFlow does not do to an index")
    _compare(path, "a block", checksum, crc32c(np.frombuffer(data, np.uint8, size + 1, offset)))
    block = data[offset : offset + size]
    if size < 4:
        raise _bad(path, "a block is too short")
    restarts = struct.unpack("<I", block[-4:])[0]
    end, at, key = size - 4 - 4 * restarts, 0, b""
    if end < 0:
        raise _bad(path, "a block has more restarts than bytes")
    while at < end:
        shared, at = _varint(block, at, path)
        fresh, at = _varint(block, at, path)
        length, at = _varint(block, at, path)
        if shared > len(key) or shared + fresh > LONGEST_NAME or at + fresh + length > end:
            raise _bad(path, "a record reaches past its block")
        key = key[:shared] + block[at : at + fresh]
        at += fresh + length
        yield key, block[at - length : at]


def _handle(data: bytes, at: int, path: Path) -> tuple[int, int, int]:
    offset, at = _varint(data, at, path)
    size, at = _varint(data, at, path)
    return offset, size, at


# --- protocol buffers ------------------------------------------------------------------------------------------


def _varint(data: bytes, at: int, path: Path) -> tuple[int, int]:
    """A number in 7-bit groups, and where the next byte is."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _bad(path, "a number in it does not end")


def _fields(data: bytes, path: Path) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: bytes of a text or message, else a whole number."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at, path)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at, path)
            yield number, value
            continue
        length = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            length, at = _varint(data, at, path)
        if length is None or at + length > len(data):
            raise _bad(path, "a record in it is not what TensorFlow writes")
        piece = data[at : at + length]
        at += length
        yield number, piece if wire == 2 else int.from_bytes(piece, "little")


def _whole(value: object, path: Path) -> int:
    if not isinstance(value, int):
        raise _bad(path, "a record in it has text where a number belongs")
    return value


def _raw(value: object, path: Path) -> bytes:
    if not isinstance(value, bytes):
        raise _bad(path, "a record in it has a number where a message belongs")
    return value


def object_graph(proto: bytes, path: Path) -> dict[str, str]:
    """TensorFlow 2: key in the checkpoint -> the variable's own name, from the stored graph of objects.

    TrackableObjectGraph.nodes = 1, .attributes = 2, SerializedTensor.full_name = 2, .checkpoint_key = 3.
    """
    names = {}
    for number, node in _fields(proto, path):
        for field, attribute in _fields(_raw(node, path), path) if number == 1 else ():
            if field == 2:
                found = dict(_fields(_raw(attribute, path), path))
                key, name = (_raw(found.get(n, b""), path).decode("utf-8", "backslashreplace") for n in (3, 2))
                names[key] = name
    return names


# --- which checkpoint ------------------------------------------------------------------------------------------


def find_prefix(path: Path) -> Path:
    """The prefix meant by path: itself, one of its files, a folder with a checkpoint in it, or a SavedModel.

    In a folder TensorFlow's note `checkpoint` decides, of which only the last part of the name counts; without it
    the folder must hold one checkpoint.
    """
    if path.is_dir():
        return _prefix_in(path)
    stem = re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", path.name)
    prefix = path.with_name(stem)
    if not prefix.with_name(stem + ".index").is_file():
        one_file = "; a checkpoint is several files" if path.is_file() and stem == path.name else ""
        raise MissingInput(
            f"there is no TensorFlow checkpoint {path}",
            why=f"{stem}.index is not there{one_file}",
            fix="give the folder that holds model.ckpt-*.index and model.ckpt-*.data-*",
        )
    return prefix


def _prefix_in(folder: Path) -> Path:
    places = [folder, folder / "variables", folder / "saved_model" / "variables"]
    for place in places:
        found = {p.name.removesuffix(".index") for p in place.glob("*.index")} if place.is_dir() else set()
        note = place / "checkpoint"
        if found and note.is_file() and note.stat().st_size < 1 << 20:
            said = re.search(r'^model_checkpoint_path: "([^"\n]+)"', note.read_text("utf-8", "replace"), re.MULTILINE)
            name = said[1] if said else ""
            if ".." in name.split("/"):
                raise _bad(note, f'it names "{name}", which is outside of its folder')
            if name.split("/")[-1] in found:
                return place / name.split("/")[-1]
        if len(found) == 1:
            return place / found.pop()
        if found:
            raise DataError(
                f"{place} holds {len(found)} checkpoints", details=sorted(found), fix="give the path of one of them"
            )
    raise MissingInput(f"{folder} holds no TensorFlow checkpoint", why="there is no *.index in it", fix="give another")


# --- checksums -------------------------------------------------------------------------------------------------

LANES = 1 << 15


_TABLE = np.arange(256, dtype=np.uint32)  # what a byte becomes
for _ in range(8):
    _TABLE = np.where(_TABLE & 1, (_TABLE >> 1) ^ np.uint32(0x82F63B78), _TABLE >> 1)
# Two bytes at once: the register after them is a lookup in 65,536 numbers
_PAIRS = _TABLE[_TABLE[np.arange(1 << 16) & 255] & 255] ^ (_TABLE[np.arange(1 << 16) & 255] >> 8)
_PAIRS = (_PAIRS ^ _TABLE[np.arange(1 << 16) >> 8]).astype(np.uint32)


def crc32c(data: np.ndarray) -> int:
    """CRC-32C of bytes (n,) uint8, TensorFlow's checksum.

    The bytes are cut into lanes of equal length that numpy walks down side by side; two neighbours are joined by
    moving the left one on by the right one's length, which is linear in its 32 bits.
    """
    whole = len(data) // (2 * LANES) * (2 * LANES)
    register = 0xFFFFFFFF
    if whole:
        words = np.ascontiguousarray(data[:whole].view("<u2").reshape(LANES, -1).T)  # (steps, lanes)
        registers = np.zeros(LANES, np.uint32)
        registers[0] = register
        for row in words:
            registers = (registers >> 16) ^ _PAIRS[(registers & 0xFFFF) ^ row]
        step = _advance(2 * len(words))
        while len(registers) > 1:
            registers = _apply(step, registers[0::2]) ^ registers[1::2]
            step = _apply(step, step)
        register = int(registers[0])
    for byte in data[whole:].tobytes():
        register = (register >> 8) ^ int(_TABLE[(register ^ byte) & 255])
    return register ^ 0xFFFFFFFF


def _advance(length: int) -> np.ndarray:
    """(32,) uint32: what each bit of the register becomes after `length` zero bytes."""
    total, power = np.uint32(1) << np.arange(32, dtype=np.uint32), np.uint32(1) << np.arange(32, dtype=np.uint32)
    power = (power >> 8) ^ _TABLE[power & 255]  # one byte
    while length:
        if length & 1:
            total = _apply(power, total)
        power, length = _apply(power, power), length >> 1
    return total


def _apply(columns: np.ndarray, registers: np.ndarray) -> np.ndarray:
    """The linear map with these columns (32,) of every register (n,)."""
    moved = np.zeros_like(registers)
    for bit, column in enumerate(columns):
        moved ^= np.where((registers >> np.uint32(bit)) & 1, column, np.uint32(0))
    return moved


def _compare(path: Path, what: str, masked: int | None, found: int) -> None:
    """LevelDB stores checksums rotated and moved by a constant."""
    if masked is not None and masked != ((found >> 15 | found << 17) + 0xA282EAD8) & 0xFFFFFFFF:
        raise _bad(path, f"{what} differs from its checksum")


def _bad(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} is not a whole TensorFlow checkpoint: {reason}",
        why="weights that are not what was saved are worth nothing",
        fix="download or copy it again, all its files together",
    )
