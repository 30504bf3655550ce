"""The pixel store: every image decoded once, scaled onto one canvas, checked and hashed, then read at random for ever.

A store is a folder:
    pixels.u8    (N, 3, C, C) uint8, the image at the top left, zeros elsewhere
    extents.npy  (N, 2) int32, the image's (h, w) on its canvas
    hashes.npy   (N, 32) uint8, SHA-256 of each image's size and pixels
    thumbs.npy   (N, 8, 9) uint8, grey thumbnails to find near-duplicates (N = 0 on canvases below 24)
    index.json   version, number, canvas, digest, source
It is complete or not there: written beside its place, flushed to disk, then renamed.

Departure: training crops from the stored canvas and not from the original photo, so a crop of a large photo is less
sharp than the reference's. At C >= 1.15 x the training size that is what the reference's evaluation sees as well.

Shapes: N images, B of them, C the canvas side, h, w an image's size on it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import struct
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fewlabels import checkpoint
from fewlabels.data.decode import BadPicture, Payload, decode, header_size, strict_pillow
from fewlabels.data.sources import Source
from fewlabels.data.tables import cell
from fewlabels.errors import DataError, MissingInput, StorageError

VERSION = 1
LARGEST_CANVAS = 256  # unless asked for: 196 KB an image; training at 224 crops from it
SMALLEST_CANVAS = 8
HEADERS = 256  # pictures whose headers decide the canvas
CHUNK_BYTES = 8 << 20  # decoded, and encoded, in the hands of one thread
CHUNK_IMAGES = 64
THUMB = (8, 9)  # rows, columns: 8 differences a row make the 64-bit hash
SMALLEST_THUMBED = 24  # below it different images have equal thumbnails by chance


@dataclass(frozen=True)
class BadImage:
    """An image that could not be read."""

    name: str
    reason: str


class PixelStore:
    """A complete store, open for reading from any number of threads and forked processes. See `open_store`.

    Reads with pread and not through a mapping: 256 random images of 160 pixels come at 0.8 to 1.0 of the mapping's
    speed, and nothing stays resident, where 256 MB read through a mapping made 1,000 MB of it (large pages).
    """

    def __init__(self, path: Path, *, canvas: int, digest: str, extents: npt.NDArray[np.int32]) -> None:
        self.path, self.canvas, self.digest = path, canvas, digest
        self._extents = torch.from_numpy(extents.astype(np.int64))  # (N, 2)
        self._file = os.open(path / "pixels.u8", os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self._extents)

    @property
    def hashes(self) -> npt.NDArray[np.uint8]:
        """(N, 32) SHA-256 of each image."""
        return np.asarray(np.load(self.path / "hashes.npy", allow_pickle=False))

    @property
    def thumbs(self) -> npt.NDArray[np.uint8]:
        """(N, 8, 9) grey thumbnails, or (0, 8, 9) on small canvases."""
        return np.asarray(np.load(self.path / "thumbs.npy", allow_pickle=False))

    def read(self, ids: npt.NDArray[np.int64] | Tensor) -> tuple[Tensor, Tensor]:
        """Images by row: uint8 (B, 3, C, C), and int64 (B, 2) = the valid top-left (h, w).

        ids: int (B,), each from 0 to N - 1, else IndexError. A disk that fails is a StorageError.
        """
        rows = torch.as_tensor(ids, dtype=torch.int64, device="cpu")
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= len(self)):
            raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of a store of {len(self)} images")
        pixels = torch.empty(len(rows), 3, self.canvas, self.canvas, dtype=torch.uint8)
        size = 3 * self.canvas * self.canvas
        view = pixels.numpy().data.cast("B") if len(rows) else memoryview(b"")
        for i, row in enumerate(rows.tolist()):
            self._read_at(view[i * size : (i + 1) * size], row * size)
        return pixels, self._extents[rows]

    def _read_at(self, view: memoryview, offset: int) -> None:
        try:
            count = os.preadv(self._file, [view], offset)
        except OSError as error:
            raise StorageError(f"reading {self.path / 'pixels.u8'} failed: {error.strerror}") from error
        if count != len(view):
            raise StorageError(
                f"{self.path / 'pixels.u8'} ends early", fix="delete its folder and run the same command again"
            )


def open_store(folder: Path) -> PixelStore:
    """The store in folder; its index, sizes and digest are checked. Raises MissingInput or StorageError."""
    if not (folder / "index.json").is_file():
        raise MissingInput(f"{folder} holds no pixel store", fix="run the command that made it again")
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if index["version"] != VERSION:
            raise ValueError(f"version {index['version']}, this program reads {VERSION}")
        count, canvas = int(index["images"]), int(index["canvas"])
        extents = np.load(folder / "extents.npy", allow_pickle=False)
        hashes = np.load(folder / "hashes.npy", allow_pickle=False)
        found, wanted = (folder / "pixels.u8").stat().st_size, count * 3 * canvas * canvas
        if found != wanted:
            raise ValueError(f"pixels.u8 has {found:,} bytes instead of {wanted:,}")
        if extents.shape != (count, 2) or _digest(hashes, extents) != index["digest"]:
            raise ValueError("hashes and extents are not those of its index")
        return PixelStore(folder, canvas=canvas, digest=index["digest"], extents=extents)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise StorageError(
            f"the pixel store {folder} is damaged: {error}",
            why="training on other pixels than were checked would go wrong in silence",
            fix=f"delete {folder} and run the same command again; the images are then read anew",
        ) from error


def build(
    source: Source,
    folder: Path,
    *,
    working_size: int | None,
    bad_csv: Path,
    max_bad_share: float = 0.05,
    threads: int,
) -> tuple[PixelStore, npt.NDArray[np.int64], list[BadImage]]:
    """Decode all images of source into a store at folder (replaced if it is there).

    working_size: the canvas side; None = the longest side in a sample of headers, at most 256. bad_csv: the file
    that lists unreadable images, always written. Returns the store, kept (the source's indices of its rows, in
    order) and the unreadable images. Raises DataError when more than max_bad_share of them are, or none is left;
    StorageError when the disk is full. Holds some tens of megabytes whatever the number of images.
    """
    canvas = working_size or _canvas(source)
    _check_space(folder, len(source), canvas)
    with checkpoint.storage_errors(folder), checkpoint.replacing(folder) as draft:
        reasons, columns = _write(source, draft, canvas, threads)
        bad = [BadImage(source.names[i], reason) for i, reason in enumerate(reasons) if reason]
        _write_bad(bad_csv, bad)
        _check_share(source, bad, max_bad_share, bad_csv)
        for name, array in columns.items():
            np.save(draft / f"{name}.npy", array)
        digest = _digest(columns["hashes"], columns["extents"])
        index = {"version": VERSION, "images": len(columns["extents"]), "canvas": canvas, "digest": digest}
        index["source"] = source.description
        (draft / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return open_store(folder), np.flatnonzero([not reason for reason in reasons]).astype(np.int64), bad


# --- decoding ----------------------------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    """n images decoded by one thread; only the readable m <= n have rows."""

    reasons: list[str]  # n of them, "" = readable
    pixels: npt.NDArray[np.uint8]  # (m, 3, C, C)
    columns: dict[str, npt.NDArray[Any]]  # extents (m, 2), hashes (m, 32), thumbs (m, 8, 9) or (0, 8, 9)


def _canvas(source: Source) -> int:
    sizes = [size for payload in source.sample(HEADERS) if (size := header_size(payload)) is not None]
    longest = max((max(size) for size in sizes), default=LARGEST_CANVAS)
    return min(max(longest, SMALLEST_CANVAS), LARGEST_CANVAS)


def _write(source: Source, draft: Path, canvas: int, threads: int) -> tuple[list[str], dict[str, npt.NDArray[Any]]]:
    """Stream the images through threads into pixels.u8, in order. Returns reasons and columns as of one chunk."""
    reasons: list[str] = []
    parts: dict[str, list[npt.NDArray[Any]]] = {}
    with (draft / "pixels.u8").open("wb") as file:
        for chunk in _decoded(source.payloads(), canvas, threads):
            file.write(chunk.pixels.data)
            reasons += chunk.reasons
            for name, column in chunk.columns.items():
                parts.setdefault(name, []).append(column)
    if len(reasons) != len(source):
        raise DataError(
            f"{source.description} gave {len(reasons):,} images instead of {len(source):,}",
            why="it changed while it was read",
            fix="run the command again",
        )
    return reasons, {name: np.concatenate(columns) for name, columns in parts.items()}


def _decoded(payloads: Iterable[Payload], canvas: int, threads: int) -> Iterator[_Chunk]:
    """Chunks in order, with only a few of them in flight."""
    with strict_pillow(), ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        waiting: deque[Future[_Chunk]] = deque()
        try:
            for chunk in _grouped(payloads, canvas):
                waiting.append(pool.submit(_decode_chunk, chunk, canvas))
                if len(waiting) > threads + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _grouped(payloads: Iterable[Payload], canvas: int) -> Iterator[list[Payload]]:
    """Chunks bounded in number, in pixels to come and in encoded bytes."""
    most = max(1, min(CHUNK_IMAGES, CHUNK_BYTES // (3 * canvas * canvas)))
    chunk: list[Payload] = []
    size = 0
    for payload in payloads:
        chunk.append(payload)
        size += len(payload) if isinstance(payload, bytes) else 0
        if len(chunk) >= most or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _decode_chunk(payloads: list[Payload], canvas: int) -> _Chunk:
    count = len(payloads)
    thumbed = canvas >= SMALLEST_THUMBED
    pixels = np.zeros((count, 3, canvas, canvas), np.uint8)
    extents = np.zeros((count, 2), np.int32)
    hashes = np.zeros((count, 32), np.uint8)
    thumbs = np.zeros((count if thumbed else 0, *THUMB), np.uint8)
    reasons = []
    row = 0
    for payload in payloads:
        try:
            image = decode(payload, canvas)  # (h, w, 3)
        except BadPicture as bad:
            reasons.append(str(bad))
            continue
        height, width = image.shape[:2]
        pixels[row, :, :height, :width] = image.transpose(2, 0, 1)
        extents[row] = height, width
        digest = hashlib.sha256(struct.pack("<II", height, width))
        digest.update(np.ascontiguousarray(image).data)
        hashes[row] = np.frombuffer(digest.digest(), np.uint8)
        if thumbed:
            small = Image.fromarray(image).convert("L").resize(THUMB[::-1], Image.Resampling.BOX)
            thumbs[row] = np.asarray(small)
        reasons.append("")
        row += 1
    columns: dict[str, npt.NDArray[Any]] = {"extents": extents[:row], "hashes": hashes[:row], "thumbs": thumbs[:row]}
    return _Chunk(reasons, pixels[:row], columns)


def _digest(hashes: npt.NDArray[np.uint8], extents: npt.NDArray[np.int32]) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(hashes, np.uint8).tobytes())
    digest.update(np.ascontiguousarray(extents, "<i4").tobytes())
    return digest.hexdigest()


# --- writing -----------------------------------------------------------------------------------------------------


def _check_share(source: Source, bad: list[BadImage], max_bad_share: float, bad_csv: Path) -> None:
    share = len(bad) / len(source)
    if share <= max_bad_share and len(bad) < len(source):
        return
    raise DataError(
        f"{len(bad):,} of {len(source):,} images ({100 * share:.1f} %) cannot be read",
        details=[f"{image.name}: {image.reason}" for image in bad],
        why=f"more than {100 * max_bad_share:g} % usually means a wrong folder or a broken download",
        fix=f"see {bad_csv} for all of them; mend or remove them, or allow a larger share",
    )


def _write_bad(path: Path, bad: list[BadImage]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "reason"])
        writer.writerows([cell(image.name), cell(image.reason)] for image in bad)


def _check_space(folder: Path, count: int, canvas: int) -> None:
    needed = count * (3 * canvas * canvas + 128)
    place = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise StorageError(
            f"the disk is full: the pixels need {needed / 1e6:,.0f} MB at {folder}, {free / 1e6:,.0f} MB are free",
            why="images are decoded once and kept as plain pixels",
            fix="free some space, put the run on another disk, or use a smaller working_size",
        )
