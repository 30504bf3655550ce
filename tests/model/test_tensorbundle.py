"""TensorFlow's checkpoint format: what is read, and that no altered or hostile file is read, hangs or eats memory."""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tensorbundle_writer as writer
from fewlabels.errors import DataError, FewlabelsError, MissingInput
from fewlabels.model import tensorbundle

ARRAYS = {
    "base_model/conv2d/kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "base_model/conv2d_1/kernel": np.linspace(0, 1, 7),
    "global_step": np.int64(1234),
    "half": np.array([0.5, -2], dtype=np.float16),
    "nothing": np.zeros((0, 3), dtype=np.float32),
    **{f"many/variable_{k}": np.full(5, k, dtype=np.int32) for k in range(90)},
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of several blocks and two files of data."""
    return writer.write(tmp_path_factory.mktemp("good") / "model.ckpt-7", ARRAYS | {"text": b"words"}, shards=2)


def opened(prefix: Path) -> dict[str, np.ndarray | bytes]:
    """Everything in a checkpoint."""
    bundle = tensorbundle.open_bundle(prefix)
    return {
        name: bundle.text(name) if entry.dtype == "text" else bundle.read(name)
        for name, entry in bundle.entries.items()
    }


def test_every_variable_is_read_with_its_shape_and_type(good: Path) -> None:
    found = opened(good)
    assert found.pop("text") == b"words"
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        value = found[name]
        assert isinstance(value, np.ndarray)
        assert value.dtype == np.asarray(array).dtype
        assert np.array_equal(value, array)
        assert value.shape == np.shape(array)


def test_bfloat16_becomes_float32(tmp_path: Path) -> None:
    values = np.array([1.0, -0.15625, 3e38], dtype=np.float32)
    raw = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    record = writer.entry(14, (3,), 0, 6, writer.masked(raw))
    (tmp_path / "b.index").write_bytes(writer.table([[(b"", writer.header()), (b"x", record)]]))
    (tmp_path / "b.data-00000-of-00001").write_bytes(raw)
    found = tensorbundle.open_bundle(tmp_path / "b").read("x")
    assert found.dtype == np.float32
    assert found == pytest.approx(values, rel=2**-7)


@pytest.mark.parametrize("length", [0, 1, 9, 4096, 65535, 65536, 65537, 3 * 65536 + 11])
def test_checksum_is_the_slow_one(length: int) -> None:
    data = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8)
    assert tensorbundle.crc32c(data) == writer.slow_crc32c(data.tobytes())


def test_known_checksum() -> None:
    assert tensorbundle.crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283  # RFC 3720, appendix B.4


# --- finding it ------------------------------------------------------------------------------------------------


def test_folder_prefix_and_files_all_mean_the_checkpoint(good: Path) -> None:
    for path in (good, good.parent, good.with_name(good.name + ".index"), good.with_name(good.name + ".meta"),
                 good.with_name(good.name + ".data-00001-of-00002")):  # fmt: skip
        assert tensorbundle.find_prefix(path) == good


def test_saved_model_holds_its_variables_in_a_folder(tmp_path: Path) -> None:
    prefix = writer.write(tmp_path / "saved_model" / "variables" / "variables", {"a": np.float32(1)})
    assert tensorbundle.find_prefix(tmp_path) == prefix
    assert tensorbundle.find_prefix(tmp_path / "saved_model") == prefix


def test_the_note_decides_between_several(tmp_path: Path) -> None:
    for step in (1, 20):
        writer.write(tmp_path / f"model.ckpt-{step}", {"a": np.float32(step)})
    with pytest.raises(DataError, match="holds 2 checkpoints"):
        tensorbundle.find_prefix(tmp_path)
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/home/them/run/model.ckpt-1"\n')
    assert tensorbundle.find_prefix(tmp_path).name == "model.ckpt-1"
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "../../etc/model.ckpt-1"\n')
    with pytest.raises(DataError, match="outside of its folder"):
        tensorbundle.find_prefix(tmp_path)


def test_what_is_not_there_is_said(tmp_path: Path, good: Path) -> None:
    with pytest.raises(MissingInput, match="holds no TensorFlow checkpoint"):
        tensorbundle.find_prefix(tmp_path)
    with pytest.raises(MissingInput, match="there is no TensorFlow checkpoint"):
        tensorbundle.find_prefix(tmp_path / "model.ckpt-9")
    copy = tmp_path / good.name
    copy.with_name(copy.name + ".index").write_bytes(good.with_name(good.name + ".index").read_bytes())
    with pytest.raises(MissingInput, match="lacks 2 of its 2 files") as caught:
        tensorbundle.open_bundle(copy)
    assert "model.ckpt-7.data-00001-of-00002" in caught.value.details[1]


# --- altered files ---------------------------------------------------------------------------------------------


FILES = (".index", ".data-00000-of-00002", ".data-00001-of-00002")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_altered_file_is_refused_or_harmless(good: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever happens to the bytes: one of our errors, or exactly what was written; never anything else."""
    ending = data.draw(st.sampled_from(FILES))
    prefix = tmp_path / good.name
    for other in FILES:
        prefix.with_name(prefix.name + other).write_bytes(good.with_name(good.name + other).read_bytes())
    path = prefix.with_name(prefix.name + ending)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    what = data.draw(st.sampled_from(["flip", "cut", "zero", "insert", "overwrite"]))
    if what == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif what == "cut":
        del content[at:]
    elif what == "zero":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    elif what == "insert":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=40))
    else:
        piece = data.draw(st.binary(min_size=1, max_size=40))
        content[at : at + len(piece)] = piece
    path.write_bytes(bytes(content))
    try:
        found = opened(prefix)
    except FewlabelsError as error:
        assert error.exit_code in (65, 66)
        return
    before = opened(good)
    assert {n: np.asarray(v).tobytes() for n, v in found.items()} == {
        n: np.asarray(v).tobytes() for n, v in before.items()
    }


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=400), ends_well=st.booleans())
def test_noise_is_refused(tmp_path: Path, content: bytes, ends_well: bool) -> None:
    (tmp_path / "n.index").write_bytes(content + (writer.MAGIC if ends_well else b""))
    with pytest.raises(DataError):
        tensorbundle.open_bundle(tmp_path / "n")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(st.tuples(st.binary(max_size=30), st.binary(max_size=60)), max_size=12), sort=st.booleans())
