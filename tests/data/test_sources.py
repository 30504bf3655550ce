"""Every kind of source gives the same things; every mistake in a folder, an array or a CSV is found and placed."""

from __future__ import annotations

import builtins
import json
import os
import socket
import unicodedata
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewlabels.asked import Asked
from fewlabels.data import decode, sources
from fewlabels.data.parts import Files
from fewlabels.data.source import Source, join, unlabeled
from fewlabels.data.sources import check_classes, open_source
from fewlabels.data.tables import SPLITS
from fewlabels.errors import DataError, MissingInput, UsageError
from fewlabels.prepare import open_images

GREEN = np.full((6, 8, 3), (20, 200, 30), np.uint8)


def picture(path: Path, pixels: np.ndarray = GREEN) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def content(source: Source) -> list[tuple[str, str | None, str]]:
    return list(zip(source.names, source.labels, source.splits, strict=True))


def decoded(source: Source) -> list[np.ndarray]:
    return [decode.decode(payload) for payload in source.payloads()]


# --- folders -----------------------------------------------------------------------------------------------------


def test_folder_of_classes_unlabeled_and_loose_files(tmp_path: Path) -> None:
    for name in ("dog/b.png", "cat/deep/er/a.png", "cat/10.png", "unlabeled/u.png", "loose.png", "Unlabelled/v.png"):
        picture(tmp_path / name)
    assert content(open_source(tmp_path)) == [
        ("Unlabelled/v.png", None, "train"),
        ("cat/10.png", "cat", "train"),
        ("cat/deep/er/a.png", "cat", "train"),
        ("dog/b.png", "dog", "train"),
        ("loose.png", None, "train"),
        ("unlabeled/u.png", None, "train"),
    ]
    assert [image.shape for image in decoded(open_source(tmp_path))] == [(6, 8, 3)] * 6


def test_folder_with_splits(tmp_path: Path) -> None:
    for name in ("train/cat/a.png", "train/unlabeled/b.png", "train/c.png", "valid/cat/d.png", "test/dog/e.png"):
        picture(tmp_path / name)
    picture(tmp_path / "unlabeled/f.png")
    assert content(open_source(str(tmp_path))) == [
        ("test/dog/e.png", "dog", "test"),
        ("train/c.png", None, "train"),
        ("train/cat/a.png", "cat", "train"),
        ("train/unlabeled/b.png", None, "train"),
        ("unlabeled/f.png", None, "train"),
        ("valid/cat/d.png", "cat", "val"),
    ]


def test_a_class_called_train_is_a_class_and_a_mixture_is_refused(tmp_path: Path) -> None:
    for name in ("train/a.png", "bus/b.png"):
        picture(tmp_path / name)
    assert content(open_source(tmp_path)) == [("bus/b.png", "bus", "train"), ("train/a.png", "train", "train")]
    picture(tmp_path / "test/c.png")
    with pytest.raises(DataError, match=r"splits test, train and beside them bus"):
        open_source(tmp_path)


def test_a_split_called_train_beside_other_folders_is_refused_too(tmp_path: Path) -> None:
    for name in ("train/cat/a.png", "train/dog/b.png", "extra/c.png"):
        picture(tmp_path / name)
    with pytest.raises(DataError, match=r"splits train and beside them extra"):
        open_source(tmp_path)
    (tmp_path / "extra").rename(tmp_path / "unlabeled")
    assert [label for _, label, _ in content(open_source(tmp_path))] == ["cat", "dog", None]
    (tmp_path / "unlabeled").rename(tmp_path / "bus")
    picture(tmp_path / "unlabeled/2020/e.png")  # folders in there are no classes
    picture(tmp_path / "train/logo.png")
    with pytest.raises(DataError, match=r"splits train and beside them bus"):
        open_source(tmp_path)
    picture(tmp_path / "bus/2020/c.png")  # folders in all of them, and not the same: train is a class, as bus is
    assert {label for _, label, _ in content(open_source(tmp_path))} == {"bus", "train", None}
    picture(tmp_path / "bus/cat/d.png")
    with pytest.raises(DataError, match=r"splits train and beside them bus"):
        open_source(tmp_path)


@pytest.mark.parametrize("split", ["test", "Val", "Testing"])
def test_a_split_beside_classes_is_not_trained_on_as_a_class(split: str, tmp_path: Path) -> None:
    for name in (f"{split}/cat/a.png", "cat/b.png", "dog/c.png"):
        picture(tmp_path / name)
    with pytest.raises(DataError, match=rf"splits {split} and beside them cat, dog") as refused:
        open_source(tmp_path)
    assert "--test" in str(refused.value.fix)
    (tmp_path / "train").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / name).rename(tmp_path / "train" / name)
    splits = {name: split for name, _, split in content(open_source(tmp_path))}
    assert splits == {
        f"{split}/cat/a.png": SPLITS[split.lower()],
        "train/cat/b.png": "train",
        "train/dog/c.png": "train",
    }


