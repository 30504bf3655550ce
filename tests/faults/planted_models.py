"""Hostile model folders, run folders and checkpoints; each call of `payload` or `in_each` plants some."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from faults.planting import DEEP, HOSTILE_KEYS, Place, bomb, in_each, npz, payload, vouch, zeros
from fewlabels import checkpoint
from fewlabels.use import artefact

# --- a model folder --------------------------------------------------------------------------------------------


def weights(place: Place, content: Callable[[Place], bytes]) -> list[str]:
    """Other bytes as weights, and a manifest that vouches for them."""
    model = place.model()
    (model / artefact.WEIGHTS).write_bytes(content(place))
    vouch(model)
    return place.predict(model)


def raw_safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin: int, end: int, shape: Sequence[int] = (2,), kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}


in_each("weights that are", 65, "cannot be used", {
    "a pickle": Place.pickled,
    "a torch.save file": Place.torch_pickled,
    "a numpy object array": Place.object_array,
    "a header of 2^63 bytes": lambda _: raw_safetensors({}, length=1 << 63),
    "a header of 101 MB": lambda _: raw_safetensors(b"{" + b" " * 101_000_000 + b"}"),
    "a header nested 100,000 deep": lambda _: raw_safetensors(DEEP.encode()),
    "tensors on the same bytes": lambda _: raw_safetensors({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),
    "tensors with a hole between": lambda _: raw_safetensors({"a": tensor(0, 8), "b": tensor(16, 24)}, bytes(24)),
    "tensors beyond the end": lambda _: raw_safetensors({"a": tensor(0, 1 << 40, (1 << 38,))}, bytes(8)),
    "a shape that overflows": lambda _: raw_safetensors({"a": tensor(0, 8, (1 << 62, 1 << 62))}, bytes(8)),
    "of an unknown type": lambda _: raw_safetensors({"a": tensor(0, 8, (2,), "OBJECT")}, bytes(8)),
}, weights)  # fmt: skip


def described(place: Place, changes: dict[str, Any] | str | bytes) -> list[str]:
    """Another model.json, and a manifest that vouches for it."""
    model = place.model()
    file = model / artefact.DESCRIPTION
    if isinstance(changes, dict):
        changes = json.dumps(json.loads(file.read_text()) | changes)
    file.write_bytes(changes if isinstance(changes, bytes) else changes.encode())
    vouch(model)
    return place.predict(model)


in_each("a description that", 65, "cannot be used", {
    "is a pickle": pickle.dumps(HOSTILE_KEYS),
    "is nested 100,000 deep": DEEP,
    "has a number of 5,000 digits": '{"format_version": 1, "size": ' + "9" * 5000 + "}",
    "has lists for classes": {"classes": [[], []], "num_classes": 2},
    "has a list for its kind": {"kind": []},
    "has an endless temperature": '{"format_version": 1, "encoder": "x", "classes": [], "size": 8, "kind": "photo", '
                                  '"temperature": 1' + "0" * 400 + "}",
    "names a network of 10^12 channels": {"encoder": "resnet18_1000000000000x"},
    "names a module": {"encoder": "os:system"},
    "names timm:hf-hub:": {"encoder": "timm:hf-hub:evil/model"},
    "names timm:hf_hub:": {"encoder": "timm:hf_hub:evil/model"},
    "names timm:local-dir:": {"encoder": "timm:local-dir:../outside"},
    "names a source in timm's tag": {"encoder": "timm:resnet18.hf-hub:evil/model"},
    "names an address": {"encoder": "timm:https://127.0.0.1:9/weights.pth"},
    "names a path": {"encoder": "timm:../outside/secret"},
}, described)  # fmt: skip


@payload("a description with keys of object formats", 0)
def _keys(place: Place) -> list[str]:
    return described(place, HOSTILE_KEYS | {"training": HOSTILE_KEYS, "metrics": HOSTILE_KEYS})


@payload("a description with templates and formats as class names", 0)
def _templates(place: Place) -> list[str]:
    names = ["{{ ''.__class__.__mro__ }}", "{0.__class__.__init__.__globals__}", "%(canary)s%n", "${jndi:ldap://x}"]
    return described(place, {"classes": names})


@payload("weights of another program beside ours", 0)
def _beside(place: Place) -> list[str]:
    model = place.model()
    for name in ("pytorch_model.bin", "model.pt", "model.pkl", ".metadata", "model.joblib", "checkpoint"):
        (model / name).write_bytes(place.torch_pickled() if name.endswith(("bin", "pt")) else place.pickled())
    (model / "modeling.py").write_text(f"open({str(place.canary)!r}, 'w')")
    vouch(model)
    return place.predict(model)


@payload("weights that are a link out of the folder", 65, "missing")
def _link(place: Place) -> list[str]:
    model = place.model()
    vouch(model)
    (model / artefact.WEIGHTS).rename(place.outside / "weights")
    (model / artefact.WEIGHTS).symlink_to(place.outside / "weights")
    return place.predict(model)


def manifest(place: Place, name: str) -> list[str]:
    """A manifest that lists one file more, with its true size and digest."""
    model, secret = place.model(), place.outside / "secret.png"
    listed = json.loads((model / artefact.MANIFEST).read_text())
    del listed["sha256"]
    listed["files"][name.format(secret)] = {"bytes": secret.stat().st_size, "sha256": checkpoint.file_digest(secret)}
    (model / artefact.MANIFEST).write_text(json.dumps(listed))
    return place.predict(model)


in_each("a manifest that lists", 65, "missing", {
    "../ out of the folder": "../../outside/secret.png", "an absolute path": "{}", "a NUL": "secret\0.png",
}, manifest)  # fmt: skip


@payload("a manifest that is a pickle", 65, "manifest")
def _manifest(place: Place) -> list[str]:
    model = place.model()
    (model / artefact.MANIFEST).write_bytes(place.pickled())
    return place.predict(model)


@payload("a model that is a file of pickles", 66, "a model is a folder")
def _file(place: Place) -> list[str]:
    (place.here / "model.pt").write_bytes(place.torch_pickled())
    return place.predict(place.here / "model.pt")


@payload("an ONNX model with its data outside, to be written over", 0)
def _onnx(place: Place) -> list[str]:
    run = place.run()
    (run / "export").mkdir()
    (run / "export" / "model.pt2").symlink_to(place.outside / "secret.png")
    (run / "export" / "model.onnx").write_bytes(
        b"\x08\x0a:\x2b\x12\x01aj&\n\x08location\x12\x1a../../../outside/secret"
    )
    return ["export", str(run), "--format", "torch"]


@payload("a model to begin with that is a pickle", 65, "cannot be used")
def _pretrained(place: Place) -> list[str]:
    weights(place, Place.torch_pickled)
    return place.fit("", "--pretrained", str(place.here / "model"))


# --- a run folder ------------------------------------------------------------------------------------------------


def checkpoint_with(place: Place, change: Callable[[Place, Path], None]) -> list[str]:
    """Another newest checkpoint of the last stage, and a manifest that vouches for it."""
    run = place.run()
    newest = max((run / "distill").glob("step-*"))
    change(place, newest)
    vouch(newest)
    return place.fit()


def _dcp(place: Place, step: Path) -> None:
    for file in step.iterdir():
        file.unlink()
    (step / ".metadata").write_bytes(place.pickled())
    (step / "__0_0.distcp").write_bytes(place.torch_pickled())


in_each("a checkpoint that", 0, "is used", {
    "is a pickle": lambda place, step: (step / checkpoint.TENSORS).write_bytes(place.torch_pickled()),
    "is one of torch.distributed": _dcp,
    "has values nested 100,000 deep": lambda _, step: (step / checkpoint.VALUES).write_text(DEEP),
    "has values that are a list": lambda _, step: (step / checkpoint.VALUES).write_text("[7]"),
    "has a pickle for values": lambda place, step: (step / checkpoint.VALUES).write_bytes(place.pickled()),
}, checkpoint_with)  # fmt: skip


def _values(place: Place, step: Path, **changes: Any) -> None:
    values = json.loads((step / checkpoint.VALUES).read_text())
    (step / checkpoint.VALUES).write_text(json.dumps(values | changes))


in_each("a checkpoint that", 65, "are of another network", {
    "has tensors of another network":
        lambda _, step: (step / checkpoint.TENSORS).write_bytes(raw_safetensors({"a": tensor(0, 8)}, bytes(8))),
    "has a list for its surroundings": lambda place, step: _values(place, step, surroundings=[1]),
    "has text for its seconds": lambda place, step: _values(place, step, seconds="__import__('os')"),
}, checkpoint_with)  # fmt: skip
in_each("a checkpoint that", 73, "another run's", {
    "has a number for its identity": lambda place, step: _values(place, step, identity=7),
    "has keys of object formats": lambda place, step: _values(place, step, identity=HOSTILE_KEYS | {"pretrain": 3}),
}, checkpoint_with)  # fmt: skip


def run_with(place: Place, case: tuple[str, Any, str]) -> list[str]:
    """Another file in a run, and a command on it."""
    name, content, command = case
    run = place.run()
    file = run / name
    file.unlink(missing_ok=True)
    if callable(content):
        content = content(place)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return place.fit() if command == "fit" else [command, str(run)]


in_each("a run's resolved.json", 65, "fix:", {
    "is a pickle": ("resolved.json", Place.pickled, "fit"),
    "is nested 100,000 deep": ("resolved.json", DEEP, "fit"),
    "is a list": ("resolved.json", "[7]", "fit"),
    "is empty of facts": ("resolved.json", "{}", "fit"),
    "is of strange kinds": ("resolved.json", '{"asked": 1, "recipe": [], "understood": "x", "inputs": 2}', "fit"),
    "is a pickle, for suggest": ("resolved.json", Place.pickled, "suggest"),
    "is empty of facts, for suggest": ("resolved.json", "{}", "suggest"),
}, run_with)  # fmt: skip
in_each("a run's pixel store", 74, "damaged", {
    "has pickled extents": ("data/extents.npy", Place.object_array, "suggest"),
    "has pickled hashes": ("data/hashes.npy", Place.object_array, "suggest"),
    "has extents of a petabyte": (
        "data/extents.npy", b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<i4', 'fortran_order': False, 'shape': "
        b"(999999999999999, 2)}".ljust(117) + b"\n", "suggest"),
    "has an index nested 100,000 deep": ("data/index.json", DEEP, "suggest"),
    "has an index that is a pickle": ("data/index.json", Place.pickled, "suggest"),
}, run_with)  # fmt: skip
in_each("a run's note of its images", 0, "report:", {
    "is a pickle": ("data.json", Place.pickled, "fit"),
    "is nested 100,000 deep": ("data.json", DEEP, "fit"),
    "is a list": ("data.json", "[7]", "fit"),
}, run_with)  # fmt: skip
in_each("a run's images.csv", 65, "does not fit its run", {
    "has rows too short": ("images.csv", "image\n" + "x\n" * 136, "suggest"),
    "is a pickle": ("images.csv", Place.pickled, "suggest"),
}, run_with)  # fmt: skip


in_each("a run's evaluation.npz", 0, "report.html", {
    "has a pickle": ("evaluation.npz", lambda place: npz({"ids.npy": place.object_array()}), "report"),
    "is a pickle": ("evaluation.npz", Place.pickled, "report"),
    "says it has terabytes": ("evaluation.npz", npz({"ids.npy": bomb("(999999999999,)")}), "report"),
    "unpacks to 1.5 GB": ("evaluation.npz", lambda _: npz({f"{k}.npy": zeros(1 << 29) for k in ("ids", "map", "x")}),
                          "report"),
}, run_with)  # fmt: skip
in_each("a run's results.json", 0, "report.html", {
    "has keys of object formats": ("resolved.json", json.dumps(HOSTILE_KEYS | {"format_version": 1}), "report"),
    "is a pickle": ("resolved.json", Place.pickled, "report"),
}, run_with)  # fmt: skip


def run_link(place: Place, name: str) -> list[str]:
    """A file of a run is a link to one outside, which the run would write."""
    link = place.run() / name
    link.unlink(missing_ok=True)
    link.symlink_to(place.outside / "secret.png")
    return place.fit()


in_each("a run whose file is a link out of it", 73, "links", {
    name: name for name in (".lock", "metrics.jsonl", "bad_images.csv", "distill/teacher-logits-16.f32")
}, run_link)  # fmt: skip


@payload("a run whose status is a pipe that nobody writes", 65, "not a plain file")
def _pipe(place: Place) -> list[str]:
    run = place.run()
    (run / "resolved.json").unlink()
    os.mkfifo(run / "resolved.json")
    return ["suggest", str(run)]


@payload("a checkpoint whose manifest never ends", 73, "devices")
def _endless(place: Place) -> list[str]:
    step = max((place.run() / "distill").glob("step-*"))
    (step / "manifest.json").unlink()
    (step / "manifest.json").symlink_to("/dev/zero")
    return place.fit()


@payload("settings of matplotlib in the working folder", 0, "report.html")
def _matplotlib(place: Place) -> list[str]:
    run = place.run()
    preamble = r"\immediate\write18{touch " + str(place.canary) + "}"
    (place.here / "matplotlibrc").write_text(
        f"text.usetex: True\ntext.latex.preamble: {preamble}\nbackend: module://canary\nsvg.fonttype: path\n"
    )
    (place.here / "canary.py").write_text(f"open({str(place.canary)!r}, 'w')")
    return ["report", str(run)]
