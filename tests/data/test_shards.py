"""Pictures in tar and parquet shards, here and behind a URL, against the same pictures in a folder."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

import fewlabels as fl
from conftest import same, shapes_images
from fewlabels import checkpoint, runtime
from fewlabels.asked import Asked
from fewlabels.data import decode, labels, loader, parquet, pixels, places, shards
from fewlabels.data.source import Source
from fewlabels.data.sources import open_source
from fewlabels.errors import DataError, FewlabelsError, MissingInput, StorageError, UsageError

COUNT, SHARDS = 40, 3
CPU = torch.device("cpu")
GREEN = np.full((6, 8, 3), (20, 200, 30), np.uint8)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(places, "PAUSE", 0.0)


def png(pixels: np.ndarray = GREEN) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo], **how: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **how) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_parquet(path: Path, rows: list[tuple[str, bytes, int | None]], **how: object) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": raw, "path": name} for name, raw, _ in rows]
    pq.write_table(pa.table({"image": images, "label": pa.array([y for *_, y in rows], pa.int64())}), path, **how)
    return path


@pytest.fixture
def forms(tmp_path: Path) -> dict[str, Path]:
    """The same pictures, one of them broken, in class folders and in shards of four kinds."""
    images, classes = shapes_images(COUNT, size=24, seed=5)
    rows = []
    for i in np.argsort(classes, kind="stable").tolist():
        raw = b"\xff\xd8\xff broken" if i == 7 else png(images[i])
        label = int(classes[i]) if i < 24 else None
        folder = f"{label}" if label is not None else "unlabeled"
        rows.append((f"{folder}/{i:03d}.png", raw, label))
    rows.sort()
    packed = {"labels": {}, "places": {}, "plain": {}, "snappy": {}}
    for name, raw, _ in rows:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    for number, part in enumerate(np.array_split(np.arange(COUNT), SHARDS)):
        mine = [rows[i] for i in part]
        with_labels: dict[str, bytes | tarfile.TarInfo] = {}
        for name, raw, label in mine:
            stem = Path(name).stem
            with_labels |= {f"{stem}.png": raw} | ({f"{stem}.cls": f"{label}\n".encode()} if label is not None else {})
        write_tar(tmp_path / f"labels/shard-{number:03d}.tar", with_labels)
        write_tar(tmp_path / f"places/shard-{number:03d}.tar", {name: raw for name, raw, _ in mine})
        write_parquet(tmp_path / f"plain/{number}.parquet", mine, row_group_size=8, compression="none")
        write_parquet(tmp_path / f"snappy/{number}.parquet", mine, row_group_size=8)
    return {name: tmp_path / name for name in ("folder", *packed)}


def assembled(images: object, out: Path, store: str, threads: int = 2) -> labels.Dataset:
    source = open_source(images)
    built, kept, _ = pixels.build(
        source, out, working_size=24, bad_csv=out.with_suffix(".csv"), threads=threads, store=store, max_bad_share=0.1
    )
    return labels.assemble(source, built, kept)


def batches(dataset: labels.Dataset, first: int = 0) -> list[loader.Batch]:
    order = loader.Order(dataset.train, batch=8, seed=1)
    return list(loader.training_batches(dataset, order, first_step=first, last_step=12, device=CPU))


def equal(ours: list[loader.Batch], theirs: list[loader.Batch]) -> bool:
    fields = ("pixels", "extent", "ids", "labels")
    return len(ours) == len(theirs) and all(
        torch.equal(getattr(one, field), getattr(other, field)) and one.epoch == other.epoch
        for one, other in zip(ours, theirs, strict=True)
        for field in fields
    )


# --- the same as a folder ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["labels", "places", "plain", "snappy"])
@pytest.mark.parametrize("store", ["pixels", "streamed"])
def test_batches_are_those_of_the_folder(forms: dict[str, Path], tmp_path: Path, form: str, store: str) -> None:
    """Ids, pixels, labels: from the start and from the middle, on one thread and two, for each of two ranks."""
    theirs = assembled(forms["folder"], tmp_path / "out-folder", "pixels")
    whole = batches(theirs)
    for threads in (1, 2):
        ours = assembled(forms[form], tmp_path / f"out-{threads}", store, threads)
        assert ours.store.streamed == (store == "streamed")
        assert ours.store.digest == theirs.store.digest
        assert ours.classes == theirs.classes
        assert ours.understood.unreadable == 1
        assert equal(batches(ours), whole)
        assert equal(batches(ours, first=5), whole[5:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "world_size", lambda: 2)
        for rank in (0, 1):
            patch.setattr(runtime, "rank", lambda rank=rank: rank)
            again = assembled(forms[form], tmp_path / f"out-rank{rank}", store)
            assert equal(batches(again), batches(theirs))
            assert torch.equal(batches(again)[3].ids, whole[3].ids[4 * rank : 4 * rank + 4])
    # A store knows its pictures without its source
    reopened = pixels.open_store(tmp_path / "out-1")
    assert torch.equal(reopened.read(np.arange(len(reopened)))[0], theirs.store.read(np.arange(len(reopened)))[0])


def test_a_run_on_shards_learns_what_one_on_the_folder_does(forms: dict[str, Path], tmp_path: Path) -> None:
    """Bit for bit, though it was stopped by a picture that changed, and went on."""
    small = {"epochs": 3, "batch": 8, "optimizer": "adamw", "learning_rate": 0.002, "scaling": "none"}
    asked = {"recipe": "smoke", "until": "pretrain", "pretrain": small, "max_bad": 0.1}
    fl.fit(forms["folder"], out=tmp_path / "theirs", **asked)
    shard = forms["labels"] / "shard-001.tar"
    raw, read = shard.read_bytes(), pixels.OnDemand.fill

    def fill(self: pixels.OnDemand, canvas: np.ndarray, rows: list[int]) -> None:
        if any((tmp_path / "ours").glob("pretrain/step-*")):
            shard.write_bytes(raw[: len(raw) // 4])
        read(self, canvas, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels.OnDemand, "fill", fill)
        with pytest.raises(DataError, match=r"shard-001\.tar/\d+\.png cannot be read any more: .* bytes came"):
            fl.fit(forms["labels"], out=tmp_path / "ours", store="streamed", **asked)
    stopped = checkpoint.glance(tmp_path / "ours" / "pretrain")
    assert stopped is not None and stopped["step"] > 0
    shard.write_bytes(raw)
    fl.fit(forms["labels"], out=tmp_path / "ours", store="streamed", **asked)
    (ours, _), (theirs, _) = (checkpoint.latest(tmp_path / run / "pretrain") for run in ("ours", "theirs"))
    assert ours is not None and theirs is not None
    assert same(ours.tensors, theirs.tensors)


def test_one_picture_comes_from_where_it_lies(forms: dict[str, Path], tmp_path: Path) -> None:
    """Uncompressed parquet is read by spans, also what a dictionary holds; compressed by row groups."""
    kinds = {
        form: {type(open_source(forms[form]).at(i)) for i in range(COUNT)} for form in ("plain", "snappy", "labels")
    }
    assert kinds == {"plain": {places.Span}, "snappy": {parquet.Cell}, "labels": {places.Span}}
    rng = np.random.default_rng(2)
    rows = [(f"{i}", rng.bytes(int(rng.integers(1, 90_000))) if i % 3 else b"again" * 50, 0) for i in range(60)]
    rows[5:8] = [(f"{i}", None, 0) for i in range(5, 8)]
    for how in ({"use_dictionary": False}, {"use_dictionary": True}, {"data_page_size": 1000, "write_batch_size": 2},
                {"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}},
                {"compression": "gzip", "row_group_size": 200}):  # fmt: skip
        source = open_source(write_parquet(tmp_path / "a.parquet", rows, **{"compression": "none", **how}))
        assert [source.at(i).read() for i in range(60)] == [raw or b"" for _, raw, _ in rows]  # type: ignore[union-attr]
        if how == {"use_dictionary": False}:
            assert {type(source.at(i)) for i in range(60)} == {places.Span}, "also beside empty ones"


def test_large_compressed_row_groups_cannot_be_streamed(
    forms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "LARGEST_GROUP", 1000)
    with pytest.raises(UsageError, match="cannot be streamed") as refused:
        assembled(forms["snappy"], tmp_path / "out", "streamed")
    assert "compression='none'" in refused.value.fix
    assert len(assembled(forms["plain"], tmp_path / "out", "streamed").store) == COUNT - 1


def test_source_at_is_its_stream(forms: dict[str, Path], tmp_path: Path) -> None:
    source = open_source(forms["labels"], test=forms["plain"])
    streamed = [p if isinstance(p, bytes) else p.read() for p in source.payloads()]  # type: ignore[union-attr]
    assert [source.at(i).read() for i in range(len(source))] == streamed  # type: ignore[union-attr]


# --- labels and names --------------------------------------------------------------------------------------------


def content(source: Source) -> list[tuple[str, str | None, str]]:
    return list(zip(source.names, source.labels, source.splits, strict=True))


def test_labels_beside_pictures(tmp_path: Path) -> None:
    pictures = dict.fromkeys(("x/1.jpg", "2.png", "3.PNG", ".hidden.png", "note.md"), b"")
    told = {"x/1.cls": b"7", "2.txt": b"dog", "3.cls": b"-1", "1.cls": b"5"}
    write_tar(tmp_path / "a/train-0.tar", pictures | told)
    write_tar(tmp_path / "a/deep/my-val-0.tar", {"./4.jpg": b"", "./4.cls": b"0007"})
    assert content(open_source(tmp_path / "a")) == [
        ("deep/my-val-0.tar/4.jpg", "7", "val"),
        ("train-0.tar/x/1.jpg", "7", "train"),
        ("train-0.tar/2.png", None, "train"),
        ("train-0.tar/3.PNG", None, "train"),
    ]
    told = {"1.json": b'{"label": "cat"}', "2.json": b'{"label": null}', "3.json": b"[1]", "4.json": b'{"label": 3}'}
    path = write_tar(tmp_path / "b-test.tar", {f"{i}.jpg": b"" for i in range(1, 5)} | told)
    assert content(open_source(path)) == [
        (f"b-test.tar/{i}.jpg", label, "train") for i, label in enumerate(("cat", None, None, "3"), start=1)
    ]
    write_tar(path, {"1.jpg": b"", "1.txt": b"golden retriever", "2.jpg": b"", "2.txt": "Bär\n".encode()})
    assert open_source(path).labels == ("golden retriever", "Bär")
    for name, raw in (("1.cls", b"\xff"), ("1.json", b"{")):
        write_tar(path, {"1.jpg": b"", name: raw})
        with pytest.raises(DataError, match=rf"b-test\.tar/{name} cannot be read"):
            open_source(path)
    write_tar(path, {"1.jpg": b"", "1.cls": b"none"})
    with pytest.raises(DataError, match="is not a class"):
        open_source(path)


def test_captions_are_no_labels(tmp_path: Path) -> None:
    texts = {f"{i}.txt": f"a photo of {i} dogs on some beach".encode() for i in range(5)}
    source = open_source(write_tar(tmp_path / "a.tar", {f"{i}.jpg": b"" for i in range(5)} | texts))
    assert set(source.labels) == {None}
    assert "captions" in source.description


def test_packed_class_folders(tmp_path: Path) -> None:
    names = ("photos/train/cat/1.jpg", "photos/train/unlabeled/2.jpg", "photos/test/dog/3.jpg")
    write_tar(tmp_path / "a.tar", dict.fromkeys(names, b""))
    assert content(open_source(tmp_path / "a.tar")) == [
        ("a.tar/photos/train/cat/1.jpg", "cat", "train"),
        ("a.tar/photos/train/unlabeled/2.jpg", None, "train"),
        ("a.tar/photos/test/dog/3.jpg", "dog", "test"),
    ]
    write_tar(tmp_path / "a.tar", dict.fromkeys(("none/1.jpg", "crack/2.jpg"), b""))  # classes, as on a disk
    assert open_source(tmp_path / "a.tar").labels == ("none", "crack")
    write_tar(tmp_path / "a.tar", dict.fromkeys(("all/1.jpg", "all/2.jpg"), b""))
    assert set(open_source(tmp_path / "a.tar").labels) == {None}


def test_a_csv_names_pictures_in_shards(tmp_path: Path) -> None:
    for number in (0, 1):
        write_tar(tmp_path / f"s/{number}.tar", {"x/1.jpg": b"", f"{number}.jpg": b""})
    table = tmp_path / "labels.csv"
    table.write_text("image,label,split\n0.tar/x/1.jpg,cat,\n1.tar/1.jpg,dog,test\n")
    assert content(open_source(tmp_path / "s", table)) == [
        ("0.tar/x/1.jpg", "cat", "train"),
        ("0.tar/0.jpg", None, "train"),
        ("1.tar/x/1.jpg", None, "train"),
        ("1.tar/1.jpg", "dog", "test"),
    ]
    table.write_text("image,label\n0.tar/1.jpg,cat\n")
    with pytest.raises(DataError, match=r'no image "0\.tar/1\.jpg"'):
        open_source(tmp_path / "s", table)


def test_other_fields_of_a_sample_are_no_pictures(tmp_path: Path) -> None:
    names = ("d.1/7.jpg", "d.1/7.seg.png", "d.1/IMG.2019.jpg", "d.1/IMG.2020.jpg")
    path = write_tar(tmp_path / "a.tar", dict.fromkeys(names, b"") | {"d.1/IMG.2020.cls": b"1"})
    found = [(name.rpartition("/")[2], label) for name, label, _ in content(open_source(path))]
    assert found == [("7.jpg", None), ("IMG.2019.jpg", None), ("IMG.2020.jpg", "1")]


def test_pictures_passed_over_are_counted(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", dict.fromkeys(("7.jpg", "7.seg.png", "7.depth.png", "8.jpg"), b""))
    for _ in range(2):  # read, and from the cache
        (note,) = open_source(path).notes
        assert note.startswith("2 pictures beside another of their sample")


def test_a_field_of_a_sample_has_the_label_of_the_sample(tmp_path: Path) -> None:
    members = {"7.img.png": b"", "7.cls": b"cat", "8.img.png": b"", "8.img.cls": b"dog", "8.cls": b"ant"}
    assert open_source(write_tar(tmp_path / "a.tar", members)).labels == ("cat", "dog")
    members = {"7.img.png": b"", "7.seg.png": b"", "7.cls": b"cat"}  # which of them it is of is not said
    assert open_source(write_tar(tmp_path / "a.tar", members)).labels == (None, None)


def test_no_number_in_json_is_no_label(tmp_path: Path) -> None:
    members = {"1.png": b"", "1.json": b'{"label": NaN}', "2.png": b"", "2.json": b'{"label": 3}'}
    source = open_source(write_tar(tmp_path / "a.tar", members))
    assert source.labels == (None, "3")
    assert [span.fault for span in source.payloads()] == ["", ""]  # type: ignore[union-attr]
    for label in ("Infinity", "[NaN]"):
        with pytest.raises(DataError, match="label"):
            open_source(write_tar(tmp_path / "a.tar", members | {"1.json": f'{{"label": {label}}}'.encode()}))


def test_splits_in_a_tar_count_beside_labels(tmp_path: Path) -> None:
    members = {"d/train/1.png": b"", "d/train/1.cls": b"cat", "d/test/2.png": b"", "d/test/2.cls": b"dog"}
    found = content(open_source(write_tar(tmp_path / "a.tar", members)))
    assert [row[1:] for row in found] == [("cat", "train"), ("dog", "test")]
    found = content(open_source(write_tar(tmp_path / "a.tar", members | {"d/more/3.png": b"", "d/more/3.cls": b"ant"})))
    assert [row[1:] for row in found] == [("cat", "train"), ("dog", "test"), ("ant", "train")]


@pytest.mark.parametrize(
    ("members", "refused"),
    [
        ([("1.png", b""), ("1.cls", b"cat"), ("1.png", b""), ("1.cls", b"dog")], 2),
        ([("1.png", b""), ("1.png", b""), ("1.cls", b"dog")], 2),
        ([("1.png", b""), ("1.cls", b"cat"), ("1.cls", b"dog")], 1),
        ([("1.png", b""), ("1.cls", b"cat"), ("1.cls", b"cat")], 0),
        ([("1.png", b""), ("1.png", b"")], 1),
    ],
)
def test_no_label_is_guessed_where_a_name_comes_twice(
    tmp_path: Path, members: list[tuple[str, bytes]], refused: int
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, text in [*members, ("2.png", b"")]:
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    spans = list(open_source(tmp_path / "a.tar").payloads())
    faults = [span.fault for span in spans]  # type: ignore[union-attr]
    assert sum("in the shard twice" in fault for fault in faults) == refused
    assert faults[-1] == ""


def test_shards_of_a_folder_are_known_by_the_same_names_however_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("test-00.tar", "sub/train-00.tar"):
        write_tar(tmp_path / "in" / name, {f"{name[0]}.jpg": b""})
    whole = content(open_source(tmp_path / "in"))
    assert whole == [("sub/train-00.tar/s.jpg", None, "train"), ("test-00.tar/t.jpg", None, "test")]
    monkeypatch.chdir(tmp_path / "in")
    for spelled in (".", "./", "../in", "..//in/", f"{tmp_path}/in/."):
        assert content(open_source(spelled)) == whole, spelled


def test_a_shards_own_name_tells_its_split_before_its_folders(tmp_path: Path) -> None:
    names = ("my-test-set/train-0", "my-test-set/1", "train/val-0", "x{0..1}", "testing-0", "my-test-set/training-1")
    for name in (f"{name}.tar" for name in names):
        write_tar(tmp_path / name, {f"{name}.jpg": b""})
    splits = {name.split(".tar/")[0]: split for name, _, split in content(open_source(tmp_path))}
    assert splits == {
        "my-test-set/train-0": "train", "my-test-set/1": "test", "train/val-0": "val", "x{0..1}": "train",
        "testing-0": "test", "my-test-set/training-1": "train",
    }  # fmt: skip
    assert len(open_source(tmp_path / "x{0..1}.tar")) == 1, "a file of that very name"


def test_linked_folders_of_shards_are_entered_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/a.tar", {"1.jpg": b""})
    write_tar(tmp_path / "disk/b.tar", {"2.jpg": b""})
    (tmp_path / "in/more").symlink_to("../disk")
    (tmp_path / "in/loop").symlink_to(".")
    assert open_source(tmp_path / "in").names == ("a.tar/1.jpg", "more/b.tar/2.jpg")


def test_shards_beside_pictures_are_named_and_stay_named_under_a_table(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/data/a.tar", {"1.jpg": b""})
    (tmp_path / "in/logo.png").write_bytes(png())
    table = tmp_path / "labels.csv"
    table.write_text("image,label\nin/logo.png,cat\n")
    for labels_ in (None, table):
        (note,) = open_source(tmp_path / "in", labels_).notes
        assert note == "1 .tar or .parquet files beside pictures are passed over"


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_odd_names(tmp_path: Path, form: int) -> None:
    names = ["d/" * 80 + "1.jpg", os.fsdecode(b"\xff.jpg"), "é\n.jpg"]
    raws = {name: png(np.full((4, 4, 3), i, np.uint8)) for i, name in enumerate(names)}
    path = write_tar(tmp_path / "a.tar", raws, format=form)
    for _ in range(2):  # read, and from the cache
        source = open_source(path)
        assert source.names == (f"a.tar/{names[0]}", "a.tar/%FF.jpg", "a.tar/é%0A.jpg")
        assert [span.read() for span in source.payloads()] == list(raws.values())  # type: ignore[union-attr]


def test_a_pattern_names_every_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(8, 12):
        write_tar(tmp_path / f"s/val-{number:03d}.tar", {f"{number}.jpg": b""})
    monkeypatch.chdir(tmp_path)
    source = open_source("s/val-{008..011}.tar")
    assert content(source)[0] == ("val-008.tar/8.jpg", None, "train")
    assert len(source) == 4
    with pytest.raises(MissingInput, match="1 of 5 files are missing") as missing:
        open_source("s/val-{008..012}.tar")
    assert missing.value.details == ("s/val-012.tar",)
    words = Asked(images="s/val-{008..011}.tar", test="memory://b/{0..1}.tar", labels="s", out=tmp_path).inputs()
    assert words == {
        "images": str(tmp_path / "s/val-{008..011}.tar"),
        "test": "memory://b/{0..1}.tar",
        "labels": str(tmp_path / "s"),
    }


# --- refused -----------------------------------------------------------------------------------------------------


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def test_what_is_no_picture_is_named_and_nothing_is_unpacked(tmp_path: Path) -> None:
    members: dict[str, bytes | tarfile.TarInfo] = {f"{i}.png": png(np.full((8, 8, 3), i, np.uint8)) for i in range(9)}
    members |= {
        "../out.png": png(), "/abs.png": png(), "a/../b.png": png(), "cut.png": png()[:20],
        "link.png": special("link.png", tarfile.SYMTYPE, "/etc/passwd"),
        "hard.png": special("hard.png", tarfile.LNKTYPE, "1.png"),
        "null.png": special("null.png", tarfile.CHRTYPE), "pipe.png": special("pipe.png", tarfile.FIFOTYPE),
        "dir.png": special("dir.png", tarfile.DIRTYPE), "latest": special("latest", tarfile.SYMTYPE, "1.png"),
    }  # fmt: skip
    path = write_tar(tmp_path / "in/a.tar", members)
    with tarfile.open(path, "a") as archive:
        archive.addfile(special("1.png", tarfile.REGTYPE))
    source = open_source(tmp_path / "in")
    _, kept, bad = pixels.build(
        source, tmp_path / "out", working_size=8, bad_csv=tmp_path / "bad.csv", threads=2, max_bad_share=0.6,
        store="streamed",
    )  # fmt: skip
    assert kept.tolist() == list(range(9))
    reasons = {image.name.removeprefix("a.tar/"): image.reason for image in bad}
    assert {name: reason for name, reason in reasons.items() if "leads out" in reason}.keys() == {
        "../out.png", "/abs.png", "a/../b.png",
    }  # fmt: skip
    assert "a link" in reasons["link.png"] and "a link" in reasons["hard.png"]
    assert "pipe or device" in reasons["null.png"] and "pipe or device" in reasons["pipe.png"]
    assert reasons["cut.png"].startswith("damaged")
    assert "in the shard twice" in reasons["1.png (again, 1)"]
    assert len(bad) == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.csv", "cache", "in", "out"]
    assert [p.name for p in (tmp_path / "in").iterdir()] == ["a.tar"]


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    member = special("s.png", tarfile.GNUTYPE_SPARSE)
    path = write_tar(tmp_path / "a.tar", {"s.png": member, "1.png": png()}, format=tarfile.GNU_FORMAT)
    with pytest.raises(decode.BadPicture, match="sparse"):
        decode.decode(next(open_source(path).payloads()))


def damaged(raw: bytes, how: str) -> bytes:
    if how == "empty":
        return b""
    if how == "in a picture":
        return raw[:700]
    if how == "between members":
        return raw[:1024]
    if how == "a header":
        return raw[:1030] + b"\xff\xff" + raw[1032:]
    if how == "first header":
        return b"\xff" + raw[1:]
    return raw + raw  # two tars


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("how", ["empty", "in a picture", "between members", "a header", "first header", "two tars"])
def test_a_damaged_tar_is_an_error(tmp_path: Path, how: str, away: bool) -> None:
    path = write_tar(tmp_path / "s/b.tar", {f"{i}.png": png() for i in range(5)})
    assert len(open_source(tmp_path / "s")) == 5
    raw = path.read_bytes()
    assert raw[1024:1029] == b"1.png"
    path.write_bytes(damaged(raw, how))
    with pytest.raises(DataError, match=r"b\.tar cannot be read") as error:
        open_source(f"file://{tmp_path}/s" if away else tmp_path / "s")
    assert error.value.exit_code == 65


def test_a_member_of_negative_size_is_an_error(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("1.png").tobuf())
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(DataError, match=r"negative size|invalid offset"):  # ours, or that of Python's newer tarfile
        open_source(tmp_path)


def test_hidden_files_and_folders_with_a_shards_name_are_passed_over(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.png": b""})
    (tmp_path / "b.tar").mkdir()
    (tmp_path / "._a.tar").write_bytes(b"Mac OS X")
    os.mkfifo(tmp_path / "c.tar")
    assert open_source(tmp_path).names == ("a.tar/1.png",)


def test_shards_without_pictures_and_of_two_kinds(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.cls": b"1"})
    with pytest.raises(DataError, match="holds no pictures"):
        open_source(tmp_path)
    write_parquet(tmp_path / "b.parquet", [("1", png(), 1)])
    with pytest.raises(DataError, match="tar and parquet"):
        open_source(tmp_path)


def test_a_picture_in_a_shard_that_changed_stops_the_reading(forms: dict[str, Path], tmp_path: Path) -> None:
    """Also if it is only a byte, written in place, and whatever was compared before."""
    dataset = assembled(forms["labels"], tmp_path / "out", "streamed")
    everything = np.arange(len(dataset.store))
    whole, _ = dataset.store.read(everything)
    path = forms["labels"] / "shard-001.tar"
    raw = path.read_bytes()
    row = next(i for i, name in enumerate(dataset.names) if name.startswith("shard-001"))
    span = next(s for s in open_source(forms["labels"]).payloads() if str(s).endswith(dataset.names[row]))
    with path.open("r+b") as file:
        file.seek(span.begin)  # type: ignore[union-attr]
        file.write(png(np.full((24, 24, 3), 9, np.uint8)))
    with pytest.raises(DataError, match=f"{dataset.names[row]} (is not the picture|cannot be read)"):
        dataset.store.read(everything)
    assert len(dataset.store.read(np.delete(everything, row))[0]) == len(everything) - 1
    path.unlink()
    with pytest.raises(DataError, match=r"shard-001\.tar/.* cannot be read any more: no such file"):
        dataset.store.read(everything)
    path.write_bytes(raw)
    assert torch.equal(dataset.store.read(everything)[0], whole)


# --- the kept index ----------------------------------------------------------------------------------------------


def test_an_index_is_read_once_for_each_state_of_a_shard(
    forms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned = []
    read = shards._read
    monkeypatch.setattr(shards, "_read", lambda shard: scanned.append(shard) or read(shard))
    first = content(open_source(forms["labels"]))
    assert len(scanned) == SHARDS
    assert content(open_source(forms["labels"])) == first
    assert len(scanned) == SHARDS
    write_tar(forms["labels"] / "shard-002.tar", {"new.png": png()})
    assert open_source(forms["labels"]).names[-1] == "shard-002.tar/new.png"
    assert len(scanned) == SHARDS + 1
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_text("{")
    assert open_source(forms["labels"]).names[-1] == "shard-002.tar/new.png"
    assert len(scanned) == 2 * SHARDS + 1
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert open_source(forms["labels"]).names[-1] == "shard-002.tar/new.png"
    monkeypatch.delenv("XDG_CACHE_HOME")  # nobody's home, as of a number without a name in a container
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    assert open_source(forms["labels"]).names[-1] == "shard-002.tar/new.png"
    assert not (tmp_path / "~").exists()


# --- behind a URL ------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(forms: dict[str, Path]) -> str:
    """The shards in fsspec's memory."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    for form in ("labels", "plain", "snappy"):
        for path in sorted(forms[form].iterdir()):
            files.pipe_file(f"/bucket/{form}/{path.name}", path.read_bytes())
    return "memory://bucket"


