"""From what was asked to what will be done: images understood and stored, the recipe resolved, every number derived.

Nothing here trains. `fewlabels check` ends after it; `pipeline.py` goes on from it.
"""

from __future__ import annotations

import hashlib
import platform
import shlex
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fewlabels
from fewlabels import checkpoint, config, plan, runtime
from fewlabels.asked import Asked, begun_stages, of_images, resolve
from fewlabels.config import Recipe
from fewlabels.data import decode, labels, pixels, streamed, views
from fewlabels.data.labels import Dataset, Understood
from fewlabels.data.source import Source
from fewlabels.data.sources import check_classes, open_source
from fewlabels.errors import CannotCreate, DataError, MissingInput, UsageError
from fewlabels.recipes import Facts
from fewlabels.runfolder import RunFolder, duration, say
from fewlabels.use import artefact, compare, propagate
from fewlabels.use.learned import without_learned

SURVEYED = 32  # images looked at to choose a recipe


@dataclass(frozen=True)
class Prepared:
    """Everything the stages need."""

    folder: RunFolder
    dataset: Dataset
    facts: Facts
    recipe: Recipe
    device: torch.device
    precision: runtime.Precision
    seed: int
    seconds: float  # that reading the images took
    too_weak: str = ""  # why its features are, once they are there, for the self-training that the recipe chose

    @property
    def setting(self) -> compare.Setting:
        """How features and predictions are computed."""
        return compare.Setting(self.recipe.size, self.recipe.kind, self.device, self.precision)

    @property
    def self_trains(self) -> bool:
        """Whether the network teaches itself: with labels, which a given model may do without, and good features."""
        return self.recipe.distill.self_trains and len(self.dataset.labeled) > 0 and not self.too_weak

    @property
    def learned_before(self) -> bool:
        """Whether a given model may have learned some of these very labels, since it tells one of the classes: what is
        then cross-validated on its features says nothing.
        """
        given = self.recipe.pretrained
        return given is not None and not set(self.dataset.classes).isdisjoint(artefact.read_card(Path(given)).classes)

    @property
    def spreads(self) -> bool:
        """Whether labels are so few that they are spread over the neighbour graph before fine-tuning.

        Not from a given model, which may have lost the upper layers of its head. Before self-training photos gain by it
        (CIFAR-10 (JPEG) and Imagenette, 10 labels a class, 1.4 and 0.8 points) and drawings lose: digits, 2 labels a
        class, ended at 91.0, 87.9, 88.8 % from spread labels, at 99.3, 97.7, 98.2 without.
        """
        few = 0 < len(self.dataset.labeled) <= propagate.FEW_LABELS * self.dataset.num_classes
        loses = self.self_trains and self.recipe.kind == "glyph"
        return few and self.recipe.finetune.start == "probe" and self.recipe.pretrained is None and not loses

    @property
    def reasons(self) -> list[str]:
        """Why the run looks as it does."""
        most = f"up to {min(propagate.FITTED_IMAGES, len(self.dataset.train)):,} images"
        first = [f"labels are spread first: the steps of finetune learn {most}"] * self.spreads
        return [*first, *plan.reasons(self.followed, self.facts), *[self.too_weak] * bool(self.too_weak)]

    @property
    def followed(self) -> Recipe:
        """The recipe as it is carried out: without self-training where features are too weak."""
        sure = 0.0 if self.too_weak else self.recipe.distill.self_training
        return replace(self.recipe, distill=replace(self.recipe.distill, self_training=sure))

    def ids(self, stage: str) -> labels.Ints:
        """The images that a stage trains on, as rows of the dataset."""
        return self.dataset.labeled if plan.TRAINED[stage] == "finetune" else self.dataset.train

    @property
    def images(self) -> dict[str, int]:
        """How many images each stage trains on."""
        return {stage: len(self.ids(stage)) for stage in plan.TRAINED}

    @property
    def needed(self) -> int:
        """How many images a stage needs: one a process, two where each has batch norms of its own, and two in all."""
        return max(2, runtime.world_size() * (1 + ("timm:" in f"{self.recipe.encoder} {self.recipe.distill.student}")))

    def schedule(self, stage: str) -> config.Schedule:
        """That of one stage."""
        return plan.schedule_of(self.recipe, stage, self.images["finetune"], runtime.world_size())

    def derived(self, stage: str) -> plan.Derived:
        """The numbers of one stage."""
        return plan.derive(self.schedule(stage), self.images[stage], runtime.world_size())


