"""Some of the hostile files of tests/faults/payloads.py, opened in this process; there all of them are, and watched."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import shapes_images
from faults import planted_data, planted_models, runs  # noqa: F401 - the planted ones fill the list
from faults.planting import PAYLOADS, Payload, Place
from fewlabels import cli
from fewlabels.use import artefact
from small_model import small_card, small_network

CHOSEN = (
    "weights that are: a torch.save file", "weights that are: a header of 2^63 bytes", "weights of another program",
    "weights that are: tensors on the same bytes", "weights that are a link", "a description that: is nested",
    "a description that: names timm:hf-hub:", "a description with keys", "a description with templates",
    "a manifest that lists: ../", "a model to begin with", "images.npz: with a pickle for labels",
    "images.npz: with code in a header", "images.npz: with terabytes", "images.npy: with a pickle", "images.parquet:",
    "a labels CSV that names: an address", "pictures that are programs", "a recipe that: is YAML",
    "a published checkpoint",
)  # fmt: skip
OPENED = [one for one in PAYLOADS if one.words.startswith(CHOSEN)]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    runs.make_images(folder)
    artefact.save(folder / "model", small_network(), small_card())
    return folder


@pytest.mark.parametrize("one", OPENED, ids=[one.words for one in OPENED])
def test_a_hostile_file_runs_nothing_and_is_refused_in_words(
    one: Payload, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = Place(tmp_path / "here", tmp_path / "outside", good)
    for folder in (place.here, place.outside):
        folder.mkdir()
    (place.outside / "secret.png").write_bytes(shapes_images(1)[0].tobytes())
    monkeypatch.chdir(place.here)
    code = cli.main(one.plant(place))
    told = capfd.readouterr().err
    assert code == one.code, told
    assert "Traceback" not in told
    if code:
        assert one.says in told and told.count("\nerror: ") == 1 and "\nfix: " in told
    assert not place.canary.exists() and not (place.here / "canary").exists()
