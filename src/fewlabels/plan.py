"""The derived numbers: from a recipe and the facts to what each stage will do, each number as an equation.

The user speaks epochs and base learning rates, the loop speaks steps; this file is the one place that translates.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from fewlabels.config import SECTIONS, DistillRecipe, PretrainRecipe, Recipe, Schedule
from fewlabels.model import optim
from fewlabels.recipes import SELF_TRAINING_STEPS, Facts

STAGES = tuple(SECTIONS)
# What is trained and saved, each after what it needs, and the stage whose section of the recipe it follows
TRAINED = {
    "pretrain": "pretrain", "finetune": "finetune", "supervised": "finetune", "distill_self": "distill",
    "distill": "distill",
}  # fmt: skip
CPU_MINUTES = 60.0  # what `auto` allows itself without --budget on a CPU
TRAINING_SHARE = 0.9  # of a budget; the rest is for reading images, evaluation and the report
LABELS_SHARE = 0.25  # of the training time, at most, for fine-tuning and its baseline
BASELINE_LENGTH = 3  # the supervised baseline starts from nothing: it gets three times the epochs of fine-tuning
LARGE_LABEL_SET = 256  # batches of labels from which the baseline takes larger ones
LABELED_SHARE = 4  # self-training: images beside each labeled one (FixMatch: 7)
MOST_EPOCHS = {"pretrain": 1000.0, "distill": 600.0}  # a bigger budget than these need is not spent


@dataclass(frozen=True)
class Derived:
    """One stage's numbers."""

    images: int
    batch: int
    total_steps: int
    warmup_steps: int
    peak: float  # learning rate

    def learning_rate(self, step: int) -> float:
        """Of the update after `step` finished ones: linear from 0, then half a cosine to 0."""
        return optim.learning_rate(step, peak=self.peak, warmup_steps=self.warmup_steps, total_steps=self.total_steps)


