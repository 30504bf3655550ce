"""Whatever holds images becomes a Source: names, labels, splits, and the images themselves as a stream.

Reading order: `open_source`, then the openers in the order of `_open`, then how labels are laid over a source.
Nothing is decoded here.
"""

from __future__ import annotations

import functools
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fewlabels.data import folders, shards, tables
from fewlabels.data.decode import Payload
from fewlabels.data.parquet import open_parquet
from fewlabels.data.parts import ALLOWED_ARRAYS, Array, Files, Part, check_images, open_npy, open_npz
from fewlabels.errors import DataError, MissingInput, UsageError, nearest, printable

KINDS = """a folder of pictures, .tar or .parquet files, a labels CSV, a .tar, .parquet, .npz or .npy file, \
shards-{000..127}.tar, a URL of such files, a uint8 array, a list of paths, or "digits\""""
DIGITS_TRAIN = 1200  # of 1,797: the rest is the test split


@dataclass(frozen=True)
class Source:
    """Images, in a fixed order, with what is said of them.

    names are printable and for people; two images may share one. A label is a class name or None. classes are the
    names that the source declares, in its own order, if it does. folder is where the images' relative names start.
    lines are those of the CSV that says a label, 0 where none does; notes are what a person should know.
    """

    description: str
    names: Sequence[str]
    labels: Sequence[str | None]
    splits: Sequence[str]
    classes: tuple[str, ...] | None
    parts: tuple[Part, ...]
    folder: Path | None = None
    lines: npt.NDArray[np.int32] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def named(self, index: int) -> str:
        """An image's name in quotes, with the line of the CSV that says its label."""
        line = 0 if self.lines is None else int(self.lines[index])
        return f'"{self.names[index]}"' + (f" (line {line})" if line else "")

    def payloads(self) -> Iterator[Payload]:
        """Every image, one per name and in that order, streaming: a path, encoded bytes, or pixels."""
        return chain.from_iterable(part.payloads() for part in self.parts)

    def sample(self, count: int) -> Iterator[Payload]:
        """About count images from all over the source, without reading the rest where that is cheap."""
        share = max(1, count // len(self.parts))
        return chain.from_iterable(part.sample(share) for part in self.parts)

    @property
    def seekable(self) -> bool:
        """Whether `at` gives every image."""
        return all(part.at(0) is not None for part in self.parts if len(part))

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(len, self.parts)))

    def at(self, index: int) -> Payload | None:
        """One image by its place; None where its part is a stream only."""
        number = bisect_right(self._ends, index)
        return self.parts[number].at(index - (self._ends[number - 1] if number else 0))


def open_source(images: Any, labels: Any = None, *, test: Any = None) -> Source:
    """The Source of images.

    images: see KINDS. labels: a labels CSV, or one label per image, -1, None or "" = unlabeled; they replace what
    the images' own place or file says. test: held-out images of any kind, or a tuple (images, labels).
    Raises MissingInput for what is not there, DataError for what cannot be used, UsageError for a wrong kind.
    """
    source = _open(images)
    if labels is not None:
        source = _with_labels(source, labels)
    if test is not None:
        held_out = open_source(*test) if isinstance(test, tuple) and len(test) == 2 else _open(test)
        source = _with_test(source, held_out)
    return source


def _open(images: Any) -> Source:
    if isinstance(images, np.ndarray):
        return _array(images)
    if isinstance(images, str) and images == "digits":
        return _digits()
    if isinstance(images, str | os.PathLike):
        return _shards(str(images)) if shards.is_pattern(str(images)) else _path(Path(images))
    if isinstance(images, list | tuple):
        return _paths(images)
    raise UsageError(f"images cannot be a {type(images).__name__}", why=f"images are {KINDS}", fix=_array_hint(images))


def _array_hint(images: Any) -> str:
    return f"arrays are {ALLOWED_ARRAYS}" if hasattr(images, "shape") else "give one of these"


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
    paths = folders.scan(root)
    if not paths:
        if shards.find(str(root)).places:
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
    return _unlabeled(f"{len(paths):,} files", tuple(map(printable, paths)), Files(paths))


def _csv(path: Path) -> Source:
    """The images that a labels CSV names, each once, in the order of their first line."""
    table = tables.read_table(path)
    root = Path(os.path.realpath(path.parent))
    inside = tables.Finder([root], ())
    numbers: dict[str, int] = {}

    def find(image: str) -> int | str:
        for spelled in dict.fromkeys((image, image.strip(), image.strip().replace("\\", "/"))):
            file = os.path.normpath(root / spelled)
            if file.startswith(f"{root}{os.sep}") and os.path.lexists(file):
                return numbers.setdefault(file, len(numbers))
        return inside(image)

    near = (os.path.relpath(path, root) for path in root.rglob("*") if folders.is_picture(str(path)))
    answers = tables.match(table, find, lambda: near)
    files = tuple(numbers)
    return Source(
        description=f"labels CSV {printable(str(path))}",
        names=tuple(printable(os.path.relpath(file, root)) for file in files),
        labels=tuple(answers[i].label for i in range(len(files))),
        splits=tuple(answers[i].split or "train" for i in range(len(files))),
        classes=None,
        parts=(Files(files),),
        folder=root,
        lines=np.array([answers[i].line for i in range(len(files))], dtype=np.int32),
    )


