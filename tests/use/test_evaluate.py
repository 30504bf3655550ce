"""Metrics against hand-made numbers, loops and scikit-learn's own; baselines against facts."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score

from conftest import shapes_images
from fewlabels.data.sources import open_source
from fewlabels.errors import DataError
from fewlabels.use import evaluate, predict
from fewlabels.use.predict import Model
from small_model import run_of, small_model


@pytest.fixture(scope="module")
def model() -> Model:
    """A real, small classifier of four classes."""
    return small_model()


def _predictions(n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    logits = rng.normal(0, 1, (n, k))
    logits[np.arange(n), labels] += 1.2
    shares = np.exp(logits)
    return shares / shares.sum(axis=1, keepdims=True), labels, tuple(f"class {i}" for i in range(k))


# --- intervals ---


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),  # z^2 / (n + z^2) = 3.841459 / 13.841459
        (10, 10, 0.722467, 1.0),
        (5, 10, 0.236593, 0.763407),
        (81, 263, 0.2553, 0.3662),  # this and the next three: Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_is_that_of_the_literature(correct: int, total: int, low: float, high: float) -> None:
    found = evaluate.wilson_interval(correct, total)
    assert found == pytest.approx((low, high), abs=5.1e-5)


def test_wilson_interval_solves_its_quadratic_equation() -> None:
    """Its ends are the p with |correct/n - p| = z sqrt(p (1 - p) / n)."""
    for correct, total in ((3, 17), (450, 597), (1, 2)):
        for level, z in ((0.95, 1.959963985), (0.9, 1.644853627)):
            for p in evaluate.wilson_interval(correct, total, level):
                assert abs(correct / total - p) == pytest.approx(z * math.sqrt(p * (1 - p) / total), rel=1e-6)


def test_wilson_interval_of_nothing_says_nothing() -> None:
    assert evaluate.wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_interval_covers_the_truth_about_as_often_as_promised() -> None:
    rng = np.random.default_rng(0)
    counts = rng.binomial(40, 0.9, 4000)
    inside = [low <= 0.9 <= high for low, high in (evaluate.wilson_interval(int(c), 40) for c in counts)]
    assert 0.93 < np.mean(inside) < 0.98


# --- measure ---


def test_measure_agrees_with_scikit_learn() -> None:
    probabilities, labels, classes = _predictions(400, 7)
    found = evaluate.measure(probabilities, labels, classes)
    predicted = probabilities.argmax(axis=1)
    assert found["top1"]["accuracy"] == pytest.approx((predicted == labels).mean())
    assert found["top1"]["interval"] == list(evaluate.wilson_interval(found["top1"]["correct"], 400))
    assert found["confusion"] == confusion_matrix(labels, predicted).tolist()
    for index, row in enumerate(found["per_class"]):
        hits = ((predicted == index) & (labels == index)).sum()
        precision, recall = hits / (predicted == index).sum(), hits / (labels == index).sum()
        assert (row["precision"], row["recall"]) == pytest.approx((precision, recall))
        assert row["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
        assert (row["n"], row["name"]) == ((labels == index).sum(), classes[index])
    assert found["mean_recall"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert found["nll"] == pytest.approx(log_loss(labels, probabilities))
    assert found["top5"]["accuracy"] == pytest.approx(top_k_accuracy_score(labels, probabilities, k=5))
    assert found["brier"] == pytest.approx(((np.eye(7)[labels] - probabilities) ** 2).sum(axis=1).mean())


def test_calibration_error_agrees_with_a_loop() -> None:
    probabilities, labels, classes = _predictions(300, 4)
    found = evaluate.measure(probabilities, labels, classes)
    error = 0.0
    for i in range(15):
        inside = [
            (row.max(), row.argmax() == label)
            for row, label in zip(probabilities, labels, strict=True)
            if i / 15 < row.max() <= (i + 1) / 15
        ]
        if inside:
            confidence, right = np.mean([c for c, _ in inside]), np.mean([r for _, r in inside])
            error += len(inside) / 300 * abs(confidence - right)
            assert found["reliability"][i] == pytest.approx(
                {"low": i / 15, "high": (i + 1) / 15, "n": len(inside), "confidence": confidence, "accuracy": right}
            )
    assert found["ece"] == pytest.approx(error)
    assert sum(b["n"] for b in found["reliability"]) == 300
    assert "top5" not in found


def test_what_is_undefined_is_none_and_certainty_is_survived() -> None:
    probabilities = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    found = evaluate.measure(probabilities, np.array([0, 1]), ["a", "b", "c"])
    shares = [(row["precision"], row["recall"], row["f1"], row["n"]) for row in found["per_class"]]
    assert shares == [(0.5, 1.0, pytest.approx(2 / 3), 1), (None, 0.0, 0.0, 1), (None, None, None, 0)]
    assert {type(row["n"]) for row in found["per_class"]} == {int}, "as JSON has it"
    absent = evaluate.measure(probabilities[:, ::-1], np.array([0, 1]), ["a", "b", "c"])["per_class"][2]
    assert (absent["precision"], absent["recall"], absent["f1"]) == (0.0, None, 0.0)
    assert found["mean_recall"] == pytest.approx(0.5), "of the classes that there are"
    assert math.isfinite(found["nll"]) and found["nll"] > 40  # -log of the smallest float32, halved
    assert found["brier"] == pytest.approx(1.0)
    assert found["ece"] == pytest.approx(0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_measure_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(DataError, match=r"not finite(.|\n)*fix:"):
        evaluate.measure(np.array([[1.0, 0.0], [0.5, value]]), np.array([0, 1]), "ab")


# --- baselines ---


def test_most_frequent_counts_labels() -> None:
    shares = evaluate.most_frequent(np.array([2, 2, 0]), 4)
    assert shares.tolist() == pytest.approx([1 / 3, 0, 2 / 3, 0])
    assert shares.dtype == np.float32


def _digits(per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    train = np.concatenate([rng.permutation(np.flatnonzero(y == c))[:per_class] for c in range(10)])
    test = np.setdiff1d(np.arange(len(y)), train)
    return x[train], y[train], x[test], y[test]


def test_logistic_regression_reaches_what_twenty_digits_allow() -> None:
    scores = []
    for seed in range(4):
        x, y, x_test, y_test = _digits(2, seed)
        fitted = evaluate.logistic_regression(x, y, num_classes=10)
        probabilities = fitted.predict_proba(x_test)
        assert probabilities.shape == (len(y_test), 10)
        assert probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)
        scores.append((probabilities.argmax(axis=1) == y_test).mean())
    assert np.mean(scores) > 0.74  # 76 % over many draws; standardised columns get 70 %


def test_logistic_regression_ignores_scale_and_dead_columns() -> None:
    x, y, x_test, _ = _digits(2, 0)
    plain = evaluate.logistic_regression(x, y, num_classes=10).predict_proba(x_test)
    scaled = evaluate.logistic_regression(x * 1e4, y, num_classes=10).predict_proba(x_test * 1e4)
    assert scaled == pytest.approx(plain, abs=1e-3)
    dead = np.hstack([x, np.zeros((len(x), 5))])
    alive = np.hstack([x_test, np.full((len(x_test), 5), 1e-3)])
    found = evaluate.logistic_regression(dead, y, num_classes=10).predict_proba(alive)
    assert found == pytest.approx(plain, abs=1e-2)


def test_logistic_regression_with_missing_classes() -> None:
    x = np.random.default_rng(0).normal(size=(6, 3))
    two = evaluate.logistic_regression(x, np.array([0, 3, 0, 3, 0, 3]), num_classes=5).predict_proba(x)
    assert two[:, [1, 2, 4]].max() == 0
    assert two.sum(axis=1) == pytest.approx(1, abs=1e-6)
    one = evaluate.logistic_regression(x, np.full(6, 2), num_classes=5).predict_proba(x)
    assert one.tolist() == [[0, 0, 1, 0, 0]] * 6
    with pytest.raises(DataError, match="at least one"):
        evaluate.logistic_regression(x[:0], np.array([], dtype=int), num_classes=5)


@pytest.mark.parametrize("classes", [[0, 1, 2, 3], [0, 3], [2]])
def test_a_regression_as_a_linear_layer_decides_alike(classes: list[int]) -> None:
    rng = np.random.default_rng(1)
    y = np.array(classes * 6)
    x = rng.normal(size=(len(y), 8)) + 3 * np.eye(8)[y]
    x *= 5 / np.linalg.norm(x, axis=1, keepdims=True)  # all of the usual length, for which the layer is exact
    fitted = evaluate.logistic_regression(x, y, num_classes=5)
    weight, bias = fitted.linear()
    assert (weight.shape, bias.shape) == ((5, 8), (5,))
    logits = x @ weight.T + bias
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert softmax == pytest.approx(fitted.predict_proba(x), abs=2e-3)  # unseen classes get e^-10, not 0
    longer = (1.3 * x) @ weight.T + bias
    assert (longer.argmax(axis=1) == y).all()


def test_cross_validation_leaves_images_out() -> None:
    """Random features of many columns fit any labels; only left-out images show that they say nothing."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 200)), np.arange(60) % 3
    assert sorted(np.concatenate(evaluate.folds(y)).tolist()) == list(range(len(y)))
    assert evaluate.folds(np.arange(5)) == evaluate.folds(np.zeros(0, dtype=np.int64)) == []
    found = evaluate.cross_validated(x, y)
    assert (len(evaluate.folds(y)), found["n"]) == (10, 60)
    assert found["accuracy"] < 0.6
    assert found["interval"] == evaluate.wilson_interval(round(found["accuracy"] * 60), 60)
    assert evaluate.logistic_regression(x, y, num_classes=3).predict_proba(x).argmax(axis=1).tolist() == y.tolist()


