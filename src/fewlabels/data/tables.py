"""A labels CSV, read so that every mistake in it is found at once, with its line.

The file has the columns image, label and maybe split; an empty label is an unlabeled image. 16 of 20 odd files pass
through csv.DictReader without an error, 14 of them with wrong labels: nothing here is taken on trust.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import itertools
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fewlabels.errors import DataError, MissingInput, StorageError, counted, nearest, printable

COLUMNS = ("image", "label", "split")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
SPLITS |= {"test": "test", "testing": "test"}  # Training/ beside Testing/ is how Kaggle's sets come
ALPHABET = 26  # with more one-letter classes, as EMNIST has, case tells them; "y" and "Y" are one
MISSING_WORDS = {"nan", "nat", "none", "null", "na", "n/a", "<na>", "-1", "-1.0", "?", "unlabeled", "unlabelled"}
SPREADSHEET_ERRORS = {"#n/a", "#ref!", "#value!", "#name?", "#div/0!", "#num!", "#null!"}
WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # how .xlsx, .ods and .xls begin
UTF_16_32 = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
LONGEST_LABEL = 200
GUESSED = "a label that is guessed would be learned"
FORMAT = "the first line is image,label or image,label,split; an empty label is an unlabeled image"
SEARCHED = 2_000  # names compared to find the nearest one; comparing a million takes minutes
FORMULA_STARTS = tuple("=+-@") + tuple("\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}\N{FULLWIDTH COMMERCIAL AT}")


@dataclass(frozen=True)
class Row:
    """One line of a labels CSV."""

    line: int
    image: str
    label: str | None
    split: str | None
    sound: bool  # False: its label or split is a fault, only its image is looked at


@dataclass
class Table:
    """A labels CSV and what is wrong with it, as (line, words)."""

    path: Path
    odd: Collection[str] = ()  # classes that are called as a missing label would be
    rows: list[Row] = field(default_factory=list)
    faults: list[tuple[int, str]] = field(default_factory=list)

    def fault(self, line: int, words: str) -> None:
        """Note a fault; reading goes on."""
        self.faults.append((line, words))

    def refuse(self, why: str = GUESSED, fix: str = f"correct these lines; {FORMAT}") -> None:
        """Raise one DataError with all faults in the order of their lines, if there are any."""
        if not self.faults:
            return
        details = [f"line {line}: {words}" for line, words in sorted(self.faults)]
        raise DataError(f"{self.path}: {counted(len(self.faults), 'fault')}", details=details, why=why, fix=fix)


def read_table(path: Path, classes: Collection[str | None] = ()) -> Table:
    """The rows of a labels CSV. Faults that leave nothing to read are raised, the others are in the table.

    classes: those that the images' places tell, of which one may be called "none".
    """
    table = Table(path, {name for name in classes if name and name.casefold() in MISSING_WORDS})
    text = read_text(path)
    lines = list(io.StringIO(text, newline=""))
    lines[0] = re.sub(r'(?i)^"?sep=.?"?\s*$', "", lines[0])  # as Excel is told the delimiter
    first = next((line for line in lines if line.strip()), "")
    delimiter = max(",;\t", key=lambda mark: ("image" in _cells(first, mark), first.count(mark)))
    order: list[str] = []
    for line, written in enumerate(lines, start=1):
        try:  # one line at a time: a quote that does not close would swallow the lines below it, and their faults
            cells = next(csv.reader((written,), delimiter=delimiter, strict=True, skipinitialspace=True), [])
        except csv.Error as error:
            table.fault(line, f"no cells can be made of it ({error}); do its quotes close? No cell has a line break")
            if not order:
                table.refuse()
            continue
        if any(cell.strip() for cell in cells):
            if not order:
                order = _header(table, line, cells)
            elif {"image", "label"} <= set(_cells(written, delimiter)):  # two files joined with `cat`
                table.fault(line, "a second header line: delete it")
                table.refuse()  # what follows may have other columns
            else:
                _read_row(table, line, order, cells)
    if not order:
        raise DataError(f"{path} has no header", why="nothing is in it but blank lines", fix=f"write it: {FORMAT}")
    if not table.rows and not table.faults:
        table.fault(len(lines), "there is a header but not a single image below it")
    by_text: dict[str, int] = {}
    for row in table.rows:
        if row.label is not None:
            by_text.setdefault(row.label, row.line)
    for one, other in twins(by_text):
        table.fault(by_text[other], f'class "{other}" and class "{one}" (line {by_text[one]}) look like one class')
    return table


def match(table: Table, find: Callable[[str], int | str], names: Callable[[], Iterable[str]]) -> dict[int, Row]:
    """The first row of each image that the table names, by image number. All faults are raised together.

    find: an image cell's image number, or words for why there is none ("" = simply unknown). names: what images are
    called, to offer the nearest for an unknown one.
    """
    said: dict[int, Row] = {}
    offered: list[str] | None = None
    for row in table.rows:
        index = find(row.image)
        if isinstance(index, str):
            offered = list(itertools.islice(names(), SEARCHED)) if offered is None else offered
            hint = _meant(row.image, offered) if not index and len(table.faults) < 50 else ""
            table.fault(row.line, index or f'no image "{row.image}"{hint}')
            continue
        if not row.sound:
            continue
        before = said.setdefault(index, row)
        if before.label != row.label:
            labels = [f'"{label}"' if label else "no label" for label in (row.label, before.label)]
            table.fault(row.line, f'"{row.image}" has {labels[0]} here and {labels[1]} in line {before.line}')
        elif before.split != row.split:
            table.fault(row.line, f'"{row.image}" is in another split in line {before.line}')
    table.refuse()
    return said


def _meant(image: str, names: Iterable[str]) -> str:
    """' (did you mean "x"?)': an image of this name with an extension, or another one, else the nearest name."""
    same = next((name for name in names if _stem(name) == _stem(image)), None)
    return f' (did you mean "{same}"?)' if same else nearest(image, names)


def _stem(name: str) -> str:
    file = re.split(r"[/\\]", name)[-1]
    return file.rpartition(".")[0] or file


@functools.lru_cache(1024)  # few classes, a million lines
def label_fault(label: str) -> str:
    """What is wrong with a class name, '' if nothing."""
    if label.casefold() in MISSING_WORDS:
        return f'"{label}" is not a class: leave the label empty for an unlabeled image'
    if label.casefold() in SPREADSHEET_ERRORS:
        return f'"{label}" is what a spreadsheet writes for an error, not a class'
    for word in label.split():
        if {"LATIN", "CYRILLIC"} <= {unicodedata.name(letter, "").partition(" ")[0] for letter in word}:
            return f'the class name "{label}" mixes Latin and Cyrillic letters that look alike: {label!a}'
    return name_fault(label)


def name_fault(name: str) -> str:
    """What is wrong with the name of a class that a file declares, '' if nothing."""
    if not name.isprintable():
        return f"the class name {name!a} holds control or invisible characters"
    if len(name) > LONGEST_LABEL:
        return f'the class name "{name[:20]}..." has {len(name):,} characters, more than {LONGEST_LABEL}'
    return "" if name.strip() else "a class without a name"


def twins(labels: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of class names that one class may have been given by two hands or programs, in order: see _folded."""
    first: dict[str, str] = {}
    names = list(labels)
    both = len({name for name in names if len(name) == 1 and name.isalpha()}) > ALPHABET
    return [(first[key], name) for name in names if first.setdefault(key := _folded(name, both), name) != name]


