"""Whatever holds images becomes a Source: names, labels, splits, and the images themselves as a stream.

Reading order: `open_source`, then the openers in the order of `_open`. Nothing is decoded here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fewlabels.data import folders, shards, tables
from fewlabels.data.parquet import open_parquet
from fewlabels.data.parts import ALLOWED_ARRAYS, Array, Files, check_images, open_npy, open_npz
from fewlabels.data.source import Source, join, unlabeled
from fewlabels.data.told import with_labels, with_sequence
from fewlabels.errors import DataError, MissingInput, UsageError, nearest, printable

KINDS = """a folder of pictures, .tar or .parquet files, a labels CSV, a .tar, .parquet, .npz or .npy file, \
shards-{000..127}.tar, a URL of such files, a uint8 array, a list of paths, or "digits\""""
DIGITS_TRAIN = 1200  # of 1,797: the rest is the test split


def open_source(images: Any, labels: Any = None, *, test: Any = None) -> Source:
    """The Source of images.

    images: see KINDS. labels: a labels CSV, or one label per image, -1, None or "" = unlabeled; they replace what
    the images' own place or file says. test: held-out images of any kind, or a tuple (images, labels).
    Raises MissingInput for what is not there, DataError for what cannot be used, UsageError for a wrong kind.
    """
    source = _open(images)
    if labels is not None:
        source = with_labels(source, labels)
    if test is not None:
        held_out = open_source(*test) if isinstance(test, tuple) and len(test) == 2 else _open(test)
        both = f"{source.description}, test images: {held_out.description}"
        source = join(source, replace(held_out, splits=("test",) * len(held_out)))
        source = replace(source, description=both, folder=None)
    return source


def check_classes(source: Source) -> None:
    """Refuse two names that one class may have, unless both are declared. Only where labels are learned from."""
    first: dict[str, int] = {}
    for i, label in enumerate(source.labels):
        first.setdefault(label or "", i)
    alike = [pair for pair in tables.twins(first) if not {*pair} <= {*(source.classes or ())}]
    if alike:
        raise DataError(
            f"{source.description}: classes that look like one class",
            details=[" and ".join(f'"{name}" (as {source.named(first[name])})' for name in pair) for pair in alike],
            why="two spellings of one class would be learned as two classes",
            fix="write each class in one way: merge or rename folders, or correct the labels",
        )


def _open(images: Any) -> Source:
    if isinstance(images, np.ndarray):
        return _array(images)
    if isinstance(images, str) and images == "digits":
        return _digits()
    if isinstance(images, str) and not images:
        raise MissingInput("the path of the images is empty", why=f"images are {KINDS}", fix="is a variable unset?")
    if isinstance(images, str | os.PathLike):
        return _shards(str(images)) if shards.is_pattern(str(images)) else _path(Path(images))
    if isinstance(images, list | tuple):
        return _paths(images)
    fix = f"arrays are {ALLOWED_ARRAYS}" if hasattr(images, "shape") else "give one of these"
    raise UsageError(f"images cannot be a {type(images).__name__}", why=f"images are {KINDS}", fix=fix)


def _path(path: Path) -> Source:
    openers = {".csv": _csv, ".tsv": _csv, ".parquet": _shards, ".tar": _shards, ".npz": _npz, ".npy": _npy}
    if not path.exists():
        siblings = os.listdir(path.parent) if path.parent.is_dir() else []  # noqa: PTH208 - names, not paths
        raise MissingInput(
            f"{path}: no such file or folder{nearest(path.name, siblings)}",
            why=f"images are {KINDS}",
            fix="correct the path",
        )
    if path.is_dir():
        return _folder(path)
    opener = openers.get(path.suffix.lower())
    if opener is not None:
        return opener(path)
    if folders.is_picture(str(path)):
        return _paths([path])
    raise DataError(
        f"{path} is no kind of images that is known",
        why=f"images are {KINDS}",
        fix="give the pictures themselves, or the folder that they lie in",
    )


# --- files -------------------------------------------------------------------------------------------------------


def _folder(root: Path) -> Source:
    found = folders.scan(root, lambda path: shards.is_shard(path) or folders.is_picture(path))
    paths = [path for path in found if not path.lower().endswith(shards.ENDINGS)]
    passed = len(found) - len(paths)
    if not paths:
        if passed:
            return _shards(root)
        raise DataError(
            f"{root} holds no pictures",
            why="there is nothing to look at",
            fix="put pictures (JPEG, PNG, WebP, ...) into it, or into folders named after their classes",
        )
    labels, splits = folders.place(paths, root)
    return Source(
        description=f"folder {printable(str(root))}",
        names=tuple(map(printable, paths)),
        labels=tuple(labels),
        splits=tuple(splits),
        classes=None,
        parts=(Files(tuple(f"{root}/{path}" for path in paths)),),
        folder=root,
        notes=(f"{passed:,} .tar or .parquet files beside pictures are passed over",) if passed else (),
    )


