"""The benchmarks run, at sizes whose numbers mean nothing, and what they measure with measures what it says."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import curves, distill, gpu, gpu_sections, harness, jpeg, loss, plot, step, views, workload
from benchmarks.parts import Parts

from fewlabels.data.loader import Batch
from fewlabels.stages import loop

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def installed(*names: str) -> list[str]:
    """Those that can be imported here."""
    return [name for name in names if importlib.util.find_spec(name)]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "asked_rounds", 1)
    monkeypatch.setattr(harness, "LEAST_SECONDS", 0.0)


def rows_of(measured: dict[str, Any]) -> set[str]:
    """The contenders of a table, whose every number is there."""
    for row in measured["rows"].values():
        assert row["ms"] > 0
        assert len(row["times_ours"]) == 3
    return set(measured["rows"])


# --- what measures ------------------------------------------------------------------------------------------------


def test_contenders_take_turns_and_the_first_round_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(harness, "asked_rounds", None)
    contenders: dict[str, Callable[[], Any]] = {"ours": lambda: calls.append("o"), "theirs": lambda: calls.append("t")}
    seconds = harness.side_by_side(contenders, rounds=2)
    assert {name: len(values) for name, values in seconds.items()} == {"ours": 2, "theirs": 2, harness.AGAIN: 2}
    # A warm-up round calls each twice; then each once, beginning with another one each round ("again" is ours)
    assert "".join(calls) == "oottoo" + "too" + "oot"
    monkeypatch.setattr(harness, "asked_rounds", 5)
    assert len(harness.side_by_side(contenders, rounds=2)["ours"]) == 5


def test_a_ratio_is_of_medians_and_lies_in_its_interval() -> None:
    rng = np.random.default_rng(0)
    ours = 1 + 0.05 * rng.random(30)
    times, low, high = harness.ratio(3 * ours[::-1], ours)
    assert times == pytest.approx(3)
    assert low <= times <= high
    assert high - low < 0.2


@pytest.mark.parametrize(("again", "quiet"), [(1.04, True), (1.06, False), (0.94, False)])
def test_a_noisy_machine_gets_no_verdict(again: float, quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"ours": np.ones(9), "theirs": np.full(9, 2.0), harness.AGAIN: np.full(9, again)}
    assert harness.table("x", seconds)["quiet"] is quiet
    said = capsys.readouterr().out
    assert ("2.00 x" in said) is quiet
    assert ("TOO NOISY" in said) is not quiet


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc, on Linux")
def test_the_added_peak_is_what_was_allocated_and_freed() -> None:
    found = harness.added_peak(lambda: np.ones(25_000_000))  # 200 MB of float64
    assert 180e6 < found < 260e6


class Slow:
    """A stage's view that takes its time."""

    seconds = 0.02

    def __call__(self, batch: Batch, number: int) -> torch.Tensor:
        time.sleep(self.seconds)
        return batch.pixels.float() / 255 + number


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch 2.11: images need no gradient
def test_parts_add_up_and_find_what_is_slow(tmp_path: Path) -> None:
    state = workload.pretraining("resnet18_0.125x_small", CPU, size=8, strength=0.5, blur=False)
    state.stage.view = Slow()
    parts = Parts(state)
    state.optimizer.register_step_pre_hook(lambda *_: time.sleep(0.03))  # after Parts' own: inside the optimizer
    batch = Batch(
        torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8),
        torch.full((4, 2), 8),
        torch.arange(4),
        torch.zeros(4),
        0,
    )
    plan, listeners = workload.brief(4, lambda *_: time.sleep(0.04))
    precision = workload.runtime.Precision(None, channels_last=False)
    loop.train(state, parts.watched(itertools.repeat(batch, 4)), plan, listeners, precision)
    seconds = parts.seconds(skip=1)
    # Medians of parts are not parts of the median
    assert sum(value for part, value in seconds.items() if part != "step") == pytest.approx(seconds["step"], rel=0.3)
    assert 0.04 <= seconds["views"] < 0.09
    assert 0.03 <= seconds["optimizer"] < 0.08
    assert 0.04 <= seconds["rest"] < 0.09  # the log
    assert min(seconds.values()) >= 0
    shares = parts.told("x", skip=1)
    assert shares["beside the encoder"] == pytest.approx(1 - seconds["encoder"] / seconds["step"])


