"""`python -m benchmarks SUITE [--peers lightly ...] [--threads N]`: side by side, in one run; see harness.py."""

from __future__ import annotations

import argparse
import importlib

import torch

from benchmarks import harness

SUITES = ("jpeg", "loss", "step", "views")


def main() -> None:
    """Run the suites that were asked for and keep their results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--peers", nargs="*", default=[], help="other libraries to compare with, if installed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    found = importlib.import_module(f"benchmarks.{asked.suite}").run(peers=asked.peers)
    harness.keep(f"{asked.suite}-{asked.threads}-threads", found)


main()
