"""Tar shards in the layout of WebDataset: 0001.jpg and beside it 0001.cls, 0001.json or 0001.txt, in many tar files.

A shard is never unpacked. Its headers are read once and say where each picture's bytes are; from then on a picture is
a span of a file. Pictures stand in the order of the shards' names and, in a shard, in its own: that order gives them
their numbers, and nothing else decides it. An index is kept in the user's cache (XDG_CACHE_HOME) under the place and
state of its shard, since reading it anew costs 20 us a member, and behind a URL the whole shard.

Shapes: N images, S shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from fewlabels import checkpoint, runtime
from fewlabels.data import folders, places, tables
from fewlabels.data.folders import PICTURES
from fewlabels.data.parts import Part, damaged
from fewlabels.data.source import Source, unlabeled
from fewlabels.data.told import with_sequence
from fewlabels.errors import DataError, MissingInput, printable

ENDINGS = (".tar", ".parquet")
BRACES = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")
SPLIT = re.compile(rf"(?:^|[-_./])({'|'.join(tables.SPLITS)})(?![a-z])")
LABELS = (".cls", ".json", ".txt")  # the first that any shard has counts
LARGEST_LABEL = 1 << 20
CAPTION_WORDS = 5  # class names have fewer
VERSION = 4  # of the kept index


class Shards(NamedTuple):
    """Files of images: where they are, what people call them, the state of each and the split that it is of."""

    places: list[str]
    names: list[str]
    states: list[bytes]
    splits: list[str]


def is_pattern(images: str) -> bool:
    """Whether images is a URL or stands for several files, such as shards-{000..127}.tar."""
    return places.is_url(images) or (BRACES.search(images) is not None and not os.path.lexists(images))


def find(images: str) -> Shards:
    """The tar or parquet files that a folder, a file, a pattern or a URL means; only a folder's may be of other splits
    than train, a file is what it is given as. Raises MissingInput.
    """
    is_folder = not (BRACES.search(images) or ending(images)) or os.path.isdir(images)  # noqa: PTH112 - names may be long
    if is_folder:
        root = images.rstrip("/") or "/"
        names = places.below(root, ENDINGS) if places.is_url(root) else folders.scan(Path(root), is_shard)
        found = [f"{root}/{name}" for name in names]
    else:
        found = _expanded(images)
        whole, names = called(images), [called(file) for file in found]
        if len(set(names)) < len(found):  # ?part={1..9}
            whole, names = images, found
        root = BRACES.split(whole)[0].rpartition("/")[0]
        names = [name[len(root) :].lstrip("/") if root else name for name in names]
    with ThreadPoolExecutor(places.AT_ONCE) as pool:
        states = list(pool.map(places.stamp, found))
    missing = [file for file, state in zip(found, states, strict=True) if state == b"missing"]
    if missing or (not found and is_pattern(images)):
        raise MissingInput(
            f"{images}: {len(missing):,} of {len(found):,} files are missing" if found else f"{images}: no files there",
            details=missing,
            why="images there are .tar or .parquet files" if is_folder else "every file that is named counts",
            fix="correct the name",
        )
    return Shards(found, names, states, [_split_of(name) if is_folder else "train" for name in names])


def called(place: str) -> str:
    """What people call a place: a URL of a shard without its query, which may be a signature that is renewed."""
    before = place.partition("?")[0]
    return before if places.is_url(place) and before.lower().endswith(ENDINGS) else place


def ending(place: str) -> str:
    """The one of ENDINGS that a place has; "" for none."""
    return next((known for known in ENDINGS if called(place).lower().endswith(known)), "")


def is_shard(path: str) -> bool:
    """Whether a file is one, by its ending."""
    return path.lower().endswith(ENDINGS) and not os.path.basename(path).startswith(".") and os.path.isfile(path)  # noqa: PTH113, PTH119


def _expanded(pattern: str) -> list[str]:
    match = BRACES.search(pattern)
    if match is None or os.path.lexists(pattern):  # not Path: it may be a URL
        return [pattern]
    numbers = (f"{number:0{len(match[1])}d}" for number in range(int(match[1]), int(match[2]) + 1))
    return [file for n in numbers for file in _expanded(pattern[: match.start()] + n + pattern[match.end() :])]


def _split_of(name: str) -> str:
    """The split that a file's name or folder says: train-00000-of-00001.parquet, imagenet-val-01.tar, test/7.tar."""
    said = filter(None, map(SPLIT.search, reversed(name.lower().split("/"))))  # its own name before its folders'
    return next((tables.SPLITS[match[1]] for match in said), "train")