# --- images ------------------------------------------------------------------------------------------------------


def survey(source: Source) -> tuple[int, bool]:
    """The usual longest side of the images, and whether they are gray, from a few of them."""
    sides, gray = [], []
    for payload in source.sample(SURVEYED):
        size = decode.header_size(payload)
        try:  # at full size one of 63 megapixels takes 670 MB
            image = decode.decode(payload, pixels.LARGEST_CANVAS)  # (H, W, 3) uint8
        except decode.BadPicture:
            continue
        sides.append(max(size or image.shape[:2]))
        spread = image.max(axis=2).astype(np.int16) - image.min(axis=2)
        gray.append(float(np.mean(spread > 8)) < 0.01)  # JPEG's chroma noise stays below 8 levels
    return (int(np.median(sides)), bool(np.mean(gray) > 0.95)) if sides else (32, False)


def fingerprint(source: Source) -> str:
    """SHA-256 of the images' names and stamps: whether a stored decoding may be used again. Labels do not matter."""
    digest = hashlib.sha256()
    for name in source.names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\n")
    for part in source.parts:
        for stamp in part.stamps():
            digest.update(stamp + b"\n")
    return digest.hexdigest()


def store_images(source: Source, folder: RunFolder, recipe: Recipe, max_bad: float, known: tuple[str, ...]) -> Dataset:
    """Decode once into RUN/data (or use what is there), and join pixels with labels; known: classes of a teacher."""
    note = folder.path / "data.json"
    with runtime.main_first():
        if runtime.is_main():
            about = {"fingerprint": fingerprint(source), "working_size": recipe.working_size}
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
            other = (begun if isinstance(begun, dict) else {}) | {"images": images_digest(found)}
            check_identity(begun, other, "pretrain", folder.path, found.understood)
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


def images_digest(dataset: Dataset) -> str:
    """A name for the training images: their pixels, in order."""
    return hashlib.sha256(dataset.store.hashes[dataset.train].tobytes()).hexdigest()[:16]


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


# --- whose stage it is ----------------------------------------------------------------------------------------------


def identity(prepared: Prepared, stage: str) -> dict[str, Any]:
    """What decides the result of a stage: equal identities mean that its checkpoint belongs to this run."""
    recipe, dataset = prepared.recipe, prepared.dataset
    facts: dict[str, Any] = {
        "images": images_digest(dataset),
        "seed": prepared.seed,
        "size": recipe.size,
        "kind": recipe.kind,
        "encoder": recipe.encoder,
        "precision": prepared.precision.name,
        "pretrain": asdict(recipe.pretrain),
    }
    if recipe.resolution != 1:
        facts["resolution"] = recipe.resolution
    if recipe.pretrain.chunk:
        facts["chunk_norm"] = recipe.chunk_norm
    if recipe.pretrained is not None:
        facts["pretrained"] = artefact.weights_digest(Path(recipe.pretrained))
    if stage != "pretrain":
        labeled = dataset.labels[dataset.train].tobytes() + "\0".join(dataset.classes).encode()
        facts |= {"labels": hashlib.sha256(labeled).hexdigest()[:16], "finetune": asdict(recipe.finetune)}
    if stage == "finetune" and prepared.self_trains and recipe.kind == "glyph":
        facts["starts_from_propagated_labels"] = False
    if stage == "supervised" and recipe.distill.optimizer == "muon":
        facts["baseline"] = "muon"
    if plan.TRAINED[stage] == "distill":
        facts["distill"] = asdict(recipe.distill)
        facts |= {"self_trains": False} if prepared.too_weak else {}
    return facts


