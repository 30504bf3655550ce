"""Decoding against 400 awful files, colours and orientations against facts, and the store against its promises."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from fewlabels import checkpoint
from fewlabels.data import decode, pixels
from fewlabels.data.sources import open_source
from fewlabels.errors import DataError, MissingInput, RunAgain, StorageError


@pytest.fixture(scope="session")
def awful(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("awful")
    with tarfile.open(shared_data / "awful-images.tar") as archive:
        archive.extractall(folder, filter="data")
    return folder / "awful-images"


def manifest(awful: Path) -> list[dict[str, str]]:
    with (awful / "MANIFEST.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def built(
    images: object, folder: Path, **options: object
) -> tuple[pixels.PixelStore, np.ndarray, list[pixels.BadImage]]:
    settings = {"working_size": None, "threads": 2, "bad_csv": folder.parent / "bad_images.csv"} | options
    return pixels.build(open_source(images), folder, **settings)  # type: ignore[arg-type]


# --- the awful corpus --------------------------------------------------------------------------------------------


def test_every_awful_image_has_its_expected_outcome(awful: Path, tmp_path: Path) -> None:
    rows = manifest(awful)
    store, kept, bad = built([awful / row["file"] for row in rows], tmp_path / "data", max_bad_share=1.0)
    read = set(kept.tolist())
    wrong = [
        row["file"]
        for i, row in enumerate(rows)
        if (row["expected"] in ("ok", "ok_warn") and i not in read) or (row["expected"] == "reject" and i in read)
    ]
    assert not wrong
    assert len(rows) == len(kept) + len(bad) == 390
    assert all(image.reason and "0x7" not in image.reason and "\n" not in image.reason for image in bad)
    reasons = {Path(image.name).name: image.reason for image in bad}
    assert reasons["zero_byte.jpg"] == "empty (0 bytes)"
    assert "web page" in reasons["html_404.jpg"]
    assert "git lfs pull" in reasons["git_lfs_pointer.jpg"]
    assert "64 megapixels" in reasons["bomb_20000x20000_rgb.png"]
    assert "truncated" in reasons["truncated_50pct.jpg"]
    assert "HEIC" in reasons["zPug_3.heic"]
    assert store.canvas == 256


def test_the_corpus_as_a_folder_passes_clutter_over(awful: Path, tmp_path: Path) -> None:
    names = set(open_source(awful).names)
    for row in manifest(awful):
        if row["expected"] == "ignore":
            assert row["file"] not in names
        elif row["expected"] in ("ok", "ok_warn"):
            assert any(name == row["file"] for name in names), row["file"]


def test_the_corpus_needs_little_memory(awful: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path; from fewlabels.data import decode\n"
        "decode.decode(Path(sys.argv[1]) / 'generated/plain.jpg', 64)  # what the decoders' libraries take\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sorted(Path(sys.argv[1]).rglob('*')):\n"
        "    try: decode.decode(path, 256)\n"
        "    except decode.BadPicture: pass\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(awful)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 200  # MB


def test_generated_variants_look_like_the_plain_photo(awful: Path) -> None:
    folder = awful / "generated"
    plain = decode.decode(folder / "plain.jpg").astype(float)
    same = ("png_named.jpg", "webp_named.jpg", "cmyk.jpg", "rgb_not_ycbcr.jpg", "progressive.jpg", "orientation_6.png",
            "orientation_9.jpg", "trailing_garbage.jpg", "two_jpegs.jpg", "animated.png", "multipage.tif")  # fmt: skip
    for name in same:
        image = decode.decode(folder / name)
        assert image.shape == plain.shape, name
        assert np.abs(image - plain).mean() < 6, name
    grey = np.asarray(Image.open(folder / "plain.jpg").convert("L"), float)
    for name in ("gray16.png", "gray16.tif", "gray16_12bit_range.png", "float32_0to1.tif", "int32.tif", "gray8.jpg"):
        image = decode.decode(folder / name)
        assert np.abs(image[:, :, 0] - grey).mean() < 6, name
        assert (image == image[:, :, :1]).all(), name
    assert decode.decode(folder / "rgba_cutout.png")[0, 0].tolist() == [255, 255, 255]


def test_all_orientations_of_a_photo_are_one_upright_photo(awful: Path) -> None:
    upright = decode.decode(awful / "exif/Landscape_1.jpg", 128)
    assert upright.shape[1] > upright.shape[0]
    for number in range(2, 9):
        turned = decode.decode(awful / f"exif/Landscape_{number}.jpg", 128)
        assert turned.shape == upright.shape
        assert np.abs(turned.astype(float) - upright).mean() < 4, number


# --- facts about one picture -------------------------------------------------------------------------------------


@pytest.mark.parametrize("peak", [200, 255, 256, 4095, 4096, 65535])
def test_sixteen_bits_are_scaled_and_not_clipped(peak: int) -> None:
    """A peak beside a power of two makes no picture darker: the white is its own."""
    levels = np.array([[0, peak // 2], [peak // 5, peak]], np.uint16)
    image = decode.decode(encoded(Image.fromarray(levels)))
    assert np.abs(image[:, :, 0] - np.array([[0, 127.5], [51, 255]])).max() < 1.5


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0.0, 0.5], [1.0, 0.2]], [[0, 128], [255, 51]]),
        ([[0.0, 0.5], [1.0001, 0.2]], [[0, 127], [255, 51]]),
        ([[0.0, 128.0], [255.0, 7.0]], [[0, 128], [255, 7]]),
        ([[0.0, 0.0], [0.0, 0.0]], [[0, 0], [0, 0]]),
        ([[7.0, 7.0], [7.0, 7.0]], [[255, 255], [255, 255]]),
        ([[-4.0, -2.0], [-3.0, -4.0]], [[0, 255], [128, 0]]),
        ([[-1.0, 0.0], [1.0, 0.0]], [[0, 128], [255, 128]]),
        ([[np.nan, 0.5], [1.0, np.inf]], [[128, 128], [255, 128]]),
        ([[-3.0, -3.0], [-3.0, -3.0]], [[0, 0], [0, 0]]),
    ],
)
def test_float_pictures(values: list[list[float]], expected: list[list[int]]) -> None:
    image = decode.decode(encoded(Image.fromarray(np.array(values, np.float32)), "TIFF"))
    assert image[:, :, 1].tolist() == expected


def test_a_float_picture_of_nothing_is_refused() -> None:
    with pytest.raises(decode.BadPicture, match="finite"):
        decode.decode(encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"))


def test_cmyk_is_not_a_negative() -> None:
    red = Image.new("RGB", (16, 16), (220, 20, 20))
    for kind in ("JPEG", "TIFF"):
        assert np.abs(decode.decode(encoded(red.convert("CMYK"), kind))[8, 8] - np.array([220, 20, 20.0])).max() < 12


def test_transparency_is_white_paper_also_when_scaled() -> None:
    cutout = np.zeros((40, 40, 4), np.uint8)
    cutout[:, :20] = (200, 0, 0, 255)  # the hidden half is black under alpha 0
    image = decode.decode(encoded(Image.fromarray(cutout)), 10)
    assert image[5, 1].tolist() == [200, 0, 0]
    assert image[5, 8].tolist() == [255, 255, 255]
    palette = Image.fromarray(cutout).convert("P")
    assert decode.decode(encoded(palette, transparency=palette.getpixel((30, 5))))[5, 30].tolist() == [255] * 3


def test_scaling_keeps_the_shape_and_never_enlarges() -> None:
    assert decode.fitted(5000, 1, 64) == (64, 1)
    assert decode.fitted(300, 200, 150) == (150, 100)
    assert decode.fitted(30, 20, 150) == (30, 20)
    ramp = np.tile(np.linspace(0, 255, 600).astype(np.uint8), (300, 1))
    for kind in ("PNG", "JPEG"):
        image = decode.decode(encoded(Image.fromarray(ramp), kind), 60)
        assert image.shape == (30, 60, 3)
        assert np.abs(image[15, :, 0] - np.linspace(0, 255, 60)).max() < 8  # a mean, not a sample


def test_a_giant_header_is_refused_before_decoding() -> None:
    chunk = struct.pack(">II5B", 60000, 60000, 8, 2, 0, 0, 0)
    body = b"IHDR" + chunk
    raw = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT"
    with pytest.raises(decode.BadPicture, match="64 megapixels"):
        decode.decode(raw)


def test_a_large_photo_is_read_at_a_smaller_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_MEGAPIXELS", 0.2)  # 400 x 600 stands for 108 megapixels
    monkeypatch.setattr(decode, "MAX_PHOTO", 0.3)
    photo = Image.fromarray(np.tile(np.linspace(0, 255, 600).astype(np.uint8)[None, :, None], (400, 1, 3)))
    raw = encoded(photo, "JPEG", quality=95)
    image = decode.decode(raw, 60)
    assert image.shape == (40, 60, 3)
    assert np.abs(image[20, :, 0] - np.linspace(0, 255, 60)).max() < 8
    assert decode.header_size(raw) == (400, 600)
    scans = raw.replace(b"\xff\xda\x00\x0c\x03", b"\xff\xda\x00\x0c\x01")  # libjpeg would hold it whole
    larger = encoded(photo.resize((700, 500)), "JPEG")
    refused = [(raw, None), (raw, 200), (scans, 60), (larger, 60), (encoded(photo), 60)]
    for payload, canvas in [*refused, (encoded(photo, "JPEG", progressive=True), 60)]:
        with pytest.raises(decode.BadPicture, match="megapixels"):
            decode.decode(payload, canvas)


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.ENOMEM, errno.ESTALE, errno.EACCES])
def test_a_failing_machine_is_no_bad_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(_: Path) -> bytes:
        raise OSError(code, os.strerror(code))

    Image.new("RGB", (8, 6)).save(tmp_path / "1.png")
    np.save(tmp_path / "2.npy", np.zeros((2, 8, 6), np.uint8))
    arrays = open_source(tmp_path / "2.npy").parts[0]
    monkeypatch.setattr(Path, "read_bytes", fail)
    monkeypatch.setattr(Path, "open", lambda self, *_: fail(self))
    own = code in (errno.EIO, errno.EACCES)  # a bad sector is that of one picture, and would end every run of it
    with pytest.raises(decode.BadPicture if own else StorageError, match=os.strerror(code)):
        decode.decode(tmp_path / "1.png")
    with pytest.raises(DataError if own else StorageError, match=os.strerror(code)):
        next(arrays.payloads())


def test_strictness_does_not_depend_on_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    raw = encoded(Image.fromarray(noise), "JPEG")
    with pytest.raises(decode.BadPicture, match="truncated"):
        decode.decode(raw[: len(raw) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True  # put back
    assert Image.MAX_IMAGE_PIXELS is None


def by_pillow(payload: Path | bytes, canvas: int | None) -> np.ndarray | str:
    """The picture or the reason, decoded and scaled by Pillow alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_plain_jpeg", lambda *_: None)
        patch.setattr(decode, "_shrink", lambda: None)
        return outcome(payload, canvas)