# --- tables and arrays -------------------------------------------------------------------------------------------


def _shards(images: str | Path) -> Source:
    """Tar or parquet files. In a folder the file's name may say the split: train-00000-of-00001.parquet."""
    found, shown = shards.find(str(images)), printable(str(images))
    is_tar = [place.lower().endswith(".tar") for place in found.places]
    if all(is_tar):
        return _tars(found, shown)
    if any(is_tar):
        raise DataError(f"{shown} holds tar and parquet files", fix="give a folder of one kind")
    opened = [
        replace(source := _parquet(place), splits=(split,) * len(source))
        for place, split in zip(found.places, found.splits, strict=True)
    ]
    joined = functools.reduce(_joined, opened)
    return joined if len(opened) == 1 else replace(joined, description=f"parquet files {shown}")


def _tars(found: shards.Shards, shown: str) -> Source:
    facts = shards.open_tars(found, shown)
    if not facts.names:
        raise DataError(f"{shown} holds no pictures", why="members are known by their endings: .jpg, .png, ...")
    texts = "; the .txt members are captions and no labels" if facts.captions else ""
    source = _unlabeled(f"tar {shown} ({len(found.places):,} files{texts})", facts.names, facts.part)
    return _with_sequence(replace(source, splits=tuple(facts.splits)), facts.labels)


def _parquet(place: str) -> Source:
    facts = open_parquet(place)
    if not facts.names:
        raise DataError(f"{place} has no rows", fix="give a file with at least one image")
    source = _unlabeled(f"parquet {printable(place)}", tuple(map(printable, facts.names)), facts.part)
    source = replace(source, classes=facts.classes)
    return source if facts.labels is None else _with_sequence(source, facts.labels)


def _npz(path: Path) -> Source:
    images, small = open_npz(path)
    classes = tuple(str(name) for name in small["classes"].tolist()) if "classes" in small else None
    joined: Source | None = None
    for name, part in images.items():
        split = "test" if name == "test_images" else "train"
        source = _unlabeled(f"npz {printable(str(path))}", _numbers(len(part)), part)
        source = replace(source, classes=classes, splits=(split,) * len(part))
        labels = small.get(name.replace("images", "labels"))
        source = source if labels is None else _with_sequence(source, labels)
        joined = source if joined is None else _joined(joined, source)
    assert joined is not None
    return joined


def _npy(path: Path) -> Source:
    part = open_npy(path)
    return _unlabeled(f"npy {printable(str(path))}", _numbers(len(part)), part)


def _array(images: np.ndarray) -> Source:
    check_images(images.shape, images.dtype, "images")
    return _unlabeled(f"array of {len(images):,} images", _numbers(len(images)), Array(images))


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


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(f"image-{i:06d}" for i in range(count))


def _unlabeled(description: str, names: tuple[str, ...], part: Part) -> Source:
    count = len(names)
    return Source(description, names, (None,) * count, ("train",) * count, None, (part,))


# --- labels laid over a source -----------------------------------------------------------------------------------


def _with_labels(source: Source, labels: Any) -> Source:
    if not isinstance(labels, str | os.PathLike):
        return _with_sequence(source, labels)
    path = Path(labels)
    if path.suffix == ".txt" and not re.search("[,;\t]", tables.read_text(path)):
        return _with_list(source, path)
    table = tables.read_table(path)
    parts = [part for part in source.parts if isinstance(part, Files)]
    if len(parts) == len(source.parts):
        files = [file for part in parts for file in part.paths]
        where = [path.parent, source.folder] if source.folder else [path.parent]
        find = tables.Finder(where, _real_paths(files, source.folder))
    else:
        find = tables.Finder([Path("/")], (f"/{name}" for name in source.names))
    answers = tables.match(table, find, lambda: source.names)
    # Held-out images that the table does not name keep the class of their place, if it is one of the table's
    told, places = {a.label for a in answers.values()}, zip(source.labels, source.splits, strict=True)
    owns = (own if split != "train" and own in told else None for own, split in places)
    found = [answers.get(i) or tables.Answer(own, None, 0) for i, own in enumerate(owns)]
    return replace(
        source,
        description=f"{source.description}, labels from {printable(str(path))}",
        labels=tuple(answer.label for answer in found),
        splits=tuple(a.split or split for a, split in zip(found, source.splits, strict=True)),
        classes=None,
        lines=np.array([answer.line for answer in found], dtype=np.int32),
        notes=tables.overruled(found, source.names, source.labels, source.splits),
    )