def test_cross_validation_chooses_its_folds() -> None:
    x, y, _, _ = _digits(2, 0)
    assert len(evaluate.folds(y)) == len(evaluate.folds(y[:-1])) == 2, "one class of the latter has one image"
    assert evaluate.cross_validated(x[:-1], y[:-1])["n"] == 19
    crowd = np.append(np.tile(y, 2), 10)
    found = evaluate.cross_validated(np.vstack([x, x, x[:1]]), crowd)
    assert (len(evaluate.folds(crowd)), found["n"]) == (4, 41)
    assert found["accuracy"] <= 40 / 41, "an image alone in its class cannot be right"
    for labels in (np.arange(10), np.zeros(10, int), np.zeros(0, int)):
        found = evaluate.cross_validated(x[: len(labels)], labels)
        assert found == {"accuracy": None, "interval": None, "n": len(labels)}


@pytest.mark.parametrize("counts", [[2] + [1] * 9, [2, 2] + [1] * 8, [1] * 10, [2] * 4 + [1] * 22, [3] * 10, [5, 5]])
def test_features_that_tell_classes_apart_are_not_too_weak_however_few_the_labels(counts: list[int]) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    features = np.eye(len(counts))[labels] + 0.01 * np.random.default_rng(0).normal(size=(len(labels), len(counts)))
    assert evaluate.too_weak(features, labels) == ""


