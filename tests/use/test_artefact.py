"""The model folder: what is written is read back exactly; what is damaged, newer or foreign is refused in words."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import same
from fewlabels import checkpoint
from fewlabels.errors import DataError, FewlabelsError, MissingInput
from fewlabels.model.heads import Classifier
from fewlabels.use import artefact
from small_model import METRICS, small_card, small_network


@pytest.fixture(scope="module")
def network() -> Classifier:
    return small_network()


@pytest.fixture(scope="module")
def written(network: Classifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    training = {"recipe": "digits", "images": 1200, "labels": 20}
    return artefact.save(
        tmp_path_factory.mktemp("run") / "model", network, small_card(metrics=METRICS, training=training)
    )


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def test_a_pipe_in_place_of_a_description_is_not_waited_for(folder: Path) -> None:
    (folder / artefact.DESCRIPTION).unlink()
    os.mkfifo(folder / artefact.DESCRIPTION)
    with pytest.raises(DataError, match="not a plain file"):
        artefact.read_card(folder)


def test_written_is_read_back_exactly(written: Path, network: Classifier) -> None:
    found, card = artefact.read(written)
    assert same(found.state_dict(), network.state_dict())
    assert card == small_card(metrics=METRICS, training={"recipe": "digits", "images": 1200, "labels": 20})
    assert not found.training
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(found(images), network(images))
    assert sorted(p.name for p in written.iterdir()) == [
        "README.md",
        "manifest.json",
        "model.json",
        "weights.safetensors",
    ]


def test_whoever_may_read_the_folder_may_read_the_weights(written: Path) -> None:
    assert (written / "weights.safetensors").stat().st_mode & 0o777 == (written / "model.json").stat().st_mode & 0o777


def test_reading_leaves_the_random_numbers_alone(written: Path) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    artefact.read(written)
    assert torch.equal(torch.rand(4), wanted)


@pytest.mark.parametrize("tap", [0, 3])
def test_every_tap_comes_back(tmp_path: Path, tap: int) -> None:
    network = small_network(tap=tap)
    found, card = artefact.read(artefact.save(tmp_path / "model", network, small_card(tap=tap)))
    assert card.tap == tap
    assert same(found.state_dict(), network.state_dict())


def test_timm_encoders_come_back(tmp_path: Path) -> None:
    name = "timm:test_resnet"
    network = small_network(tap=0, name=name)
    found, _ = artefact.read(artefact.save(tmp_path / "model", network, small_card(tap=0, encoder=name)))
    assert same(found.state_dict(), network.state_dict())


def test_saving_replaces_whole_folders_only(folder: Path, network: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "weights.safetensors").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(FewlabelsError, match="disk is full"):
        artefact.save(folder, network, small_card())
    assert (folder / "weights.safetensors").read_bytes() == before
    artefact.read(folder)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


# --- damage ---


def test_every_flipped_bit_is_noticed(folder: Path) -> None:
    for name in ("weights.safetensors", "model.json", "README.md"):
        path = folder / name
        whole = path.read_bytes()
        for place in (0, 9, len(whole) // 3, len(whole) // 2, len(whole) - 1):
            damaged = bytearray(whole)
            damaged[place] ^= 16
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=name):
                artefact.read(folder)
        path.write_bytes(whole)
    artefact.read(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "model.json", "manifest.json"])
def test_truncated_and_missing_files_are_named(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=name) as refusal:
        artefact.read(folder)
    assert "why:" in str(refusal.value) and "fix:" in str(refusal.value)
    (folder / name).unlink()
    with pytest.raises(MissingInput, match=name):
        artefact.read(folder)


def test_a_manifest_that_lists_nothing_vouches_for_nothing(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format_version": 1, "files": {}}')
    with pytest.raises(DataError, match="does not vouch"):
        artefact.read(folder)


def _reseal(folder: Path) -> None:
    """A manifest that fits: what somebody who means harm, or another program, would write."""
    (folder / "manifest.json").unlink()
    checkpoint.write_manifest(folder)


def _describe(folder: Path, **changes: Any) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    _reseal(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format_version": 2}, "file format 2, this fewlabels .* reads up to 1"),
        ({"format_version": "new"}, "file format 'new', which never was"),
        ({"encoder": "resnet19"}, "cannot be built"),
        ({"encoder": "timm:nothing"}, "cannot be built"),
        ({"encoder": "timm:hf-hub:evil/model"}, "cannot be built"),
        ({"encoder": "resnet18"}, "does not fit"),
        ({"encoder": "resnet200_4096x"}, "does not fit"),  # on the meta device: no memory is taken
        ({"encoder": 7}, "encoder is 7"),
        ({"tap": 2}, "does not fit"),
        ({"tap": -1}, "tap is -1"),
        ({"tap": True}, "tap is True"),
        ({"size": 10**9}, "size is 1000000000"),
        ({"size": "16"}, "size is '16'"),
        ({"kind": "nonsense"}, "kind"),
        ({"metrics": 3}, "tables of facts"),
        ({"balanced": 1}, "balanced is 1"),
        ({"labels_a_class": [5, 5]}, "labels_a_class is"),
        ({"labels_a_class": [5, 5, 5, -1]}, "labels_a_class is"),
        ({"labels_a_class": [5, 5, 5, True]}, "labels_a_class is"),
        ({"labels_a_class": 5}, "cannot be used"),
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"classes": ["a", "b", "c"], "num_classes": 3}, "does not fit"),
        ({"classes": ["a", "b", "c"]}, "num_classes is 4"),
        ({"classes": ["a", "a", "b", "c"]}, "same name"),
        ({"classes": [1, 2, 3, 4]}, "list of names"),
        ({"classes": 5}, "cannot be used"),
        ({"classes": [[], [], [], []]}, "list of names"),
        ({"kind": []}, "cannot be used"),
        ({"temperature": 10**400}, "cannot be used"),
        ({"encoder": f"resnet{'9' * 5000}"}, "cannot be built"),
        ({"encoder": "timm:resnet18.hf-hub:evil/model"}, "cannot be built"),
    ],
)
def test_descriptions_that_cannot_be_are_refused(folder: Path, changes: dict[str, Any], says: str) -> None:
    _describe(folder, **changes)
    with pytest.raises(DataError, match=says):
        artefact.read(folder)


def test_unknown_facts_of_the_same_version_are_ignored(folder: Path) -> None:
    _describe(folder, colour="blue")
    artefact.read(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "7"])
def test_a_description_that_is_no_description(folder: Path, text: str) -> None:
    (folder / "model.json").write_text(text)
    _reseal(folder)
    with pytest.raises(DataError, match="not the description"):
        artefact.read(folder)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["linear.bias"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["extra"] = torch.zeros(1)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["linear.bias"] = torch.zeros(9)


def _retype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["linear.bias"] = tensors["linear.bias"].double()


def _spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors["linear.bias"][1] = float("nan")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_drop, "linear.bias is missing"),
        (_add, "extra is not part"),
        (_reshape, r"\(9,\)"),
        (_retype, "float64"),
        (_spoil, "not finite"),
    ],
)
def test_weights_of_another_network_are_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], says: str
) -> None:
    tensors = load_file(folder / "weights.safetensors")
    change(tensors)
    save_file(tensors, folder / "weights.safetensors")
    _reseal(folder)
    with pytest.raises(DataError, match=says):
        artefact.read(folder)


def test_a_pickle_is_not_opened(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (canary,))

    torch.save({"linear.bias": Payload()}, folder / "weights.safetensors")
    _reseal(folder)
    with pytest.raises(DataError, match=r"weights\.safetensors cannot be used"):
        artefact.read(folder)
    assert not canary.exists()


def test_a_header_of_absurd_length_is_refused(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    _reseal(folder)
    with pytest.raises(DataError, match="cannot be used"):
        artefact.read(folder)


# --- the card ---


def test_the_model_card_says_what_was_measured(written: Path) -> None:
    text = (written / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: fewlabels\n")
    assert "accuracy 90.0%, 95 % interval 85.0% to 93.0%, on 200 held-out images" in text
    assert "labels: 20" in text and "images: 1200" in text
    assert checkpoint.file_digest(written / "weights.safetensors") in text


def test_the_model_card_is_honest_without_measurements_and_safe_with_names() -> None:
    card = small_card(classes=("<script>alert(1)</script>", "a`b", "x\n---\ny", "[z](javascript:1)"))
    text = artefact.model_card(card, parameters=1, digest="0")
    assert "Not measured" in text
    assert "<script" not in text and "](" not in text
    assert text.count("\n---\n") == 1
