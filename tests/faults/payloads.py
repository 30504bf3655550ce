"""Files that try to run code, to lead out of their folder, to reach the network or to eat all memory when opened.

    python tests/faults/payloads.py

Each is planted where a user would meet it and opened by the command that a user would type. It must be refused in
words with its exit code, or be harmless; a canary file must not appear, no program be started, no connection tried,
and no file outside be opened. First it is shown that the payloads are real: what Python's own ways of opening do.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # forking a process whose threads have worked would hang its child

import io
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm  # noqa: F401 - 2 s, once here and not in every child, as the pipeline below
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from faults import planted_data, planted_models, runs  # noqa: F401 - the planted ones fill the list
from faults.guarded import Outcome, guarded
from faults.planting import PAYLOADS, Payload, Place
from faults.tally import Tally, conclude, parser
from fewlabels import pipeline  # noqa: F401
from fewlabels.data import views
from fewlabels.use import artefact
from small_model import small_card, small_network


def control(place: Place) -> None:
    """Python's own ways of opening let the same payloads run, and the guard sees it."""
    file, array = place.here / "evil", place.here / "evil.npy"
    ways = {
        "pickle": (place.pickled(), lambda: pickle.loads(file.read_bytes())),
        "torch": (place.torch_pickled(), lambda: torch.load(file, weights_only=False)),
        "numpy": (place.object_array(), lambda: np.load(array, allow_pickle=True)),
    }
    for name, (content, opens) in ways.items():
        file.write_bytes(content)
        array.write_bytes(content)
        seen = guarded(lambda opens=opens: bool(opens()) and None, place.here, place.outside)
        assert place.canary.exists(), f"{name}: the payload is none: {seen}"
        assert name == "torch" or any("pickle.find_class" in deed for deed in seen.deeds), seen
        place.canary.unlink()
    secret = place.outside / "secret.png"
    for name, does in {
        "socket.connect": lambda: socket.socket().connect_ex(("127.0.0.1", 9)),
        "subprocess.Popen": lambda: subprocess.run(["true"], check=False),
        "open": secret.read_bytes,
    }.items():
        seen = guarded(lambda does=does: bool(does()) and None, place.here, place.outside)
        assert any(deed.startswith(name) for deed in seen.deeds), f"{name} is not seen: {seen}"


def judge(planted: Payload, place: Place, seen: Outcome) -> None:
    """What must hold after every one."""
    assert not place.canary.exists() and not (place.here / "canary").exists(), "the payload ran"
    assert not seen.deeds, f"it {seen.deeds[:3]}"
    assert "Traceback" not in seen.text, f"a traceback: {seen.text[-700:]}"
    assert seen.code == planted.code, f"exit code {seen.code}, not {planted.code}: {seen.text[-700:]}"
    assert planted.says in seen.text, f'not said "{planted.says}": {seen.text[-500:]}'
    if planted.code:
        assert seen.text.count("\nerror: ") == 1 and "\nfix: " in seen.text, f"no way out: {seen.text[-500:]}"


def prepared(folder: Path) -> Path:
    """A finished run, its images and a model."""
    good = folder / "good"
    good.mkdir()
    views.compiled()
    runs.unbroken(runs.make_images(good), good)
    artefact.save(good / "model", small_network(), small_card())
    return good


def planted(payload: Payload, good: Path, folder: Path, secret: bytes) -> tuple[Place, list[str]]:
    """A place of its own for a payload, and the command line."""
    shutil.rmtree(folder, ignore_errors=True)
    place = Place(folder / "here", folder / "outside", good)
    place.here.mkdir(parents=True)
    place.outside.mkdir()
    (place.outside / "secret.png").write_bytes(secret)
    return place, payload.plant(place)


def main() -> int:
    """All of it."""
    asker = parser(__doc__)
    asker.add_argument("--only", default="", help="those whose words contain this")
    asked = asker.parse_args()
    torch.set_num_threads(1)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 8, 7)).save(buffer, "PNG")
    tally = Tally("hostile files opened")
    with tempfile.TemporaryDirectory(prefix="fewlabels-payloads-") as name:
        good, folder = prepared(Path(name)), Path(name) / "place"
        control(planted(Payload("", lambda _: [], 0, ""), good, folder, buffer.getvalue())[0])
        for one in PAYLOADS:
            if asked.only in one.words:
                place, command = planted(one, good, folder, buffer.getvalue())
                with tally.fault(one.words):
                    judge(one, place, guarded(command, place.here, place.outside))
                    assert (place.outside / "secret.png").read_bytes() == buffer.getvalue(), "a file outside changed"
    return conclude([tally], asked)


if __name__ == "__main__":
    sys.exit(main())
