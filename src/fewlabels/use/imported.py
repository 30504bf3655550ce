"""`fewlabels import`: a checkpoint of the reference as a model folder that every other command can use."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from fewlabels.errors import CannotCreate, DataError, MissingInput
from fewlabels.model.heads import Classifier
from fewlabels.model.reference import Reference, load_reference
from fewlabels.use import artefact
from fewlabels.use.artefact import Card

SMALL, LARGE = 32, 224  # sides of the views that the reference trains on, by the stem
SHOWN = 12
# What TensorFlow keeps beside the weights that are read: counted, not named one by one
FAMILIES = {
    "slots of the optimizer": r"Momentum",
    "moving averages": r"^ema_model/",
    "weights that the moving averages stand for": r"^(base_model|head_\w+)/",
    "counters and settings of the optimizer": r"save_counter|^optimizer/",
}


def import_reference(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, ema: bool = False, tap: int | None = None,
    classes: str | os.PathLike[str] | None = None,
) -> tuple[Path, Card, Reference]:  # fmt: skip
    """Write the model folder `out` from a SimCLRv2 checkpoint of TensorFlow; all layers of the head are kept.

    path, ema, tap: as for load_reference. classes: a text file with one class name a line in the order of the
    classifier's outputs, or one of the reference's lists of ImageNet files (n01440764_10026.JPEG), whose synsets in
    order are ImageNet's classes. Left out, the classes are called by their numbers.
    Raises as load_reference, CannotCreate where `out` holds more than a model, DataError for names that do not fit.
    """
    folder = Path(out)
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or (there and there != artefact.FILES):
        raise CannotCreate(f"{folder} holds something else than a model", fix="give a new folder as --out")
    found = load_reference(Path(path), ema=ema, tap=tap)
    network = found.classifier or Classifier(found.encoder, found.projection_head, tap=found.tap, num_classes=1)
    count = network.linear.out_features if found.classifier else 0
    head = found.projection_head
    card = Card(
        encoder=found.name,
        tap=found.tap,
        whole_head=head is not None,
        head_layers=len(head.layers) if head is not None else Card.head_layers,
        head_out=head.out_features if head is not None else Card.head_out,
        classes=_names(Path(classes), count) if classes is not None else tuple(map(str, range(count))),
        size=SMALL if found.name.endswith("_small") else LARGE,
        kind="reference_tf1" if found.tensorflow == 1 else "reference",
        training={
            "imported from": str(path),
            "written by": f"TensorFlow {found.tensorflow}" + (f" at step {found.step:,}" if found.step else ""),
            "classifier on tap": f"{found.tap} ({found.why})" if found.classifier else "none",
            "weights": "moving averages" if ema else "as trained",
        },
    )
    return artefact.save(folder, network, card, head), card, found


def told(folder: Path, card: Card, found: Reference) -> list[str]:
    """What was imported, in words; every variable that was not used is counted or named."""
    parameters = sum(p.numel() for p in found.encoder.parameters())
    layers = len(found.projection_head.layers) if found.projection_head is not None else 0
    lines = [f"{card.encoder}, {parameters:,} parameters, {layers} layers of the projection head"]
    if found.classifier is not None:
        lines.append(f"classifier of {card.num_classes:,} classes on tap {found.tap}: {found.why}")
    else:
        lines.append("no classifier in it: an encoder, to be fine-tuned with --pretrained")
    rest = list(found.unread)
    for words, pattern in FAMILIES.items():
        family = [name for name in rest if re.search(pattern, name)]
        rest = [name for name in rest if name not in set(family)]
        lines += [f"not read: {len(family):,} {words}, such as {family[0]}"] if family else []
    lines += [f"not read: {name}" for name in rest[:SHOWN]]
    lines += [f"not read: {len(rest) - SHOWN:,} more, all named by --json"] if len(rest) > SHOWN else []
    return [*lines, f"model: {folder}"]


def facts(folder: Path, card: Card, found: Reference) -> dict[str, Any]:
    """The same as plain values; unread has every name."""
    return {
        "model": str(folder), "encoder": card.encoder, "classes": card.num_classes, "tap": found.tap,
        "why_tap": found.why, "step": found.step, "tensorflow": found.tensorflow, "unread": list(found.unread),
    }  # fmt: skip


def _names(path: Path, count: int) -> tuple[str, ...]:
    if not path.is_file():
        raise MissingInput(f"{path} is not there", fix="give a text file with one class name a line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text: {error}", fix="save it as UTF-8, one class name a line") from error
    if lines and all(re.fullmatch(r"n\d{8}_\d+\.JPEG", line) for line in lines):
        lines = sorted({line.split("_")[0] for line in lines})
    faults = [f"line {k}: empty" for k, line in enumerate(lines, 1) if not line]
    first: dict[str, int] = {}
    faults += [
        f'line {k}: "{line}" is also in line {first[line]}'
        for k, line in enumerate(lines, 1)
        if line and first.setdefault(line, k) != k
    ]
    if len(lines) != count:
        faults.append(f"{len(lines):,} names for the classifier's {count:,} outputs")
    if faults:
        raise DataError(f"{path} does not name the classes", details=faults, fix="give one name a line, in order")
    return tuple(lines)
