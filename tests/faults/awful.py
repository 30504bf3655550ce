"""Pictures that break image tools: 390 of them in a folder, in a CSV, in parquet, streamed; then pictures that change.

    python tests/faults/awful.py

Each of the files of shared/data/awful-images.tar comes out as its manifest says, in whole runs that train on what is
left of them: read with the size and the colours that Pillow sees, or refused in bad_images.csv with a reason. No run
crashes, hangs, or takes 600 MB more than the same run of good pictures. Then a picture vanishes, is cut off, replaced,
grows or cannot be read any more, after it was listed and while the run trains.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # forking a process whose threads have worked would hang its child

import csv
import importlib.util
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import SHARED
from faults.changing import changes
from faults.tally import Tally, conclude, parser
from fewlabels.data import pixels
from fewlabels.errors import printable

PASSED_OVER = (".pdf", ".container")  # in a folder: their names are not those of pictures, nor do they begin as one
CORPUS = SHARED / "data" / "awful-images.tar"
SECONDS = 600  # until a run counts as hung
MEMORY = 600  # MB above a run of as many good pictures
TOLERANCE = (
    5.0  # mean levels between our pixels and Pillow's, scaled in one go: bilevel and 5000 x 7 ones differ by 3 to 5
)
PROGRAM = """
import sys
from fewlabels import cli
code = cli.main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(code)
"""


@dataclass(frozen=True)
class Awful:
    """A file by its path below the pictures, and what the manifest expects (the corpus' README.md has the words)."""

    file: str
    expected: str

    @property
    def label(self) -> str:
        """A few have one, so that there is something to fine-tune on."""
        found = re.fullmatch(r"(?:exif/(Landscape)|pillow/(hopper)_orientation)_\d\.jpg", self.file)
        return (found[1] or found[2]) if found else ""


def unpacked(folder: Path) -> list[Awful]:
    """The corpus in folder/pictures."""
    with tarfile.open(CORPUS) as archive:
        archive.extractall(folder, filter="data")
    (folder / "awful-images").rename(folder / "pictures")
    with (folder / "pictures/MANIFEST.csv").open(encoding="utf-8", newline="") as file:
        return [Awful(row["file"], row["expected"]) for row in csv.DictReader(file)]


def with_specials(pictures: Path) -> list[Awful]:
    """Adds what no archive holds: pipes, links, and names that are dangerous to print."""
    place, good = pictures / "special", (pictures / "generated/plain.jpg").read_bytes()
    place.mkdir()
    (place / "empty_class").mkdir()
    os.mkfifo(place / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(place)  # the path of a socket has 108 bytes at most
        made.bind("socket.jpg")
        os.chdir(here)
    for name, target in (("dangling", "nothing"), ("loop", "loop.jpg"), ("device", "/dev/zero"), ("folder", "..")):
        (place / f"{name}.jpg").symlink_to(target)
    refused = [Awful(f"special/{name}.jpg", "reject") for name in ("pipe", "socket", "dangling", "loop", "device")]
    names = ("new\nline.jpg", "esc\x1b[2J.jpg", "tab\t.jpg", "-rf.jpg", "<img src=x onerror=alert(1)>.jpg", " .jpg",
             os.fsdecode(b"latin\xe9.jpg"), "=1+1.jpg", "turned\u202egpj.jpg", "CON.jpg", "100%.jpg")  # fmt: skip
    for number, name in enumerate(names):
        (place / name).write_bytes(good + bytes(number))
    return refused + [Awful(f"special/{name}", "ok") for name in names]


# --- the forms that they are given in ----------------------------------------------------------------------------


def in_a_folder(folder: Path, rows: list[Awful]) -> list[str]:
    """The words of the command: a folder, and a CSV for the few labels."""
    labeled = [(row.file, row.label) for row in rows if row.label]
    _write(folder / "labels.csv", [("image", "label"), *labeled])
    return [str(folder / "pictures"), "--labels", str(folder / "labels.csv")]


def in_a_csv(folder: Path, rows: list[Awful]) -> list[str]:
    """All files by name, also what is not a picture."""
    _write(folder / "pictures/all.csv", [("image", "label"), *((row.file, row.label) for row in rows)])
    return [str(folder / "pictures/all.csv")]


def in_parquet(folder: Path, rows: list[Awful]) -> list[str]:
    """The bytes of all files, in the Hugging Face layout."""
    import pyarrow
    import pyarrow.parquet

    images = [{"bytes": (folder / "pictures" / row.file).read_bytes(), "path": row.file} for row in rows]
    table = pyarrow.table({"image": images, "label": [row.label or None for row in rows]})
    pyarrow.parquet.write_table(table, folder / "all.parquet", row_group_size=50)
    return [str(folder / "all.parquet")]


def _write(path: Path, lines: list[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(lines)


# --- runs ----------------------------------------------------------------------------------------------------------


def fit(words: list[str], out: Path) -> tuple[int, str, int]:
    """(exit code, what was said, peak memory in MB) of a run in a fresh process; an AssertionError where it hangs."""
    line = [sys.executable, "-c", PROGRAM, "fit", *words, "--recipe", "smoke", "--out", str(out)]
    try:
        done = subprocess.run(line, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as late:
        raise AssertionError(f"it hung, {SECONDS} s") from late
    said = (done.stdout + done.stderr).decode("utf-8", "replace")
    peak = re.search(r"VmHWM:\s+(\d+) kB", said)
    assert peak is not None, f"it crashed with {done.returncode}: {said[-2000:]}"
    return done.returncode, said, int(peak[1]) // 1024


def good_run(folder: Path, count: int) -> int:
    """The peak memory of a run of `count` good pictures, in MB."""
    with Image.open(folder / "pictures/generated/plain.jpg") as image:
        photo = np.asarray(image)
    (folder / "good").mkdir()
    for i in range(count):  # each a photo of its own, or they would be duplicates
        Image.fromarray(np.roll(photo, i, axis=1)).save(folder / "good" / f"{i}.jpg")
    labels = [(f"{i}.jpg", "ab"[i % 2]) for i in range(16)]
    _write(folder / "good.csv", [("image", "label"), *labels])
    code, said, peak = fit([str(folder / "good"), "--labels", str(folder / "good.csv")], folder / "good-run")
    assert code == 0, said[-2000:]
    return peak


class Outcome:
    """What a run made of every file."""

    def __init__(self, out: Path) -> None:
        with (out / "images.csv").open(encoding="utf-8", newline="") as file:
            self.rows = {row["image"]: i for i, row in enumerate(csv.DictReader(file))}
        self.reasons = bad_images(out)
        self.store = pixels.open_store(out / "data")

    def check(self, row: Awful, path: Path, *, named: bool) -> None:
        """Fails unless the file came out as expected. named: it was not found in a folder but given by its name."""
        name = printable(row.file)
        read, reason = name in self.rows, self.reasons.get(name, "")
        wanted = {"ok": (True, False), "ok_warn": (True, False), "reject": (False, True)}.get(row.expected)
        if not named and (row.expected == "ignore" or row.file.endswith(PASSED_OVER)):
            wanted = (False, False)
        found = (read, bool(reason))
        assert found == wanted if wanted else found in ((True, False), (False, True)), (
            f"{found}, {row.expected}: {reason}"
        )
        assert "\n" not in reason and "Error" not in reason and "0x7" not in reason, f"no reason for people: {reason}"
        if read:
            self._compare(self.rows[name], path)

    def _compare(self, row: int, path: Path) -> None:
        image, extent = self.store.read(np.array([row]))
        height, width = extent[0].tolist()
        ours = image[0, :, :height, :width].permute(1, 2, 0).numpy()
        theirs = seen_by_pillow(path, (width, height))
        if theirs is None:
            with Image.open(path) as opened:  # the brightest level is white, and some pictures have one only
                white = ours.mean() >= 250 and np.ptp(np.asarray(opened)) > 0
            assert (ours == ours[:, :, :1]).all() and not white, "numbers of 16 bits and more are not grey"
            return
        apart = float(np.abs(ours.astype(np.float32) - theirs).mean())
        assert apart < TOLERANCE, f"{apart:.1f} levels from what Pillow sees"


def bad_images(out: Path) -> dict[str, str]:
    """The reason for every file that was refused. Names that a spreadsheet would run begin with an apostrophe."""
    with (out / "bad_images.csv").open(encoding="utf-8", newline="") as file:
        return {row["name"].removeprefix("'"): row["reason"] for row in csv.DictReader(file)}


def seen_by_pillow(path: Path, size: tuple[int, int]) -> npt.NDArray[np.float32] | None:
    """(h, w, 3) on white and upright, scaled to size; None where Pillow's conversion clips (16 bits and more).

    Fails where the size is not the picture's, scaled to fit.
    """
    with Image.open(path) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
    width, height = (side * max(size) / max(image.size) for side in image.size)
    assert abs(max(1, width) - size[0]) <= 0.5 and abs(max(1, height) - size[1]) <= 0.5, f"{image.size} became {size}"
    if image.mode.startswith(("I", "F")):
        return None
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)


def given(tally: Tally, form: str, words: list[str], rows: list[Awful], folder: Path, base: int) -> None:
    """One run of all files, and what came of each."""
    out = folder / f"run-{form}"
    with tally.fault(f"{form}, the run"):
        code, said, peak = fit([*words, "--max-bad", "0.5"], out)
        assert code == 0, f"exit code {code}: {said[-2000:]}"
        assert "Traceback" not in said, said[-2000:]
        print(
            f"awful pictures, {form}: peak memory {peak:,} MB, {peak - base:,} more than of good pictures", flush=True
        )
        assert peak - base < MEMORY, f"{peak - base} MB more than of good pictures"
    if not (out / "results.json").exists():
        return
    outcome = Outcome(out)
    for row in rows:
        with tally.fault(f"{form}, {printable(row.file)}"):
            outcome.check(row, folder / "pictures" / row.file, named=form in ("csv", "parquet"))


def too_many(tally: Tally, words: list[str], folder: Path) -> None:
    """By default so many bad files are refused before training, and all of them are listed."""
    with tally.fault("more than are allowed"):
        code, said, _ = fit(words, folder / "run-refused")
        assert code == 65, f"exit code {code}: {said[-2000:]}"
        assert "cannot be read" in said and "fix: " in said, said[-2000:]
        assert bad_images(folder / "run-refused") == bad_images(folder / "run-folder"), "not the same files are listed"
        assert not list((folder / "run-refused").glob("*/step-*")), "something was trained"


def main() -> int:
    """All of it."""
    asked = parser(__doc__).parse_args()
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module=r"PIL\.")
    tallies = {form: Tally(f"awful pictures, {form}") for form in ("folder", "streamed", "csv", "parquet")}
    changing = Tally("pictures that change in a run")
    with tempfile.TemporaryDirectory(prefix="fewlabels-awful-") as name:
        folder = Path(name)
        changes(changing, folder / "changing")
        if not CORPUS.exists():
            for tally in tallies.values():
                tally.skipped = f"{CORPUS.name} is not beside this checkout"
            return conclude([*tallies.values(), changing], asked)
        rows = unpacked(folder)
        base = good_run(folder, len(rows))
        given(tallies["csv"], "csv", in_a_csv(folder, rows), rows, folder, base)
        if importlib.util.find_spec("pyarrow"):
            given(tallies["parquet"], "parquet", in_parquet(folder, rows), rows, folder, base)
        else:
            tallies["parquet"].skipped = "pyarrow is not installed"
        rows += with_specials(folder / "pictures")
        words = in_a_folder(folder, rows)
        given(tallies["folder"], "folder", words, rows, folder, base)
        too_many(tallies["folder"], words, folder)
        given(tallies["streamed"], "streamed", [*words, "--store", "streamed"], rows, folder, base)
    return conclude([*tallies.values(), changing], asked)


if __name__ == "__main__":
    sys.exit(main())