def test_the_whole_matrix_is_the_sum_that_the_paper_writes() -> None:
    first, second = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    z = [row / row.norm() for row in torch.cat([first, second])]
    total = 0.0
    for i in range(10):
        below = sum(float(torch.exp(z[i] @ z[k] / 0.3)) for k in range(10) if k != i)
        total -= float(z[i] @ z[(i + 5) % 10] / 0.3) - np.log(below)
    assert float(workload.whole_matrix(first, second, 0.3)) == pytest.approx(total / 10)


# --- the suites ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # torch 2.11: images need no gradient
def test_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "CASES", {"resnet18_0.125x_small": (4, 1)})
    monkeypatch.setattr(step, "WATCHED", 5)
    peers = installed("lightly")
    found = step.run(peers=peers)["resnet18_0.125x_small"]
    rivals = {"lightly, as documented", "lightly, tuned", "lightly, tuned, a worker"} if peers else set()
    assert rows_of(found) == {"ours", "network alone", *rivals}
    assert 0 < found["shares"]["beside the encoder"] < 1


def test_distill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "CASES", {("resnet50_0.125x_small", "resnet18_0.125x_small"): (4, 1)})
    monkeypatch.setattr(distill, "SIZE", 16)
    (_, found) = distill.run(peers=[]).values()
    assert rows_of(found) == {"ours", "teacher in every step", "student on labels", "teacher's forward alone"}


def test_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "SIZES", {8: 1})
    monkeypatch.setattr(harness, "peak_megabytes", lambda *_: 1.0)  # fresh processes are not for a test of seconds
    found = loss.run(peers=installed("lightly"))
    assert {"ours", *installed("lightly")} <= rows_of(found["8"])
    assert set(found["memory_mb"].values()) == {1.0}


def test_jpeg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jpeg, "PHOTOS", 2)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)  # of the whole test run
    found = jpeg.run(peers=[*installed("lightly"), "torchvision"])
    assert {"ours", "ours, from a tar", "torchvision", *installed("lightly")} <= rows_of(next(iter(found.values())))


def test_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "CASES", {20: (24, 3, 1.0, True, 1)})
    monkeypatch.setattr(views, "CUDA_IMAGES", {20: 3})
    peers = [*installed("lightly", "kornia"), "pillow", "torchvision", "torchvision_batched"]
    assert rows_of(views.run(peers=peers)["20"]) == {"ours", "plain", *peers}


def test_wrong_views_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "CASES", {20: (24, 3, 1.0, False, 1)})
    right = views.views.pretrain

    def wrong(*images: torch.Tensor, **settings: Any) -> torch.Tensor:
        return right(*images, **settings) + (0.0 if views.views.PLAIN else 1e-3)

    monkeypatch.setattr(views.views, "pretrain", wrong)
    with pytest.raises(AssertionError, match="fast"):
        views.measured(20, ["ours"], CPU)


def test_curves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(curves, "STEPS", 2)
    monkeypatch.setattr(curves, "BATCH", 32)
    monkeypatch.setattr(curves, "PICTURE", tmp_path / "curves.svg")
    monkeypatch.setattr(curves.plan, "derive", lambda *_: curves.plan.Derived(100, 20, 2, 1, 1e-3))
    found = curves.run(data=None, seeds=2)
    for way in curves.WAYS:
        assert [len(losses) for losses in found[way]["losses"]] == [2, 2]
        assert all(0 <= value <= 100 for key in ("features", "finetuned") for value in found[way][key])
    # The same images, views and weights: only rounding separates the first losses
    first = [[losses[0] for losses in found[way]["losses"]] for way in curves.WAYS]
    assert first[0] == pytest.approx(first[1], rel=2e-2)
    assert first[0][0] != pytest.approx(first[0][1], rel=1e-6)
    assert (tmp_path / "curves.svg").stat().st_size > 5000