@pytest.mark.parametrize(("classes", "bar"), [(2, 72.5), (4, 58.8), (10, 50.5)])
def test_features_that_say_nothing_are_too_weak(classes: int, bar: float) -> None:
    """Below 45 % of the way from chance to all right; a class with one label does not lower the bar."""
    features = np.random.default_rng(0).normal(size=(61, 8))
    labels = np.append(np.arange(60) % classes, classes)
    assert f"and below {bar} % it may be sure of wrong answers" in evaluate.too_weak(features, labels)


def test_features_are_too_weak_where_the_interval_ends_below_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.arange(20) % 10
    for end, why in ((0.51, ""), (0.49, "45 % of the labels by the others, 49.0 % at best, and below 50.5 %")):
        told = {"accuracy": 0.45, "interval": (0.4, end)}
        monkeypatch.setattr(evaluate, "cross_validated", lambda *_, told=told: told)
        found = evaluate.too_weak(np.zeros((20, 2)), labels)
        assert why in found and bool(found) == bool(why)


def test_nearest_neighbours_agree_with_a_loop() -> None:
    x, y, _, _ = _digits(8, 1)
    rows = x / np.linalg.norm(x, axis=1, keepdims=True)
    for k in (1, 5, 200):
        correct = 0
        for i in range(len(rows)):
            others = sorted((-(rows[i] @ rows[j]), j) for j in range(len(rows)) if j != i)[:k]
            votes = dict.fromkeys(range(10), 0.0)
            for similarity, j in others:
                votes[y[j]] += math.exp(-similarity / 0.1)
            correct += max(votes, key=lambda c: votes[c]) == y[i]
        assert evaluate.nearest_neighbours(x, y, k) == pytest.approx(correct / len(rows))


