"""Hostile images, labels, recipes and published checkpoints; each call of `payload` or `in_each` plants some."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tensorbundle_writer as bundles
from faults.planting import DEEP, Place, bomb, in_each, name_array, npz, payload, zeros

# --- images and labels -------------------------------------------------------------------------------------------


def images_file(place: Place, case: tuple[str, Any]) -> list[str]:
    """A file given as the images of a run."""
    name, content = case
    file = place.here / name
    file.write_bytes(content(place) if callable(content) else content)
    return place.fit(str(file), out="new")


def good_images(place: Place, **others: bytes) -> bytes:
    """Images that are in order, with other members beside them."""
    members = {}
    with zipfile.ZipFile(place.images) as archive:
        members = {name: archive.read(name) for name in ("images.npy", "labels.npy")}
    return npz(members | {f"{name}.npy": content for name, content in others.items()})


in_each("images.npz", 65, "fix:", {
    "with a pickle for images": ("a.npz", lambda place: npz({"images.npy": place.object_array()})),
    "with a pickle for labels": ("a.npz", lambda place: good_images(place, labels=place.object_array(96))),
    "with a pickle for classes": ("a.npz", lambda place: good_images(place, classes=place.object_array(4))),
    "with terabytes of labels": ("a.npz", lambda place: good_images(place, labels=bomb("(999999999999,)"))),
    "with 600 MB of labels": ("a.npz", lambda place: good_images(place, labels=zeros(600 << 20))),
    "with code in a header": ("a.npz", lambda _: npz({"images.npy": bomb("__import__('os').system('touch canary')")})),
    "with a header of brackets": ("a.npz", lambda _: npz({"images.npy": bomb("(" * 4000)})),
    "that is a pickle": ("a.npz", Place.pickled),
    "with escapes in class names": ("a.npz", lambda p: good_images(p, classes=name_array("\x1b[2J", "b", "c", "d"))),
}, images_file)  # fmt: skip


@payload("images.npz with members that lead out of their folder", 0)
def _slip(place: Place) -> list[str]:
    names = {"../../canary": zeros(4), str(place.canary): zeros(4), "../outside/secret.png": zeros(4)}
    return images_file(place, ("a.npz", lambda place: good_images(place, **names)))


in_each("images.npy", 65, "fix:", {
    "with a pickle": ("a.npy", Place.object_array),
    "with terabytes": ("a.npy", bomb("(999999999999, 8, 8)", "|u1")),
}, images_file)  # fmt: skip


def parquet(place: Place, columns: dict[str, Any], metadata: dict[str, str]) -> bytes:
    """A parquet file; metadata of its image column."""
    import pyarrow
    from pyarrow import parquet

    fields = [pyarrow.field(name, kind) for name, (kind, _) in columns.items()]
    fields[0] = fields[0].with_metadata(metadata)
    arrays = [pyarrow.array(values, kind) for kind, values in columns.values()]
    schema = pyarrow.schema(fields, {"huggingface": DEEP})
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), buffer)
    return buffer.getvalue()


def _extension(place: Place) -> bytes:
    """pyarrow below 14.0.1 unpickled what such a column is said to be (CVE-2023-47248)."""
    import pyarrow

    code = place.pickled().decode("latin-1")
    said = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": code}
    return parquet(place, {"image": (pyarrow.binary(), [b"x"] * 4)}, said)


def _elsewhere(place: Place) -> bytes:
    import pyarrow

    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    value = {"bytes": None, "path": str(place.outside / "secret.png")}
    return parquet(place, {"image": (kind, [value] * 4)}, {})


in_each("images.parquet", 65, "fix:", {
    "with a pickled type": ("a.parquet", _extension),
    "whose pictures are paths outside": ("a.parquet", _elsewhere),
    "that is a pickle": ("a.parquet", Place.pickled),
}, images_file)  # fmt: skip


def table(place: Place, name: str) -> list[str]:
    rows = f"image,label\n{name.format(place.outside / 'secret.png')},a\n"
    return images_file(place, ("a.csv", rows.encode()))


in_each("a labels CSV that names", 65, "fix:", {
    "../ out of its folder": "../outside/secret.png",
    "an absolute path": "{}",
    "an address": "http://127.0.0.1:9/secret.png",
    "a file address": "file://{}",
    "a command": "|touch canary",
    "a command in a shell's brackets": "$(touch canary)",
    "a device": "/dev/zero",
}, table)  # fmt: skip


@payload("pictures that are programs of other formats", 65, "cannot be read")
def _pictures(place: Place) -> list[str]:
    folder = place.here / "photos"
    folder.mkdir()
    secret = place.outside / "secret.png"
    for name, text in {
        "a.jpg": f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch {place.canary}) (r) file\n%%EOF",
        "b.png": f'<!DOCTYPE svg [<!ENTITY x SYSTEM "file://{secret}">]><svg xmlns="http://www.w3.org/2000/svg">&x;</svg>',
        "c.jpg": f'push graphic-context\nimage over 0,0 0,0 "|touch {place.canary}"\npop graphic-context',
        "d.gif": f"#EXTM3U\n#EXTINF:1,\nconcat:{secret}",
        "e.eps": f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch {place.canary}) (r) file\n%%EOF",
    }.items():
        (folder / name).write_text(text)
    (folder / "f.png").write_bytes(place.pickled())
    return place.fit(str(folder), out="new")


# --- recipes and published checkpoints ---------------------------------------------------------------------------


def recipe(place: Place, text: str) -> list[str]:
    file = place.here / "recipe.toml"
    file.write_text(text)
    return ["fit", place.images, "--out", str(place.here / "new"), "--recipe", str(file)]


in_each("a recipe that", 2, "fix:", {
    "is YAML with Python's tags": '!!python/object/apply:os.system ["touch canary"]\n',
    "is nested 100,000 deep": f"a = {DEEP}",
    "has keys of object formats": '"__reduce__" = ["os.system", "touch canary"]\n"__class__" = "os"\n',
    "names timm:hf-hub:": 'encoder = "timm:hf-hub:evil/model"\n',
    "names timm:local-dir:": 'encoder = "timm:local-dir:../outside"\n',
    "names a network with a long number": f'encoder = "resnet{"9" * 5000}"\n',
    "names a student at an address": '[distill]\nstudent = "timm:https://127.0.0.1:9/x.pth"\n',
}, recipe)  # fmt: skip


def imported(place: Place, plant: Callable[[Place, Path], None]) -> list[str]:
    folder = place.here / "tf"
    folder.mkdir()
    plant(place, folder)
    return ["import", str(folder), "--out", str(place.here / "imported")]


def _note(place: Place, folder: Path) -> None:
    for prefix in (folder / "model", place.outside / "model"):
        bundles.write(prefix, {"x": np.zeros(2, np.float32)})
    (folder / "checkpoint").write_text('model_checkpoint_path: "../outside/model"\n')


def _offset(_: Place, folder: Path) -> None:
    bundles.write(folder / "model", {"x": np.zeros(2, np.float32)})
    entry = bundles.entry(1, [2], 1 << 62, 8, 0)
    (folder / "model.index").write_bytes(bundles.table([[(b"", bundles.header()), (b"x", entry)]]))


def _saved_model(place: Place, folder: Path) -> None:
    bundles.write(folder / "variables" / "variables", {"x": np.zeros(2, np.float32)})
    (folder / "saved_model.pb").write_bytes(place.pickled())
    (folder / "keras_metadata.pb").write_bytes(place.pickled())


in_each("a published checkpoint", 65, "fix:", {
    "whose note leads out of its folder": _note,
    "with a variable far beyond its end": _offset,
    "with code in its graph": _saved_model,
    "whose index is a pickle": lambda place, folder: (folder / "model.index").write_bytes(place.pickled()),
}, imported)  # fmt: skip