def test_a_difference_beyond_its_interval_is_not_noise() -> None:
    keys = {key: [1.0, 1.1, 0.9] for key in curves.WORDS} | {"seconds": [1.0]}
    found = {"fast": keys | {"features": [2.0, 2.1, 1.9]}, "slow": keys}
    verdicts = curves.table(found, "x")
    assert not verdicts["features"]["within_noise"]
    assert verdicts["finetuned"]["within_noise"]


def test_every_suite_has_a_test_here() -> None:
    tested = {name.removeprefix("test_") for name in globals()}
    assert {*command.SUITES, "curves"} <= tested


# --- the pictures -------------------------------------------------------------------------------------------------


def test_the_picture_shows_every_rival_once(tmp_path: Path) -> None:
    measured = {
        "again": [1, 1, 1], "quiet": True,
        "rows": {name: {"ms": 1.0, "times_ours": [5.0, 4.0, 6.0]} for name in ("ours", "plain", "lightly")},
    }  # fmt: skip
    (tmp_path / "views-1-threads.json").write_text(json.dumps({"machine": {}, "32": measured, "96": measured}))
    found = plot.kept(tmp_path)
    labels = [label for label, _, _ in plot.bars("views-1-threads", found["views-1-threads"])]
    assert labels == ["32 px: ours without numba", "32 px: lightly", "96 px: ours without numba", "96 px: lightly"]
    plot.draw(tmp_path, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")
    with pytest.raises(SystemExit, match="no results"):
        plot.draw(tmp_path / "nothing")


# --- the GPU's script ---------------------------------------------------------------------------------------------


def test_the_gpu_script_runs_at_toy_size(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--toy", "--out", tmp_path], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")}, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    names = {row["name"] for row in found["rows"]}
    assert not [row for row in found["rows"] if row["name"].endswith((": failed", ": ended")) or "WRONG" in row["note"]]
    assert {f"{section} took" for section in gpu_sections.SECTIONS} <= names
    # kornia may be absent, and toy sizes are others
    goals = {goal.row for goal in gpu.GOALS if "kornia" not in goal.row and not goal.row.endswith(("32768", "1048576"))}
    assert goals <= names
    assert all(line in done.stdout for line in found["goals"])


def test_a_section_that_fails_or_hangs_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: gpu_sections.Place) -> Iterator[dict[str, Any]]:
        yield gpu_sections.row("first", 1.0)
        raise RuntimeError("no more")

    def hangs(_: gpu_sections.Place) -> Iterator[dict[str, Any]]:
        yield gpu_sections.row("first", 1.0)
        time.sleep(60)

    monkeypatch.setattr(gpu_sections, "SECTIONS", {"fails": (fails, 1), "hangs": (hangs, 1)})
    began = time.perf_counter()
    failed, hung = (gpu.run_section(name, seconds, toy=True) for name, seconds in (("fails", 20), ("hangs", 1)))
    assert time.perf_counter() - began < 20
    assert [row["name"] for row in failed] == ["first", "fails: failed"]
    assert failed[1]["note"] == "RuntimeError: no more"
    assert [row["name"] for row in hung] == ["first", "hangs: ended"]


def test_goals_are_judged_by_their_direction() -> None:
    rows = [gpu_sections.row("cifar pairs", 35_000.0), gpu_sections.row("views share 32", 1.0)]
    lines = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in gpu.verdicts(rows)[2:]}
    by_row = {goal.row: lines[goal.words] for goal in gpu.GOALS}
    assert by_row["cifar pairs"] == "reached"
    assert by_row["views share 32"] == "aim"
    assert by_row["wide speed"] == "not measured"
    missed = gpu.verdicts([gpu_sections.row("imagenet wait", 3.0)])
    assert any("MISSED" in line for line in missed)
