"""How labels are laid over a source: a table or a list that names its images, or one label for each."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fewlabels.data import tables
from fewlabels.data.parts import Files
from fewlabels.data.source import Source
from fewlabels.errors import DataError, UsageError, counted, printable


def with_labels(source: Source, labels: Any) -> Source:
    """source with the labels of a CSV, of a list of files, or of a sequence."""
    if not isinstance(labels, str | os.PathLike):
        return with_sequence(source, labels)
    path = Path(labels)
    if path.suffix == ".txt" and not re.search("[,;\t]", tables.read_text(path)):
        return _with_list(source, path)
    rows = tables.match(tables.read_table(path, set(source.labels)), _finder(source, path), lambda: source.names)
    told = {row.label for row in rows.values() if row.label}
    places = enumerate(zip(source.labels, source.splits, strict=True))
    held = {i: own for i, (own, split) in places if own and split != "train" and i not in rows}
    # A class that the table spells otherwise keeps its images, so that the pair is refused and not passed over
    told |= {own for one, own in tables.twins([*told, *set(held.values())]) if one in told}
    nothing = tables.Row(0, "", None, None, sound=True)
    measured = {i: replace(nothing, label=own) for i, own in held.items() if own in told}
    found = [rows.get(i) or measured.get(i, nothing) for i in range(len(source))]
    lost = sorted({*held.values()} - told)
    note = f"not measured, since {path.name} has no such class: held-out images in {', '.join(lost[:20])}"
    note += f" ({len(held) - len(measured):,} of {len(source) - source.splits.count('train'):,})"
    return replace(
        source,
        description=f"{source.description}, labels from {printable(str(path))}",
        labels=tuple(row.label for row in found),
        splits=tuple(row.split or split for row, split in zip(found, source.splits, strict=True)),
        classes=None,
        lines=np.array([row.line for row in found], dtype=np.int32),
        notes=(*source.notes, *_overruled(source, found), *([note] if lost else [])),
    )


def _overruled(source: Source, found: Sequence[tables.Row]) -> tuple[str, ...]:
    """A note on images that the table takes out of their class folder or out of the held-out ones.

    found: the table's row for each image. A folder's name is a class only where the table has it as a class too: 2024/
    and 2025/ are none.
    """
    classes = {row.label for row in found if row.label}
    rows = [
        f'"{name}" (line {row.line})'
        for row, name, label, split in zip(found, source.names, source.labels, source.splits, strict=True)
        if (row.label and label in classes and label != row.label) or (row.split and split not in ("train", row.split))
    ]
    words = f"{counted(len(rows), 'image')} of another class or split than the place says"
    return (f"{words}; the CSV counts: {', '.join(rows[:3])}{', ...' if len(rows) > 3 else ''}",) if rows else ()


def _finder(source: Source, path: Path) -> tables.Finder:
    """Finds the images that the table in path names: files by their paths, others by their names."""
    parts = [part for part in source.parts if isinstance(part, Files)]
    if len(parts) < len(source.parts):
        return tables.Finder.among([Path("/")], (f"/{name.lstrip('/')}" for name in source.names))
    files = (file for part in parts for file in part.paths)
    if source.folder is None:  # absolute, as what is known of real folders outlives a change of the working one
        return tables.Finder.among([path.parent], (tables.through_links(str(Path(file).absolute())) for file in files))
    real = os.path.realpath(source.folder)  # links below it stay as they are named
    return tables.Finder.among([path.parent, source.folder], (real + file[len(str(source.folder)) :] for file in files))


def _with_list(source: Source, path: Path) -> Source:
    """source with labels for those training images only whose file names a text file lists, one a line.

    That is the form of the reference's subsets of ImageNet (imagenet_subsets/1percent.txt). The class is that of the
    image's place (its class folder), or the synset that the name begins with. Held-out images keep their labels.
    """
    lines = [line.strip() for line in tables.read_text(path).splitlines()]
    whole: dict[str, list[int]] = {}
    files: dict[str, list[int]] = {}
    for i, name in enumerate(source.names):
        whole.setdefault(name, []).append(i)
        files.setdefault(name.rsplit("/", 1)[-1], []).append(i)
    known = any("/" in line and line in whole for line in lines)  # else folders in the list are those of another place
    chosen = [label if split != "train" else None for label, split in zip(source.labels, source.splits, strict=True)]
    faults = []
    for number, name in enumerate(lines, start=1):
        if not name:
            continue
        file = name.rsplit("/", 1)[-1]
        found = whole.get(name) or ([] if known and file != name else files.get(file, []))
        if len(found) != 1:
            faults.append(f'line {number}: "{name}" is the name of {len(found) or "no"} images')
            continue
        synset = re.match(r"(n\d{8})_", file)
        label = source.labels[found[0]] or (synset and synset[1])
        if label is None:
            faults.append(f'line {number}: "{name}" is in no class folder')
        else:
            chosen[found[0]] = label
    if faults or not any(lines):
        raise DataError(
            f"{counted(len(faults), 'fault')} in {path}" if faults else f"{path} is empty",
            details=faults,
            why="each line names an image that is labeled; all others are used without their labels",
            fix="list file names of the images, or give a CSV with the columns image,label",
        )
    description = f"{source.description}, labels of the images in {printable(str(path))}"
    return replace(source, description=description, labels=tuple(chosen), classes=None)


def with_sequence(source: Source, labels: Iterable[Any]) -> Source:
    """source with one label per image, each an int, a class name, or -1, None, NaN or "" for unlabeled."""
    if isinstance(labels, Mapping | Set) or not (hasattr(labels, "tolist") or isinstance(labels, Iterable)):
        raise UsageError(f"labels cannot be a {type(labels).__name__}", fix="give a list, in the order of the images")
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    if not isinstance(values, list) or len(values) != len(source):
        count = len(values) if isinstance(values, list) else 1
        raise DataError(
            f"{count:,} labels for {len(source):,} images ({source.description})",
            why="there must be exactly one label per image, -1 or None for an unlabeled one",
            fix="give the labels in the order of the images, or a CSV that names them",
        )
    classes = tuple(map(tables.composed, source.classes or ()))
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
            names[type(value), value], fault = class_of(value, classes or None)
            faults += [f"label {i}: {fault}"] if fault else []
    if faults:
        raise DataError(
            f"{counted(len(faults), 'fault')} in the labels of {source.description}",
            details=faults,
            why="a label that is guessed would be learned",
            fix='use whole numbers or class names, and -1, None or "" for unlabeled images',
        )
    declared = classes if all(name is None or name in classes for name in names.values()) else None
    return replace(source, labels=tuple(names[type(value), value] for value in values), classes=declared or None)


def class_of(value: Any, classes: tuple[str, ...] | None) -> tuple[str | None, str]:
    """(class name, fault) of one label of a sequence: None = unlabeled, "" = no fault. classes: those of numbers."""
    if value is None or type(value).__name__ == "NAType":  # pandas.NA, of which no comparison is true or false
        return None, ""
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a scalar of numpy's or torch's
        value = value.item()
    if value == "" or value != value or (value == -1 and not isinstance(value, bool)):
        return None, ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        name = tables.composed(value.strip())
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
