"""The deployable folder `model/`: weights, everything needed to use them, a model card, and a manifest.

    model/  weights.safetensors  model.json  README.md  manifest.json

Nothing in it is run when it is loaded: tensors are safetensors, the rest is JSON. The folder is published by one
rename and every byte is checked against the manifest before it is used.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewlabels import __version__, checkpoint
from fewlabels.data.places import at_home
from fewlabels.data.views import KINDS
from fewlabels.errors import DataError, FewlabelsError, MissingInput
from fewlabels.model.encoder import encoder
from fewlabels.model.heads import Classifier, ProjectionHead

WEIGHTS, DESCRIPTION, MANIFEST, README = "weights.safetensors", "model.json", "manifest.json", "README.md"
FILES = {WEIGHTS, DESCRIPTION, MANIFEST, README}
LEAST_CANVAS = 1024  # where training kept images as they came: 64 of them still fit in 200 MB
LIMITS = {"size": (2, 4096), "canvas": (2, 16384), "head_out": (1, 65536), "tap": (0, 16), "head_layers": (1, 16)}


@dataclass(frozen=True, kw_only=True)
class Card:
    """What model.json says beside the weights: enough to rebuild the network and to feed it.

    encoder: as given to `encoder`. tap: layers of the projection head below the classifier. head_layers,
    head_out: the head it was pretrained with, unused when tap is 0. size, kind: of the evaluation view.
    canvas: the working size at which images were kept for training, None = as they came. temperature: divides the
    logits. labels_a_class: how many of the labels that it learned from are of each class, () = not known. balanced:
    whether it answers as if classes came equally often. metrics: what `measure` returned, or None. whole_head: the file
    also keeps the layers of the head above the tap, for fine-tuning from any of them. Without classes the model is an
    encoder: it has features, no logits. training: facts for the model card (images, labels, recipe, ...), plain JSON
    values.
    """

    encoder: str
    tap: int = 0
    head_layers: int = 3
    head_out: int = 128
    whole_head: bool = False
    classes: tuple[str, ...]
    size: int
    kind: str
    canvas: int | None = None
    temperature: float = 1.0
    labels_a_class: tuple[int, ...] = ()
    balanced: bool = False
    metrics: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    version: str = __version__

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.classes)

    @property
    def longest_side(self) -> int:
        """Larger pictures are brought down to it first, as they were for training."""
        return self.canvas or max(LEAST_CANVAS, 4 * self.size)


def build(card: Card) -> tuple[Classifier, ProjectionHead | None]:
    """The network of card with new weights, and the head it was pretrained with as far as it is kept."""
    body = encoder(card.encoder)
    has_head = card.tap or card.whole_head
    head = ProjectionHead(body.feature_dim, card.head_out, card.head_layers) if has_head else None
    # an encoder carries a classifier of one class at zero, which Model never asks
    return Classifier(body, head, tap=card.tap, num_classes=max(1, card.num_classes)), head


def save(folder: Path, network: Classifier, card: Card, head: ProjectionHead | None = None) -> Path:
    """Write the artefact as `folder`, replacing an older one only when all of it is on the disk.

    head: the projection head, if card.whole_head.
    """
    tensors = _state(network, head, card)
    with checkpoint.publish(folder) as temporary:
        checkpoint.write_tensors(temporary / WEIGHTS, tensors)
        description = {"format_version": checkpoint.FORMAT_VERSION, **dataclasses.asdict(card)}
        description["num_classes"] = card.num_classes
        checkpoint.write_json(temporary / DESCRIPTION, description)
        digest = checkpoint.file_digest(temporary / WEIGHTS)
        parameters = sum(t.numel() for n, t in tensors.items() if not re.search(r"running_|num_batches", n))
        checkpoint.write_text(temporary / README, model_card(card, parameters=parameters, digest=digest))
    return folder


def _state(network: Classifier, head: ProjectionHead | None, card: Card) -> dict[str, Tensor]:
    """The tensors of the file: the network's, and those of the head's layers above the tap as above.0, above.1 ..."""
    above = torch.nn.ModuleList(list(head.layers)[card.tap :] if head is not None and card.whole_head else [])
    return network.state_dict() | {f"above.{name}": tensor for name, tensor in above.state_dict().items()}


def place(folder: Path) -> Path:
    """The model folder meant by a run folder or a model folder; MissingInput where there is none."""
    folder = at_home(folder)
    if not folder.is_dir():
        state = "is a file" if folder.is_file() else "does not exist"
        raise MissingInput(f"{folder} {state}", why="a model is a folder", fix="give the run folder, as in --out RUN")
    for candidate in (folder, folder / "model"):
        if (candidate / DESCRIPTION).is_file() or (candidate / MANIFEST).is_file():
            return candidate
    if (folder / "status.json").is_file() or (folder / "resolved.json").is_file():
        raise MissingInput(
            f"the run {folder} has no model yet",
            why=f"it holds {listing(folder)}, and model/ is written when the last stage is done",
            fix=f"run the same `fewlabels fit ... --out {folder}` again: it goes on where it stopped; for suggestions "
            f"and features stage 1 will do, `fewlabels pretrain --out {shlex.quote(str(folder))}`",
        )
    raise MissingInput(
        f"{folder} is neither a run nor a model",
        why=f"it holds {listing(folder)}; a run has model/, a model has {DESCRIPTION}",
        fix="give the folder that was --out of `fewlabels fit`",
    )


def listing(folder: Path, most: int = 12) -> str:
    """What is in folder, in words."""
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in folder.iterdir() if not p.name.startswith("."))
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def read(folder: Path) -> tuple[Classifier, Card]:
    """The network (in inference mode, on the CPU) and card of an artefact, after every byte was checked."""
    network, _, card = read_whole(folder)
    return network, card


def weights_digest(folder: Path) -> str:
    """SHA-256 of the weights as the manifest states it."""
    listed: dict[str, Any] = json.loads(checkpoint.read_text(folder / MANIFEST))["files"]
    return str(listed[WEIGHTS]["sha256"])


def read_whole(folder: Path) -> tuple[Classifier, ProjectionHead | None, Card]:
    """As `read`, with the projection head as far as the file keeps it (the network's layers are the same modules).

    Raises MissingInput where there is no artefact, DataError where it is damaged, newer than this version, or
    where weights and description do not fit each other.
    """
    missing = [name for name in (WEIGHTS, DESCRIPTION, MANIFEST) if not (folder / name).is_file()]
    if missing:
        raise MissingInput(
            f"{folder} is not a whole model folder: {', '.join(missing)} not found",
            why="a model needs its weights, its description and the manifest that vouches for them",
            fix="give the folder model/ of a finished run, or copy it again with all its files",
        )
    try:
        checkpoint.verify(folder, (WEIGHTS, DESCRIPTION))
    except DataError as error:
        fix = error.fix or "copy the folder again from where it came; `fewlabels fit` on its run writes it anew"
        raise DataError(error.what, details=error.details, why=error.why, fix=fix) from error
    card = read_card(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise _unusable(folder / WEIGHTS, str(error)) from error
    network, head = _rebuilt(card, tensors, folder)
    for module in filter(None, (network, head)):
        module.eval().requires_grad_(False)
    return network, head, card


def _unusable(path: Path, reason: str) -> DataError:
    return DataError(
        f"{path} cannot be used: {reason}",
        why="the model would not be the one that was trained",
        fix="write the model again with the fewlabels version that trained it",
    )


def read_card(folder: Path) -> Card:
    """The description alone, before the weights are needed."""
    path = folder / DESCRIPTION
    try:
        found = json.loads(checkpoint.read_text(path))
        checkpoint.check_format(found, path)
    except DataError:
        raise
    except checkpoint.UNREADABLE as error:
        raise _unusable(path, f"it is not the description of a model ({error})") from error
    known = {item.name for item in dataclasses.fields(Card)}
    try:
        card = Card(**{name: value for name, value in found.items() if name in known})
        card = dataclasses.replace(card, classes=tuple(card.classes), labels_a_class=tuple(card.labels_a_class))
        faults = _faults(card, found.get("num_classes"))
    except (TypeError, OverflowError) as error:
        raise _unusable(path, str(error)) from error
    if faults:
        raise _unusable(path, "; ".join(faults))
    return card


def _faults(card: Card, num_classes: object) -> list[str]:
    """What card says that cannot be, in words."""
    classes, counts, temperature = card.classes, card.labels_a_class, card.temperature
    named = all(isinstance(name, str) for name in classes)
    tables = isinstance(card.metrics, dict | None) and isinstance(card.training, dict)
    rules = {
        "classes must be a list of names": named,
        "two classes have the same name": not named or len(set(classes)) == len(classes),
        f"num_classes is {num_classes!r}, but {len(classes)} classes are named": num_classes == len(classes),
        f"encoder is {card.encoder!r}, it must be a name": isinstance(card.encoder, str),
        f"kind is {card.kind!r}, allowed are {', '.join(KINDS)}": card.kind in KINDS,
        f"whole_head is {card.whole_head!r}, it must be true or false": isinstance(card.whole_head, bool),
        f"balanced is {card.balanced!r}, it must be true or false": isinstance(card.balanced, bool),
        "metrics and training must be tables of facts": tables,
    }
    for name, (low, high) in LIMITS.items():
        value = getattr(card, name)
        holds = (type(value) is int and low <= value <= high) or (name == "canvas" and value is None)
        rules[f"{name} is {value!r}, allowed are {low} to {high}"] = holds
    fits = len(counts) in (0, len(classes)) and all(type(n) is int and 0 <= n < 2**53 for n in counts)
    rules[f"labels_a_class is {list(counts)!r:.80}, it must be a number of labels for each class"] = fits
    positive = isinstance(temperature, int | float) and math.isfinite(temperature) and temperature > 0
    rules[f"temperature is {temperature!r}, it must be a positive number"] = positive
    return [words for words, holds in rules.items() if not holds]


def _rebuilt(card: Card, tensors: Mapping[str, Tensor], folder: Path) -> tuple[Classifier, ProjectionHead | None]:
    """The network with these weights.

    Shapes are compared on the meta device first: a description of absurd size costs no memory, since nothing is
    built that is larger than the weights file. timm models have one size each, and some cannot be built there.
    """
    outline = "cpu" if card.encoder.startswith("timm:") else "meta"
    try:
        with torch.random.fork_rng(devices=[]):
            with torch.device(outline):
                network, head = build(card)
            _check_fit(_state(network, head, card), tensors, folder / WEIGHTS)
            if outline == "meta":
                network, head = build(card)
    except DataError:
        raise
    except (FewlabelsError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise _unusable(folder / DESCRIPTION, f'the network "{card.encoder}" cannot be built ({error})') from error
    for name, tensor in _state(network, head, card).items():
        tensor.copy_(tensors[name])
    if head is not None and not card.whole_head and card.tap < card.head_layers:  # the layers above are not in the file
        del head.layers[card.tap :]
        head.out_features = head.in_features
    return network, head


def _check_fit(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    faults = [f"{name} is missing" for name in wanted if name not in tensors]
    faults += [f"{name} is not part of the network" for name in tensors if name not in wanted]
    for name, tensor in wanted.items():
        found = tensors.get(name)
        if found is not None and (found.shape != tensor.shape or found.dtype != tensor.dtype):
            is_now = f"{tuple(found.shape)} {found.dtype}"
            faults.append(f"{name} is {is_now}, the network has {tuple(tensor.shape)} {tensor.dtype}")
        elif found is not None and not torch.isfinite(found).all():
            faults.append(f"{name} has values that are not finite")
    if faults:
        raise DataError(
            f"{path} does not fit its {DESCRIPTION}",
            details=faults,
            why="the network would not be the one that was trained",
            fix="copy the whole folder again; never mix files of two models",
        )


# --- the model card ----------------------------------------------------------------------------------------


def model_card(card: Card, *, parameters: int, digest: str) -> str:
    """README.md in the Hugging Face front-matter form, from measured figures only."""
    import jinja2  # not by those who only predict

    environment = jinja2.Environment(  # Markdown, so names are made harmless by `plain` and not by autoescape
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"number": "{:,}".format, "share": "{:.1%}".format, "plain": _plain}
    return environment.get_template("card.md.j2").render(
        card=card, parameters=parameters, digest=digest, weights=WEIGHTS, format=checkpoint.FORMAT_VERSION
    )


def _plain(value: object) -> str:
    """value as text that can neither end a code span nor start Markdown or HTML."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return re.sub(r"[`<>\[\]*|#]", "_", text)[:200]