def test_clutter_is_passed_over_and_false_pictures_are_not(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "no_extension.png").rename(tmp_path / "no_extension")
    picture(tmp_path / "odd.png").rename(tmp_path / "odd.jpg_large")
    picture(tmp_path / "dir.jpg/in.png")
    for name in (".DS_Store", "._a.png", "Thumbs.db", "README", "README.md", "x.csv", "x.txt", "x.json", "weights.bin"):
        (tmp_path / name).write_bytes(b"Bud1 something")
    picture(tmp_path / ".git/logo.png")
    picture(tmp_path / "__MACOSX/a.png")
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    names = open_source(tmp_path).names
    assert names == ("a.png", "dir.jpg/in.png", "no_extension", "odd.jpg_large", "page.jpg", "phone.heic")


def test_links_loops_pipes_and_sockets(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    picture(root / "cat/a.png")
    picture(outside / "b.png")
    (root / "dog").symlink_to(outside)
    (root / "cat/loop").symlink_to(root)
    (root / "again").symlink_to(root / "cat")
    (root / "self.png").symlink_to(root / "self.png")
    (root / "dangling.png").symlink_to(root / "nowhere.png")
    (root / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(root / "pipe.jpg")
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "s.gif"))
        source = open_source(root)
    assert content(source)[:2] == [("cat/a.png", "cat", "train"), ("dangling.png", None, "train")]
    assert source.names[2:] == ("dog/b.png", "pipe.jpg", "s.gif", "self.png", "zero.png")
    reasons = {}
    for name, payload in zip(source.names, source.payloads(), strict=True):
        try:
            decode.decode(payload)
        except decode.BadPicture as bad:
            reasons[name] = str(bad)
    assert set(reasons) == {"dangling.png", "pipe.jpg", "s.gif", "self.png", "zero.png"}
    assert "no such file" in reasons["dangling.png"]
    assert all("pipe, socket or device" in reasons[name] for name in ("pipe.jpg", "s.gif", "zero.png"))


def test_hostile_names_become_printable(tmp_path: Path) -> None:
    names = [b"new\nline.png", b"esc\x1b[2J.png", b"latin\xe9.png", "é.png".encode(), b"<img onerror=x>.png", b"-x.png"]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(picture(tmp_path.parent / "p.png").read_bytes())
    source = open_source(tmp_path)
    assert set(source.names) == {
        "new%0Aline.png", "esc%1B[2J.png", "latin%E9.png", "é.png", "<img onerror=x>.png", "-x.png",
    }  # fmt: skip
    assert len(decoded(source)) == 6
    assert "".join(source.names).encode("utf-8")
    (tmp_path.parent / "labels.csv").write_text("image,label\n" + "".join(f'"{n}",a\n' for n in source.names))
    labeled = open_source(tmp_path, tmp_path.parent / "labels.csv")  # a table finds them by the names we told
    assert labeled.names == source.names and set(labeled.labels) == {"a"}


def test_a_class_is_told_as_a_label_in_a_table_is_read(tmp_path: Path) -> None:
    for k, name in enumerate((" cat", "dog ", " ")):
        picture(tmp_path / name / f"{k}.png")
    assert set(open_source(tmp_path).labels) == {"cat", "dog", None}


def test_a_csv_reaches_images_through_links_and_in_other_spellings(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "é.png")  # as macOS writes it
    for name in ("a.png", decomposed, " b.png"):
        picture(tmp_path / "disk" / "real" / name)
    (tmp_path / "lnk").symlink_to("disk/real")
    table = tmp_path / "labels.csv"

    def told(images: str, *rows: str) -> dict[str, str | None]:
        table.write_text("\n".join(["image,label", *rows]), encoding="utf-8")
        source = open_source(tmp_path / images, table)
        return {name: label for name, label in zip(source.names, source.labels, strict=True) if label}

    for images in ("lnk", "disk/real"):
        found = told(images, "lnk/a.png,x", "lnk/é.png,y", "./lnk/ b.png,z")
        assert found == {"a.png": "x", decomposed: "y", " b.png": "z"}, images
    assert told("lnk", "é.png,y") == {decomposed: "y"}
    picture(tmp_path / "disk" / "real" / "é.png")  # both spellings: each is itself
    assert told("lnk", "lnk/é.png,y", f"lnk/{decomposed},x") == {"é.png": "y", decomposed: "x"}
    (tmp_path / "elsewhere").mkdir()
    far = tmp_path / "elsewhere" / "labels.csv"
    far.write_text(f"image,label\n{tmp_path / 'lnk'}/a.png,x\n")
    assert open_source(tmp_path / "lnk", far).labels[1] == "x"
    alone = tmp_path / "disk" / "real" / "labels.csv"  # a table that is the images, too
    alone.write_text(f"image,label\n{tmp_path / 'lnk'}/a.png,x\n")
    assert open_source(tmp_path / "lnk" / "labels.csv").labels == ("x",)
    alone.write_text("image,label\né.png,y\n", encoding="utf-8")
    (tmp_path / "disk" / "real" / "é.png").unlink()
    assert content(open_source(alone)) == [(decomposed, "y", "train")]


