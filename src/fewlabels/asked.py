"""What the user asked for, by either face, and the recipe that follows from it.

The same command on a run folder gets the recipe that was stored there; what a command leaves out, a begun run keeps.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

from fewlabels import config, plan, recipes, runtime
from fewlabels.config import Recipe
from fewlabels.data.places import at_home, is_url, real
from fewlabels.errors import CannotCreate, MissingInput, UsageError
from fewlabels.recipes import Facts
from fewlabels.runfolder import RunFolder, say
from fewlabels.use import artefact

# Naming another one leaves what these were before, as config.override has it
GO_TOGETHER = {
    "optimizer": ("learning_rate", "scaling"), "self_training": config.FROZEN,
    **dict.fromkeys(config.FROZEN, ("self_training",)),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the user asked for, in one place for both faces."""

    images: Any
    labels: Any = None
    out: Path
    recipe: str = "auto"
    test: Any = None
    student: str | None = None
    budget: float | None = None  # seconds
    seed: int | None = 0  # None = left out
    device: str = "auto"
    keep_labels: str | int | None = None
    max_bad: float = 0.05
    until: str = "distill"
    command: str = ""
    same_labels: bool = False  # the command left them out: they are those of the run
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = {
            "out": (isinstance(self.out, str | os.PathLike), "the path of a folder, which is made"),
            "student": (isinstance(self.student, str | None), 'the name of an encoder, as "resnet18_0.25x"'),
            "seed": (isinstance(self.seed, int | None) and 0 <= (self.seed or 0) < 2**32, "one from 0 to 4294967295"),
            "max_bad": (isinstance(self.max_bad, Real) and 0 <= self.max_bad <= 1, "a share from 0 to 1"),
        }
        for name, (fits, words) in wanted.items():
            if not fits:
                raise UsageError(f"{name} {getattr(self, name)!r} cannot be used", fix=f"give {words}")
        for name in ("images", "labels", "test", "out"):  # a shell leaves the ~ in --out=~/run as it is
            value = Path(self.out) if name == "out" else getattr(self, name)
            if isinstance(value, str | Path):
                object.__setattr__(self, name, at_home(value))

    def inputs(self) -> dict[str, str]:
        """Paths that a later command on the same run folder may leave out."""
        found = {"images": self.images, "labels": self.labels, "test": self.test}
        return {name: _absolute(str(value)) for name, value in found.items() if isinstance(value, str | Path)}

    @functools.cached_property
    def file(self) -> dict[str, Any]:
        """What the recipe file said when it was first asked; nothing where there is none, or it is gone."""
        path = Path(self.recipe)
        return config.read_toml(path) if path.suffix == ".toml" and path.is_file() else {}

    def given(self) -> dict[str, Any]:
        """The values of the recipe that the user gave, as options or in a recipe file; options count."""
        return _joined(self.file, {k: v for k, v in self.overrides.items() if v is not None})

    def names(self, stage: str, knob: str) -> bool:
        """Whether the user gave this knob of a stage."""
        return f"{stage}.{knob}" in config.flat(self.given())

    def wishes(self) -> dict[str, Any]:
        """What decides the recipe, as plain values."""
        found = {
            "recipe": self.recipe, "student": self.student, "budget": self.budget, "seed": self.seed,
            "keep_labels": self.keep_labels, "file": self.file,
            "overrides": {k: dict(v) if isinstance(v, Mapping) else v for k, v in self.overrides.items()},
        }  # fmt: skip
        return {**json.loads(json.dumps(found, default=_plain))}


def _plain(value: Any) -> Any:
    """A number of numpy's as one of Python's."""
    return value.item() if hasattr(value, "item") else str(value)


