"""Pixels and labels joined: who is trained on, who is held out, and everything about them that a person should know.

What would make a result wrong is refused (one picture with two labels, a class that only the test images have);
what would make it flattering is removed and said (training images that are also held out).

Shapes: N images in the store, K classes.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fewlabels import checkpoint
from fewlabels.data.pixels import PixelStore
from fewlabels.data.source import Source
from fewlabels.data.tables import composed
from fewlabels.errors import DataError, UsageError, counted, nearest, printable

Ints = npt.NDArray[np.int64]
TRAIN, VAL, TEST, LEAKED = 0, 1, 2, 3  # LEAKED: a training image that is also held out; nobody sees it
SPLIT_NUMBERS = {"train": TRAIN, "val": VAL, "test": TEST}
SPLIT_WORDS = {number: word for word, number in SPLIT_NUMBERS.items()} | {LEAKED: "leaked"}
NAMED = 3  # examples in a note
FLAT = 10.0  # standard deviation of a thumbnail below which all pictures look alike
CLOSE = 3.0  # mean grey levels between the thumbnails of one photo saved twice
MOST_ALIKE = 32  # held-out images with the same quarter of a hash that are compared
ROWS = 1 << 12  # training images compared at once: 65,536 frames of one scene took 680 MB


@dataclass(frozen=True)
class Understood:
    """What was made of the images and labels, in numbers. images counts all splits and the leaked ones."""

    images: int
    train: int
    val: int  # pictures, as of test and held_out: a copy does not count again
    test: int
    labeled: int  # training images with a label
    classes: dict[str, int]  # labeled training images of each class
    held_out: int  # labeled images that measure the result
    unreadable: int = 0
    duplicates: int = 0  # training images that repeat another training image, byte for byte
    leaks: int = 0  # training images left out because they are also held out
    hidden: int = 0  # labels hidden on request
    notes: tuple[str, ...] = field(default=())

    def line(self) -> str:
        """One line, such as "9,469 images, 100 labeled in 10 classes, 12 unreadable, 4 duplicates"."""
        parts = [counted(self.train, "image")]
        known = f"{self.labeled:,} labeled in {counted(len(self.classes), 'class', 'classes')}"
        parts.append(known if self.labeled else "no labels")
        parts += [f"{self.unreadable:,} unreadable"] if self.unreadable else []
        parts += [counted(self.duplicates, "duplicate")] if self.duplicates else []
        parts += [f"{self.leaks:,} left out because they are also held out"] if self.leaks else []
        held = [(self.val, "validation"), (self.test, "test")]
        parts += [f"{counted(number, f'held-out {name} image')}" for number, name in held if number]
        return ", ".join(parts)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A pixel store with what is known of its N images, row by row."""

    store: PixelStore
    names: tuple[str, ...]
    labels: Ints  # (N,) class number, -1 = unlabeled
    splits: npt.NDArray[np.int8]  # (N,) 0 train, 1 val, 2 test, 3 leaked: left out
    classes: tuple[str, ...]
    unreadable: int = 0
    hidden: int = 0  # labels hidden on request
    notes: tuple[str, ...] = ()  # what a person should know

    @functools.cached_property
    def understood(self) -> Understood:
        """All of it in numbers."""
        groups, train, counts = _identical(self.store.hashes), self.splits == TRAIN, self.labels_a_class
        val, test = (len(np.unique(groups[self.splits == split])) for split in (VAL, TEST))
        return Understood(
            images=len(self.names), train=int(train.sum()), val=val, test=test, labeled=int(counts.sum()),
            classes=dict(zip(self.classes, counts.tolist(), strict=True)), held_out=len(self.held_out),
            unreadable=self.unreadable, duplicates=int(train.sum()) - len(np.unique(groups[train])),
            leaks=int((self.splits == LEAKED).sum()), hidden=self.hidden, notes=self.notes,
        )  # fmt: skip

    @property
    def digest(self) -> str:
        """A name for the training images: their pixels, in order."""
        return hashlib.sha256(self.store.hashes[self.train].tobytes()).hexdigest()[:16]

    @property
    def train(self) -> Ints:
        """Rows of the training images, labeled or not."""
        return np.flatnonzero(self.splits == TRAIN)

    @property
    def labeled(self) -> Ints:
        """Rows of the training images with a label."""
        return np.flatnonzero((self.splits == TRAIN) & (self.labels >= 0))

    @property
    def held_out(self) -> Ints:
        """Rows of the test images with a label, each picture once; without any, of the validation images."""
        test, val = (np.flatnonzero((self.splits == split) & (self.labels >= 0)) for split in (TEST, VAL))
        return self.once(test if len(test) else val)

    def once(self, ids: Ints) -> Ints:
        """ids without those that are, pixel for pixel, images that come before among them."""
        return ids[np.sort(np.unique(_identical(self.store.hashes[ids]), return_index=True)[1])]

    @property
    def num_classes(self) -> int:
        """K; 0 without labels."""
        return len(self.classes)

    @property
    def labels_a_class(self) -> Ints:
        """(K,) how many of the labeled training images are of each class."""
        return np.bincount(self.labels[self.labeled], minlength=self.num_classes)


