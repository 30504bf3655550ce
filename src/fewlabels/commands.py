"""What can be said on the command line: one command, one dataclass, whose docstrings are its help.

Recipe fields become options by themselves, from config.Recipe.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro
from tyro.conf import Positional

from fewlabels import config

METAVARS = {"str": "TEXT", "int": "INT", "float": "FLOAT", "bool": ""}


def said(metavar: str, **more: Any) -> Any:
    """How help shows a value that has no default of its own; tyro says {None}|STR (default: None)."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="", **more)


def _overrides(kind: type) -> type:
    """kind with every field optional and None: only what is given on the command line changes the recipe."""
    fields: list[tuple[str, Any, Any]] = []
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        if item.name in config.SECTIONS:
            part = _overrides(config.SECTIONS[item.name])
            fields.append((item.name, part, field(default_factory=part)))
        elif item.name != "name":
            about = said(METAVARS[str(item.type).removesuffix(" | None")], help=item.metadata["about"])
            fields.append((item.name, Annotated[hints[item.name] | None, about], field(default=None)))
    made = dataclasses.make_dataclass(f"{kind.__name__}Options", fields, kw_only=True)
    made.__doc__ = (kind.__doc__ or "").splitlines()[0] + " Left out = as the recipe says."
    return made


RecipeOptions = _overrides(config.Recipe)


@dataclass(kw_only=True)
class Fit:
    """Pretrain, fine-tune and distill into one run folder; the same command resumes."""

    images: Annotated[Positional[str], said("[IMAGES]")] = ""
    """Folder, labels CSV, tar, parquet, npz or npy of images, or a URL of shards. Left out: those of the run folder."""
    labels: Annotated[str | None, said("CSV")] = None
    """CSV with the columns image,label[,split]; empty = unlabeled."""
    out: str = "run"
    """The run folder. Its own command resumes it, keeping what is left out; a folder of another run is refused."""
    recipe: str = "auto"
    """auto, best, simclrv2, digits, smoke, paper_imagenet_* or a .toml file."""
    student: Annotated[str | None, said("NAME")] = None
    """Encoder to deploy, e.g. resnet18_0.25x or timm:NAME. Left out: the same network."""
    budget: Annotated[str | None, said("TIME")] = None
    """90s, 30m, 2h or minutes: fit the schedule to the measured speed."""
    test: Annotated[str | None, said("IMAGES")] = None
    """Held-out images with labels; no stage sees them."""
    keep_labels: Annotated[str | None, said("N")] = None
    """Use only so many labels, e.g. 100 or 1%, chosen evenly over the classes by the seed."""
    max_bad: float = 0.05
    """Share of unreadable images that stops the run before training."""
    seed: Annotated[int | None, said("INT")] = None
    """Decides initial weights, order, views and kept labels. Left out: that of the run folder, 0 for a new one."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print the result as JSON."""
    options: Annotated[RecipeOptions, tyro.conf.arg(name="")] = field(default_factory=RecipeOptions)  # type: ignore[valid-type]


@dataclass(kw_only=True)
class Demo:
    """The whole method on scikit-learn's digits with 20 labels, in about two minutes on two cores."""

    out: str = "fewlabels-demo"
    """The run folder."""
    seed: Annotated[int | None, said("INT")] = None
    """Decides which 20 labels are kept, and the rest. Left out: that of the run folder, 0 for a new one."""
    student: Annotated[str | None, said("NAME")] = None
    """Encoder to deploy."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(kw_only=True)
class Use:
    """Whatever uses a model."""

    run: Annotated[Positional[str], said("RUN")]
    """Run folder or model folder."""
    balanced: bool = False
    """Name classes that had few of the labels as readily as the others."""


@dataclass(kw_only=True)
class Evaluate(Use):
    """Measure a model on labeled images."""

    images: Annotated[Positional[str], said("IMAGES")]
    """Images with labels: class folders, a CSV, tar, parquet or npz."""
    labels: Annotated[str | None, said("CSV")] = None
    """CSV with the columns image,label."""
    json: bool = False
    """Print the measurement as JSON."""


@dataclass(kw_only=True)
class Predict(Use):
    """Predict the class of images into a CSV with probabilities."""

    images: Annotated[Positional[tuple[str, ...]], said("IMAGES [IMAGES ...]")]
    """Images in any form, or several pictures."""
    out: str = "predictions.csv"
    """The CSV to write; - is stdout."""
    json: bool = False
    """Print the summary as JSON."""


@dataclass(kw_only=True)
class Export(Use):
    """Write the model as one file that runs without fewlabels, checked against it before it counts."""

    format: typing.Literal["onnx", "torch"] = "onnx"
    """onnx (model.onnx) or torch (model.pt2, a torch.export program)."""
    out: Annotated[str | None, said("FOLDER")] = None
    """Folder to write into. Left out: RUN/export, or MODEL-export beside a model folder."""


@dataclass(kw_only=True)
class Report:
    """Write the run's report.html again."""

    run: Annotated[Positional[str], said("RUN")]
    """Run folder."""


@dataclass(kw_only=True)
class Suggest:
    """Say which images to label next, as a labels CSV to fill in."""

    run: Annotated[Positional[str], said("RUN")]
    """Run folder; its pretraining must be done."""
    count: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 20
    """How many."""
    out: Annotated[str | None, said("CSV")] = None
    """The CSV to write; one that is there is kept. Left out: stdout."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print the names as JSON."""


@dataclass(kw_only=True)
class Import:
    """Make a model folder of a published SimCLRv2 checkpoint; no TensorFlow is needed."""

    checkpoint: Annotated[Positional[str], said("CHECKPOINT")]
    """Its folder, its prefix such as DIR/model.ckpt-250228, or a SavedModel."""
    out: str
    """The model folder to write."""
    ema: bool = False
    """Take the moving averages of encoder and head."""
    tap: Annotated[int | None, said("INT")] = None
    """Layers of the head below the classifier. Left out: known for the published models, else 0."""
    classes: Annotated[str | None, said("FILE")] = None
    """Text file with one class name a line, or the reference's list of ImageNet files."""
    json: bool = False
    """Print the summary as JSON."""