def test_a_class_may_be_called_none_where_its_folder_is(tmp_path: Path) -> None:
    for name in ("none/a.png", "crack/b.png", "c.png"):
        picture(tmp_path / name)
    table = tmp_path / "labels.csv"
    table.write_text("image,label\nnone/a.png,none\ncrack/b.png,crack\nc.png,none\n")
    assert sorted(map(str, open_source(tmp_path, table).labels)) == ["crack", "none", "none"]
    table.write_text("image,label\nnone/a.png,None\n")
    with pytest.raises(DataError, match='"None" is not a class'):
        open_source(tmp_path, table)


def test_scalars_of_numpy_and_torch_are_labels(stack: np.ndarray) -> None:
    labels = [np.int64(0), np.float32(1), torch.tensor(2), np.bool_(True), np.str_("x"), np.float32("nan"), -1]
    assert list(open_source(stack, labels).labels) == ["0", "1", "2", "True", "x", None, None]


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    with pytest.raises(MissingInput, match='did you mean "photos"') as missing:
        open_source(tmp_path / "photo")
    assert missing.value.exit_code == 66
    (tmp_path / "photos/notes.txt").write_text("nothing")
    with pytest.raises(DataError, match="holds no pictures") as empty:
        open_source(tmp_path / "photos")
    assert empty.value.exit_code == 65


def test_class_folders_that_differ_in_case_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "train/Cat/a.png")
    picture(tmp_path / "test/cat/b.png")
    with pytest.raises(DataError, match="look like one class") as refused:
        check_classes(open_source(tmp_path))
    assert refused.value.details == ('"cat" (as "test/cat/b.png") and "Cat" (as "train/Cat/a.png")',)
    check_classes(open_source(tmp_path, ["x", "y"]))  # not the folders' names
    asked = Asked(images=tmp_path, out=tmp_path / "run")
    with pytest.raises(DataError, match="look like one class"):
        open_images(asked)
    assert len(open_images(replace(asked, until="pretrain"))) == 2  # names of folders that nobody learns


def test_a_list_of_paths_and_a_single_picture(tmp_path: Path) -> None:
    one, two = picture(tmp_path / "1.png"), picture(tmp_path / "2.png")
    source = open_source([str(two), one], labels=["b", None])
    assert content(source) == [(str(two), "b", "train"), (str(one), None, "train")]
    assert len(open_source(one)) == 1
    for wrong, kind in (([GREEN], "ndarray"), ({"a": 1}, "dict"), (7, "int"), (tmp_path / "x.xyz", "no kind")):
        if isinstance(wrong, Path):
            wrong.write_text("x")
        with pytest.raises(DataError if isinstance(wrong, Path) else UsageError, match=kind):
            open_source(wrong)
    with pytest.raises(DataError, match="empty"):
        open_source([])


# --- arrays, npy, npz, digits ------------------------------------------------------------------------------------


@pytest.fixture
def stack() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)


