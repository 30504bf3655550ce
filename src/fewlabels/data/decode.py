"""One picture file becomes upright 8-bit RGB that looks right, or is refused with the reason in plain words.

Go by content, never by the file's extension. Only well-kept decoders are asked (FORMATS): the others are where the
security faults of the last years were. Colour profiles are not applied; an animation or a multi-page file is its
first frame; what is transparent becomes white, the usual page behind a cut-out.

Pillow opens every picture and judges it. A plain JPEG that it would read whole is decoded by torchvision (the same
libjpeg-turbo, the same pixels, and 1.2 times as fast); where that finds a fault, Pillow says which.

Shapes: H, W a picture's height and width.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import io
import os
import stat
import struct
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, JpegImagePlugin, UnidentifiedImageError

from fewlabels.errors import StorageError


@dataclass(frozen=True)
class Inside(ABC):
    """A picture in a larger file, read when and where it is decoded (places.Span, parquet.Cell)."""

    place: str  # the file
    name: str  # what the picture is called in there

    def __str__(self) -> str:
        return f"{self.place}{self.name}"

    @abstractmethod
    def read(self) -> bytes:
        """Its bytes. Raises BadPicture, StorageError, or what reading a file that is gone or damaged can raise."""


Payload = Path | bytes | npt.NDArray[np.uint8] | Image.Image | Inside
Pixels = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "ICO", "AVIF")
MAX_MEGAPIXELS = 64  # 12,000 x 12,000 in a PNG of a few KB took 707 MB resident; most cameras stop at about 60
MAX_PHOTO = 200  # megapixels of a JPEG that is scaled down row by row as it is read; phones make 108 and 200
MAX_BYTES = 512 << 20
# What opening or reading a file says where not it is at fault, but its server or this machine; EIO is a bad sector's
FAILING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)
AT_ONCE = 4 << 20  # bytes of a file that is read whole: Pillow asks for headers in dozens of small reads
GAP = 3.0  # a picture of twice this many times the target is first averaged in whole blocks (Pillow's reducing_gap)
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
NOT_PICTURES = (  # how a file begins, and what to call it
    (b"version https://git-lfs", "a Git LFS pointer instead of the picture; run `git lfs pull`"),
    (b"%PDF", "a PDF, not a picture"),
    (b"PK\x03\x04", "a zip archive, not a picture"),
    (b"8BPS", "a Photoshop file; save it as JPEG or PNG"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000; save it as JPEG or PNG"),
    (b"\xffO\xffQ", "JPEG 2000; save it as JPEG or PNG"),
)


class BadPicture(Exception):
    """A picture that cannot be read; the text is the reason, for the user."""


def decode(payload: Payload, canvas: int | None = None) -> Pixels:
    """(H, W, 3) uint8 RGB, upright, in fresh or shared memory; raises BadPicture with the reason.

    payload: a file, a file's bytes, a PIL image, or pixels (H, W) or (H, W, 1 or 3) uint8. canvas: the longer side is
    scaled down to it, never up, both sides staying at least 1. Never raises anything else but KeyboardInterrupt and its
    like, and StorageError for bytes that do not arrive from a URL or a failing machine.
    """
    try:
        with strict_pillow():
            if isinstance(payload, np.ndarray):
                return _from_array(payload, canvas)
            if isinstance(payload, Image.Image):
                _check_size(payload)
                with _lock:  # the same one may come twice at once, and Pillow reads its file when pixels are asked for
                    image = payload.copy()
                return _pixels(image, canvas, _orientation(payload))  # a copy leaves out what was set in memory
            with _open(payload) as stream, _identified(stream, canvas) as image:
                pixels = _plain_jpeg(image, stream, canvas)
                return _pixels(image, canvas) if pixels is None else pixels
    except (BadPicture, StorageError):
        raise
    except Exception as error:  # decoders let any kind out: ValueError, SyntaxError, struct.error, MemoryError ...
        if isinstance(error, OSError) and error.errno in FAILING:
            what = "a picture" if isinstance(payload, bytes | np.ndarray | Image.Image) else payload
            fix = "run the same command again: it goes on from the last save"
            raise StorageError(f"{what} could not be read: {error.strerror}", why="it may be sound", fix=fix) from error
        raise BadPicture(_reason(error)) from error


def header_size(payload: Payload) -> tuple[int, int] | None:
    """(height, width) as the header says, without decoding; None where it cannot be read. Raises StorageError."""
    if isinstance(payload, np.ndarray):
        return int(payload.shape[0]), int(payload.shape[1])
    if isinstance(payload, Image.Image):
        return payload.height, payload.width
    try:
        with strict_pillow(), _open(payload) as stream, _identified(stream, canvas=1) as image:
            return image.height, image.width
    except StorageError:
        raise
    except Exception:
        return None


def fitted(height: int, width: int, canvas: int | None) -> tuple[int, int]:
    """The (height, width) that a picture gets on a canvas: never larger, no side below 1."""
    longest = max(height, width)
    if canvas is None or longest <= canvas:
        return height, width
    return max(1, round(height * canvas / longest)), max(1, round(width * canvas / longest))


# --- Pillow, made strict -----------------------------------------------------------------------------------------

_lock = threading.Lock()
_users = 0
_undo = contextlib.ExitStack()


@contextlib.contextmanager
def strict_pillow() -> Iterator[None]:
    """Half-read pictures are errors, giant ones too, and metadata warnings are silent, however many threads decode.

    These are settings of the whole process (another library may have allowed truncated files), so the first user
    sets them and the last one puts them back.
    """
    global _users  # noqa: PLW0603 - the count belongs to the process, as the settings do
    with _lock:
        if _users == 0:
            Image.init()
            _undo.callback(setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
            _undo.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
            ImageFile.LOAD_TRUNCATED_IMAGES = False
            Image.MAX_IMAGE_PIXELS = MAX_MEGAPIXELS * 1_000_000
            _undo.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"PIL\.")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _undo.close()


def _open(payload: Path | bytes | Inside) -> BinaryIO:
    if not isinstance(payload, Path | bytes):
        payload = payload.read()
    if isinstance(payload, bytes):
        if not payload:
            raise BadPicture("empty (0 bytes)")
        return io.BytesIO(payload)
    status = os.stat(payload)  # before opening: opening a named pipe would wait for ever  # noqa: PTH116
    if stat.S_ISDIR(status.st_mode):
        raise BadPicture("a folder, not a picture")
    if not stat.S_ISREG(status.st_mode):
        raise BadPicture("not a regular file (a pipe, socket or device)")
    if status.st_size == 0:
        raise BadPicture("empty (0 bytes)")
    if status.st_size > MAX_BYTES:
        raise BadPicture(f"{status.st_size >> 20:,} MB, more than the {MAX_BYTES >> 20} MB allowed")
    return payload.open("rb") if status.st_size > AT_ONCE else io.BytesIO(payload.read_bytes())


def _identified(stream: BinaryIO, canvas: int | None) -> ImageFile.ImageFile:
    try:
        image = Image.open(stream, formats=tuple(name for name in FORMATS if name in Image.OPEN))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        stream.seek(0)
        if stream.read(2) != b"\xff\xd8":
            raise
        stream.seek(0)
        image = JpegImagePlugin.JpegImageFile(stream)
    except UnidentifiedImageError:
        stream.seek(0)
        raise BadPicture(_what_it_is(stream.read(512))) from None
    _check_size(image, MAX_PHOTO if _is_drafted(image, canvas) and _is_in_one_scan(image) else MAX_MEGAPIXELS)
    return image


def _check_size(image: Image.Image, most: int = MAX_MEGAPIXELS) -> None:
    megapixels = image.width * image.height / 1e6
    if megapixels > most:
        raise BadPicture(f"{megapixels:,.0f} megapixels, more than the {most} allowed")
    if min(image.size) < 1:
        raise BadPicture("a picture of no pixels")


def _is_drafted(image: Image.Image, canvas: int | None) -> bool:
    """Whether libjpeg scales it down while reading, which it does for Pillow only."""
    height, width = fitted(image.height, image.width, canvas)
    return image.format == "JPEG" and min(image.height // (2 * height or 1), image.width // (2 * width or 1)) > 1


def _is_in_one_scan(image: Any) -> bool:
    """Whether a JPEG can be decoded row by row; for several scans libjpeg holds all of its coefficients."""
    # Pillow has just read the first scan's header, which ends: number of channels (1 byte), 2 bytes for each, 3 more
    image.fp.seek(-(1 + 2 * image.layers + 3), os.SEEK_CUR)
    return not image.info.get("progressive") and image.fp.read(1)[0] == image.layers


def _what_it_is(start: bytes) -> str:
    for prefix, name in NOT_PICTURES:
        if start.startswith(prefix):
            return name
    if start[4:8] == b"ftyp":
        return "HEIF or HEIC; save it as JPEG or PNG"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in text:
        return "an SVG drawing, not a picture; save it as PNG"
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page, not a picture"
    if not any(start):
        return "nothing but zero bytes"
    return "not a picture, or damaged at its beginning (read are " + ", ".join(FORMATS) + ")"


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"more than the {MAX_MEGAPIXELS} megapixels allowed (a decompression bomb?)"
    if isinstance(error, FileNotFoundError):
        return "no such file (a dangling link?)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    return f"damaged: {' '.join(str(error).split()) or type(error).__name__}"


# --- one opened picture ------------------------------------------------------------------------------------------


def _from_array(array: npt.NDArray[np.uint8], canvas: int | None) -> Pixels:
    """(H, W), (H, W, 1) or (H, W, 3) uint8 -> (H, W, 3)."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    height, width = array.shape[:2]
    if fitted(height, width, canvas) == (height, width):
        return array if array.ndim == 3 else np.repeat(array[:, :, None], 3, axis=2)
    return _pixels(Image.fromarray(np.ascontiguousarray(array)), canvas)


