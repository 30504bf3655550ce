"""What is understood of images and labels, what is refused, and which labels are kept on request."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewlabels.data import pixels
from fewlabels.data.labels import Dataset, _near_duplicates, assemble, keep_labels, read_images
from fewlabels.data.sources import open_source
from fewlabels.errors import DataError, UsageError


def noise(count: int, seed: int = 0, size: int = 10) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def dataset(folder: Path, images: Any, labels: Any = None, *, test: Any = None, max_bad: float = 0.5) -> Dataset:
    source = open_source(images, labels, test=test)
    store, kept, _ = pixels.build(
        source, folder / "data", working_size=None, threads=1, bad_csv=folder / "bad.csv", max_bad_share=max_bad
    )
    return assemble(source, store, kept)


def test_what_is_understood(tmp_path: Path) -> None:
    images = noise(40)
    images[5] = images[3]
    data = dataset(tmp_path, images, [0, 1] * 5 + [-1] * 30, test=(noise(6, 1), [0, 1, 0, 1, -1, 0]))
    assert data.train.tolist() == list(range(40))
    assert data.labeled.tolist() == list(range(10))
    assert data.held_out.tolist() == [40, 41, 42, 43, 45]
    assert data.labels.dtype == np.int64
    assert data.splits.dtype == np.int8
    assert (data.num_classes, data.classes) == (2, ("0", "1"))
    assert data.labels[:12].tolist() == [0, 1] * 5 + [-1, -1]
    understood = data.understood
    assert understood.line() == "40 images, 10 labeled in 2 classes, 1 duplicate, 6 held-out test images"
    assert (understood.images, understood.train, understood.test, understood.held_out) == (46, 40, 6, 5)
    assert understood.classes == {"0": 5, "1": 5}
    assert json.loads(json.dumps(asdict(understood)))["duplicates"] == 1


def test_without_labels_there_is_pretraining(tmp_path: Path) -> None:
    data = dataset(tmp_path, noise(1200))
    assert (data.num_classes, len(data.labeled), len(data.held_out)) == (0, 0, 0)
    assert data.understood.line() == "1,200 images, no labels"


def test_a_teacher_may_have_accents_apart(tmp_path: Path) -> None:
    """One of an older version, trained on a Mac's folders: its classes are told by the names of today."""
    source = open_source(noise(4), test=(noise(2, 1), ["\u00e4", "b"]))
    store, kept, _ = pixels.build(source, tmp_path / "data", working_size=None, threads=1, bad_csv=tmp_path / "bad.csv")
    data = assemble(source, store, kept, ("b", "a\u0308"))
    assert (data.classes, data.labels[4:].tolist()) == (("b", "\u00e4"), [1, 0])


def test_classes_sort_naturally_or_as_declared(tmp_path: Path) -> None:
    assert dataset(tmp_path, noise(6), [2, 10, 1, 2, 10, 1]).classes == ("1", "2", "10")
    assert dataset(tmp_path, noise(4), ["b2", "b10", "a", "b2"]).classes == ("a", "b2", "b10")
    declared = ["zebra", "ant"]
    np.savez(tmp_path / "a.npz", images=noise(4), labels=[1, 0, 0, 1], classes=declared)
    data = dataset(tmp_path, tmp_path / "a.npz")
    assert (list(data.classes), data.labels.tolist()) == (declared, [1, 0, 0, 1])


def test_validation_images_are_held_out_when_there_are_no_test_images(tmp_path: Path) -> None:
    for i, (place, image) in enumerate(zip(["train/a", "train/b", "val/a", "val/b"] * 2, noise(8), strict=True)):
        (tmp_path / "in" / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "in" / place / f"{i}.png")
    data = dataset(tmp_path, tmp_path / "in")
    assert [data.names[i] for i in data.held_out] == ["val/a/2.png", "val/a/6.png", "val/b/3.png", "val/b/7.png"]
    assert data.understood.line() == "4 images, 4 labeled in 2 classes, 4 held-out validation images"