def assemble(source: Source, store: PixelStore, kept: Ints, known: Sequence[str] = ()) -> Dataset:
    """The Dataset of a source and its store.

    kept: the source's indices of the store's rows, the others are unreadable. known: the classes of a teacher that
    needs no labels; they count where no training image has one. Raises DataError for labels that contradict each
    other, cannot be learned or are not among the known ones.
    """
    names = tuple(source.names[i] for i in kept)
    texts = [source.labels[i] for i in kept]
    splits = np.array([SPLIT_NUMBERS[source.splits[i]] for i in kept], dtype=np.int8)
    if not (splits == TRAIN).any():
        raise DataError(
            f"{source.description} has no training images, only held-out ones",
            why="held-out images are never trained on",
            fix="put the training images into train/, or give them as the images and the held-out ones as test",
        )
    used = {text for text in texts if text is not None}
    taught = bool(known) and not any(t is not None for t, s in zip(texts, splits, strict=True) if s == TRAIN)
    classes = source.classes if source.classes and used else tuple(sorted(used, key=_natural))
    classes = _known(known, used) if taught else classes
    number = {name: k for k, name in enumerate(classes)}
    labels = np.array([-1 if text is None else number[text] for text in texts], dtype=np.int64)

    groups = _identical(store.hashes)
    _check_conflicts(groups, labels, splits, source, kept, classes)
    leaked = np.flatnonzero((splits == TRAIN) & np.isin(groups, groups[splits != TRAIN]))
    splits[leaked] = LEAKED
    train = splits == TRAIN
    notes = [f"also held out, left out of training: {_few([names[i] for i in leaked])}"] if len(leaked) else []
    val, test = (len(np.unique(groups[splits == split])) for split in (VAL, TEST))
    copies = int(np.isin(splits, (VAL, TEST)).sum()) - val - test
    notes += [f"held out more than once, which counts once: {counted(copies, 'copy', 'copies')}"] if copies else []
    if not train.any():
        raise DataError(
            f"{source.description}: every training image is also held out",
            why="held-out images are never trained on",
            fix="give other images as test",
        )
    if not taught:
        _check_learnable(labels, splits, classes, source, kept)
    counts = np.bincount(labels[train & (labels >= 0)], minlength=len(classes))
    notes += [*_count_notes(counts, classes), *_lost_notes(source, kept), *source.notes]
    notes += _near_duplicates(store.thumbs, splits, groups, names)
    unreadable = len(source) - len(kept)
    return Dataset(store, names, labels, splits, classes, unreadable=unreadable, notes=tuple(notes))


