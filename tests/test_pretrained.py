"""A published checkpoint in use: imported, evaluated, fine-tuned, distilled and exported, and every mistake with it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fewlabels as fl
import tensorbundle_writer as writer
from conftest import same, shapes_images
from fewlabels import cli, config
from fewlabels.asked import Asked, resolve
from fewlabels.data import labels, pixels, views
from fewlabels.data.sources import open_source
from fewlabels.errors import CannotCreate, DataError, MissingInput, UsageError
from fewlabels.model.reference import load_reference
from fewlabels.recipes import Facts
from fewlabels.use import artefact, evaluate
from fewlabels.use.imported import import_reference
from fewlabels.use.learned import without_learned
from model.test_reference import variables
from small_model import run_of

NAMES = ["zero", "one", "two", "three"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the form of a published one: four classes on tap 1, with an optimizer's slot."""
    arrays = variables(classes=4) | {"global_step": np.int64(751)}
    slot = {"base_model/conv2d/kernel/Momentum": arrays["base_model/conv2d/kernel"]}
    return writer.write(tmp_path_factory.mktemp("published") / "model.ckpt-751", arrays | slot)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 unlabeled images and 20 for testing, in class folders that are called as the classes are."""
    root = tmp_path_factory.mktemp("photos")
    images, classes = shapes_images(80, size=40)
    for i, (image, label) in enumerate(zip(images, classes, strict=True)):
        place = root / "test" / NAMES[label] if i >= 60 else root / "train" / NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def model(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    (root / "names.txt").write_text("\n".join(NAMES), encoding="utf-8-sig")  # as Windows saves it
    return import_reference(published, root / "imported", classes=root / "names.txt")[0]


@pytest.fixture
def unlabeled(photos: Path, tmp_path: Path) -> Path:
    """The training images without their class folders."""
    for path in sorted((photos / "train").rglob("*.png")):
        (tmp_path / "unlabeled").mkdir(exist_ok=True)
        (tmp_path / "unlabeled" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "unlabeled"


def test_the_imported_model_is_the_reference(published: Path, model: Path, photos: Path) -> None:
    found = fl.load(model)
    assert (found.classes, found.size, found.card.kind, found.card.tap) == (tuple(NAMES), 32, "reference_tf1", 1)
    _, _, classifier = load_reference(published)
    image = np.array(Image.open(next((photos / "test").rglob("*.png"))))
    view = views.evaluate_image(torch.from_numpy(image).permute(2, 0, 1)[None], size=32, kind="reference_tf1")
    with torch.no_grad():
        assert found.predict_proba(image) == pytest.approx(classifier(view).softmax(1).numpy(), abs=1e-6)


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_it_can_be_exported(model: Path, tmp_path: Path, format: str) -> None:
    from fewlabels.use import export

    if format == "onnx":
        pytest.importorskip("onnxruntime")
    assert export.export(fl.load(model), tmp_path, format=format).stat().st_size > 1000  # compared in there, to 1e-4


def test_the_command_line_names_what_was_not_read(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["import", str(published), "--out", str(tmp_path / "m")]) == 0
    told = capsys.readouterr().out
    assert "classifier of 4 classes on tap 1: it made 751 steps" in told
    assert "not read: 1 slots of the optimizer, such as base_model/conv2d/kernel/Momentum" in told
    assert cli.main(["import", str(published), "--out", str(tmp_path / "m"), "--json"]) == 0  # it replaces a model
    assert json.loads(capsys.readouterr().out)["unread"] == ["base_model/conv2d/kernel/Momentum"]
    assert fl.load(tmp_path / "m").classes == ("0", "1", "2", "3")
    assert cli.main(["evaluate", str(tmp_path / "m"), str(tmp_path)]) in (65, 66)


def test_every_layer_of_the_head_is_kept(published: Path, model: Path) -> None:
    _, head, card = artefact.read_whole(model)
    expected = load_reference(published).projection_head
    assert card.whole_head
    assert head is not None
    assert expected is not None
    assert same(head.state_dict(), expected.state_dict())


def test_finetuned_and_distilled_from_it(model: Path, photos: Path, tmp_path: Path) -> None:
    run = fl.fit(photos, out=tmp_path / "run", recipe="smoke", pretrained=str(model), finetune={"tap": 2})
    keys = [row["key"] for row in run.metrics["rows"]]
    assert keys == ["most_frequent", "pixels_logistic", "supervised", *(f"tap{k}_logistic" for k in range(4)),
                    "finetune", "distill"]  # fmt: skip
    assert not (run.path / "pretrain").exists()
    resolved = json.loads(run.path.joinpath("resolved.json").read_text())
    assert resolved["recipe"]["pretrained"] == str(model)
    assert resolved["recipe"]["encoder"] == "resnet18_0.125x_small"
    assert set(resolved["derived"]) == {"finetune", "distill"}


def test_fine_tuning_starts_from_its_weights(model: Path, photos: Path, tmp_path: Path) -> None:
    run = fl.fit(
        photos, out=tmp_path / "run", recipe="smoke", pretrained=str(model), until="finetune",
        finetune={"freeze_below": 4},
    )  # fmt: skip
    before, after = artefact.read(model)[0], run.model.network
    assert same(before.encoder.state_dict(), after.encoder.state_dict())  # frozen, so it is what was given
    assert not same(before.head.state_dict(), after.head.state_dict())
    assert after.tap == 1


def test_what_fine_tuning_froze_learns_where_the_network_teaches_itself(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    gently = {"epochs": 1, "optimizer": "adamw", "learning_rate": 1e-4, "scaling": "none"}
    run = fl.fit(
        photos, out=tmp_path / "run", recipe="smoke", pretrained=str(model),
        finetune={**gently, "freeze_below": 4, "tap": 0}, distill={**gently, "self_training": 0.3},
    )  # fmt: skip
    before, after = (dict(read.encoder.named_parameters()) for read in (artefact.read(model)[0], run.model.network))
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_the_same_command_again_goes_on_and_other_weights_are_refused(
    model: Path, published: Path, photos: Path, tmp_path: Path
) -> None:
    once = fl.fit(photos, out=tmp_path / "run", recipe="smoke", pretrained=str(model))
    before = once.metrics
    assert fl.fit(photos, out=tmp_path / "run", recipe="smoke", pretrained=str(model)).metrics["rows"][-1][
        "accuracy"
    ] == pytest.approx(before["rows"][-1]["accuracy"])
    other, _, _ = import_reference(
        writer.write(tmp_path / "other", variables(classes=4, seed=5)), tmp_path / "other_model"
    )
    with pytest.raises(CannotCreate, match="another run"):
        fl.fit(photos, out=tmp_path / "run", recipe="smoke", pretrained=str(other))


def test_a_pretraining_that_never_ran_is_no_reason_to_refuse(model: Path, photos: Path, tmp_path: Path) -> None:
    """The recipe's own pretraining may be another in a newer version, as four views of photos were."""
    out = tmp_path / "run"
    fl.fit(photos, out=out, recipe="smoke", pretrained=str(model), until="finetune", pretrain={"smallest_crop": 0.3})
    run = fl.fit(photos, out=out, recipe="smoke", pretrained=str(model), distill={"epochs": 1})
    assert {row["key"] for row in run.metrics["rows"]} >= {"finetune", "distill"}