def test_arrays_in_memory_in_npy_and_in_npz_are_the_same(tmp_path: Path, stack: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", stack)
    np.savez(tmp_path / "a.npz", images=stack)
    np.savez_compressed(tmp_path / "c.npz", images=stack)
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    for images in (stack, tmp_path / "a.npy", tmp_path / "a.npz", tmp_path / "c.npz", mapped):
        source = open_source(images)
        assert np.array_equal(np.stack(decoded(source)), stack)
        assert set(source.labels) == {None}
        assert len(list(source.sample(3))) >= 1
        assert np.array_equal(np.stack([source.at(i) for i in (6, 0, 3)]), stack[[6, 0, 3]])
        assert source.seekable is not str(images).endswith(".npz")
    grey = open_source(stack[..., 0])
    assert np.array_equal(np.stack(decoded(grey)), np.repeat(stack[..., :1], 3, axis=3))


def test_arrays_of_equal_bytes_and_another_shape_are_other_images(stack: np.ndarray) -> None:
    same, other = stack.copy(), stack.reshape(7, 6, 5, 3)
    first, again, turned = (list(open_source(images).parts[0].stamps()) for images in (stack, same, other))
    assert first == again
    assert first != turned


def test_npz_streams_over_chunk_borders(tmp_path: Path, stack: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewlabels.data.parts.CHUNK_BYTES", 2 * stack[0].nbytes)
    np.savez_compressed(tmp_path / "a.npz", images=stack)
    assert np.array_equal(np.stack(decoded(open_source(tmp_path / "a.npz"))), stack)


def test_npz_with_labels_classes_and_test_images(tmp_path: Path, stack: np.ndarray) -> None:
    np.savez(
        tmp_path / "a.npz", images=stack, labels=[0, 1, -1, 1, 0, 0, 1], test_images=stack[:2], test_labels=[1, 0],
        classes=["zebra", "ant"],
    )  # fmt: skip
    source = open_source(tmp_path / "a.npz")
    assert source.labels == ("zebra", "ant", None, "ant", "zebra", "zebra", "ant", "ant", "zebra")
    assert source.splits == ("train",) * 7 + ("test",) * 2
    assert source.classes == ("zebra", "ant")


def test_npz_with_names_as_bytes_and_arrays_that_are_not_known(tmp_path: Path, stack: np.ndarray) -> None:
    labels = [0, 1, -1, 1, 0, 0, 1]
    classes = np.array([b"zebra", "ünt".encode()])
    np.savez(tmp_path / "a.npz", images=stack, labels=labels, classes=classes, val_images=stack, val_labels=labels)
    source = open_source(tmp_path / "a.npz")
    assert source.classes == ("zebra", "ünt")
    assert len(source) == 7
    (note,) = source.notes
    assert note.endswith("val_images, val_labels")
    np.savez(tmp_path / "a.npz", images=stack, labels=["cat"] * 7, classes="cat", test_labels=labels)
    source = open_source(tmp_path / "a.npz")
    assert source.classes == ("cat",)
    assert source.notes[0].endswith("are known): test_labels"), "there are no images for them"
    np.savez(tmp_path / "a.npz", images=stack, classes=["zebra", "u\u0308nt"], test_images=stack, test_labels=labels)
    assert open_source(tmp_path / "a.npz").classes == ("zebra", "\u00fcnt")
    np.savez(tmp_path / "a.npz", images=stack, labels=labels, classes=[])
    assert open_source(tmp_path / "a.npz").classes is None


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (["zebra", "a\x1b[2J"], "control or invisible"), (["zebra", "x" * 201], "more than 200"),
        (["zebra", ""], "without a name"), (["zebra", "zebra"], 'two classes are called "zebra"'),
    ],
)  # fmt: skip
def test_declared_classes_are_checked_as_labels_are(
    tmp_path: Path, stack: np.ndarray, classes: list[str], words: str
) -> None:
    np.savez(tmp_path / "a.npz", images=stack, labels=[0, 1, -1, 1, 0, 0, 1], classes=classes)
    with pytest.raises(DataError, match=words):
        open_source(tmp_path / "a.npz")


def npy(shape: str) -> bytes:
    """The header of an array and nothing behind it."""
    head = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head


@pytest.mark.parametrize("shape", ["(999999999999,)", "(-1,)", "(1 << 70,)", "__import__('os')", "(" * 4000, "'", "\0"])
@pytest.mark.parametrize("name", ["images", "labels", "classes"])
def test_hostile_headers_are_refused_before_memory_is_taken(
    tmp_path: Path, stack: np.ndarray, name: str, shape: str
) -> None:
    np.savez(tmp_path / "a.npz", **({} if name == "images" else {"images": stack}))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr(f"{name}.npy", npy(shape))
    with pytest.raises(DataError):
        open_source(tmp_path / "a.npz")


def test_a_few_bytes_that_stand_for_gigabytes_are_refused(tmp_path: Path, stack: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", images=stack)
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("labels.npy", "w") as file,
    ):
        file.write(npy(f"({65 << 20},)"))
        for _ in range(65):
            file.write(bytes(8 << 20))
    with pytest.raises(DataError, match="more than 512 MiB"):
        open_source(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), "multiply values from 0 to 1 by 255"),
        (np.zeros((2, 4, 4), np.uint16), r"255 / images\.max\(\)"),
        (np.zeros((2, 4, 4), bool), r"astype\(np\.uint8\) \* 255"),
        (np.zeros((2, 4, 4), np.int64), "astype"),
        (np.zeros((2, 3, 4, 4), np.uint8), "transpose"),
        (np.zeros((4, 4), np.uint8), "reshape"),
        (np.zeros((2, 4, 4, 4), np.uint8), "reshape"),
        (np.zeros((0, 4, 4), np.uint8), "not a single pixel"),
        (np.array([None, "x"], dtype=object), "object"),
    ],
)
def test_arrays_that_are_not_images(images: np.ndarray, words: str) -> None:
    with pytest.raises(DataError, match=words) as refused:
        open_source(images)
    assert "uint8" in str(refused.value) or "pixel" in str(refused.value)