def keep_labels(dataset: Dataset, amount: str | int, seed: int) -> Dataset:
    """dataset with only some of its training labels, the others hidden (-1).

    amount: "1%" of the labels or a number of them. As many of each class as possible, at least one; which ones is
    the seed's choice, and a larger amount keeps all that a smaller one kept. Raises UsageError.
    """
    rows, classes = dataset.labeled, dataset.classes
    present = np.unique(dataset.labels[rows])
    wanted = _amount(amount, len(rows), len(present))
    rng = np.random.Generator(np.random.Philox(seed))
    order = rng.permutation(present)  # who gets one more when the classes cannot share equally
    mixed = {k: rng.permutation(rows[dataset.labels[rows] == k]) for k in present}
    rounds = zip_longest(*(mixed[k] for k in order))  # one of each class that still has one
    chosen = np.array(list(islice((row for each in rounds for row in each if row is not None), wanted)))
    labels = dataset.labels.copy()
    labels[np.setdiff1d(rows, chosen)] = -1
    counts = np.bincount(labels[chosen], minlength=len(classes))
    hidden = len(rows) - len(chosen)
    before = _count_notes(dataset.labels_a_class, classes)
    notes = [*_count_notes(counts, classes), *(note for note in dataset.notes if note not in before)]
    notes += [f"{counted(hidden, 'label')} hidden on request"] if hidden else []
    return replace(dataset, labels=labels, hidden=dataset.hidden + hidden, notes=tuple(notes))


def write_images(dataset: Dataset, path: Path) -> None:
    """RUN/images.csv: image,label,split of every row of the store, in order, as the run knows them."""
    words = ("", *dataset.classes)
    rows = zip(dataset.names, dataset.labels.tolist(), dataset.splits.tolist(), strict=True)
    checkpoint.write_text(path, as_table((name, words[label + 1], SPLIT_WORDS[split]) for name, label, split in rows))