def test_unreadable_images_are_counted_and_their_labels_reported(tmp_path: Path) -> None:
    for i, image in enumerate(noise(9)):
        folder = tmp_path / "in" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    (tmp_path / "in/cat/3.png").write_text("no")
    (tmp_path / "in/loose.png").write_text("no")
    data = dataset(tmp_path, tmp_path / "in")
    assert data.understood.line() == "8 images, 8 labeled in 2 classes, 2 unreadable"
    assert data.names == tuple(f"cat/{i}.png" for i in (1, 5, 7)) + tuple(f"dog/{i}.png" for i in (0, 2, 4, 6, 8))
    assert data.labels.tolist() == [0] * 3 + [1] * 5
    assert data.understood.notes == ('1 labeled image could not be read and their labels are lost: "cat/3.png"',)


def test_leaks_are_taken_out_of_training(tmp_path: Path) -> None:
    images, held = noise(20), noise(5, 1)
    images[4], images[11] = held[2], held[0]
    data = dataset(tmp_path, images, [0, 1] * 10, test=(held, [0, 1, 0, 1, 0]))
    assert data.splits[[4, 11]].tolist() == [3, 3]
    assert not set(data.train) & {4, 11}
    assert not set(data.labeled) & {4, 11}
    assert len(data.held_out) == 5
    assert data.understood.leaks == 2
    assert data.understood.labeled == 18
    assert "2 left out because they are also held out" in data.understood.line()
    assert "also held out, left out of training: image-000004, image-000011" in data.understood.notes[0]


def test_each_held_out_picture_counts_once(tmp_path: Path) -> None:
    held = noise(6, 1)
    held[4], held[5] = held[1], held[2]
    data = dataset(tmp_path, noise(8), [0, 1] * 4, test=(held, [0, -1, 0, 1, 1, 0]))
    assert data.held_out.tolist() == [8, 10, 11, 12]  # the labeled one of two
    assert (data.understood.held_out, data.understood.test, data.understood.images) == (4, 4, 14)
    assert "4 held-out test images" in data.understood.line()
    assert "held out more than once, which counts once: 2 copies" in data.understood.notes
    with pytest.raises(DataError, match="two different labels") as refused:
        dataset(tmp_path, noise(8), [0, 1] * 4, test=(held, [0, -1, 0, 1, 1, 1]))
    assert refused.value.details == ('"image-000002" is "0" and "image-000005" is "1"',)


def test_one_picture_with_two_labels_is_refused(tmp_path: Path) -> None:
    images = noise(10)
    images[7] = images[2]
    with pytest.raises(DataError, match="two different labels") as refused:
        dataset(tmp_path, images, ["a", "b", "a", "b", "a", "b", "a", "b", "a", "b"])
    assert refused.value.details == ('"image-000002" is "a" and "image-000007" is "b"',)
    labels = ["a", "b", "a", "b", "a", "b", "a", None, "a", "b"]  # an unlabeled copy is no contradiction
    assert dataset(tmp_path, images, labels).understood.duplicates == 1


def test_faults_of_pictures_name_the_lines_of_a_csv(tmp_path: Path) -> None:
    images = noise(8)
    images[7] = images[2]
    text = "image,label,split\nimage-000002,cat,\nimage-000000,dog,\n\nimage-000007,dog,\nimage-000005,Dig,test\n"
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError) as refused:
        dataset(tmp_path, images, tmp_path / "labels.csv")
    assert refused.value.details == ('"image-000002" (line 2) is "cat" and "image-000007" (line 5) is "dog"',)
    images[7] = 0
    with pytest.raises(DataError) as refused:
        dataset(tmp_path, images, tmp_path / "labels.csv")
    assert refused.value.details == ('"Dig" (did you mean "dog"?), the first is "image-000005" (line 6)',)