def check_identity(
    before: Mapping[str, Any], now: Mapping[str, Any], stage: str, folder: Path, understood: Understood | None = None
) -> None:
    """Refuse a checkpoint of another run, naming every difference; of images and labels how many are understood now.

    A run of an older version knows no knob that is newer: it ran with what is now that knob's default. Distillation
    into the same network knows no student.
    """
    untouched = {"distill.student", "distill.temperature"} if stage == "distill_self" else set()
    flat_before, flat_now = (config.flat(_with_defaults(facts)) for facts in (before, now))
    differences = [
        _counted(name, folder, understood)
        or f"{name}: {flat_before.get(name)!r} there, {flat_now.get(name)!r} asked for now"
        for name in sorted((flat_before.keys() | flat_now.keys()) - untouched)
        if flat_before.get(name) != flat_now.get(name)
    ]
    if differences:
        trained = list(plan.TRAINED)
        later = shlex.join(str(folder / name) for name in trained[trained.index(stage) :])
        fix = "give a new --out for the new settings, or repeat the command that made this folder"
        if flat_before.get("images") != flat_now.get("images") and (folder / "model").is_dir():
            fix = f"give a new --out (`fit --pretrained {shlex.quote(str(folder))}` begins there), or the old images"
        if stage != "pretrain":
            fix += f"; to keep what comes before it and do the rest anew, first rm -rf {later}"
        raise CannotCreate(
            f"{folder} holds another run's {stage} stage", details=differences,
            why="going on would mix two runs; nothing was changed", fix=fix,
        )  # fmt: skip


def _counted(name: str, folder: Path, now: Understood | None) -> str:
    """How many images or labels there are and were: their hashes tell nobody anything. "" for what is no hash."""
    if now is None or name not in ("images", "labels"):
        return ""
    count, kind, words = (now.train, "train", " to train on") if name == "images" else (now.labeled, "labeled", "")
    before = (RunFolder(folder).resolved() or {}).get("understood", {}).get(kind, "others")
    return f"{name}: {before}{words} there, {count}{' others' * (before == count)} now"


def _with_defaults(facts: Any) -> dict[str, Any]:
    """An identity, which may come from anywhere, with all knobs of today in the sections that it has."""
    found: dict[str, Any] = dict(facts) if isinstance(facts, Mapping) else {}
    for name, kind in config.SECTIONS.items():
        found |= {name: asdict(kind()) | found[name]} if isinstance(found.get(name), Mapping) else {}
    if found.get("kind") != "glyph":  # an older version said it of photos too
        found.pop("starts_from_propagated_labels", None)
    return found


# --- all of it ---------------------------------------------------------------------------------------------------


def open_images(asked: Asked) -> Source:
    """The source, checked as far as that goes without decoding."""
    if asked.images is None:
        raise MissingInput("no images were given", fix="give a folder, a CSV, a parquet or npz file, or an array")
    if not (isinstance(asked.seed, int) and 0 <= asked.seed < 2**32):
        raise UsageError(f"seed {asked.seed!r} cannot be used", fix="give a whole number from 0 to 4294967295")
    if not 0 <= asked.max_bad <= 1:
        raise UsageError(f"max_bad {asked.max_bad} is no share of the images", fix="give a number from 0 to 1")
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
    side, gray = survey(source)
    taught = {label for label, s in zip(source.labels, source.splits, strict=True) if s == "train" and label}
    lines = np.zeros(len(source), np.int32) if source.lines is None else source.lines  # of a CSV that says labels
    is_place = len(taught) == 1 and asked.labels is None and not lines[np.array(source.splits) == "train"].any()
    if asked.until == "pretrain" and any(source.labels) and (is_place or not taught):
        words = f'the one class "{min(taught)}" tells nothing apart' if taught else "only held-out images have labels"
        say(f"  note: {words}: pretraining goes without")
        source = replace(source, labels=(None,) * len(source))
    rough = Facts(
        images=sum(split == "train" for split in source.splits),
        labeled=sum(s == "train" and y is not None for s, y in zip(source.splits, source.labels, strict=True)),
        classes=len({y for y in source.labels if y is not None}),
        side=side, gray=gray, on_gpu=device.type == "cuda", threads=runtime.threads(),
    )  # fmt: skip
    first = resolve(asked, rough, stored, begun)
    known = artefact.read_card(Path(first.pretrained)).classes if first.pretrained is not None else ()
    dataset = store_images(source, folder, first, asked.max_bad, known)
    if first.pretrained is not None:
        dataset = without_learned(dataset, Path(first.pretrained))
    if first.pretrained is not None and not known and not len(dataset.labeled):
        raise DataError(
            f"there is nothing to do: no labels, and {first.pretrained} has no classifier that could teach",
            fix="give labels with --labels",
        )
    if asked.keep_labels is not None:
        dataset = labels.keep_labels(dataset, asked.keep_labels, asked.seed)
    say(dataset.understood.line())
    for remark in dataset.understood.notes:
        say(f"  note: {remark}")
    facts = replace(rough, images=len(dataset.train), labeled=len(dataset.labeled), classes=len(dataset.classes))
    recipe = resolve(asked, facts, stored, begun)
    precision = number_format(recipe, device, stored)
    seconds = runtime.from_main(time.perf_counter() - began)
    return Prepared(folder, dataset, facts, recipe, device, precision, asked.seed, seconds)