def _pixels(image: Image.Image, canvas: int | None, orientation: int | None = None) -> Pixels:
    """(H, W, 3): scaled as early as can be, so that a large picture is converted and turned when it is small.

    orientation: EXIF's, in place of the image's own.
    """
    height, width = fitted(image.height, image.width, canvas)
    if (height, width) != (image.height, image.width):
        # libjpeg decodes at 1/2, 1/4 or 1/8; kept at twice the target, the result cannot be told from the full one
        image.draft(None, (width * 2, height * 2)) if isinstance(image, ImageFile.ImageFile) else None
    image.load()
    turn = UPRIGHT.get(_orientation(image) if orientation is None else orientation)
    height, width = fitted(image.height, image.width, canvas)  # TIFF turns itself upright while loading
    image = _eight_bit(image)
    if (width, height) != image.size:
        image = _scaled(image, height, width)
    if turn is not None:
        image = image.transpose(turn)
    return np.asarray(_on_white(image))


def _plain_jpeg(image: ImageFile.ImageFile, stream: BinaryIO, canvas: int | None) -> Pixels | None:
    """What _pixels gives for a JPEG of three channels, None where that has to be asked.

    A damaged stream makes libjpeg say so on stderr, once a picture.
    """
    height, width = fitted(image.height, image.width, canvas)
    whole = (height, width) == (image.height, image.width)
    shrink = None if whole else _compiled(image, height, width)
    if image.format != "JPEG" or image.mode != "RGB" or _is_drafted(image, canvas) or not (whole or shrink):
        return None
    import torch
    from torchvision.io import decode_jpeg  # 1 s to import, and `--help` reads no picture

    stream.seek(0)
    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(stream.read()), dtype=torch.uint8)).permute(1, 2, 0).numpy()
    except RuntimeError:
        return None
    if pixels.shape != (image.height, image.width, 3):
        return None
    pixels = shrink.shrink(pixels, height, width) if shrink else pixels
    turn = UPRIGHT.get(_orientation(image))
    return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))


