"""Exported programs equal the model on odd sizes and any batch, hold their facts, and are refused if they differ."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fewlabels.data import views
from fewlabels.errors import CannotCreate, DataError, StorageError, UsageError
from fewlabels.use import export
from fewlabels.use.predict import Model
from small_model import CLASSES, small_card, small_model, small_network

SIZES = [(1, 2, 2), (1, 97, 3), (2, 5, 64), (7, 31, 33), (1, 256, 190)]


@pytest.fixture(scope="module")
def model() -> Model:
    """A real, small classifier of four classes."""
    return small_model()


@pytest.fixture
def tiny() -> Model:
    """A model that exports in a moment, for what has nothing to do with the network."""
    layers = (nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4))
    return Model(nn.Sequential(*layers), small_card(kind="glyph"), device="cpu")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def onnx_file(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    return export.export(model, tmp_path_factory.mktemp("onnx") / "out", format="onnx")


@pytest.fixture(scope="module")
def torch_file(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.export(model, tmp_path_factory.mktemp("torch") / "out", format="torch")


@pytest.fixture(scope="module")
def torch_program(torch_file: Path) -> nn.Module:
    return torch.export.load(torch_file).module()


def _images(batch: int, height: int, width: int) -> np.ndarray:
    """(B, 3, H, W): smooth waves, so that a wrong crop or scale changes them."""
    rng = np.random.default_rng(batch * height + width)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [
        np.sin(rng.uniform(2, 9) * rows / height + rng.uniform(2, 9) * columns / width + rng.uniform(0, 6))
        for _ in range(batch * 3)
    ]
    return np.rint(127.5 + 127.5 * np.stack(waves)).astype(np.uint8).reshape(batch, 3, height, width)


def _expected(images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        view = views.evaluate_image(torch.from_numpy(images), size=16, kind="photo")
        return torch.softmax(small_network()(view) / 1.5, dim=1).numpy()


@pytest.mark.parametrize("shape", SIZES)
def test_onnx_equals_the_model(onnx_file: Path, shape: tuple[int, int, int]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    images = _images(*shape)
    found = session.run(["probabilities"], {"images": images})[0]
    assert found.dtype == np.float32
    assert found == pytest.approx(_expected(images), abs=1e-4)


@pytest.mark.parametrize("shape", SIZES)
def test_torch_program_equals_the_model(torch_program: nn.Module, shape: tuple[int, int, int]) -> None:
    images = _images(*shape)
    found = torch_program(torch.from_numpy(images))
    assert found.detach().numpy() == pytest.approx(_expected(images), abs=1e-4)


# What a user of the exported file has: the file, its runtime, pictures. Probabilities of every batch go to the folder
ALONE = """
import sys
import numpy as np
import onnxruntime, torch

sys.modules["fewlabels"] = None  # an import of it would be an error
onnx_file, torch_file, folder = sys.argv[1:]
session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
program = torch.export.load(torch_file).module()
batches = np.load(folder + "/batches.npz")
with torch.inference_mode():
    onnx = {name: session.run(["probabilities"], {"images": batches[name]})[0] for name in batches.files}
    torch_ = {name: program(torch.from_numpy(batches[name])).numpy() for name in batches.files}
