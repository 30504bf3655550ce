"""Names that try to be something else: markup, scripts, templates, formulas, terminal sequences, options, paths.

    python tests/faults/names.py

As names of files, of folders and so of classes, of runs, and as cells and classes of a labels CSV they go through
check, fit, predict, evaluate, suggest and report. What is checked: the tables, read as a spreadsheet reads them and as
this program does; every byte that reaches a terminal; and the page, opened in a real Chromium that must run nothing,
ask for nothing and show the names as they are. First it is shown that the browser would see the attacks.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # forking a process whose threads have worked would hang its child

import csv
import json
import re
import sys
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm  # noqa: F401 - 2 s, once here and not in every child, as the pipeline below
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import shapes_images
from faults import browser, runs
from faults.tally import Tally, conclude, ended, parser
from fewlabels import pipeline  # noqa: F401
from fewlabels.data import views
from fewlabels.data.sources import open_source

MARKUP = [
    "<script>canary=1</script>", "</title><script>canary=2</script>", "</style><script>canary=3</script>",
    "</script><script>canary=4</script>", "--><script>canary=5</script>", "<img src=x onerror=canary=6>",
    '"><img src=x onerror=canary=7>', "'><svg onload=canary=8>", '" onmouseover="canary=9', "javascript:canary=10",
    "</text></svg><img src=x onerror=canary=11>", "<iframe srcdoc='<script>top.canary=12</script>'>",
    "<img src=http://127.0.0.1:9/x.png>", "<base href=http://127.0.0.1:9>", "<link rel=icon href=http://127.0.0.1:9>",
    "<meta http-equiv=refresh content=0;url=//x>", "red;background:url(//127.0.0.1:9)", "&lt;b&gt;&#60;i>",
]  # fmt: skip
TEMPLATES = [
    "{{ 7919*7907 }}", "{% for x in 'ab' %}{{ x }}{% endfor %}", "{{ self.__init__ }}", "{0.__class__}{x!r:>9}",
    "%s%n%x%(x)s", "${7919*7907}", "#{7919*7907}", r"$\frac{1}{0}$ $x^2$", "$(touch canary)", "`touch canary`",
    "; touch canary;", "| touch canary", "../../canary", "..", "-rf", "--out=canary", "CON", "null", "a,b;c", 'a"b""c',
]  # fmt: skip
FORMULAS = ["=1+1", "=cmd|' /C calc'!A0", '=HYPERLINK("http://x")', "+1+1", "-1+1", "@SUM(1+1)", "\uff1d3+3", " =2+2"]
TERMINAL = [
    "\x1b[2J\x1b[1;1H", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\link", "\x9b2J", "a\rb", "a\nfix: curl x", "a\tb",
    "\b\b\b", "\x7f", "\u202egnp.exe", "\u2066x\u2069", "\u200fx", "a\u2028b", "\u200b", "\ufeffx", "\ue000",
    os.fsdecode(b"latin\xe9\xff"), os.fsdecode(b"\x80\x9b2J"),
]  # fmt: skip
PLAIN = ["e\u0301te\u0301", "\u732b", "\U0001f63a", "x" * 251, "\u00e9" * 125, "trailing ", "name.with.dots."]
NAMES = [*MARKUP, *TEMPLATES, *FORMULAS, *TERMINAL, *PLAIN]

# What moves a cursor, starts a sequence, ends a line or turns text around; a tab and a line's own end do not
MOVES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
RUNS = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff20\t\r]")  # how a cell begins that a spreadsheet takes for a formula


def shown(name: str) -> str:
    """The name as it should be told: by Unicode's categories, what is no visible character is its bytes in hex."""
    told = ""
    for character in name:
        if unicodedata.category(character)[0] not in "CZ" or character == " ":
            told += character
        elif "\udc80" <= character <= "\udcff":
            told += f"%{ord(character) - 0xDC00:02X}"
        else:
            told += "".join(f"%{byte:02X}" for byte in character.encode())
    return told


def is_file_name(name: str) -> bool:
    return "/" not in name and name not in (".", "..") and len(os.fsencode(name)) <= 255


def picture(path: Path, seed: int) -> None:
    """Sixteen pixels square, unlike every other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    with path.open("wb") as file:
        Image.fromarray(pixels).save(file, "PNG")


def photos(folder: Path) -> tuple[Path, list[str]]:
    """Pictures whose folders and files have the names, some held out, some unlabeled, some no pictures; the classes.

    A folder may be called "null" or by 250 characters, and a label in a table may not: these are names of files only.
    """
    names = list(filter(is_file_name, NAMES))
    classes = [name for name in names if name != "null" and len(name) <= 200]
    for k, name in enumerate(names):
        stem = name if len(os.fsencode(name)) <= 250 else name[:-1]
        for j, place in enumerate((f"train/{name}", f"train/{name}", f"test/{name}", "train/unlabeled")):
            if name in classes or j == 3:
                picture(folder / place / f"{stem}{j}.png", 4 * k + j)
        (folder / "train" / "unlabeled" / f"{stem}.gif").write_bytes(b"GIF89a?")
    return folder, classes


# --- what is checked ---------------------------------------------------------------------------------------------


def said(words: list[str], folder: Path, code: int = 0) -> str:
    """What a command says, both streams together, which must be safe for a terminal."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    found = ended(runs.start(words, log, lambda: os.chdir(folder)))
    raw = log.read_bytes()
    text = raw.decode("utf-8")
    moved = MOVES.search(text)
    assert moved is None, f"{words[0]}: a terminal gets {text[max(0, moved.start() - 40) : moved.end() + 20]!r}"
    assert "Traceback" not in text, text[-1500:]
    assert found == code, f"{words[0]} ends with {found}, not {code}: {text[-1500:]}"
    assert not (folder / "canary").exists(), "a name was run"
    return text