def test_without_labels_its_own_classifier_teaches(model: Path, unlabeled: Path, photos: Path, tmp_path: Path) -> None:
    wishes: dict[str, Any] = {
        "test": photos / "test", "out": tmp_path / "run", "recipe": "smoke", "pretrained": str(model),
        "student": "resnet18_0.25x_small", "distill": {"self_first": False},
    }  # fmt: skip
    run = fl.fit(unlabeled, **wishes)
    rows = {row["key"]: row for row in run.metrics["rows"]}
    assert list(rows) == ["finetune", "distill"]
    assert rows["finetune"]["name"] == "the given model"
    assert run.model.classes == tuple(NAMES)
    assert run.model.card.encoder == "resnet18_0.25x_small"
    teacher = fl.load(model)
    truth = [path.parent.name for path in sorted((photos / "test").rglob("*.png"))]
    predicted = teacher.predict(sorted((photos / "test").rglob("*.png")))
    assert rows["finetune"]["accuracy"] == pytest.approx(float(np.mean(predicted == np.array(truth))))
    assert not (run.path / "finetune").exists()
    assert (run.path / "report.html").is_file()
    shutil.rmtree(run.path / "data")  # read anew, by the classes of the model
    shutil.rmtree(run.path / "model")
    again = fl.fit(unlabeled, **wishes)
    assert again.metrics["rows"] == run.metrics["rows"]