np.savez(folder + "/onnx.npz", **onnx)
np.savez(folder + "/torch.npz", **torch_)
"""
BATCHES = [*[(1, 23 + 7 * k, 64 - 5 * k) for k in range(9)], (3, 41, 19), (3, 2, 77), (256, 37, 51), (256, 32, 32)]


def _on_a_canvas(images: np.ndarray) -> np.ndarray:
    """(B, K) logits by the view that training evaluates with: of canvases and extents, not of whole images."""
    batch, _, height, width = images.shape
    canvases = np.full((batch, 3, 96, 96), 255, dtype=np.uint8)
    canvases[:, :, :height, :width] = images
    extent = torch.tensor([[height, width]]).expand(batch, 2)
    with torch.no_grad():
        return small_network()(views.evaluate(torch.from_numpy(canvases), extent, size=16, kind="photo")).numpy()


def test_alone_in_a_fresh_process_they_give_the_logits_of_the_model(
    onnx_file: Path, torch_file: Path, tmp_path: Path
) -> None:
    batches = {str(k): _images(*shape) for k, shape in enumerate(BATCHES)}
    np.savez(tmp_path / "batches.npz", **batches)
    command = [sys.executable, "-I", "-c", ALONE, str(onnx_file), str(torch_file), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for file in ("onnx.npz", "torch.npz"):
        found = np.load(tmp_path / file)
        for name, images in batches.items():
            logits = _on_a_canvas(images)
            logarithms = 1.5 * np.log(found[name])  # the logits but for what is the same for all classes
            centred = [each - each.mean(axis=1, keepdims=True) for each in (logarithms, logits)]
            # Measured: up to 4.3e-5, on 256 images whose logits spread over 17
            assert np.abs(centred[0] - centred[1]).max() <= 1e-4, (file, images.shape)
            assert (found[name].argmax(axis=1) == logits.argmax(axis=1)).all(), (file, images.shape)


def test_the_model_tells_these_images_apart() -> None:
    """Otherwise equality would show nothing."""
    assert np.ptp(_expected(_images(12, 40, 30)), axis=0).max() > 0.2


def test_onnx_is_one_file_with_its_facts_inside(onnx_file: Path) -> None:
    import onnx

    assert [p.name for p in onnx_file.parent.iterdir()] == ["model.onnx"]
    proto = onnx.load(onnx_file, load_external_data=False)
    assert all(t.data_location != onnx.TensorProto.EXTERNAL for t in proto.graph.initializer)
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(facts["classes"]) == list(CLASSES)
    assert json.loads(facts["preprocessing"]) == {"inside": True, "size": 16, "kind": "photo", "longest_side": 48}
    assert json.loads(export._facts(small_model(canvas=None))["preprocessing"])["longest_side"] == 1024
    assert facts["temperature"] == "1.5"
    shape = [d.dim_param or d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    assert shape[1] == 3 and all(isinstance(shape[i], str) for i in (0, 2, 3))
    assert not _paths(onnx_file)


def _paths(file: Path) -> bool:
    """Whether the file names the folders of the machine that it was made on."""
    return any(str(Path(m.__file__).parents[1]).encode() in file.read_bytes() for m in (export, torch))


def test_torch_program_has_its_facts_inside(torch_file: Path) -> None:
    assert [p.name for p in torch_file.parent.iterdir()] == ["model.pt2"]
    extra = {"fewlabels.json": ""}
    torch.export.load(torch_file, extra_files=extra)
    assert json.loads(json.loads(extra["fewlabels.json"])["classes"]) == list(CLASSES)
    assert not _paths(torch_file)


def test_it_is_compared_on_enough_images_of_several_sizes() -> None:
    assert sum(batch for batch, _, _ in export.TRIALS) >= 32
    assert any(batch == 1 for batch, _, _ in export.TRIALS)
    assert len({(h, w) for _, h, w in export.TRIALS}) >= 5


@pytest.mark.parametrize("wrong", ["values", "shape", "nan"])
def test_a_program_that_differs_is_not_kept(tiny: Model, tmp_path: Path, wrong: str, monkeypatch: Any) -> None:
    change = {"values": lambda p: p + 2e-4, "shape": lambda p: p[:, :2], "nan": lambda p: p * np.nan}[wrong]

    def write(program: nn.Module, path: Path, _: dict[str, str]) -> export.Arrays:
        path.write_text("a program")
        return lambda images: change(program(torch.from_numpy(images)).detach().numpy())

    monkeypatch.setattr(export, "_write_torch", write)
    with pytest.raises(DataError, match="differs from the model"):
        export.export(tiny, tmp_path, format="torch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_glyphs_export_too_and_nothing_is_printed(
    tiny: Model, tmp_path: Path, format: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    path = export.export(tiny, tmp_path, format=format)
    assert path.name == export.FORMATS[format]
    assert capfd.readouterr().out == ""


def test_unknown_formats_and_missing_packages_say_what_to_do(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r'"onnx" or "torch"'):
        export.export(tiny, tmp_path, format="tflite")

    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(export.importlib, "import_module", absent)
    with pytest.raises(UsageError, match=re.escape('pip install "fewlabels[export]"')):
        export.export(tiny, tmp_path, format="onnx")


def test_a_full_disk_leaves_the_old_file(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.pt2").write_text("before")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(StorageError, match="disk is full"):
        export.export(tiny, tmp_path, format="torch")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == "before"


def test_a_file_that_cannot_grow_is_a_fault_of_the_disk(tiny: Model, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(StorageError, match="writing failed"):
            export.export(tiny, tmp_path, format="torch")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_a_model_too_large_for_one_file_is_refused_first(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "LARGEST_ONNX", 100)
    with pytest.raises(UsageError, match="2 GiB"):
        export.export(tiny, tmp_path, format="onnx")


def test_a_file_in_place_of_the_folder_is_named(tiny: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CannotCreate, match="file is a file"):
        export.export(tiny, tmp_path / "file", format="torch")
    assert (tmp_path / "file").read_text() == "precious"