def outcome(payload: Path | bytes, canvas: int | None) -> np.ndarray | str:
    try:
        return decode.decode(payload, canvas)
    except decode.BadPicture as bad:
        return str(bad)


def test_the_awful_corpus_comes_out_as_by_pillow_alone(awful: Path) -> None:
    for path in sorted(path for path in awful.rglob("*") if path.is_file()):
        ours, theirs = outcome(path, 256), by_pillow(path, 256)
        assert np.array_equal(ours, theirs), path.name


def test_photos_are_decoded_by_the_fast_path_to_the_same_pixels(shared_data: Path) -> None:
    fast = decode._plain_jpeg
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_plain_jpeg", lambda *asked: calls.append(fast(*asked)) or calls[-1])
        for path in sorted((shared_data / "imagenette160/val").rglob("*.jpg"))[::40]:
            for canvas in (None, 100):
                assert np.array_equal(decode.decode(path, canvas), by_pillow(path, canvas)), path.name
    assert sum(pixels is not None for pixels in calls) > 0.8 * len(calls) > 0


def test_broken_jpegs_have_the_outcome_that_pillow_gives_them() -> None:
    rng = np.random.default_rng(5)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((91, 70))
    accepted = 0
    for options in ({"quality": 90}, {"progressive": True}, {"subsampling": 0, "quality": 60}, {"optimize": True}):
        raw = encoded(coarse, "JPEG", **options)
        broken = [raw[:cut] for cut in (*rng.integers(2, len(raw), 12), len(raw) - 1, len(raw) - 2)]
        for _ in range(30):
            noisy = np.frombuffer(raw, np.uint8).copy()
            noisy[rng.integers(2, len(raw), 2)] = rng.integers(0, 256, 2)
            broken.append(noisy.tobytes())
        for damaged in (raw, raw + b"tail" * 99, raw[:-2] + b"tail", *broken):
            ours, theirs = outcome(damaged, None), by_pillow(damaged, None)
            accepted += not isinstance(ours, str)
            assert np.array_equal(ours, theirs)
    assert 20 < accepted < 160