def test_noise_with_right_checksums_is_refused_or_read(tmp_path: Path, records: list, sort: bool) -> None:
    """Records of any content in a well-formed table: the checksums are no protection against its author."""
    (tmp_path / "n.data-00000-of-00001").write_bytes(bytes(100))
    named = [(b"", writer.header()), *(sorted(records) if sort else records)]
    (tmp_path / "n.index").write_bytes(writer.table([named]))
    try:
        opened(tmp_path / "n")
    except FewlabelsError as error:
        assert error.exit_code == 65


# --- hostile files ---------------------------------------------------------------------------------------------


def _one(value: bytes, *, head: bytes | None = None) -> bytes:
    return writer.table([[(b"", writer.header() if head is None else head), (b"a", value)]])


def _crowd() -> bytes:
    """1,500 handles to one block of 90 names: a table that would be read for ever if it went in circles."""
    records = [(b"%04d" % n, b"") for n in range(90)]
    place = writer.varint(0) + writer.varint(len(writer.block(records)) - 5)
    return writer.table([records], handles=[place] * 1500)


LATE = writer.varint(1 << 40) + writer.varint(1 << 40)
LONG = [(b"k" * (n + 1), b"") for n in range(2000)]  # each name shares all of the one before: 6 kB make 2 MB
HOSTILE = {
    "a shard count of a million": (_one(b"", head=writer.number(1, 1_000_000)), "1,000,000 files"),
    "no shards": (_one(b"", head=writer.number(1, 0)), "0 files"),
    "a negative shard count": (_one(b"", head=writer.number(1, (1 << 64) - 3)), "files of data"),
    "big endian": (_one(b"", head=writer.header(endianness=1)), "big-endian"),
    "no header": (writer.table([[(b"a", b"")]]), "no header"),
    "a block past the end": (writer.table([[(b"", b"")]], handles=[LATE]), "past the end"),
    "the same block again and again": (_crowd(), "not in order"),
    "a block that is the index itself": (
        writer.table([[(b"", writer.header())]], handles=[writer.varint(0) + writer.varint(0)]), "checksum",
    ),
    "a shape too large for its bytes": (_one(writer.entry(1, (1 << 30, 1 << 30), 0, 40, 0)), "does not make 40 bytes"),
    "an axis beyond all": (_one(writer.entry(1, (1 << 50,), 0, 1 << 52, 0)), "an axis of"),
    "a negative axis": (_one(writer.entry(1, ((1 << 64) - 1,), 0, 40, 0)), "an axis of"),
    "a hundred axes": (_one(writer.entry(1, (1,) * 100, 0, 4, 0)), "100 axes"),
    "a variable past its file": (_one(writer.entry(1, (1000,), 90, 4000, 0)), "ends at byte 4,090"),
    "a variable in no file": (_one(writer.entry(1, (1,), 0, 4, 0, shard=8)), "file 8 of 1"),
    "a text of all bytes": (_one(writer.entry(7, (), 0, 1 << 60, 0)), "ends at byte"),
    "an unknown type": (_one(writer.entry(99, (1,), 0, 4, 0)), "data type 99"),
    "a resource": (_one(writer.entry(20, (1,), 0, 4, 0)), "data type 20"),
    "a variable in slices": (_one(writer.entry(1, (1,), 0, 4, 0) + writer.message(7, b"")), "in slices"),
    "a number as shape": (_one(writer.number(1, 1) + writer.number(2, 9)), "where a message belongs"),
    "a message as offset": (_one(writer.number(1, 1) + writer.message(4, b"x")), "where a number belongs"),
    "a group, which nobody writes": (_one(b"\x0b"), "not what TensorFlow writes"),
    "a text longer than its record": (_one(b"\x12\xff\xff\xff\x7f"), "not what TensorFlow writes"),
    "a number that does not end": (_one(b"\x08" + b"\xff" * 30), "does not end"),
    "names that grow": (writer.table([LONG]), "reaches past its block"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_index_is_refused_quickly_and_in_little_memory(tmp_path: Path, case: str) -> None:
    content, reason = HOSTILE[case]
    (tmp_path / "h.index").write_bytes(content)
    (tmp_path / "h.data-00000-of-00001").write_bytes(bytes(100))
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(DataError, match=reason):
        opened(tmp_path / "h")
    assert time.process_time() - began < 5  # a minute's hang would be found, a slow machine is not
    assert tracemalloc.get_traced_memory()[1] < 32e6
    tracemalloc.stop()


def test_two_variables_on_the_same_bytes_are_refused(tmp_path: Path) -> None:
    """Or a small file could be read as any number of gigabytes."""
    same = writer.entry(1, (25,), 0, 100, writer.masked(bytes(100)))
    records = [(b"", writer.header()), *((b"v%04d" % n, same) for n in range(50))]
    (tmp_path / "h.index").write_bytes(writer.table([records]))
    (tmp_path / "h.data-00000-of-00001").write_bytes(bytes(100))
    with pytest.raises(DataError, match="on the bytes of another"):
        tensorbundle.open_bundle(tmp_path / "h")


def test_compressed_blocks_are_refused(tmp_path: Path) -> None:
    data = writer.sealed(b"snappy", kind=1)
    meta = writer.varint(len(data)) + writer.varint(8)
    tail = writer.block([])
    index = writer.block([(b"a", writer.varint(0) + writer.varint(6))])
    footer = meta + writer.varint(len(data) + len(tail)) + writer.varint(len(index) - 5)
    (tmp_path / "h.index").write_bytes(data + tail + index + footer.ljust(40, b"\0") + writer.MAGIC)
    with pytest.raises(DataError, match="compressed"):
        tensorbundle.open_bundle(tmp_path / "h")


def test_an_index_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "h.index").open("wb") as file:
        file.truncate(3 << 30)  # sparse
    with pytest.raises(DataError, match="at most 16,777,216"):
        tensorbundle.open_bundle(tmp_path / "h")


@pytest.mark.parametrize("length", [0, 4, 6, 1 << 40])
def test_a_text_whose_length_lies_is_refused(tmp_path: Path, length: int) -> None:
    raw = writer.varint(length) + struct.pack("<I", 0) + b"words"
    record = writer.entry(7, (), 0, len(raw), 0)
    (tmp_path / "h.index").write_bytes(writer.table([[(b"", writer.header()), (b"a", record)]]))
    (tmp_path / "h.data-00000-of-00001").write_bytes(raw)
    with pytest.raises(DataError, match="says it has"):
        opened(tmp_path / "h")
