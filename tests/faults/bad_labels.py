"""Labels with a mistake of every kind that we know of, what must be said of each, and forms that are only unusual."""

from __future__ import annotations

from dataclasses import dataclass

from fewlabels.data.tables import LONGEST_LABEL

H = "image,label\n"
REST = "b.png,dog\nc.png,cat\n"  # two lines without a mistake
ROWS = 100_000  # lines of a large file, the last of them a mistake


@dataclass(frozen=True)
class Case:
    """One kind of mistake (or, with labels, one harmless form) and what must be said of it."""

    kind: str
    content: str | bytes  # of labels.csv, or whatever `words` names
    says: str = ""  # a piece of the message
    lines: tuple[int, ...] = ()  # that must be named, once for each mistake in them
    code: int = 65
    words: str = "ALBUM --labels FILE"
    labels: tuple[tuple[str, str], ...] = ()  # of the images, where it is accepted


def refused() -> list[Case]:
    """Mistakes that nobody can mean."""
    return [*_files(), *_headers(), *_cells(), *_images(), *_classes(), *_pictures(), *_other_sources()]


def _files() -> list[Case]:
    return [
        Case("an empty file", "", "is empty"),
        Case("nothing but blank lines", "\n \n\r\n", "is empty"),
        Case("nothing but separators", ",\n,,\n", "has no header"),
        Case("a header and no line", "image,label\n", "not a single image", (1,)),
        Case("Latin-1", f"{H}a.png,caf\xe9\n{REST}sub/d.png,\xfc\n".encode("latin-1"), "is not UTF-8", (2, 5)),
        Case("UTF-16 without a mark", f"{H}a.png,cat\n{REST}".encode("utf-16-le"), "UTF-16 without a mark"),
        Case("UTF-16, cut off", f"{H}a.png,cat\n{REST}".encode("utf-16")[:-1], "cannot be read as UTF-16"),
        Case("an Excel workbook", b"PK\x03\x04\x14\0\x06\0", "is a spreadsheet"),
        Case("a picture in place of the labels", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "cannot be read as UTF-8", (1,)),
        Case("a file that is not there", "", "no such file", code=66, words="ALBUM --labels ALBUM/lables.csv"),
        Case("a folder", "", "is a folder", words="ALBUM --labels ALBUM/sub"),
        Case("a mistake in the last of many lines", H + REST * (ROWS // 2) + "zz.png,cat\n", "zz.png", (ROWS + 2,)),
    ]


def _headers() -> list[Case]:
    return [
        Case("no header", "a.png,cat\n" + REST, 'the column "image" is missing', (1,) * 4),
        Case("image misspelled", f"imgae,label\na.png,cat\n{REST}", '"imgae" (did you mean "image"?)', (1, 1)),
        Case("label misspelled", f"image,lable\na.png,cat\n{REST}", '"lable" (did you mean "label"?)', (1, 1)),
        Case("a column too many", "image,label,sure\na.png,cat,1\n", 'unknown column "sure"', (1,)),
        Case("no column of labels", "image\na.png\nb.png\n", 'the column "label" is missing', (1,)),
        Case("a column twice", "image,label,label\na.png,cat,dog\n", 'the column "label" is there 2 times', (1,)),
        Case("a quote open in the header", f'image,"label\na.png,cat\n{REST}', "do its quotes close", (1,)),
    ]


def _cells() -> list[Case]:
    return [
        Case("a comment", f"{H}# by Ann\n{REST}", "1 cell where the header has 2", (2,)),
        Case("a cell too many", f"{H}a.png,cat,sure\n{REST}b.png,dog,x,y\n", "3 cells where", (2, 5)),
        Case("a cell too few", f"{H}a.png\n{REST}", "1 cell where", (2,)),
        Case("a comma in a name without quotes", f"{H}a,old.png,cat\n{REST}", "a name with a comma needs quotes", (2,)),
        Case("a quote open in a label", f'{H}a.png,"cat\n{REST}zz.png,cat\n', "do its quotes close", (2, 5)),
        Case("text behind a closing quote", f'{H}"a.png" x,cat\n{REST}b.png,nan\n', "do its quotes close", (2, 5)),
        Case("a line break in a quoted name", f'{H}"a\n.png",cat\n{REST}', "No cell has a line break", (2, 3)),
        Case("NUL in a label", f"{H}a.png,c\0at\n{REST}", "control or invisible", (2,)),
        Case("NUL in a name", f"{H}a.png\0,cat\n{REST}", "NUL in the image's name", (2,)),
        Case("no name", f"{H},cat\n{REST} ,dog\n", "no image name", (2, 5)),
        Case("a split misspelled", "image,label,split\na.png,cat,tset\nb.png,dog,\n", 'mean "test"?', (2,)),
    ]


def _images() -> list[Case]:
    return [
        Case("a name misspelled", f"{H}ca.png,cat\n{REST}", 'no image "ca.png" (did you mean', (2,)),
        Case("a name like no other", f"{H}{REST}IMG_20240101_093045,cat\n", 'no image "IMG_20240101', (4,)),
        Case("upper case", f"{H}{REST}A.PNG,cat\n", '(did you mean "a.png"?)', (4,)),
        Case("no extension", f"{H}a,cat\nb,dog\n", 'no image "b" (did you mean "b.png"?)', (2, 3)),
        Case("another extension", f"{H}{REST}d.jpg,cat\n", '(did you mean "sub/d.png"?)', (4,)),
        Case("a name that two folders have", f"{H}{REST}e.png,cat\n", '2 images are called "e.png"', (4,)),
        Case("a path from /", f"{H}/etc/passwd,cat\n{REST}", '"/etc/passwd" leads out of', (2,)),
        Case("a path upwards", f"{H}{REST}../../a.png,cat\n", '"../../a.png" leads out of', (4,)),
        Case("a path of another machine", f"{H}{REST}C:\\photos\\a.png,cat\n", '(did you mean "a.png"?)', (4,)),
        Case("a path on the web", f"{H}{REST}https://x.org/a.png,cat\n", '(did you mean "a.png"?)', (4,)),
        Case("a file that is no picture", f"{H}{REST}notes.txt,cat\n", 'no image "notes.txt"', (4,)),
        Case("columns exchanged", f"{H}cat,a.png\ndog,b.png\n", 'no image "cat"', (2, 3)),
        Case("one image, two labels", f"{H}a.png,cat\n{REST}a.png,dog\n", '"dog" here and "cat" in line 2', (5,)),
        Case("one image in two spellings, two labels", f"{H}a.png,cat\nALBUM/a.png,dog\n", '"cat" in line 2', (3,)),
        Case("one image with and without a label", f"{H}a.png,cat\n{REST}a.png,\n", "no label here", (5,)),
        Case(
            "one image in two splits", "image,label,split\na.png,x,val\na.png,x,\nb.png,y,\n", "split in line 2", (3,)
        ),
    ]


def _classes() -> list[Case]:
    twins = {
        "upper and lower case": ("Cat", "cat"), "a ligature": ("\ufb01sh", "fish"),
        "UTF-8 taken for Windows-1252": ("caf\u00c3\u00a9", "caf\u00e9"),
        "wide letters": ("\uff43at", "cat"), "leading zeros": ("01", "1"), "a whole number as a fraction": ("1", "1.0"),
        "spaces and underscores": ("polar bear", "polar_bear"), "hyphens": ("x-ray", "x ray"),
        "two spaces": ("polar bear", "polar  bear"), "quotes that do not quote": ("'cat'", "cat"),
        "quotes of a word processor": ("\u201ccat\u201d", "cat"),
    }  # fmt: skip
    found = [
        Case(
            f"one class spelled twice: {kind}",
            f"{H}a.png,{one}\nb.png,zebra\nc.png,{two}\n",
            "look like one class",
            (4,),
        )
        for kind, (one, two) in twins.items()
    ]
    for word in ("NaN", "NaT", "None", "null", "NA", "N/A", "-1", "?", "unlabeled"):
        found.append(Case(f"a word for no label: {word}", f"{H}a.png,{word}\n{REST}", "leave the label empty", (2,)))
    for word in ("#N/A", "#REF!", "#DIV/0!"):
        found.append(
            Case(f"an error of a spreadsheet: {word}", f"{H}{REST}a.png,{word}\n", "writes for an error", (4,))
        )
    for kind, mark in {
        "a terminal's escape": "\x1b[2J", "text turned round": "\u202e", "no width": "\u200b", "a hard space": "\xa0",
    }.items():  # fmt: skip
        found.append(
            Case(
                f"an invisible character in a class: {kind}",
                f"{H}a.png,c{mark}at\n{REST}",
                "control or invisible",
                (2,),
            )
        )
    return [
        *found,
        Case("letters of two alphabets", f"{H}a.png,c\u0430t\n{REST}", "mixes Latin and Cyrillic", (2,)),
        Case("a text in place of a class", f"{H}a.png,{'x' * (LONGEST_LABEL + 1)}\n{REST}", "201 characters", (2,)),
        Case(
            "six at once",
            "image,label,split\na.png,cat,\nzz.png,cat,\nb.png,nan,\na.png,dog,\nc.png,Cat,tst\nx,,,,\n",
            "6 faults",
            (3, 4, 5, 6, 6, 7),
        ),
        Case(
            "more than fit on a screen",
            H + "".join(f"zz{i},cat\n" for i in range(99)),
            "99 faults",
            tuple(range(2, 14)),
        ),
    ]


def _pictures() -> list[Case]:
    split = "image,label,split\n"
    return [
        Case(
            "one picture in two files, two labels",
            f"{H}a.png,cat\n{REST}copy.png,dog\n",
            "two different labels",
            (2, 5),
        ),
        Case("one class only", f"{H}a.png,cat\nc.png,cat\n", 'all 2 labels are of the one class "cat"'),
        Case(
            "a class only among the held-out",
            f"{split}a.png,cat,\nb.png,dog,\nc.png,dgo,val\nsub/d.png,cat,val\n",
            '"dgo" (did you mean "dog"?)',
            (4,),
        ),
        Case("only held-out labels", f"{split}a.png,cat,test\nb.png,dog,val\nc.png,,\n", "only held-out images"),
        Case("no images to train on", f"{split}a.png,cat,test\nb.png,dog,val\n", "no training images", words="FILE"),
        Case(
            "all labeled images also held out",
            f"{H}a.png,cat\nb.png,dog\n",
            "are the same pictures as held-out ones",
            words="ALBUM --labels FILE --test FILE",
        ),
        Case(
            "held-out labels, misspelled", f"{H}zz.png,cat\nb.png,nan\n", "2 faults", (2, 3), words="ALBUM --test FILE"
        ),
        Case("the CSV alone, misspelled", f"{H}{REST}b.pgn,cat\n../x,cat\n", 'mean "b.png"?', (4, 5), words="FILE"),
        Case(
            "more labels kept than there are",
            H + REST,
            "each class keeps one",
            code=2,
            words="ALBUM --labels FILE --keep-labels 9",
        ),
        Case(
            "fewer labels kept than classes",
            H + REST,
            "each class keeps one",
            code=2,
            words="ALBUM --labels FILE --keep-labels 1",
        ),
    ]


def _other_sources() -> list[Case]:
    npz = "NPZ --recipe smoke"
    return [
        Case("more classes declared than labels", "[0, 1, -1, -1]", "3 classes but only 2 labels", words=npz),
        Case("labels too few", "[0, 1]", "2 labels for 4 images", words=npz),
        Case("fractions as labels", "[0, 1, 0.5, 1]", "label 2: 0.5 is neither", words=npz),
        Case("a number beyond the declared classes", "[0, 1, 9, 1]", "label 2: 9 is not one of the 3", words=npz),
        Case("class folders alike", "Cat/1.png cat/2.png dog/3.png", "look like one class", words="FOLDERS"),
        Case("classes beside splits", "train/x/1.png test/x/2.png cat/3.png", "beside them cat", words="FOLDERS"),
        Case("a list with unknown names", "a.png\nzz.png\n", "2 faults", (1, 2), words="ALBUM --labels LIST"),
        Case(
            "a list with a name of two images", "e.png\n", "is the name of 2 images", (1,), words="ALBUM --labels LIST"
        ),
    ]


def said() -> list[Case]:
    """What may be meant: it is accepted, and a note says it before training."""
    rest = (("b.png", "dog"), ("c.png", "cat"))
    return [
        Case(
            "a label of an unreadable picture", f"{H}{REST}broken.png,cat\n", 'lost: "broken.png" (line 4)', labels=rest
        ),
        Case("a class with one label", f"{H}{REST}", "2 classes with a single labeled image: cat, dog", labels=rest),
        Case("not a single label", f"{H}a.png,\nb.png,\n", "no labels"),
        Case(
            "another class than the folder's",
            f"{H}sub/d.png,other\nother/e.png,other\nsub/e.png,sub\n",
            'the CSV counts: "sub/d.png" (line 2)',
            labels=(("sub/d.png", "other"), ("other/e.png", "other"), ("sub/e.png", "sub")),
        ),
        Case(
            "a picture trained on and held out",
            "image,label,split\na.png,cat,\nb.png,dog,\nc.png,cat,\ncopy.png,cat,test\n",
            "also held out, left out of training: a.png",
            labels=(*rest, ("copy.png", "cat")),
        ),
        Case(
            "a class without a label",
            "[0, 1, 0, 1]",
            "1 class with no labeled image: m",
            words="NPZ --recipe smoke",
            labels=tuple((f"image-{i:06d}", "kl"[i % 2]) for i in range(4)),
        ),
    ]


def harmless() -> list[Case]:
    """Forms that are only unusual."""
    plain = f"{H}a.png,cat\nb.png,dog\n"
    tabs, crlf = plain.replace(",", "\t"), plain.replace("\n", "\r\n")
    forms: dict[str, str | bytes] = {
        "a byte order mark": b"\xef\xbb\xbf" + plain.encode(), "CRLF": crlf, "CR": plain.replace("\n", "\r"),
        "blank lines": f"\n{H}\na.png,cat\n\n\nb.png,dog\n\n \n,\n", "no line break at the end": plain.rstrip(),
        "semicolons": plain.replace(",", ";"), "a hint for Excel": "sep=;\n" + plain.replace(",", ";"),
        "tabs": tabs, "tabs in UTF-16": tabs.encode("utf-16"),
        "UTF-16": crlf.encode("utf-16"), "UTF-16, big-endian": b"\xfe\xff" + plain.encode("utf-16-be"),
        "UTF-32": plain.encode("utf-32"), "an upper-case header": plain.replace("image,label", "IMAGE,Label"),
        "quotes": '"image","label"\n"a.png","cat"\nb.png,"dog"\n',
        "spaces": " image , label \n a.png , cat \nb.png ,dog \n",
        "columns exchanged": "label,image\ncat,a.png\ndog,b.png\n",
        "a line twice": plain + "a.png,cat\n./a.png,cat\n",
        "back-slashes": plain.replace("a.png", ".\\sub\\..\\a.png"),
        "paths from the folder of the file": plain.replace("a.png", "album/a.png"),
        "absolute paths": plain.replace("a.png", "ALBUM/a.png"),
        "empty splits": "image,label,split\na.png,cat,\nb.png,dog,TRAIN\n",
        "lines without a label": plain + "c.png,\nsub/d.png, \n",
    }  # fmt: skip
    accent = Case(
        "accents beside their letters",
        f"{H}a.png,cafe\u0301\nb.png,dog\n",
        labels=(("a.png", "caf\u00e9"), ("b.png", "dog")),
    )
    both = (("a.png", "cat"), ("b.png", "dog"))
    names = {"a comma": '"cat, grey"', "a slash": "cat/grey", "letters of the world": "кошка", "numbers": "0",
             "quotes": '"the ""cat"""', "a formula": "=1+1", "markup": "<b>cat</b>"}  # fmt: skip
    return [
        accent,
        *(Case(kind, content, labels=both) for kind, content in forms.items()),
        *(
            Case(f"{kind} in a class", f"{H}a.png,{name}\nb.png,dog\n", labels=(("a.png", _unquoted(name)), both[1]))
            for kind, name in names.items()
        ),
    ]


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if cell.startswith('"') else cell
