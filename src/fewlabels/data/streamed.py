"""Images decoded anew each time they are read: for sets whose pixels the disk does not hold.

Such a store has the index of a pixel store (pixels.py), and in place of pixels.u8
    paths.bin   the pictures' addresses, one after the other: absolute paths, or what parts of which files they are
    ends.npy    (N,) int64, where each ends in paths.bin
or neither, where images are arrays, which their source still has. They are 80 bytes an image on the disk beside the
index's 112, and of both a process holds 8 bytes an image, and 8 for the state of its file; the rest is mapped.

What is read must be what was checked: its pixels are compared with their SHA-256, which finds every change, also one
of a decoder. That takes 0.07 ms where decoding and scaling take 1.0 (500 x 375 to 256), so a process does it once for
every state of a file: as long as its size, inode and times (one of which, ctime, nobody can set) stay, it is not done
again. A network disk may tell a change late; a run that begins anew, or goes on, compares every picture again. What
comes from a URL is compared each time: asking for its state would be one more request.

Shapes: N images of the store, B of them, C the canvas side.
"""

from __future__ import annotations

import hashlib
import os
import struct
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from fewlabels.data.decode import BadPicture, Payload, Pixels, decode, strict_pillow
from fewlabels.data.parquet import Cell
from fewlabels.data.places import AT_ONCE, Span, is_url
from fewlabels.errors import DataError


def pixel_hash(image: Pixels) -> bytes:
    """SHA-256 of an image's size and pixels. image: (h, w, 3)."""
    digest = hashlib.sha256(struct.pack("<II", *image.shape[:2]))
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()


class OnDemand:
    """Pixels by row from pictures by row; `at` gives a row's picture."""

    def __init__(self, folder: Path, at: Callable[[int], Payload], *, canvas: int, threads: int) -> None:
        self.at, self.canvas = at, canvas
        self.threads = max(threads, AT_ONCE) if _is_away(at(0)) else threads
        self.hashes = np.asarray(np.load(folder / "hashes.npy", mmap_mode="r", allow_pickle=False))  # (N, 32)
        self.compared = np.zeros(len(self.hashes), np.uint64)  # the state in which a file was last compared, 0 = never

    def fill(self, pixels: npt.NDArray[np.uint8], rows: Sequence[int]) -> None:
        """Write the images of these rows into pixels (B, 3, C, C), which are zeros. Raises DataError."""
        threads = max(1, min(self.threads, len(rows)))
        with strict_pillow(), ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
            list(pool.map(self._fill_one, pixels, rows))  # the first that fails cancels those that wait

    def _fill_one(self, canvas: npt.NDArray[np.uint8], row: int) -> None:
        picture = self.at(row)
        state = _state(picture)
        try:
            image = decode(picture, self.canvas)  # (h, w, 3)
        except BadPicture as bad:
            raise _changed(picture, row, f"cannot be read any more: {bad}") from bad
        # The state before and after reading: a file that changes in between is compared
        if not state or self.compared[row] != state or _state(picture) != state:
            if pixel_hash(image) != self.hashes[row].tobytes():
                raise _changed(picture, row, "is not the picture any more that was checked")
            self.compared[row] = state
        canvas[:, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)


def _state(picture: Payload) -> int:
    """A 64-bit number that is another one after a file has changed; 0 for what is in no file, away or gone."""
    if isinstance(picture, bytes | np.ndarray | Image.Image) or _is_away(picture):
        return 0
    try:
        found = os.stat(picture if isinstance(picture, Path) else picture.place)  # noqa: PTH116
    except OSError:
        return 0
    words = struct.pack("<QQqq", found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")


def _is_away(picture: Payload) -> bool:
    return isinstance(picture, Span | Cell) and is_url(picture.place)


def _changed(picture: Payload, row: int, words: str) -> DataError:
    return DataError(
        f"{f'image {row}' if isinstance(picture, bytes | np.ndarray) else picture} {words}",
        why="images of this run are decoded anew each time they are seen, and must stay as they were when it began",
        fix="put it back as it was and run the same command again: it goes on from the last save",
    )


# --- addresses ---------------------------------------------------------------------------------------------------


def write_paths(folder: Path, pictures: Iterable[Payload]) -> None:
    """paths.bin and ends.npy of a store's pictures, row by row, in place of those that may be there.

    A kill between the two leaves what does not fit together, and is found.
    """
    draft = folder / "paths.new"
    with draft.open("wb") as file:
        lengths = np.fromiter((file.write(_address(picture)) for picture in pictures), np.int64)
    draft.replace(folder / "paths.bin")
    np.save(folder / "ends.npy", np.cumsum(lengths))


def _address(picture: Payload) -> bytes:
    """The picture as bytes: a path, or with zero bytes between them the four words of a Span or the five of a Cell."""
    assert isinstance(picture, Path | Span | Cell)
    words: list[object] = [picture]
    if isinstance(picture, Span):
        words = [picture.place, picture.name, picture.begin, picture.length]
    elif isinstance(picture, Cell):
        words = [picture.place, picture.name, picture.column, picture.group, picture.row]
    if not is_url(str(words[0])):
        words[0] = os.path.abspath(str(words[0]))  # noqa: PTH100 - a link stays as it is named
    return b"\0".join(os.fsencode(str(word)) for word in words)


class Paths:
    """Pictures by row from the files of write_paths. Raises ValueError if these do not fit together or to `count`."""

    def __init__(self, folder: Path, count: int) -> None:
        self._ends = np.asarray(np.load(folder / "ends.npy", mmap_mode="r", allow_pickle=False))  # (N,)
        self._file = os.open(folder / "paths.bin", os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        fits = self._ends.shape == (count,) and os.fstat(self._file).st_size == self._ends[-1]
        if not fits or self._ends[0] < 0 or (self._ends[1:] < self._ends[:-1]).any():
            raise ValueError("paths.bin and ends.npy are not of one piece")

    def __call__(self, row: int) -> Path | Span | Cell:
        begin, end = int(self._ends[row - 1]) if row else 0, int(self._ends[row])
        place, *words = map(os.fsdecode, os.pread(self._file, end - begin, begin).split(b"\0"))
        if not words:
            return Path(place)
        if len(words) == 3:
            return Span(place, words[0], int(words[1]), int(words[2]))
        return Cell(place, words[0], words[1], int(words[2]), int(words[3]))