def test_a_model_that_learned_these_labels_is_not_judged_on_them(photos: Path, tmp_path: Path) -> None:
    """Its features tell them apart: cross-validated on itself it was right in all of them, and as sure."""
    images, classes = shapes_images(40, size=16)
    once = fl.fit(images, classes, out=tmp_path / "once", recipe="smoke", until="finetune")
    rows = {row["key"]: row for row in once.metrics["rows"]}
    assert rows["tap0_logistic"]["cross_validated"]
    more = {"pretrained": str(once.path), "distill": {"epochs": 1, "self_training": 0.3}}
    again = fl.fit(images, np.where(classes == 3, -1, classes), out=tmp_path / "again", recipe="smoke", **more)
    rows = {row["key"]: row for row in again.metrics["rows"]}
    assert [key for key in rows if key.startswith("tap")] == ["tap0_logistic", "tap1_logistic"], (
        "the others are not kept"
    )
    for key in ("tap0_logistic", "tap1_logistic"):
        assert rows[key]["accuracy"] is None
        assert "may have learned these labels" in rows[key]["note"]
    assert rows["pixels_logistic"]["cross_validated"]
    assert again.metrics["temperature"] == 1
    assert "trained, but not measured" in again.report().read_text()
    assert "Its features are not measured: the given model may have learned these labels" in again.report().read_text()
    other = fl.fit(
        images, np.char.add("class ", classes.astype(str)), out=tmp_path / "other", recipe="smoke", until="finetune",
        pretrained=str(once.path),
    )  # fmt: skip
    assert {row["key"]: row for row in other.metrics["rows"]}["tap0_logistic"]["cross_validated"]


def test_held_out_images_that_the_given_run_has_learned_do_not_count(tmp_path: Path) -> None:
    """100 % of them were right, and 74 % of new ones. Also where that run had begun with the one that learned them."""
    images, classes = shapes_images(40, size=16)
    once = run_of(tmp_path / "once", open_source(images[:32], [*classes[:16], *[-1] * 16]), NAMES)
    again = run_of(tmp_path / "again", open_source(images[20:22], [0, 1]), NAMES, pretrained=str(once))
    bare = run_of(tmp_path / "bare", open_source(images[:32], [*classes[:16], *[-1] * 16]), ())
    rows, held = np.r_[:8, 12:28], np.r_[8:12, 28:40]  # 4 were learned, 4 seen, 8 are new
    source = open_source(images[rows], classes[rows], test=(images[held], classes[held]))
    store, kept, _ = pixels.build(source, tmp_path / "data", working_size=16, bad_csv=tmp_path / "b", threads=1)
    dataset = labels.assemble(source, store, kept)
    for given, learned, saw in ((once, 4, 4), (again, 4, 4), (bare, 0, 8)):
        found = without_learned(dataset, given)
        assert found.understood.held_out == len(found.held_out) == 16 - learned
        assert set(dataset.held_out) - set(found.held_out) == set(range(24, 24 + learned))
        assert (found.labels[:24] == dataset.labels[:24]).all()
        told = dict(note.rsplit(": ", 1) for note in found.understood.notes if str(given) in note)
        assert [told[f"held-out images that {given} was trained on without their labels"]] == [str(saw)]
        assert told.get(f"held-out images that do not count, since {given} has learned their labels", "0") == str(
            learned
        )
    shutil.rmtree(tmp_path / "once" / "data")
    assert "again/model does not say whether" in without_learned(dataset, again).understood.notes[-1]


def test_a_student_that_begins_as_its_frozen_teacher_learns(model: Path, unlabeled: Path, tmp_path: Path) -> None:
    card = fl.load(model).card
    run = fl.fit(
        unlabeled, out=tmp_path / "run", recipe="smoke", pretrained=str(model), student=card.encoder,
        distill={"start": "pretrained", "epochs": 1},
    )  # fmt: skip
    assert (run.path / "distill_self").is_dir()
    before, after = (dict(read.encoder.named_parameters()) for read in (artefact.read(model)[0], run.model.network))
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_sizes_in_a_recipe_file_count_as_options_do(model: Path, unlabeled: Path, tmp_path: Path) -> None:
    """They were replaced by those of the given model without a word."""
    wishes: dict[str, Any] = {"pretrained": str(model), "recipe": "smoke", "until": "distill", "size": 24}
    run = fl.fit(unlabeled, out=tmp_path / "run", **wishes)
    assert run.model.size == 24
    again = fl.fit(unlabeled, out=tmp_path / "again", recipe=run.path / "recipe.toml", until="distill")
    assert again.model.size == 24
    fl.fit(unlabeled, out=run.path, pretrained=str(model), recipe="smoke", until="distill", budget="1m")
    assert fl.load(run.path).size == 24, "what a begun stage has stays, whatever is asked for later"
    (tmp_path / "other.toml").write_text('encoder = "resnet18_small"\n[finetune]\ntap = 3\n')
    with pytest.raises(UsageError, match="resnet18_small was asked for"):
        fl.fit(unlabeled, out=tmp_path / "other", recipe=str(tmp_path / "other.toml"), pretrained=str(model))


