"""A small real classifier with weights that tell images apart, for the tests of everything that uses one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import torch

from fewlabels import checkpoint
from fewlabels.data import labels, pixels
from fewlabels.data.source import Source
from fewlabels.model import layers
from fewlabels.model.encoder import encoder
from fewlabels.model.heads import Classifier, ProjectionHead
from fewlabels.use import artefact
from fewlabels.use.artefact import Card
from fewlabels.use.predict import Model

NAME = "resnet18_0.125x_small"
CLASSES = ("red square", "red disc", "blue square", "=blue disc")
METRICS = {
    "n": 200,
    "top1": {"accuracy": 0.9, "interval": [0.85, 0.93], "correct": 180, "n": 200},
    "mean_recall": 0.9,
    "ece": 0.04,
    "nll": 0.3,
    "per_class": [{"name": name, "precision": 0.9, "recall": 0.9, "f1": 0.9, "n": 50} for name in CLASSES],
}


def small_network(*, tap: int = 1, num_classes: int = len(CLASSES), name: str = NAME) -> Classifier:
    """A Classifier whose batch norms and linear layer are not at their start, so that images get unlike outputs."""
    torch.manual_seed(7)
    body = encoder(name)
    network = Classifier(body, ProjectionHead(body.feature_dim) if tap else None, tap=tap, num_classes=num_classes)
    torch.nn.init.normal_(network.linear.weight, std=0.5)
    torch.nn.init.normal_(network.linear.bias, std=0.2)
    for part in network.modules():
        if isinstance(part, layers.BatchNorm):
            torch.nn.init.uniform_(part.weight, 0.5, 1.0)  # some start at 0 and would switch their branch off
    network.train()
    with torch.no_grad(), patch.object(layers, "DECAY", 0.0):
        network(torch.rand(24, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3))
    return network.eval()


def small_card(*, tap: int = 1, **changes: object) -> Card:
    """The card that fits small_network."""
    facts: dict[str, object] = {
        "encoder": NAME, "tap": tap, "classes": CLASSES, "size": 16, "kind": "photo", "canvas": 48, "temperature": 1.5,
    }  # fmt: skip
    return Card(**(facts | changes))  # type: ignore[arg-type]


def small_model(**changes: object) -> Model:
    """A Model in memory."""
    return Model(small_network(), small_card(**changes), device="cpu")


def run_of(folder: Path, source: Source, classes: Sequence[str], *, canvas: int = 16, **recipe: object) -> Path:
    """A run folder that says which images it was trained on, with the model of small_network; returns RUN/model."""
    store, kept, _ = pixels.build(source, folder / "data", working_size=canvas, bad_csv=folder / "bad.csv", threads=1)
    dataset = labels.assemble(source, store, kept)
    labels.write_images(dataset, folder / "images.csv")
    facts = {"asked": {"recipe": "smoke"}, "recipe": recipe, "precision": "fp32", "inputs": {}}
    facts |= {"format_version": 1, "understood": asdict(dataset.understood)}
    checkpoint.write_json(folder / "resolved.json", facts)
    network = small_network(num_classes=max(1, len(classes)))
    return artefact.save(folder / "model", network, small_card(classes=tuple(classes), canvas=canvas))


def count_parameters(module: torch.nn.Module) -> int:
    """Without the running statistics of batch norm, which Table 1 of the paper counts."""
    return sum(parameter.numel() for parameter in module.parameters())
