"""The pixel store: every image decoded once, scaled onto one canvas, checked and hashed, then read at random for ever.

A store is a folder:
    pixels.u8    (N, 3, C, C) uint8, the image at the top left, zeros elsewhere
    extents.npy  (N, 2) int32, the image's (h, w) on its canvas
    hashes.npy   (N, 32) uint8, SHA-256 of each image's size and pixels
    thumbs.npy   (N, 8, 9) uint8, grey thumbnails to find near-duplicates (N = 0 on canvases below 24)
    index.json   format, number, canvas, digest, source, streamed
Where the disk cannot hold the pixels, streamed.py decodes them anew for each read, to the same bits.
It is complete or not there: written beside its place, flushed to disk, then renamed. Where a read finds other pixels
than were written, it leaves the file `damaged` there, and nobody opens the store any more.

Departure: training crops from the stored canvas and not from the original photo, so a crop of a large photo is less
sharp than the reference's. At C >= 1.15 x the training size that is what the reference's evaluation sees as well.

Shapes: N images, B of them, C the canvas side, h, w an image's size on it.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
import shutil
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fewlabels import checkpoint, runtime
from fewlabels.data.decode import BadPicture, Payload, decode, header_size, strict_pillow
from fewlabels.data.parts import UNREADABLE
from fewlabels.data.places import AT_ONCE
from fewlabels.data.source import Source
from fewlabels.data.streamed import OnDemand, Paths, pixel_hash, write_paths
from fewlabels.data.tables import cell
from fewlabels.errors import DataError, FewlabelsError, MissingInput, RunAgain, StorageError, UsageError

LARGEST_CANVAS = 256  # unless asked for: 196 KB an image; training at 224 crops from it
SMALLEST_CANVAS = 8
HEADERS = 256  # pictures whose headers decide the canvas
SURVEYED = 32  # images looked at to choose a recipe
CHUNK_BYTES = 8 << 20  # decoded, and encoded, in the hands of one thread
CHUNK_IMAGES = 64
THUMB = (8, 9)  # rows, columns: 8 differences a row make the 64-bit hash
SMALLEST_THUMBED = 24  # below it different images have equal thumbnails by chance
DAMAGED = "damaged"  # a file with what was found
DISK_SHARE = 0.8  # of what is free, for pixels; checkpoints and a teacher's answers come after them


@dataclass(frozen=True)
class BadImage:
    """An image that could not be read."""

    name: str
    reason: str


class PixelFile:
    """Pixels by row from pixels.u8.

    Reads with pread and not through a mapping: 256 random images of 160 pixels come at 0.8 to 1.0 of the mapping's
    speed, and nothing stays resident, where 256 MB read through a mapping made 1,000 MB of it (large pages).

    The first read of an image in a process compares it with its SHA-256: 0.14 ms at 256 x 256, where decoding takes
    1.0. To hash the file when it is opened would take as long as one pass over it at every start of a run. What lies
    outside of an image's extent is not compared: no view looks at it.
    """

    def __init__(self, folder: Path, extents: npt.NDArray[np.int32]) -> None:
        self.folder, self.path, self.extents = folder, folder / "pixels.u8", extents
        self.hashes = np.load(folder / "hashes.npy", mmap_mode="r", allow_pickle=False)  # (N, 32)
        self.compared = np.zeros(len(extents), bool)
        self._file = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def fill(self, pixels: npt.NDArray[np.uint8], rows: Sequence[int]) -> None:
        """Read the images of these rows into pixels (B, 3, C, C)."""
        for image, row in zip(pixels, rows, strict=True):
            try:
                count = os.preadv(self._file, [image.data], row * image.nbytes)
            except OSError as error:
                raise StorageError(f"reading {self.path} failed: {error.strerror}") from error
            if count != image.nbytes:
                raise StorageError(f"{self.path} ends early", fix="delete its folder and run the same command again")
            if not self.compared[row]:
                self._compare(image, row)

    def _compare(self, image: npt.NDArray[np.uint8], row: int) -> None:
        height, width = self.extents[row].tolist()
        upright = np.stack(tuple(image[:, :height, :width]), axis=-1)  # (h, w, 3), 3 times as fast as a transposed copy
        if pixel_hash(upright) == self.hashes[row].tobytes():
            self.compared[row] = True
            return
        words = f"the pixels of image {row} are not those that were written"
        with contextlib.suppress(OSError):  # somebody else's run, which may not be written to
            (self.folder / DAMAGED).write_text(words, encoding="utf-8")
        raise RunAgain(
            f"{self.path} is damaged: {words}",
            why="the disk or the memory has changed some bits; nothing was trained on them",
            fix="run the command that made it again: it reads the images anew and goes on from the last save",
        )


class PixelStore:
    """A complete store, open for reading from any number of threads and forked processes. See `open_store`."""

    def __init__(
        self, path: Path, pixels: PixelFile | OnDemand, *, canvas: int, digest: str, extents: npt.NDArray[np.int32]
    ) -> None:
        self.path, self.canvas, self.digest = path, canvas, digest
        self.streamed = isinstance(pixels, OnDemand)
        self._pixels, self._extents = pixels, torch.from_numpy(extents)  # (N, 2)

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

    def read(self, ids: npt.NDArray[np.int64] | Tensor, *, pinned: bool = False) -> tuple[Tensor, Tensor]:
        """Images by row: uint8 (B, 3, C, C), and int64 (B, 2) = the valid top-left (h, w).

        ids: int (B,), each from 0 to N - 1, else IndexError. pinned: pixels in memory that a GPU copies from by itself.
        A disk that fails is a StorageError, pixels that are not what was written RunAgain, a streamed picture that
        changed a DataError.
        """
        rows = torch.as_tensor(ids, dtype=torch.int64, device="cpu")
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= len(self)):
            raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of a store of {len(self)} images")
        make = torch.zeros if self.streamed else torch.empty
        pixels = make(len(rows), 3, self.canvas, self.canvas, dtype=torch.uint8, pin_memory=pinned)
        self._pixels.fill(pixels.numpy(), rows.tolist())
        return pixels, self._extents[rows].long()


def open_store(folder: Path, at: Callable[[int], Payload] | None = None) -> PixelStore:
    """The store in folder; its index, sizes and digest are checked. Raises MissingInput or StorageError.

    at: the picture of a row, for a streamed store of arrays; those of files know their paths.
    """
    if not (folder / "index.json").is_file():
        raise MissingInput(f"{folder} holds no pixel store", fix="run the command that made it again")
    try:
        index = checkpoint.read_sealed(folder / "index.json")
        checkpoint.check_format(index, folder / "index.json")
        if (folder / DAMAGED).exists():
            raise ValueError(checkpoint.read_text(folder / DAMAGED))
        count, canvas = int(index["images"]), int(index["canvas"])
        extents = np.load(folder / "extents.npy", allow_pickle=False)
        hashes = np.load(folder / "hashes.npy", allow_pickle=False)
        if extents.shape != (count, 2) or _digest(hashes, extents) != index["digest"]:
            raise ValueError("hashes and extents are not those of its index")
        pixels: PixelFile | OnDemand
        if index.get("streamed"):
            pictures = Paths(folder, count) if (folder / "ends.npy").is_file() else at
            if pictures is None:
                raise ValueError("its images are arrays, which only the process that made it had")
            pixels = OnDemand(folder, pictures, canvas=canvas, threads=runtime.threads_while_training())
        else:
            found, wanted = (folder / "pixels.u8").stat().st_size, count * 3 * canvas * canvas
            if found != wanted:
                raise ValueError(f"pixels.u8 has {found:,} bytes instead of {wanted:,}")
            pixels = PixelFile(folder, extents)
        return PixelStore(folder, pixels, canvas=canvas, digest=index["digest"], extents=extents)
    except UNREADABLE as error:
        if isinstance(error, DataError) and not isinstance(error, checkpoint.Damaged):
            raise  # of a newer fewlabels
        raise StorageError(
            f"the pixel store {folder} is damaged: {error}",
            why="training on other pixels than were checked would go wrong in silence",
            fix=f"delete {folder} and run the same command again; the images are then read anew",
        ) from error


def build(
    source: Source, folder: Path, *, working_size: int | None, bad_csv: Path, max_bad_share: float = 0.05, threads: int,
    store: str = "auto", accept: Callable[[PixelStore, npt.NDArray[np.int64]], None] = lambda _store, _kept: None,
) -> tuple[PixelStore, npt.NDArray[np.int64], list[BadImage]]:  # fmt: skip
    """Decode all images of source into a store at folder (replaced if it is there).

    working_size: the canvas side; None = the longest side in a sample of headers, at most 256. bad_csv: the file that
    lists unreadable images, always written. store: "pixels", "streamed" or, where the disk cannot hold pixels, "auto".
    accept: may refuse the new store, and its list with it, by raising, before it takes the place of an older one.
    Returns the store, kept (the source's indices of its rows, in order) and the unreadable images. Raises DataError
    when more than max_bad_share of them are, or none is left; StorageError when the disk is full; UsageError for a
    source that cannot be streamed. Holds some tens of megabytes and 112 bytes an image, in the end twice.
    """
    canvas = working_size or _canvas(source)
    threads = max(threads, AT_ONCE) if any(part.away for part in source.parts) else threads
    streamed = _is_streamed(store, source, folder, canvas)
    with checkpoint.storage_errors(folder), checkpoint.replacing(folder) as draft:
        reasons, columns = _write(source, None if streamed else draft / "pixels.u8", canvas, threads)
        kept = np.flatnonzero([not reason for reason in reasons]).astype(np.int64)
        bad = [BadImage(source.names[i], reason) for i, reason in enumerate(reasons) if reason]
        _write_bad(bad_csv, bad)
        _check_share(source, bad, max_bad_share, bad_csv)
        for name, array in columns.items():
            np.save(draft / f"{name}.npy", array)
        digest = _digest(columns["hashes"], columns["extents"])
        index: dict[str, Any] = {"format_version": checkpoint.FORMAT_VERSION, "images": len(columns["extents"])}
        index |= {"canvas": canvas, "digest": digest, "source": source.description, "streamed": streamed}
        if streamed and all(part.has_addresses for part in source.parts):
            write_paths(draft, (source.at(i) for i in kept.tolist()))
        checkpoint.write_sealed(draft / "index.json", index)
        try:
            accept(open_store(draft, lambda row: source.at(int(kept[row]))), kept)
        except FewlabelsError:
            bad_csv.unlink(missing_ok=True)
            raise
    return open_store(folder, lambda row: source.at(int(kept[row]))), kept, bad


def survey(source: Source) -> tuple[int, bool]:
    """The usual longest side of the images, and whether they are gray, from a few of them."""
    sides, gray = [], []
    for payload in source.sample(SURVEYED):
        size = header_size(payload)
        try:  # at full size one of 63 megapixels takes 670 MB
            image = decode(payload, LARGEST_CANVAS)  # (H, W, 3) uint8
        except BadPicture:
            continue
        sides.append(max(size or image.shape[:2]))
        spread = image.max(axis=2).astype(np.int16) - image.min(axis=2)
        gray.append(float(np.mean(spread > 8)) < 0.01)  # JPEG's chroma noise stays below 8 levels
    return (int(np.median(sides)), bool(np.mean(gray) > 0.95)) if sides else (32, False)


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


def _write(
    source: Source, pixels: Path | None, canvas: int, threads: int
) -> tuple[list[str], dict[str, npt.NDArray[Any]]]:
    """Stream the images through threads into the file of pixels, in order. Returns reasons and columns of a chunk."""
    reasons: list[str] = []
    columns: list[dict[str, npt.NDArray[Any]]] = []
    with pixels.open("wb") if pixels else contextlib.nullcontext() as file:
        for chunk in _decoded(source.payloads(), canvas, threads):
            reasons += chunk.reasons
            columns.append(chunk.columns)
            if file:
                file.write(chunk.pixels.data)
    if len(reasons) != len(source):
        raise DataError(
            f"{source.description} gave {len(reasons):,} images instead of {len(source):,}",
            why="it changed while it was read",
            fix="run the command again",
        )
    return reasons, {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}


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
        hashes[row] = np.frombuffer(pixel_hash(image), np.uint8)
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
        fix=f"see all of them in {bad_csv} (`check` leaves none); mend or remove them, or allow more with --max-bad",
    )


def _write_bad(path: Path, bad: list[BadImage]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "reason"])
        writer.writerows([cell(image.name), cell(image.reason)] for image in bad)


def _is_streamed(store: str, source: Source, folder: Path, canvas: int) -> bool:
    """Whether pixels are not kept. Raises StorageError where they should be and the disk is too small, or its index."""
    index = len(source) * 192  # with the paths
    needed = index + len(source) * 3 * canvas * canvas
    place = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    wanted = store == "streamed" or (store == "auto" and needed > DISK_SHARE * free)
    if wanted and source.seekable and index <= free:
        return True
    if store != "streamed" and needed <= free:
        return False
    if store == "streamed" and index <= free:
        raise UsageError(
            f"{source.description} cannot be streamed",
            why="images of npz files, and of large compressed row groups of parquet files, come one after the other, "
            "and training asks for them in any order",
            fix="write parquet anew with compression='none' or row_group_size=100, unpack npz into an .npy file, "
            "or use --store pixels",
        )
    fix = "free some space, put the run on another disk, or use a smaller working_size"
    if not source.seekable:
        fix += "; pictures in a folder or in tar files are decoded anew each time instead"
    elif store == "pixels":
        fix += "; --store streamed decodes them anew each time instead"
    raise StorageError(
        f"the disk is full: the pixels need {needed / 1e6:,.0f} MB at {folder}, {free / 1e6:,.0f} MB are free",
        why="images are decoded once and kept as plain pixels",
        fix=fix,
    )