def _paths(images: Sequence[Any]) -> Source:
    wrong = next((image for image in images if not isinstance(image, str | os.PathLike)), None)
    if wrong is not None:
        raise UsageError(
            f"a list of images holds a {type(wrong).__name__}",
            why="a list must hold paths of pictures",
            fix=f"stack arrays into one: {ALLOWED_ARRAYS}",
        )
    if not images:
        raise DataError("the list of images is empty", fix="give at least one path")
    paths = tuple(os.fsdecode(image) for image in images)
    return unlabeled(f"{len(paths):,} files", tuple(map(printable, paths)), Files(paths))


def _csv(path: Path) -> Source:
    """The images that a labels CSV names, each once, in the order of their first line."""
    table = tables.read_table(path)
    root = Path(os.path.realpath(path.parent))
    numbers: dict[str, int] = {}

    def look(path: str) -> int | None:
        inside = path.startswith(f"{str(root).rstrip(os.sep)}{os.sep}") and os.path.lexists(path)
        return numbers.setdefault(path, len(numbers)) if inside else None

    near = (os.path.relpath(path, root) for path in root.rglob("*") if folders.is_picture(str(path)))
    answers = tables.match(table, tables.Finder([root], look), lambda: near)
    files, said = tuple(numbers), [answers[number] for number in numbers.values()]
    return Source(
        description=f"labels CSV {printable(str(path))}",
        names=tuple(printable(os.path.relpath(file, root)) for file in files),
        labels=tuple(row.label for row in said),
        splits=tuple(row.split or "train" for row in said),
        classes=None,
        parts=(Files(files),),
        folder=root,
        lines=np.array([row.line for row in said], dtype=np.int32),
    )


# --- tables and arrays -------------------------------------------------------------------------------------------


def _shards(images: str | Path) -> Source:
    """Tar or parquet files. In a folder the file's name may say the split: train-00000-of-00001.parquet."""
    found, shown = shards.find(str(images)), printable(str(images))
    is_tar = [shards.ending(place) == ".tar" for place in found.places]
    if all(is_tar):
        return shards.open_tars(found, shown)
    if any(is_tar):
        raise DataError(f"{shown} holds tar and parquet files", fix="give a folder of one kind")
    opened = [
        replace(source := open_parquet(place), splits=(split,) * len(source))
        for place, split in zip(found.places, found.splits, strict=True)
    ]
    if len(opened) == 1:
        return opened[0]
    labeled = [source for source in opened if any(label is not None for label in source.labels)]
    bare = [s for s in labeled if not s.classes and all(label is None or label.isdecimal() for label in s.labels)]
    if bare and any(source.classes for source in labeled):
        raise DataError(
            f"of the parquet files {shown} some declare names of their classes and others have numbers only",
            details=[source.description for source in bare],
            why="which name a number means is not said",
            fix="write all of them with the class names, or with the names themselves",
        )
    joined = replace(join(*opened), description=f"parquet files {shown}")
    if len(set(joined.names)) < len(joined):  # else no table could name them
        names = (f"{file}/{n}" for file, source in zip(found.names, opened, strict=True) for n in source.names)
        joined = replace(joined, names=tuple(map(printable, names)))
    return joined


def _npz(path: Path) -> Source:
    images, small, passed = open_npz(path)
    declared = np.atleast_1d(small.get("classes", [])).tolist()
    texts = (name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in declared)
    classes = tuple(map(tables.composed, texts)) or None
    sources = []
    for name, part in images.items():
        split = "test" if name == "test_images" else "train"
        names = _numbers(len(part), "image" if split == "train" else split)
        source = unlabeled(f"npz {printable(str(path))}", names, part)
        source = replace(source, classes=classes, splits=(split,) * len(part))
        labels = small.get(name.replace("images", "labels"))
        sources.append(source if labels is None else with_sequence(source, labels))
    known = "images, labels, test_images, test_labels and classes are known"
    notes = (f"arrays of {printable(path.name)} that are passed over ({known}): {printable(', '.join(passed))}",)
    return replace(join(*sources), notes=notes if passed else ())


def _npy(path: Path) -> Source:
    part = open_npy(path)
    return unlabeled(f"npy {printable(str(path))}", _numbers(len(part)), part)


def _array(images: np.ndarray) -> Source:
    check_images(images.shape, images.dtype, "images")
    return unlabeled(f"array of {len(images):,} images", _numbers(len(images)), Array(images))


def _digits() -> Source:
    """scikit-learn's digits: 8x8 grey, values 0..16 stretched to 0..255."""
    from sklearn.datasets import load_digits  # 1.0 s to import, and only this source needs it

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    count = len(pixels)
    return Source(
        description="scikit-learn's digits",
        names=tuple(f"digit-{i:04d}" for i in range(count)),
        labels=tuple(str(label) for label in digits.target),
        splits=("train",) * DIGITS_TRAIN + ("test",) * (count - DIGITS_TRAIN),
        classes=tuple(str(digit) for digit in range(10)),
        parts=(Array(pixels),),
    )


def _numbers(count: int, word: str = "image") -> tuple[str, ...]:
    return tuple(f"{word}-{i:06d}" for i in range(count))
