"""A folder of pictures: what is a picture in it by name, and which class and split its place says."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Set
from pathlib import Path

from fewlabels.data.decode import picture_magic
from fewlabels.data.tables import SPLITS, composed
from fewlabels.errors import DataError, StorageError, printable

# also the pictures that we cannot read, so that they are named and not passed over in silence
_PICTURES = """
.jpg .jpeg .jpe .jfif .mpo .png .apng .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .ico .avif
.heic .heif .hif .jp2 .j2k .jxl .psd .svg .tga .qoi .exr .hdr .wmf .eps .cr2 .cr3 .nef .arw .dng .raw
.jxr .icns .cur .sgi .fli .flc .blp .ff .pcx .dds .ras .xbm .xpm .fits .emf
"""
_CLUTTER = """
.csv .tsv .txt .json .jsonl .md .rst .xml .yaml .yml .toml .html .pdf .ini .db .log .py .sh .parquet .npy .npz
.zip .tar .gz .7z .rar .pt .pth .mat .xlsx .xls .doc .docx .mp4 .mov .avi .lnk .tmp .part .license
"""
PICTURES, CLUTTER = frozenset(_PICTURES.split()), frozenset(_CLUTTER.split())
CLUTTER_NAMES = ("readme", "license", "licence", "copying", "makefile", "manifest")
UNLABELED = ("unlabeled", "unlabelled")


def scan(root: Path, wanted: Callable[[str], bool]) -> list[str]:
    """Every file below root that is wanted, by its path, as a relative path; sorted by bytes.

    Linked folders are entered after the real ones and never twice (by device and inode): loops end, and a folder
    that is also here in its own right is counted there.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    linked = [""]
    while linked:
        waiting = [linked.pop(0)]
        while waiting:
            below = waiting.pop()
            status = (root / below).stat()
            node = (status.st_dev, status.st_ino)
            if node in seen:
                continue
            seen.add(node)
            for entry in sorted(_entries(root / below), key=lambda entry: os.fsencode(entry.name)):
                path = f"{below}/{entry.name}" if below else entry.name
                if os.path.isdir(entry.path):  # noqa: PTH112 - False for a looping link, where entry.is_dir() raises
                    if not entry.name.startswith(".") and entry.name != "__MACOSX":
                        (linked if entry.is_symlink() else waiting).append(path)
                elif wanted(entry.path):
                    found.append(path)
        linked.sort(key=os.fsencode)
    return sorted(found, key=os.fsencode)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise StorageError(
            f"the folder {folder} cannot be listed: {error.strerror}",
            fix="give yourself the right to read it, or move it away",
        ) from error


def is_picture(path: str) -> bool:
    """Whether a file is meant to be a picture: by its extension, else by its first bytes. Pipes are never opened."""
    name = os.path.basename(path)  # noqa: PTH119 - called for every file
    stem, extension = os.path.splitext(name.lower())  # noqa: PTH122
    if name.startswith("."):
        return False
    if extension in PICTURES:
        return True
    if extension in CLUTTER or stem in CLUTTER_NAMES:
        return False
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
            return False
        with open(path, "rb") as file:  # noqa: PTH123
            return picture_magic(file.read(32))
    except OSError:
        return False


def place(paths: list[str], root: Path) -> tuple[list[str | None], list[str]]:
    """(label or None, split) of each relative path.

    Folders at the top are classes, or splits if all of them (but unlabeled/) have a split's name. Below that the first
    folder is the class; loose files and unlabeled/ have none. "train" may be a class, unless folders in it look like
    classes: where no other top has folders in it, or has the same.
    """
    tops = {path.split("/", 1)[0] for path in paths if "/" in path}
    tops = {top for top in tops if top.casefold() not in UNLABELED}
    splits = {top for top in tops if top.casefold() in SPLITS}
    if splits != tops and (len(splits) > 1 or not _are_classes(splits, tops - splits, paths)):
        others = ", ".join(sorted(tops - splits)[:5])
        raise DataError(
            f"{root} holds the splits {', '.join(sorted(splits))} and beside them {others}",
            why="the folders at the top must be all splits or all classes",
            fix="move the others into train/, or move the split away and give it with --test",
        )
    in_splits = bool(splits) and splits == tops
    labels, found = [], []
    for path in paths:
        *folders, _ = path.split("/")
        split = "train"
        if in_splits and folders and folders[0].casefold() in SPLITS:
            split = SPLITS[folders.pop(0).casefold()]
        is_class = bool(folders) and folders[0].casefold() not in UNLABELED
        labels.append((composed(printable(folders[0])).strip() or None) if is_class else None)  # as a table's label
        found.append(split)
    return labels, found


def _are_classes(splits: Set[str], others: Set[str], paths: list[str]) -> bool:
    """Whether tops with a split's name are classes like the others: `place` says when."""
    second = {(top, inner) for top, inner, *more in (path.split("/") for path in paths if "/" in path) if more}
    own, beside = ({inner for top, inner in second if top in tops} for tops in (splits, others))
    return {SPLITS[top.casefold()] for top in splits} <= {"train"} and (not own or (bool(beside) and not own & beside))
