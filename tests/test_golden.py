"""What an older fewlabels wrote opens and says the same, what a newer one wrote is refused, losses do not drift.

tests/golden/make.py made the files, and says when to make them again.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewlabels as fl
from fewlabels import checkpoint, runfolder
from fewlabels.data import pixels, views
from fewlabels.errors import DataError
from fewlabels.use import export
from golden import make

ARCHIVES = sorted(make.HERE.glob("run-format-*.zip"))
# Of a probability. The CSV has 6 digits; another CPU, or another torch, sums in another order
CLOSE = 1e-4
# Of a loss. Threads 1 against 2, numba's views against plain ones, torch's AVX-512 against none: at most 1.9e-5, in the
# 16th step of pretraining; 3e-6 of it are the six digits that are logged. One change of 1 % moves a curve by 6e-4
# (temperature of distillation) to 6e-3 (strength of colours), and is seen.
DRIFT = 1e-4


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.stem)
def desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures, drawn anew, and beside them what the archive holds: run, half, predictions.csv, evaluation.json."""
    folder: Path = tmp_path_factory.mktemp("desk")
    make.draw(folder / "pictures")
    with zipfile.ZipFile(request.param) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def copy(desk: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(desk, tmp_path / "desk"))


def table(path: Path) -> tuple[list[str], np.ndarray]:
    """Names and labels, and the probabilities (N, K), of predictions.csv."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    numbers = [[float(value) for name, value in row.items() if name.startswith("p:")] for row in rows]
    return [f"{row['image']} {row['label']}" for row in rows], np.array(numbers)


def contents(path: Path) -> Any:
    return json.loads(path.read_text())


def test_every_format_has_an_archive_that_is_small() -> None:
    assert [path.name for path in ARCHIVES] == [f"run-format-{n + 1}.zip" for n in range(checkpoint.FORMAT_VERSION)]
    assert all(path.stat().st_size < 200_000 for path in ARCHIVES)


def test_the_pictures_are_those_it_was_made_with(desk: Path) -> None:
    """Otherwise the rest shows nothing. And a store of that format opens."""
    store = pixels.open_store(desk / "run" / "data")
    assert len(store) == make.TRAIN + make.TEST
    canvases, extents = store.read(np.arange(len(store)))
    drawn = {make.picture(number).tobytes() for number in range(len(store))}
    kept = (c[:, :h, :w].permute(1, 2, 0).numpy() for c, (h, w) in zip(canvases, extents.tolist(), strict=True))
    assert {np.ascontiguousarray(picture).tobytes() for picture in kept} == drawn


def test_its_model_predicts_what_it_did(desk: Path, tmp_path: Path) -> None:
    names, known = table(desk / "predictions.csv")
    assert np.ptp(known, axis=0).min() > 0.2  # a model that says the same of all pictures would show nothing
    assert fl.load(desk / "run").predict_proba(desk / "pictures") == pytest.approx(known, abs=CLOSE)
    assert make.run("predict", str(desk / "run"), str(desk / "pictures"), "--out", str(tmp_path / "now.csv")) == 0
    again, found = table(tmp_path / "now.csv")
    assert again == names
    assert found == pytest.approx(known, abs=CLOSE)


def test_evaluate_measures_what_it_did(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make.run("evaluate", str(desk / "run"), str(desk / "pictures" / "test"), "--json") == 0
    found, known = json.loads(capsys.readouterr().out), contents(desk / "evaluation.json")
    assert (found["n"], found["top1"], found["confusion"]) == (known["n"], known["top1"], known["confusion"])
    assert (found["ece"], found["nll"]) == pytest.approx((known["ece"], known["nll"]), abs=CLOSE)


def test_report_suggest_and_export_work_from_it(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, names = copy / "run", table(copy / "predictions.csv")[0]
    assert make.run("report", str(run)) == 0
    accuracy = contents(run / "results.json")["rows"][-1]["accuracy"]
    assert f"{100 * accuracy:.1f}" in (run / "report.html").read_text()
    capsys.readouterr()
    assert make.run("suggest", str(run), "-n", "3", "--json") == 0
    suggested = json.loads(capsys.readouterr().out)["images"]
    assert len(suggested) == 3 and all(name.startswith("train/unlabeled/") for name in suggested)
    program = torch.export.load(export.export(fl.load(run), copy, format="torch")).module()
    pictures = [make.picture(int(re.findall(r"(\d+)\.png", name)[0])) for name in names]
    found = [program(torch.from_numpy(picture).permute(2, 0, 1)[None])[0].tolist() for picture in pictures]
    assert np.array(found) == pytest.approx(table(copy / "predictions.csv")[1], abs=CLOSE)


def test_the_same_command_says_that_it_is_done(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = {path: path.read_bytes() for path in (copy / "run").glob("*/step-*/*")}
    weights = (copy / "run" / "model" / "weights.safetensors").read_bytes()
    assert len(saved) == 4 * 3
    assert fit(copy, "run") == 0
    told = capsys.readouterr()
    assert f"report: {copy / 'run' / 'report.html'}" in told.out
    assert "cheap baseline" in told.out.splitlines()[-2]  # who wins, also where the model does not
    assert not re.search(r"^(pretrain|finetune|distill|supervised)", told.err, re.MULTILINE)  # no stage went on
    assert {path: path.read_bytes() for path in (copy / "run").glob("*/step-*/*")} == saved
    assert (copy / "run" / "model" / "weights.safetensors").read_bytes() == weights


def fit(desk: Path, out: str, *words: str) -> int:
    """The command that made the archive, on this desk."""
    command = [str(desk / "pictures") if word == "pictures" else word for word in make.COMMAND]
    return make.run(*command, "--out", str(desk / out), *words)


def test_the_half_done_run_goes_on_to_the_same_end(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert contents(copy / "half" / "status.json")["state"] == "stopped"
    assert fit(copy, "half") == 0
    assert f"pretrain: going on from step {make.STOP} of" in capsys.readouterr().err
    assert contents(copy / "half" / "status.json")["state"] == "finished"
    found, known = (runfolder.metrics(copy / name) for name in ("half", "run"))
    assert [(line["stage"], line["step"]) for line in found] == [(line["stage"], line["step"]) for line in known]
    for now, before in zip(found, known, strict=True):
        assert now.get("loss", 0) == pytest.approx(before.get("loss", 0), rel=DRIFT), (now["stage"], now["step"])


def test_another_run_begins_with_its_model(copy: Path) -> None:
    words = ["fit", str(copy / "pictures"), "--out", str(copy / "next"), "--recipe", "smoke", "--device", "cpu"]
    assert make.run(*words, "--pretrained", str(copy / "run"), "--finetune.start", "probe") == 0
    taken, _ = checkpoint.latest(copy / "next" / "finetune")
    assert taken is not None
    card = contents(copy / "next" / "model" / "model.json")
    assert (card["encoder"], card["classes"]) == (make.ENCODER, list(make.CLASSES))


# --- newer files -------------------------------------------------------------------------------------------------


def renew(path: Path) -> None:
    """The file as the next format's fewlabels would write it, under a manifest that fits."""
    newer = checkpoint.FORMAT_VERSION + 1
    if path.name == "manifest.json":
        path.unlink()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "FORMAT_VERSION", newer)
            checkpoint.write_manifest(path.parent)
        return
    path.write_text(json.dumps(contents(path) | {"format_version": newer}))
    if (path.parent / "manifest.json").exists():
        (path.parent / "manifest.json").unlink()
        checkpoint.write_manifest(path.parent)