def test_damaged_array_files(tmp_path: Path, stack: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", picture=stack)
    with pytest.raises(DataError, match=r'no array "images"'):
        open_source(tmp_path / "a.npz")
    np.save(tmp_path / "cut.npy", stack)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-10])
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "objects.npz", images=stack, labels=np.array([{}] * 7, dtype=object))
    np.save(tmp_path / "fortran.npy", np.asfortranarray(stack))
    for name, words in (
        ("cut.npy", "ends before"), ("text.npy", "cannot be read"), ("text.npz", "cannot be read"),
        ("objects.npz", "never loaded"), ("fortran.npy", "Fortran"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words):
            open_source(tmp_path / name)


def test_digits() -> None:
    source = open_source("digits")
    assert len(source) == 1797
    assert source.splits.count("test") == 597
    assert source.splits[1199:1201] == ("train", "test")
    assert source.classes == tuple("0123456789")
    from sklearn.datasets import load_digits

    digits = load_digits()
    assert source.labels == tuple(map(str, digits.target))
    first = next(source.payloads())
    assert first[0, 3] == round(digits.images[0][0, 3] * 255 / 16)
    assert max(int(image.max()) for image in decoded(source)) == 255


# --- label sequences ---------------------------------------------------------------------------------------------


def test_sequences_of_labels(stack: np.ndarray) -> None:
    import torch

    nan = float("nan")
    expected = ("0", "3", None, None, "3", "0", None)
    mixed: list[object] = [0, 3, None, "", 3.0, np.int64(0), nan]
    for labels in (mixed, tuple(mixed)):
        assert open_source(stack, labels).labels == expected
    assert open_source(stack, np.array([0, 3, -1, -1, 3, 0, -1])).labels == expected
    assert open_source(stack, torch.tensor([0, 3, -1, -1, 3, 0, -1])).labels == expected
    assert open_source(stack, np.array([0, 3, nan, nan, 3, 0, nan])).labels == expected
    assert open_source(stack, [" cat ", "dog", "", "cat", None, "dog", "dog"]).labels[:3] == ("cat", "dog", None)
    assert open_source(stack, [True, False] * 3 + [True]).labels[:2] == ("True", "False")


def test_wrong_sequences_of_labels(stack: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"3 labels for 7 images"):
        open_source(stack, [1, 2, 3])
    wrong = [-2, 1.5, "nan", "cat", "cat", "a\x1bb", [1]]
    with pytest.raises(DataError) as refused:
        open_source(stack, wrong)
    assert len(refused.value.details) == 5
    for place in ("label 0: -2", "label 1: 1.5", "label 2:", "label 5:", "label 6: a list"):
        assert any(place in detail for detail in refused.value.details), place
    with pytest.raises(DataError, match=r'"Cat" .* and "cat"'):
        check_classes(open_source(stack, ["Cat", "cat"] + [None] * 5))


def test_labels_of_a_folder_are_replaced(tmp_path: Path) -> None:
    picture(tmp_path / "p/cat/a.png")
    picture(tmp_path / "p/dog/b.png")
    (tmp_path / "labels.csv").write_text("image,label\na.png,tiger\n")
    assert open_source(tmp_path / "p", tmp_path / "labels.csv").labels == ("tiger", None)
    assert open_source(tmp_path / "p", ["x", "y"]).labels == ("x", "y")


def test_held_out_images_of_any_kind(tmp_path: Path, stack: np.ndarray) -> None:
    picture(tmp_path / "t/train/cat/a.png")
    for test, labels in ((tmp_path / "t", ("cat",)), ((stack[:2], ["x", "y"]), ("x", "y")), (stack[:1], (None,))):
        source = open_source(stack, ["x", "y"] * 3 + ["x"], test=test)
        assert source.labels[7:] == labels
        assert source.splits == ("train",) * 7 + ("test",) * len(labels)
        assert len(decoded(source)) == len(source)
    with pytest.raises(MissingInput):
        open_source(stack, test=tmp_path / "nowhere")


# --- parquet -----------------------------------------------------------------------------------------------------


def write_parquet(path: Path, count: int, *, metadata: dict[str, str], struct: bool = True) -> list[bytes]:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    raw = []
    for i in range(count):
        raw.append(picture(path.parent / "tmp/x.png", np.full((4, 4, 3), i, np.uint8)).read_bytes())
    images = [{"bytes": b, "path": f"{i}.png" if i else None} for i, b in enumerate(raw)] if struct else raw
    labels = pa.array([None if i == 1 else i % 3 for i in range(count)], pa.int64())
    table = pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=4)
    return raw


