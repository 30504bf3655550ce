"""Ranks that are not alike do not start, and the first error of one ends all of them, told once, with its exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fewlabels
import many_ranks
from fewlabels import agreement, runtime
from fewlabels.errors import SHOWN_DETAILS, UsageError

TESTS = Path(__file__).parent
PACKAGE = Path(fewlabels.__file__).parent

# Case: exit codes of both ranks, who tells it (None: either), what, and the state of the run folder (None: any)
EXPECTED: dict[str, tuple[list[int], int | None, str, str | None]] = {
    "option": ([2, 2], None, "overrides.pretrain.epochs: rank 0: not given; rank 1: 3.0", None),
    "budget": ([2, 2], None, "budget: rank 0: None; rank 1: 300.0", None),
    "labels": ([65, 65], None, "labels: rank 0: ", None),
    "folder": ([2, 2], None, "rank 1: there is none at ", None),
    "nothing": ([66, 66], None, "none.npz: no such file", None),
    "survey": ([1, 1], 1, "ValueError: injected", "failed"),
    "store": ([65, 65], 0, "error: injected", "failed"),
    "pretrain": ([65, 65], 1, "error: injected", "failed"),
    "finetune": ([1, 1], 1, "ValueError: injected", "failed"),
    "main": ([1, 1], 0, "ValueError: injected", None),
    "signal": ([75, 75], 1, "error: stopped by SIGUSR1 here", "stopped"),
    "reading": ([65, 65], 1, "error: injected", "failed"),
    "saving": ([74, 74], 0, "error: injected", "failed"),
    "before saving": ([65, 65], 1, "error: injected", "failed"),
    "diverged": ([70, 70], None, "the loss is nan at step ", "failed"),
    "killed": ([75, -9], 0, "rank 1 ended without a word", "failed"),
    "main killed": ([-9, 75], 1, "rank 0 ended without a word", "running"),
    "stopped": ([75, -9], 0, "rank 1 ended without a word", "failed"),
    "main stopped": ([-9, 75], 1, "rank 0 ended without a word", "running"),  # and with it the board of all ranks
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(TESTS / "many_ranks.py"), str(tmp_path_factory.mktemp("ranks"))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(PACKAGE.parent)])},
        capture_output=True, text=True, timeout=480, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", EXPECTED)
def test_the_first_error_ends_all_ranks_and_is_told_once(case: str, found: dict[str, Any]) -> None:
    codes, teller, words, state = EXPECTED[case]
    texts = [text for _, text in found[case]["ranks"]]
    assert [code for code, _ in found[case]["ranks"]] == codes, texts
    tellers = [rank for rank, text in enumerate(texts) if "\nerror: " in text]
    assert len(tellers) == 1, texts
    assert words in texts[tellers[0]]
    assert "Traceback" not in texts[1 - tellers[0]]
    assert teller in (None, tellers[0])
    assert state is None or found[case]["status"]["state"] == state


def test_a_rank_that_waits_in_a_collective_is_fetched(found: dict[str, Any]) -> None:
    """Rank 1 fails, tells and does not end: nothing but the watch tells rank 0, which waits for it in the loss."""
    code, _ = found["stays"]["ranks"][0]
    assert code == 1
    assert found["stays"]["status"]["state"] == "failed"
    assert "ValueError: injected" in found["stays"]["status"]["reason"]


def test_the_images_are_those_of_the_rank_whose_loss_is_no_number(found: dict[str, Any]) -> None:
    told = "".join(text for _, text in found["diverged"]["ranks"])
    (rows,) = re.findall(r"the bad images: (.*)", found["diverged"]["ranks"][1][1])
    assert re.findall("  - (.*)", told) == [f"image-{row:06}" for row in json.loads(rows)][:SHOWN_DETAILS]


def test_a_check_is_made_and_told_once(found: dict[str, Any]) -> None:
    """Rank 1 would fail if it decoded too."""
    (code, told), (other, nothing) = found["check"]["ranks"]
    assert (code, other) == (0, 0), told + nothing
    assert told.count(" in all, ") == told.count("pretrain: about ") == 1
    assert nothing == ""
    assert found["left behind"] == []


def test_ranks_of_another_version_do_not_start(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "fewlabels", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "fewlabels" / "model" / "losses.py").open("a") as file:
        file.write("# another version\n")
    # A rank that fails ends at once: where Python takes itself apart, threads of gloo could abort it
    (tmp_path / "sitecustomize.py").write_text(
        f"import atexit, pathlib\natexit.register(pathlib.Path({str(tmp_path / 'apart')!r}).touch)\n"
    )
    port = many_ranks.free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "fewlabels", "fit", "digits", "--out", str(tmp_path / "run"), "--recipe", "smoke"],
            env={
                **os.environ, **many_ranks.variables(rank, 2, port), "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(tmp_path if rank else PACKAGE.parent),
            },
            stderr=subprocess.PIPE, text=True, cwd=TESTS,  # -m puts it in front of PYTHONPATH
        )
        for rank in range(2)
    ]  # fmt: skip
    texts = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], texts
    assert sum("code: rank 0: " in text and "; rank 1: " in text for text in texts) == 1, texts
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "apart").exists()


def test_of_many_ranks_the_first_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [1, 1, 1, 2, 2, 3, 1, 1]
    monkeypatch.setattr(runtime, "world_size", lambda: 8)
    monkeypatch.setattr(runtime, "from_all", lambda facts: [facts | {"seed": value} for value in values])
    with pytest.raises(UsageError, match="the 8 processes of this job do not agree") as met:
        agreement._compare(lambda: {"size": 32, "seed": 1}, UsageError, fix="none")
    assert met.value.details == ("seed: rank 0: 1; rank 3: 2",)


def test_one_run_folder_is_one_in_every_time_zone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    (tmp_path / ".lock").touch()
    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    monkeypatch.setattr(runtime, "barrier", lambda: None)
    monkeypatch.setattr(runtime, "from_all", lambda facts: told.append(facts) or [facts])
    with monkeypatch.context() as there:
        for zone in ("UTC0", "JST-9"):
            there.setenv("TZ", zone)
            time.tzset()
            agreement.on_folder(SimpleNamespace(path=tmp_path))  # type: ignore[arg-type]
    time.tzset()
    assert "its lock is file " in told[0]["run folder"]
    assert told[0] == told[1]
