"""docs/performance.svg: how many times slower than ours the others were, of all suites kept in benchmarks/results/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PICTURE = Path(__file__).parents[1] / "docs" / "performance.svg"
TITLES = {  # suite: title of its panel, in the order of the picture
    "views": "two views of an image",
    "jpeg": "JPEG to two views",
    "loss": "NT-Xent, forward and backward",
    "step": "a pretraining step",
    "distill": "a step of distillation",
}
CASES = {  # what the suites call their cases: what a reader calls them
    "views": "{} px",
    "loss": "{} pairs",
}
OURS, NOISY, LINE = "#2b52c8", "#b8c4ea", "#555555"
NOT_A_RIVAL = {"ours", "ours, bf16", "network alone", "teacher's forward alone"}
WORDS = {"plain": "ours without numba", "torchvision_batched": "torchvision, one draw a batch"}
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
BAR = 0.28  # inches


def kept(results: Path) -> dict[str, dict[str, Any]]:
    """{suite with its threads: what it found} of every suite that compared something, in the order of TITLES."""
    found = {}
    for suite in TITLES:
        for path in sorted(results.glob(f"{suite}-*-threads.json")):
            found[path.stem] = json.loads(path.read_text())
    return found


def bars(suite: str, found: dict[str, Any]) -> list[tuple[str, tuple[float, float, float], bool]]:
    """(label, (ratio, low, high), quiet) of each rival in each case."""
    rows = []
    words = CASES.get(suite.partition("-")[0], "{}")
    for case, measured in found.items():
        if not isinstance(measured, dict) or "rows" not in measured:
            continue
        for name, row in measured["rows"].items():
            if name not in NOT_A_RIVAL:
                rows.append(
                    (f"{words.format(case)}: {WORDS.get(name, name)}", tuple(row["times_ours"]), measured["quiet"])
                )
    return rows


def draw(results: Path, picture: Path = PICTURE) -> str:
    """Draw what is there and return the picture's path; SystemExit where no suite has left results."""
    panels = {suite: rows for suite, found in kept(results).items() if (rows := bars(suite, found))}
    if not panels:
        raise SystemExit(f"no results in {results}: run `python -m benchmarks views --peers lightly` first")
    counts = [len(rows) for rows in panels.values()]
    figure = Figure(figsize=(8.5, BAR * sum(counts) + 0.75 * len(counts) + 0.5), layout="constrained")
    grid = figure.subplots(len(panels), 1, height_ratios=counts, squeeze=False, sharex=True)[:, 0]
    for axes, (suite, rows) in zip(grid, panels.items(), strict=True):
        name, threads = suite.split("-")[:2]
        axes.set_title(f"{TITLES[name]}, {threads} thread{'s' * (threads != '1')}", loc="left", fontsize=10)
        _panel(axes, rows)
    grid[-1].set_xlabel("times as long as ours; pale: too noisy to say")
    top = max(ratio for rows in panels.values() for _, (ratio, _, _), _ in rows)
    ticks = [tick for tick in TICKS if tick < 2 * top]
    grid[-1].set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    grid[-1].set_xlim(0.5, 2.2 * top)
    figure.savefig(picture, metadata={"Date": None})
    return str(picture)


def _panel(axes: Any, rows: list[tuple[str, tuple[float, float, float], bool]]) -> None:
    """Horizontal bars on a logarithmic axis from 1, each with its number."""
    for place, (_, (ratio, low, high), quiet) in enumerate(reversed(rows)):
        axes.barh(place, ratio - 1, left=1, height=0.7, color=OURS if quiet else NOISY)
        axes.plot([low, high], [place, place], color=LINE, linewidth=1)
        axes.text(
            max(high, 1) * 1.06, place, f"{ratio:.2g} x" if ratio < 10 else f"{ratio:.0f} x", va="center", fontsize=8
        )
    axes.set_yticks(range(len(rows)), [label for label, _, _ in reversed(rows)], fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1, color=LINE, linewidth=0.8)
    axes.minorticks_off()
    axes.tick_params(left=False, labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
