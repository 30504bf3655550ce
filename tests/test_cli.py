"""The command line as a user types it: what it answers, with which exit code, and never a traceback for a mistake."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import shapes_images
from fewlabels import checkpoint, cli
from fewlabels.asked import Asked, command_line, on_command_line
from fewlabels.errors import DataError, Stopped, UsageError
from fewlabels.use import export, predict

TINY = ["--recipe", "smoke", "--pretrain.epochs", "1", "--distill.epochs", "1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    images, classes = shapes_images(48, size=20)
    for i, (image, label) in enumerate(zip(images, classes, strict=True)):
        place = root / "photos" / ("test" if i >= 32 else "train") / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:03d}.png")
    return root / "photos"


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(["fit", str(photos), "--out", str(out), *TINY]) == 0
    return out


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    told = capsys.readouterr()
    return code, told.out, told.err


def write(folder: Path, text: str) -> str:
    path = folder / "labels.csv"
    path.write_text(text)
    return str(path)


MISTAKES = [
    ("fit {none} --out {out}", 66, ["no such file or folder", "fix:"]),
    ("fit {empty} --out {out}", 65, ["fix:"]),
    ("fit {photos} --out {out} --recipe smoek", 2, ['did you mean "smoke"']),
    ("fit {photos} --out {out} --recipe {none}.toml", 66, ["fix:"]),
    ("fit {photos} --out {out} --pretrain.epoch 3", 2, ["--pretrain.epochs"]),
    ("fit {photos} --out {out} --pretrain.epochs many", 2, ["epochs"]),
    ("fit {photos} --out {out} --recipe smoke --pretrain.epochs -1", 2, ["pretrain.epochs", "above 0"]),
    ("fit {photos} --out {out} --recipe smoke --kind foto", 2, ['did you mean "photo"']),
    ("fit {photos} --out {out} --recipe smoke --encoder resnet19", 2, ["resnet1"]),
    ("fit {photos} --out {out} --recipe smoke --student resnet18_0.2y", 2, ["fix:"]),
    ("fit {photos} --out {out} --budget soon", 2, ["not a duration"]),
    ("fit {photos} --out {out} --device tpu", 2, ["unknown device"]),
    ("fit {photos} --out {out} --recipe smoke --keep-labels 0", 2, ["fix:"]),
    ("fit {photos} --out {out} --labels {none}", 66, ["fix:"]),
    ("fit --out {out}", 66, ["no images were given"]),
    ("fit {photos} --out {file}", 73, ["is a file"]),
    ("fit {photos} --out {others}", 73, ["other things in it"]),
    ("fti {photos}", 2, ['did you mean "fit"']),
    ("evaluate {none} {photos}", 66, ["fix:"]),
    ("evaluate {empty} {photos}", 66, ["fix:"]),
    ("evaluate {run} {none}", 66, ["fix:"]),
    ("predict {run} {none}", 66, ["fix:"]),
    ("predict {none} {photos}", 66, ["fix:"]),
    ("export {none}", 66, ["fix:"]),
    ("export {run} --format onxx", 2, ["onnx"]),
    ("report {none}", 66, ["fix:"]),
    ("fit {photos} --out {out} --recpe smoke", 2, ["--recipe"]),
    ("predict {run} {file}", 65, ["no kind of images", "fix:"]),
    ("predict {run}", 2, ["fix:"]),
    ("fit {photos} --out {run} --recipe digits", 73, ["begun with the recipe smoke", "new --out"]),
]


@pytest.mark.parametrize(("line", "code", "words"), MISTAKES, ids=[line for line, *_ in MISTAKES])
def test_a_mistake_gets_a_message_and_its_exit_code(
    line: str, code: int, words: list[str], photos: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("")
    places = {name: tmp_path / name for name in ("none", "empty", "others", "file", "out")}
    got, out, err = answer(capsys, *line.format(photos=photos, run=run, **places).split())
    assert got == code, err
    assert "Traceback" not in err
    for word in words:
        assert word in err + out
    assert (tmp_path / "others" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "words",
    [["{}"], ["predict", "./{}", "x"], ["predict", "x", "y", "--no{}"], ["fit", "./{}"], ["report", "./{}"],
     ["fit", "digits", "--labels", "./{}", "--out", "./{}"], ["import", "./{}", "--out", "./{}"]],
)  # fmt: skip
@pytest.mark.parametrize(
    "name", ["\x1b[2J", "\x1b]0;title\x07", "\x9b2J", "a\rb", "a\nfix: x", "\u202egnp", "\udcff"], ids=ascii
)
def test_a_name_on_the_command_line_moves_no_cursor(
    words: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = answer(capsys, *(word.format(name) for word in words))
    assert code in (2, 66)
    assert (out + err).replace("\n", "").isprintable()
    assert "\nfix: x" not in out + err


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("image,lable\na.png,cat\n", ['did you mean "label"']),
        ("image,label\nnope.png,cat\n", ["line 2", "nope.png"]),
        ("image,label\ntrain/class0/000.png,cat\ntrain/class0/000.png,dog\n", ["line 3", "cat", "dog"]),
        ("image,label\ntrain/class0/000.png,cat\ntrain/class1/001.png,Cat\n", ["Cat"]),
        ("image,label\n../secret.png,cat\n/etc/passwd,dog\n", ["line 2", "line 3"]),
    ],
)
def test_label_faults_are_told_with_their_lines(
    rows: str, words: list[str], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = write(tmp_path, rows)
    code, _, err = answer(capsys, "fit", str(photos), "--labels", labels, "--out", str(tmp_path / "out"), *TINY)
    assert code == 65
    assert "Traceback" not in err
    for word in words:
        assert word in err


def test_a_class_that_only_the_test_images_have(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "image,label\ntrain/class0/000.png,class0\ntrain/class1/001.png,class1\ntest/class3/047.png,zebra\n"
    rows = (
        rows.replace("label\n", "label,split\n")
        .replace("class0\n", "class0,train\n")
        .replace("class1\n", "class1,train\n")
    )
    labels = write(tmp_path, rows.replace("zebra\n", "zebra,test\n"))
    code, _, err = answer(capsys, "fit", str(photos), "--labels", labels, "--out", str(tmp_path / "out"), *TINY)
    assert code == 65
    assert "zebra" in err


def test_the_commands_on_a_finished_run(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = answer(capsys, "evaluate", str(run), str(photos / "test"), "--json")
    assert code == 0
    assert json.loads(out)["n"] == 16
    code, out, _ = answer(capsys, "predict", str(run), str(photos / "test"), "--out", str(tmp_path / "p.csv"))
    assert code == 0
    assert "16 images predicted" in out
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 17
    two = [str(path) for path in sorted((photos / "test").rglob("*.png"))[:2]]
    code, out, _ = answer(capsys, "predict", str(run), *two, "--out", str(tmp_path / "two.csv"))
    assert (code, "2 images predicted" in out) == (0, True)
    code, out, _ = answer(capsys, "report", str(run))
    assert (code, out.strip()) == (0, str(run / "report.html"))


def test_a_model_of_before_the_present_training_is_told(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "export", lambda model, folder, **_: folder)
    shutil.copytree(run, tmp_path / "run")
    status, test = tmp_path / "run" / "status.json", str(photos / "test")
    told = f"note: {tmp_path / 'run'} is not trained to the end; this is the last model it made\n"
    for text, is_told in (('{"state": "stopped"}', True), ("{", False), (status.read_text(), False)):
        status.write_text(text)
        for words in (["evaluate", test], ["predict", test, "--out", str(tmp_path / "p.csv")], ["export"]):
            code, _, err = answer(capsys, words[0], str(tmp_path / "run"), *words[1:])
            assert (code, told in err) == (0, is_told), words


def test_balanced_reaches_the_model_of_every_command_that_uses_one(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(export, "export", lambda model, folder, **_: (seen.append(model.card.balanced), folder)[1])
    rows = predict.write_predictions
    monkeypatch.setattr(
        predict, "write_predictions", lambda m, *rest: (seen.append(m.card.balanced), rows(m, *rest))[1]
    )
    test, table = str(photos / "test"), str(tmp_path / "p.csv")
    for asked in (["--balanced"], []):
        code, out, _ = answer(capsys, "evaluate", str(run), test, "--json", *asked)
        assert (code, json.loads(out)["balanced"]) == (0, bool(asked))
        assert answer(capsys, "predict", str(run), test, "--out", table, *asked)[0] == 0
        assert answer(capsys, "export", str(run), *asked)[0] == 0
    assert seen == [True, True, False, False]


def test_an_export_lies_where_no_later_fit_removes_it(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model folder is replaced as a whole, and the export in it went with it."""
    monkeypatch.setattr(export, "export", lambda model, folder, **_: folder)
    for place, beside in ((run, run / "export"), (run / "model", run / "model-export")):
        assert answer(capsys, "export", str(place))[:2] == (0, f"{beside}\n")
    monkeypatch.chdir(run / "model")
    assert answer(capsys, "export", ".")[:2] == (0, f"{run / 'model-export'}\n")