def _joined(first: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a recipe, knob by knob; where both name one, the second counts, and what went with the first's goes."""
    found = {**first, **then}
    for name in config.SECTIONS:
        old, new = first.get(name), then.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            other = [knob for knob, value in new.items() if value and value != old.get(knob)]
            gone = {knob for each in other for knob in GO_TOGETHER.get(each, ())}
            found[name] = {knob: value for knob, value in old.items() if knob not in gone} | dict(new)
    return found


def _absolute(word: str) -> str:
    """A path, or pattern of paths, from the root; a URL or a source's name as it is."""
    local = Path(word).exists() or ("{" in word and not is_url(word))
    return str(Path(word).absolute()) if local and word != "digits" else word


def of_run(asked: Asked, folder: RunFolder) -> Asked:
    """asked, with the wishes of a begun run where it leaves them open; another recipe is refused."""
    (stored, begun), recipe = runtime.from_main((folder.resolved(), begun_stages(folder))), asked.recipe
    if recipe.endswith(".toml"):
        recipe = str(Path(recipe).absolute())  # a later command may come from another folder
    before = stored["asked"]["recipe"] if stored and begun else recipe
    if recipe not in ("auto", before) and real(recipe) != real(before):
        raise CannotCreate(
            f"{folder.path} was begun with the recipe {before}, and {recipe} is asked for now",
            why="one run follows one recipe; nothing was changed",
            fix=f"give a new --out (with --pretrained {folder.path} it begins with what was learned), "
            "or leave out --recipe to go on",
        )
    asked = replace(asked, recipe=before)
    new, old = asked.file, (stored["asked"].get("file") if stored and begun else None) or {}
    here = {**new, **old}.keys() - (config.SECTIONS.keys() - begun) if new and old else set()
    if edited := sorted(name for name in here if old.get(name) != new.get(name)):
        raise CannotCreate(
            f"{before} has changed since {folder.path} was begun: {', '.join(edited)}",
            why="one run follows one recipe; nothing was changed",
            fix=f"give a new --out, or undo the change ({folder.path / 'recipe.toml'} has what the run follows)",
        )
    return _kept(asked, stored) if stored and begun else replace(asked, seed=asked.seed or 0)


def _kept(asked: Asked, stored: Mapping[str, Any]) -> Asked:
    """asked, with the wishes that a run was begun with where it says nothing of them; these are told.

    Of labels that are named, as of other images than before, all count.
    """
    before, new = stored["asked"], config.flat(asked.overrides)
    old, known = before["overrides"], stored["inputs"].get("images")
    same = asked.same_labels or asked.labels is None
    same = same and (known is None or real(str(known)) == real(str(asked.inputs().get("images"))))
    if asked.student and "distill.student" in config.flat(old):  # the other name of it
        old = _joined(old, {"distill": {"student": asked.student}})
    fits = {"keep_labels": same, "student": "distill.student" not in new}
    names = [name for name in ("student", "budget", "seed", "keep_labels") if fits.get(name, True)]
    kept: dict[str, Any] = {name: before.get(name) for name in names if getattr(asked, name) is None}
    told = kept | {name: value for name, value in config.flat(old).items() if name not in new}
    told = {name: value for name, value in told.items() if value is not None and (name, value) != ("seed", 0)}
    if told:
        told |= {"budget": f"{told['budget']:g}s"} if "budget" in told else {}
        words = (f"--{name.replace('_', '-')} {value}" for name, value in told.items())
        say(f"kept from the run: {', '.join(words)}")
    return replace(asked, **kept, overrides=_joined(old, asked.overrides))


# --- the recipe --------------------------------------------------------------------------------------------------


def resolve(asked: Asked, facts: Facts, stored: dict[str, Any] | None, begun: set[str]) -> Recipe:
    """The recipe as it will be run. The same command gets its stored recipe; stages already begun keep theirs."""
    if stored and same_plan(stored, asked, facts, begun):
        return config.from_dict(stored["recipe"])
    recipe = of_name(asked.recipe, facts, asked.student, asked.file)
    explicit = asked.given()
    if stored and begun:
        before = config.from_dict(stored["recipe"])
        stages = begun | ({"pretrain"} if before.pretrained is not None else set())
        kept = {stage: getattr(before, stage) for stage in stages if stage in config.SECTIONS}
        names = ("encoder", "size", "resolution", "kind", "working_size", "precision", "compile", "chunk_norm")
        top = {name: getattr(before, name) for name in names}
        recipe, explicit = replace(recipe, **kept, **top), top | explicit
        if "finetune" in begun:  # self-training may want another start of it, and the baseline has stage 3's optimizer
            knobs = ("self_training", "optimizer", "learning_rate", "scaling")
            same = {knob: getattr(before.distill, knob) for knob in knobs if not asked.names("distill", knob)}
            recipe = replace(recipe, distill=replace(recipe.distill, **same))
    if asked.student is not None:
        recipe = replace(recipe, distill=replace(recipe.distill, student=asked.student))
    recipe = config.override(recipe, asked.overrides)
    if recipe.encoder.startswith("timm:") and "resolution" not in explicit:  # many are made for images of one size
        as_many = 1.0 if asked.names("pretrain", "epochs") else recipe.resolution**2
        pretrain = replace(recipe.pretrain, epochs=recipe.pretrain.epochs * as_many)
        recipe = replace(recipe, resolution=1.0, pretrain=pretrain)
    if "temperature" in asked.overrides.get("distill", {}) and recipe.distill.student is None:
        raise UsageError(
            "distill.temperature was given, and there is no student of another size",
            why="it softens the teaching of a smaller network",
            fix="use distill.self_temperature, or give a student",
        )
    return _begin_with(recipe, explicit, facts) if recipe.pretrained is not None else recipe


def _begin_with(recipe: Recipe, explicit: Mapping[str, Any], facts: Facts) -> Recipe:
    """recipe with the network, views and head of the model folder that it begins with."""
    folder = artefact.place(Path(recipe.pretrained or "").absolute())
    card = artefact.read_card(folder)
    if "encoder" in explicit and recipe.encoder != card.encoder:
        raise UsageError(
            f"{recipe.encoder} was asked for, and the model in {folder} is {card.encoder}",
            why="pretrained weights fit one network",
            fix="leave out the encoder; --student NAME deploys another one",
        )
    kept = card.head_layers if card.whole_head else card.tap
    if "tap" in explicit.get("finetune", {}) and recipe.finetune.tap > kept:
        raise UsageError(
            f"finetune.tap = {recipe.finetune.tap}, and {folder} keeps {kept} layers of its projection head",
            fix=f"use a tap of 0 to {kept}",
        )
    size = recipe.size if "size" in explicit else card.size
    fitting = min(facts.side, card.canvas if card.canvas and "size" not in explicit else round(1.5 * size))
    return replace(
        recipe, pretrained=str(folder), encoder=card.encoder, size=size, resolution=1.0,
        kind=recipe.kind if "kind" in explicit else card.kind,
        working_size=recipe.working_size if "working_size" in explicit else fitting,
        pretrain=replace(recipe.pretrain, head_layers=max(1, card.head_layers), head_out=card.head_out),
        finetune=replace(recipe.finetune, tap=min(recipe.finetune.tap, kept)),
    )  # fmt: skip


def same_plan(stored: dict[str, Any], asked: Asked, facts: Facts, begun: set[str]) -> bool:
    """Whether a stored plan may be used as it is: the same wishes for as many labels in as many classes, and until a
    stage has saved something, whose identity then tells, for images and a machine of the same kind. What an older
    version did not keep counts as the same, and so does a recipe file that is gone.
    """
    wishes, before = asked.wishes(), stored["asked"]
    same = all(before.get(name, value) == value or (name == "file" and not value) for name, value in wishes.items())
    alike = bool(begun) or stored.get("facts") in (None, of_images(facts))
    classes = (stored.get("facts") or {}).get("classes", facts.classes)
    return same and alike and bool((stored["understood"]["labeled"], classes) == (facts.labeled, facts.classes))


def of_images(facts: Facts) -> dict[str, Any]:
    """What of the facts a stored plan is only good for."""
    return {name: getattr(facts, name) for name in ("images", "classes", "side", "gray", "on_gpu")}


def of_name(name: str, facts: Facts, student: str | None = None, file: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe called name, or of the file that it is, which may be about a student that an option names.

    file: what was read of it before.
    """
    if not name.endswith(".toml"):
        return recipes.named(name, facts)
    values = file or config.read_toml(Path(name))
    # A run's own recipe.toml holds all there was: of knobs that are newer it had the default, not ours of today
    base = Recipe() if config.is_whole(values) else recipes.best(facts)
    return config.override(replace(base, distill=replace(base.distill, student=student)), values)


def begun_stages(folder: RunFolder) -> set[str]:
    """The stages that have saved something."""
    return {stage for stage in plan.STAGES if any(folder.path.glob(f"{stage}*/step-*"))}  # distill_self is distill


# --- from the command line ----------------------------------------------------------------------------------------


def parse_budget(text: str | float | None) -> float | None:
    """Seconds from "90s", "30m", "2h" or a number of minutes."""
    if text is None:
        return None
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    word = str(text).strip().lower()
    number, unit = (word[:-1], word[-1]) if word[-1:] in units else (word, "m")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = float("nan")
    if not seconds > 0 or seconds == float("inf"):
        raise UsageError(f'budget "{text}" is not a duration', fix='write "90s", "30m" or "2h"')
    return seconds


def on_command_line(**values: Any) -> Asked:
    """Asked from the words of a command line. Images, labels and test left out are those that the run folder knows."""
    out = Path(values["out"])
    known = (RunFolder(out).resolved() or {}).get("inputs", {})
    images = values["images"] = values.get("images") or None
    if images is not None and ("images" not in known or real(known["images"]) != real(images)):
        known = {}  # other images have other labels
    values["same_labels"] = values.get("labels") is None
    more = "".join(words for name, words in (("labels", " --labels CSV"), ("test", " --test IMAGES")) if name in known)
    again = f"fewlabels fit NEW_FOLDER{more} --out {shlex.quote(str(out))}"
    for name in ("images", "labels", "test"):
        if values.get(name) is None and name in known:
            place = values[name] = str(known[name])
            if place.startswith("/") and "{" not in place and not Path(place).exists():
                raise MissingInput(f"{place} is not there, the {name} of {out}", fix=f"say where they are now: {again}")
    keep = values.get("keep_labels")
    if keep is not None and keep.isdecimal():
        values["keep_labels"] = int(keep)
    values["budget"] = parse_budget(values.get("budget"))
    return Asked(**{**values, "out": out, "command": command_line()})


def command_line() -> str:
    """This process's command, to be pasted again."""
    program = "fewlabels" if Path(sys.argv[0]).name in ("fewlabels", "__main__.py") else Path(sys.argv[0]).name
    ranks = os.environ.get("LOCAL_WORLD_SIZE")  # of this machine, from torchrun
    launcher = f"torchrun --nproc-per-node {ranks} -m " if ranks else ""
    return launcher + shlex.join([program, *sys.argv[1:]])
