"""From what was asked to what will be done: images understood and stored, the recipe resolved, every number derived.

Nothing here trains. `fewlabels check` ends after it; `pipeline.py` goes on from it.
"""

from __future__ import annotations

import platform
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fewlabels
from fewlabels import checkpoint, config, identity, plan, runtime
from fewlabels.asked import Asked, begun_stages, of_images, resolve
from fewlabels.config import Recipe
from fewlabels.data import labels, pixels, streamed, views
from fewlabels.data.labels import Dataset
from fewlabels.data.source import Source
from fewlabels.data.sources import check_classes, open_source
from fewlabels.errors import DataError, MissingInput
from fewlabels.prepared import Prepared
from fewlabels.recipes import Facts
from fewlabels.runfolder import RunFolder, duration, say
from fewlabels.use import artefact
from fewlabels.use.learned import without_learned


def open_images(asked: Asked) -> Source:
    """The source, checked as far as that goes without decoding."""
    if asked.images is None:
        raise MissingInput("no images were given", fix="give a folder, a CSV, a parquet or npz file, or an array")
    source = open_source(asked.images, asked.labels, test=asked.test)
    if asked.until != "pretrain":
        check_classes(source)
    return source


def compile_views(device: torch.device) -> None:
    """Load the compiled views where they will run; rank 0 compiles them if need be and the others find the result."""
    if device.type == "cpu":
        hint = threading.Timer(3.0, say, ["loading the compiled views (the first time on a machine: about 15 s) ..."])
        hint.start()
        try:
            with runtime.main_first():
                views.compiled()
        finally:
            hint.cancel()


def prepare(asked: Asked, source: Source, folder: RunFolder, device: torch.device) -> Prepared:
    """Understand the images, resolve the recipe, and say both."""
    compile_views(device)
    began = time.perf_counter()
    stored, begun = runtime.from_main((folder.resolved(), begun_stages(folder)))  # a disk may give others older files
    side, gray = pixels.survey(source)
    source = _as_asked(source, asked)
    rough = Facts(
        images=sum(split == "train" for split in source.splits),
        labeled=sum(s == "train" and y is not None for s, y in zip(source.splits, source.labels, strict=True)),
        classes=len({y for y in source.labels if y is not None}),
        side=side, gray=gray, on_gpu=device.type == "cuda", threads=runtime.threads(),
    )  # fmt: skip
    dataset = _dataset(asked, source, folder, resolve(asked, rough, stored, begun))
    say(dataset.understood.line())
    for remark in dataset.understood.notes:
        say(f"  note: {remark}")
    facts = replace(rough, images=len(dataset.train), labeled=len(dataset.labeled), classes=len(dataset.classes))
    recipe = resolve(asked, facts, stored, begun)
    precision = number_format(recipe, device, stored)
    seconds = runtime.from_main(time.perf_counter() - began)
    return Prepared(folder, dataset, facts, recipe, device, precision, asked.seed or 0, seconds)


def _as_asked(source: Source, asked: Asked) -> Source:
    """source; for pretraining alone without labels that tell nothing apart, as those of one folder of pictures."""
    taught = {label for label, s in zip(source.labels, source.splits, strict=True) if s == "train" and label}
    lines = np.zeros(len(source), np.int32) if source.lines is None else source.lines  # of a CSV that says labels
    is_place = len(taught) == 1 and asked.labels is None and not lines[np.array(source.splits) == "train"].any()
    if asked.until != "pretrain" or not any(source.labels) or (taught and not is_place):
        return source
    words = f'the one class "{min(taught)}" tells nothing apart' if taught else "only held-out images have labels"
    say(f"  note: {words}: pretraining goes without")
    return replace(source, labels=(None,) * len(source))


def _dataset(asked: Asked, source: Source, folder: RunFolder, recipe: Recipe) -> Dataset:
    """The images, stored, with the labels that count: none that a given model has learned, or that are to be hidden."""
    given = None if recipe.pretrained is None else Path(recipe.pretrained)
    known = () if given is None else artefact.read_card(given).classes
    dataset = store_images(source, folder, recipe, asked.max_bad, known)
    if given is not None:
        dataset = without_learned(dataset, given)
        if not known and not len(dataset.labeled):
            raise DataError(
                f"there is nothing to do: no labels, and {given} has no classifier that could teach",
                fix="give labels with --labels",
            )
    return dataset if asked.keep_labels is None else labels.keep_labels(dataset, asked.keep_labels, asked.seed or 0)


def store_images(source: Source, folder: RunFolder, recipe: Recipe, max_bad: float, known: tuple[str, ...]) -> Dataset:
    """Decode once into RUN/data (or use what is there), and join pixels with labels; known: classes of a teacher."""
    note = folder.path / "data.json"
    with runtime.main_first():
        if runtime.is_main():
            about = {"fingerprint": source.fingerprint(), "working_size": recipe.working_size}
            about |= {} if recipe.store == "auto" else {"store": recipe.store}
            if not _stored(folder, note, about):
                say(f"reading {source.description} ...")
                _decode(source, folder, note, about, max_bad, known)
            elif (folder.data / "ends.npy").exists():  # a streamed store, whose images may lie elsewhere now
                streamed.write_paths(folder.data, map(source.at, checkpoint.read_sealed(note)["kept"]))
    kept = np.asarray(checkpoint.read_sealed(note)["kept"], dtype=np.int64)
    store = pixels.open_store(folder.data, lambda row: source.at(int(kept[row])))
    return labels.assemble(source, store, kept, known)