def number_format(recipe: Recipe, device: torch.device, stored: Mapping[str, Any] | None) -> runtime.Precision:
    """As asked. What "auto" has measured once stays the run's: another answer would make it another run."""
    if stored and recipe.precision == stored["recipe"]["precision"] == "auto":
        return runtime.precision(device, stored["precision"], channels_last=stored.get("channels_last", True))
    return runtime.precision(device, recipe.precision)


def check_resumable(prepared: Prepared) -> None:
    """Refuse, before anything is done, a folder whose stages belong to another run."""
    for stage in plan.TRAINED:
        saved = checkpoint.glance(prepared.folder.stage(stage))
        if saved is not None and "identity" in saved:
            now, understood = identity(prepared, stage), prepared.dataset.understood
            check_identity(saved["identity"], now, stage, prepared.folder.path, understood)


def write_resolved(prepared: Prepared, asked: Asked, sums: list[str]) -> None:
    """images.csv, recipe.toml and resolved.json: what is there, what was asked and what will be run."""
    if not runtime.is_main():
        return
    recipe, understood = prepared.recipe, prepared.dataset.understood
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
            "equations": sums + equations(prepared),
            "budget": sums,
            "why": prepared.reasons,
            "too_weak": prepared.too_weak,
            "derived": {s: asdict(prepared.derived(s)) for s in _planned(prepared)},
            "versions": versions(),
            "device": device_name(prepared.device),
            "precision": prepared.precision.name,
            "channels_last": prepared.precision.channels_last,
            "threads": torch.get_num_threads(),
            "ranks": runtime.world_size(),
            "seed": prepared.seed,
            "understood": asdict(understood) | {"line": understood.line()},
        },
    )


def equations(prepared: Prepared) -> list[str]:
    """Every derived number of every stage that can run."""
    return [
        line
        for stage in _planned(prepared)
        for line in plan.equations(stage, prepared.followed, prepared.derived(stage), runtime.world_size())
    ]


def stages_to_run(prepared: Prepared) -> list[str]:
    """All three stages, or only pretraining while there are no labels; with a model to begin with, what is left."""
    labeled = len(prepared.dataset.labeled)
    if prepared.recipe.pretrained is not None:
        return ["finetune", "distill"] if labeled else ["distill"]
    return list(plan.STAGES) if labeled else ["pretrain"]


def _planned(prepared: Prepared) -> list[str]:
    """Those of stages_to_run that have enough images; others may follow on fewer processes."""
    return [stage for stage in stages_to_run(prepared) if prepared.images[stage] >= prepared.needed]


def versions() -> dict[str, str]:
    """What ran, for resolved.json and bug reports."""
    return {
        "fewlabels": fewlabels.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "numba": sys.modules["numba"].__version__ if "numba" in sys.modules else "not there: plain views on a CPU",
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {runtime.threads()} threads ({platform.machine()})"
