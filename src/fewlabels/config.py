"""Recipes as frozen dataclasses: what can be asked for, what is allowed, and how it is read and written.

A number that can be derived is not asked for; `plan.py` derives it and prints the equation. Every field has one
name, one default and one explanation (its `about`), from which the command line's help, the docs and the error
messages are made.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewlabels.errors import MissingInput, UsageError, nearest

# Learning rate and its scaling of pretraining and distillation where only an optimizer is named: LARS as in the paper,
# the others as our recipes have them somewhere
RATES = {"lars": (0.1, "sqrt"), "sgd": (0.3, "linear"), "adamw": (2e-3, "none"), "muon": (0.02, "none")}


def knob(default: Any, about: str, **limits: Any) -> Any:
    """A field with its explanation and limits: least=, most=, above= (exclusive) or choices=."""
    return field(default=default, metadata={"about": about, **limits})


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast a stage trains; shared by all three."""

    epochs: float = knob(100.0, "passes over the stage's images", above=0)
    batch: int = knob(256, "images a step over all processes; never more than there are", least=2)
    optimizer: str = knob(
        "lars",
        "lars, sgd (Nesterov), adamw or muon; named alone it has its usual rate (in finetune name a rate too)",
        choices=tuple(RATES),
    )
    learning_rate: float = knob(0.1, "base learning rate, before scaling by the batch", above=0)
    scaling: str = knob(
        "sqrt", "peak = base x sqrt(batch), base x batch/256, or base", choices=("sqrt", "linear", "none")
    )
    warmup: float = knob(0.05, "share of the schedule that warms up from 0", least=0, most=0.9)
    weight_decay: float = knob(1e-4, "weight decay of kernels (not of batch norm, biases, classifier)", least=0)


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(Schedule):
    """Stage 1: a big encoder from unlabeled images."""

    temperature: float = knob(0.1, "NT-Xent temperature", above=0)
    head_layers: int = knob(3, "layers of the projection head", least=1, most=8)
    head_out: int = knob(128, "features that the contrastive loss sees", least=2, most=65536)
    strength: float = knob(1.0, "strength of the colour jitter (0.5 for 32 px, 1.0 for photos)", least=0, most=1.25)
    blur: bool = knob(True, "Gaussian blur in half of the views")
    smallest_crop: float = knob(0.08, "smallest crop of a view, as a share of the image's area", least=0.08, most=1)
    views: int = knob(2, "views of an image, each two of them contrasted (paper: 2)", least=2)
    momentum: float = knob(0.0, "momentum encoder: decay of its moving average (paper 0.999); 0 = off", least=0, most=1)
    queue: int = knob(0, "past keys for the momentum encoder (paper 65536); 0 = none", least=0, most=1 << 22)
    chunk: int = knob(
        0, "images that the network is shown at once, where a batch needs too much memory; 0 = all", least=0
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(Schedule):
    """Stage 2: the few labels, from the middle of the projection head."""

    tap: int = knob(1, "keep this many layers of the projection head below the classifier", least=0)
    freeze_below: int = knob(-1, "frozen: -1 nothing, 0 stem, 1..3 up to that block group, 4 encoder", least=-1, most=4)
    start: str = knob(
        "zero",
        "zero (the paper), or from logistic regression on frozen features; up to 10 labels a class spread first "
        "(not for drawings that self-train)",
        choices=("zero", "probe"),
    )
    smallest_crop: float = knob(
        0.08, "smallest crop of the views of stages 2 and 3, as a share of the image's area", least=0.08, most=1
    )


@dataclass(frozen=True, kw_only=True)
class DistillRecipe(Schedule):
    """Stage 3: the fine-tuned teacher into a student, with the unlabeled images again."""

    temperature: float = knob(1.0, "softens teacher and student, into a smaller network (paper: 1)", above=0)
    self_temperature: float = knob(1.0, "the same, into itself (paper: 0.1), in place of self_training", above=0)
    label_weight: float = knob(0.0, "share of the loss from the true labels (1 - alpha of eq. 3)", least=0, most=1)
    student: str | None = knob(None, 'encoder of the student, e.g. "resnet18_0.25x" or "timm:NAME"; none = itself')
    self_first: bool = knob(
        True, "with a student: distill into the same network first, and teach the student from that"
    )
    teacher_epochs: int = knob(
        0, "epochs of views that a frozen teacher is asked for (no self_training); later ones are these again", least=0
    )
    start: str = knob(
        "scratch",
        "student starts from random weights or, where it has the same shape, from the pretrained encoder",
        choices=("scratch", "pretrained"),
    )
    self_training: float = knob(
        0.0,
        "into the same network: no teacher, but its own answers of at least this probability (0.95); 0 = off",
        least=0,
        most=1,
    )

    @property
    def self_trains(self) -> bool:
        """Whether a network teaches itself, if there are labels."""
        return self.self_training > 0 and (self.student is None or self.self_first)

    @property
    def replays(self) -> bool:
        """Whether views come again with answers that the teacher gave before."""
        return 0 < self.teacher_epochs < self.epochs


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run's result, besides images, labels and seed."""

    name: str = "custom"
    encoder: str = knob("resnet50", 'the big network, e.g. "resnet50_2x_sk", "resnet18_0.25x_small", "timm:NAME"')
    size: int = knob(224, "side of the views in pixels", least=4, most=1024)
    resolution: float = knob(1.0, "side of pretraining's views, as a share of size (paper: 1)", least=0.25, most=1)
    kind: str = knob(
        "photo",
        "views for: photo, gray, glyph, or the official form: reference, reference_tf1 (as the published models)",
        choices=("photo", "gray", "glyph", "reference", "reference_tf1"),
    )
    working_size: int | None = knob(
        None, "longest side that images are stored at; none = by the images and size", least=4
    )
    store: str = knob(
        "auto",
        "pixels: decoded once, onto the disk; streamed: decoded anew each time; auto: pixels if the disk holds them",
        choices=("auto", "pixels", "streamed"),
    )
    pretrained: str | None = knob(None, "model folder (of `fewlabels import` or a run) that takes pretraining's place")
    precision: str = knob(
        "auto", "bf16, fp32, or auto: bf16 on a GPU that has it, on a CPU measured", choices=("auto", "bf16", "fp32")
    )
    recompute: bool = knob(False, "compute activations again for the gradient: less memory, more time, the same result")
    shard: bool = knob(
        False, "under torchrun: each process keeps its part of weights, gradients and optimizer state: less memory"
    )
    compile: bool = knob(False, "compile the encoder's blocks with torch.compile: for long runs on a GPU")
    chunk_norm: str = knob(
        "chunk", "with pretrain.chunk, batch norm's statistics: of a chunk, or of the batch", choices=("chunk", "batch")
    )
    pretrain: PretrainRecipe = field(default_factory=PretrainRecipe)
    finetune: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    distill: DistillRecipe = field(default_factory=DistillRecipe)

    @property
    def pretrain_size(self) -> int:
        """Side of pretraining's views in pixels."""
        return max(4, round(self.size * self.resolution))

    def __post_init__(self) -> None:
        faults = list(_faults(self, ""))
        if (tap := self.finetune.tap) > (layers := self.pretrain.head_layers):
            faults.append(f"finetune.tap = {tap}, but the projection head has pretrain.head_layers = {layers} layers")
        if self.pretrain.queue and not self.pretrain.momentum:
            faults.append("pretrain.queue needs a momentum encoder: set pretrain.momentum, e.g. 0.999")
        if self.pretrain.chunk == 1:
            faults.append("pretrain.chunk = 1; allowed: 0 or at least 2, as batch norm needs two images")
        if self.chunk_norm == "batch" and self.encoder.startswith("timm:"):
            faults.append(f'chunk_norm = "batch", but the batch norms of {self.encoder} are its own: use "chunk"')
        if self.distill.self_training and self.distill.teacher_epochs:
            faults.append("distill.teacher_epochs needs a teacher that stays: set distill.self_training to 0")
        if self.shard and self.compile:
            faults.append("shard and compile do not go together: blocks are compiled whole and would be sharded")
        if faults:
            raise UsageError(f'recipe "{self.name}" cannot be used', details=faults, fix="change these values")


LARGEST = 1e30  # of any number
FROZEN = ("teacher_epochs", "self_temperature", "label_weight")  # choose a frozen teacher; the last: without a student
# What fl.fit takes beside the values of a recipe
OF_FIT = {"labels", "out", "test", "student", "budget", "seed", "device", "keep_labels", "max_bad", "until", "recipe"}
SECTIONS = {"pretrain": PretrainRecipe, "finetune": FinetuneRecipe, "distill": DistillRecipe}


def _allowed(options: Mapping[str, Any]) -> str:
    if "choices" in options:
        return "one of " + ", ".join(options["choices"])
    words = {"above": "above", "least": "at least", "most": "at most"}
    return " and ".join(f"{word} {options[name]}" for name, word in words.items() if name in options)


def _faults(part: Any, prefix: str) -> typing.Iterator[str]:
    """Every value of part that is out of its limits, as a line that names what is allowed."""
    for item in dataclasses.fields(part):
        value, options = getattr(part, item.name), item.metadata
        if dataclasses.is_dataclass(value):
            yield from _faults(value, f"{item.name}.")
        elif "choices" in options:
            if value not in options["choices"]:
                hint = nearest(str(value), options["choices"])
                yield f"{prefix}{item.name} = {value!r}{hint}; allowed: {_allowed(options)}"
        elif isinstance(value, int | float) and not _within(value, options):
            yield f"{prefix}{item.name} = {value}; allowed: {_allowed(options)}"


def _within(value: float, options: Mapping[str, Any]) -> bool:
    # NaN fails every comparison; no sum of steps is made of infinity
    least, most, above = options.get("least", -LARGEST), options.get("most", LARGEST), options.get("above", -LARGEST)
    return bool(abs(value) < LARGEST and least <= value <= most and value > above)


# --- changing a recipe -------------------------------------------------------------------------------------


def override(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """recipe with some values replaced: {"size": 64, "pretrain": {"epochs": 20}}. All faults are told at once.

    A stage's other optimizer comes with its usual rate and scaling, but where these are given with it.
    """
    faults: list[str] = []
    changes: dict[str, Any] = {}
    for name, value in overrides.items():
        if name in SECTIONS and isinstance(value, Mapping):
            part = _converted(SECTIONS[name], value, f"{name}.", faults)
            knobs = FROZEN[: 2 if part.get("student", recipe.distill.student) else 3]
            usual: dict[str, Any] = {"self_training": 0.0} if any(map(part.get, knobs)) else {}
            optimizer = part.get("optimizer")
            if name != "finetune" and optimizer in RATES and optimizer != getattr(recipe, name).optimizer:
                usual["learning_rate"], usual["scaling"] = RATES[optimizer]
            changes[name] = usual | part
        else:
            changes |= _converted(Recipe, {name: value}, "", faults)
    if faults:
        raise UsageError(
            "some recipe values cannot be used", details=faults, fix="see `fewlabels fit --help` for all options"
        )
    for name in SECTIONS.keys() & changes.keys():
        changes[name] = dataclasses.replace(getattr(recipe, name), **changes[name])
    return dataclasses.replace(recipe, **changes)


def _converted(kind: type, values: Mapping[str, Any], prefix: str, faults: list[str]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints or name == "name":
            near = hints.keys() - {"name"} | (OF_FIT if kind is Recipe else set())
            hint = _where_it_lives(name) or nearest(name, near)
            faults.append(f'unknown option "{prefix}{name}"{hint}')
        elif name in SECTIONS and kind is Recipe:
            faults.append(f'"{name}" is a section: give it as {name}={{"epochs": ...}} or --{name}.epochs')
        else:
            try:
                found[name] = _as_type(value, hints[name])
            except (TypeError, ValueError, OverflowError):
                faults.append(f"{prefix}{name} = {value!r} is not {_type_name(hints[name])}")
    return found


def _where_it_lives(name: str) -> str:
    homes = [section for section, kind in SECTIONS.items() if name in {f.name for f in dataclasses.fields(kind)}]
    return f" (there is {' and '.join(f'{home}.{name}' for home in homes)})" if homes else ""


def _as_type(value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) or (hint,)
    if value is None and type(None) in options:
        return None
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    wanted = next(option for option in options if option is not type(None))
    if isinstance(value, bool) != (wanted is bool) or (wanted is str and not isinstance(value, str)):
        raise TypeError
    if wanted is int and float(value) != int(float(value)):
        raise ValueError
    return wanted(value)


def _type_name(hint: Any) -> str:
    kind = (typing.get_args(hint) or (hint,))[0]
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]


# --- files -------------------------------------------------------------------------------------------------


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """The inverse of dataclasses.asdict; unknown or wrong values are refused."""
    rest = {name: value for name, value in values.items() if name != "name"}
    return dataclasses.replace(override(Recipe(), rest), name=str(values.get("name", "custom")))


def to_toml(recipe: Recipe) -> str:
    """recipe as TOML text that read_toml reads back to an equal recipe (None is left out)."""
    values = dataclasses.asdict(recipe)
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if name not in SECTIONS and value is not None]
    for section in SECTIONS:
        lines += ["", f"[{section}]"]
        lines += [f"{name} = {_toml(value)}" for name, value in values[section].items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    # JSON writes strings, numbers and booleans as TOML does, but lets DEL stand as it is
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML recipe file, to be given to `override` (the key "name" is dropped)."""
    if not path.is_file():
        raise MissingInput(f"recipe file {path} is not there", fix="give a recipe's name or the path of a .toml file")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"recipe file {path} is not TOML: {error}", fix="mend the line that it names") from error
    values.pop("name", None)
    return values


def is_whole(values: Mapping[str, Any]) -> bool:
    """Whether values of a recipe file are all of a recipe, as to_toml writes it, perhaps of an older version."""
    schedule = {item.name for item in dataclasses.fields(Schedule)}
    return {"encoder", "size", "kind"} <= values.keys() and all(
        isinstance(values.get(section), Mapping) and schedule <= values[section].keys() for section in SECTIONS
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their full names, such as pretrain.epochs."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found