def _decode(
    source: Source, folder: RunFolder, note: Path, about: dict[str, Any], max_bad: float, known: tuple[str, ...]
) -> None:
    """Make RUN/data, anew if a kill left no note; that of a begun run gives way only to the same images."""
    saved = (checkpoint.glance(folder.stage(stage)) for stage in plan.TRAINED)
    begun = next((values.get("identity", {}) for values in saved if values is not None), None)
    bad_csv = folder.path / ("bad_images.csv" if begun is None else "bad_images.refused.csv")  # until they are accepted

    def accept(store: pixels.PixelStore, kept: labels.Ints) -> None:
        if begun is not None:
            found = labels.assemble(source, store, kept, known)
            other = (begun if isinstance(begun, dict) else {}) | {"images": found.digest}
            identity.check(begun, other, "pretrain", folder.path, found)
        note.unlink(missing_ok=True)

    started = time.perf_counter()
    store, kept, _ = pixels.build(
        source, folder.data, working_size=about["working_size"], max_bad_share=max_bad, threads=runtime.threads(),
        bad_csv=bad_csv, store=about.get("store", "auto"), accept=accept,
    )  # fmt: skip
    bad_csv.replace(folder.path / "bad_images.csv")
    if store.streamed:
        count, size = len(store), len(store) * 3 * store.canvas**2 / 1e9
        say(f"  note: {count:,} images as pixels of {store.canvas} px would take {size:,.1f} GB of disk; they are "
            f"decoded anew each time they are seen, {duration(time.perf_counter() - started)} a pass at the speed "
            "of this first one")  # fmt: skip
    about |= {"store": "streamed" if store.streamed else "pixels", "kept": kept.tolist()}
    checkpoint.write_sealed(note, about)


def _stored(folder: RunFolder, note: Path, about: Mapping[str, Any]) -> bool:
    if not (note.exists() and folder.data.exists()):
        return False
    try:
        before = checkpoint.read_sealed(note)
        pixels.open_store(folder.data, lambda _: b"")
    except checkpoint.UNREADABLE as error:  # a StorageError is an OSError
        say(f"  warning: {getattr(error, 'what', f'{note} is damaged: {error}')}; the images are read anew")
        return False
    return all(before.get(name) == value for name, value in about.items())


def number_format(recipe: Recipe, device: torch.device, stored: Mapping[str, Any] | None) -> runtime.Precision:
    """As asked. What "auto" has measured once stays the run's: another answer would make it another run."""
    if stored and recipe.precision == stored["recipe"]["precision"] == "auto":
        return runtime.precision(device, stored["precision"], channels_last=stored.get("channels_last", True))
    return runtime.precision(device, recipe.precision)


def write_resolved(prepared: Prepared, asked: Asked, sums: list[str]) -> None:
    """images.csv, recipe.toml and resolved.json: what is there, what was asked and what will be run."""
    if not runtime.is_main():
        return
    recipe, understood, place = prepared.recipe, prepared.dataset.understood, prepared.device
    labels.write_images(prepared.dataset, prepared.folder.images_file)
    checkpoint.write_text(prepared.folder.path / "recipe.toml", config.to_toml(prepared.followed))
    checkpoint.write_json(
        prepared.folder.resolved_file,
        {
            "format_version": checkpoint.FORMAT_VERSION,
            "command": asked.command or "fewlabels.fit(...)",
            "asked": asked.wishes(),
            "facts": of_images(prepared.facts),
            "inputs": asked.inputs(),
            "tested_apart": asked.test is not None,
            "recipe": asdict(recipe),
            "equations": sums + prepared.equations,
            "budget": sums,
            "why": prepared.reasons,
            "too_weak": prepared.too_weak,
            "derived": {stage: asdict(numbers) for stage, numbers in prepared.planned.items()},
            "versions": versions(),
            "device": torch.cuda.get_device_name(place) if place.type == "cuda" else f"CPU ({platform.machine()})",
            "precision": prepared.precision.name,
            "channels_last": prepared.precision.channels_last,
            "threads": torch.get_num_threads(),
            "ranks": runtime.world_size(),
            "seed": prepared.seed,
            "understood": asdict(understood) | {"line": understood.line()},
        },
    )


def versions() -> dict[str, str]:
    """What ran, for resolved.json and bug reports."""
    return {
        "fewlabels": fewlabels.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "numba": sys.modules["numba"].__version__ if "numba" in sys.modules else "not there: plain views on a CPU",
        "python": platform.python_version(),
    }