@dataclass(frozen=True)
class Tars(Part):
    """Pictures in tar files."""

    has_addresses = True
    shards: Shards
    ends: npt.NDArray[np.int64]  # (S,) images up to the end of each shard
    members: Sequence[str]  # N names
    spans: npt.NDArray[np.int64]  # (N, 2) first byte and length
    faults: Mapping[int, str]  # why a picture is refused

    def __len__(self) -> int:
        return len(self.members)

    @property
    def away(self) -> bool:  # type: ignore[override]
        return any(map(places.is_url, self.shards.places))

    def at(self, row: int) -> places.Span:
        """The span, read by who decodes it."""
        shard = int(np.searchsorted(self.ends, row, side="right"))
        begin, length = self.spans[row].tolist()
        return places.Span(self.shards.places[shard], f"/{self.members[row]}", begin, length, self.faults.get(row, ""))

    def stamps(self) -> Iterator[bytes]:
        return iter(self.shards.states)


def open_tars(shards: Shards, where: str) -> Source:
    """The images of tar shards. where: what they are called together. Raises DataError for damaged or empty ones."""
    found = _indices(shards)
    part = _joined(shards, found)
    if not len(part):
        raise DataError(f"{where} holds no pictures", why="members are known by their endings: .jpg, .png, ...")
    pairs = zip(shards.names, found, strict=True)
    names = (f"{shard}/{member}" for shard, index in pairs for member in index["members"])
    told, remark = _told(found)
    source = unlabeled(f"tar {where} ({len(shards.places):,} files{remark})", tuple(map(printable, names)), part)
    inside = _below_shared(["" if row in part.faults else member for row, member in enumerate(part.members)])
    if told is None:
        labels, inner = folders.place(inside, Path(where))
        source = replace(source, labels=tuple(labels))  # a folder may be called none; what a member says so is no class
    else:
        inner = [tables.SPLITS.get(member.partition("/")[0].casefold(), "train") for member in inside]
        source = with_sequence(source, told)
    outer = np.repeat(shards.splits, np.diff(part.ends, prepend=0)).tolist()
    splits = tuple(own if own != "train" else shard for own, shard in zip(inner, outer, strict=True))
    passed = sum(index["passed"] for index in found)
    words = f"{passed:,} pictures beside another of their sample (1.seg.png beside 1.png) are passed over"
    return replace(source, splits=splits, notes=(words,) if passed else ())


def _joined(shards: Shards, found: Sequence[Mapping[str, Any]]) -> Tars:
    """The pictures of all shards in one row."""
    counts = [len(index["members"]) for index in found]
    ends = np.cumsum(counts)
    first = dict(enumerate(ends - counts))  # a shard's first picture
    return Tars(
        shards,
        ends,
        members=[member for index in found for member in index["members"]],
        spans=np.concatenate([np.empty((0, 2), np.int64), *(index["spans"] for index in found)]),
        faults={int(first[s]) + i: words for s, index in enumerate(found) for i, words in index["faults"]},
    )