def test_reasons_for_what_is_no_file(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "folder"), (tmp_path / "gone.jpg", "no such file")):
        with pytest.raises(decode.BadPicture, match=words):
            decode.decode(path)


# --- the store ---------------------------------------------------------------------------------------------------


@pytest.fixture
def photos() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (150, 9, 12, 3), dtype=np.uint8)


def test_a_store_gives_back_what_went_in(tmp_path: Path, photos: np.ndarray) -> None:
    store, kept, bad = built(photos, tmp_path / "run/data")
    assert (len(store), store.canvas, len(bad)) == (150, 12, 0)
    assert kept.tolist() == list(range(150))
    ids = np.random.default_rng(2).integers(0, 150, 40)
    for asked in (ids, torch.from_numpy(ids)):
        image, extent = store.read(asked)
        assert image.dtype == torch.uint8
        assert extent.dtype == torch.int64
        assert extent.tolist() == [[9, 12]] * 40
        assert np.array_equal(image[:, :, :9].permute(0, 2, 3, 1).numpy(), photos[ids])
        assert not image[:, :, 9:].any()
    assert store.read(np.array([], np.int64))[0].shape == (0, 3, 12, 12)
    expected = hashlib.sha256(struct.pack("<II", 9, 12) + photos[7].tobytes()).digest()
    assert store.hashes[7].tobytes() == expected
    for wrong in ([150], [-1]):
        with pytest.raises(IndexError):
            store.read(np.array(wrong))