def test_one_row_has_no_neighbours() -> None:
    assert evaluate.nearest_neighbours(np.ones((1, 3)), np.array([0])) is None


# --- on a model ---


def _folder(root: Path, count: int = 24) -> Path:
    images, labels = shapes_images(count, size=20)
    names = ("red square", "red disc", "blue square", "=blue disc")
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        (root / names[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / names[label] / f"{index}.png")
    return root


def test_evaluate_run_measures_labeled_images_and_names_the_rest(tmp_path: Path, model: Model) -> None:
    folder = _folder(tmp_path / "images")
    (folder / "red disc" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n1234")
    (folder / "unlabeled").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "unlabeled" / "a.png")
    found = evaluate.evaluate_run(model, folder)
    assert found["n"] == 24
    assert [Path(bad["name"]).name for bad in found["unreadable"]] == ["broken.png"]
    assert found["unlabeled"] == 1
    names = sorted(str(p) for p in folder.glob("*/*.png") if p.name not in ("broken.png", "a.png"))
    right = [Path(n).parent.name == p for n, p in zip(names, model.predict(names), strict=True)]
    assert found["top1"]["accuracy"] == pytest.approx(np.mean(right))


def test_evaluate_run_says_how_many_of_these_are_training_images(tmp_path: Path, model: Model) -> None:
    """However they are given, and from wherever: it compared paths, and a copy or a list went unnoticed."""
    folder = _folder(tmp_path / "images", 8)
    source = open_source(folder)
    trained = replace(source, splits=("train",) * 6 + ("test",) * 2, labels=(None,) * 8)
    inside = predict.load(run_of(tmp_path / "run", trained, model.classes), device="cpu")
    shutil.copytree(folder, tmp_path / "copy")
    names = [str(tmp_path / "copy" / name) for name in source.names]
    table = tmp_path / "other.csv"
    table.write_text("image,label\n" + "".join(f"{n},{y}\n" for n, y in zip(names, source.labels, strict=True)))
    for images, own in ((folder, None), (tmp_path / "copy", None), (table, None), (names, source.labels)):
        found = evaluate.evaluate_run(inside, images, own)
        assert (found["n"], found["trained_on"]) == (8, 6)
    assert "it was trained on 6 of these images" in evaluate.format_table(found)
    assert evaluate.evaluate_run(inside, names[6:], source.labels[6:])["trained_on"] == 0
    shutil.rmtree(tmp_path / "run" / "data")
    for nobody_knows in (model, inside):
        found = evaluate.evaluate_run(nobody_knows, folder)
        assert found["trained_on"] is None
        assert "does not say which images it was trained on" in evaluate.format_table(found)


def test_evaluate_run_counts_a_picture_once(tmp_path: Path, model: Model) -> None:
    """As `fit` does: of the same held-out images they told two accuracies."""
    once = evaluate.evaluate_run(model, _folder(tmp_path / "images", 8))
    assert once["copies"] == 0
    assert "copies" not in evaluate.format_table(once)
    square = tmp_path / "images" / "red square" / "0.png"
    for name in ("a.png", "z.png"):
        shutil.copy(square, square.with_name(name))
    found = evaluate.evaluate_run(model, tmp_path / "images")
    assert (found["n"], found["copies"]) == (8, 2)
    assert {**found, "images": "", "copies": 0} == {**once, "images": ""}
    assert "copies              2 images passed over" in evaluate.format_table(found)
    for name in ("a.png", "z.png"):
        square.with_name(name).rename(tmp_path / "images" / "red disc" / "z.png")
    with pytest.raises(DataError, match="pixels are the same: 1") as raised:
        evaluate.evaluate_run(model, tmp_path / "images")
    assert raised.value.details == ('"red disc/z.png" is "red disc" and "red square/0.png" is "red square"',)


def test_evaluate_run_takes_the_test_split_where_there_is_one(tmp_path: Path, model: Model) -> None:
    _folder(tmp_path / "train", 24)
    _folder(tmp_path / "test", 8)
    found = evaluate.evaluate_run(model, tmp_path)
    assert (found["n"], found["split"]) == (8, "test")


def test_evaluate_run_passes_over_test_images_without_labels(tmp_path: Path, model: Model) -> None:
    _folder(tmp_path / "val", 8)
    (tmp_path / "test").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "a.png")
    found = evaluate.evaluate_run(model, tmp_path)
    assert (found["n"], found["split"]) == (8, "val")
    shutil.move(tmp_path / "val", tmp_path / "train")
    with pytest.raises(DataError, match="none of its images has a label"):
        evaluate.evaluate_run(model, tmp_path)


