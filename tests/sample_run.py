"""A run folder made by hand, for the tests of the report: the files that the pipeline writes, small and honest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from conftest import shapes_images
from fewlabels.data import pixels
from fewlabels.data.sources import open_source
from fewlabels.use import evaluate

CLASSES = ("red square", "red disc", "blue square", "blue disc")


def probabilities_for(labels: np.ndarray, *, num_classes: int, skill: float, seed: int = 0) -> np.ndarray:
    """(N, K) plausible probabilities: right more often the larger skill is."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.0, (len(labels), num_classes))
    logits[np.arange(len(labels)), labels] += skill
    shares = np.exp(1.7 * logits)
    return (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)


def row(key: str, name: str, accuracy: float, n: int, **facts: Any) -> dict[str, Any]:
    """A row of results.json with its interval."""
    low, high = evaluate.wilson_interval(round(accuracy * n), n)
    empty = {"ece": None, "parameters": None, "megabytes": None, "latency_ms": None, "note": ""}
    numbers = {"accuracy": accuracy, "low": low, "high": high, "n": n, "cross_validated": False}
    return {"key": key, "name": name, **numbers, **empty, **facts}


def make_run(
    run: Path, *, count: int = 120, classes: tuple[str, ...] = CLASSES, skill: float = 2.2, size: int = 16
) -> Path:
    """A finished run on count synthetic images, all of them held out."""
    run.mkdir(parents=True, exist_ok=True)
    images, _ = shapes_images(count, size=size)
    pixels.build(
        open_source(images), run / "data", working_size=None, max_bad_share=0.0, threads=1, bad_csv=run / "bad.csv"
    )
    labels = np.arange(count) % len(classes)
    probabilities = probabilities_for(labels, num_classes=len(classes), skill=skill)
    measured = evaluate.measure(probabilities, labels, classes)
    angle = 2 * np.pi * labels / len(classes)
    places = np.stack([np.cos(angle), np.sin(angle)], axis=1) + np.random.default_rng(1).normal(0, 0.3, (count, 2))
    np.savez(
        run / "evaluation.npz",
        ids=np.arange(count), labels=labels, probabilities=probabilities, map=places, map_labels=labels,
    )  # fmt: skip
    accuracy = measured["top1"]["accuracy"]
    (run / "results.json").write_text(json.dumps(results(classes, count, accuracy, measured)))
    (run / "resolved.json").write_text(json.dumps(resolved(classes, count)))
    (run / "status.json").write_text(json.dumps(STATUS))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics()))
    return run


STATUS = {
    "state": "finished",
    "stage": "",
    "reason": "",
    "seconds": {"pretrain": 61.2, "finetune": 9.4, "distill": 22.0, "supervised": 4.1},
}


def results(classes: tuple[str, ...], n: int, accuracy: float, measured: dict[str, Any] | None) -> dict[str, Any]:
    """results.json of a run with held-out images."""
    costs = {"parameters": 701_466, "megabytes": 2.8, "latency_ms": 3.1}
    taps = (0.78, 0.815, 0.79, 0.66)
    return {
        "format_version": 1,
        "classes": list(classes),
        "held_out": {"n": n, "split": "test"},
        "rows": [
            row("most_frequent", "most frequent class", 1 / len(classes), n, ece=0.01),
            row("pixels_logistic", "logistic regression on pixels", 0.76, n, ece=0.12),
            row("supervised", "same network, labels alone", 0.62, n, ece=0.2, **costs),
            *(
                row(f"tap{tap}_logistic", f"logistic regression on frozen features, tap {tap}", a, n, ece=0.08)
                for tap, a in enumerate(taps)
            ),
            row("finetune", "fine-tuned", min(accuracy + 0.01, 1.0), n, ece=0.07, **costs),
            row("distill", "distilled student", accuracy, n, ece=0.05, **costs),
        ],
        "final": "distill",
        "measurement": measured,
        "labels_used": 20,
        "images_used": 1200,
    }


def resolved(classes: tuple[str, ...], n: int) -> dict[str, Any]:
    """resolved.json of the run."""
    return {
        "format_version": 1,
        "command": "fewlabels fit photos --labels labels.csv --out run",
        "recipe": {"encoder": "resnet18_0.5x_small", "size": 16, "kind": "glyph", "finetune": {"tap": 1}},
        "equations": [
            "pretrain: peak lr 1.6 = 0.1 x sqrt(256)",
            "pretrain: 480 steps = 120 epochs x 1,200 images // 256",
        ],
        "why": ["1,200 small grey images on 2 threads: a narrow ResNet-18 with the small stem."],
        "versions": {"fewlabels": "0.1.0", "torch": "2.15.0", "numpy": "2.4.6", "python": "3.12.1"},
        "device": "CPU, 2 threads (x86_64)",
        "precision": "fp32",
        "threads": 2,
        "ranks": 1,
        "seed": 0,
        "understood": {
            "images": 1200 + n, "train": 1200, "val": 0, "test": n, "labeled": 20,
            "classes": {name: 20 // len(classes) for name in classes}, "held_out": n, "unreadable": 0,
            "duplicates": 3, "leaks": 2, "notes": ["2 training images are also held out; nobody trains on them."],
            "line": f"1,200 images, 20 labeled in {len(classes)} classes, 3 duplicates, {n} held-out test images",
        },
    }  # fmt: skip


def metrics() -> list[dict[str, Any]]:
    """metrics.jsonl of three stages."""
    rng = np.random.default_rng(0)
    lines: list[dict[str, Any]] = []
    for stage, total, start, end in (
        ("pretrain", 480, 5.5, 2.4),
        ("finetune", 60, 1.4, 0.1),
        ("distill", 200, 1.2, 0.3),
    ):
        for step in range(4, total + 1, 4):
            fall = np.exp(-4 * step / total)
            line = {"stage": stage, "step": step, "total_steps": total}
            line["loss"] = float(end + (start - end) * fall + rng.normal(0, 0.03))
            if stage == "pretrain" and step % 80 == 0:
                line |= {"knn": 0.8 - 0.4 * fall, "linear": 0.85 - 0.45 * fall}
            lines.append(line)
    return lines
