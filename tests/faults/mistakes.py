"""Mistakes in labels, of every kind that we know of, through the commands `check` and `fit`.

    python tests/faults/mistakes.py

Each is found before anything is trained: refused with the agreed exit code, or (where it may be meant) said in a note.
All mistakes of a file are told at once, each with its line, and why and what to do with them. Forms that are only
unusual are accepted, with the right label for every image.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import contextlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from faults.bad_labels import Case, harmless, refused, said
from faults.tally import Tally, conclude, parser
from fewlabels import cli
from fewlabels.data.labels import Dataset
from fewlabels.worker import Worker

BROKEN_SHARE = 0.5  # of the images may be unreadable: one of nine is


class Reached(BaseException):
    """Everything about the images and labels was accepted, and the work would begin."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset


def begin(worker: Worker) -> None:
    """In place of the first step on a network."""
    raise Reached(worker.prepared.dataset)


def lay_out(folder: Path) -> None:
    """The images that labels are given to: nine, two of them the same, one unreadable."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.png", "sub/d.png", "sub/e.png", "other/e.png", "sub/f.png"):
        path = folder / "album" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    shutil.copy(folder / "album/a.png", folder / "album/copy.png")
    (folder / "album/broken.png").write_text("not a picture")
    (folder / "album/notes.txt").write_text("text")


def arguments(case: Case, folder: Path) -> list[str]:
    """Write what is in the case's content to where its words say; returns the words of the command line."""
    kinds = {"ALBUM": "album", "FILE": "labels.csv", "LIST": "list.txt", "NPZ": "images.npz", "FOLDERS": "folders"}
    content = case.content
    if "FOLDERS" in case.words:
        shutil.rmtree(folder / "folders", ignore_errors=True)
        for name in str(content).split():
            (folder / "folders" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "album/a.png", folder / "folders" / name)
    elif "NPZ" in case.words:
        pixels = np.random.default_rng(1).integers(0, 256, (4, 24, 24), dtype=np.uint8)
        labels = np.array([float(n) for n in str(content).strip("[]").split(",")])
        np.savez(folder / "images.npz", images=pixels, labels=labels, classes=list("klm"))
    else:
        # A CSV that is the images lies beside them
        place = folder / ("list.txt" if "LIST" in case.words else "labels.csv")
        if case.words.split()[0] == "FILE" or "--test FILE" in case.words:
            kinds["FILE"], place = "album/labels.csv", folder / "album/labels.csv"
        text = content if isinstance(content, bytes) else content.replace("ALBUM", str(folder / "album")).encode()
        place.write_bytes(text)
    words = re.sub("|".join(kinds), lambda found: str(folder / kinds[found.group()]), case.words).split()
    return [*words, "--max-bad", str(BROKEN_SHARE)]


def tried(command: str, words: Sequence[str], out: Path) -> tuple[int, str, Dataset | None]:
    """(exit code, everything that was said, what was accepted if it was) of a command in this process."""
    heard = io.StringIO()
    try:
        with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
            return cli.main([command, *words, "--out", str(out)]), heard.getvalue(), None
    except Reached as reached:
        return 0, heard.getvalue(), reached.dataset


def in_its_own_process(command: str, words: Sequence[str], out: Path) -> tuple[int, str, Dataset | None]:
    """The same for a process as a user starts it, where nothing is replaced."""
    line = [sys.executable, "-m", "fewlabels", command, *words, "--out", str(out)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr, None


def check_refused(case: Case, code: int, text: str, accepted: Dataset | None, out: Path) -> None:
    """Fails unless the mistake was refused as it must be."""
    assert accepted is None, "accepted in silence"
    assert code == case.code, f"exit code {code}: {text[-500:]}"
    message = text[text.index("error:") :]
    assert case.says in message, f"it is not said: {message[:500]}"
    lines = re.findall(r"^  - line (\d+):", message, re.MULTILINE) or re.findall(r"\(line (\d+)\)", message)
    assert tuple(map(int, lines)) == case.lines, f"lines {', '.join(lines) or 'none'}: {message[:500]}"
    assert "\nwhy: " in message, f"no reason: {message[:500]}"
    assert "\nfix: " in message, f"no way out: {message[:500]}"
    assert "Traceback" not in text, text[-2000:]
    assert not list(out.glob("*/step-*")) and not (out / "metrics.jsonl").exists(), "something was trained"


def check_accepted(case: Case, code: int, text: str, accepted: Dataset | None) -> None:
    """Fails unless every image has the label that the file says, and what must be said is."""
    assert accepted is not None, f"refused with {code}: {text[-500:]}"
    assert case.says in text, f"it is not said: {text[-500:]}"
    words = (None, *accepted.classes)
    found = {
        name: words[label + 1]
        for name, label, split in zip(accepted.names, accepted.labels, accepted.splits, strict=True)
        if label >= 0 and split != 3
    }
    assert found == dict(case.labels), f"labels are {found}"


def main() -> int:
    """All of it."""
    asked = parser(__doc__).parse_args()
    mistakes, notes, forms = (
        Tally("label mistakes refused"),
        Tally("label mistakes said"),
        Tally("harmless label forms"),
    )
    in_processes = Tally("label mistakes, processes")
    with tempfile.TemporaryDirectory(prefix="fewlabels-mistakes-") as name:
        folder = Path(name)
        lay_out(folder)
        try_networks, Worker.try_networks = Worker.try_networks, begin  # type: ignore[method-assign]
        for tally, cases in ((mistakes, refused()), (notes, said()), (forms, harmless())):
            for number, case in enumerate(cases):
                words = arguments(case, folder)
                with tally.fault(case.kind):
                    for command in ("check", "fit"):
                        out = folder / f"{tally.name[:3]}{number}"
                        code, text, accepted = tried(command, words, out)
                        if tally is mistakes:
                            check_refused(case, code, text, accepted, out)
                        else:
                            check_accepted(case, code, text, accepted)
        Worker.try_networks = try_networks  # type: ignore[method-assign]
        for case in [case for case in refused() if case.lines][::24]:
            with in_processes.fault(case.kind):
                out = folder / "process"
                check_refused(case, *in_its_own_process("fit", arguments(case, folder), out), out)
    kinds = {case.kind.partition(":")[0] for case in [*refused(), *said()]}
    cases, missed = mistakes.injected + notes.injected, len(mistakes.failures) + len(notes.failures)
    print(f"{len(kinds)} kinds of label mistakes in {cases} files, {cases - missed} found")
    return conclude([mistakes, notes, forms, in_processes], asked)


if __name__ == "__main__":
    sys.exit(main())
