"""Is memory bounded by the store and not by the number of images? A whole run on many synthetic images, watched.

    python benchmarks/memory.py --images 200000 --budget 4m --out runs/memory

Writes an .npz of coloured discs and squares piece by piece, runs `fewlabels fit` on it in a process of its own, and
prints the largest resident memory of that process, per stage and in all, beside the size of the pixels and the memory
of a process that only imports torch. Linux only. Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np

import harness

CHUNK = 2000


def shapes(count: int, side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(count, side, side, 3) uint8 and (count,) labels of 4 classes: discs and squares, red and blue, on noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    images = rng.integers(0, 60, (count, side, side, 3), dtype=np.uint8)
    rows, columns = np.mgrid[0:side, 0:side]
    centre, radius = rng.uniform(0.35, 0.65, (2, count, 1, 1)) * side, rng.uniform(0.2, 0.3, (count, 1, 1)) * side
    down, across = np.abs(rows - centre[0]), np.abs(columns - centre[1])
    distance = np.where((labels % 2).astype(bool)[:, None, None], np.hypot(down, across), np.maximum(down, across))
    colours = np.where((labels < 2)[:, None], [220, 60, 40], [40, 90, 230]).astype(np.uint8)
    return np.where((distance < radius)[..., None], colours[:, None, None], images), labels


def write(path: Path, images: int, side: int, labeled: int, held_out: int) -> None:
    """images, labels (-1 but for `labeled` of them), test_images and test_labels, never more than a chunk in memory."""
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for name, count, first in (("images", images, 0), ("test_images", held_out, 10**6)):
            known = []
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, side, side, 3)}
                np.lib.format.write_array_header_1_0(member, header)
                for start in range(0, count, CHUNK):
                    pixels, labels = shapes(min(CHUNK, count - start), side, seed=first + start)
                    member.write(pixels.tobytes())
                    known.append(labels)
            labels = np.concatenate(known)
            if name == "images":
                labels[labeled:] = -1
            with archive.open(name.replace("images", "labels") + ".npy", "w") as member:
                np.lib.format.write_array(member, labels)


def status(pid: int, key: str) -> float:
    """A line of /proc/PID/status in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1e3
    return 0.0


def watch(command: list[str], run: Path) -> tuple[dict[str, float], float, int]:
    """Largest resident MB per stage, of the whole process, and its exit code."""
    process = subprocess.Popen(command)
    peaks: dict[str, float] = {}
    peak = 0.0
    while process.poll() is None:
        try:
            stage = str(json.loads((run / "status.json").read_text())["stage"])
        except (OSError, ValueError, KeyError):
            stage = "reading"
        try:
            peaks[stage] = max(peaks.get(stage, 0.0), status(process.pid, "VmRSS"))  # sampled
            peak = max(peak, status(process.pid, "VmHWM"))  # the kernel's own maximum
        except OSError:
            break
        time.sleep(0.2)
    process.wait()
    return peaks, peak, process.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--budget", default="4m")
    parser.add_argument("--out", type=Path, default=Path("runs/memory"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = options.out / f"{options.images}x{options.side}.npz"
    if not data.exists():
        write(data, options.images, options.side, labeled=400, held_out=2000)
    _, bare, _ = watch([sys.executable, "-c", "import torch, time; torch.ones(9) @ torch.ones(9); time.sleep(1)"], data)
    run = options.out / f"run-{int(time.time())}"
    command = [sys.executable, "-m", "fewlabels", "fit", str(data), "--out", str(run), "--budget", options.budget]
    began = time.perf_counter()
    peaks, peak, code = watch(command, run)
    found = {
        "command": " ".join(["fewlabels", *command[3:]]), "exit_code": code, "images": options.images,
        "pixels_mb": options.images * options.side**2 * 3 / 1e6, "torch_alone_mb": bare,
        "peak_mb": peak, "peak_mb_by_stage": peaks, "seconds": time.perf_counter() - began,
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    harness.keep("memory", found)
    sys.exit(code or peak > 2048)


if __name__ == "__main__":
    main()