def test_labels_only_of_images_that_are_also_held_out(tmp_path: Path) -> None:
    images = noise(8)
    with pytest.raises(DataError, match="2 labeled training images are the same pictures as held-out ones"):
        dataset(tmp_path, images, [0, 1] + [-1] * 6, test=(images[:2], [0, 1]))


@pytest.mark.parametrize(
    ("labels", "test", "words", "details"),
    [
        (
            [0, 1] * 4,
            [0, 2, 3],
            "2 classes without a training label",
            ('"2", the first is "image-000001"', '"3", the first is "image-000002"'),
        ),
        ([-1] * 8, [0, 1, 1], "only held-out images are labeled", ('"0"', '"1"')),
        ([5] * 3 + [-1] * 5, None, 'all 3 labels are of the one class "5"', ()),
    ],
)
def test_labels_that_cannot_be_learned(
    tmp_path: Path, labels: list[int], test: list[int] | None, words: str, details: tuple[str, ...]
) -> None:
    with pytest.raises(DataError, match=words) as refused:
        dataset(tmp_path, noise(8), labels, test=None if test is None else (noise(3, 1), test))
    assert refused.value.details == details
    assert refused.value.why
    assert refused.value.fix


def test_more_classes_than_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=noise(5), labels=[0, 1, -1, -1, -1], classes=list("abcde"))
    with pytest.raises(DataError, match="5 classes but only 2 labels"):
        dataset(tmp_path, tmp_path / "a.npz")


def test_a_class_with_one_example_is_a_note(tmp_path: Path) -> None:
    data = dataset(tmp_path, noise(6), ["a", "a", "b", "c", "c", None])
    assert data.understood.notes == ("1 class with a single labeled image: b",)


def test_only_held_out_images(tmp_path: Path) -> None:
    (tmp_path / "in/test/a").mkdir(parents=True)
    Image.fromarray(noise(1)[0]).save(tmp_path / "in/test/a/1.png")
    with pytest.raises(DataError, match="no training images"):
        dataset(tmp_path, tmp_path / "in")


