"""A model in use: every form of images, bounded chunks, unreadable images, and predictions as a table."""

from __future__ import annotations

import csv
import io
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import shapes_images
from fewlabels.data import tables, views
from fewlabels.data.sources import open_source
from fewlabels.errors import CannotCreate, DataError, MissingInput, UsageError
from fewlabels.use import artefact, predict
from fewlabels.use.predict import Model
from small_model import CLASSES, METRICS, run_of, small_card, small_model, small_network


@pytest.fixture(scope="module")
def model() -> Model:
    """A real, small classifier of four classes."""
    return small_model()


def test_probabilities_are_the_network_on_the_evaluation_view(model: Model) -> None:
    images, _ = shapes_images(9, size=20)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = small_network()(views.evaluate_image(pixels, size=16, kind="photo"))
    expected = torch.softmax(logits / 1.5, dim=1).numpy()
    found = model.predict_proba(images)
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, abs=1e-5)
    assert model.predict(images).tolist() == [CLASSES[i] for i in expected.argmax(axis=1)]
    assert len({tuple(row.round(3)) for row in expected}) > 4  # the model does tell images apart
    assert model.features(images).shape == (9, model.network.encoder.feature_dim)


def test_balanced_is_bayes_rule_with_classes_that_come_equally_often(tmp_path: Path) -> None:
    """A class without labels stays as it is, and what was balanced is not balanced again."""
    images, _ = shapes_images(9, size=20)
    for counts, shares in (((80, 15, 4, 1), [80, 15, 4, 1]), ((9, 0, 2, 1), [9, 9, 2, 1])):
        folder = artefact.save(tmp_path / str(counts), small_network(), small_card(labels_a_class=counts))
        plain, balanced = predict.load(folder, device="cpu"), predict.load(folder, device="cpu", balanced=True)
        assert plain.card.labels_a_class == counts
        expected = plain.predict_proba(images) / np.array(shares)
        expected /= expected.sum(axis=1, keepdims=True)
        assert balanced.predict_proba(images) == pytest.approx(expected, abs=1e-5)
        assert (balanced.predict(images) != plain.predict(images)).any()
        again = artefact.save(tmp_path / "again", balanced.network, balanced.card)
        assert predict.load(again, device="cpu").predict_proba(images) == pytest.approx(expected, abs=1e-5)
        with pytest.raises(UsageError, match="does not say how often"):
            predict.load(again, balanced=True)
    for unknown in ((), (0, 0, 0, 0)):
        folder = artefact.save(tmp_path / str(unknown), small_network(), small_card(labels_a_class=unknown))
        with pytest.raises(UsageError, match="does not say how often"):
            predict.load(folder, balanced=True)


def test_every_form_of_images_gives_the_same_answer(model: Model, tmp_path: Path) -> None:
    images, _ = shapes_images(6, size=24)
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    np.savez(tmp_path.parent / f"{tmp_path.name}.npz", images=images)
    expected = model.predict_proba(images)
    pictures = [Image.fromarray(image) for image in images]
    for form in (
        tmp_path, str(tmp_path), paths, tuple(map(str, paths)), pictures, list(images), [*pictures[:3], *images[3:]],
        tmp_path.parent / f"{tmp_path.name}.npz",
    ):  # fmt: skip
        assert model.predict_proba(form) == pytest.approx(expected, abs=1e-6)
    for one in (paths[2], str(paths[2]), images[2], pictures[2], [pictures[2]]):
        assert model.predict_proba(one) == pytest.approx(expected[2:3], abs=1e-6)


def test_gray_palette_and_sixteen_bit_pictures_look_as_they_should(model: Model) -> None:
    gray = np.linspace(0, 255, 400).reshape(20, 20).astype(np.uint8)
    expected = model.predict_proba(np.repeat(gray[..., None], 3, axis=2))
    picture = Image.fromarray(gray)
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    forms = [gray, gray[None], picture, deep, Image.fromarray(gray.astype(np.int32) * 257)]
    for form in (*forms, *map(picture.convert, ("P", "RGBA", "LA", "CMYK", "YCbCr", "F"))):
        assert model.predict_proba(form) == pytest.approx(expected, abs=0.01)


def test_mixed_sizes_keep_their_order_over_many_chunks(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "CHUNK", 5)
    images = [shapes_images(1, size=12 + i % 4, seed=i)[0][0] for i in range(23)]
    together = model.predict_proba(images)
    alone = np.concatenate([model.predict_proba(image) for image in images])
    assert together == pytest.approx(alone, abs=1e-5)


def test_large_pictures_are_seen_at_the_size_of_training(model: Model) -> None:
    image = np.repeat(np.repeat(shapes_images(1, size=48)[0][0], 20, axis=0), 20, axis=1)  # 960 pixels
    decoded = model._decode(image)
    assert isinstance(decoded, np.ndarray)
    assert decoded.shape == (48, 48, 3)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 3)),
        np.zeros((0, 8, 8, 3), np.uint8),
        [np.zeros((8, 8), np.int64)],
        [np.zeros((8, 8, 4), np.uint8)],
        [np.zeros((0, 4, 3), np.uint8)],
        [Image.new("RGB", (4, 4)), 7],
        3.5,
        None,
    ],
)
def test_what_is_no_image_is_refused(model: Model, images: object) -> None:
    with pytest.raises((DataError, UsageError)) as refusal:
        model.predict(images)
    assert "fix:" in str(refusal.value) or "why:" in str(refusal.value)