def test_the_store_does_not_depend_on_threads(tmp_path: Path, photos: np.ndarray) -> None:
    one, four = (built(photos, tmp_path / str(n), threads=n)[0] for n in (1, 4))
    assert one.digest == four.digest
    assert (one.path / "pixels.u8").read_bytes() == (four.path / "pixels.u8").read_bytes()


def test_bad_images_are_named_and_rows_stay_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(100):
        Image.new("RGB", (10, 10 + i % 3), (i, 0, 0)).save(folder / f"{i:03d}.png")
    (folder / "017.png").write_bytes(b"")
    (folder / "080.png").write_text("hello")
    store, kept, bad = built(folder, tmp_path / "data")
    assert [image.name for image in bad] == ["017.png", "080.png"]
    assert kept.tolist() == [i for i in range(100) if i not in (17, 80)]
    image, extent = store.read(np.arange(98))
    assert image[:, 0, 0, 0].tolist() == kept.tolist()
    assert extent[:, 0].tolist() == [10 + i % 3 for i in kept.tolist()]
    with (tmp_path / "bad_images.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["name", "reason"], *([b.name, b.reason] for b in bad)]


def test_too_many_bad_images_stop_before_training(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(10):
        (tmp_path / f"in/{i}.jpg").write_text("not a picture")
    Image.new("RGB", (9, 9)).save(tmp_path / "in/good.png")
    with pytest.raises(DataError, match=r"10 of 11 images \(90.9 %\)") as stopped:
        built(tmp_path / "in", tmp_path / "data", max_bad_share=0.5)
    assert "0.jpg: not a picture" in stopped.value.details[0]
    assert str(tmp_path / "bad_images.csv") in stopped.value.fix
    assert len((tmp_path / "bad_images.csv").read_text().splitlines()) == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad_images.csv", "in"]
    (tmp_path / "in/good.png").unlink()
    with pytest.raises(DataError, match="10 of 10"):
        built(tmp_path / "in", tmp_path / "data", max_bad_share=1.0)


def test_working_size(tmp_path: Path) -> None:
    for i, size in enumerate([(300, 100), (90, 90), (700, 900)]):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", size).save(tmp_path / f"in/{i}.png")
    assert built(tmp_path / "in", tmp_path / "auto")[0].canvas == 256
    store = built(tmp_path / "in", tmp_path / "asked", working_size=60)[0]
    assert store.read(np.arange(3))[1].tolist() == [[20, 60], [60, 60], [60, 47]]
    (tmp_path / "in/0.png").unlink()
    (tmp_path / "in/2.png").unlink()
    assert built(tmp_path / "in", tmp_path / "small")[0].canvas == 90


def test_photos_of_imagenette_keep_their_shape(shared_data: Path, tmp_path: Path) -> None:
    files = sorted((shared_data / "imagenette160/val/tench").glob("*.jpg"))[:40]
    store, _, bad = built(files, tmp_path / "data")
    assert not bad
    image, extent = store.read(np.arange(40))
    assert store.canvas == int(extent.max())
    for file, pixel, (height, width) in zip(files, image, extent.tolist(), strict=True):
        with Image.open(file) as photo:
            assert (photo.height, photo.width) == (height, width)
            assert np.array_equal(np.asarray(photo.convert("RGB")), pixel[:, :height, :width].permute(1, 2, 0).numpy())


def test_a_store_is_replaced_whole_and_opened_again(tmp_path: Path, photos: np.ndarray) -> None:
    (tmp_path / ".data.draft").mkdir()  # what a killed process left
    (tmp_path / ".data.draft/pixels.u8").write_bytes(b"half")
    first = built(photos, tmp_path / "data")[0]
    second = built(photos[:20], tmp_path / "data")[0]
    assert len(pixels.open_store(tmp_path / "data")) == len(second) == 20
    assert first.read(np.array([3]))[0].shape == (1, 3, 12, 12)  # readers of the old one are not disturbed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad_images.csv", "data"]


def damage(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return apply


@pytest.mark.parametrize(
    "spoil",
    [
        damage("pixels.u8", lambda raw: raw[:-1]),
        damage("extents.npy", lambda raw: raw[:-1] + b"\7"),
        damage("hashes.npy", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])),
        damage("hashes.npy", lambda raw: raw[:40]),
        damage("index.json", lambda raw: raw[:20]),
        damage("index.json", lambda raw: raw.replace(b'"format_version": 1', b'"format_version": 0')),
        damage("index.json", lambda raw: b"[]"),
        lambda folder: (folder / "pixels.u8").unlink(),
    ],
)
def test_a_damaged_store_is_refused(tmp_path: Path, photos: np.ndarray, spoil: Callable[[Path], None]) -> None:
    built(photos, tmp_path / "data")
    spoil(tmp_path / "data")
    with pytest.raises(StorageError, match="damaged") as refused:
        pixels.open_store(tmp_path / "data")
    assert refused.value.exit_code == 74
    assert str(tmp_path / "data") in refused.value.fix


def test_pixels_that_changed_are_never_given(tmp_path: Path, photos: np.ndarray) -> None:
    store = built(photos, tmp_path / "data")[0]
    (whole, extents), file = store.read(np.arange(len(store))), tmp_path / "data" / "pixels.u8"
    raw, rng, found = file.read_bytes(), np.random.default_rng(0), 0
    for row, channel, y, x in rng.integers(0, (len(store), 3, store.canvas, store.canvas), (30, 4)).tolist():
        damaged, place = bytearray(raw), ((row * 3 + channel) * store.canvas + y) * store.canvas + x
        damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        fresh, others = pixels.open_store(tmp_path / "data"), np.setdiff1d(np.arange(len(store)), row)
        assert torch.equal(fresh.read(others)[0], whole[others])
        if y >= extents[row, 0] or x >= extents[row, 1]:
            fresh.read(np.array([row]))  # beside the image, where nobody looks
            continue
        found += 1
        with ThreadPoolExecutor(4) as pool:
            for asked in [pool.submit(fresh.read, np.array([0, row])) for _ in range(4)]:
                with pytest.raises(RunAgain, match=f"the pixels of image {row} are not those") as refused:
                    asked.result()
        assert refused.value.exit_code == 75
        with pytest.raises(StorageError, match=f"is damaged: the pixels of image {row}"):
            pixels.open_store(tmp_path / "data")
        (tmp_path / "data" / pixels.DAMAGED).unlink()
    assert 10 < found < 30


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(MissingInput):
        pixels.open_store(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "rename", "save"])