@pytest.mark.parametrize("form", ["labels", "plain", "snappy"])
@pytest.mark.parametrize("store", ["pixels", "streamed"])
def test_batches_from_a_url_are_those_of_the_folder(
    forms: dict[str, Path], memory: str, tmp_path: Path, form: str, store: str
) -> None:
    theirs = assembled(forms["folder"], tmp_path / "out-folder", "pixels")
    ours = assembled(f"{memory}/{form}", tmp_path / "out", store)
    assert ours.names == assembled(forms[form], tmp_path / "out-local", store).names
    assert equal(batches(ours), batches(theirs))
    assert len(pixels.open_store(tmp_path / "out").read(np.arange(3))[0]) == 3


def test_urls_of_all_forms(forms: dict[str, Path], memory: str) -> None:
    names = open_source(forms["labels"]).names
    for url in (f"{memory}/labels/", f"{memory}/labels/shard-{{000..002}}.tar", f"file://{forms['labels']}",
                f"simplecache::{memory}/labels"):  # fmt: skip
        source = open_source(url)
        assert source.names == names, url
        assert decode.decode(source.at(0)).shape == (24, 24, 3)
    assert len(open_source(f"{memory}/plain/0.parquet")) == 14
    for url, words in (
        (f"{memory}/nothing", "no files there"),
        (f"{memory}/labels/none.tar", "1 of 1 files are missing"),
    ):
        with pytest.raises(MissingInput, match=words):
            open_source(url)
    with pytest.raises(UsageError, match="cannot be reached"):
        open_source("nosuchprotocol://bucket/x.tar")