def test_values_are_plain_however_they_are_given(model: Path, tmp_path: Path) -> None:
    """numpy's numbers could not be written, texts not be multiplied."""
    values = {"pretrained": str(model), "size": "24", "working_size": np.int64(40), "finetune": {"tap": "1"}}
    wishes = Asked(images=tmp_path, out=tmp_path, recipe="smoke", overrides=values)
    facts = Facts(images=60, labeled=20, classes=4, side=40, gray=False, on_gpu=False, threads=1)
    found = resolve(wishes, facts, None, set())
    assert (found.size, found.working_size, found.finetune.tap) == (24, 40, 1)
    assert config.from_dict(json.loads(json.dumps(asdict(found)))) == found
    assert resolve(replace(wishes, overrides={**values, "working_size": None}), facts, None, set()).working_size == 36
    on_photos = replace(wishes, recipe="best", overrides={"pretrained": str(model)})
    assert resolve(on_photos, replace(facts, side=32), None, set()).resolution == 1, "nothing pretrains"
    large = replace(on_photos, overrides={"pretrained": str(model), "size": 128})
    assert resolve(large, replace(facts, side=500), None, set()).working_size == 192, "not that of the model's own size"


def test_a_budget_and_check_know_what_is_left(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["check", str(photos), "--pretrained", str(model), "--recipe", "smoke", "--out", str(tmp_path / "x")]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    assert "distill: about" in told
    assert "pretrain: about" not in told
    run = fl.fit(photos, out=tmp_path / "run", recipe="best", pretrained=str(model), budget="8s")
    assert [line for line in json.loads((run.path / "resolved.json").read_text())["equations"] if "x 0 s" in line] == []


# --- mistakes --------------------------------------------------------------------------------------------------


def test_wrong_wishes_are_told_before_training(model: Path, photos: Path, tmp_path: Path) -> None:
    start = {"out": tmp_path / "run", "recipe": "smoke", "pretrained": str(model)}
    with pytest.raises(UsageError, match=r"the model in .* is resnet18_0\.125x_small"):
        fl.fit(photos, **start, encoder="resnet50")
    headless = import_reference(writer.write(tmp_path / "v1", variables(layers=0)), tmp_path / "v1_model")[0]
    with pytest.raises(UsageError, match="keeps 0 layers"):
        fl.fit(photos, **{**start, "pretrained": str(headless)}, finetune={"tap": 2})
    with pytest.raises(UsageError, match="takes its place"):
        fl.fit(photos, **start, until="pretrain")
    with pytest.raises(UsageError, match="no student of another size"):
        fl.fit(photos, **start, distill={"temperature": 0.5})
    with pytest.raises(MissingInput, match="does not exist"):
        fl.fit(photos, out=tmp_path / "run", recipe="smoke", pretrained=str(tmp_path / "none"))
    assert not (tmp_path / "run" / "finetune").exists()


def test_strange_classes_of_the_test_images(model: Path, unlabeled: Path, photos: Path, tmp_path: Path) -> None:
    strange = tmp_path / "test" / "Zero"
    strange.mkdir(parents=True)
    image = next((photos / "test").rglob("*.png"))
    (strange / "a.png").write_bytes(image.read_bytes())
    with pytest.raises(DataError, match="does not know") as caught:
        fl.fit(unlabeled, test=tmp_path / "test", out=tmp_path / "r", recipe="smoke", pretrained=str(model))
    assert caught.value.details == ('"Zero" (did you mean "zero"?)',)


def test_an_encoder_without_classifier(unlabeled: Path, photos: Path, tmp_path: Path) -> None:
    arrays = {name: array for name, array in variables().items() if "supervised" not in name}
    folder, card, _ = import_reference(writer.write(tmp_path / "enc", arrays), tmp_path / "model")
    assert card.classes == ()
    found = fl.load(folder)
    assert found.features(shapes_images(3)[0]).shape == (3, found.network.encoder.feature_dim)
    for ask in (found.predict, found.predict_proba, lambda images: list(found.each(images))):
        with pytest.raises(UsageError, match="without a classifier"):
            ask(shapes_images(3)[0])
    assert cli.main(["export", str(folder)]) == 2
    with pytest.raises(UsageError, match="without a classifier"):  # and not that its classes are unknown ones
        evaluate.evaluate_run(found, photos)
    with pytest.raises(DataError, match="there is nothing to do"):
        fl.fit(unlabeled, out=tmp_path / "run", recipe="smoke", pretrained=str(folder))
    run = fl.fit(photos, out=tmp_path / "labeled", recipe="smoke", pretrained=str(folder))
    assert run.model.classes == tuple(sorted(NAMES))
    notes = json.loads((run.path / "resolved.json").read_text())["understood"]["notes"]
    assert f"{folder} does not say whether it knows more of the held-out images" in notes
    text = (folder / "README.md").read_text()
    for words in (
        "pipeline_tag: image-feature-extraction",
        "# Image encoder",
        "Not measured here: it does not classify",
    ):
        assert words in text
    assert "one of its classes" not in text


def test_a_run_that_only_pretrained_is_one(unlabeled: Path, photos: Path, tmp_path: Path) -> None:
    alone = fl.fit(unlabeled, out=tmp_path / "alone", recipe="smoke")
    found = alone.model
    assert (found.classes, found.card.whole_head) == ((), True)
    assert np.isfinite(found.features(shapes_images(3)[0])).all()
    tuned = fl.fit(photos, out=tmp_path / "tuned", recipe="smoke", pretrained=str(alone.path), until="finetune",
                   finetune={"freeze_below": 4, "tap": 2})  # fmt: skip
    assert same(tuned.model.network.encoder.state_dict(), found.network.encoder.state_dict())


@pytest.mark.parametrize(
    ("text", "fault"),
    [("a\nb\nc", "3 names for the classifier's 4 outputs"), ("a\nb\na\nd", "also in line 1"), ("a\n\nb\nc", "empty")],
)
def test_names_that_do_not_fit(published: Path, tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(DataError) as caught:
        import_reference(published, tmp_path / "m", classes=tmp_path / "names.txt")
    assert fault in str(caught.value)
    assert not (tmp_path / "m").exists()


def test_synsets_of_a_list_of_files_are_the_classes(published: Path, tmp_path: Path) -> None:
    (tmp_path / "1percent.txt").write_text("".join(f"n{k:08d}_{n}.JPEG\n" for n in (7, 3) for k in (40, 10, 30, 20)))
    _, card, _ = import_reference(published, tmp_path / "m", classes=tmp_path / "1percent.txt")
    assert card.classes == ("n00000010", "n00000020", "n00000030", "n00000040")


def test_an_output_that_is_something_else_is_left_alone(published: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(CannotCreate, match="holds something else"):
            import_reference(published, out)
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("strange", ["thesis.tex", "photos/1.jpg", "model.json", "README.md"])
def test_only_a_whole_model_and_nothing_else_is_replaced(published: Path, tmp_path: Path, strange: str) -> None:
    """TensorFlow.js calls its model model.json too: the folder of such an app was deleted."""
    (tmp_path / "m" / strange).parent.mkdir(parents=True)
    (tmp_path / "m" / strange).write_text("precious")
    (tmp_path / "m" / ("manifest.json" if strange == "model.json" else "model.json")).write_text("{}")
    with pytest.raises(CannotCreate, match="holds something else"):
        import_reference(published, tmp_path / "m")
    assert (tmp_path / "m" / strange).read_text() == "precious"


def test_classes_without_names_are_the_numbers_that_labels_are(tmp_path: Path) -> None:
    """They were "00" to "11", and an array's labels are 0 to 11: every class was unknown."""
    folder, card, _ = import_reference(writer.write(tmp_path / "twelve", variables(classes=12)), tmp_path / "m")
    assert card.classes == tuple(map(str, range(12)))
    images, _ = shapes_images(24)
    assert evaluate.evaluate_run(fl.load(folder), images, np.arange(24) % 12)["n"] == 24
    assert "Not measured here: no labeled images were held out." in (folder / "README.md").read_text()
