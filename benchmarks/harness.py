"""Side-by-side measurements: contenders in rotating order on the same inputs, an A/A pair, ratios with intervals.

A suite gives contenders (name -> function without arguments) that all do the same work. Each round calls every one of
them once, beginning with another one each time, and ours twice under two names: if these two differ by more than 5 %
the machine is too noisy and no verdict is printed. On a GPU the clock is that of the device's events.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
AGAIN = "ours again"
LEAST_SECONDS = 0.1
QUIET = (0.95, 1.05)  # the A/A ratio must lie in here
DRAWS = 2000  # of the bootstrap
asked_rounds: int | None = None  # of --rounds: in place of every suite's own number


def side_by_side(contenders: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, np.ndarray]:
    """Seconds (rounds,) of every contender and of "ours" a second time.

    One round before is not counted. What is done within LEAST_SECONDS is done several times a round.
    """
    called = {**contenders, AGAIN: contenders["ours"]}
    rounds = asked_rounds or rounds
    names, seconds, times = list(called), {name: [] for name in called}, dict.fromkeys(called, 1)
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            took = seconds_of(called[name], times[name])
            if number:
                seconds[name].append(took)
            else:
                times[name] = max(1, round(LEAST_SECONDS / seconds_of(called[name])))
    return {name: np.array(values) for name, values in seconds.items()}


def seconds_of(work: Callable[[], Any], times: int = 1) -> float:
    """Mean seconds of a call. On a GPU between two events, which count what the host does in between as well."""
    began = moment()
    for _ in range(times):
        work()
    return elapsed(began, moment()) / times


def moment() -> Any:
    """Now, in the order of the device's work: an event on a GPU, which is not waited for, else the clock."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(first: Any, last: Any) -> float:
    """Seconds between two moments; waits until the later has come."""
    if isinstance(first, float):
        return float(last - first)
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000


def ratio(slower: np.ndarray, faster: np.ndarray) -> tuple[float, float, float]:
    """Ratio of medians with its 95 % interval, by bootstrap over rounds."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(slower), (DRAWS, len(slower)))
    ratios = np.median(slower[drawn], axis=1) / np.median(faster[drawn], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(np.median(slower) / np.median(faster)), float(low), float(high)


def table(title: str, seconds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Print the medians and how many times slower each contender is than ours; returns the same as plain values."""
    again = ratio(seconds[AGAIN], seconds["ours"])
    quiet = QUIET[0] <= again[0] <= QUIET[1]
    print(f"\n{title}   (ours against itself: {again[0]:.3f}{'' if quiet else ', TOO NOISY: no verdict'})")
    found: dict[str, Any] = {"again": again, "quiet": quiet, "rows": {}}
    for name, values in seconds.items():
        if name == AGAIN:
            continue
        times = ratio(values, seconds["ours"])
        verdict = f"{times[0]:6.2f} x  ({times[1]:.2f} to {times[2]:.2f})" if quiet and name != "ours" else ""
        print(f"  {name:<28} {1000 * np.median(values):10.2f} ms  {verdict}")
        found["rows"][name] = {"ms": 1000 * float(np.median(values)), "times_ours": times}
    return found


def peak_megabytes(module: str, call: str) -> float:
    """What `module.call` adds to the memory of a fresh process, in MB; nan where that process died."""
    code = f"from benchmarks import harness, {module}; harness.tell_peak(lambda: {module}.{call})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else float("nan")


def tell_peak(work: Callable[[], Callable[[], Any]]) -> None:
    """Print the MB that work()() adds to the peak of this process; work() itself makes the inputs."""
    print(added_peak(work()) / 1e6)


def added_peak(work: Callable[[], Any]) -> float:
    """Bytes that work() adds to the peak of this process. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far counts no more
    before = _peak()
    work()
    return _peak() - before


def _peak() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1e3


def usual_malloc() -> None:
    """glibc's malloc as it comes to be with use, for contenders that leave it alone; ours do not: see
    runtime.keep_freed_memory.
    """
    trim_threshold = -1  # glibc's malloc.h; grows to twice its largest mmap threshold of 32 MB
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(trim_threshold, 64 << 20)


def machine() -> dict[str, Any]:
    """What it ran on."""
    return {
        "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
        "load": os.getloadavg(), "torch": torch.__version__, "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "max_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }  # fmt: skip


def keep(suite: str, found: Mapping[str, Any]) -> None:
    """Write benchmarks/results/SUITE.json."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{suite}.json").write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n")


def keep_beside(suite: str, asked: Mapping[str, Any], rows: Mapping[str, Any]) -> None:
    """keep, beside the rows of other ways that were asked for with the same settings before."""
    words, place = {name: str(value) for name, value in asked.items()}, RESULTS / f"{suite}.json"
    before = json.loads(place.read_text()) if place.exists() else {"asked": {}, "rows": {}}
    same = before["asked"] | {"ways": "", "out": ""} == words | {"ways": "", "out": ""}
    keep(suite, {"asked": words, "rows": (before["rows"] if same else {}) | rows})