def smooth(count: int, seed: int, size: int = 48) -> np.ndarray:
    """Photo-like: a few soft blobs."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC)) for x in small])


def test_near_duplicates_of_held_out_images_are_reported_and_kept(tmp_path: Path) -> None:
    train, held = smooth(60, 0), smooth(20, 1)
    brighter = np.clip(held[3].astype(int) + 1, 0, 255).astype(np.uint8)
    train[8] = brighter
    data = dataset(tmp_path, train, test=held)
    assert data.understood.leaks == 0
    assert len(data.train) == 60
    (note,) = data.understood.notes
    assert note == "1 training image nearly the same as a held-out one (kept): image-000008 like image-000003"


def test_each_held_out_image_of_the_same_hash_is_compared(tmp_path: Path) -> None:
    held = smooth(2, 1) // 2
    held[1] = held[0] + 40  # the same difference hash, and another picture
    train = smooth(9, 0)
    train[4] = held[1] + 1
    for order in ([0, 1], [1, 0]):
        (note,) = dataset(tmp_path / str(order[0]), train, test=held[order]).understood.notes
        assert note.endswith(f"image-000004 like image-{order.index(1):06}")


def test_a_photo_saved_anew_is_found_among_many_with_blank_corners(tmp_path: Path) -> None:
    """Bits of the hash flip, and of the quarters that do not most are those of all images."""
    rng = np.random.default_rng(2)
    thumbs = np.zeros((3000, 8, 9), np.uint8)
    thumbs[:, 2:7, 2:7] = rng.integers(0, 250, (3000, 5, 5))
    thumbs[:1000, 2:7, 2:7] = thumbs[2000:, 2:7, 2:7] + rng.integers(0, 3, (1000, 5, 5)).astype(np.uint8)
    splits = np.repeat([0, 2], [2000, 1000]).astype(np.int8)
    for groups, found in ((np.arange(3000), 1000), (np.arange(3000) % 2000, 0)):
        notes = _near_duplicates(thumbs, splits, groups, [f"{i}" for i in range(3000)])
        assert notes == [f"{found:,} training images nearly the same as a held-out one (kept): "
                         "0 like 2000; 1 like 2001; 2 like 2002; ..."][: bool(found)]  # fmt: skip
    hashes = np.packbits((thumbs[:, :, 1:] > thumbs[:, :, :-1]).reshape(3000, 64), axis=1)
    assert (hashes[:1000] != hashes[2000:]).any(axis=1).sum() > 50  # those that were missed


def test_flat_and_tiny_images_raise_no_alarm(tmp_path: Path) -> None:
    flat = np.stack([np.full((32, 32, 3), 100 + i, np.uint8) for i in range(6)])
    assert not dataset(tmp_path, flat[:3], test=flat[3:]).understood.notes
    assert not dataset(tmp_path, noise(20, 0, 8), test=noise(5, 1, 8)).understood.notes


def test_digits_have_no_leak(tmp_path: Path) -> None:
    understood = dataset(tmp_path, "digits").understood
    assert understood.line() == "1,200 images, 1,200 labeled in 10 classes, 597 held-out test images"
    assert not understood.notes


# --- keep_labels -------------------------------------------------------------------------------------------------


@pytest.fixture
def lopsided(tmp_path: Path) -> Dataset:
    """100 of a, 30 of b, 3 of c, 7 unlabeled."""
    return dataset(tmp_path, noise(140), ["a"] * 100 + ["b"] * 30 + ["c"] * 3 + [None] * 7)


@pytest.mark.parametrize(
    ("amount", "counts"),
    [
        (3, {"a": 1, "b": 1, "c": 1}),
        ("9", {"a": 3, "b": 3, "c": 3}),
        (43, {"a": 20, "b": 20, "c": 3}),
        ("1%", {"a": 1, "b": 1, "c": 1}),  # 1 label, but each class keeps one
        ("50 %", {"a": 34, "b": 30, "c": 3}),  # 66.5 rounds to 66 or 67
        (133, {"a": 100, "b": 30, "c": 3}),
    ],
)
def test_kept_labels_are_shared_equally(lopsided: Dataset, amount: str | int, counts: dict[str, int]) -> None:
    kept = keep_labels(lopsided, amount, 0)
    found = Counter(lopsided.classes[k] for k in kept.labels[kept.labeled])
    total = sum(found.values())
    assert total == (round(133 * 0.5) if amount == "50 %" else sum(counts.values()))
    assert all(abs(found[name] - count) <= (amount == "50 %") for name, count in counts.items())
    assert kept.understood.classes == dict(found)
    assert kept.understood.hidden == 133 - total
    assert (kept.labels[kept.labeled] == lopsided.labels[kept.labeled]).all()
    assert len(kept.train) == 140
    assert (f"{133 - total:,} label" in " ".join(kept.understood.notes)) == (total < 133)


def test_kept_labels_belong_to_the_seed_and_grow(lopsided: Dataset) -> None:
    rows = {seed: set(keep_labels(lopsided, 30, seed).labeled.tolist()) for seed in range(8)}
    assert rows[0] == set(keep_labels(lopsided, 30, 0).labeled.tolist())
    assert len({frozenset(kept) for kept in rows.values()}) == 8
    for fewer, more in ((3, 9), (10, 40), (11, 120)):
        assert set(keep_labels(lopsided, fewer, 5).labeled) <= set(keep_labels(lopsided, more, 5).labeled)


def test_uneven_remainders_go_to_random_classes(tmp_path: Path) -> None:
    data = dataset(tmp_path, noise(40), [0, 1, 2, 3] * 10)
    lucky = Counter()
    for seed in range(40):
        counts = keep_labels(data, 9, seed).understood.classes
        assert sorted(counts.values()) == [2, 2, 2, 3]
        lucky[max(counts, key=lambda name: counts[name])] += 1
    assert len(lucky) == 4


@pytest.mark.parametrize("amount", ["many", "-5", 0, 2, 134, "x%", "1.5", ""])
def test_amounts_that_make_no_sense(lopsided: Dataset, amount: str | int) -> None:
    with pytest.raises(UsageError) as refused:
        keep_labels(lopsided, amount, 0)
    assert refused.value.fix


def test_hiding_labels_leaves_held_out_ones(tmp_path: Path) -> None:
    data = dataset(tmp_path, noise(20), [0, 1] * 10, test=(noise(4, 1), [0, 1, 0, 1]))
    kept = keep_labels(data, 2, 0)
    assert kept.held_out.tolist() == data.held_out.tolist() == [20, 21, 22, 23]
    assert (kept.labels[20:] >= 0).all()
    assert kept.understood.notes == ("2 classes with a single labeled image: 0, 1", "18 labels hidden on request")
    assert keep_labels(data, 4, 0).understood.notes == ("16 labels hidden on request",)
    assert keep_labels(keep_labels(data, 3, 0), 2, 0).understood.notes[0] == kept.understood.notes[0]
    with pytest.raises(UsageError, match="no labels"):
        keep_labels(dataset(tmp_path, noise(3)), 1, 0)


FACTS: dict[str, Any] = {"images": 2, "train": 2, "val": 0, "test": 0, "labeled": 2, "held_out": 0, "unreadable": 0}
FACTS |= {"duplicates": 0, "leaks": 0, "hidden": 0, "notes": [], "classes": {"a\x1b[2J": 1, "b": 1}}


def test_names_of_a_run_from_anywhere_become_printable(tmp_path: Path) -> None:
    table = tmp_path / "images.csv"
    table.write_text("image,label,split\n\x1b[2J.png,a%1B[2J,train\n1.png,b,test\n")
    found = read_images(table, [0, 1], FACTS)  # type: ignore[arg-type]
    assert found.names == ("%1B[2J.png", "1.png")
    assert found.classes == ("a%1B[2J", "b")
    assert (found.labels.tolist(), found.splits.tolist()) == ([0, 1], [0, 2])


@pytest.mark.parametrize(
    "rows", ["", "x\n", "x,b,train\n", "x,b,train\ny,c,train\n", "x,b,train\ny,b,tarin\n", "x,b\ny,b\n"]
)
def test_a_table_that_does_not_fit_its_run_is_refused(tmp_path: Path, rows: str) -> None:
    (tmp_path / "images.csv").write_text(f"image,label,split\n{rows}")
    with pytest.raises(DataError, match="does not fit its run"):
        read_images(tmp_path / "images.csv", [0, 1], FACTS)  # type: ignore[arg-type]


@pytest.mark.parametrize("facts", [{}, FACTS | {"classes": 3}, {**FACTS, "notes": None}])
def test_facts_that_do_not_fit_the_table_are_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    (tmp_path / "images.csv").write_text("image,label,split\nx,b,train\ny,b,train\n")
    with pytest.raises(DataError, match="does not fit its run"):
        read_images(tmp_path / "images.csv", [0, 1], facts)  # type: ignore[arg-type]


def test_training_images_that_are_all_held_out(tmp_path: Path) -> None:
    images = noise(8)
    with pytest.raises(DataError, match="every training image is also held out"):
        dataset(tmp_path, images, test=images.copy())


def test_identical_images_count_once(tmp_path: Path) -> None:
    images = noise(8)
    images[5], images[6] = images[1], images[1]
    found = dataset(tmp_path, images, [0, 1, 0, 1, 0, 1, 1, 0])
    assert found.once(found.labeled).tolist() == [0, 1, 2, 3, 4, 7]
    assert found.once(np.array([6, 5, 0])).tolist() == [6, 0]
