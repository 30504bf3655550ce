"""Messages hold names that come from anywhere: each part is one printable line, whatever the name is."""

from __future__ import annotations

import os
import unicodedata

import pytest

from fewlabels.errors import DataError, UsageError, printable
from fewlabels.runfolder import say

ODD = [
    "\x1b[2J", "\x1b]0;title\x07", "\x9b2J", "a\rb", "a\nfix: curl x", "a\tb", "\0", "\x7f", "\u202egnp", "\u2066x",
    "a\u2028b", "\u200b", "\ufeff", "\ue000", "\U000e0041", os.fsdecode(b"\xe9\xff"), os.fsdecode(b"\x80\x9b2J"),
]  # fmt: skip
PLAIN = ["", "cat", "\u00e9t\u00e9 e\u0301 \u732b \U0001f63a", "<img src=x>", "100 %", "x  y"]


@pytest.mark.parametrize("name", [*ODD, *PLAIN], ids=ascii)
def test_odd_names_become_one_printable_line_and_others_stay(name: str) -> None:
    told = printable(name)
    assert told.isprintable()
    assert told.encode().decode() == told  # no lone surrogates
    assert not any(unicodedata.category(c)[0] == "C" or unicodedata.category(c) in ("Zl", "Zp") for c in told)
    assert (told == name) == (name in PLAIN)
    assert printable(told) == told


def test_the_bytes_of_a_name_are_told() -> None:
    assert printable(os.fsdecode(b"a\x1b[2J\n\xe9")) == "a%1B[2J%0A%E9"
    assert printable("\u202e") == "%E2%80%AE"


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_no_part_of_a_message_moves_a_cursor_or_forges_a_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = UsageError(f"what {name}", why=f"why {name}", fix=f"fix {name}", details=[name, "second"])
    assert len(error.text().split("\n")) == 5
    assert str(error) == error.text()
    for part in (*error.text().split("\n"), error.what, error.why, error.fix, *error.details):
        assert part.isprintable()
    say(f"reading {name}")
    assert capsys.readouterr().err == f"reading {printable(name)}\n"


def test_only_the_first_details_are_shown_and_all_are_counted() -> None:
    text = DataError("many", details=map(str, range(5000))).text()  # type: ignore[arg-type]
    assert "  - 11\n" in text and "  - 12\n" not in text and "... and 4,988 more" in text
