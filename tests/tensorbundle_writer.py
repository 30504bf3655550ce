"""Writes TensorFlow checkpoints, good and hostile ones, from the format's description; no code of the reader's."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
TYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}


def slow_crc32c(data: bytes) -> int:
    """CRC-32C bit by bit."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def _table() -> list[int]:
    table = []
    for n in range(256):
        for _ in range(8):
            n = (n >> 1) ^ (0x82F63B78 if n & 1 else 0)
        table.append(n)
    return table


_STEPS = _table()


def masked(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register = _STEPS[(register ^ byte) & 255] ^ (register >> 8)
    crc = register ^ 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def message(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def entry(dtype: int, shape: Sequence[int], offset: int, size: int, checksum: int, shard: int = 0) -> bytes:
    """A BundleEntryProto."""
    axes = b"".join(message(2, number(1, axis)) for axis in shape)
    return (
        number(1, dtype) + message(2, axes) + number(3, shard) + number(4, offset) + number(5, size)
        + varint(6 << 3 | 5) + struct.pack("<I", checksum)
    )  # fmt: skip


def block(records: Sequence[tuple[bytes, bytes]], restart_every: int = 16) -> bytes:
    """A table block with its type and checksum behind it."""
    data, restarts, before = bytearray(), [], b""
    for index, (key, value) in enumerate(records):
        shared = 0
        if index % restart_every == 0:
            restarts.append(len(data))
        else:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        data += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    data += b"".join(struct.pack("<I", r) for r in restarts or [0]) + struct.pack("<I", len(restarts or [0]))
    return sealed(bytes(data))


def sealed(data: bytes, kind: int = 0) -> bytes:
    return data + bytes([kind]) + struct.pack("<I", masked(data + bytes([kind])))


def table(blocks: Sequence[Sequence[tuple[bytes, bytes]]], handles: Sequence[bytes] | None = None) -> bytes:
    """A whole index file. handles: in place of the true places of the blocks."""
    data, index = bytearray(), []
    for number_, records in enumerate(blocks):
        made = block(records)
        place = varint(len(data)) + varint(len(made) - 5)
        index.append((records[-1][0] if records else b"", handles[number_] if handles else place))
        data += made
    for extra in (handles or [])[len(blocks) :]:
        index.append((b"\xff" + bytes([len(index) & 255]), extra))
    meta = varint(len(data)) + varint(8)
    data += block([])
    made = block(index, restart_every=1)
    footer = meta + varint(len(data)) + varint(len(made) - 5)
    return bytes(data) + made + footer.ljust(40, b"\0") + MAGIC


def header(shards: int = 1, endianness: int = 0) -> bytes:
    return number(1, shards) + (number(2, endianness) if endianness else b"") + message(3, number(1, 1))


def write(prefix: Path, variables: Mapping[str, np.ndarray | bytes], *, shards: int = 1, per_block: int = 40) -> Path:
    """A checkpoint with these variables; bytes become a text variable. Returns the prefix."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    data = [bytearray() for _ in range(shards)]
    records = [(b"", header(shards))]
    for index, name in enumerate(sorted(variables, key=str.encode)):
        value, shard = variables[name], index % shards
        offset = len(data[shard])
        if isinstance(value, bytes):
            length = struct.pack("<I", masked(struct.pack("<I", len(value))))
            raw = varint(len(value)) + length + value
            checksum = masked(struct.pack("<I", len(value)) + length + value)
            kind, shape = 7, ()
        else:
            raw = np.asarray(value).tobytes()
            checksum, kind, shape = masked(raw), TYPES[np.asarray(value).dtype.name], np.asarray(value).shape
        data[shard] += raw
        records.append((name.encode(), entry(kind, shape, offset, len(raw), checksum, shard)))
    for shard, raw in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}").write_bytes(bytes(raw))
    blocks = [records[at : at + per_block] for at in range(0, len(records), per_block)]
    prefix.with_name(prefix.name + ".index").write_bytes(table(blocks))
    return prefix


def graph(names: Mapping[str, str]) -> bytes:
    """TensorFlow 2's graph of objects: key in the checkpoint -> the variable's own name."""
    attributes = [
        message(1, b"VARIABLE_VALUE") + message(2, n.encode()) + message(3, k.encode()) for k, n in names.items()
    ]
    return b"".join(message(1, message(2, attribute)) for attribute in attributes)
