"""Whole small runs in processes of their own, forked from one that has imported torch, and what they leave behind.

Forked because an import costs 3 s and a run not much more.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from conftest import shapes_images
from faults.tally import before_forking, ended, forked
from fewlabels import checkpoint, cli
from fewlabels.use import artefact

STAGES = ("pretrain", "finetune", "distill_self", "distill", "supervised")


def make_images(folder: Path) -> Path:
    """An npz of 96 images to train on, a third of them labeled, and 40 held out."""
    images = folder / "images.npz"
    pixels, labels = shapes_images(96, size=16, seed=1)
    labels[32:] = -1
    test, truth = shapes_images(40, size=16, seed=2)
    np.savez(images, images=pixels, labels=labels, test_images=test, test_labels=truth)
    return images


def command(images: Path, out: Path, *options: str) -> list[str]:
    """A run of the recipe `smoke`: seconds long, with a checkpoint every step or every few."""
    return ["fit", str(images), "--out", str(out), "--recipe", "smoke", *options]


def start(words: list[str], log: Path, before: Callable[[], None] = lambda: None) -> int:
    """A child that runs the command line; returns its process id. before: called in the child first, to break it."""

    def work() -> int:
        before()
        return cli.main(words)

    return forked(work, log)


def unbroken(images: Path, folder: Path, *options: str) -> tuple[dict[str, str], float]:
    """The outcome of a run that nothing happens to (in folder/unbroken), and its seconds."""
    before_forking()
    log, began = folder / "unbroken.log", time.monotonic()
    assert ended(start(command(images, folder / "unbroken", *options), log)) == 0, log.read_text()
    seconds = time.monotonic() - began
    return outcome(folder / "unbroken"), seconds


def newest(run: Path) -> dict[str, int]:
    """The step of the newest save of every stage."""
    found = {}
    for stage in STAGES:
        steps = [int(path.name.removeprefix("step-")) for path in (run / stage).glob("step-*") if path.is_dir()]
        found |= {stage: max(steps)} if steps else {}
    return found


def outcome(run: Path) -> dict[str, str]:
    """Digests of everything that a run leaves behind and that must not depend on what happened to it."""
    found = {}
    for stage in newest(run):
        saved, passed_over = checkpoint.latest(run / stage)
        assert saved is not None, f"{stage} has no checkpoint"
        assert not passed_over, passed_over
        digest = hashlib.sha256(str(saved.step).encode())
        for name in sorted(saved.tensors):
            digest.update(name.encode() + saved.tensors[name].contiguous().numpy().tobytes())
        found[stage] = digest.hexdigest()
    artefact.read(run / "model")  # every byte checked
    found["model"] = checkpoint.file_digest(run / "model" / "weights.safetensors")
    rows = json.loads((run / "results.json").read_text())["rows"]
    found["table"] = json.dumps([[row["key"], row["accuracy"], row["ece"]] for row in rows])
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Stage by stage: one that had to go back after a later one had begun logs its last steps behind that one's
    losses = [[s["stage"], s["step"], s["loss"]] for s in steps if "loss" in s]
    found["losses"] = json.dumps(sorted(losses, key=lambda line: STAGES.index(line[0])))
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert (run / "report.html").stat().st_size > 10_000
    return found


def same_outcome(run: Path, wanted: dict[str, str]) -> None:
    """Fails unless run ended as the unbroken one."""
    found = outcome(run)
    differ = [key for key in wanted if found.get(key) != wanted[key]]
    assert found.keys() == wanted.keys() and not differ, f"not the unbroken run's: {', '.join(differ)}"