def test_without_held_out_images_it_says_how_to_measure(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = answer(capsys, "finetune", str(photos / "train"), "--out", str(tmp_path / "out"), *TINY)
    assert code == 0
    assert "not measured: no held-out images" in out
    assert "--test" in out


def test_check_changes_nothing(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(photos.rglob("*"))
    code, out, _ = answer(capsys, "check", str(photos), "--out", str(tmp_path / "out"), *TINY)
    assert code == 0
    assert "32 images, 32 labeled in 4 classes, 16 held-out test images" in out
    assert "MB of disk" in out
    assert re.search(r"^labels: \w+ 8, \w+ 8, \w+ 8, \w+ 8$", out, re.MULTILINE), "a misspelled class shows here"
    assert "nothing is held out" not in out
    assert re.search(r"pretrain: largest batch that fits: about \d+ \(asked 16\), about \d+ with --recompute", out)
    assert re.search(r"supervised: largest batch that fits: about \d+ \(asked 16\)", out)
    assert sorted(photos.rglob("*")) == before
    assert not (tmp_path / "out").exists()
    assert "has begun" not in out


def test_check_says_that_a_run_keeps_to_its_own_plan(
    photos: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = answer(capsys, "check", str(photos), "--out", str(run), *TINY)
    assert code == 0
    assert f"{run} has begun: there distill, finetune, pretrain keep their plan" in out
    (tmp_path / "others").mkdir()
    for path in sorted((photos / "train").rglob("*.png"))[:8]:
        shutil.copy(path, tmp_path / "others" / f"other-{path.name}")
    code, out, _ = answer(capsys, "check", str(tmp_path / "others"), "--out", str(run), *TINY)
    assert (code, "keep their plan" in out) == (0, False)
    assert f"{run} is a run of other images: give another --out" in out
    assert "finetune from" not in out and "distill into" not in out, "there are no labels"
    assert "views of kind" in out


def test_a_later_command_finds_the_images_in_the_run(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    student = "resnet18_0.0625x_small"
    wishes = ["--seed", "5", "--student", student, "--finetune.epochs", "2", *TINY]
    moved = str(tmp_path / "moved")
    shutil.copytree(photos, moved)
    assert answer(capsys, "pretrain", moved, "--out", out, *wishes)[0] == 0
    assert not (tmp_path / "out" / "finetune").exists()
    before = json.loads((tmp_path / "out" / "resolved.json").read_text())["asked"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.search(r"Its features get [\d.]+ % of 16 held-out images right", page)
    assert f"fewlabels fit --out {out}" in page
    assert "fewlabels predict" not in page, "it has no classifier yet"
    shutil.rmtree(moved)
    code, _, err = answer(capsys, "finetune", "--out", out)
    assert (code, f"{moved} is not there" in err, f"fewlabels fit NEW_FOLDER --out {out}" in err) == (66, True, True)
    shutil.copytree(photos, moved)
    code, _, err = answer(capsys, "finetune", "--out", out)
    assert (code, f"kept from the run: --student {student}, --seed 5, --pretrain.epochs 1" in err) == (0, True)
    resolved = json.loads((tmp_path / "out" / "resolved.json").read_text())
    assert (resolved["asked"], resolved["recipe"]["finetune"]["epochs"]) == (before, 2)


def test_stdout_is_the_result_and_stderr_the_progress(photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fewlabels", "fit", str(photos), "--out", str(tmp_path / "out"), "--json", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["final"] == "distill"
    assert "pretrain: done" in done.stderr


def test_help_names_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    for command, told in (("predict", "RUN IMAGES [IMAGES ...]"), ("fit", "[IMAGES]"), ("suggest", "--out CSV")):
        assert cli.main([command, "--help"]) == 0
        spoken = capsys.readouterr().out
        assert told in spoken
        assert "{None}" not in spoken
        assert "default: None" not in spoken


@pytest.mark.parametrize("words", [["--help"], ["report"]])
def test_output_that_nobody_reads(run: Path, words: list[str]) -> None:
    """`| head` is no error, and a full disk under stdout is told, whether Python writes at once or at the end."""
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "fewlabels", *words, *([str(run)] if words == ["report"] else [])]

    def ended(stdout: Any, **more: str) -> tuple[int, str]:
        env = plain | more
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=env, check=False)
        return done.returncode, done.stderr

    for more in ({}, {"PYTHONUNBUFFERED": "1"}):
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "w") as gone:
            assert ended(gone, **more) == (0, "")
    with Path("/dev/full").open("w") as full:
        code, told = ended(full)
    assert code == 74, told
    assert "Traceback" not in told


@pytest.mark.parametrize(("words", "code"), [([], 0), (["--recipe", "smoek"], 2), (["--bogus"], 2)])
def test_progress_that_nobody_reads_ends_no_training(
    words: list[str], code: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fewlabels", "pretrain", str(photos), "--out", str(tmp_path / "run"), *TINY]
    with os.fdopen(write, "w") as gone:
        done = subprocess.run([*command, *words], stdout=subprocess.PIPE, stderr=gone, text=True, check=False)
    assert done.returncode == code
    if not code:
        assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"


def test_words_of_a_terminal_are_not_coloured_into_percent_signs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    code, _, told = answer(capsys, "fit", "x", "--bogus")
    assert code == 2
    assert "--bogus" in told
    assert "%1B" not in told and "\x1b" not in told


def test_streams_that_are_closed(tmp_path: Path) -> None:
    program = f"{shlex.quote(sys.executable)} -m fewlabels"
    for words, code in (("--version >&-", 0), ("suggest nowhere 2>&-", 66), ("suggest nowhere >&-", 66)):
        command = ["bash", "-c", f"{program} {words}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert (done.returncode, done.stdout) == (code, "")
        assert "Traceback" not in done.stderr


def test_letters_that_the_terminal_has_not(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(photos / "train" / "class0", tmp_path / "images" / "猫")
    shutil.copytree(photos / "train" / "class1", tmp_path / "images" / "dog")
    shown = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", shown)
    assert cli.main(["check", str(tmp_path / "images"), "--out", str(tmp_path / "run"), *TINY]) == 0
    assert rb"\u732b 8" in shown.buffer.getvalue()  # type: ignore[attr-defined]


def test_a_table_on_stdout_is_the_table_alone(run: Path, photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fewlabels", "predict", str(run), str(photos / "test"), "--out"]
    ways = ([out, *more] for out in ("/dev/stdout", "-") for more in ([], ["--json"]))
    for more in ways:
        told = '"predicted": 16' if "--json" in more else "16 images predicted"
        with (tmp_path / "p.csv").open("w") as file:
            done = subprocess.run([*command, *more], stdout=file, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "p.csv").read_text().splitlines()
        assert len(lines) == 17
        assert lines[0].startswith("image,label,confidence")
        assert told in done.stderr


def test_predictions_of_what_are_no_pictures(
    run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, table = str(tmp_path / "p.csv"), write(tmp_path, "image,label\na.png,cat\n")
    picture = str(next((photos / "test").rglob("*.png")))
    for words in ([str(photos / "test"), picture], [picture, table]):
        code, _, told = answer(capsys, "predict", str(run), *words, "--out", out)
        assert (code, "several images must be pictures" in told) == (2, True)
    code, _, told = answer(capsys, "predict", str(run), table, "--out", table)
    assert (code, "are the images themselves" in told) == (2, True)
    code, _, told = answer(capsys, "predict", str(run), picture, picture, "--out", picture)
    assert (code, f"{picture} is there already" in told) == (73, True)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n1234")
    code, _, told = answer(capsys, "predict", str(run), str(tmp_path / "a.png"), "--out", out)
    assert (code, "none of the 1 images could be read" in told) == (65, True)
    assert "damaged" in Path(out).read_text()


def test_a_folder_called_digits_is_not_what_a_later_command_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Asked(images="digits", out=tmp_path / "run").inputs() == {"images": "digits"}
    assert Asked(images="./digits", out=tmp_path / "run").inputs() == {"images": str(tmp_path / "digits")}


def test_the_estimator_keeps_scikit_learns_contract(
    visible_images: tuple[np.ndarray, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    from sklearn.base import clone
    from sklearn.exceptions import DataConversionWarning, NotFittedError

    import fewlabels as fl

    images, classes = visible_images
    y = np.where(np.arange(64) < 24, classes * 10, -1)
    made = clone(fl.FewLabelClassifier(recipe="smoke", random_state=3))
    assert made.get_params() == {"recipe": "smoke", "student": None, "random_state": 3, "out": None}
    with pytest.raises(NotFittedError):
        made.predict(images)
    fitted = made.fit(images, y)
    assert fitted is made
    assert "fewlabels-" not in capsys.readouterr().err + repr(fitted.model_), "its folder is gone"
    assert fitted.classes_.tolist() == [0, 10, 20, 30]
    assert set(fitted.predict(images)) <= {0, 10, 20, 30}
    assert fitted.predict_proba(images).shape == (64, 4)
    assert fitted.transform(images).shape[0] == 64
    for ask in (fitted.predict, fitted.transform):
        with pytest.raises(UsageError, match=r"\(64, \d+\) are rows"):
            ask(images.reshape(64, -1))
    right = fitted.predict(images) == classes * 10
    assert fitted.score(images, classes * 10) == right.mean()
    few = np.where(np.arange(64) < 7, classes * 10, -1)  # what has no label is not counted
    for told in (few, np.array([str(v) if v >= 0 else -1 for v in few.tolist()], dtype=object)):
        assert fitted.score(images, told) == right[:7].mean()
    weighed = fitted.score(images, few, sample_weight=np.arange(64))
    assert weighed == pytest.approx((right[:7] * np.arange(7)).sum() / 21)
    assert fitted.score(images, few[:, None]) == right[:7].mean()
    for labels, weights in ((few[:1], None), (few, np.ones(65))):
        with pytest.raises(ValueError, match="inconsistent numbers of samples"):
            fitted.score(images, labels, sample_weight=weights)
    with pytest.raises(DataError, match="y holds no label"):
        fitted.score(images, np.full(64, -1))
    spaced = np.where(y < 0, "", np.char.add(y.astype(str), " "))  # names are told without spaces around them
    fractions = np.where(y < 0, np.nan, y)
    for told, names in ((spaced, ["0 ", "10 ", "20 ", "30 "]), (fractions, [0.0, 10.0, 20.0, 30.0])):
        named = fl.FewLabelClassifier(recipe="smoke", random_state=np.int64(3)).fit(images, told)
        assert named.classes_.tolist() == names
        assert (named.predict_proba(images) == fitted.predict_proba(images)).all()
    with pytest.raises(DataError, match="y holds no label"):
        made.fit(images, np.full(64, np.nan))
    with pytest.raises(UsageError, match="y is missing"):
        made.fit(images, None)
    with pytest.warns(DataConversionWarning):
        assert (made.fit(images, y[:, None]).predict_proba(images) == fitted.predict_proba(images)).all()
    with pytest.raises(DataError, match="an array of <U1"):  # paths, which have a better answer than rows
        fitted.predict(np.array(["a", "b"]))


def test_a_signal_ends_a_search_over_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """scikit-learn takes any Exception of a fit for a bad score, and goes on."""
    from sklearn.model_selection import GridSearchCV

    import fewlabels as fl
    from fewlabels import estimator

    def stopped(*_: Any, **__: Any) -> None:
        raise Stopped(signal.SIGTERM, "here")

    monkeypatch.setattr(estimator, "fit", stopped)
    search = GridSearchCV(fl.FewLabelClassifier(), {"random_state": [0, 1]}, cv=2)
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGTERM"):
        search.fit(np.zeros((8, 4, 4), np.uint8), [0, 1] * 4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["photos", "--recompute"], ["photos", "--recompute", "True"]),
        (["--recompute", "photos"], ["--recompute", "True", "photos"]),
        (["--recompute", "False", "x"], ["--recompute", "False", "x"]),
        (["--no-compile", "--shard"], ["--compile", "False", "--shard", "True"]),
        (["--distill.self_first", "--no-pretrain.blur"], ["--distill.self_first", "True", "--pretrain.blur", "False"]),
        (["--json", "--no-such"], ["--json", "--no-such"]),
        ([], []),
    ],
)
def test_a_switch_needs_no_value(words: list[str], told: list[str]) -> None:
    assert cli._spelled_out(words) == told


def test_another_set_of_images_takes_nothing_from_the_run_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "others", "held"):
        (tmp_path / name).mkdir()
    (tmp_path / "labels.csv").write_text("image,label\n")
    begun = Asked(images="photos", labels="labels.csv", test="held", out=Path("run"))
    facts = {"asked": begun.wishes(), "recipe": {}, "understood": {"labeled": 0}, "precision": "fp32"}
    facts |= {"inputs": begun.inputs(), "budget": [], "format_version": checkpoint.FORMAT_VERSION}
    (tmp_path / "run").mkdir()
    checkpoint.write_json(tmp_path / "run" / "resolved.json", facts)
    (tmp_path / "link").symlink_to("photos")
    for images in ("photos", "photos/", str(tmp_path / "photos"), "others/../photos", "link", None):
        found = on_command_line(images=images, out="run")
        assert (found.labels, found.test) == (str(tmp_path / "labels.csv"), str(tmp_path / "held")), images
    found = on_command_line(images="others", out="run")
    assert (found.images, found.labels, found.test) == ("others", None, None)


def test_the_command_to_paste_again_starts_as_many_processes_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/fewlabels", "fit", "my photos"])
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert command_line() == "fewlabels fit 'my photos'", "a cluster's, without torchrun"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert command_line() == "torchrun --nproc-per-node 8 -m fewlabels fit 'my photos'"


def test_a_command_alone_is_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fit"]) == 66


def test_a_path_that_cannot_be_is_no_bug(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["check", "a" * 300]) == 74
    (tmp_path / "file").write_text("")
    assert cli.main(["report", str(tmp_path / "file" / "run")]) in (66, 74)
    told = capsys.readouterr().err
    assert "File name too long" in told
    assert "this is a bug" not in told
