"""What a run folder says: its files as plain values, checked and clean, whatever of them is there.

Everything that a file, a label or a name says is text: control characters go here, markup is escaped by the page.

Shapes: N held-out images, K classes, M points of the map, L images of which something was learned.
"""

from __future__ import annotations

import csv
import json
import math
import re
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fewlabels import checkpoint
from fewlabels.data import pixels
from fewlabels.data.labels import TEST, VAL, Dataset, read_images
from fewlabels.data.parts import UNREADABLE
from fewlabels.errors import FewlabelsError, MissingInput
from fewlabels.runfolder import RunFolder, metrics
from fewlabels.use import artefact

Facts = dict[str, Any]
Keys = npt.NDArray[np.void]  # 32 bytes each: the SHA-256 of an image's pixels

LONGEST_TEXT = 2000
MOST_BYTES = 1 << 30  # of evaluation.npz unpacked, where a few kB can stand for terabytes
# C0 and C1 controls but the line break, line separators, and the marks that turn the direction of text around
UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]")


def read(run: Path) -> Facts:
    """All files of a run that the report needs; those that are not there, or cannot be read, are empty.

    DataError where a newer fewlabels wrote it.
    """
    results, resolved = _json(run / "results.json") or None, _json(run / "resolved.json")
    for name, found in (("results.json", results), ("resolved.json", resolved)):
        if found:
            checkpoint.check_format(found, run / name)
    return {
        "path": clean(str(run)),
        "folder": run,
        "resolved": resolved,
        "status": _json(run / "status.json"),
        "results": results,
        "metrics": _metrics(run),
        "arrays": _arrays(run / "evaluation.npz", results),
        "model": _json(run / "model" / "model.json"),
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


def _json(path: Path) -> Facts:
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


# --- what was learned of which images ----------------------------------------------------------------------------


def open_run(run: Path) -> tuple[Dataset, bool]:
    """The run's images with all that it knows of them, and whether its test images came by themselves."""
    folder = RunFolder(run)
    resolved = folder.resolved()
    if resolved is None or not folder.images_file.is_file():
        raise MissingInput(
            f"{run} does not say which images it is of",
            why="it is a model's folder, or a run of an older fewlabels",
            fix="give the folder that was --out of `fewlabels fit`, or run that command again",
        )
    dataset = read_images(folder.images_file, pixels.open_store(folder.data), resolved["understood"])
    return dataset, resolved.get("tested_apart", "test" in resolved["inputs"])


def without_learned(dataset: Dataset, model: Path) -> Dataset:
    """dataset, whose held-out images do not count where a given model has learned their labels; its notes say so."""
    trained_on, learned_from, whole = learned(model, dataset.store.canvas)
    held = np.isin(dataset.splits, (VAL, TEST)) & (dataset.labels >= 0)  # (N,)
    keys = dataset.store.hashes.view("V32")[:, 0]
    seen, taught = held & np.isin(keys, trained_on), held & np.isin(keys, learned_from)
    counted = {
        f"held-out images that do not count, since {model} has learned their labels": taught.sum(),
        f"held-out images that {model} was trained on without their labels": (seen & ~taught).sum(),
    }
    notes = [*dataset.understood.notes, *(f"{words}: {count:,}" for words, count in counted.items() if count)]
    notes += [f"{model} does not say whether it knows more of the held-out images"] if held.any() and not whole else []
    apart = replace(dataset, labels=np.where(taught, -1, dataset.labels))
    return replace(apart, understood=replace(apart.understood, held_out=len(apart.held_out), notes=tuple(notes)))


def learned(model: Path, canvas: int) -> tuple[Keys, Keys, bool]:
    """Keys (L,) of the images that the run of a model folder, and those that it began with, trained on; (L,) those
    whose labels they learned; and whether no other image, kept at this canvas, can be one of them.
    """
    seen, taught, runs, whole = [np.zeros(0, "V32")], [np.zeros(0, "V32")], list[Path](), True
    while whole and model not in runs:
        runs.append(model)
        try:
            dataset, _ = open_run(model.parent)
            given = (RunFolder(model.parent).resolved() or {})["recipe"].get("pretrained")
            keys, classes = dataset.store.hashes.view("V32")[:, 0], artefact.read_card(model).classes
        except (FewlabelsError, *UNREADABLE):
            whole = False
        else:
            seen.append(keys[dataset.train])
            taught += [keys[dataset.labeled]] if classes else []  # without any it has only pretrained
            whole, model = dataset.store.canvas == canvas, Path(given or model)
    return np.concatenate(seen), np.concatenate(taught), whole


def is_number(value: Any) -> bool:
    """Whether value is a finite number and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short(text: str, most: int = 48) -> str:
    """text in at most `most` characters."""
    text = str(text)
    return text if len(text) <= most else text[: most - 3] + "..."