def as_table(rows: Iterable[tuple[str, str, str]]) -> str:
    """A labels CSV of rows (image, label, split)."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("image", "label", "split"), *rows])
    return text.getvalue()


def read_images(path: Path, store: PixelStore, understood: Mapping[str, Any]) -> Dataset:
    """What `write_images` wrote; understood: its facts as a dict. Raises DataError where it does not fit."""
    numbers = {word: split for split, word in SPLIT_WORDS.items()}
    try:
        rows = list(csv.reader(io.StringIO(checkpoint.read_text(path), newline="")))[1:]
        number = {printable(name): k for k, name in enumerate(understood["classes"])} | {"": -1}
        if len(rows) != len(store):
            raise ValueError(f"{len(rows):,} rows for {len(store):,} images")
        return Dataset(
            store=store,
            names=tuple(printable(name) for name, _, _ in rows),
            labels=np.array([number[label] for _, label, _ in rows], dtype=np.int64),
            splits=np.array([numbers[split] for _, _, split in rows], dtype=np.int8),
            classes=tuple(map(printable, understood["classes"])),
            unreadable=understood["unreadable"],
            hidden=understood["hidden"],
            notes=tuple(understood["notes"]),
        )
    except (*checkpoint.UNREADABLE, csv.Error) as error:
        raise DataError(
            f"{path} does not fit its run: {error}",
            why="names and pixels would be confused",
            fix="run the command that made the run again; it writes this file anew",
        ) from error


def _known(known: Sequence[str], used: Iterable[str]) -> tuple[str, ...]:
    known = tuple(map(composed, known))  # an older version kept names as macOS writes them
    strangers = sorted(set(used) - set(known), key=_natural)
    if strangers:
        raise DataError(
            f"{counted(len(strangers), 'class', 'classes')} of the held-out images the given model does not know",
            details=[f'"{name}"{nearest(name, known)}' for name in strangers],
            why="without training labels the model's own classes count, and these images would all be errors",
            fix="name the classes as the model does (its README.md lists them), or label training images",
        )
    return known


# --- checks ------------------------------------------------------------------------------------------------------


def _check_conflicts(
    groups: Ints, labels: Ints, splits: npt.NDArray[np.int8], source: Source, kept: Ints, classes: Sequence[str]
) -> None:
    """Refuse identical pictures with different labels, among the training images or among the held-out ones."""
    first: dict[tuple[int, bool], int] = {}
    conflicts = []
    for row in np.flatnonzero(labels >= 0).tolist():
        other = first.setdefault((int(groups[row]), splits[row] == TRAIN), row)
        if labels[other] != labels[row]:
            pair = [f'{source.named(int(kept[i]))} is "{classes[labels[i]]}"' for i in (other, row)]
            conflicts.append(" and ".join(pair))
    if conflicts:
        raise DataError(
            f"{counted(len(conflicts), 'picture')} with two different labels: the pixels are the same",
            details=conflicts,
            why="one of the two labels is wrong, and it would be learned or count as an error",
            fix="correct or empty the wrong label of each pair",
        )


def _check_learnable(
    labels: Ints, splits: npt.NDArray[np.int8], classes: Sequence[str], source: Source, kept: Ints
) -> None:
    """Refuse labels from which no classifier can be learned. No labels at all are fine: there is pretraining."""
    labeled = (splits == TRAIN) & (labels >= 0)
    trained = set(np.unique(labels[labeled]).tolist())
    held = set(np.unique(labels[(labels >= 0) & np.isin(splits, (VAL, TEST))]).tolist())
    count = int(labeled.sum())
    known = [classes[k] for k in sorted(trained)]
    if held - trained and trained:
        raise DataError(
            f"{counted(len(held - trained), 'class', 'classes')} without a training label, only held-out ones",
            details=[
                f'"{classes[k]}"{nearest(classes[k], known)}, the first is {source.named(int(kept[labels == k][0]))}'
                for k in sorted(held - trained)
            ],
            why="a class without a single label cannot be learned, and each of its images would count as an error",
            fix="label at least one training image of each, or leave these classes out of the held-out images",
        )
    if held and not trained:
        leaked = int(((splits == LEAKED) & (labels >= 0)).sum())
        same = f"; {counted(leaked, 'labeled training image')} are the same pictures as held-out ones"
        raise DataError(
            f"{source.description}: only held-out images are labeled",
            details=[f'"{classes[k]}"' for k in sorted(held)],
            why="labels of held-out images measure the result and are never learned from" + (same if leaked else ""),
            fix="label some training images that are not held out",
        )
    if len(trained) == 1:
        raise DataError(
            f'all {count:,} labels are of the one class "{classes[trained.pop()]}"',
            why="a classifier needs at least two classes",
            fix="label images of another class, or put pictures without a class into a folder called unlabeled",
        )
    if count and len(classes) > count:
        raise DataError(
            f"{len(classes):,} classes but only {counted(count, 'label')}",
            why="every class needs at least one labeled image",
            fix="label at least one image of each class; are numbers or file names in the label column?",
        )


def _count_notes(counts: Ints, classes: Sequence[str]) -> list[str]:
    """On classes with none or one of the counted labels."""
    notes = []
    if counts.any():
        for number, words in ((0, "no labeled image"), (1, "a single labeled image")):
            few = [classes[k] for k in np.flatnonzero(counts == number).tolist()]
            notes += [f"{counted(len(few), 'class', 'classes')} with {words}: {_few(few)}"] if few else []
    return notes


def _lost_notes(source: Source, kept: Ints) -> list[str]:
    lost = np.setdiff1d(np.arange(len(source.names)), kept).tolist()
    named = [source.named(i) for i in lost if source.labels[i] is not None]
    words = f"{counted(len(named), 'labeled image')} could not be read and their labels are lost: {_few(named)}"
    return [words] if named else []


# --- duplicates --------------------------------------------------------------------------------------------------


def _identical(hashes: npt.NDArray[np.uint8]) -> Ints:
    """(N,) group numbers; images of one group have the same pixels. hashes: (N, 32)."""
    keys = np.ascontiguousarray(hashes).view("V32").reshape(-1)
    return np.unique(keys, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _near_duplicates(
    thumbs: npt.NDArray[np.uint8], splits: npt.NDArray[np.int8], groups: Ints, names: Sequence[str]
) -> list[str]:
    """A note on training images whose thumbnail is nearly that of a held-out one. Flat pictures are passed over, all of
    them look alike. Nothing is removed: two photos of one scene may be meant.
    """
    varied = thumbs.std(axis=(1, 2), dtype=np.float32) >= FLAT  # (N,), or none where there are no thumbnails
    train, held = (np.flatnonzero(varied & s[: len(varied)]) for s in (splits == TRAIN, np.isin(splits, (VAL, TEST))))
    like: dict[int, int] = {}
    for one, other in _candidates(thumbs, train, held) if len(held) else ():
        apart = np.abs(thumbs[one].astype(np.int16) - thumbs[other]).mean(axis=(1, 2))
        twins = (apart <= CLOSE) & (groups[one] != groups[other])
        like |= dict(zip(one[twins].tolist(), other[twins].tolist(), strict=True))
    pairs = [f"{names[row]} like {names[like[row]]}" for row in sorted(like)]
    words = f"{counted(len(pairs), 'training image')} nearly the same as a held-out one (kept): {_few(pairs, '; ')}"
    return [words] if pairs else []


def _candidates(thumbs: npt.NDArray[np.uint8], train: Ints, held: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Pairs that may be nearly the same, (training images, held-out ones beside them), ROWS of the former at once.

    They share a quarter of the difference hash: saving a photo anew flips bits here and there. Where corners are blank
    many do, so of these the MOST_ALIKE nearest in brightness are taken, none further apart than thumbnails may be.
    """
    bits = np.packbits((thumbs[:, :, 1:] > thumbs[:, :, :-1]).reshape(len(thumbs), 64), axis=1)  # (N, 8) bytes
    light, reach = thumbs.sum(axis=(1, 2), dtype=np.int64), int(CLOSE * thumbs[0].size)  # (N,) below 2**15
    for quarter in bits.view(np.uint16).T:  # (N,)
        keys = quarter.astype(np.int64) << 15 | light
        held = held[np.argsort(keys[held], kind="stable")]
        for rows in np.array_split(train, len(train) // ROWS + 1):
            low, middle, high = (np.searchsorted(keys[held], keys[rows] + away) for away in (-reach, 0, reach + 1))
            low = np.maximum(low, middle - MOST_ALIKE // 2)
            counts = np.minimum(high, middle + MOST_ALIKE // 2) - low
            steps = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # from 0 for each row
            yield np.repeat(rows, counts), held[np.repeat(low, counts) + steps]


# --- small things ------------------------------------------------------------------------------------------------


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts "2" before "10"."""
    pieces = re.split(r"([0-9]+)", name)
    return [(0, int(piece), piece) if piece.isdecimal() else (1, 0, piece) for piece in pieces if piece]


def _amount(amount: str | int, available: int, classes: int) -> int:
    """How many labels "1%", "100" or 100 are."""
    text = str(amount).strip()
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*%|([0-9]+)", text)
    if match is None:
        raise UsageError(f'"{text}" is not an amount of labels', fix='write "1%" or a whole number such as 100')
    if not available:
        raise UsageError("there are no labels to choose from", fix="give labels, or do not limit them")
    wanted = int(match[2]) if match[2] else max(classes, round(float(match[1]) / 100 * available))
    if not classes <= wanted <= available:
        raise UsageError(
            f"{wanted:,} labels were asked for",
            why=f"there are {available:,} labels in {counted(classes, 'class', 'classes')}, and each class keeps one",
            fix=f"ask for {classes:,} to {available:,} of them",
        )
    return wanted


def _few(words: Sequence[str], mark: str = ", ") -> str:
    return mark.join(words[:NAMED]) + (f"{mark}..." if len(words) > NAMED else "")