def _folded(label: str, both: bool) -> str:  # noqa: FBT001
    """label without case, unless it is a letter of both, outer quotes, zeros ("01", "1.0"), kinds of space ("a_b")."""
    with contextlib.suppress(UnicodeError):  # what a spreadsheet makes of UTF-8 that it takes for Windows-1252
        label = label.encode("cp1252").decode("utf-8")
    text = unicodedata.normalize("NFKC", label).strip("'\"`\u2018\u2019\u201c\u201d")
    text = text if both and len(text) == 1 else text.casefold()
    text = " ".join(re.sub(r"(?<=\w)[-_](?=\w)", " ", text).split())
    number = re.fullmatch(r"0*(\d+?)(?:\.0+)?", text)
    return number[1] if number else text or label


def read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise MissingInput(f"{path}: no such file", why="labels come from it", fix="correct the path") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder", why="labels come from a CSV file", fix=FORMAT) from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    save = 'save it as "CSV UTF-8"'
    if raw.startswith(WORKBOOKS):
        raise DataError(f"{path} is a spreadsheet or an archive", why="labels come from a CSV file", fix=save)
    encoding = next((name for mark, name in UTF_16_32.items() if raw.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and raw[:200].count(0) > len(raw[:200]) // 4:
        raise DataError(f"{path} is in UTF-16 without a mark that says so", why="labels are read as UTF-8", fix=save)
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        wrong = _not_utf_8(raw) if encoding == "utf-8-sig" else ()
        raise DataError(
            f"{path} cannot be read as {encoding.removesuffix('-sig').upper()}: {error.reason}",
            details=[f"line {line}: byte 0x{byte:02x} is not UTF-8" for line, byte in wrong],
            why="it was saved in another encoding, probably Latin-1 or Windows-1252, or is damaged",
            fix=save,
        ) from None
    if not text.strip():
        raise DataError(f"{path} is empty", why="there is neither a header nor a row", fix=f"write it: {FORMAT}")
    return text


def _not_utf_8(raw: bytes) -> Iterator[tuple[int, int]]:
    """(line, its first wrong byte) of every line that is not UTF-8."""
    for line, written in enumerate(raw.splitlines(), start=1):
        try:
            written.decode("utf-8")
        except UnicodeDecodeError as error:
            yield line, written[error.start]


def _cells(line: str, delimiter: str) -> list[str]:
    return [cell.strip().strip('"\ufeff').casefold() for cell in line.split(delimiter)]


def _header(table: Table, line: int, cells: list[str]) -> list[str]:
    """The columns in order, "" = one without a name. A wrong header is raised at once: no row can be read under it."""
    order = [cell.strip().casefold() for cell in cells]
    for name, shown in zip(order, cells, strict=True):
        if name and name not in COLUMNS:
            table.fault(line, f'unknown column "{shown.strip()}"{nearest(name, COLUMNS)}')
    for name in COLUMNS:
        if order.count(name) > 1:
            table.fault(line, f'the column "{name}" is there {order.count(name)} times')
        elif name not in order and name != "split":
            table.fault(line, f'the column "{name}" is missing')
    more = "delete these columns: only image, label and split are read; of predictions keep what you have checked"
    fix = more if {"image", "label"} <= {*order} else f"correct the first line; {FORMAT}"
    table.refuse("columns are known by their names", fix)
    return order


def _read_row(table: Table, line: int, order: list[str], cells: Sequence[str]) -> None:
    if len(cells) != len(order):
        words = f"{len(cells)} cell{'s' if len(cells) > 1 else ''} where the header has {len(order)}"
        table.fault(line, f"{words} (a name with a comma needs quotes; there are no comments)")
        return
    if stray := "".join(cell for name, cell in zip(order, cells, strict=True) if not name).strip():
        table.fault(line, f'"{stray}": an index column without a name? write it with index=False, or delete it')
        table.refuse()
    said = dict(zip(order, cells, strict=True))
    image, label, split = said["image"], composed(said["label"].strip()), said.get("split", "").strip().casefold()
    problems = [
        "no image name" if not image.strip() else "",
        "a NUL in the image's name" if "\0" in image else "",
        label_fault(label) if label and label not in table.odd else "",
        "" if split in ("", *SPLITS) else f'unknown split "{split}"{nearest(split, SPLITS)}; use train, val or test',
    ]
    for problem in filter(None, problems):
        table.fault(line, problem)
    if not any(problems[:2]):
        known = label if label and not problems[2] else None
        table.rows.append(Row(line, image, known, SPLITS.get(split), sound=not any(problems)))


class Finder:
    """Finds a CSV's image cell among image files: by its path beside the CSV or in the images' folder, or by name.

    folders: where relative paths may start. look: the number of the image at a path, -1 where several are there, None
    where none is. by_name: the numbers of those whose file is called so. A path that is two images is refused.
    """

    def __init__(
        self, folders: Iterable[Path], look: Callable[[str], int | None], by_name: Mapping[str, list[int]] | None = None
    ) -> None:
        self.folders = list(dict.fromkeys(os.path.realpath(folder) for folder in folders))
        self.look, self.by_name = look, by_name or {}

    @classmethod
    def among(cls, folders: Sequence[Path], files: Iterable[str]) -> Finder:
        """Of known images; files: every one's real path below one of the folders."""
        roots = [os.path.realpath(folder) + os.sep for folder in folders]
        number: dict[str, int] = {}
        by_name: dict[str, list[int]] = {}
        for index, file in enumerate(files):
            path = os.path.normpath(file)
            number[path] = -1 if path in number else index  # as arrays and shards may have it
            by_name.setdefault(os.path.basename(file), []).append(index)  # noqa: PTH119 - 1 us, not 5
            if not file.isprintable():  # as our own tables call it
                for root in roots:
                    number.setdefault(root + printable(file.removeprefix(root)), index)
        for known in (number, by_name):
            for name, found in [(name, found) for name, found in known.items() if not name.isascii()]:
                known.setdefault(composed(name), found)  # type: ignore[arg-type]
        return cls(folders, lambda path: number.get(path, number.get(composed(path))), by_name)

    def __call__(self, image: str) -> int | str:
        """The image's number, or why there is none ("" = unknown)."""
        tried, plain = list[str](), image.strip()
        apart = unicodedata.normalize("NFD", plain)  # as macOS writes accents
        for spelled in dict.fromkeys((image, plain, plain.replace("\\", "/"), composed(plain), apart)):
            paths = [os.path.normpath(os.path.join(folder, spelled)) for folder in self.folders]  # noqa: PTH118
            found = {number: path for path in paths if (number := self._at(path)) is not None}
            if len(found) > 1:
                return f'"{spelled}" is two images: {" and ".join(found.values())}; write the whole path'
            for number in found:
                return number if number >= 0 else f'several images are called "{spelled}"'
            tried += [*paths, *map(through_links, paths)]
            same_name = self.by_name.get(spelled, [])
            if len(same_name) == 1:
                return same_name[0]
            if same_name:
                return f'{len(same_name)} images are called "{spelled}"; write the folder too'
        inside = any(path.startswith(f"{folder.rstrip('/')}/") for path in tried for folder in self.folders)
        return "" if inside else f'"{image}" leads out of {" and ".join(self.folders)}'

    def _at(self, path: str) -> int | None:
        number = self.look(path)
        return self.look(through_links(path)) if number is None else number


def composed(name: str) -> str:
    """name in NFC: macOS writes a letter and its accent apart, and both are the same name."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def through_links(path: str) -> str:
    """path as it is called in the real folder, for a table that names images through a linked one."""
    return os.path.join(_real_folder(os.path.dirname(path)), os.path.basename(path))  # noqa: PTH118, PTH119, PTH120


@functools.lru_cache(1 << 16)  # two for each class folder, in any order
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


# --- written tables -----------------------------------------------------------------------------------------------


def cell(text: str) -> str:
    """text on one line, and with a leading apostrophe where a spreadsheet would run it (OWASP, CSV injection)."""
    text = printable(text)
    return f"'{text}" if text.lstrip().startswith(FORMULA_STARTS) else text