REFUSED = [
    ("run/model/manifest.json", ["predict", "RUN", "PICTURES"]),
    ("run/model/model.json", ["evaluate", "RUN", "PICTURES"]),
    ("run/resolved.json", ["fit", "PICTURES", "--out", "RUN"]),
    ("run/resolved.json", ["suggest", "RUN"]),
    ("run/resolved.json", ["report", "RUN"]),
    ("run/results.json", ["report", "RUN"]),
    ("run/data/index.json", ["suggest", "RUN"]),
    ("half/pretrain/step-*/manifest.json", [*make.COMMAND, "--out", "RUN"]),
]


@pytest.mark.parametrize(("name", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else value[0])
def test_what_a_newer_one_wrote_is_refused_in_words(
    copy: Path, name: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = copy.glob(name)
    renew(path)
    run = copy / name.split("/")[0]
    kept = {file: file.read_bytes() for file in [*run.glob("*/step-*/*"), *run.glob("model/*")]}
    places = {"RUN": str(run), "PICTURES": str(copy / "pictures"), "pictures": str(copy / "pictures")}
    assert make.run(*(places.get(word, word) for word in words)) == DataError.exit_code
    told = capsys.readouterr().err
    assert f"{path} is in file format {checkpoint.FORMAT_VERSION + 1}" in told
    assert "why: a newer fewlabels wrote it\nfix: pip install --upgrade" in told
    assert {file: file.read_bytes() for file in [*run.glob("*/step-*/*"), *run.glob("model/*")]} == kept


# --- the curves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plain", "threads"), [(False, 1), (True, 2)])
def test_losses_do_not_drift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool, threads: int) -> None:
    monkeypatch.setattr(views, "PLAIN", plain)
    known, before = contents(make.HERE / "curves.json"), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = make.curves(tmp_path)
    finally:
        torch.set_num_threads(before)
    moved = [
        f"{stage} step {step + 1}: {now:.6g}, was {then:.6g}"
        for stage in make.STAGES
        for step, (now, then) in enumerate(zip(found[stage], known["losses"][stage], strict=True))
        if not abs(now - then) <= DRIFT * then
    ]
    assert not moved, (
        f"{len(moved)} losses moved: {'; '.join(moved[:3])} (computed by {known['versions']}). If training was "
        "meant to change, say why in CHANGELOG.md and run `python tests/golden/make.py curves`. If not, the first "
        "tells where: step 1 is views, initial weights and the network, step 2 is gradients and the optimizer"
    )