def _with_broken(folder: Path) -> Path:
    folder.mkdir()
    images, _ = shapes_images(3)
    for name, image in zip(("a.png", "c.png", "e.png"), images, strict=True):
        Image.fromarray(image).save(folder / name)
    (folder / "b.jpg").write_bytes(b"\xff\xd8\xff\xe0broken")
    (folder / "d.png").write_bytes(b"")
    return folder


def test_an_alpha_channel_is_no_stack_of_gray_images(model: Model) -> None:
    picture = np.zeros((33, 21, 4), dtype=np.uint8)
    with pytest.raises(UsageError, match=r"\(33, 21, 4\) is a picture with an alpha channel"):
        model.predict(picture)
    assert model.predict(picture[..., :3]).shape == (1,)
    assert model.predict(picture[..., None]).shape == (33,)


def test_unreadable_images_are_all_named(model: Model, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refusal:
        model.predict_proba(_with_broken(tmp_path / "images"))
    text = str(refusal.value)
    assert "2 of 5 images" in text and "b.jpg" in text and "d.png: empty" in text


def test_each_goes_on_past_them_and_skips_what_is_not_wanted(model: Model, tmp_path: Path) -> None:
    found = list(model.each(_with_broken(tmp_path / "images"), keep=[True, True, False, True, True]))
    assert [bool(p.error) for p in found] == [False, True, False, True, False]
    assert [p.probabilities is None for p in found] == [False, True, True, True, False]


# --- loading ---


def test_load_takes_a_run_or_its_model(tmp_path: Path) -> None:
    artefact.save(tmp_path / "run" / "model", small_network(), small_card(metrics=METRICS))
    images, _ = shapes_images(4)
    for folder in (tmp_path / "run", str(tmp_path / "run" / "model")):
        model = predict.load(folder, device="cpu")
        assert (model.classes, model.size, model.metrics) == (CLASSES, 16, METRICS)
        assert model.predict_proba(images) == pytest.approx(small_model().predict_proba(images), abs=1e-6)
        assert "4 classes" in repr(model)


def test_load_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="does not exist"):
        predict.load(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(MissingInput, match="is a file"):
        predict.load(tmp_path / "file")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(MissingInput, match=r"cat\.jpg"):
        predict.load(tmp_path / "photos")
    (tmp_path / "run" / "pretrain").mkdir(parents=True)
    (tmp_path / "run" / "status.json").write_text("{}")
    with pytest.raises(MissingInput, match="no model yet") as refusal:
        predict.load(tmp_path / "run")
    assert "pretrain/" in str(refusal.value) and "goes on" in str(refusal.value)


# --- predictions as a table ---


def test_predictions_become_a_table(model: Model, tmp_path: Path) -> None:
    folder, out = _with_broken(tmp_path / "images"), tmp_path / "deep" / "out.csv"
    summary = predict.write_predictions(model, folder, out)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "label", "confidence", *(f"p:{name}" for name in CLASSES), "error"]
    assert [Path(row["image"]).name for row in rows] == ["a.png", "b.jpg", "c.png", "d.png", "e.png"]
    expected = model.predict_proba([folder / name for name in ("a.png", "c.png", "e.png")])
    for row, wanted in zip([r for r in rows if not r["error"]], expected, strict=True):
        assert [float(row[f"p:{name}"]) for name in CLASSES] == pytest.approx(wanted.tolist(), abs=1e-6)
        assert row["label"].removeprefix("'") == CLASSES[wanted.argmax()]
        assert float(row["confidence"]) == pytest.approx(wanted.max(), abs=1e-6)
    assert rows[3]["error"].startswith("empty") and rows[3]["label"] == rows[3]["p:red disc"] == ""
    assert (summary["images"], summary["predicted"], summary["unreadable"]) == (5, 3, 2)
    assert sum(summary["counts"].values()) == 3
    assert [p.name for p in out.parent.iterdir()] == ["out.csv"]


FORMULAS = [
    "=1+1", '=HYPERLINK("http://x","y")', "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "=cmd|' /C calc'!A0",
    " =1", "\n=1", "\0=1", "\N{FULLWIDTH EQUALS SIGN}1",
]  # fmt: skip


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_is_a_formula(text: str) -> None:
    found = tables.cell(text)
    assert not found.lstrip().startswith(("=", "+", "-", "@", "\N{FULLWIDTH EQUALS SIGN}"))
    assert found.isprintable()