@pytest.mark.parametrize("key", ["class_names", "huggingface", "none"])
@pytest.mark.parametrize("struct", [True, False])
def test_parquet(tmp_path: Path, key: str, struct: bool) -> None:
    names = ["ant", "bee", "cat"]
    metadata = {
        "class_names": {"class_names": json.dumps(names)},
        "huggingface": {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})},
        "none": {"other": "{"},
    }[key]
    raw = write_parquet(tmp_path / "a.parquet", 10, metadata=metadata, struct=struct)
    source = open_source(tmp_path / "a.parquet")
    assert list(source.payloads()) == raw
    assert 1 <= len(list(source.sample(4))) <= 4
    shown = names if key != "none" else ["0", "1", "2"]
    assert source.labels == tuple(None if i == 1 else shown[i % 3] for i in range(10))
    assert source.classes == (tuple(names) if key != "none" else None)
    assert source.names[0] == "a.parquet:0"
    assert source.names[2] == ("2.png" if struct else "a.parquet:2")


def test_folder_of_parquet_files(tmp_path: Path) -> None:
    (tmp_path / "d/data").mkdir(parents=True)
    for name, count in (("train-00000-of-00002", 3), ("train-00001-of-00002", 2), ("test-00000-of-00001", 2)):
        write_parquet(tmp_path / f"{name}.parquet", count, metadata={})
        (tmp_path / f"{name}.parquet").rename(tmp_path / "d/data" / f"{name}.parquet")
    source = open_source(tmp_path / "d")
    assert source.splits == ("test",) * 2 + ("train",) * 5
    assert len(decoded(source)) == 7


@pytest.mark.parametrize("count", [1, 3, 10])
def test_a_sample_is_no_larger_than_asked_for_however_many_files_there_are(tmp_path: Path, count: int) -> None:
    (tmp_path / "d").mkdir()
    write_parquet(tmp_path / "0.parquet", 36, metadata={})  # 9 row groups
    for i in range(5):
        (tmp_path / f"d/{i}.parquet").write_bytes((tmp_path / "0.parquet").read_bytes())
    source = open_source(tmp_path / "d")
    assert 1 <= len(list(source.parts[0].sample(count))) <= count
    sample = list(source.sample(count))
    assert len(sample) == count
    payloads = list(source.payloads())
    assert all(one in payloads for one in sample)


def test_many_files_are_joined_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, each copies the names of all that stand before it: 8 s for 400 files of 4,000."""
    joins = []
    monkeypatch.setattr(sources, "join", lambda *given: (joins.append(len(given)), join(*given))[1])
    (tmp_path / "d").mkdir()
    write_parquet(tmp_path / "0.parquet", 4, metadata={})
    for number in range(7):
        (tmp_path / f"d/{number}.parquet").write_bytes((tmp_path / "0.parquet").read_bytes())
    assert len(open_source(tmp_path / "d")) == 28
    assert joins == [7]


def test_sources_joined() -> None:
    names = tuple(map(str, range(4000)))
    many = [replace(unlabeled("", names, Files(names)), classes=("ant", "bee")) for _ in range(400)]
    joined = join(*many)
    assert len(joined) == len(joined.labels) == len(joined.splits) == 400 * 4000
    assert (joined.names[4001], joined.named(4001), len(joined.parts)) == ("1", '"1"', 400)
    assert joined.classes == ("ant", "bee")
    assert join(*many, replace(many[0], classes=("ant",)), many[0]).classes is None


def test_wrong_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"imgae": [b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r'no column "image" \(did you mean "imgae"'):
        open_source(tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [[1, 2]]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="encoded pictures"):
        open_source(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_text("hello")
    with pytest.raises(DataError, match="cannot be read"):
        open_source(tmp_path / "c.parquet")
    real_import = builtins.__import__

    def without_pyarrow(name: str, *rest: object, **more: object) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real_import(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(UsageError, match=r'pip install "fewlabels\[data\]"'):
        open_source(tmp_path / "a.parquet")


def test_parquet_without_the_columns_that_are_known(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    raw = picture(tmp_path / "x.png").read_bytes()
    for name in ("a", "b"):
        images = [{"bytes": raw, "path": path} for path in ("1.png", "1.png", "/home/me/2.png")]
        pq.write_table(pa.table({"image": images, "fine_label": [0, 1, 0]}), tmp_path / f"{name}.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert source.names == ("a.parquet:0", "a.parquet:1", "/home/me/2.png")
    (note,) = source.notes
    assert note == ("there is no column label, so nothing is labeled by fine_label; rename the one, or give labels")
    (tmp_path / "labels.csv").write_text("image,label\na.parquet:1,cat\n/home/me/2.png,dog\n")
    assert open_source(tmp_path / "a.parquet", tmp_path / "labels.csv").labels == (None, "cat", "dog")
    (tmp_path / "d").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"{name}.parquet").rename(tmp_path / f"d/{name}.parquet")
    assert open_source(tmp_path / "d").notes == (note,), "once, however many files there are"
    named = {"class_names": json.dumps(["A", "a", "cat", "Cat"])}
    table = pa.table({"image": [raw] * 4, "label": [0, 1, 2, 3]}).replace_schema_metadata(named)
    pq.write_table(table, tmp_path / "e.parquet")
    check_classes(open_source(tmp_path / "e.parquet"))  # who declares both means both


def test_cifar_parquet(shared_data: Path) -> None:
    source = open_source(shared_data / "cifar10-jpeg/test.parquet")
    assert len(source) == 10_000
    assert set(source.splits) == {"train"}  # a single file is what it is given as
    assert source.labels.count("frog") == 1000
    assert source.classes is not None
    assert source.classes[0] == "airplane"


# --- a list of the labeled files ---------------------------------------------------------------------------------


def test_a_list_of_file_names_says_which_labels_count(tmp_path: Path) -> None:
    """The form of the reference's subsets of ImageNet: all other images stay, without their labels."""
    for name in ("train/n00000001/n00000001_5.JPEG", "train/n00000001/n00000001_6.JPEG",
                 "train/n00000002/n00000002_1.JPEG", "val/n00000002/v.JPEG"):  # fmt: skip
        picture(tmp_path / "images" / name)
    (tmp_path / "1percent.txt").write_text("n00000001_6.JPEG\nn00000002_1.JPEG\n")
    source = open_source(tmp_path / "images", tmp_path / "1percent.txt")
    assert [(name.rsplit("/", 1)[-1], label, split) for name, label, split in content(source)] == [
        ("n00000001_5.JPEG", None, "train"),
        ("n00000001_6.JPEG", "n00000001", "train"),
        ("n00000002_1.JPEG", "n00000002", "train"),
        ("v.JPEG", "n00000002", "val"),
    ]


