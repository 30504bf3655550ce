"""What the stages need, and every number that follows from it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fewlabels import config, plan, runtime
from fewlabels.config import Recipe
from fewlabels.data.labels import Dataset, Ints
from fewlabels.data.tables import composed
from fewlabels.recipes import Facts
from fewlabels.runfolder import RunFolder
from fewlabels.use import artefact, compare, propagate


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
        learned = () if given is None else map(composed, artefact.read_card(Path(given)).classes)
        return not set(self.dataset.classes).isdisjoint(learned)

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

    def ids(self, stage: str) -> Ints:
        """The images that a stage trains on, as rows of the dataset."""
        return self.dataset.labeled if plan.TRAINED[stage] == "finetune" else self.dataset.train

    @functools.cached_property
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

    @property
    def stages(self) -> list[str]:
        """All three stages, or only pretraining while there are no labels; with a model to begin with, what is left."""
        labeled = len(self.dataset.labeled)
        if self.recipe.pretrained is not None:
            return ["finetune", "distill"] if labeled else ["distill"]
        return list(plan.STAGES) if labeled else ["pretrain"]

    @property
    def planned(self) -> dict[str, plan.Derived]:
        """The numbers of those stages that have enough images; others may follow on fewer processes."""
        return {stage: self.derived(stage) for stage in self.stages if self.images[stage] >= self.needed}

    @property
    def equations(self) -> list[str]:
        """Every derived number of every stage that can run."""
        ranks, planned = runtime.world_size(), self.planned.items()
        return [line for stage, it in planned for line in plan.equations(stage, self.followed, it, ranks)]
