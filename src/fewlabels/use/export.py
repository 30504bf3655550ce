"""A trained model as one file that runs without this package: an ONNX model or a torch.export program.

The program takes photographs as they are, uint8 (B, 3, H, W) of any size, and returns probabilities (B, K): the
evaluation view, the network, and the softmax with its temperature are inside, class names in the file's metadata.
A file counts only after it was loaded again and agreed with the Python model on images of several odd sizes.

Shapes: B images, H x W pixels, K classes.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fewlabels import checkpoint
from fewlabels.data import views
from fewlabels.errors import CannotCreate, DataError, UsageError
from fewlabels.use.predict import Model

FORMATS = {"onnx": "model.onnx", "torch": "model.pt2"}
TOLERANCE = 1e-4
LARGEST_ONNX = 1 << 31  # bytes: a limit of protobuf
# Sizes on which an exported program is compared, as (B, H, W): odd, tiny, wide, tall, batch 1 and many
TRIALS = ((1, 2, 2), (1, 37, 61), (3, 64, 48), (8, 33, 33), (1, 129, 200), (12, 17, 95), (8, 96, 31))
Arrays = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]


class Program(nn.Module):
    """Photographs to probabilities: uint8 (B, 3, H, W), H and W at least 2 -> float32 (B, K)."""

    def __init__(self, network: nn.Module, *, size: int, kind: str, temperature: float) -> None:
        super().__init__()
        self.network = network
        self.size, self.kind, self.temperature = size, kind, temperature

    def forward(self, images: Tensor) -> Tensor:
        view = views.evaluate_image(images, size=self.size, kind=self.kind)  # (B, 3, size, size)
        return torch.softmax(self.network(view).float() / self.temperature, dim=1)


def export(model: Model, folder: str | os.PathLike[str], *, format: str) -> Path:
    """Write folder/model.onnx or folder/model.pt2 and return its path. format: "onnx" or "torch".

    `predict` first brings a picture larger than those of training down to their longest side (card.longest_side); the
    program scales it in one step, and its probabilities may then differ by some hundredths.

    Raises UsageError for an unknown format or missing packages, DataError if the exported program does not agree
    with the Python model to 1e-4 on each probability.
    """
    if format not in FORMATS:
        raise UsageError(f'unknown export format "{format}"', fix="use " + " or ".join(f'"{f}"' for f in FORMATS))
    model.check_classifies()
    if format == "onnx":
        if sum(p.nbytes for p in model.network.parameters()) > LARGEST_ONNX:
            raise UsageError("the model is too large for one ONNX file, which holds 2 GiB", fix="use --format torch")
        _require("onnx", "onnxscript", "onnxruntime")
    target = Path(folder) / FORMATS[format]
    if target.parent.exists() and not target.parent.is_dir():
        raise CannotCreate(f"{folder} is a file", why="a program is written into a folder", fix="give another --out")
    card = model.card
    program = Program(model.network.to("cpu"), size=card.size, kind=card.kind, temperature=card.temperature).eval()
    temporary = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        with checkpoint.storage_errors(target), _quiet():
            target.parent.mkdir(parents=True, exist_ok=True)
            run = (_write_onnx if format == "onnx" else _write_torch)(program, temporary, _facts(model))
            _compare(program, run, target)
            checkpoint.sync(temporary)
            temporary.replace(target)
    finally:
        with contextlib.suppress(OSError):  # it may have become no folder
            temporary.unlink()
        model.network.to(model.device)
    return target


def _facts(model: Model) -> dict[str, str]:
    """What goes into the file's metadata, as text."""
    card = model.card
    return {
        "fewlabels_version": card.version,
        "classes": json.dumps(card.classes),
        "input": "images: uint8 (B, 3, H, W), RGB, upright, values 0 to 255, H and W at least 2",
        "output": "probabilities: float32 (B, K), columns in the order of classes",
        "preprocessing": json.dumps(
            {"inside": True, "size": card.size, "kind": card.kind, "longest_side": card.longest_side}
        ),
        "encoder": card.encoder,
        "temperature": repr(card.temperature),
        "balanced": json.dumps(card.balanced),
    }


def _require(*packages: str) -> None:
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError as error:
        raise UsageError(
            f"export to ONNX needs the packages {', '.join(packages)} ({error})",
            why="they are not installed with fewlabels, since most people do not need them",
            fix='pip install "fewlabels[export]"',
        ) from error


def _dynamic() -> dict[str, dict[int, torch.export.Dim]]:
    batch, height, width = (torch.export.Dim(name, min=low) for name, low in (("B", 1), ("H", 2), ("W", 2)))
    return {"images": {0: batch, 2: height, 3: width}}


def _example() -> Tensor:
    return torch.randint(0, 256, (2, 3, 45, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _write_onnx(program: Program, path: Path, facts: dict[str, str]) -> Arrays:
    """One file, with weights inside and metadata; returned is onnxruntime's way to run it."""
    onnx = importlib.import_module("onnx")
    onnxruntime = importlib.import_module("onnxruntime")
    written = torch.onnx.export(
        program, (_example(),), dynamo=True, input_names=["images"], output_names=["probabilities"],
        dynamic_shapes=_dynamic(), verbose=False,
    )  # fmt: skip
    assert written is not None
    proto = written.model_proto
    del proto.metadata_props[:]
    for node in [*proto.graph.node, *(node for function in proto.functions for node in function.node)]:
        del node.metadata_props[:]  # lines of source and paths of the machine that exported
        node.doc_string = ""
    for name, value in facts.items():
        proto.metadata_props.add(key=name, value=value)
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities"], {"images": images})[0]


def _write_torch(program: Program, path: Path, facts: dict[str, str]) -> Arrays:
    """A torch.export program with metadata as extra files; returned is the program as loaded from the file."""
    with torch.no_grad():
        exported = torch.export.export(program, (_example(),), dynamic_shapes=_dynamic())
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of the machine that exported
    file = io.BytesIO()  # a disk that fails under torch's own writer aborts the process
    torch.export.save(exported, file, extra_files={"fewlabels.json": json.dumps(facts)})
    path.write_bytes(file.getvalue())
    loaded = torch.export.load(path).module()
    return torch.inference_mode()(lambda images: loaded(torch.from_numpy(images)).numpy())


def _compare(program: Program, run: Arrays, target: Path) -> None:
    """DataError unless run and program agree on random images of all TRIALS."""
    rng = np.random.default_rng(0)
    for batch, height, width in TRIALS:
        # Blocks of colour, not noise: noise averages to the same gray in every view and would compare nothing
        coarse = rng.integers(0, 256, (batch, 3, 5, 4), dtype=np.uint8)
        images = np.repeat(np.repeat(coarse, -(-height // 5), axis=2), -(-width // 4), axis=3)
        images = np.ascontiguousarray(images[:, :, :height, :width])
        with torch.inference_mode():
            expected = program(torch.from_numpy(images)).numpy()
        found = np.asarray(run(images))
        apart = float(np.abs(found - expected).max()) if found.shape == expected.shape else float("inf")
        if not apart <= TOLERANCE:
            raise DataError(
                f"the exported {target.name} differs from the model by {apart:.2g} in a probability "
                f"({batch} images of {height} x {width})",
                why=f"more than {TOLERANCE:g} means that it is not the same model; nothing was written",
                fix="use another --format, and report this with the versions of torch and onnxruntime",
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters print pages on stdout, where a program expects the result."""
    before = logging.root.manager.disable
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
