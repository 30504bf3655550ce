"""A labels CSV: harmless forms are read, every mistake is found, placed by its line, and said with all the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewlabels.data import decode, tables
from fewlabels.data.source import Source
from fewlabels.data.sources import check_classes, open_source
from fewlabels.errors import DataError, MissingInput


def content(source: Source) -> list[tuple[str, str | None, str]]:
    return list(zip(source.names, source.labels, source.splits, strict=True))


@pytest.fixture
def album(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "c.png", "sub/d.png", "sub/e.png", "other/e.png"):
        (tmp_path / "album" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), "green").save(tmp_path / "album" / name)
    return tmp_path / "album"


def labeled(album: Path, text: str | bytes) -> dict[str, tuple[str | None, str]]:
    raw = text if isinstance(text, bytes) else text.encode()
    (album.parent / "labels.csv").write_bytes(raw)
    source = open_source(album, album.parent / "labels.csv")
    check_classes(source)
    return {name: (label, split) for name, label, split in content(source) if (label, split) != (None, "train")}


@pytest.mark.parametrize(
    "text",
    [
        "image,label\na.png,cat\nb.png,dog\nc.png,\n",
        b"\xef\xbb\xbfimage,label\na.png,cat\nb.png,dog\n",  # Excel's BOM
        "image,label\r\na.png,cat\r\nb.png,dog\r\n\r\n",
        "image,label\ra.png,cat\rb.png,dog\r",
        "image;label\na.png;cat\nb.png;dog\n",
        "image\tlabel\na.png\tcat\nb.png\tdog\n",
        '"image","label"\n"a.png","cat"\n"b.png","dog"',
        "image\tlabel\r\na.png\tcat\r\nb.png\tdog\r\n".encode("utf-16"),  # Excel's "Unicode text"
        "image,label\na.png,cat\nb.png,dog\n".encode("utf-32"),
        " Image , LABEL \na.png, cat \nb.png,dog \n,\n\n",
        "label,image\ncat,a.png\ndog,b.png\n",
        "image,label\nalbum/a.png,cat\n./album/../album/b.png,dog\n",
        "image,label\na.png,cat\nb.png,dog\na.png,cat\nalbum/a.png,cat\n",  # said twice, the same
        "image,label\nalbum\\a.png,cat\nb.png,dog\n",
        "image,label,split\na.png,cat,\nb.png,dog,train\n",
        "image,label\nABSOLUTE/a.png,cat\nb.png,dog\n",
        "image;label;split;;\na.png;cat;;;\nb.png;dog;train;;\n",  # columns that a spreadsheet once had
        ",image,label\n,a.png,cat\n ,b.png,dog\n",
        b"\xef\xbb\xbfsep=;\r\nimage;label\r\na.png;cat\r\nb.png;dog\r\n",  # Excel's own first line
    ],
)
def test_harmless_forms_of_a_csv(album: Path, text: str | bytes) -> None:
    if isinstance(text, str):
        text = text.replace("ABSOLUTE", str(album))
    assert labeled(album, text) == {"a.png": ("cat", "train"), "b.png": ("dog", "train")}


def test_csv_finds_images_by_path_and_by_a_unique_name(album: Path) -> None:
    assert labeled(album, "image,label,split\nd.png,x,val\nsub/e.png,y,test\n") == {
        "sub/d.png": ("x", "val"),
        "sub/e.png": ("y", "test"),
    }


def test_a_path_that_is_one_image_beside_the_csv_and_another_in_the_folder(album: Path) -> None:
    """album/album/ holds a.png and x.png too; or the folder comes through a link that is called as one in it."""
    for name in ("album/a.png", "album/x.png", "linked/a.png"):
        (album / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), "red").save(album / name)
    (album.parent / "linked").symlink_to(album)
    with pytest.raises(DataError, match="3 faults") as refused:
        labeled(album, f"image,label\nalbum/a.png,x\nlinked/a.png,y\nnone.png,x\nb.png,y\n{album}/a.png,x\n")
    words = f'line 2: "album/a.png" is two images: {album}/a.png and {album}/album/a.png; write the whole path'
    assert refused.value.details[0] == words
    assert refused.value.details[1].startswith('line 3: "linked/a.png" is two images')
    text = f"image,label\n{album}/a.png,x\n{album}/album/a.png,y\nalbum/x.png,z\nalbum/b.png,z\n"
    read = {"a.png": "x", "album/a.png": "y", "album/x.png": "z", "b.png": "z"}
    assert labeled(album, text) == {name: (label, "train") for name, label in read.items()}


def test_a_csv_as_the_images(album: Path) -> None:
    file = album / "labels.csv"
    file.write_text("image,label,split\nb.png,dog,\nsub/d.png,,val\na.png,cat,test\nb.png,dog,\n")
    source = open_source(file)
    assert content(source) == [("b.png", "dog", "train"), ("sub/d.png", None, "val"), ("a.png", "cat", "test")]
    assert source.named(2) == '"a.png" (line 4)'
    assert open_source(file, ["x", "y", "z"]).labels == ("x", "y", "z"), "a list of labels goes by its lines"
    assert [decode.decode(payload).shape for payload in source.payloads()] == [(6, 8, 3)] * 3
    file.write_text("image,label\nb.pgn,dog\n../labels.csv,cat\n")
    with pytest.raises(DataError) as refused:
        open_source(file)
    assert 'line 2: no image "b.pgn" (did you mean "b.png"?)' in refused.value.details
    assert "line 3" in refused.value.details[1]
    assert "leads out of" in refused.value.details[1]


def test_a_csv_over_an_array(album: Path) -> None:
    (album / "l.csv").write_text("image,label\nimage-000002,cat\n")
    images = np.zeros((4, 5, 5), np.uint8)
    assert open_source(images, album / "l.csv").labels == (None, None, "cat", None)


H = "image,label\n"
CSV_FAULTS = [  # (text, what must be said)
    ("", "is empty"),
    ("\n\n", "is empty"),
    ("image,label\n", "not a single image"),
    ("image,label\na.png,cat\n".encode("utf-16")[:-1], "cannot be read as UTF-16"),
    ("image,label\na.png,cat\n".encode("utf-16-le"), "UTF-16"),
    ("image,label\na.png,caf\xe9\n".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8"),
    ("a.png,cat\nb.png,dog\n", 'line 1: the column "image" is missing'),
    ("imgae,label\na.png,cat\n", 'unknown column "imgae" (did you mean "image"?)'),
    ("image,lable\na.png,cat\n", 'unknown column "lable" (did you mean "label"?)'),
    ("image,label,confidence\na.png,cat,1\n", 'unknown column "confidence"'),
    ("image\na.png\n", 'the column "label" is missing'),
    ("image,label,label\na.png,cat,cat\n", 'the column "label" is there 2 times'),
    (H + "a.png,cat,extra\n", "line 2: 3 cells where the header has 2"),
    (H + "a.png\n", "line 2: 1 cell where the header has 2"),
    (H + "# a comment\n", "line 2: 1 cell where"),
    (H + "ca.png,cat\n", 'line 2: no image "ca.png" (did you mean'),
    (H + "A.png,cat\n", '(did you mean "a.png"?)'),
    (H + "a,cat\n", 'line 2: no image "a" (did you mean "a.png"?)'),
    (H + "e.jpg,cat\n", 'line 2: no image "e.jpg" (did you mean "other/e.png"?)'),
    (H + "e.png,cat\n", '2 images are called "e.png"'),
    (H + "/etc/passwd,cat\n", '"/etc/passwd" leads out of'),
    (H + "../../x.png,cat\n", "leads out of"),
    (H + "a.png,cat\na.png,dog\n", 'line 3: "a.png" has "dog" here and "cat" in line 2'),
    (H + "a.png,cat\nalbum/a.png,dog\n", 'has "dog" here and "cat" in line 2'),
    (H + "a.png,cat\na.png,\n", 'has no label here and "cat" in line 2'),
    (H + ",cat\n", "line 2: no image name"),
    (
        ",image,label\n0,a.png,cat\n1,b.png,dog\n",
        'line 2: "0": an index column without a name? write it with index=False',
    ),
    ("image,label,\na.png,cat,\nb.png,dog,sure?\n", 'line 3: "sure?": an index column without a name?'),
    ("image,label,\na.png,cat\n", "line 2: 2 cells where the header has 3"),
    ("sep=;\nimage;label\nzz.png;cat\n", 'line 3: no image "zz.png"'),
    (H + "a.png,cat\n" + H + "b.png,dog\n", "line 3: a second header line: delete it"),
    (H + 'a.png,cat\n\ufeff"Image","Label","split"\nb.png,dog,val\n', "line 3: a second header line: delete it"),
    (H + "a.png,Cat\nb.png,cat\n", 'line 3: class "cat" and class "Cat" (line 2) look like one class'),
    (H + "a.png,fish\nb.png,\ufb01sh\n", "look like one class"),
    (H + "a.png,K\u00e4fer\nb.png,K\u00c3\u00a4fer\n", "look like one class"),  # Excel took UTF-8 for Windows-1252
    (H + "a.png,01\nb.png,1\n", "look like one class"),
    (H + "a.png,1.0\nb.png,1\n", "look like one class"),
    (H + "a.png,polar bear\nb.png,polar_bear\n", "look like one class"),
    (H + "a.png,'cat'\nb.png,cat\n", "look like one class"),
    (H + "a.png,c\u0430t\n", "mixes Latin and Cyrillic"),
    (H + "a.png,#REF!\n", "what a spreadsheet writes"),
    (b"PK\x03\x04 and so on", "is a spreadsheet"),
    (H + "a.png,NaN\n", "leave the label empty"),
    (H + "a.png,None\n", "leave the label empty"),
    (H + "a.png,-1\n", "leave the label empty"),
    (H + "a.png,c\x1b[2Jat\n", "control or invisible"),
    (H + "a.png,c\u202eat\n", "control or invisible"),
    (H + "a.png,c\0at\n", "line 2"),
    (H + f"a.png,{'x' * 300}\n", "300 characters"),
    (H + 'a.png,"cat\nb.png,dog\n', "line 2"),
    (H + '"a.png\nb.png",dog\n', "line break"),
    ("image,label,split\na.png,cat,tset\n", 'line 2: unknown split "tset" (did you mean "test"?)'),
    ("image,label,split\na.png,cat,test\na.png,cat,train\n", "another split in line 2"),
]


@pytest.mark.parametrize(("text", "words"), CSV_FAULTS)
def test_csv_faults_are_found_and_placed(album: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(DataError) as refused:
        labeled(album, text)
    assert words in str(refused.value)
    assert "labels.csv" in str(refused.value)
    assert refused.value.fix


def test_all_faults_of_a_csv_come_at_once_in_the_order_of_lines(album: Path) -> None:
    lines = ["image,label,split", "a.png,cat,", "zz.png,cat,", "b.png,nan,", "a.png,dog,", "c.png,Cat,tst", "x,,,,"]
    with pytest.raises(DataError, match="6 faults") as refused:
        labeled(album, "\n".join(lines))
    places = [detail.split(":")[0] for detail in refused.value.details]
    assert places == ["line 3", "line 4", "line 5", "line 6", "line 6", "line 7"]


def test_a_quote_that_does_not_close_hides_no_other_fault(album: Path) -> None:
    lines = ["image,label", 'a.png,"cat', "zz.png,cat", '"b.png"x,dog', "c.png,nan"]
    with pytest.raises(DataError, match="4 faults") as refused:
        labeled(album, "\n".join(lines))
    assert [detail.split(":")[0] for detail in refused.value.details] == ["line 2", "line 3", "line 4", "line 5"]
    with pytest.raises(DataError, match="1 fault") as refused:
        labeled(album, 'image,"label\na.png,cat\n')
    assert refused.value.details[0].startswith("line 1: no cells")


def test_every_line_that_is_not_utf_8_is_named(album: Path) -> None:
    with pytest.raises(DataError) as refused:
        labeled(album, b"image,label\na.png,caf\xe9\nb.png,dog\nc.png,\xfc\n")
    assert [detail.split(":")[0] for detail in refused.value.details] == ["line 2", "line 4"]


def test_names_that_are_close_and_no_twins(album: Path) -> None:
    pairs = [
        ("1", "10"),
        ("2", "-2"),
        ("+", "-"),
        ("0.1", "1"),
        ("C", "C++"),
        ("x1", "x 1"),
        ("\u03b1-helix", "a-helix"),
    ]
    for one, other in pairs:
        assert len(labeled(album, f"image,label\na.png,{one}\nb.png,{other}\n")) == 2


def test_case_tells_letters_only_where_there_are_more_than_an_alphabet() -> None:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"  # EMNIST's balanced set, beside ten digits
    assert tables.twins([*"0123456789", *letters]) == []
    assert tables.twins([*"yYn"]) == [("y", "Y")]
    assert tables.twins(["A", '"A"']) == [("A", '"A"')]
    assert tables.twins([*letters, '"A"']) == [("A", '"A"')]


def test_images_that_a_csv_takes_out_of_their_place_are_noted(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/2.png", "train/dog/3.png", "test/cat/4.png", "test/dog/5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), "green").save(tmp_path / name)
    file = tmp_path / "labels.csv"
    file.write_text("image,label,split\n1.png,dog,\n2.png,dog,test\n3.png,x,\n4.png,cat,train\n5.png,dog,test\n")
    (note,) = open_source(tmp_path, file).notes
    assert "3 images of another class or split" in note
    assert note.endswith('counts: "test/cat/4.png" (line 5), "train/cat/1.png" (line 2), "train/dog/3.png" (line 4)')
    file.write_text("image,label\n1.png,x\n2.png,y\n3.png,y\n")  # its classes are not the folders
    (note,) = open_source(tmp_path, file).notes
    assert note == "not measured, since labels.csv has no such class: held-out images in cat, dog (2 of 2)"


@pytest.mark.parametrize("told", ["s\u00e4ge", "S\u00c3\u00a4ge"])
def test_a_class_spelled_otherwise_than_the_held_out_ones_is_refused(told: str, tmp_path: Path) -> None:
    """Its test images were passed over, and the few of other classes made the headline."""
    for name in ("train/S\u00e4ge/1.png", "train/x/2.png", "test/S\u00e4ge/3.png", "test/x/4.png", "test/y/5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), "green").save(tmp_path / name)
    file = tmp_path / "labels.csv"
    file.write_text(f"image,label\n1.png,{told}\n2.png,x\n", encoding="utf-8")
    source = open_source(tmp_path, file)
    assert source.notes[-1].endswith("has no such class: held-out images in y (1 of 3)")
    with pytest.raises(DataError, match="look like one class") as refused:
        check_classes(source)
    assert refused.value.details == (
        f'"S\u00e4ge" (as "test/S\u00e4ge/3.png") and "{told}" (as "train/S\u00e4ge/1.png" (line 2))',
    )


def test_accents_written_apart_are_the_same_class(tmp_path: Path) -> None:
    """macOS unpacks them so, Excel writes the others; the files are still found where they are."""
    apart, whole = "Ka\u0308fer", "K\u00e4fer"
    for name in (f"train/{apart}/1.png", "train/x/2.png", f"test/{apart}/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), "green").save(tmp_path / name)
    file = tmp_path / "labels.csv"
    file.write_text(f"image,label\ntrain/{whole}/1.png,{apart}\n2.png,{whole}\n", encoding="utf-8")
    for source in (open_source(tmp_path, file), open_source(tmp_path, [apart, whole, whole])):
        check_classes(source)
        assert set(source.labels) == {whole}
        assert source.names[0] == f"test/{apart}/3.png"
        assert len([decode.decode(payload, None) for payload in source.payloads()]) == 3
    assert set(open_source(tmp_path).labels) == {whole, "x"}


def test_columns_too_many_are_to_be_deleted(album: Path) -> None:
    """ "Correct these lines" sent people to the rows of a table of predictions."""
    for header, fix in (("image,label,confidence", "delete these columns"), ("image,lable", "correct the first line")):
        with pytest.raises(DataError) as refused:
            labeled(album, f"{header}\na.png,cat,1\n")
        assert refused.value.fix.startswith(fix)


def test_a_missing_csv(album: Path) -> None:
    with pytest.raises(MissingInput, match="no such file"):
        open_source(album, album / "nothing.csv")
    with pytest.raises(DataError, match="is a folder"):
        open_source(album, album / "sub")