def fitted_batch(batch: int, images: int, ranks: int) -> int:
    """batch, lowered to the images there are and to a multiple of the ranks."""
    return max(ranks, min(batch, images) // ranks * ranks)


def derive(schedule: Schedule, images: int, ranks: int) -> Derived:
    """What a stage with this schedule does on that many images."""
    batch = fitted_batch(schedule.batch, images, ranks)
    return Derived(
        images=images,
        batch=batch,
        total_steps=optim.total_steps(images, schedule.epochs, batch),
        warmup_steps=optim.warmup_steps(images, schedule.warmup * schedule.epochs, batch),
        peak=optim.peak_learning_rate(schedule.learning_rate, batch, schedule.scaling),
    )


def beside(batch: int, labeled: int, ranks: int) -> int:
    """Labeled images beside a batch of self-training."""
    return fitted_batch(batch // LABELED_SHARE, labeled, ranks)


def equations(stage: str, recipe: Recipe, derived: Derived, ranks: int) -> list[str]:
    """The derived numbers, as a person would check them."""
    schedule: Schedule = getattr(recipe, stage)
    scaled = {
        "sqrt": f"{schedule.learning_rate:g} x sqrt({derived.batch})",
        "linear": f"{schedule.learning_rate:g} x {derived.batch} / 256",
        "none": f"{schedule.learning_rate:g}",
    }[schedule.scaling]
    lines = []
    if derived.batch != schedule.batch:
        most = f"min({schedule.batch} asked, {derived.images:,} images)"
        lines.append(f"{stage}: batch {derived.batch} = the largest multiple of {ranks} within {most}")
    elif ranks > 1:
        lines.append(f"{stage}: batch {derived.batch} = {ranks} processes x {derived.batch // ranks}")
    if isinstance(schedule, PretrainRecipe) and schedule.views > 2:
        pairs = math.comb(schedule.views, 2)
        lines.append(f"{stage}: {pairs} pairs of views are contrasted = {schedule.views} of every image, two by two")
    if isinstance(schedule, PretrainRecipe) and schedule.queue * 8 > derived.images * schedule.views:
        keys = f"{schedule.views} x {derived.images:,} keys of an epoch"
        lines.append(f"{stage}: queue {schedule.queue:,} > 1/8 of {keys}: many images find their own among negatives")
    if isinstance(schedule, PretrainRecipe) and 0 < schedule.chunk < derived.batch:
        chunks = -(-(derived.batch // ranks) // max(1, schedule.chunk // ranks))
        whole = "whole batch's statistics, and in its gradient the chunk's means for the batch's"
        norm = "statistics of each chunk" if recipe.chunk_norm == "chunk" else whole
        cut = f"{chunks} chunks = {derived.batch} images // {schedule.chunk}, rounded up"
        lines.append(f"{stage}: {cut}; batch norm takes the {norm}")
    elif isinstance(schedule, PretrainRecipe) and schedule.chunk:
        lines.append(f"{stage}: chunk {schedule.chunk} changes nothing: a batch has {derived.batch} images")
    if recipe.shard:
        keeps = f"each process keeps 1/{ranks} of weights, gradients and optimizer state"
        lines.append(f"{stage}: " + (keeps if ranks > 1 else "shard changes nothing: one process has all of it"))
    if isinstance(schedule, DistillRecipe) and schedule.self_trains and derived.total_steps < SELF_TRAINING_STEPS:
        lines.append(f"{stage}: self-training wants {SELF_TRAINING_STEPS:,} steps and has fewer: it may give little")
    if isinstance(schedule, DistillRecipe) and schedule.self_trains and schedule.label_weight and not schedule.student:
        lines.append(f"{stage}: label_weight changes nothing: self-training learns the labels in every batch")
    if isinstance(schedule, DistillRecipe) and schedule.teacher_epochs:
        asked = f"{schedule.teacher_epochs} of {schedule.epochs:g} epochs"
        then = "then views come again" if schedule.replays else "so this changes nothing"
        lines.append(f"{stage}: the teacher is asked in {asked}, {then}")
    return [
        *lines,
        f"{stage}: steps {derived.total_steps:,} = {derived.images:,} images x {schedule.epochs:g} epochs "
        f"// {derived.batch} + 1",
        f"{stage}: peak learning rate {derived.peak:.4g} = {scaled} ({schedule.optimizer}), "
        f"after {derived.warmup_steps:,} warm-up steps = {schedule.warmup:g} of the schedule",
    ]


def reasons(recipe: Recipe, facts: Facts) -> list[str]:
    """Why the recipe looks as it does."""
    machine = "a GPU" if facts.on_gpu else f"{facts.threads} CPU threads"
    colour = "gray" if facts.gray else "colour"
    seen = f"the model in {recipe.pretrained}" if recipe.pretrained else f"images of about {facts.side} px on {machine}"
    smaller = f" ({recipe.pretrain_size} in pretraining)" * (recipe.resolution != 1)
    told = [
        f"encoder {recipe.encoder}, views of {recipe.size} px{smaller}: {seen}",
        f"views of kind {recipe.kind}: {colour} images of {facts.side} px",
        f"finetune from layer {recipe.finetune.tap} of the head: {facts.labeled:,} labels in {facts.classes} classes"
        if facts.labeled
        else f"no labels: the model's own classifier of {facts.classes} classes is the teacher",
        _taught(recipe, facts),
    ]
    return told if facts.labeled or recipe.pretrained else told[:2]  # else only pretraining runs


def _taught(recipe: Recipe, facts: Facts) -> str:
    """Who learns in stage 3."""
    student = recipe.distill.student
    if not (recipe.distill.self_trains and facts.labeled):
        return f"distill into {student or 'the same network'}"
    then = f"; then distill into {student}" if student else ""
    sure = recipe.distill.self_training
    return f"the same network teaches itself, by its answers of at least {sure:g} and the labels beside them{then}"


def baseline(recipe: Recipe, images: int, ranks: int) -> Schedule:
    """The supervised baseline: Nesterov SGD with the paper's supervised settings, or Muon, longer than fine-tuning.

    Where labels are many its batches are four times as large, as the paper's (4096 against 1024: 28,151 steps). Where
    stage 3 has Muon it has it too, or it would lose for its optimizer: CIFAR-10 (JPEG), 250 labels, 36 % for 31.
    """
    finetune = recipe.finetune
    wide = images >= LARGE_LABEL_SET * finetune.batch
    batch = fitted_batch((4 if wide else 1) * finetune.batch, images, ranks)
    schedule = Schedule(
        epochs=BASELINE_LENGTH * finetune.epochs, batch=batch, optimizer="sgd", learning_rate=0.1, scaling="linear",
        warmup=0.1, weight_decay=1e-4,
    )  # fmt: skip
    has_muon = recipe.distill.optimizer == "muon"
    return replace(schedule, optimizer="muon", learning_rate=0.02, scaling="none") if has_muon else schedule


def schedule_of(recipe: Recipe, stage: str, labeled: int, ranks: int) -> Schedule:
    """That of one of TRAINED; supervised is the baseline."""
    found: Schedule = getattr(recipe, TRAINED[stage])
    return baseline(recipe, labeled, ranks) if stage == "supervised" else found


def cost(
    recipe: Recipe, images: dict[str, int], per_step: dict[str, float], ranks: int,
    done: Mapping[str, int] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Seconds of everything that will be trained, at the measured seconds a step, without the steps that are done.

    per_step: of pretrain, and with labels of finetune, supervised where images are held out, distill, and distill_self
    where a student is taught after it.
    """
    schedules = {name: schedule_of(recipe, name, images["finetune"], ranks) for name in per_step}
    steps = {name: derive(schedules[name], images[name], ranks).total_steps for name in schedules}
    return {name: per_step[name] * max(0, count - (done or {}).get(name, 0)) for name, count in steps.items()}


def fit_budget(
    recipe: Recipe, images: dict[str, int], seconds: float, per_step: dict[str, float], ranks: int,
    kept: Collection[str] = (), done: Mapping[str, int] | None = None, longest: Mapping[str, float] = MOST_EPOCHS,
) -> tuple[Recipe, list[str]]:  # fmt: skip
    """recipe with its stages cut or stretched to `seconds`, up to `longest` epochs, and the sums behind it.

    per_step, done: as for `cost`. Fine-tuning and its baseline keep their length up to LABELS_SHARE; of the rest 7 : 3
    go to pretraining and distillation. Time is set aside for stages in kept, which stay as they are.
    """
    costs, stay = cost(recipe, images, per_step, ranks, done), {*kept}
    set_aside = sum(costs[name] for name in costs if TRAINED[name] in stay - {"finetune"})
    left = max(0.1 * seconds, TRAINING_SHARE * seconds - set_aside)
    sections: dict[str, Schedule] = {}
    sums: list[str] = []
    if "finetune" in per_step:
        needed = sum(costs[name] for name in costs if TRAINED[name] == "finetune")
        most = needed if "finetune" in stay else LABELS_SHARE * left
        if needed > most:
            sections["finetune"] = replace(recipe.finetune, epochs=recipe.finetune.epochs * most / needed)
            sums.append(
                f"finetune: {sections['finetune'].epochs:.3g} of {recipe.finetune.epochs:g} epochs = {most:,.0f} s "
                f"({LABELS_SHARE:g} of the training time) // {needed:,.0f} s with the baseline, if any"
            )
        left -= min(needed, most)
    shares = {stage: share for stage, share in (("pretrain", 0.7), ("distill", 0.3)) if stage in per_step.keys() - stay}
    for stage, share in ((stage, share / sum(shares.values())) for stage, share in shares.items()):
        schedule: Schedule = getattr(recipe, stage)
        batch = fitted_batch(schedule.batch, images[stage], ranks)
        a_step = sum(per_step[name] for name in per_step if TRAINED[name] == stage)
        steps = images[stage] / batch  # of an epoch
        epochs = min(longest[stage], float(f"{max(1.0, share * left / a_step) / steps:.4g}"))
        sums.append(
            f"{stage}: {epochs:g} epochs = {share:g} x {left:,.0f} s // ({images[stage]:,} / {batch} steps "
            f"x {a_step * 1000:.3g} ms), at least a step, at most {longest[stage]:g}"
        )
        sections[stage] = replace(schedule, epochs=epochs)
    return replace(recipe, **sections), sums  # type: ignore[arg-type]