@pytest.mark.parametrize("query", ["?download=true", f"?X-Amz-Credential=a/b&X-Amz-Signature={'0' * 300}"])
def test_the_query_of_a_url_is_no_part_of_its_ending_and_names(
    forms: dict[str, Path], memory: str, tmp_path: Path, query: str
) -> None:
    files = fsspec.filesystem("memory")
    for file in ("labels/shard-000.tar", "plain/0.parquet"):
        files.pipe_file(f"/bucket/{file}{query}", files.cat_file(f"/bucket/{file}"))
        there, signed = open_source(f"{memory}/{file}"), open_source(f"{memory}/{file}{query}")
        assert signed.labels == there.labels
        assert signed.names == there.names, "a signature that is renewed renames nothing"
        assert np.array_equal(decode.decode(signed.at(3)), decode.decode(there.at(3)))
    for part in "12":
        files.pipe_file(f"/bucket/x.tar?part={part}", files.cat_file("/bucket/labels/shard-000.tar"))
    both, one = open_source(f"{memory}/x.tar?part={{1..2}}"), open_source(f"{memory}/x.tar?part=1")
    assert len(set(both.names)) == 2 * len(one)
    folder = tmp_path / "x.tar?download=true"  # on a disk a question mark is a letter
    (folder / "cat").mkdir(parents=True)
    (folder / "cat" / "1.png").write_bytes(png())
    assert open_source(folder).names == ("cat/1.png",)