def _told(found: Sequence[Mapping[str, Any]]) -> tuple[list[Any] | None, str]:
    """What label members say of each picture, None where they say no classes, and a remark on that."""
    kind = next((ending for ending in LABELS if any(ending in index["labels"] for index in found)), None)
    if kind is None:
        return None, ""
    labels = [label for each in found for label in each["labels"].get(kind, [None] * len(each["members"]))]
    if kind == ".txt" and _are_captions(labels):
        return None, "; the .txt members are captions and no labels"
    return labels, ""


def _below_shared(members: Sequence[str]) -> list[str]:
    """members without the folders that hold all of them, which are no classes, up to one that is a split's."""
    inside = [member.rpartition("/")[0] for member in members if member]
    shared = PurePosixPath(os.path.commonpath(set(inside))).parts if inside else ()
    depth = next((i for i, folder in enumerate(shared) if folder.casefold() in tables.SPLITS), len(shared))
    return ["/".join(member.split("/")[depth:]) for member in members]


def _are_captions(texts: Sequence[str | None]) -> bool:
    """Texts are no class names where most occur once and some are sentences, as img2dataset writes them."""
    told = [text for text in texts if text is not None]
    return 2 * len(set(told)) > len(told) and any(len(text.split()) > CAPTION_WORDS for text in told)


# --- the index of one shard --------------------------------------------------------------------------------------


def _indices(shards: Shards) -> list[dict[str, Any]]:
    """Of every shard. Ranks begin at different ones, and find the others' in the cache."""
    first = runtime.rank() * len(shards.places) // runtime.world_size()
    order = [*range(first, len(shards.places)), *range(first)]
    with ThreadPoolExecutor(places.AT_ONCE, thread_name_prefix="index") as pool:
        found = dict(zip(order, pool.map(lambda i: _index(shards.places[i], shards.states[i]), order), strict=True))
    return [found[i] for i in range(len(order))]


def _index(shard: str, state: bytes) -> dict[str, Any]:
    """members (n), spans (n, 2), faults [(row, words)], labels {ending: (n)} and how many pictures were passed over: of
    a shard, kept or read.
    """
    where = shard if places.is_url(shard) else str(Path(shard).absolute())
    key = hashlib.sha256(b"\0".join([str(VERSION).encode(), os.fsencode(where), state])).hexdigest()[:32]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - "~" of nobody stays
    kept = Path(cache) / "fewlabels" / "shards" / f"{key}.json"
    found: dict[str, Any] = {}
    with suppress(*checkpoint.UNREADABLE):
        found = checkpoint.read_sealed(kept)
    if not found:
        found = places.patiently(shard, lambda: _read(shard))
        with suppress(OSError, ValueError):  # a home that cannot be written costs time; labels may be no JSON
            if kept.is_absolute():
                kept.parent.mkdir(parents=True, exist_ok=True)
                checkpoint.write_sealed(kept, found)
    return found | {"spans": np.array(found["spans"], np.int64).reshape(-1, 2)}


def _read(shard: str) -> dict[str, Any]:
    try:
        with places.open_file(shard) as file:
            return _scan(file, shard)
    except (tarfile.TarError, EOFError, ValueError, OSError) as error:
        if places.is_url(shard) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise  # to be tried again
        raise damaged(shard, error) from error


def _scan(file: BinaryIO, shard: str) -> dict[str, Any]:
    pictures: dict[str, tuple[int, int, str]] = {}
    texts: dict[str, dict[str, Any]] = {ending: {} for ending in LABELS}
    twice: list[str] = []  # the stems of members that come again
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
        for member in archive:
            if member.size < 0:  # tarfile would go back and round for ever (CVE-2025-8194)
                raise ValueError("it holds a member of negative size")
            name = member.name.removeprefix("./")
            stem, ending = os.path.splitext(name)  # noqa: PTH122
            ending = ending.lower()
            if os.path.basename(name).startswith("."):  # noqa: PTH119
                continue
            if ending in PICTURES and not member.isdir():
                fault = _fault(member)
                if name in pictures:
                    twice.append(stem)
                    name, fault = f"{name} (again, {len(twice)})", "its name is in the shard twice"
                pictures[name] = (member.offset_data, member.size, fault)
            elif ending in LABELS and member.isreg() and member.size <= LARGEST_LABEL:
                label = _label(archive, member, ending, shard)
                twice += [stem] if texts[ending].setdefault(stem, label) != label else []
        _check_end(file, archive.offset)
    return _assigned(pictures, texts, set(twice))


