"""What a run folder says: its files as plain values, checked and clean, whatever of them is there.

Everything that a file, a label or a name says is text: control characters go here, markup is escaped by the page.

Shapes: N held-out images, K classes, M points of the map.
"""

from __future__ import annotations

import csv
import json
import math
import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fewlabels import checkpoint
from fewlabels.data.parts import UNREADABLE
from fewlabels.runfolder import metrics

Facts = dict[str, Any]

LONGEST_TEXT = 2000
MOST_BYTES = 1 << 30  # of evaluation.npz unpacked, where a few kB can stand for terabytes
# C0 and C1 controls but the line break, line separators, and the marks that turn the direction of text around
UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")


def read(run: Path) -> Facts:
    """All files of a run that the report needs; those that are not there, or cannot be read, are empty.

    DataError where a newer fewlabels wrote it.
    """
    results, resolved = values(run / "results.json") or None, values(run / "resolved.json")
    for name, found in (("results.json", results), ("resolved.json", resolved)):
        if found:
            checkpoint.check_format(found, run / name)
    return {
        "path": clean(str(run)),
        "folder": run,
        "resolved": resolved,
        "status": values(run / "status.json"),
        "results": results,
        "metrics": _metrics(run),
        "arrays": _arrays(run / "evaluation.npz", results),
        "model": values(run / "model" / "model.json"),
        "bad": _bad_images(run / "bad_images.csv"),
    }


def part(facts: Facts, name: str) -> Facts:
    """A dict within facts, {} where there is none."""
    found = facts.get(name)
    return found if isinstance(found, dict) else {}


def clean(value: Any) -> Any:
    """value (JSON) with every text free of control characters, lone surrogates and endless length."""
    if isinstance(value, str):
        text = UNPRINTABLE.sub("", value).encode("utf-8", "replace").decode("utf-8")
        return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " ..."
    if isinstance(value, Mapping):
        return {clean(str(name)): clean(item) for name, item in value.items()}
    if isinstance(value, list):
        return [clean(item) for item in value]
    return value


def values(path: Path) -> Facts:
    """Those of a JSON file, {} where it cannot be read."""
    try:
        found = json.loads(checkpoint.read_text(path, errors="replace"))
        return clean(found) if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _metrics(run: Path) -> dict[str, list[Facts]]:
    """Lines of metrics.jsonl by stage."""
    stages: dict[str, list[Facts]] = {}
    with suppress(OSError, ValueError):
        for record in metrics(run):
            stages.setdefault(clean(record["stage"]), []).append(record)
    return stages


def _arrays(path: Path, results: Facts | None) -> dict[str, np.ndarray]:
    """evaluation.npz, {} unless its shapes fit each other and the classes."""
    if results is None:  # nothing says how many classes
        return {}
    classes = len(results["classes"])
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > MOST_BYTES:
                return {}
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("ids", "labels", "probabilities", "map", "map_labels")}
        count, points = len(found["ids"]), len(found["map"])
        numbers = np.concatenate([found["labels"], found["map_labels"]])
        fits = found["labels"].shape == (count,) and found["probabilities"].shape in ((count, classes), (0, classes))
        fits = fits and found["map"].shape == (points, 2) and found["map_labels"].shape == (points,)
        fits = fits and all(np.isfinite(a).all() for a in found.values())
        fits = fits and (not len(numbers) or (numbers.min() >= -1 and numbers.max() < max(classes, 1)))
    except UNREADABLE:
        return {}
    return found if fits else {}


def _bad_images(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) >= 2]
    except (OSError, csv.Error):
        return []
    return [(clean(row[0]), clean(row[1])) for row in rows[1:]]


def is_number(value: Any) -> bool:
    """Whether value is a finite number and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short(text: str, most: int = 48) -> str:
    """text in at most `most` characters."""
    text = str(text)
    return text if len(text) <= most else text[: most - 3] + "..."