@pytest.mark.parametrize("form", ["labels", "snappy"])
def test_a_failing_range_is_tried_again_and_then_named(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    files = type(fsspec.filesystem("memory"))
    source = open_source(f"{memory}/{form}")
    dataset = assembled(f"{memory}/{form}", tmp_path / "out", "streamed")
    whole, _ = dataset.store.read(np.arange(4))
    name = "cat_file" if form == "labels" else "open"
    sound: Callable[..., object] = getattr(files, name)
    calls, broken = [], [0]

    def failing(self: object, path: str, *rest: object, **more: object) -> object:
        calls.append(path)
        if len(calls) <= broken[0]:
            raise OSError(5, "connection reset")
        return sound(self, path, *rest, **more)

    monkeypatch.setattr(files, name, failing)
    parquet._rows.cache_clear()
    broken[0] = places.TRIES - 1
    assert torch.equal(dataset.store.read(np.array([0]))[0], whole[:1])
    assert len(calls) == places.TRIES
    parquet._rows.cache_clear()
    calls.clear()
    broken[0] = 10**9
    with pytest.raises(StorageError, match=r"could not be read in 4 tries: .*connection reset") as stopped:
        dataset.store.read(np.array([0]))
    assert len(calls) == places.TRIES
    assert f"bucket/{form}/" in stopped.value.what
    assert stopped.value.exit_code == 74
    if form == "labels":  # and while it is decoded: what does not arrive is no bad picture
        assert "shard-000.tar/000.png" in stopped.value.what
        with pytest.raises(StorageError, match="could not be read"):
            decode.header_size(source.at(0))
        with pytest.raises(StorageError, match="could not be read"):
            pixels.build(source, tmp_path / "again", working_size=24, bad_csv=tmp_path / "bad.csv", threads=2)


def test_a_short_answer_is_a_failed_one(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = type(fsspec.filesystem("memory"))
    sound, answers = files.cat_file, iter((10, None))
    monkeypatch.setattr(files, "cat_file", lambda *a, **k: sound(*a, **k)[: next(answers)])
    source = open_source(f"{memory}/labels")
    assert decode.decode(source.at(0)).shape == (24, 24, 3)


def test_what_changed_behind_a_url_stops_the_reading(memory: str, tmp_path: Path) -> None:
    dataset = assembled(f"{memory}/labels", tmp_path / "out", "streamed")
    files = fsspec.filesystem("memory")
    raw = files.cat_file("/bucket/labels/shard-000.tar")
    dataset.store.read(np.arange(3))
    files.pipe_file("/bucket/labels/shard-000.tar", files.cat_file("/bucket/labels/shard-002.tar"))
    with pytest.raises(FewlabelsError, match=r"shard-000\.tar/000\.png"):
        dataset.store.read(np.arange(3))
    files.pipe_file("/bucket/labels/shard-000.tar", raw)
    dataset.store.read(np.arange(3))
    files.rm_file("/bucket/labels/shard-000.tar")
    with pytest.raises(DataError, match=r"shard-000\.tar/000\.png cannot be read any more: no such file"):
        dataset.store.read(np.arange(3))


def test_stamps_change_with_the_shard(memory: str) -> None:
    before = list(open_source(f"{memory}/labels").parts[0].stamps())
    assert before == list(open_source(f"{memory}/labels").parts[0].stamps())
    files = fsspec.filesystem("memory")
    files.pipe_file("/bucket/labels/shard-000.tar", files.cat_file("/bucket/labels/shard-000.tar"))
    after = list(open_source(f"{memory}/labels").parts[0].stamps())
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, True]


def test_without_fsspec_urls_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    places._file_system.cache_clear()
    with pytest.raises(UsageError, match="cannot be reached"):
        open_source("memory://elsewhere/x.tar")