def _assigned(
    pictures: Mapping[str, tuple[int, int, str]], texts: Mapping[str, Mapping[str, Any]], twice: Set[str]
) -> dict[str, Any]:
    """What `_index` says of a shard: which members are pictures to look at, and which label is whose.

    pictures: first byte, length and fault by name. texts: what label members say, by their ending and stem. twice: the
    stems of members that came again.
    """
    stems = {name: os.path.splitext(name)[0] for name in pictures}  # noqa: PTH122
    keys = set(stems.values())
    # 0001.seg.png beside 0001.jpg is another field of the same sample; alone it is a picture with a dot in its name
    kept = [name for name, stem in stems.items() if (key := _key(stem)) == stem or key not in keys]
    # 0001.img.png has its class from 0001.img.cls, else, where it is the one picture of its sample, from 0001.cls
    samples = Counter(_key(stems[name]) for name in kept)
    alone = {name: key if samples[key := _key(stems[name])] == 1 else stems[name] for name in kept}
    labels = {ending: [said.get(stems[n], said.get(alone[n])) for n in kept] for ending, said in texts.items()}
    faults = {name: pictures[name][2] for name in kept}
    for name, *said in zip(kept, *labels.values(), strict=True):
        if {stems[name], alone[name]} & twice and any(label is not None for label in said):
            faults[name] = faults[name] or "its name is in the shard twice, and which one a label is of is not said"
    return {
        "members": kept,
        "spans": [pictures[name][:2] for name in kept],
        "faults": [(i, faults[name]) for i, name in enumerate(kept) if faults[name]],
        "passed": len(stems) - len(kept),
        "labels": {ending: said for ending, said in labels.items() if any(label is not None for label in said)},
    }


def _key(stem: str) -> str:
    """The part of a member's name that its sample shares: up to the first dot of the file's name."""
    folder, slash, name = stem.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _fault(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return "a link, not a picture"
    if not member.isreg():
        return "not a regular file (a pipe or device)"
    if member.issparse():
        return "a sparse file; pack the shard without --sparse"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "its name leads out of the shard"
    return ""


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, ending: str, shard: str) -> Any:
    """The class that a label member tells, None where it tells none; a number for a whole number."""
    try:
        raw = archive.extractfile(member).read()  # type: ignore[union-attr]  # a regular file
        text = raw.decode("utf-8-sig").strip()
        said = json.loads(text) if ending == ".json" else text
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{shard}/{member.name} cannot be read: {error}",
            why="a label that is guessed would be learned",
            fix="write it anew, as UTF-8",
        ) from error
    if ending == ".json":
        label = said.get("label") if isinstance(said, dict) else None
        return label if label == label else None  # NaN, as pandas writes it
    return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else text or None


def _check_end(file: BinaryIO, end: int) -> None:
    """Raise ValueError unless the members end with the mark that closes a tar, and nothing comes after it.

    tarfile takes a header that it cannot read for the end, and a tar cut off between two members for a whole one.
    """
    file.seek(end)
    rest = file.read(tarfile.BLOCKSIZE)
    if len(rest) < tarfile.BLOCKSIZE:
        raise ValueError(f"it is cut off at byte {end:,}, before its end mark")
    for block in chain([rest], iter(lambda: file.read(1 << 20), b"")):
        if block.count(0) != len(block):
            raise ValueError(f"what follows byte {end:,} is neither a member nor the end (two tars in one file?)")