def test_evaluate_run_refuses_unknown_classes_and_no_labels(tmp_path: Path, model: Model) -> None:
    images, _ = shapes_images(4)
    with pytest.raises(DataError, match="none of its images has a label"):
        evaluate.evaluate_run(model, images)
    with pytest.raises(DataError) as refusal:
        evaluate.evaluate_run(model, images, ["red disc", "zebra", "unicorn", ""])
    assert '"zebra"' in str(refusal.value) and '"unicorn"' in str(refusal.value)


def test_evaluate_run_knows_classes_whose_accents_are_apart() -> None:
    """A model of an older version has the names of a Mac's folders."""
    images, labels = shapes_images(8, size=20)
    apart = ("a\u0308", "o\u0308", "u\u0308", "e\u0301")
    old = small_model(classes=apart)
    assert set(old.predict(images)) <= set(apart)
    whole = ["\u00e4\u00f6\u00fc\u00e9"[label] for label in labels]
    assert (
        evaluate.evaluate_run(old, images, whole)["top1"]
        == evaluate.evaluate_run(old, images, [apart[label] for label in labels])["top1"]
    )


def test_table_says_what_is_taken_for_what() -> None:
    truth = np.array([0] * 9 + [1] * 9 + [2] * 3)
    guess = np.array([0] * 5 + [1] * 3 + [2] + [1] * 2 + [0] * 7 + [2] * 3)
    text = evaluate.format_table(evaluate.measure(np.eye(3)[guess], truth, ["cat", "dog", "b\x1b"]))
    assert text.splitlines()[-3:] == [
        "dog taken for cat: 7 of 9", "cat taken for dog: 3 of 9", "cat taken for b%1B: 1 of 9"
    ]  # fmt: skip
    assert "taken for" not in evaluate.format_table(evaluate.measure(np.eye(3)[truth], truth, ["a", "b", "c"]))


def test_table_says_accuracy_with_its_interval() -> None:
    probabilities, labels, _ = _predictions(597, 3)
    measured = evaluate.measure(probabilities, labels, ["a", "b\x1b[31m", "c" * 90])
    text = evaluate.format_table(measured)
    low, high = measured["top1"]["interval"]
    accuracy = measured["top1"]["accuracy"]
    assert f"{100 * accuracy:.1f} % ({100 * low:.1f}-{100 * high:.1f}, n=597)" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) < 90


@pytest.mark.parametrize("expected", [0.3, 0.75, 0.97])
def test_temperature_for_confidence_meets_the_expected_accuracy(expected: float) -> None:
    logits = np.random.default_rng(0).normal(size=(400, 5)) * 3
    temperature = evaluate.temperature_for_confidence(logits, expected)
    powers = np.exp(logits / temperature)
    assert (powers.max(axis=1) / powers.sum(axis=1)).mean() == pytest.approx(expected, abs=1e-4)


def test_without_an_expected_accuracy_logits_stay_as_they_are() -> None:
    assert evaluate.temperature_for_confidence(np.eye(3), None) == 1.0
    assert evaluate.temperature_for_confidence(np.zeros((0, 3)), 0.5) == 1.0


def test_sampled_takes_all_parts() -> None:
    """One of each tenth; of images whose classes come in turns as many of each, whatever their number."""
    ids = np.arange(100, 1100)
    few = evaluate.sampled(ids, 10)
    assert ((few - 100) // 100).tolist() == list(range(10))
    assert evaluate.sampled(ids, 5000).tolist() == ids.tolist()
    assert len(evaluate.sampled(ids[:0], 10)) == 0
    for total, count, classes in ((10_000, 5_000, 10), (4_000, 2_000, 2), (20_000, 5_000, 4), (7, 3, 1)):
        taken = evaluate.sampled(np.arange(total), count)
        assert len(taken) == count and (np.diff(taken) > 0).all()
        assert np.bincount(taken % classes, minlength=classes) == pytest.approx(count / classes, rel=0.2)
