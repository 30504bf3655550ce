"""What a source of images is: names, labels, splits, and the images themselves as a stream. Nothing is decoded here."""

from __future__ import annotations

import functools
import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fewlabels.data.decode import Payload
from fewlabels.data.parts import Part, sampled


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
        """At most count images from all over the source, without reading the rest where that is cheap."""
        parts = [self.parts[i] for i in sampled(len(self.parts), count)]
        return chain.from_iterable(part.sample(count // len(parts)) for part in parts)

    @property
    def seekable(self) -> bool:
        """Whether every image can be read by itself."""
        return all(part.seekable for part in self.parts)

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(len, self.parts)))

    def at(self, index: int) -> Payload:
        """One image by its place."""
        number = bisect_right(self._ends, index)
        return self.parts[number].at(index - (self._ends[number - 1] if number else 0))

    def fingerprint(self) -> str:
        """SHA-256 of names and stamps: whether a stored decoding may be used again. Labels do not matter."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\n")
        for part in self.parts:
            for stamp in part.stamps():
                digest.update(stamp + b"\n")
        return digest.hexdigest()


def unlabeled(description: str, names: tuple[str, ...], part: Part) -> Source:
    """Images of which nothing is said, all to train on."""
    count = len(names)
    return Source(description, names, (None,) * count, ("train",) * count, None, (part,))


def join(*sources: Source) -> Source:
    """All sources as one; declared classes stay only where all declare the same."""
    first = sources[0]
    one_after_another: dict[str, Any] = {
        name: tuple(chain.from_iterable(getattr(each, name) for each in sources))
        for name in ("names", "labels", "splits", "parts", "notes")
    }
    classes = first.classes if all(each.classes == first.classes for each in sources) else None
    lines = [np.zeros(len(each), np.int32) if each.lines is None else each.lines for each in sources]
    found = replace(first, **one_after_another, classes=classes, lines=np.concatenate(lines))
    return replace(found, notes=tuple(dict.fromkeys(found.notes)))
