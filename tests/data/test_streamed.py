"""Streamed stores against pixel stores: the same index, the same pixels, and nothing else than what was checked."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewlabels.data import pixels
from fewlabels.data.sources import open_source
from fewlabels.errors import DataError, StorageError, UsageError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """30 JPEGs and PNGs of several sizes, one on its side, one with a name that is not UTF-8, and one broken."""
    rng = np.random.default_rng(4)
    (tmp_path / "in").mkdir()
    for i in range(30):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 3 else 1
        name = tmp_path / "in" / (f"{i:02d}.jpg" if i % 3 else f"{i:02d}.png")
        coarse.resize((40 + i, 70 - i)).save(name, exif=exif)
    (tmp_path / "in" / "07.jpg").write_text("not a picture")
    (tmp_path / "in" / "11.jpg").rename(tmp_path / "in" / os.fsdecode(b"11\xff.jpg"))
    return tmp_path / "in"


def built(images: object, folder: Path, store: str) -> tuple[pixels.PixelStore, np.ndarray, list[pixels.BadImage]]:
    return pixels.build(
        open_source(images), folder, working_size=48, threads=2, bad_csv=folder.parent / "bad.csv", store=store
    )


def same_as_pixels(images: object, folder: Path, ids: np.ndarray) -> pixels.PixelStore:
    kept_pixels, kept, bad = built(images, folder / "pixels", "pixels")
    streamed, kept_too, bad_too = built(images, folder / "streamed", "streamed")
    assert streamed.streamed and not kept_pixels.streamed
    assert (streamed.digest, streamed.canvas, len(streamed)) == (kept_pixels.digest, 48, len(kept_pixels))
    assert np.array_equal(kept, kept_too)
    assert bad == bad_too
    assert np.array_equal(streamed.thumbs, kept_pixels.thumbs)
    for ours, theirs in zip(streamed.read(ids), kept_pixels.read(ids), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)
    assert streamed.read(ids[:0])[0].shape == (0, 3, 48, 48)
    return streamed


def test_files_come_as_from_the_pixel_store(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    ids = np.random.default_rng(0).integers(0, 29, 64)
    store = same_as_pixels(Path("in"), tmp_path, ids)
    monkeypatch.chdir("/")  # and from its folder alone, wherever that is asked from
    again = pixels.open_store(tmp_path / "streamed")
    assert np.array_equal(again.read(ids)[0], store.read(ids)[0])
    assert not (tmp_path / "streamed" / "pixels.u8").exists()
    with pytest.raises(IndexError):
        store.read(np.array([29]))


def test_arrays_come_as_from_the_pixel_store(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (20, 60, 50, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    np.savez(tmp_path / "images.npz", images=images)
    ids = np.arange(19, -1, -1)
    (tmp_path / "file").mkdir()
    for kind, where in ((images, tmp_path), (tmp_path / "images.npy", tmp_path / "file")):
        same_as_pixels(kind, where, ids)
        with pytest.raises(StorageError, match="arrays"):
            pixels.open_store(where / "streamed")
    with pytest.raises(UsageError, match="cannot be streamed") as refused:
        built(tmp_path / "images.npz", tmp_path / "npz", "streamed")
    assert ".npy" in refused.value.fix


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("change", ["gone", "another", "broken", "a byte", "a byte in place"])
def test_a_picture_that_changed_stops_the_reading(photos: Path, tmp_path: Path, change: str, *, seen: bool) -> None:
    """Also one that was compared before, and whose size and modification time stay what they were."""
    store, kept, _ = built(photos, tmp_path / "data", "streamed")
    if seen:
        store.read(np.arange(len(store)))
    row = int(np.flatnonzero(kept == 13)[0])
    picture = photos / "13.jpg"
    times, raw = picture.stat(), picture.read_bytes()
    if change == "gone":
        picture.unlink()
    elif change == "another":
        picture.write_bytes((photos / "14.jpg").read_bytes())
    elif change == "broken":
        picture.write_bytes(raw[:100])
    elif change == "a byte in place":
        place = raw.rindex(b"\xff\xda") + 30  # in what codes the pixels
        with picture.open("r+b") as file:
            file.seek(place)
            file.write(bytes([raw[place] ^ 0x10]))
        os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert picture.stat().st_size == len(raw)
    else:  # one level of one pixel or so
        image = np.asarray(Image.open(picture)).copy()
        image[0, 0, 0] ^= 1
        Image.fromarray(image).save(picture, "PNG")
        os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    others = np.delete(np.arange(len(store)), row)
    assert len(store.read(others)[0]) == 28
    with pytest.raises(DataError, match=r"13\.jpg") as stopped:
        store.read(np.arange(len(store)))
    assert stopped.value.exit_code == 65
    picture.write_bytes(raw)
    assert len(store.read(np.arange(len(store)))[0]) == 29


def test_the_disk_decides_unless_somebody_else_does(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free(amount: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": amount}))

    needed = 30 * (3 * 48 * 48 + 192)
    for store, amount, streamed in (
        ("auto", 2 * needed, False), ("auto", needed, True), ("pixels", needed, False), ("streamed", 2 * needed, True),
    ):  # fmt: skip
        free(amount)
        assert built(photos, tmp_path / "data", store)[0].streamed == streamed, (store, amount)
    free(needed - 1)
    with pytest.raises(StorageError, match="disk is full") as refused:
        built(photos, tmp_path / "data", "pixels")
    assert "--store streamed" in refused.value.fix
    free(30 * 192 - 1)
    with pytest.raises(StorageError, match="disk is full"):
        built(photos, tmp_path / "data", "auto")


@pytest.mark.parametrize("name", ["paths.bin", "ends.npy"])
def test_damaged_paths_are_refused(photos: Path, tmp_path: Path, name: str) -> None:
    built(photos, tmp_path / "data", "streamed")
    file = tmp_path / "data" / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StorageError, match="damaged"):
        pixels.open_store(tmp_path / "data")


@pytest.mark.parametrize("place", [0, 7])
def test_ends_that_go_back_are_refused(photos: Path, tmp_path: Path, place: int) -> None:
    built(photos, tmp_path / "data", "streamed")
    ends = np.load(tmp_path / "data" / "ends.npy")
    ends[place] = -1
    np.save(tmp_path / "data" / "ends.npy", ends)
    with pytest.raises(StorageError, match="not of one piece"):
        pixels.open_store(tmp_path / "data")
