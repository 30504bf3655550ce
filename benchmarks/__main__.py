"""`python -m benchmarks SUITE [--peers lightly ...] [--threads N] [--rounds R]`: side by side in one run.

harness.py says how contenders are compared, each suite what it compares.

`python -m benchmarks plot` draws docs/performance.svg of what the suites left in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import fewlabels  # isort: skip  # noqa: F401 - before torch: it says how idle threads wait, for all contenders
import torch

from benchmarks import curves, harness, plot

SUITES = ("distill", "jpeg", "loss", "step", "views")


def main() -> None:
    """Run what was asked for and, unless it was only a try, keep its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=(*SUITES, "curves", "plot"))
    parser.add_argument("--peers", nargs="*", default=[], help="other libraries to compare with, if installed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, help="in place of each suite's own number; nothing is kept")
    parser.add_argument("--data", type=Path, help="curves: a folder or file of images with labels; digits without")
    parser.add_argument("--seeds", type=int, default=3, help="curves: runs of either kind")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    harness.asked_rounds = asked.rounds
    if asked.suite == "plot":
        print(plot.draw(harness.RESULTS))
        return
    if asked.suite == "curves":
        name, found = "curves", curves.run(data=asked.data, seeds=asked.seeds)
    else:
        found = importlib.import_module(f"benchmarks.{asked.suite}").run(peers=asked.peers)
        name = f"{asked.suite}-{asked.threads}-threads"
    if asked.rounds is None:  # fewer would stand as the published figures
        harness.keep(name, found)


if __name__ == "__main__":
    main()
