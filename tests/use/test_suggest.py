"""Which images to label next: the choice against a slow twin, who may never be chosen, and the CSV's way back."""

from __future__ import annotations

import csv
import io
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fewlabels as fl
from conftest import shapes_images
from fewlabels import cli
from fewlabels.data.labels import Dataset
from fewlabels.data.sources import open_source
from fewlabels.errors import DataError, MissingInput, UsageError
from fewlabels.use import artefact, suggest

TINY = {"pretrain": {"epochs": 1}, "finetune": {"epochs": 1}, "distill": {"epochs": 1}}


def blobs(sizes: list[int], *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, 8) of length 1 around one axis each, and which axis (N,)."""
    rng = np.random.default_rng(seed)
    axis = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.eye(8)[axis] + rng.normal(0, 0.1, (len(axis), 8))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), axis


def typical_twin(features: np.ndarray, labels: np.ndarray, cluster: np.ndarray, count: int) -> list[int]:
    """TypiClust as its paper's algorithm 1 says it, one image after the other, with every distance computed alone."""
    chosen: list[int] = []
    rounds = 0
    while len(chosen) < count:
        order = []
        for number in set(cluster.tolist()):
            inside = [i for i in range(len(labels)) if cluster[i] == number and labels[i] < 0]
            known = sum(cluster[i] == number and labels[i] >= 0 for i in range(len(labels)))
            order.append((len(inside) < 5, known, -len(inside), number, inside))
        for *_, inside in sorted(order):
            typicality = {}
            for i in inside:
                apart = sorted(float(np.linalg.norm(features[i] - features[j])) for j in inside if j != i)
                typicality[i] = 1 / np.mean(apart[: max(1, min(20, len(inside) // 2))])
            best = sorted(inside, key=lambda i: -typicality[i])
            if rounds < len(best) and len(chosen) < count:
                chosen.append(best[rounds])
        rounds += 1
    return chosen


def test_typical_images_are_those_of_the_slow_twin() -> None:
    features, axis = blobs([60, 40, 30, 20, 12, 7])
    labels = np.full(len(axis), -1)
    labels[[0, 1, 61]] = [0, 0, 1]
    cluster = suggest.clusters(features, 3 + 12)
    assert suggest.typical(features, labels, 12).tolist() == typical_twin(features, labels, cluster, 12)
    few = suggest.clusters(features, 3 + 2)  # fewer clusters than suggestions: a second round
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suggest, "MOST_CLUSTERS", 5)
        assert suggest.typical(features, labels, 20).tolist() == typical_twin(features, labels, few, 20)


def test_each_group_of_images_is_shown_once_before_any_twice() -> None:
    """Six clear groups, two of them with a label: the four others come first, the larger before the smaller."""
    features, axis = blobs([50, 40, 30, 20, 10, 8])
    labels = np.where((np.arange(len(axis)) == 3) | (np.arange(len(axis)) == 55), axis, -1)
    found = suggest.typical(features, labels, 4)
    assert axis[found].tolist() == [2, 3, 4, 5]


def test_a_typical_image_is_no_outlier() -> None:
    features, _ = blobs([100])
    features[7] = np.eye(8, dtype=np.float32)[5]
    ranks = np.argsort(suggest.mean_distances(features)).tolist()
    assert ranks[-1] == 7
    apart = np.linalg.norm(features[:, None] - features[None], axis=2)
    expected = np.sort(apart, axis=1)[:, 1:21].mean(axis=1)
    assert suggest.mean_distances(features) == pytest.approx(expected, abs=1e-3)


def test_unsure_images_lie_between_the_classes() -> None:
    """Two classes along a line; of 200 images only those near the middle are worth asking for."""
    angle = np.linspace(0, np.pi / 2, 200)
    features = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    labels = np.full(200, -1)
    labels[:50], labels[-50:] = 0, 1
    found = suggest.choose(features, labels, 4)
    assert (np.abs(angle[found] - np.pi / 4) < 0.35).all()
    assert np.ptp(angle[found]) > 0.1  # the four least sure ones lie within 0.024


@pytest.mark.parametrize("count", [1, 3, 40])
def test_identical_features_are_no_trouble(count: int) -> None:
    features = np.ones((30, 4), np.float32) / 2
    for labels in (np.full(30, -1), np.arange(30) - 1 < 0):  # none; a single class: nothing to be unsure of
        found = suggest.choose(features, np.where(labels, -1, 0), count)
        assert len(set(found)) == len(found) == min(count, (labels != 0).sum())


# --- on a run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 labeled, 48 without a label (two of them the same picture, one like a labeled one), 8 held out, odd names."""
    root = tmp_path_factory.mktemp("suggest") / "photos"
    images, classes = shapes_images(64, size=16, seed=5)
    images[21], images[30] = images[20], images[0]
    for i, (image, label) in enumerate(zip(images, classes, strict=True)):
        place = f"test/class{label}" if i >= 56 else (f"train/class{label}" if i < 8 else "train/unlabeled")
        (root / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / place / f"{i:02d}.png")
    Image.fromarray(images[40] // 2).save(root / "=1+1.png")
    return root


@pytest.fixture(scope="module")
def pretrained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> fl.Run:
    return fl.fit(photos, out=tmp_path_factory.mktemp("runs") / "run", recipe="smoke", until="pretrain", **TINY)


def answered(table: str) -> list[tuple[str, str, str]]:
    rows = list(csv.reader(io.StringIO(table)))
    assert rows[0] == ["image", "label", "split"]
    return [(image, label, split) for image, label, split in rows[1:]]


def test_a_name_that_begins_with_a_space_is_read_back(tmp_path: Path) -> None:
    """Beside another one that is called as it would be without."""
    for name in (" a.png", "a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    dataset: Any = SimpleNamespace(
        labels=np.array([0, 1, -1]), splits=np.zeros(3, np.int8), names=(" a.png", "a.png", "b.png"), classes=("x", "y")
    )
    table = tmp_path / "next.csv"
    table.write_text(suggest.Suggestions(dataset, [2], tested_apart=False).table())
    source = open_source(tmp_path, table)
    assert dict(zip(source.names, source.labels, strict=True)) == {" a.png": "x", "a.png": "y", "b.png": None}


@pytest.mark.parametrize("place", [".", "photos", "photos/photos", "elsewhere"])
def test_the_table_goes_back_to_the_right_pictures_of_a_nest(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """photos/photos/, a zip unpacked twice: photos/0.png beside photos/ was read as another picture's name."""
    images, _ = shapes_images(8, size=16)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "photos" / "photos").mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / ("photos/photos" if i % 2 else "photos") / f"{i // 2}.png")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pretrain", "photos", "--out", "run", "--recipe", "smoke", "--pretrain.epochs", "1"]) == 0
    out = Path(place) / "next.csv"
    assert cli.main(["suggest", "run", "-n", "8", "--out", str(out)]) == 0
    rows = answered(out.read_text(encoding="utf-8-sig"))
    names = fl.Run(Path("run")).suggest(8)
    assert len(rows) == 8
    given = {name: f"class{i % 2}" for i, name in enumerate(names)}
    filled = [f"{row[0]},{given[name]},train\n" for row, name in zip(rows, names, strict=True)]
    out.write_text("image,label,split\n" + "".join(filled))
    source = open_source("photos", str(out))
    assert dict(zip(source.names, source.labels, strict=True)) == given
    apart = {".": 4, "photos": 0, "photos/photos": 4, "elsewhere": 0}  # names with two readings, of 8
    assert sum(Path(row[0]).is_absolute() for row in rows) == apart[place]


def test_a_run_that_only_pretrained_suggests(pretrained: fl.Run, photos: Path) -> None:
    found = pretrained.suggest(60)
    assert found == pretrained.suggest(60), "the same run gave another answer"
    assert found[:5] == pretrained.suggest(60)[:5]
    assert len(found) == len(set(found)) == 47  # 49 without a label, less one of two twins and the labeled one's
    assert all(name == "=1+1.png" or name.startswith("train/unlabeled/") for name in found)
    assert "train/unlabeled/30.png" not in found
    assert len({"train/unlabeled/20.png", "train/unlabeled/21.png"} & set(found)) == 1


def test_the_table_filled_in_goes_back_with_nothing_lost(
    pretrained: fl.Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A person answers all suggestions: the run's own labels, its held-out images and the odd name are still there."""
    out = tmp_path / "next.csv"
    assert cli.main(["suggest", str(pretrained.path), "-n", "47", "--out", str(out)]) == 0
    assert "47 images to label" in capsys.readouterr().out
    assert out.read_bytes().startswith(b"\xef\xbb\xbf"), "Excel would read umlauts as Windows-1252"
    rows = answered(out.read_text(encoding="utf-8-sig"))
    assert [label for _, label, _ in rows[:47]] == [""] * 47
    assert len(rows) == 47 + 8 + 8
    truth = [(image, label or f"class{i % 4}", split) for i, (image, label, split) in enumerate(rows)]
    out.write_text("image,label,split\n" + "".join(",".join(row) + "\n" for row in truth))
    capsys.readouterr()
    assert (
        cli.main(["check", str(photos), "--labels", str(out), "--out", str(tmp_path / "r"), "--recipe", "smoke"]) == 0
    )
    assert "57 images, 55 labeled in 4 classes, 2 duplicates, 8 held-out test images" in capsys.readouterr().out
    assert cli.main(["suggest", str(pretrained.path), "--out", str(out)]) == 73
    assert "is there already" in capsys.readouterr().err


def test_the_names_as_json_and_on_stdout(pretrained: fl.Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["suggest", str(pretrained.path), "-n", "3", "--json"]) == 0
    named = json.loads(capsys.readouterr().out)["images"]
    assert named == pretrained.suggest(3)
    assert cli.main(["suggest", str(pretrained.path), "-n", "3"]) == 0
    assert [row[0] for row in answered(capsys.readouterr().out)[:3]] == [
        f"./{name}" if name.startswith("=") else name for name in named
    ]


def test_a_finished_run_of_arrays_suggests_until_all_is_labeled(tmp_path: Path) -> None:
    images, classes = shapes_images(40, size=16)
    names = [f"class{label}" if i < 36 else "" for i, label in enumerate(classes)]
    run = fl.fit(images, names, test=(images[:8] // 2, names[:8]), out=tmp_path / "run", recipe="smoke", **TINY)
    assert sorted(run.suggest()) == [f"image-{i:06d}" for i in range(36, 40)]
    full = fl.fit(
        images, [f"class{label}" for label in classes], out=tmp_path / "full", recipe="smoke", until="pretrain", **TINY
    )
    with pytest.raises(DataError, match="every training image"):
        full.suggest()


def test_test_images_from_python_are_not_in_the_table(photos: Path, tmp_path: Path) -> None:
    """They have names that no image of the folder has, and the table was refused."""
    images, classes = shapes_images(6, size=16)
    test = (images, [f"class{label}" for label in classes])
    run = fl.fit(photos, test=test, out=tmp_path / "run", recipe="smoke", until="pretrain", **TINY)
    table = suggest.suggest(run.path, 2).table()
    assert [split for _, _, split in answered(table)] == ["train"] * (2 + 8)
    (tmp_path / "next.csv").write_text(table)
    assert len(open_source(photos, tmp_path / "next.csv", test=test)) == 57 + 8 + 6


def test_a_run_that_was_interrupted_says_how_to_suggest(pretrained: fl.Run, tmp_path: Path) -> None:
    """Pretraining is done, but a model is written at the end of a command."""
    run = shutil.copytree(pretrained.path, tmp_path / "run")
    shutil.rmtree(run / "model")
    (run / "results.json").unlink()
    with pytest.raises(MissingInput, match="no model yet") as refused:
        suggest.suggest(run, 5)
    *_, command, _ = refused.value.fix.split("`")
    assert cli.main(shlex.split(command)[1:]) == 0
    assert fl.Run(run).suggest(5) == pretrained.suggest(5)


def test_what_is_no_run_is_refused(pretrained: fl.Run, tmp_path: Path) -> None:
    for place in (tmp_path / "none", tmp_path, artefact.place(pretrained.path)):
        with pytest.raises(MissingInput):
            suggest.suggest(place, 5)
    with pytest.raises(UsageError):
        pretrained.suggest(0)


def test_only_some_of_many_images_are_looked_at(monkeypatch: pytest.MonkeyPatch, pretrained: fl.Run) -> None:
    dataset, _ = suggest.open_run(pretrained.path)
    assert isinstance(dataset, Dataset)
    everything = suggest.candidates(dataset)
    monkeypatch.setattr(suggest, "MOST_IMAGES", 12)
    known, pool = suggest.candidates(dataset)
    assert (len(known), len(pool)) == (6, 6)
    assert set(known) <= set(everything[0])
    assert set(pool) <= set(everything[1])