def _scaled(image: Image.Image, height: int, width: int) -> Image.Image:
    """Down columns, then along rows: in one call the order, and with it the pixels, would be up to Pillow's version."""
    shrink = _compiled(image, height, width)
    if shrink is not None:
        return Image.fromarray(shrink.shrink(np.asarray(image), height, width))
    image = image.resize((image.width, height), Image.Resampling.BICUBIC, reducing_gap=GAP)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=GAP)


def _compiled(image: Image.Image, height: int, width: int) -> ModuleType | None:
    """data/shrink.py, where it can be used and does what Pillow does."""
    steep = max(image.height / height, image.width / width) >= 2 * GAP
    return None if image.mode != "RGB" or steep else _shrink()


@functools.cache
def _shrink() -> ModuleType | None:
    try:
        return importlib.import_module("fewlabels.data.shrink")
    except (ImportError, RuntimeError):  # as views.compiled()
        return None


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or the metadata are broken."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF raises nearly anything
        return 1
    return value if isinstance(value, int) else 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """image as L, LA, RGB or RGBA, so that scaling averages colours and not palette numbers."""
    mode, transparent = image.mode, "transparency" in image.info
    if mode.startswith(("I", "F")):
        return _from_levels(np.asarray(image), image.info.get("transparency"))
    if mode in ("RGBA", "LA"):
        return image
    if mode in ("PA", "La", "RGBa") or transparent:
        return image.convert("RGBA")
    return image if mode in ("L", "RGB") else image.convert("L" if mode == "1" else "RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA"):
        cutout = image.convert("RGBA")
        page = Image.new("RGBA", cutout.size, "white")
        image = Image.alpha_composite(page, cutout)
    return image.convert("RGB")


def _from_levels(levels: npt.NDArray[Any], clear: object) -> Image.Image:
    """(H, W) of 16- or 32-bit numbers or fractions -> 8-bit grey. Pillow's own conversion clips at 255: all white.

    The brightest pixel becomes white, and zero, or the darkest below it, black: microscopes and scanners write 12 bits
    into 16-bit files, and fractions know no white. Departure: it is lost how bright one picture is beside another. To
    guess the bits from the peak made two shots of one scene differ 16 times. clear: the level that means transparent.
    """
    values = levels.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        raise BadPicture("no pixel is a finite number")
    values = np.where(finite, values, values[finite].min())
    low, high = min(float(values.min()), 0.0), float(values.max())
    grey = np.rint((values - low) * (255 / ((high - low) or 1))).astype(np.uint8)
    if isinstance(clear, int):
        grey[levels == clear] = 255
    return Image.fromarray(grey)


def picture_magic(start: bytes) -> bool:
    """Whether a file that begins so is a picture of one of FORMATS (for names without a known extension)."""
    if start[:4] == b"RIFF":
        return start[8:12] == b"WEBP"
    if start[4:8] == b"ftyp":
        return start[8:12] in (b"avif", b"avis")
    if start[:2] == b"BM" and len(start) >= 18:
        return struct.unpack("<I", start[14:18])[0] in (12, 40, 52, 56, 64, 108, 124)
    return start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))