def test_a_list_finds_the_synset_in_the_name(tmp_path: Path) -> None:
    for name in ("n00000001_5.JPEG", "n00000002_1.JPEG"):
        picture(tmp_path / "images" / name)
    (tmp_path / "list.txt").write_text("n00000001_5.JPEG\n\nn00000002_1.JPEG")
    assert open_source(tmp_path / "images", tmp_path / "list.txt").labels == ("n00000001", "n00000002")


def test_folders_in_a_list_count_unless_they_are_another_places(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/7.png", "dog/1.png", "2.png"):
        picture(tmp_path / "images" / name)

    def told(*lines: str) -> dict[str, str | None]:
        (tmp_path / "list.txt").write_text("\n".join(lines))
        return {name: label for name, label, _ in content(open_source(tmp_path / "images", tmp_path / "list.txt"))}

    both = {"2.png": None, "cat/1.png": "cat", "cat/7.png": None, "dog/1.png": "dog"}
    assert told("cat/1.png", "dog/1.png") == both
    assert told("cat/1.png", "7.png")["cat/7.png"] == "cat"
    assert told("elsewhere/7.png")["cat/7.png"] == "cat"
    with pytest.raises(DataError) as caught:
        told("cat/1.png", "dog/7.png")
    assert caught.value.details == ('line 2: "dog/7.png" is the name of no images',)


def test_all_faults_of_a_list_are_told(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png", "loose.png"):
        picture(tmp_path / "images" / name)
    (tmp_path / "list.txt").write_text("1.png\nloose.png\nnone.png\n")
    with pytest.raises(DataError) as caught:
        open_source(tmp_path / "images", tmp_path / "list.txt")
    assert caught.value.details == (
        'line 1: "1.png" is the name of 2 images',
        'line 2: "loose.png" is in no class folder',
        'line 3: "none.png" is the name of no images',
    )


def test_held_out_images_keep_their_class_under_a_labels_csv(tmp_path: Path) -> None:
    for name in ("a.png", "test/cat/b.png", "test/dog/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "labels.csv").write_text("image,label\na.png,cat\ntest/dog/c.png,cat\n")
    source = open_source(tmp_path, tmp_path / "labels.csv")
    assert dict(zip(source.names, source.labels, strict=True)) == {
        "a.png": "cat", "test/cat/b.png": "cat", "test/dog/c.png": "cat"
    }  # fmt: skip


def test_two_images_of_one_name_are_never_mixed_up(tmp_path: Path, stack: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", images=stack, test_images=stack[:3])
    table = tmp_path / "labels.csv"
    table.write_text("image,label\nimage-000001,cat\nimage-000003,dog\ntest-000001,cat\n")
    assert open_source(tmp_path / "a.npz", table).labels == (None, "cat", None, "dog", *[None] * 4, "cat", None)
    for name in ("same/1.png", "other/1.png"):
        picture(tmp_path / name)
    twice = [tmp_path / "same/1.png", tmp_path / "same/1.png"]
    table.write_text(f"image,label\n{tmp_path}/same/1.png,cat\n")
    with pytest.raises(DataError) as refused:
        open_source(twice, table)
    assert "several images are called" in refused.value.details[0]


def test_relative_paths_are_those_of_the_working_folder_of_the_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one", "two"):
        picture(tmp_path / folder / "in/1.png")
        (tmp_path / folder / "labels.csv").write_text(f"image,label\nin/1.png,{folder}\n")
        monkeypatch.chdir(tmp_path / folder)
        assert open_source(["in/1.png"], "labels.csv").labels == (folder,)


def test_parquet_files_whose_images_share_names_can_be_labeled(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in ("a", "b"):
        write_parquet(tmp_path / f"{name}.parquet", 3, metadata={})
        (tmp_path / f"{name}.parquet").rename(tmp_path / "d" / f"{name}.parquet")
    table = tmp_path / "labels.csv"
    table.write_text("image,label\na.parquet/2.png,cat\nb.parquet/1.png,dog\n")
    source = open_source(tmp_path / "d", table)
    assert dict(zip(source.names, source.labels, strict=True))["a.parquet/2.png"] == "cat"
    assert [label for label in source.labels if label] == ["cat", "dog"]
    table.write_text("image,label\n2.png,cat\n")
    with pytest.raises(DataError) as refused:
        open_source(tmp_path / "d", table)
    assert 'images are called "2.png"' in refused.value.details[0]


def test_parquet_files_are_one_set(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (tmp_path / "d").mkdir()
    raw = picture(tmp_path / "x.png").read_bytes()
    for name, label in (("a", "cat"), ("b", "Cat")):
        pq.write_table(pa.table({"image": [raw], "label": [label]}), tmp_path / f"d/{name}.parquet")
    with pytest.raises(DataError, match="look like one class"):
        check_classes(open_source(tmp_path / "d"))
    for name, label in (("a", "cat"), ("b", "cow")):  # names decide, whatever is declared
        table = pa.table({"image": [raw], "label": [label]})
        declared = {"class_names": json.dumps(["cat", "unlabeled"])}
        pq.write_table(table.replace_schema_metadata(declared if name == "a" else {}), tmp_path / f"d/{name}.parquet")
    assert open_source(tmp_path / "d").labels == ("cat", "cow")
    named = pa.table({"image": [raw], "label": [1]})
    pq.write_table(named, tmp_path / "d/a.parquet")
    pq.write_table(named.replace_schema_metadata({"class_names": json.dumps(["ant", "bee"])}), tmp_path / "d/b.parquet")
    with pytest.raises(DataError, match="others have numbers only"):
        open_source(tmp_path / "d")


def test_shards_beside_pictures_are_told(tmp_path: Path) -> None:
    picture(tmp_path / "cover.png")
    (tmp_path / "images.tar").write_bytes(b"")
    assert open_source(tmp_path).notes == ("1 .tar or .parquet files beside pictures are passed over",)


def test_an_empty_path_is_not_the_current_folder() -> None:
    with pytest.raises(MissingInput, match="is empty"):
        open_source("")


class Frame:
    """As a pandas.DataFrame: compared with anything it gives what is neither true nor false."""

    shape = (2, 2)

    def __eq__(self, other: object) -> Frame:  # type: ignore[override]
        return self

    def __hash__(self) -> int:
        return 1

    def __bool__(self) -> bool:
        raise ValueError("The truth value of a DataFrame is ambiguous")


def test_tables_and_arrays_of_paths_are_told_what_may_be_given() -> None:
    with pytest.raises(UsageError, match="images cannot be a Frame"):
        open_source(Frame())
    for kind in (str, object):
        with pytest.raises(DataError) as caught:
            open_source(np.array(["a.jpg", "b.jpg"], kind))
        assert caught.value.fix == "give paths of pictures as a list: images.tolist()"


class NAType:
    """As pandas.NA: neither equal to anything nor not."""

    def __eq__(self, other: object) -> NAType:  # type: ignore[override]
        return self

    def __hash__(self) -> int:
        return 1

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")


def test_what_is_no_sequence_of_labels(stack: np.ndarray) -> None:
    for labels in (dict.fromkeys(map(str, range(7)), "cat"), set("abcdefg"), 5):
        with pytest.raises(UsageError, match="labels cannot be a"):
            open_source(stack, labels)
    missing = NAType()
    assert open_source(stack, ["a", missing, "b", missing, "a", "b", "a"]).labels[:4] == ("a", None, "b", None)
