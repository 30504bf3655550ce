"""The demo's claim over several draws of 20 labels: the method beside its baselines on 597 held-out digits.

    python benchmarks/digits.py --seeds 5 --out runs/digits-seeds

Each seed is a whole run (its own labels, weights and views), about two minutes on two CPU cores. Prints a Markdown
table of means and standard deviations and writes benchmarks/results/digits.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
import fewlabels as fl
from benchmarks import harness

PICTURE = Path(__file__).parents[1] / "docs" / "digits.svg"


def draw(accuracy: dict[str, list[float]], names: dict[str, str]) -> None:
    """docs/digits.svg: every seed a dot, the mean a line."""
    figure = Figure(figsize=(8, 3.6))
    axes = figure.subplots()
    for place, (key, values) in enumerate(reversed(accuracy.items())):
        colour = "#2b52c8" if key in ("finetune", "distill") else "#777777"
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.6)
        axes.plot([statistics.mean(values)] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2)
    axes.set_yticks(range(len(accuracy)), [names[key] for key in reversed(accuracy)])
    axes.set_xlabel("% of 597 held-out digits right, 20 labels; each dot is a draw of labels")
    axes.set_xlim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/digits-seeds"))
    options = parser.parse_args()
    accuracy: dict[str, list[float]] = {}
    names: dict[str, str] = {}
    for seed in range(options.seeds):
        run = fl.fit("digits", out=options.out / str(seed), recipe="digits", keep_labels=20, seed=seed)
        for row in run.metrics["rows"]:
            names[row["key"]] = row["name"]
            accuracy.setdefault(row["key"], []).append(100 * row["accuracy"])
    print(f"| digits, 20 labels, 597 held-out images, {options.seeds} seeds | mean % | sd | each |\n|---|---|---|---|")
    for key, values in accuracy.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        each = " ".join(f"{value:.1f}" for value in values)
        print(f"| {names[key]} | {statistics.mean(values):.1f} | {spread:.1f} | {each} |")
    draw(accuracy, names)
    harness.keep("digits", {"accuracy": accuracy})


if __name__ == "__main__":
    main()