def test_a_failing_disk_leaves_nothing_behind(
    tmp_path: Path, photos: np.ndarray, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    owner = {"fsync": os, "rename": Path, "save": np}[call]
    monkeypatch.setattr(owner, call, fail)
    with pytest.raises(StorageError) as failed:
        built(photos, tmp_path / "data")
    assert ("the disk is full" in failed.value.what) == (code != errno.EIO)
    assert "MB are free" in failed.value.why
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad_images.csv"]


@pytest.mark.parametrize("swaps", [True, False])
def test_a_failing_rename_leaves_the_old_store(
    tmp_path: Path, photos: np.ndarray, monkeypatch: pytest.MonkeyPatch, *, swaps: bool
) -> None:
    """Also where a system cannot swap two folders, and renames them one after the other."""
    before = built(photos, tmp_path / "data")[0].digest
    real = Path.rename

    def fail_for_the_new_one(path: Path, target: Path) -> Path:
        if "draft" in path.name:
            raise OSError(errno.EIO, "I/O error")
        return real(path, target)

    def fail(*_: Path) -> bool:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    monkeypatch.setattr(checkpoint, "_exchange", fail if swaps else lambda *_: False)
    with pytest.raises(StorageError, match="I/O error"):
        built(photos + 1, tmp_path / "data")
    assert pixels.open_store(tmp_path / "data").digest == before


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path: Path, photos: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match="disk is full: the pixels need"):
        built(photos, tmp_path / "run/data")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_build_leaves_the_old_store(
    tmp_path: Path, photos: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = built(photos, tmp_path / "data")[0].digest
    real = pixels._decode_chunk
    calls = iter(range(100))

    def interrupted(*arguments: object) -> object:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pixels, "_decode_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        built(photos + 1, tmp_path / "data")
    assert pixels.open_store(tmp_path / "data").digest == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad_images.csv", "data"]


def test_reading_from_many_threads(tmp_path: Path, photos: np.ndarray) -> None:
    store = built(photos, tmp_path / "data")[0]
    wrong = []

    def reader(seed: int) -> None:
        for ids in np.random.default_rng(seed).integers(0, 150, (50, 32)):
            if not np.array_equal(store.read(ids)[0][:, :, :9].permute(0, 2, 3, 1).numpy(), photos[ids]):
                wrong.append(seed)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_is_bounded_by_chunks_and_not_by_images(tmp_path: Path) -> None:
    program = (
        "import json, resource, sys; from pathlib import Path; import numpy as np\n"
        "from fewlabels.data import pixels, sources\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "source = sources.open_source(sys.argv[1]); folder = Path(sys.argv[2]); before = peak()\n"
        "store, kept, bad = pixels.build(source, folder, working_size=None, threads=2, bad_csv=folder.parent / 'b')\n"
        "after = peak()\n"
        "for ids in np.random.default_rng(0).integers(0, len(store), (60, 256)): store.read(ids)\n"
        "print(json.dumps([after - before, peak() - after]))\n"
    )
    np.save(tmp_path / "many.npy", np.zeros((20_000, 64, 64, 3), np.uint8))  # 246 MB
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "many.npy"), str(tmp_path / "data")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    building, reading = json.loads(done.stdout)
    assert building < 150  # MB
    assert reading < 60


def test_the_list_of_bad_images_is_safe_in_a_spreadsheet(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "in" / "good.png")
    name = '=HYPERLINK("x").jpg'
    (tmp_path / "in" / name).write_bytes(b"no picture")
    build_options = {"working_size": None, "threads": 1, "bad_csv": tmp_path / "bad.csv", "max_bad_share": 0.9}
    pixels.build(open_source(tmp_path / "in"), tmp_path / "store", **build_options)
    with (tmp_path / "bad.csv").open(encoding="utf-8", newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["name", f"'{name}"]