def test_names_of_files_and_classes_cannot_become_formulas(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("=1+1.png", "@x.png", "-a,b.png", 'quote".png'):
        Image.new("RGB", (8, 8)).save(folder / name)
    model = Model(small_network(), small_card(classes=("=a", "+b", "-c", "@d")), device="cpu")
    cwd = Path.cwd()
    os.chdir(folder)
    try:
        predict.write_predictions(model, sorted(p.name for p in folder.iterdir()), tmp_path / "out.csv")
    finally:
        os.chdir(cwd)
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 5 and {len(row) for row in rows} == {8}
    assert all(not c.startswith(("=", "+", "-", "@")) for row in rows for c in row)
    assert rows[1][0] == "'-a,b.png"


def test_a_table_is_written_whole_or_not_at_all(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, before = tmp_path / "out.csv", "image,label,confidence,p:a,error\n"
    out.write_text(before)
    with pytest.raises(UsageError, match="is a folder"):
        predict.write_predictions(model, np.zeros((1, 8, 8, 3), np.uint8), tmp_path)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        predict.write_predictions(model, np.zeros((1, 8, 8, 3), np.uint8), out)
    assert out.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.csv"]


@pytest.mark.parametrize("text", ["image,label\na.png,cat\n", "image,label,split\n", "my notes"])
def test_a_file_that_is_no_table_of_predictions_is_kept(model: Model, tmp_path: Path, text: str) -> None:
    """A labels table, the work of days, was replaced without a word."""
    (tmp_path / "out.csv").write_text(text)
    with pytest.raises(CannotCreate, match="is there already"):
        predict.write_predictions(model, np.zeros((1, 8, 8, 3), np.uint8), tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == text
    (tmp_path / "out.csv").write_text("")
    for _ in range(2):  # an empty file holds nothing, and predictions are made anew
        assert predict.write_predictions(model, np.zeros((1, 8, 8, 3), np.uint8), tmp_path / "out.csv")["images"] == 1


def test_a_model_that_is_only_pretrained_says_the_way_on(tmp_path: Path) -> None:
    """In its run `fit` goes on; --pretrained is for a model that came from elsewhere."""
    inside = run_of(tmp_path / "a run", open_source(shapes_images(8)[0]), ())
    shutil.copytree(inside, tmp_path / "model")
    fixes = {"a run": f"fit --labels CSV --out '{tmp_path / 'a run'}'", "model": "--pretrained THIS --out RUN"}
    for name, fix in fixes.items():
        with pytest.raises(UsageError, match="an encoder without a classifier") as raised:
            predict.load(tmp_path / name, device="cpu").predict(shapes_images(1)[0])
        assert fix in raised.value.fix


def test_a_pipe_is_written_to_and_stays(model: Model, tmp_path: Path) -> None:
    """As /dev/stdout does: root's rename put a file in its place."""
    images, read = np.zeros((2, 8, 8, 3), np.uint8), list[str]()
    os.mkfifo(tmp_path / "pipe")
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    predict.write_predictions(model, images, tmp_path / "pipe")
    reader.join(timeout=30)
    predict.write_predictions(model, images, tmp_path / "file.csv")
    assert read == [(tmp_path / "file.csv").read_bytes().decode().replace("\r\n", "\n")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.csv", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_a_picture_that_cannot_be_read_is_named_by_its_place(model: Model) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "PNG")
    truncated = Image.open(io.BytesIO(file.getvalue()[:2000]))  # PIL reads its pixels later
    with pytest.raises(DataError, match="1 of 2 images cannot be read") as refused:
        model.predict([Image.new("RGB", (8, 8)), truncated])
    assert refused.value.details[0].startswith("image-000001: damaged")


def test_a_picture_that_was_not_read_yet_stays_as_it_is(model: Model) -> None:
    """A JPEG is decoded at its own size, not at that of the model, and one picture may stand in a list twice."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)).save(file, "JPEG")
    picture = Image.open(file)
    found = model.predict_proba([picture] * 40)
    assert picture.size == (800, 600)
    assert (found == model.predict_proba([np.asarray(Image.open(file))] * 40)).all()


def test_an_orientation_that_was_set_in_memory_counts(model: Model) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    turned = Image.fromarray(image)
    turned.getexif()[0x0112] = 6  # 90 degrees clockwise to be upright
    assert (model.predict_proba([turned]) == model.predict_proba([np.rot90(image, -1).copy()])).all()
    assert (model.predict_proba([turned]) != model.predict_proba([image])).any()


def test_pictures_that_are_not_there_are_no_unreadable_ones(model: Model, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(MissingInput, match="1 of the pictures are not there") as refused:
        predict.write_predictions(model, [str(tmp_path / "a.png"), str(tmp_path / "b.png")], tmp_path / "p.csv")
    assert refused.value.details[0].endswith("b.png")
    assert not (tmp_path / "p.csv").exists()


def test_a_list_of_gray_arrays_with_a_channel(model: Model) -> None:
    gray = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
    assert (model.predict_proba(list(gray)) == model.predict_proba(list(gray[..., 0]))).all()
    assert (model.predict_proba(gray[0]) == model.predict_proba(gray[:1])).all(), "one image, not eight of one pixel"
