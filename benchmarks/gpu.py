"""Everything that is measured on one GPU, by one command of at most ten minutes:

    PYTHONPATH=src python -m benchmarks.gpu --out DIR [--seconds 560] [--only loss views] [--toy]

Needs torch, torchvision, timm, numba, scikit-learn and this repository; kornia is compared with where it is installed.
Each section (gpu_sections.py) runs in a process of its own and is ended when its time is over, so that one that fails,
hangs or takes the device's memory costs itself alone; what it had found till then is kept. DIR/gpu.json is written
after every section. Prints a table against the goals last. --toy runs all of it on the CPU at tiny sizes, as the tests
do: its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_sections

Row = dict[str, Any]  # name, value, unit, note


class Goal(NamedTuple):
    """What a row should reach."""

    row: str
    words: str
    least: float
    aim: float
    smaller: bool = False  # is better


GOALS = (
    Goal("views share 32", "views, % of the step at 32 px", 5, 2, smaller=True),
    Goal("views share 224", "views, % of the step at 224 px", 2, 1, smaller=True),
    Goal("views 32 against kornia", "views of 32 px, times kornia's speed", 20, 20),
    Goal("views 96 against kornia", "views of 96 px, times kornia's speed", 20, 20),
    Goal("views 224 against kornia", "views of 224 px, times kornia's speed", 20, 20),
    Goal("loss 32768", "NT-Xent of 32,768 pairs, forward and backward, ms", 10, 5, smaller=True),
    Goal("loss largest", "NT-Xent, largest number of pairs that ran", 1e6, 1e6),
    Goal("loss 1048576", "NT-Xent of 1,048,576 pairs, ms", float("inf"), 8000, smaller=True),
    Goal("cifar pairs", "ResNet-18 at 32 px, real loader, pairs/s", 30_000, 40_000),
    Goal("cifar minutes", "1000 epochs of CIFAR-10, minutes", 28, 21, smaller=True),
    Goal("imagenet views", "ResNet-50 at 224 px, real loader, views/s", 6000, 8000),
    Goal("imagenet wait", "loader wait, % of the step", 2, 0.5, smaller=True),
    Goal("distill online", "cached teacher (R50, student R18), times online's speed", 4, 5.7),
    Goal("distill supervised", "cached teacher, of the supervised student's speed", 0.95, 0.98),
    Goal("wide views", "ResNet-152 3x SK at 224 px, most views without checkpointing", 320, 320),
    Goal("wide speed", "ResNet-152 3x SK at 224 px, views/s", 350, 400),
)


def run_section(name: str, seconds: float, *, toy: bool) -> list[Row]:
    """The rows of one section, and a row that says so where it failed or ran out of time."""
    # Forked from a process that has imported torch and not touched the device: a start costs nothing
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_section, args=(name, seconds, toy, sending))
    began = time.perf_counter()
    process.start()
    sending.close()
    rows: list[Row] = []
    while (left := began + seconds - time.perf_counter()) > 0:
        if receiving.poll(left):
            try:
                rows.append(json.loads(receiving.recv_bytes()))
            except EOFError:
                break
            print(told(rows[-1]), flush=True)
    else:
        rows.append({"name": f"{name}: ended", "value": None, "unit": "", "note": f"its {seconds:.0f} s were over"})
        print(told(rows[-1]), flush=True)
    process.join(max(0.0, min(left, 10.0)))
    if process.is_alive():
        os.killpg(process.pid or 0, signal.SIGKILL)  # with what a compiler has started
        process.join()
    return rows


def _section(name: str, seconds: float, toy: bool, sending: Connection) -> None:
    os.setsid()
    device = torch.device("cpu" if toy or not torch.cuda.is_available() else "cuda")
    at = gpu_sections.Place(device, toy, time.perf_counter() + seconds)
    try:
        for row in gpu_sections.SECTIONS[name][0](at):
            sending.send_bytes(json.dumps(row).encode())
    except Exception as error:  # whatever went wrong here, the other sections are to be measured
        traceback.print_exc()
        note = f"{type(error).__name__}: {error}"[:300]
        sending.send_bytes(json.dumps({"name": f"{name}: failed", "value": None, "unit": "", "note": note}).encode())
    sending.close()


def told(row: Row) -> str:
    """A row as a line of text."""
    value = "-" if row["value"] is None else f"{row['value']:,.4g}"
    return f"  {row['name']:<44} {value:>12} {row['unit']:<8} {row['note']}"


def verdicts(rows: list[Row]) -> list[str]:
    """The goals as a Markdown table."""
    measured = {row["name"]: row["value"] for row in rows if row["value"] is not None}
    lines = ["| goal | at least | aim | measured | |", "|---|---|---|---|---|"]
    for goal in GOALS:
        value = measured.get(goal.row)
        if value is None:
            lines.append(f"| {goal.words} | {goal.least:,g} | {goal.aim:,g} | - | not measured |")
            continue
        sign = -1 if goal.smaller else 1
        reached = [word for word, limit in (("aim", goal.aim), ("reached", goal.least)) if sign * (value - limit) >= 0]
        lines.append(
            f"| {goal.words} | {goal.least:,g} | {goal.aim:,g} | {value:,.4g} | {reached[0] if reached else 'MISSED'} |"
        )
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Run the sections, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json")
    parser.add_argument("--seconds", type=float, default=560.0, help="for all sections together")
    parser.add_argument("--only", nargs="*", choices=gpu_sections.SECTIONS, default=list(gpu_sections.SECTIONS))
    parser.add_argument("--toy", action="store_true", help="tiny sizes on the CPU")
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    ends = time.perf_counter() + asked.seconds
    rows: list[Row] = []
    for name in asked.only:
        left = ends - time.perf_counter()
        print(f"{name}: {left:.0f} s left", flush=True)
        began = time.perf_counter()
        found = run_section(name, min(left, gpu_sections.SECTIONS[name][1]), toy=asked.toy) if left > 5 else []
        rows += [row | {"section": name} for row in found]
        rows.append({"name": f"{name} took", "value": time.perf_counter() - began, "unit": "s", "note": ""})
        table = verdicts(rows)
        told_of = {"toy": asked.toy, "torch": torch.__version__, "load": os.getloadavg(), "rows": rows, "goals": table}
        (asked.out / "gpu.json").write_text(json.dumps(told_of, indent=1) + "\n")
    print("\n" + "\n".join(map(told, rows)))
    print("\n" + ("toy sizes on a CPU: the numbers mean nothing\n" if asked.toy else "") + "\n".join(table))


if __name__ == "__main__":
    main()
