"""Whose a stage's checkpoint is: what decides its result, and the refusal to go on with another run's."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fewlabels import checkpoint, config, plan
from fewlabels.data.labels import Dataset
from fewlabels.errors import CannotCreate, FewlabelsError
from fewlabels.prepared import Prepared
from fewlabels.runfolder import RunFolder
from fewlabels.use import artefact
from fewlabels.use.learned import open_run


def of(prepared: Prepared, stage: str) -> dict[str, Any]:
    """What decides the result of a stage: equal identities mean that its checkpoint belongs to this run."""
    recipe, dataset = prepared.recipe, prepared.dataset
    facts: dict[str, Any] = {
        "images": dataset.digest,
        "seed": prepared.seed,
        **{name: getattr(recipe, name) for name in ("size", "kind", "encoder")},
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


def check(
    before: Mapping[str, Any], now: Mapping[str, Any], stage: str, folder: Path, dataset: Dataset | None = None
) -> None:
    """Refuse a checkpoint of another run, naming every difference; of images and labels how many dataset has.

    A run of an older version knows no knob that is newer: it ran with what is now that knob's default. Distillation
    into the same network knows no student.
    """
    untouched = {"distill.student", "distill.temperature"} if stage == "distill_self" else set()
    flat_before, flat_now = (config.flat(_with_defaults(facts)) for facts in (before, now))
    differences = [
        _counted(name, folder, dataset)
        or f"{name}: {flat_before.get(name)!r} there, {flat_now.get(name)!r} asked for now"
        for name in sorted((flat_before.keys() | flat_now.keys()) - untouched)
        if flat_before.get(name) != flat_now.get(name)
    ]
    if differences:
        if dataset is not None and flat_before.get("images") != flat_now.get("images"):
            differences += other_images(folder, dataset)
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


def check_folder(prepared: Prepared) -> None:
    """Refuse, before anything is done, a folder whose stages belong to another run."""
    for stage in plan.TRAINED:
        before = checkpoint.glance(prepared.folder.stage(stage)) or {}
        if "identity" in before:
            check(before["identity"], of(prepared, stage), stage, prepared.folder.path, prepared.dataset)


def other_images(folder: Path, dataset: Dataset) -> list[str]:
    """Names of training images that only the run in folder has, and that only dataset has, in words."""
    try:
        run, _ = open_run(folder)
    except FewlabelsError:  # an older version kept no names
        return []
    if run.digest == dataset.digest:  # they only have other names
        return []
    # Those of an array's rows, array-000007, say no more than their count
    there, here = ({each.names[i] for i in each.train if "." in each.names[i]} for each in (run, dataset))
    others = {"no longer there": sorted(there - here), "not there before": sorted(here - there)}
    return [f"{words}: {', '.join([*few[:3], *['...'] * (len(few) > 3)])}" for words, few in others.items() if few]


def _counted(name: str, folder: Path, dataset: Dataset | None) -> str:
    """How many images or labels there are and were: their hashes tell nobody anything. "" for what is no hash."""
    if dataset is None or name not in ("images", "labels"):
        return ""
    now = dataset.understood
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