def rows(path: Path) -> list[list[str]]:
    """A table, of which no cell may be a formula or hold what is not visible."""
    with path.open(encoding="utf-8", newline="") as file:
        found = list(csv.reader(file))
    for cell in (cell for row in found for cell in row):
        assert not RUNS.match(cell), f"{path.name}: a spreadsheet runs {cell!r}"
        assert not MOVES.search(cell) and "\n" not in cell and "\t" not in cell, f"{path.name}: {cell!r}"
    return found


def tables(photos: Path, run: Path, folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """(table, its names, the true ones) of every table that is written."""
    source = open_source(photos)
    bare = [name.removeprefix("'") for name, *_ in rows(run / "bad_images.csv")[1:]]
    yield "bad_images.csv", sorted(bare), sorted(name for name in source.names if name.endswith(".gif"))
    told = rows(folder / "predictions.csv")
    yield "predictions.csv", [row[0].removeprefix("'") for row in told[1:]], list(source.names)
    yield (
        "its classes",
        sorted(name.removeprefix("p:") for name in told[0][3:-1]),
        sorted({label for label in source.labels if label}),
    )


def labels_go_back(photos: Path, table: Path) -> None:
    """The table of suggest is taken for what the folder itself says of its pictures."""
    as_told = open_source(photos, table)
    itself = open_source(photos)
    for name, told, label, split in zip(itself.names, as_told.labels, itself.labels, itself.splits, strict=True):
        if not name.endswith(".gif"):
            assert told == label, f"{name!r} of {split} is {label!r} and comes back as {told!r}"


def untouched(seen: browser.Seen, scripts: int = 0) -> None:
    """Fails where the page did anything at all."""
    assert seen.canary == "undefined", "a name was run as a script"
    assert not seen.dialog and not seen.console and not seen.requests, f"{seen.dialog} {seen.console} {seen.requests}"
    assert seen.scripts == scripts


def visible(name: str, seen: browser.Seen) -> None:
    """Fails unless the page shows the name as it is, if long only its beginning."""
    text = " ".join(seen.text.replace("\N{NO-BREAK SPACE}", " ").split())
    wanted = " ".join(name.split())
    wanted = wanted if len(name) <= 48 else wanted[:44]
    assert wanted in text, f"{wanted!r} is not shown"


# --- the classes of faults ---------------------------------------------------------------------------------------


def whole_run(folder: Path, tally: Tally) -> tuple[Path, list[str]]:
    """One run of all names as folders and files; returns it and its classes as they are told."""
    images, classes = photos(folder / "photos")
    classes, run = [unicodedata.normalize("NFC", name) for name in classes], folder / "run"
    with tally.fault("check"):
        said(["check", str(images), "--recipe", "smoke", "--max-bad", "1"], folder)
    with tally.fault("fit"):
        said(["fit", str(images), "--out", str(run), "--recipe", "smoke", "--max-bad", "1"], folder)
    with tally.fault("predict"):
        said(["predict", str(run), str(images), "--out", str(folder / "predictions.csv")], folder)
    with tally.fault("evaluate"):
        text = said(["evaluate", str(run), str(images)], folder)
        assert all(shown(name).strip()[:30] in text for name in classes), "a class is not told"
    for words in (["check", str(images), "--recipe", "smoke", "--max-bad", "1"], ["evaluate", str(run), str(images)],
                  ["suggest", str(run), "-n", "500"]):  # fmt: skip
        with tally.fault(f"{words[0]} --json"):
            lines = said([*words, "--json"], folder).splitlines()
            assert any(line.startswith("{") and line.isascii() and json.loads(line) for line in lines)
    with tally.fault("suggest"):
        said(["suggest", str(run), "-n", "500", "--out", str(folder / "suggested.csv")], folder)
        labels_go_back(images, folder / "suggested.csv")
    with tally.fault("suggest to the terminal"):
        said(["suggest", str(run), "-n", "500"], folder)
    for words, found, wanted in tables(images, run, folder):
        for one, other in zip(found, wanted, strict=True):
            with tally.fault(f"{words}: {other!r}"):
                assert one == other, f"is {one!r}"
    return run, [shown(name).strip() for name in classes]


def run_of_a_table(folder: Path, tally: Tally) -> tuple[Path, list[str]]:
    """One run whose classes are what a labels CSV says; what it must not say is refused with its line."""
    folder.mkdir()
    told = [name for name in NAMES if shown(name) == name and name.strip() == name and name != "null"]
    told = [name for name in told if len(name) <= 200]
    refused = [name for name in NAMES if shown(name) != name]
    lines = [["image", "label", "split"]]
    for k, name in enumerate(told):
        for j, split in enumerate(("train", "train", "test")):
            picture(folder / f"{k}-{j}.png", 5000 + 3 * k + j)
            lines.append([f"{k}-{j}.png", name, split])
    table, run = folder / "labels.csv", folder / "run"
    for name in refused:
        for cells in ([f"{name}.png", "a"], ["0-0.png", name]):
            with tally.fault(f"refused in a labels CSV: {cells!r}"):
                with table.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                    csv.writer(file).writerows([["image", "label"], cells])
                said(["fit", str(table), "--out", str(run), "--recipe", "smoke"], folder, 65)
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(lines)
    with tally.fault("fit of a labels CSV"):
        said(["fit", str(table), "--out", str(run), "--recipe", "smoke"], folder)
        said(["predict", str(run), str(table), "--out", str(folder / "predictions.csv")], folder)
        header, told = rows(folder / "predictions.csv")[0], [unicodedata.normalize("NFC", name) for name in told]
        assert sorted(header[3:-1]) == sorted(f"p:{name}" for name in told)
        said(["suggest", str(run), "-n", "1", "--out", str(folder / "suggested.csv")], folder, 65)  # all have labels
    return run, told


def terminal(folder: Path, run: Path, tally: Tally) -> None:
    """Every name in every place of a command line where a path or a word can stand."""
    few, truth = shapes_images(8)
    np.savez(folder / "few.npz", images=few, labels=truth)
    for name in NAMES:
        lines: list[tuple[int, list[str]]] = [
            (2, [name, "x"]),
            (66, ["fit", f"./{name}/none", "--out", "new"]),
            (66, ["fit", "few.npz", "--labels", f"./{name}/none", "--out", "new"]),
            (2, ["fit", "few.npz", "--out", "new", f"--recipe=x{name}"]),
            (2, ["predict", str(run), "x", f"--no-such={name}"]),
            (66, ["predict", str(run), f"./{name}/none"]),
            (66, ["predict", f"./{name}/none", "x"]),
            (66, ["report", f"./{name}/none"]),
            (66, ["import", f"./{name}/none", "--out", "imported"]),
        ]
        for code, words in lines:
            with tally.fault(f"{words!r}"):
                said(words, folder, code)


def pages(run: Path, told: list[str], seen: browser.Browser, tally: Tally) -> None:
    """The page of a run in the browser: each class on it."""
    page = seen.open(run / "report.html")
    with tally.fault(f"the page of {run}"):
        untouched(page)
    for name in told:
        with tally.fault(f"on the page: {name!r}"):
            visible(name, page)


def named_runs(run: Path, folder: Path, seen: browser.Browser | None, terminal: Tally, page: Tally) -> None:
    """The run under the names that mean something to a page or a terminal, its page written again."""
    for name in filter(is_file_name, [*MARKUP, *TERMINAL]):
        named = folder / name
        run.rename(named)
        with terminal.fault(f"a run called {name!r}"):
            said(["report", str(named)], folder)
        if seen is not None:
            with page.fault(f"a run called {name!r}"):
                found = seen.open(named / "report.html")
                untouched(found)
                if shown(name) == name:
                    visible(name[:44], found)
        named.rename(run)


def control(folder: Path, seen: browser.Browser) -> None:
    """The browser sees what a page does that lets names be markup, and the page's own policy would stop even that."""
    open_page, policed = folder / "open.html", folder / "policed.html"
    text = "<!DOCTYPE html><html><head>{}</head><body>" + "\n".join(MARKUP) + "<script>alert(1)</script>{{}}"
    open_page.write_text(text.format(""))
    found = seen.open(open_page)
    assert found.canary == "number" and found.requests and found.scripts, f"the browser sees nothing: {found}"
    template = (Path(runs.__file__).parents[2] / "src/fewlabels/use/report.html.j2").read_text()
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', template)
    assert policy is not None
    policed.write_text(text.format(policy[0]))
    found = seen.open(policed)
    assert found.canary == "undefined" and not found.dialog, f"the policy stops nothing: {found}"


def main() -> int:
    """All of it."""
    asked = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    views.compiled()
    tallies = [Tally(f"hostile names, {kind}") for kind in ("whole runs", "terminal", "the page in Chromium")]
    whole, spoken, page = tallies
    page.skipped = browser.missing()
    with tempfile.TemporaryDirectory(prefix="fewlabels-names-") as name:
        folder = Path(name)
        run, classes = whole_run(folder, whole)
        other, told = run_of_a_table(folder / "table", whole)
        terminal(folder, run, spoken)
        if page.skipped:
            named_runs(run, folder, None, spoken, page)
            return conclude(tallies, asked)
        with browser.Browser(folder) as seen:
            control(folder, seen)
            pages(run, classes, seen, page)
            pages(other, told, seen, page)
            named_runs(run, folder, seen, spoken, page)
    return conclude(tallies, asked)


if __name__ == "__main__":
    sys.exit(main())