def _with_list(source: Source, path: Path) -> Source:
    """source with labels for those training images only whose file names a text file lists, one a line.

    That is the form of the reference's subsets of ImageNet (imagenet_subsets/1percent.txt). The class is that of the
    image's place (its class folder), or the synset that the name begins with. Held-out images keep their labels.
    """
    lines = [line.strip() for line in tables.read_text(path).splitlines()]
    places: dict[str, list[int]] = {}
    for i, name in enumerate(source.names):
        places.setdefault(name.rsplit("/", 1)[-1], []).append(i)
    chosen: list[str | None] = [
        label if split != "train" else None for label, split in zip(source.labels, source.splits, strict=True)
    ]
    faults = []
    for number, name in enumerate(lines, start=1):
        found = places.get(name.rsplit("/", 1)[-1], [])
        synset = re.match(r"(n\d{8})_", name)
        label = source.labels[found[0]] if len(found) == 1 else None
        if name and len(found) != 1:
            faults.append(f'line {number}: "{name}" is the name of {len(found) or "no"} images')
        elif name and label is None and synset is None:
            faults.append(f'line {number}: "{name}" is in no class folder')
        elif name:
            chosen[found[0]] = label or synset[1]  # type: ignore[index]
    if faults or not any(lines):
        raise DataError(
            f"{len(faults):,} fault{'' if len(faults) == 1 else 's'} in {path}" if faults else f"{path} is empty",
            details=faults,
            why="each line names an image that is labeled; all others are used without their labels",
            fix="list file names of the images, or give a CSV with the columns image,label",
        )
    description = f"{source.description}, labels of the images in {printable(str(path))}"
    return replace(source, description=description, labels=tuple(chosen), classes=None)


def _real_paths(files: Sequence[str], root: Path | None) -> Iterable[str]:
    """Absolute paths that agree with a real folder's; links below root stay as they are named."""
    if root is None:
        return (os.path.join(os.path.realpath(os.path.dirname(f)), os.path.basename(f)) for f in files)  # noqa: PTH118, PTH119, PTH120
    real = os.path.realpath(root)
    return (real + file[len(str(root)) :] for file in files)


def _with_sequence(source: Source, labels: Iterable[Any]) -> Source:
    """source with one label per image, each an int, a class name, or -1, None, NaN or "" for unlabeled."""
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    if not isinstance(values, list) or len(values) != len(source):
        count = len(values) if isinstance(values, list) else 1
        raise DataError(
            f"{count:,} labels for {len(source):,} images ({source.description})",
            why="there must be exactly one label per image, -1 or None for an unlabeled one",
            fix="give the labels in the order of the images, or a CSV that names them",
        )
    classes = source.classes or ()
    faults = [f"class {k}: {fault}" for k, name in enumerate(classes) if (fault := tables.name_fault(name))]
    faults += [f'two classes are called "{name}"' for name, count in Counter(classes).items() if count > 1]
    names: dict[Any, str | None] = {}
    for i, value in enumerate(values):
        try:
            known = (type(value), value) in names
        except TypeError:
            faults.append(f"label {i}: a {type(value).__name__} is not a label")
            continue
        if not known:
            names[type(value), value], fault = _class_of(value, source.classes)
            faults += [f"label {i}: {fault}"] if fault else []
    alike = tables.twins(dict.fromkeys(name for name in names.values() if name is not None))
    faults += [f'the classes "{one}" and "{other}" look like one class' for one, other in alike]
    if faults:
        raise DataError(
            f"{len(faults):,} fault{'s' if len(faults) > 1 else ''} in the labels of {source.description}",
            details=faults,
            why="a label that is guessed would be learned",
            fix='use whole numbers or class names, and -1, None or "" for unlabeled images',
        )
    declared = (
        source.classes if source.classes and all(n is None or n in source.classes for n in names.values()) else None
    )
    return replace(source, labels=tuple(names[type(value), value] for value in values), classes=declared)


def _class_of(value: Any, classes: tuple[str, ...] | None) -> tuple[str | None, str]:
    """(class name or None, fault or '') of one label of a sequence."""
    if value is None or value == "" or value != value or (value == -1 and not isinstance(value, bool)):
        return None, ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        name = value.strip()
        return name or None, tables.label_fault(name) if name else ""
    if isinstance(value, bool):
        return str(value), ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int | np.integer) or value < 0:
        return None, f"{value!r} is neither a whole number from 0 nor a class name"
    if classes is None:
        return str(value), ""
    if value >= len(classes):
        return None, f"{value} is not one of the {len(classes)} declared classes (0 to {len(classes) - 1})"
    return classes[value], ""


def _with_test(source: Source, held_out: Source) -> Source:
    joined = _joined(source, replace(held_out, splits=("test",) * len(held_out)))
    return replace(joined, description=f"{source.description}, test images: {held_out.description}", folder=None)


def _joined(first: Source, second: Source) -> Source:
    """Both sources as one; declared classes stay only where both declare the same."""
    lines = [np.zeros(len(each), np.int32) if each.lines is None else each.lines for each in (first, second)]
    return replace(
        first,
        names=(*first.names, *second.names),
        labels=(*first.labels, *second.labels),
        splits=(*first.splits, *second.splits),
        classes=first.classes if first.classes == second.classes else None,
        parts=first.parts + second.parts,
        lines=np.concatenate(lines),
        notes=first.notes + second.notes,
    )
