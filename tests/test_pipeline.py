"""The whole: one command from images to a model, resumed wherever it was broken, on one process and on two."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fewlabels as fl
from conftest import same, shapes_images
from fewlabels import asked, checkpoint, config, identity, pipeline, plan, prepare, recipes, runtime
from fewlabels.asked import Asked
from fewlabels.data import pixels, views
from fewlabels.data.loader import Batch
from fewlabels.data.sources import open_source
from fewlabels.errors import CannotCreate, DataError, Diverged, MissingInput, RunAgain, Stopped, UsageError
from fewlabels.prepared import Prepared
from fewlabels.runfolder import Interrupts, RunFolder
from fewlabels.stages import loop
from fewlabels.stages.finetune import Finetune
from fewlabels.use import artefact, propagate
from fewlabels.use.learned import open_run
from fewlabels.worker import STREAMS, Worker

SMALL = {
    "pretrain": {"epochs": 4, "optimizer": "adamw", "learning_rate": 0.002, "scaling": "none"},
    "finetune": {"epochs": 20, "optimizer": "adamw", "learning_rate": 0.002, "scaling": "none"},
    "distill": {"epochs": 8, "optimizer": "adamw", "learning_rate": 0.002, "scaling": "none"},
}
STAGES = ("pretrain", "finetune", "distill", "supervised")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A practitioner's folder: train/unlabeled, a few in class folders, test/ with labels, one broken file."""
    root = tmp_path_factory.mktemp("photos")
    images, classes = shapes_images(160, size=20, seed=3)
    for i, (image, label) in enumerate(zip(images, classes, strict=True)):
        place = f"test/class{label}" if i >= 120 else (f"train/class{label}" if i < 16 else "train/unlabeled")
        (root / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / place / f"{i:03d}.png")
    (root / "train" / "unlabeled" / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    return root


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> fl.Run:
    return fl.fit(photos, out=tmp_path_factory.mktemp("runs") / "whole", recipe="smoke", **SMALL)


def final_weights(run: Path, stages: Sequence[str] = STAGES) -> dict[str, object]:
    found = {}
    for stage in stages:
        saved, _ = checkpoint.latest(run / stage)
        assert saved is not None, stage
        found |= {f"{stage}.{name}": tensor for name, tensor in saved.tensors.items()}
    return found


def test_a_streamed_run_learns_the_same_and_stops_at_a_changed_picture(
    photos: Path, run: fl.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, out = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(photos, copy)
    asked = {"out": out, "recipe": "smoke", "store": "streamed", "until": "finetune", **SMALL}
    picture = copy / "train" / "unlabeled" / "050.png"
    raw, read = picture.read_bytes(), pixels.OnDemand.fill

    def fill(self: pixels.OnDemand, canvas: np.ndarray, rows: list[int]) -> None:
        if any(out.glob("pretrain/step-*")):
            picture.write_bytes(b"")
        read(self, canvas, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels.OnDemand, "fill", fill)
        with pytest.raises(DataError, match=r"050\.png cannot be read any more: empty"):
            fl.fit(copy, **asked)
    assert "decoded anew each time" in capsys.readouterr().err
    assert json.loads((out / "status.json").read_text())["state"] == "failed"
    stopped = checkpoint.glance(out / "pretrain")
    assert stopped is not None and stopped["step"] > 0
    picture.write_bytes(raw)
    fl.fit(copy.rename(tmp_path / "elsewhere"), **asked)
    assert not (out / "data" / "pixels.u8").exists()
    assert set(json.loads((out / "status.json").read_text())["waited"]) == {"pretrain", "finetune", "supervised"}
    for stage in ("pretrain", "finetune"):
        (ours, _), (theirs, _) = checkpoint.latest(out / stage), checkpoint.latest(run.path / stage)
        assert ours is not None and theirs is not None
        assert same(ours.tensors, theirs.tensors), stage


def test_the_run_folder_holds_everything(run: fl.Run) -> None:
    for name in ("recipe.toml", "resolved.json", "status.json", "metrics.jsonl", "results.json", "report.html",
                 "bad_images.csv", "evaluation.npz", "model/weights.safetensors", "model/README.md"):  # fmt: skip
        assert (run.path / name).is_file(), name
    status = json.loads((run.path / "status.json").read_text())
    assert status["state"] == "finished"
    assert set(status["seconds"]) == set(STAGES)
    with (run.path / "bad_images.csv").open() as file:
        rows = list(csv.reader(file))
    assert len(rows) == 2
    assert "broken.jpg" in rows[1][0]
    understood = json.loads((run.path / "resolved.json").read_text())["understood"]
    assert (understood["train"], understood["labeled"], understood["test"], understood["unreadable"]) == (
        120,
        16,
        40,
        1,
    )
    assert run.model.card.labels_a_class == (4, 4, 4, 4)


def test_it_learns_and_the_table_is_whole(run: fl.Run) -> None:
    rows = {row["key"]: row for row in run.metrics["rows"]}
    assert set(rows) == {
        *("most_frequent", "pixels_logistic", "supervised", "finetune", "distill"),
        *(f"tap{k}_logistic" for k in range(4)),
    }
    assert rows["most_frequent"]["accuracy"] == pytest.approx(0.25)
    assert rows["distill"]["accuracy"] >= 0.45, "18 of 40 by chance: 1 in 200"
    assert rows["distill"]["n"] == 40
    assert rows["distill"]["parameters"] > 100_000
    assert run.metrics["measurement"]["top1"]["accuracy"] == rows["distill"]["accuracy"]
    assert run.metrics["tap"] == 1, "as the paper's recipe, and the verdict where nothing is held out"


def test_pretraining_sees_the_views_that_its_recipe_asks_for(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, make = set(), views.pretrain

    def noted(*images: Any, **settings: Any) -> Any:
        seen.add((settings["view"], settings["smallest_crop"], settings["size"]))
        return make(*images, **settings)

    monkeypatch.setattr(views, "pretrain", noted)
    for momentum in (0.0, 0.9):
        seen.clear()
        asked = {"epochs": 1, "views": 3, "smallest_crop": 0.4, "momentum": momentum}
        fl.fit(photos, out=tmp_path / str(momentum), recipe="smoke", until="pretrain", resolution=0.75, pretrain=asked)
        assert seen == {(0, 0.4, 12), (1, 0.4, 12), (2, 0.4, 12)}


def test_and_so_do_fine_tuning_and_distillation(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, make = [], views.finetune

    def noted(*images: Any, **settings: Any) -> Any:
        seen.append((settings["seed"] >> 32, settings["smallest_crop"], settings["size"]))
        return make(*images, **settings)

    monkeypatch.setattr(views, "finetune", noted)
    wishes = {"finetune": {"epochs": 1, "smallest_crop": 0.6}, "pretrain": {"epochs": 1}, "distill": {"epochs": 1}}
    fl.fit(photos, out=tmp_path / "run", recipe="smoke", resolution=0.75, **wishes)
    streams = {STREAMS[stage] for stage in ("finetune", "distill", "supervised")}
    assert set(seen) == {(stream, 0.6, 16) for stream in streams}


def test_the_artefact_predicts_what_was_measured(run: fl.Run, photos: Path) -> None:
    folders = sorted((photos / "test").iterdir())
    paths = [path for folder in folders for path in sorted(folder.iterdir())]
    predicted = run.model.predict(paths)
    accuracy = np.mean([path.parent.name == name for path, name in zip(paths, predicted, strict=True)])
    # The table is computed in the training number format, the artefact in float32
    assert accuracy == pytest.approx(run.metrics["measurement"]["top1"]["accuracy"], abs=0.026)
    assert run.model.predict_proba(paths).sum(axis=1) == pytest.approx(np.ones(len(paths)), abs=1e-5)


def test_the_same_command_again_changes_nothing(run: fl.Run, photos: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("step-*/*")}
    metrics = (run.path / "metrics.jsonl").read_bytes()
    fl.fit(photos, out=run.path, recipe="smoke", **SMALL)
    assert {p: p.stat().st_mtime_ns for p in run.path.rglob("step-*/*")} == before
    assert (run.path / "metrics.jsonl").read_bytes() == metrics


def test_and_so_on_another_number_of_processes(run: fl.Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose batches would be others, and so the steps; here multiples of 5."""
    before = {p: p.stat().st_mtime_ns for p in run.path.rglob("step-*/*")}
    fitted = plan.fitted_batch
    monkeypatch.setattr(plan, "fitted_batch", lambda batch, images, ranks: fitted(batch, images, 5 * ranks))
    fl.fit(photos, out=run.path, recipe="smoke", **SMALL)
    assert {p: p.stat().st_mtime_ns for p in run.path.rglob("step-*/*")} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pretrain": SMALL["pretrain"] | {"epochs": 5}}, "pretrain.epochs"),
        ({"seed": 1}, "seed"),
        ({"encoder": "resnet18_0.25x_small"}, "encoder"),
        ({"resolution": 0.5}, "resolution"),
        ({"finetune": SMALL["finetune"] | {"tap": 2}}, "finetune.tap"),
        ({"keep_labels": 8}, "labels"),
    ],
)
def test_another_run_is_refused_and_unharmed(run: fl.Run, photos: Path, change: dict[str, object], named: str) -> None:
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file() and "step-" in str(p)}
    resolved, status = ((run.path / name).read_bytes() for name in ("resolved.json", "status.json"))
    with pytest.raises(CannotCreate) as raised:
        fl.fit(photos, out=run.path, recipe="smoke", **(SMALL | change))
    assert named in raised.value.text()
    assert "new --out" in raised.value.fix
    assert {p: p.read_bytes() for p in before} == before
    assert (run.path / "resolved.json").read_bytes() == resolved
    assert (run.path / "status.json").read_bytes() == status, "what is refused is no failure of the run"


@pytest.mark.parametrize(("before", "after"), [("finished", "finished"), ("failed", "failed"), ("running", "stopped")])
def test_a_signal_before_anything_is_done_leaves_the_state(
    before: str, after: str, run: fl.Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But that of a process that was killed: it says that it runs."""
    shutil.copytree(run.path, tmp_path / "run")
    RunFolder(tmp_path / "run").status(before, reason="known")
    monkeypatch.setattr(pipeline, "prepare", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    for out, state in ((tmp_path / "run", after), (tmp_path / "new", "stopped")):
        with pytest.raises(Stopped):
            fl.fit(photos, out=out, recipe="smoke", **SMALL)
        status = json.loads((out / "status.json").read_text())
        assert (status["state"], status["reason"] == "known") == (state, state in ("finished", "failed"))


def test_a_refusal_counts_images_and_labels(photos: Path, run: fl.Run, tmp_path: Path) -> None:
    """It showed their hashes, and for other images no way on."""
    images, classes = shapes_images(40, size=16)
    asked: dict[str, Any] = {**SMALL, "out": tmp_path / "run", "recipe": "smoke", "until": "finetune"}
    known = np.where(np.arange(40) < 8, classes, -1)
    fl.fit(images, known, **asked)
    more, other = known.copy(), known.copy()
    more[8:12], other[:4] = classes[8:12], -1
    other[8:12] = classes[8:12]
    refused = {
        "labels: 8 there, 12 now": (images, more), "labels: 8 there, 8 others now": (images, other),
        "images: 40 to train on there, 36 now": (images[:36], known[:36]),
        "images: 40 to train on there, 40 others now": (images[::-1], known[::-1]),
    }  # fmt: skip
    for words, given in refused.items():
        with pytest.raises(CannotCreate) as raised:
            fl.fit(*given, **asked)
        assert raised.value.details == (words,)
        assert (f"--pretrained {tmp_path / 'run'}" in raised.value.fix) == words.startswith("images")
    (tmp_path / "run" / "resolved.json").unlink()
    with pytest.raises(CannotCreate, match="labels: others there, 12 now"):
        fl.fit(images, more, **asked)


def test_a_refusal_names_some_images(run: fl.Run, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    images = sorted((tmp_path / "photos" / "train" / "unlabeled").glob("*.png"))
    images[0].rename(images[0].with_name("renamed.png"))
    for path in images[1:5]:
        path.unlink()
    with pytest.raises(CannotCreate) as raised:
        fl.fit(tmp_path / "photos", out=run.path, recipe="smoke", **SMALL)
    names = [f"train/unlabeled/{path.name}" for path in images[:3]]
    gone = f"no longer there: {', '.join(names)}, ..."
    assert raised.value.details[1:] == (gone, "not there before: train/unlabeled/renamed.png")


def test_renamed_pictures_are_no_other_images(run: fl.Run) -> None:
    """A run is refused by pixels, so nobody is to be sent away for names."""
    dataset, _ = open_run(run.path)
    renamed = replace(dataset, names=tuple(f"new/{name}" for name in dataset.names))
    assert identity.other_images(run.path, renamed) == []
    fewer = replace(renamed, splits=np.where(np.arange(len(renamed.splits)) == dataset.train[0], 3, renamed.splits))
    gone, new = identity.other_images(run.path, fewer)
    assert gone.startswith("no longer there: ") and new.startswith("not there before: new/")


@pytest.mark.parametrize("apart", ["Ka\u0308fer", "K\u00e4fer", "x"])
def test_a_given_model_of_a_macs_folders_has_learned_the_same_class(
    apart: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artefact, "read_card", lambda _: SimpleNamespace(classes=(apart,)))
    told = SimpleNamespace(recipe=SimpleNamespace(pretrained="m"), dataset=SimpleNamespace(classes=("K\u00e4fer",)))
    assert Prepared.learned_before.fget(told) is (apart != "x")  # type: ignore[attr-defined]


def test_a_run_that_is_not_there_is_a_missing_input(run: fl.Run, tmp_path: Path) -> None:
    assert fl.Run(str(run.path)).metrics == run.metrics  # type: ignore[arg-type]
    with pytest.raises(MissingInput, match="none"):
        _ = fl.Run(tmp_path / "none").metrics


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_learns_whatever_the_caller_has_turned_off(mode: Any, tmp_path: Path) -> None:
    images, classes = shapes_images(20, size=16)
    with mode():
        fl.fit(images, classes, out=tmp_path / "run", recipe="smoke", until="finetune", **SMALL)
        assert not torch.is_grad_enabled()


def test_a_signal_while_it_checks_promises_nothing_saved(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "prepare", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped, match="nothing was changed") as stopped:
        pipeline.check(Asked(images=photos, out=tmp_path / "run", recipe="smoke"))
    assert "saved" not in stopped.value.text() and "go on" not in stopped.value.text()


def test_an_export_of_an_older_model_is_told(
    photos: Path, run: fl.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    (tmp_path / "run" / "export").mkdir()
    fl.fit(photos, out=tmp_path / "run", recipe="smoke", **SMALL)
    assert "older model" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "distill")
    fl.fit(photos, out=tmp_path / "run", recipe="smoke", **{**SMALL, "distill": SMALL["distill"] | {"epochs": 2}})
    assert f"{tmp_path / 'run' / 'export'} is of an older model" in capsys.readouterr().err


def test_other_images_are_refused_and_the_stored_ones_kept(run: fl.Run, photos: Path, tmp_path: Path) -> None:
    names = ("data.json", "bad_images.csv", "data/pixels.u8", "data/index.json")
    before = {name: (run.path / name).read_bytes() for name in names}
    others, classes = shapes_images(120, size=20, seed=9)
    manifests = {path: path.read_text() for path in run.path.glob("pretrain/step-*/manifest.json")}
    for damage in ("", "{"):  # of pretraining's checkpoints: those of the other stages still say whose they are
        for path, text in manifests.items():
            path.write_text(damage or text)
        with pytest.raises(CannotCreate, match="images"):
            fl.fit(others, [str(c) for c in classes], out=run.path, recipe="smoke", **SMALL)
        assert {name: (run.path / name).read_bytes() for name in names} == before
        assert not [*run.path.glob("*.new*"), *run.path.glob("*.refused*")]
    for path, text in manifests.items():
        path.write_text(text)
    # Touched files are read again, and as they are the same images the run goes on
    for path in photos.rglob("*.png"):
        os.utime(path)
    weights = final_weights(run.path)
    fl.fit(photos, out=run.path, recipe="smoke", **SMALL)
    assert same(final_weights(run.path), weights)
    assert (run.path / "data/pixels.u8").read_bytes() == before["data/pixels.u8"]
    assert (run.path / "data.json").read_bytes() != before["data.json"]


@pytest.mark.parametrize("name", ["data/pixels.u8", "data.json"])
def test_damaged_images_are_read_anew(
    name: str, run: fl.Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run.path, out)
    for stage in STAGES[1:]:
        shutil.rmtree(out / stage)
    before = {file: (out / file).read_bytes() for file in ("data/pixels.u8", "data/hashes.npy", "data/index.json")}
    raw = bytearray((out / name).read_bytes())
    raw[len(raw) // 2] ^= 4
    (out / name).write_bytes(raw)
    if name == "data/pixels.u8":
        with pytest.raises(RunAgain, match="are not those that were written"):
            fl.fit(photos, out=out, recipe="smoke", **SMALL)
    fl.fit(photos, out=out, recipe="smoke", **SMALL)
    assert capsys.readouterr().err.count("the images are read anew") == 1
    assert {file: (out / file).read_bytes() for file in before} == before
    assert same(final_weights(out), final_weights(run.path))


def test_a_run_keeps_its_recipe_when_none_is_asked_for(run: fl.Run, photos: Path) -> None:
    before = final_weights(run.path)
    fl.fit(photos, out=run.path, **SMALL)
    assert same(final_weights(run.path), before)
    assert json.loads((run.path / "resolved.json").read_text())["asked"]["recipe"] == "smoke"
    with pytest.raises(CannotCreate, match="begun with the recipe smoke, and digits"):
        fl.fit(photos, out=run.path, recipe="digits", **SMALL)
    assert same(final_weights(run.path), before)


def test_a_run_of_an_older_version_goes_on(run: fl.Run) -> None:
    saved = checkpoint.glance(run.path / "distill")
    assert saved is not None
    now = saved["identity"]
    before = {**now, "distill": {k: v for k, v in now["distill"].items() if k != "teacher_epochs"}}
    identity.check(before, now, "distill", run.path)
    with pytest.raises(CannotCreate, match=r"distill.teacher_epochs: 0 there, 3 asked"):
        identity.check(before, {**now, "distill": {**now["distill"], "teacher_epochs": 3}}, "distill", run.path)


def test_pretraining_alone_keeps_the_results_of_a_finished_run(run: fl.Run, photos: Path) -> None:
    before = (run.path / "results.json").read_bytes()
    fl.fit(photos, out=run.path, recipe="smoke", until="pretrain", **SMALL)
    assert (run.path / "results.json").read_bytes() == before
    assert json.loads((run.path / "status.json").read_text())["state"] == "finished"


def test_pretraining_again_does_not_call_a_run_finished_that_stopped_later(
    run: fl.Run, photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    results = tmp_path / "run" / "results.json"  # as `fewlabels finetune` leaves it before a fit that stops
    results.write_text(results.read_text().replace('"final": "distill"', '"final": "finetune"'))
    fl.fit(photos, out=tmp_path / "run", recipe="smoke", until="pretrain", **SMALL)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "stopped"
    assert "distill has begun" in status["reason"]
    assert json.loads((tmp_path / "run/results.json").read_text())["final"] == "finetune"


@pytest.mark.parametrize("budget", [None, "1m"])
@pytest.mark.parametrize("student", ["resnet19", "timm:vit_tiny_patch16_224"])
def test_a_wrong_student_is_found_before_training(
    photos: Path, tmp_path: Path, student: str, budget: str | None
) -> None:
    with pytest.raises(UsageError, match=student.removeprefix("timm:")):
        fl.fit(photos, out=tmp_path / "run", recipe="smoke", student=student, budget=budget)
    assert not list((tmp_path / "run").glob("*/step-*"))


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5])
def test_a_seed_that_cannot_be_used(photos: Path, tmp_path: Path, seed: float) -> None:
    with pytest.raises(UsageError, match="seed"):
        fl.fit(photos, out=tmp_path / "run", recipe="smoke", seed=seed)  # type: ignore[arg-type]


def test_stages_one_by_one_equal_one_fit(run: fl.Run, photos: Path, tmp_path: Path) -> None:
    for until in plan.STAGES:
        fl.fit(photos, out=tmp_path / "run", recipe="smoke", until=until, **SMALL)
    assert same(final_weights(tmp_path / "run"), final_weights(run.path))


def test_pretraining_needs_no_labels_where_only_held_out_images_have_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, classes = shapes_images(80, size=16)
    given = {"out": tmp_path / "run", "test": (images[60:], classes[60:]), "recipe": "smoke", **SMALL}
    first = fl.fit(images[:60], until="pretrain", **given)
    assert first.metrics["rows"] == []
    assert "only held-out images have labels" in capsys.readouterr().err
    pretrained = final_weights(tmp_path / "run", ("pretrain",))
    with pytest.raises(DataError, match="only held-out images are labeled"):
        fl.fit(images[:60], **given)
    second = fl.fit(images[:60], [*classes[:12], *[None] * 48], until="finetune", **given)
    assert same(final_weights(tmp_path / "run", ("pretrain",)), pretrained)
    assert {row["key"]: row for row in second.metrics["rows"]}["finetune"]["accuracy"] is not None


def test_too_many_bad_pictures_leave_a_begun_run_its_list(tmp_path: Path) -> None:
    images, classes = shapes_images(20, size=16)
    for i, image in enumerate(images):
        (tmp_path / "photos" / f"c{classes[i]}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "photos" / f"c{classes[i]}" / f"{i:02d}.png")
    (tmp_path / "photos" / f"c{classes[0]}" / "bad.png").write_bytes(b"no picture")
    given = {"out": tmp_path / "run", "recipe": "smoke", "max_bad": 0.2, **SMALL}
    fl.fit(tmp_path / "photos", until="pretrain", **given)
    listed = (tmp_path / "run" / "bad_images.csv").read_text()
    assert "bad.png" in listed
    for i in range(8):
        (tmp_path / "photos" / f"c{classes[0]}" / f"worse{i}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="9 of 29 images") as refused:
        fl.fit(tmp_path / "photos", until="pretrain", **given)
    assert "bad_images.refused.csv" in str(refused.value)
    assert (tmp_path / "run" / "bad_images.csv").read_text() == listed
    assert "worse7" in (tmp_path / "run" / "bad_images.refused.csv").read_text()


def test_pretraining_needs_no_labels_where_all_pictures_are_of_one_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a camera leaves them; a fit goes on with labels. Labels that were given are refused all the same."""
    images, classes = shapes_images(40, size=16)
    place, table = tmp_path / "photos" / "Camera", tmp_path / "labels.csv"
    place.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(place / f"{i:02d}.png")
    given = {"out": tmp_path / "run", "recipe": "smoke", **SMALL}
    fl.fit(tmp_path / "photos", until="pretrain", **given)
    assert 'note: the one class "Camera" tells nothing apart: pretraining goes' in capsys.readouterr().err
    assert not len(open_run(tmp_path / "run")[0].labeled)
    with pytest.raises(DataError, match='all 40 labels are of the one class "Camera"'):
        fl.fit(tmp_path / "photos", **given)
    pretrained = final_weights(tmp_path / "run", ("pretrain",))
    table.write_text("image,label\n" + "".join(f"photos/Camera/{i:02d}.png,{classes[i]}\n" for i in range(12)))
    fl.fit(tmp_path / "photos", table, until="finetune", **given)
    assert same(final_weights(tmp_path / "run", ("pretrain",)), pretrained)
    table.write_text("image,label\nphotos/Camera/00.png,x\nphotos/Camera/01.png,x\n")
    fl.fit(tmp_path / "photos", until="pretrain", test=table, **(given | {"out": tmp_path / "held-out"}))
    for images_and_labels in ((tmp_path / "photos", table), (table,)):
        with pytest.raises(DataError, match='the one class "x"'):
            fl.fit(*images_and_labels, until="pretrain", **(given | {"out": tmp_path / "other"}))


def test_a_budget_for_what_is_done_is_told_to_change_nothing(
    run: fl.Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    fl.fit(photos, out=tmp_path / "run", recipe="smoke", budget="2m", **SMALL)
    assert "--budget changes nothing" in capsys.readouterr().err
    assert same(final_weights(tmp_path / "run"), final_weights(run.path))


def test_the_hour_of_auto_is_not_spent_on_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pretraining took it; labels come later, and the other stages keep the length that the recipe gives them."""
    images, classes = shapes_images(40, size=16)
    slow = {"pretrain": 1000.0, "finetune": 1e-3, "distill": 1e-3, "supervised": 1e-3}

    def measured(worker: Worker) -> dict[str, float]:
        stages = worker.prepared.stages
        return {stage: slow[stage] for stage in stages + ["supervised"] * ("finetune" in stages)}

    monkeypatch.setattr(Worker, "seconds_per_step", measured)
    wishes = {**SMALL, "encoder": "resnet18_0.0625x_small", "out": tmp_path / "run"}
    fl.fit(images, until="pretrain", **wishes)
    assert "the full schedule would take" in capsys.readouterr().err
    why = json.loads((tmp_path / "run" / "resolved.json").read_text())["why"]
    assert why
    assert not any("spread" in line for line in why), "there are no labels"
    fl.fit(images, [*classes[:20], *[None] * 20], until="finetune", **wishes)
    assert "the full schedule would take" not in capsys.readouterr().err


def test_a_plan_of_other_images_is_made_anew_until_something_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many labels, none, and the same command: nothing else tells them apart where no stage has saved."""
    images, _ = shapes_images(20, size=16)
    out = tmp_path / "run"

    def dies(worker: Worker) -> None:
        raise MemoryError("injected")

    wishes: dict[str, Any] = {"out": out, "until": "pretrain", "encoder": "resnet18_0.0625x_small"}
    wishes["pretrain"] = {"epochs": 1, "batch": 8}
    for shown in (images.mean(axis=3).astype(np.uint8), np.repeat(np.repeat(images, 4, axis=1), 4, axis=2)):
        with monkeypatch.context() as patch:
            patch.setattr(Worker, "pretrain", dies)
            with pytest.raises(MemoryError):
                fl.fit(shown, **wishes)
        status = json.loads((out / "status.json").read_text())
        assert (status["state"], status["reason"]) == ("failed", "MemoryError: injected")
        planned = json.loads((out / "resolved.json").read_text())["recipe"]
        assert (planned["kind"], planned["size"]) == (("glyph", 16) if shown.ndim == 3 else ("photo", 64))
    fl.fit(shown, **wishes)
    recipe = (out / "recipe.toml").read_text()
    with pytest.raises(CannotCreate, match="another run"):
        fl.fit(images, **wishes)
    assert (out / "recipe.toml").read_text() == recipe


def test_the_baseline_is_timed_and_measured_too(photos: Path, tmp_path: Path) -> None:
    asked = Asked(images=photos, out=tmp_path / "run", recipe="smoke", device="cpu", overrides=SMALL)
    folder = RunFolder(asked.out)
    with folder.locked():
        worker = Worker(prepare.prepare(asked, prepare.open_images(asked), folder, torch.device("cpu")), Interrupts())
    assert list(worker.seconds_per_step()) == list(worker.held()) == ["pretrain", "finetune", "supervised", "distill"]


def test_the_baseline_is_trained_where_something_is_held_out(tmp_path: Path) -> None:
    """Else it took three times as long as fine-tuning, and nothing could say how good it is. --test may come later."""
    images, classes = shapes_images(80, size=16)
    asked: dict[str, Any] = {**SMALL, "recipe": "smoke"}
    given = np.where(np.arange(40) < 16, classes[:40], -1)
    wishes = Asked(images=images[:40], labels=given, out=tmp_path / "run", recipe="smoke", overrides=SMALL)
    assert list(pipeline.check(wishes)["seconds"]) == ["pretrain", "finetune", "distill"]
    run = fl.fit(images[:40], given, out=tmp_path / "run", **asked)
    assert not (run.path / "supervised").exists()
    row = {row["key"]: row for row in run.metrics["rows"]}["supervised"]
    assert (row["accuracy"], row["note"]) == (None, "not trained: nothing held out")
    assert "not trained: nothing held out" in (run.path / "report.html").read_text()
    before = final_weights(run.path, STAGES[:3])
    np.savez(tmp_path / "test.npz", images=images[40:], labels=classes[40:])
    run = fl.fit(images[:40], given, out=tmp_path / "run", test=tmp_path / "test.npz", **asked)
    assert same(final_weights(run.path, STAGES[:3]), before)
    row = {row["key"]: row for row in run.metrics["rows"]}["supervised"]
    assert (row["n"], row["note"]) == (40, "")


def test_a_baseline_says_with_which_optimizer_it_learned(photos: Path, tmp_path: Path) -> None:
    """Only where that is not what an older version had in its place."""
    asked = Asked(images=photos, out=tmp_path / "run", recipe="smoke", device="cpu", overrides=SMALL)
    folder = RunFolder(asked.out)
    with folder.locked():
        found = prepare.prepare(asked, prepare.open_images(asked), folder, torch.device("cpu"))
    muon = replace(found, recipe=replace(found.recipe, distill=replace(found.recipe.distill, optimizer="muon")))
    assert "baseline" not in identity.of(found, "supervised")
    assert identity.of(muon, "supervised")["baseline"] == "muon"
    assert "baseline" not in identity.of(muon, "finetune")


def test_labels_may_come_after_pretraining(photos: Path, tmp_path: Path) -> None:
    images, classes = shapes_images(80, size=16)
    # A recipe whose fine-tuning depends on the number of labels, and numbers in words that must survive
    wishes = {**SMALL, "recipe": "best", "encoder": "resnet18_0.125x_small", "finetune": {"epochs": 5}}
    first = fl.fit(images, out=tmp_path / "run", **wishes)
    assert first.metrics["rows"] == []
    pretrained, _ = checkpoint.latest(tmp_path / "run" / "pretrain")
    known = [str(c) if i < 12 else None for i, c in enumerate(classes)]
    second = fl.fit(images, known, out=tmp_path / "run", **wishes)
    again, _ = checkpoint.latest(tmp_path / "run" / "pretrain")
    assert pretrained is not None
    assert again is not None
    assert same(pretrained.tensors, again.tensors)
    resolved = json.loads((tmp_path / "run" / "resolved.json").read_text())
    assert resolved["derived"]["finetune"]["images"] == 12
    assert resolved["recipe"]["finetune"]["batch"] == 12, "derived for no labels, it would be 2"
    assert resolved["recipe"]["finetune"]["epochs"] == 5
    rows = {row["key"]: row for row in second.metrics["rows"]}
    assert rows["distill"]["accuracy"] is None, "nothing was held out, so nothing may be claimed"
    assert rows["tap1_logistic"]["cross_validated"]


def test_fine_tuning_from_the_probe(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen network that does not learn any more must classify as the logistic regression on its features."""
    monkeypatch.setattr(propagate, "FEW_LABELS", 0)  # on the labels alone
    stays = {"start": "probe", "tap": 0, "freeze_below": 4, "epochs": 1, "learning_rate": 1e-9}
    probed = fl.fit(photos, out=tmp_path / "run", recipe="smoke", until="finetune", **{**SMALL, "finetune": stays})
    rows = {row["key"]: row for row in probed.metrics["rows"]}
    assert rows["finetune"]["accuracy"] == pytest.approx(rows["tap0_logistic"]["accuracy"], abs=0.05)
    assert rows["finetune"]["accuracy"] > rows["most_frequent"]["accuracy"] + 0.2


def test_fine_tuning_begins_anew_as_it_had_begun(photos: Path, tmp_path: Path) -> None:
    """Its only save is damaged: the linear layer must begin with the probe again."""
    asked = {**SMALL, "finetune": {"start": "probe", "epochs": 4}}
    fl.fit(photos, out=tmp_path / "run", recipe="smoke", until="finetune", **asked)
    before = final_weights(tmp_path / "run", ("finetune",))
    for place in (tmp_path / "run" / "finetune").glob("step-*/*.safetensors"):
        raw = bytearray(place.read_bytes())
        raw[len(raw) // 2] ^= 1
        place.write_bytes(bytes(raw))
    fl.fit(photos, out=tmp_path / "run", recipe="smoke", until="finetune", **asked)
    after = final_weights(tmp_path / "run", ("finetune",))
    for name, tensor in before.items():  # within one process a momentum may differ by 1e-12
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=1e-4, msg=name)


def test_very_few_labels_are_learned_as_the_graph_spreads_them(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On more images than have labels, in as many steps as these would take, and again so after a stop."""
    seen: list[dict[int, int]] = []
    forward = Finetune.forward

    def noted(self: Finetune, batch: Batch) -> dict[str, torch.Tensor]:
        seen.append(dict(zip(batch.ids.tolist(), batch.labels.tolist(), strict=True)))
        return forward(self, batch)

    monkeypatch.setattr(Finetune, "forward", noted)
    asked = {**SMALL, "finetune": {**SMALL["finetune"], "start": "probe"}}
    run = fl.fit(photos, out=tmp_path / "run", recipe="smoke", until="finetune", **asked)
    assert run.model.card.labels_a_class == (), "it learned classes as often as the graph gave them"
    whole = final_weights(tmp_path / "run", ("finetune",))
    steps = json.loads((tmp_path / "run" / "resolved.json").read_text())["derived"]["finetune"]["total_steps"]
    spread = [batch for batch in seen[:steps] if len(batch) == 16]
    assert len(spread) == steps
    learned = {image: label for batch in spread for image, label in batch.items()}
    assert len(learned) > 60 and set(learned.values()) == {0, 1, 2, 3}
    assert all(learned[image] == label for batch in spread for image, label in batch.items()), "always the same"
    for save in sorted((tmp_path / "run" / "finetune").glob("step-*"))[1:]:
        shutil.rmtree(save)
    seen.clear()
    fl.fit(photos, out=tmp_path / "run", recipe="smoke", until="finetune", **asked)
    assert 0 < len(seen) < steps
    assert seen == spread[-len(seen) :]
    for name, tensor in final_weights(tmp_path / "run", ("finetune",)).items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-6, rtol=1e-4, msg=name)


def test_a_student_of_another_size(photos: Path, tmp_path: Path) -> None:
    run = fl.fit(photos, out=tmp_path / "run", recipe="smoke", student="timm:test_resnet", **SMALL)
    keys = [row["key"] for row in run.metrics["rows"]]
    assert {"distill_self", "distill"} <= set(keys)
    assert run.model.card.encoder == "timm:test_resnet"
    assert run.model.predict(photos / "test").shape == (40,)


def test_fine_tuning_before_self_training_is_another_where_drawings_are_learned(tmp_path: Path) -> None:
    """And of photos an older version said so too."""
    started = {"starts_from_propagated_labels": False}
    identity.check({"kind": "photo", **started}, {"kind": "photo"}, "finetune", tmp_path)
    identity.check({"kind": "glyph", **started}, {"kind": "glyph", **started}, "finetune", tmp_path)
    with pytest.raises(CannotCreate) as refused:
        identity.check({"kind": "glyph", **started}, {"kind": "glyph"}, "finetune", tmp_path)
    assert any("propagated" in line for line in refused.value.details)


@pytest.mark.parametrize(
    ("kind", "self_training", "spreads"), [("photo", 0.95, True), ("glyph", 0, True), ("glyph", 0.95, False)]
)
def test_drawings_do_not_teach_themselves_from_propagated_labels(
    kind: str, self_training: float, spreads: bool, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, told = [], []
    monkeypatch.setattr(propagate, "propagate", lambda features, known, classes: (asked.append(len(known)), known)[1])
    monkeypatch.setattr(propagate, "left_out", lambda *_: (told.append(1), (3, 4))[1])
    finetune = {**SMALL["finetune"], "start": "probe"}
    wishes = {**SMALL, "kind": kind, "finetune": finetune}
    wishes["distill"] = {**SMALL["distill"], "self_training": self_training}
    fl.fit(photos, out=tmp_path / "run", recipe="smoke", until="finetune", **wishes)
    assert bool(asked) == bool(told) == spreads
    why = json.loads((tmp_path / "run" / "resolved.json").read_text())["why"]
    assert any(line.endswith("finetune learn up to 120 images") for line in why) == spreads


def test_a_network_that_teaches_itself(photos: Path, tmp_path: Path) -> None:
    """Alone, and then a smaller one; stopped in the middle it comes to the same."""
    wishes = {**SMALL, "distill": {**SMALL["distill"], "self_training": 0.3}}
    whole = fl.fit(photos, out=tmp_path / "whole", recipe="smoke", **wishes)
    rows = {row["key"]: row["name"] for row in whole.metrics["rows"]}
    assert rows["distill"] == "self-trained"
    assert whole.model.card.tap == 1, "the kept layer of the head belongs to the network"
    assert whole.model.predict(photos / "test").shape == (40,)
    plan_text = json.loads((whole.path / "resolved.json").read_text())["why"]
    assert any("teaches itself" in line for line in plan_text)
    rest = shutil.copytree(whole.path, tmp_path / "rest")
    saves = sorted((rest / "distill").glob("step-*"))
    assert len(saves) == 2
    shutil.rmtree(saves[-1])
    shutil.rmtree(rest / "model")
    fl.fit(photos, out=rest, recipe="smoke", **wishes)
    assert same(final_weights(rest), final_weights(whole.path))
    with pytest.raises(CannotCreate, match="distill stage") as refused:  # photos are fine-tuned alike before either
        fl.fit(photos, out=rest, recipe="smoke", **{**SMALL, "distill": {**SMALL["distill"], "self_training": 0}})
    assert any("self_training" in line for line in refused.value.details)
    both = fl.fit(photos, out=tmp_path / "both", recipe="smoke", student="resnet18_0.0625x_small", **wishes)
    rows = {row["key"]: row["name"] for row in both.metrics["rows"]}
    assert (rows["distill_self"], rows["distill"]) == ("self-trained", "distilled student")
    itself, _ = checkpoint.latest(tmp_path / "both" / "distill_self")
    assert itself is not None
    assert itself.tensors["stage.average.linear.weight"].shape[0] == 4


def test_labels_that_the_features_cannot_tell_keep_a_network_from_teaching_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fine-tuning began with stays, whatever is wished for later; without it other labels are judged anew."""
    images, bright = shapes_images(120, seed=3)
    known = np.arange(120) < 60
    senseless = np.where(known, np.random.default_rng(0).integers(0, 2, 120), -1)
    wishes = {**SMALL, "encoder": "resnet18_0.0625x_small", "size": 16, "recipe": "best"}
    run = fl.fit(images, senseless, out=tmp_path / "run", **wishes)

    def decided(name: str = "run") -> str:
        found = json.loads((tmp_path / name / "resolved.json").read_text())
        assert found["recipe"]["distill"]["self_training"] > 0, "as it was chosen"
        assert any("teaches itself" in line for line in found["why"]) == (not found["too_weak"])
        assert not found["too_weak"] or found["why"][-1] == found["too_weak"]
        carried_out = config.read_toml(tmp_path / name / "recipe.toml")["distill"]["self_training"]
        assert (carried_out == 0) == bool(found["too_weak"]), "whoever takes this recipe does what was done here"
        return str(found["too_weak"])

    why, before = decided(), final_weights(run.path, STAGES[:3])
    assert why.startswith("no self-training: frozen features tell ")
    assert {row["key"]: row["name"] for row in run.metrics["rows"]}["distill"] == "distilled into the same network"
    shutil.rmtree(run.path / "finetune")
    shutil.rmtree(run.path / "distill")
    fl.fit(images, senseless, out=run.path, **wishes)
    assert same(final_weights(run.path, STAGES[:3]), before)
    shutil.rmtree(run.path / "distill")
    timed, measure = [], Worker.seconds_per_step
    monkeypatch.setattr(
        Worker, "seconds_per_step", lambda worker: (timed.append(worker.prepared.too_weak), measure(worker))[1]
    )
    fl.fit(images, senseless, out=run.path, student="resnet18_0.03125x_small", budget="5m", **wishes)
    assert decided() == why
    assert timed == [why], "a budget is shared out among the stages that will be run"
    named = {**wishes, "distill": {**SMALL["distill"], "self_training": 0.9}}
    with pytest.raises(CannotCreate, match="distill_self stage"):
        fl.fit(images, senseless, out=run.path, **named)
    for stage in ("finetune", "distill_self", "distill"):
        shutil.rmtree(run.path / stage)
    fl.fit(images, np.where(known, bright // 2, -1), out=run.path, until="finetune", **wishes)
    assert decided() == ""


@pytest.mark.parametrize("way", ["option", "recipe file"])
def test_self_training_that_was_asked_for_stays(way: str, tmp_path: Path) -> None:
    """Whatever the features are."""
    images, _ = shapes_images(60, seed=3)
    wishes: dict[str, Any] = {**SMALL, "encoder": "resnet18_0.0625x_small", "size": 16, "recipe": "best"}
    if way == "option":
        wishes["distill"] = {**SMALL["distill"], "self_training": 0.9}
    else:
        wishes["recipe"] = str(tmp_path / "mine.toml")
        Path(wishes["recipe"]).write_text("[distill]\nself_training = 0.9\n")
    fl.fit(images, np.random.default_rng(0).integers(0, 2, 60), out=tmp_path / "run", until="finetune", **wishes)
    found = json.loads((tmp_path / "run" / "resolved.json").read_text())
    assert (found["recipe"]["distill"]["self_training"], found["too_weak"]) == (0.9, "")


# --- killed and resumed ---------------------------------------------------------------------------------------

# 20 ms a step, so that the signal lands inside the stage
SLOWER = """
import time, fewlabels.stages.loop as loop
step = loop.step
def slow(*a):
    time.sleep(0.02)
    return step(*a)
loop.step = slow
"""
PROGRAM = SLOWER + (
    "import sys, json, fewlabels as fl; from fewlabels.errors import FewlabelsError\n"
    "try:\n    fl.fit(sys.argv[1], out=sys.argv[2], recipe='smoke', **json.loads(sys.argv[3]))\n"
    "except FewlabelsError as e:\n    print(e.text()); sys.exit(e.exit_code)\n"
)


def start(photos: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(photos), str(out), json.dumps(SMALL)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until_inside(out: Path, stage: str, process: subprocess.Popen[str]) -> None:
    """Until stage has logged a few steps, and is not finished."""
    for _ in range(600):
        metrics = out / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if sum(f'"stage": "{stage}"' in line for line in lines) >= 4:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"{stage} did not start")


# One of each here, since a case takes ten seconds; `make faults` kills a hundred times, and in every phase
ENDS = {"pretrain": signal.SIGTERM, "finetune": signal.SIGKILL, "distill": signal.SIGINT, "supervised": signal.SIGKILL}


@pytest.mark.parametrize(("stage", "number"), ENDS.items())
def test_killed_in_any_stage_and_resumed_is_bit_identical(
    stage: str, number: signal.Signals, run: fl.Run, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run.path, out)  # earlier stages are there; this one and the later ones are to be done
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(out / later)
    order = {name: i for i, name in enumerate(("pretrain", "finetune", "distill", "supervised"))}
    kept = [record for record in logged(out) if order[record["stage"]] < order[stage]]
    (out / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    process = start(photos, out)
    wait_until_inside(out, stage, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number, output
        assert "everything is saved" in output
        assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    else:
        assert process.returncode == -9
    resumed = start(photos, out)
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, output
    assert same(final_weights(out), final_weights(run.path))
    assert timeless(logged(out)) == timeless(logged(run.path))


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in ("seconds", "wait_share")} for record in records]


def test_two_processes_under_torchrun(run: fl.Run, photos: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "run"
    options = [f"--{s}.{k.replace('_', '-')}={v}" for s, part in SMALL.items() for k, v in part.items()]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port),
         "-m", "fewlabels", "fit", str(photos), "--out", str(out), "--recipe", "smoke", "--finetune.start=probe",
         *options],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    mine, other = logged(out), logged(run.path)
    # Float32 sums in another order drift apart with the steps; the first ones must agree closely
    first = [r["loss"] for r in mine if r["stage"] == "pretrain" and "loss" in r][:3]
    assert first == pytest.approx([r["loss"] for r in other if r["stage"] == "pretrain" and "loss" in r][:3], rel=1e-4)
    assert len(mine) == len(other)


# --- what a user can do wrong -----------------------------------------------------------------------------------


def test_wrong_input_leaves_nothing_behind(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(MissingInput):
        fl.fit(tmp_path / "nowhere", out=out, recipe="smoke")
    with pytest.raises(UsageError, match="did you mean"):
        fl.fit(photos, out=out, recipe="smok")
    with pytest.raises(UsageError, match="not a duration"):
        fl.fit(photos, out=out, budget="soon")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(CannotCreate, match="other things in it"):
        fl.fit(photos, out=tmp_path / "mine", recipe="smoke")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert not (out / "pretrain").exists()


def test_finetune_without_labels(tmp_path: Path) -> None:
    images, _ = shapes_images(40)
    with pytest.raises(DataError, match="needs labels"):
        fl.fit(images, out=tmp_path / "run", recipe="smoke", until="finetune")


def test_a_second_process_is_kept_out(photos: Path, tmp_path: Path) -> None:
    from fewlabels.runfolder import RunFolder

    with RunFolder(tmp_path / "run").locked(), pytest.raises(CannotCreate, match="another process"):
        fl.fit(photos, out=tmp_path / "run", recipe="smoke", **SMALL)


def test_divergence_saves_nothing_and_names_the_images(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[int]] = {}
    step = loop.step

    def noted(state: Any, batch: Any, *rest: Any) -> Any:
        seen[state.step + 1] = batch.ids.tolist()
        return step(state, batch, *rest)

    monkeypatch.setattr(loop, "step", noted)
    settings = SMALL | {"pretrain": SMALL["pretrain"] | {"optimizer": "sgd", "learning_rate": 1e18, "warmup": 0.0}}
    with pytest.raises(Diverged) as raised:
        fl.fit(photos, out=tmp_path / "run", recipe="smoke", **settings)
    with (tmp_path / "run" / "images.csv").open(encoding="utf-8") as file:
        names = [row["image"] for row in csv.DictReader(file)]
    assert raised.value.details == tuple(names[row] for row in seen[raised.value.step])
    assert "train/unlabeled/" in raised.value.text()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    saved, _ = checkpoint.latest(tmp_path / "run" / "pretrain")
    assert saved is None or all(t.isfinite().all() for t in saved.tensors.values() if t.is_floating_point())


def test_the_survey_tells_the_full_size_and_gray(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 700, 3), dtype=np.uint8)
    for name, image in (("colour", noise), ("gray", noise[:, :, 0])):
        (tmp_path / name).mkdir()
        Image.fromarray(image).save(tmp_path / name / "1.png")
        Image.fromarray(image).rotate(90, expand=True).save(tmp_path / name / "2.png")
        (tmp_path / name / "3.png").write_text("not a picture")
        assert pixels.survey(open_source(tmp_path / name)) == (700, name == "gray")


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_the_survey_looks_at_more_than_the_first_image(kind: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
    images[0] = 0  # as a film may begin
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "a.npz", images=images)
    assert pixels.survey(open_source(tmp_path / f"a.{kind}")) == (16, False)


def test_fewer_labels_than_processes_are_left_to_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing the stages comes first, and must not fail with words on a batch that nobody asked for. And stages that are
    not asked for need no images.
    """
    images, _ = shapes_images(12, size=16)
    asked = Asked(
        images=images, labels=[0, 1, 1, *[None] * 9], out=tmp_path / "run", recipe="smoke", device="cpu",
        overrides={"distill": {"self_training": 0.95}},
    )  # fmt: skip
    folder = RunFolder(asked.out)
    with folder.locked():
        prepared = prepare.prepare(asked, prepare.open_images(asked), folder, torch.device("cpu"))
    monkeypatch.setattr(runtime, "world_size", lambda: 4)
    assert list(Worker(prepared, Interrupts()).held()) == ["pretrain"]
    assert not any(line.startswith("finetune") for line in prepared.equations)
    assert pipeline._wanted_stages(replace(asked, until="pretrain"), prepared) == ["pretrain"]
    with pytest.raises(UsageError, match="finetune needs at least 4 labeled images, not 3"):
        pipeline._wanted_stages(asked, prepared)
    monkeypatch.setattr(runtime, "world_size", lambda: 3)
    assert pipeline._wanted_stages(asked, prepared) == list(plan.STAGES)
    assert prepared.derived("finetune").batch == 3
    own = replace(prepared, recipe=replace(prepared.recipe, encoder="timm:test_resnet"))
    with pytest.raises(UsageError, match="finetune needs at least 6 labeled images, not 3"):
        pipeline._wanted_stages(asked, own)


def test_one_image_is_bad_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pretrain needs at least 2 images, not 1"):
        fl.fit(shapes_images(1)[0], out=tmp_path / "run", recipe="smoke", device=torch.device("cpu"))


@pytest.mark.parametrize("share", [float("nan"), -1, 1.5])
def test_a_share_that_cannot_be_used(share: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_bad"):
        prepare.open_images(Asked(images=shapes_images(4)[0], out=tmp_path, max_bad=share))


def test_what_is_to_be_removed_can_be_pasted_and_is_no_more_than_changed(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    for stage, later in {"finetune": [*plan.TRAINED][1:], "distill": ("distill",)}.items():
        with pytest.raises(CannotCreate) as refused:
            identity.check({"seed": 1}, {"seed": 2}, stage, folder)
        command = shlex.split(refused.value.fix.partition(", first ")[2])
        assert command == ["rm", "-rf", *(str(folder / name) for name in later)]
    with pytest.raises(CannotCreate) as refused:
        identity.check({"seed": 1}, {"seed": 2}, "pretrain", folder)
    assert "rm" not in refused.value.fix.split()


def test_another_student_leaves_what_it_is_taught_by(tmp_path: Path) -> None:
    one, other = ({"distill": {"student": name, "temperature": t}} for name, t in (("resnet18", 1.0), (None, 2.0)))
    identity.check(one, other, "distill_self", tmp_path)
    with pytest.raises(CannotCreate, match="distill stage"):
        identity.check(one, other, "distill", tmp_path)


def test_as_many_labels_in_other_classes_are_another_plan(tmp_path: Path) -> None:
    """Also where pretraining has begun; an older version did not keep the number."""
    facts = recipes.Facts(images=99, labeled=4, classes=2, side=32, gray=False, on_gpu=False, threads=2)
    wishes = Asked(images=tmp_path, out=tmp_path)
    stored = {"asked": wishes.wishes(), "understood": {"labeled": 4}, "facts": asked.of_images(facts)}
    for other, begun, same_plan in ((facts, {"pretrain"}, True), (replace(facts, classes=3), {"pretrain"}, False)):
        assert asked.same_plan(stored, wishes, other, begun) is same_plan
        assert asked.same_plan({**stored, "facts": None}, wishes, other, begun)


def test_reading_images_for_long_does_not_use_up_an_hour_that_nobody_asked_for(tmp_path: Path) -> None:
    recipe = recipes.smoke(
        recipes.Facts(images=1000, labeled=10, classes=2, side=32, gray=False, on_gpu=False, threads=2)
    )
    images = dict.fromkeys(("pretrain", "finetune", "distill", "supervised", "distill_self"), 1000)
    read = SimpleNamespace(
        recipe=recipe, images=images, seconds=5000.0, device=torch.device("cpu"), folder=RunFolder(tmp_path)
    )
    worker = SimpleNamespace(seconds_per_step=lambda: {"pretrain": 0.1, "finetune": 0.1, "distill": 0.1})
    asked = Asked(images=tmp_path, out=tmp_path)
    assert pipeline._fit_schedule(read, asked, worker) == (read, [])
    with pytest.raises(UsageError, match=r"reading the images took 1 h 23 min, all of the budget"):
        pipeline._fit_schedule(read, replace(asked, budget=3600.0), worker)
