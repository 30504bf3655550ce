"""Recipes: limits, overrides, files, and the numbers that follow from them."""

from __future__ import annotations

import inspect
import json
import math
import tomllib
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fewlabels as fl
from fewlabels import asked, config, plan, recipes
from fewlabels.config import FinetuneRecipe, PretrainRecipe, Recipe
from fewlabels.errors import CannotCreate, MissingInput, UsageError
from fewlabels.recipes import Facts
from fewlabels.runfolder import RunFolder

FACTS = recipes.Facts(images=9469, labeled=95, classes=10, side=160, gray=False, on_gpu=False, threads=2)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"sise": 3}, ['unknown option "sise"', 'did you mean "size"']),
        ({"lables": []}, ['unknown option "lables"', 'did you mean "labels"']),
        ({"epochs": 3}, ["pretrain.epochs", "finetune.epochs", "distill.epochs"]),
        ({"pretrain": {"tempreature": 1}}, ['did you mean "temperature"']),
        ({"pretrain": {"epochs": "many"}}, ["'many' is not a number"]),
        ({"pretrain": {"batch": 2.5}}, ["is not a whole number"]),
        ({"pretrain": {"blur": "yes"}}, ["is not true or false"]),
        ({"pretrain": 3}, ["is a section"]),
        ({"pretrain": {"epochs": 0}}, ["above 0"]),
        ({"pretrain": {"epochs": float("nan")}}, ["above 0"]),
        ({"pretrain": {"epochs": float("inf")}}, ["above 0"]),
        ({"pretrain": {"epochs": 1e306}}, ["above 0"]),
        ({"pretrain": {"batch": float("inf")}}, ["pretrain.batch = inf is not"]),
        ({"kind": "foto"}, ['did you mean "photo"', "allowed: one of photo"]),
        ({"finetune": {"tap": 5}}, ["finetune.tap = 5", "3 layers"]),
        ({"pretrain": {"queue": 8}}, ["queue needs a momentum encoder"]),
        ({"pretrain": {"chunk": 1}}, ["pretrain.chunk = 1", "0 or at least 2"]),
        ({"pretrain": {"views": 1, "smallest_crop": 0.0}}, ["pretrain.views = 1", "pretrain.smallest_crop = 0.0"]),
        ({"pretrain": {"head_out": 10**12}}, ["head_out = 1000000000000; allowed: at least 2 and at most 65536"]),
        ({"pretrain": {"queue": 10**12, "momentum": 0.9}}, ["queue = 1000000000000", "at most 4194304"]),
        ({"size": None}, ["size = None"]),
        ({"encoder": "timm:resnet18", "chunk_norm": "batch"}, ["batch norms of timm:resnet18 are its own"]),
    ],
)
def test_wrong_values_are_refused_in_words(overrides: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        config.override(Recipe(), overrides)
    for word in words:
        assert word in raised.value.text()
    assert raised.value.exit_code == 2


def test_all_faults_at_once() -> None:
    with pytest.raises(UsageError) as raised:
        config.override(Recipe(), {"sise": 3, "kindd": "photo", "pretrain": {"batch": "x", "lr": 1}})
    assert len(raised.value.details) == 4


def test_override_changes_only_what_it_names() -> None:
    recipe = config.override(Recipe(), {"size": 32, "pretrain": {"epochs": 5}})
    assert recipe == replace(Recipe(), size=32, pretrain=replace(PretrainRecipe(), epochs=5.0))


@settings(max_examples=60, deadline=None)
@given(
    epochs=st.floats(0.1, 1e4), batch=st.integers(2, 10**6), blur=st.booleans(), tap=st.integers(0, 3),
    encoder=st.text(st.characters(max_codepoint=0x2FF) | st.characters(codec="utf-8"), max_size=20),
)  # fmt: skip
def test_toml_round_trip(epochs: float, batch: int, blur: bool, tap: int, encoder: str) -> None:
    recipe = Recipe(
        encoder=encoder,
        pretrain=PretrainRecipe(epochs=epochs, batch=batch, blur=blur),
        finetune=FinetuneRecipe(tap=tap),
    )
    assert config.from_dict(tomllib.loads(config.to_toml(recipe))) == recipe


def test_recipe_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MissingInput):
        config.read_toml(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("size = " + "[" * 10_000)
    with pytest.raises(UsageError, match="is not TOML"):
        config.read_toml(tmp_path / "broken.toml")
    (tmp_path / "broken.toml").write_text("size = = 3")
    with pytest.raises(UsageError, match="not TOML"):
        config.read_toml(tmp_path / "broken.toml")


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
@pytest.mark.parametrize("images", [2, 40, 1200, 60000])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_every_recipe_can_be_derived(name: str, images: int, on_gpu: bool) -> None:
    facts = replace(FACTS, images=images, labeled=max(2, images // 100), on_gpu=on_gpu)
    recipe = recipes.named(name, facts)
    assert config.from_dict(asdict(recipe)) == recipe
    for stage, count in (("pretrain", images), ("finetune", facts.labeled), ("distill", images)):
        derived = plan.derive(getattr(recipe, stage), count, ranks=1)
        assert 2 <= derived.batch <= count
        assert 0 <= derived.warmup_steps < derived.total_steps
        assert derived.learning_rate(derived.total_steps) == pytest.approx(0, abs=1e-12)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UsageError, match='did you mean "digits"'):
        recipes.named("digit", FACTS)


IMAGENET, ONE_PERCENT, TEN_PERCENT = 1_281_167, 12_811, 128_116


@pytest.mark.parametrize("name", [name for name in recipes.RECIPES if name.startswith("paper_imagenet")])
@pytest.mark.parametrize(
    ("labels", "steps", "tap"), [(ONE_PERCENT, 751, 1), (TEN_PERCENT, 3754, 1), (IMAGENET, 37535, 0)]
)
def test_published_step_counts_follow(name: str, labels: int, steps: int, tap: int) -> None:
    """The step numbers of the published checkpoints (method.md 10.1), and the learning rates of the paper."""
    recipe = recipes.named(name, replace(FACTS, images=IMAGENET, labeled=labels))
    assert plan.derive(recipe.pretrain, IMAGENET, 1).total_steps == 250228
    assert plan.derive(recipe.pretrain, IMAGENET, 1).peak == pytest.approx(6.4)
    assert plan.derive(recipe.finetune, labels, 1).total_steps == steps
    peak = 0.16 if name.split("_")[2:] in (["50"], ["101"], ["152"]) else 0.064
    assert plan.derive(recipe.finetune, labels, 1).peak == pytest.approx(peak)
    assert recipe.finetune.tap == tap
    assert recipe.pretrain.queue == 65536
    assert (recipe.distill.self_temperature, recipe.distill.temperature) == (0.1, 1.0)
    if labels == IMAGENET:
        supervised = plan.baseline(recipe, labels, 1)
        assert plan.derive(supervised, labels, 1).total_steps == 28151
        assert plan.derive(supervised, labels, 1).peak == pytest.approx(1.6)


def test_many_labels_of_photos_are_learned_with_muon() -> None:
    for side, gray, labeled, expected in (
        (64, False, 800, "muon"),
        (64, False, 790, "adamw"),
        (28, True, 800, "adamw"),
    ):
        found = recipes.named("best", replace(FACTS, side=side, gray=gray, labeled=labeled)).finetune
        assert found.optimizer == expected
        assert (found.learning_rate == 0.005) == (expected == "muon")


def test_the_baseline_learns_with_the_optimizer_of_a_student_that_has_muon() -> None:
    photos = recipes.named("best", replace(FACTS, gray=False, side=64))
    for distill, expected in ((photos.distill, "muon"), (replace(photos.distill, optimizer="adamw"), "sgd")):
        found = plan.baseline(replace(photos, distill=distill), 100, 1)
        assert found.optimizer == expected
        assert found.epochs == 3 * photos.finetune.epochs


def test_all_architectures_of_the_papers_table_have_a_recipe() -> None:
    assert sum(name.startswith("paper_imagenet") for name in recipes.RECIPES) == 13


def test_equations_are_true() -> None:
    recipe = recipes.named("simclrv2", FACTS)
    derived = plan.derive(recipe.pretrain, 9469, 2)
    lines = plan.equations("pretrain", recipe, derived, 2)
    sums = next(line for line in lines if "steps" in line)
    assert f"{derived.total_steps:,} = 9,469 images x {recipe.pretrain.epochs:g} epochs // {derived.batch} + 1" in sums
    assert derived.total_steps == int(9469 * recipe.pretrain.epochs) // derived.batch + 1
    assert derived.peak == pytest.approx(recipe.pretrain.learning_rate * math.sqrt(derived.batch))


def test_a_memory_longer_than_the_data_is_the_users_alone() -> None:
    recipe = recipes.named("paper_imagenet_50", FACTS)
    assert recipe.pretrain.queue == FACTS.images // 16  # one of FACTS.images holds their own for a third of them
    for queue, told in ((FACTS.images // 16, False), (2 * FACTS.images // 8, False), (65536, True)):
        longer = config.override(recipe, {"pretrain": {"queue": queue}})
        lines = plan.equations("pretrain", longer, plan.derive(longer.pretrain, FACTS.images, 1), 1)
        assert any("queue 65,536 > 1/8 of 2 x 9,469 keys of an epoch" in line for line in lines) == told


def test_more_views_than_two_are_said() -> None:
    recipe = config.override(Recipe(), {"pretrain": {"views": 4}})
    lines = plan.equations("pretrain", recipe, plan.derive(recipe.pretrain, 9469, 1), 1)
    assert any("6 pairs of views are contrasted = 4 of every image" in line for line in lines)
    lines = plan.equations("pretrain", Recipe(), plan.derive(recipe.pretrain, 9469, 1), 1)
    assert not any("pairs" in line for line in lines)


@pytest.mark.parametrize(
    ("norm", "words"), [("chunk", "of each chunk"), ("batch", "the chunk's means for the batch's")]
)
def test_chunks_are_said_with_what_batch_norm_makes_of_them(norm: str, words: str) -> None:
    recipe = config.override(Recipe(), {"pretrain": {"batch": 256, "chunk": 100}, "chunk_norm": norm})
    lines = plan.equations("pretrain", recipe, plan.derive(recipe.pretrain, 9469, 2), 2)
    assert any("3 chunks = 256 images // 100, rounded up" in line and words in line for line in lines)
    whole = config.override(recipe, {"pretrain": {"chunk": 256}})
    assert not any(
        "chunks" in line for line in plan.equations("pretrain", whole, plan.derive(whole.pretrain, 999, 1), 1)
    )


PHOTOS = {"pretrain": 9469, "finetune": 95, "supervised": 95, "distill": 9469, "distill_self": 9469}


@pytest.mark.parametrize("student", [None, "resnet18_0.125x"])
@pytest.mark.parametrize("seconds", [60.0, 300.0, 1800.0, 7200.0])
def test_a_budget_is_kept(seconds: float, student: str | None) -> None:
    recipe = recipes.named("best", FACTS)
    per_step = {"pretrain": 0.5, "finetune": 0.05, "supervised": 0.05, "distill": 0.3}
    if student:
        per_step["distill_self"] = 0.4
    fitted, sums = plan.fit_budget(recipe, PHOTOS, seconds, per_step, 1)
    costs = plan.cost(fitted, PHOTOS, per_step, 1)
    assert costs.keys() == per_step.keys()
    assert costs["supervised"] == pytest.approx(3 * costs["finetune"], abs=0.1)
    assert 0.5 * seconds < sum(costs.values()) < seconds
    assert 0.8 < costs["pretrain"] / (7 / 3 * (costs["distill"] + costs.get("distill_self", 0.0))) < 1.25
    assert {line.split(":")[0] for line in sums} >= {"pretrain", "distill"}


@pytest.mark.parametrize("seconds", [0.01, 60.0, 600.0, 3600.0])
def test_a_budget_is_kept_where_an_epoch_takes_days(seconds: float) -> None:
    recipe, images = recipes.named("best", replace(FACTS, gray=False, side=400)), dict.fromkeys(PHOTOS, 1_281_167)
    per_step = {"pretrain": 0.6, "finetune": 0.0, "supervised": 0.0, "distill": 0.25}
    fitted, sums = plan.fit_budget(recipe, images, seconds, per_step, 1)
    assert sum(plan.cost(fitted, images, per_step, 1).values()) < max(seconds, 2 * 0.6 + 2 * 0.25 + 0.01), "two steps"
    for stage, share, line in zip(("pretrain", "distill"), (0.7, 0.3), sums, strict=True):
        schedule = getattr(fitted, stage)
        steps = schedule.epochs * 1_281_167 / schedule.batch
        assert steps == pytest.approx(max(1.0, share * 0.9 * seconds / per_step[stage]), rel=1e-3)
        assert line.startswith(f"{stage}: {schedule.epochs:g} epochs = "), "and no other number"


def test_the_baseline_costs_what_its_own_steps_take() -> None:
    """With many labels it has batches four times as large."""
    recipe = recipes.named("best", replace(FACTS, gray=False, side=32, images=50_000, labeled=50_000))
    images = dict.fromkeys(PHOTOS, 50_000)
    costs = plan.cost(recipe, images, {"pretrain": 0.5, "finetune": 0.1, "supervised": 0.4, "distill": 0.3}, 1)
    assert plan.derive(plan.baseline(recipe, 50_000, 1), 50_000, 1).batch == 4 * recipe.finetune.batch
    assert costs["supervised"] == pytest.approx(3 * costs["finetune"], rel=0.01)


def test_a_tiny_budget_shortens_fine_tuning_and_its_baseline() -> None:
    recipe = recipes.named("best", FACTS)
    per_step = {"pretrain": 0.5, "finetune": 1.0, "supervised": 1.0, "distill": 0.3}
    fitted, sums = plan.fit_budget(recipe, PHOTOS, 600.0, per_step, 1)
    costs = plan.cost(fitted, PHOTOS, per_step, 1)
    assert fitted.finetune.epochs < recipe.finetune.epochs
    assert costs["finetune"] + costs["supervised"] == pytest.approx(0.25 * 0.9 * 600, abs=4.0)
    assert sums[0].startswith("finetune: ")
    alone, _ = plan.fit_budget(recipe, PHOTOS, 600.0, {k: v for k, v in per_step.items() if k != "supervised"}, 1)
    assert alone.finetune.epochs == pytest.approx(4 * fitted.finetune.epochs, rel=0.01), (
        "without a baseline it has all the time"
    )
    long, _ = plan.fit_budget(recipe, PHOTOS, 36000.0, per_step, 1)
    assert long.finetune == recipe.finetune


def test_a_budget_goes_to_the_stages_that_are_left() -> None:
    recipe = recipes.named("best", FACTS)
    per_step = {"pretrain": 0.5, "finetune": 0.05, "supervised": 0.05, "distill": 0.3}
    total = plan.derive(recipe.pretrain, 9469, 1).total_steps
    fitted, sums = plan.fit_budget(recipe, PHOTOS, 600.0, per_step, 1, ["pretrain"], {"pretrain": total})
    costs = plan.cost(fitted, PHOTOS, per_step, 1)
    assert fitted.pretrain == recipe.pretrain
    assert [line.split(":")[0] for line in sums] == ["distill"]
    assert 450 < costs["finetune"] + costs["supervised"] + costs["distill"] < 600
    # what is left of a stage that has begun is set aside, 300 s here
    done = {"pretrain": total - 600, "finetune": 10_000, "supervised": 10_000}
    fitted, _ = plan.fit_budget(recipe, PHOTOS, 600.0, per_step, 1, ["pretrain", "finetune"], done)
    left = plan.cost(fitted, PHOTOS, per_step, 1, done)
    assert (left["pretrain"], left["finetune"], left["supervised"]) == (300, 0, 0)
    assert 200 < left["distill"] <= 0.9 * 600 - 300
    worded = replace(recipe, pretrain=replace(recipe.pretrain, epochs=20))
    fitted, _ = plan.fit_budget(worded, PHOTOS, 1800.0, per_step, 1, kept=["pretrain"])
    assert fitted.pretrain == worded.pretrain
    asked_for = {"pretrain": recipe.pretrain.epochs, "distill": recipe.distill.epochs}
    cut, _ = plan.fit_budget(recipe, PHOTOS, 1e6, per_step, 1, longest=asked_for)
    assert cut == recipe, "an hour for `auto` is a limit, not a wish"
    assert 1300 < sum(plan.cost(fitted, PHOTOS, per_step, 1).values()) < 1800


@pytest.mark.parametrize(("images", "batch"), [(10, 8), (300, 64), (60_000, 64)])
def test_on_a_cpu_photos_are_seen_in_four_gentle_views(images: int, batch: int) -> None:
    facts = Facts(images=images, labeled=10, classes=5, side=64, gray=False, on_gpu=False, threads=2)
    found = recipes.best(facts).pretrain
    assert (found.views, found.batch, found.smallest_crop) == (4, batch, 0.25)
    assert (found.optimizer, found.scaling) == ("muon", "none")
    assert found.epochs * found.views == 2 * recipes.simclrv2(facts).pretrain.epochs
    assert (recipes.best(facts).size, recipes.best(facts).pretrain_size) == (64, 64)
    small = recipes.best(replace(facts, side=32))
    assert (small.size, small.pretrain_size) == (32, 24)
    pixels = small.pretrain.epochs * small.pretrain.views * (24 / 32) ** 2
    assert pixels == pytest.approx(2 * recipes.simclrv2(facts).pretrain.epochs, rel=0.01)
    drawings = replace(facts, gray=True, side=28)
    for others in (recipes.simclrv2(facts), recipes.best(drawings)):
        assert (others.pretrain.views, others.pretrain.smallest_crop, others.resolution) == (2, 0.08, 1.0)
    assert recipes.best(drawings).pretrain.optimizer == "sgd"


@pytest.mark.parametrize(
    ("images", "side", "batch", "rate"), [(60_000, 32, 512, 0.05), (60_000, 224, 128, 0.02), (10, 32, 4, 0.02)]
)
def test_a_gpu_sees_as_many_views_of_photos_a_step_as_the_paper_says(
    images: int, side: int, batch: int, rate: float
) -> None:
    facts = Facts(images=images, labeled=10, classes=5, side=side, gray=False, on_gpu=True, threads=2)
    found, paper = recipes.best(facts), recipes.simclrv2(facts).pretrain
    assert (found.pretrain.views, found.pretrain.batch) == (4, batch)
    assert found.pretrain.views * found.pretrain.batch == 2 * paper.batch
    assert (found.pretrain.optimizer, found.pretrain.learning_rate, found.pretrain.scaling) == ("muon", rate, "none")
    assert found.pretrain.epochs * 4 * found.resolution**2 == pytest.approx(paper.epochs * 2, rel=0.01)


def test_an_optimizer_brings_its_learning_rate(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[pretrain]\noptimizer = "lars"\n')

    def pretrained(recipe: str = "auto", stage: str = "pretrain", **wishes: object) -> tuple[str, float, str]:
        asked_for = asked.Asked(images=tmp_path, out=tmp_path, recipe=recipe, overrides={stage: wishes})
        found = getattr(asked.resolve(asked_for, FACTS, stored, begun), stage)
        return found.optimizer, found.learning_rate, found.scaling

    stored, begun = None, set[str]()

    for optimizer, (rate, scaling) in config.RATES.items():
        assert pretrained(optimizer=optimizer) == (optimizer, rate, scaling)
    schedule = {field.name: field.metadata for field in fields(config.Schedule)}
    assert set(config.RATES) == set(schedule["optimizer"]["choices"])
    assert pretrained(str(own)) == ("lars", 0.1, "sqrt")
    assert pretrained(str(own), optimizer="lars") == ("lars", 0.1, "sqrt"), "as the file has it already"
    assert pretrained(str(own), optimizer="adamw") == ("adamw", 2e-3, "none")
    assert pretrained(str(own), learning_rate=0.2) == ("lars", 0.2, "sqrt")
    assert pretrained(optimizer="lars", learning_rate=0.1) == ("lars", 0.1, "sqrt"), (
        "saying what is usual changes nothing"
    )
    assert pretrained("simclrv2", optimizer="adamw") == ("adamw", 2e-3, "none")
    assert pretrained(optimizer="lars", scaling="linear") == ("lars", 0.1, "linear")
    assert pretrained(stage="distill", optimizer="lars") == ("lars", 0.1, "sqrt")
    on_gpu = replace(FACTS, on_gpu=True, side=32, images=60_000)
    same = asked.Asked(images=tmp_path, out=tmp_path, overrides={"pretrain": {"optimizer": "muon"}})
    assert asked.resolve(same, on_gpu, None, set()).pretrain == recipes.best(on_gpu).pretrain
    given = config.override(recipes.best(FACTS), {"pretrained": tmp_path})
    assert given.pretrained == str(tmp_path), "a path is a text"
    whole = tmp_path / "recipe.toml"
    whole.write_text(config.to_toml(recipes.best(FACTS)))
    assert pretrained(str(whole)) == ("muon", 0.02, "none")
    assert pretrained(str(whole), optimizer="lars") == ("lars", 0.1, "sqrt"), "the file's rate is of its optimizer"
    before = recipes.best(FACTS)  # whose optimizer has another one's rate
    before = replace(before, pretrain=replace(before.pretrain, optimizer="lars"))
    stored, begun = {"recipe": asdict(before), "asked": {"seed": 1}, "understood": {"labeled": 1}}, {"pretrain"}
    assert pretrained(str(own)) == ("lars", 0.02, "none"), "what was begun goes on"


def test_a_timm_model_pretrains_on_the_size_that_it_may_be_made_for_alone(tmp_path: Path) -> None:
    small = replace(FACTS, side=32)
    for wishes, resolution in (({}, 1.0), ({"resolution": 0.5}, 0.5)):
        overrides = {"encoder": "timm:vit_tiny_patch16_224"} | wishes
        asked_for = asked.Asked(images=tmp_path, out=tmp_path, overrides=overrides)
        found = asked.resolve(asked_for, small, None, set())
        assert found.resolution == resolution
        assert found.pretrain.epochs == (89 if wishes else pytest.approx(50, abs=0.2)), "as many pixels"
        stored = {"recipe": asdict(found), "asked": asked_for.wishes() | {"seed": 7}, "understood": {"labeled": 95}}
        own = replace(asked_for, overrides=overrides | {"pretrain": {"epochs": 0.04}})
        assert asked.resolve(own, small, None, set()).pretrain.epochs == 0.04, "what was asked for stays"
        later = replace(asked_for, overrides={"encoder": "timm:vit_tiny_patch16_224"})
        assert asked.resolve(later, small, stored, {"pretrain"}).resolution == resolution, "what was begun goes on"
    own = asked.Asked(images=tmp_path, out=tmp_path, overrides={"encoder": "resnet50"})
    assert asked.resolve(own, small, None, set()).resolution == 0.75


def test_a_whole_recipe_of_an_older_version_is_not_filled_up_with_what_ours_is_today(tmp_path: Path) -> None:
    old = recipes.simclrv2(FACTS)
    lines = [
        line for line in config.to_toml(old).splitlines() if not line.startswith(("views", "smallest_crop", "resol"))
    ]
    (tmp_path / "old.toml").write_text("\n".join(lines))
    assert asked.of_name(str(tmp_path / "old.toml"), FACTS) == replace(old, name="custom")
    (tmp_path / "own.toml").write_text('name = "mine"\n[pretrain]\nepochs = 7\n')
    found = asked.of_name(str(tmp_path / "own.toml"), FACTS).pretrain
    assert found == replace(recipes.best(FACTS).pretrain, epochs=7)


@pytest.mark.parametrize("knob", ["teacher_epochs", "self_temperature", "label_weight"])
def test_knobs_of_a_frozen_teacher_choose_one(knob: str) -> None:
    found = config.override(recipes.best(FACTS), {"distill": {knob: 1}}).distill
    assert (found.self_training, getattr(found, knob)) == (0.0, 1)
    both = {"distill": {"self_temperature": 2.0, "self_training": 0.9}}
    assert config.override(recipes.best(FACTS), both).distill.self_training == 0.9
    assert config.override(recipes.best(FACTS), {"distill": {"epochs": 3}}).distill.self_training == 0.95


def test_a_label_weight_for_a_student_leaves_self_training() -> None:
    """It is for what the student learns; the big network teaches itself as before."""
    weight, best = {"distill": {"label_weight": 0.3}}, recipes.best(FACTS)
    asked_for = replace(best, distill=replace(best.distill, student="resnet18_0.25x"))
    at_once = {"distill": {"label_weight": 0.3, "student": "resnet18_0.25x"}}
    for found in (config.override(asked_for, weight).distill, config.override(best, at_once).distill):
        assert (found.self_training, found.label_weight) == (0.95, 0.3)
    assert config.override(asked_for, {"distill": {"teacher_epochs": 2}}).distill.self_training == 0


def test_nor_does_one_in_a_recipe_file_for_a_student_that_an_option_names(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("[distill]\nlabel_weight = 0.3\n")
    wishes = asked.Asked(images=tmp_path, out=tmp_path, recipe=str(tmp_path / "own.toml"))
    with_student = replace(wishes, student="resnet18_0.25x")
    assert asked.resolve(wishes, FACTS, None, set()).distill.self_training == 0
    found = asked.resolve(with_student, FACTS, None, set()).distill
    assert (found.self_training, found.label_weight, found.student) == (0.95, 0.3, "resnet18_0.25x")


def test_an_edited_recipe_file_counts(tmp_path: Path) -> None:
    """Also for a run that has only planned; a gone one, and a run of an older version, go on."""
    file = tmp_path / "own.toml"
    file.write_text("[pretrain]\nepochs = 7\n[distill]\nepochs = 3\n")
    folder = RunFolder(tmp_path / "run")
    wishes = asked.Asked(images=tmp_path, out=folder.path, recipe=str(file))

    before: dict[str, Any] = {
        "format_version": 1, "asked": wishes.wishes(), "understood": {"labeled": FACTS.labeled}, "precision": "fp32",
        "recipe": asdict(asked.resolve(wishes, FACTS, None, set())),
    }  # fmt: skip
    older = {name: value for name, value in before["asked"].items() if name != "file"}
    folder.path.mkdir()
    (folder.path / "resolved.json").write_text(json.dumps(before))
    file.write_text("[pretrain]\nepochs = 7\n[distill]\nepochs = 5\n")
    assert wishes.wishes() == before["asked"], "what was asked is what the file said then"
    assert asked.resolve(wishes, FACTS, None, set()).distill.epochs == 3
    wishes = replace(wishes)
    assert asked.resolve(wishes, FACTS, before, set()).distill.epochs == 5
    assert asked.resolve(wishes, FACTS, before | {"asked": older}, set()).distill.epochs == 3
    (folder.path / "pretrain" / "step-00000001").mkdir(parents=True)
    assert asked.of_run(wishes, folder) == wishes, "distillation has not begun"
    file.write_text("[pretrain]\nepochs = 8\n[distill]\nepochs = 5\n")
    with pytest.raises(CannotCreate, match=r"own.toml has changed since .*run was begun: pretrain"):
        asked.of_run(wishes, folder)
    (folder.path / "distill_self" / "step-00000001").mkdir(parents=True)
    assert asked.begun_stages(folder) == {"pretrain", "distill"}
    file.rename(tmp_path / "moved.toml")
    file.symlink_to("moved.toml")
    elsewhere = replace(wishes, recipe=str(tmp_path / "run" / ".." / "moved.toml"))
    with pytest.raises(CannotCreate, match=r"own.toml has changed since"):
        asked.of_run(elsewhere, folder)
    file.unlink()
    assert asked.of_run(replace(wishes, recipe="auto"), folder) == wishes
    assert asked.resolve(replace(wishes), FACTS, before, {"pretrain"}).distill.epochs == 3


def test_a_recipe_file_may_be_a_link_to_a_file_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "ab12").write_text("[pretrain]\nepochs = 7\n")
    (tmp_path / "own.toml").symlink_to("ab12")
    wishes = asked.Asked(images=tmp_path, out=tmp_path / "run", recipe=str(tmp_path / "own.toml"))
    found = asked.of_run(wishes, RunFolder(tmp_path / "run"))
    assert asked.resolve(found, FACTS, None, set()).pretrain.epochs == 7


def test_what_a_command_leaves_out_is_that_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once a stage has begun; --labels begin anew with the number to keep."""
    folder = RunFolder(tmp_path / "run")
    begun = asked.Asked(
        images=tmp_path, out=folder.path, recipe="smoke", student="resnet18_0.25x", budget=30.0, seed=5, keep_labels=9,
        overrides={"size": 32, "finetune": {"epochs": 1, "batch": 8}},
    )  # fmt: skip
    stored = {
        "format_version": 1, "asked": begun.wishes(), "understood": {"labeled": 9}, "precision": "fp32", "recipe": {},
    }  # fmt: skip
    folder.path.mkdir()
    (folder.path / "resolved.json").write_text(json.dumps(stored))
    later = asked.Asked(images=tmp_path, out=folder.path, seed=None)
    assert asked.of_run(later, folder) == replace(later, seed=0), "nothing has begun"
    (folder.path / "pretrain" / "step-00000001").mkdir(parents=True)
    assert asked.of_run(later, folder) == begun
    told = "--student resnet18_0.25x, --budget 30s, --seed 5, --keep-labels 9, --size 32"
    assert f"kept from the run: {told}, --finetune.epochs 1, --finetune.batch 8\n" in capsys.readouterr().err
    assert asked.of_run(begun, folder) == begun
    assert capsys.readouterr().err == "", "the same command"
    other = replace(
        later, labels="new.csv", student="resnet18_0.5x", budget=60.0, seed=6, overrides={"finetune": {"epochs": 2}}
    )
    kept = {"size": 32, "finetune": {"epochs": 2, "batch": 8}}
    assert asked.of_run(other, folder) == replace(other, recipe="smoke", overrides=kept)
    assert asked.of_run(replace(other, same_labels=True), folder).keep_labels == 9
    named = replace(later, overrides={"distill": {"student": "resnet18_0.5x"}})
    assert asked.of_run(named, folder).student is None
    stored["asked"] = asked.of_run(named, folder).wishes()
    (folder.path / "resolved.json").write_text(json.dumps(stored))
    found = asked.of_run(replace(later, student="resnet18_1x"), folder)
    assert (found.student, found.overrides["distill"]) == ("resnet18_1x", {"student": "resnet18_1x"})
    stored |= {"asked": begun.wishes(), "inputs": {"images": str(tmp_path)}}
    del stored["asked"]["seed"]  # a damaged one, or somebody else's
    (folder.path / "resolved.json").write_text(json.dumps(stored))
    assert (asked.of_run(later, folder).keep_labels, asked.of_run(later, folder).seed) == (9, 0)
    assert asked.of_run(replace(later, images="b.csv", same_labels=True), folder).keep_labels is None


@pytest.mark.parametrize(
    ("before", "new", "kept"),
    [
        ({"optimizer": "sgd", "learning_rate": 0.3}, {"optimizer": "muon"}, {"optimizer": "muon"}),
        ({"optimizer": "sgd", "learning_rate": 0.3}, {"optimizer": "sgd"}, {"optimizer": "sgd", "learning_rate": 0.3}),
        ({"self_training": 0.9}, {"self_temperature": 0.1}, {"self_temperature": 0.1}),
        ({"teacher_epochs": 3, "epochs": 2}, {"self_training": 0.9}, {"self_training": 0.9, "epochs": 2}),
    ],
    ids=str,
)
def test_what_goes_with_an_option_goes_with_it(
    before: dict[str, Any], new: dict[str, Any], kept: dict[str, Any]
) -> None:
    """As config.override has it where both are given at once."""
    assert asked._joined({"distill": before}, {"distill": new}) == {"distill": kept}


@pytest.mark.parametrize(
    "wrong", [{"max_bad": "5%"}, {"out": None}, {"out": 3}, {"student": 3}, {"seed": "5"}], ids=str
)
def test_a_wish_of_another_kind_is_a_mistake_of_usage(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        fl.fit(np.zeros((4, 8, 8), np.uint8), **({"out": tmp_path / "run"} | wrong))


def test_a_wrong_name_is_compared_with_all_that_fit_takes() -> None:
    assert inspect.signature(fl.fit).parameters.keys() - {"images", "overrides"} == config.OF_FIT


def test_an_out_may_be_any_path(tmp_path: Path) -> None:
    class Place:
        def __fspath__(self) -> str:
            return str(tmp_path)

    assert asked.Asked(images="x", out=Place()).out == tmp_path  # type: ignore[arg-type]


def test_held_out_images_that_are_gone_are_to_be_named(tmp_path: Path) -> None:
    stored = {
        "format_version": 1, "asked": {"recipe": "smoke"}, "understood": {"labeled": 9}, "precision": "fp32",
        "recipe": {}, "inputs": {"images": str(tmp_path), "test": str(tmp_path / "gone")},
    }  # fmt: skip
    (tmp_path / "resolved.json").write_text(json.dumps(stored))
    with pytest.raises(MissingInput, match="gone is not there, the test of") as refused:
        asked.on_command_line(out=str(tmp_path))
    assert "--test IMAGES" in refused.value.fix


def test_a_home_that_no_shell_has_spelled_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    wishes = asked.Asked(images="~/photos", labels=Path("~/labels.csv"), test=["~"], out="~/run")  # type: ignore[arg-type]
    assert (wishes.images, wishes.labels) == (str(tmp_path / "photos"), tmp_path / "labels.csv")
    assert (wishes.test, wishes.out, fl.Run("~/run").path) == (["~"], tmp_path / "run", tmp_path / "run")  # type: ignore[arg-type]
    for load in (fl.load, fl.load_reference):
        with pytest.raises(MissingInput, match=str(tmp_path)):
            load("~/none")


def test_wishes_are_plain_values(tmp_path: Path) -> None:
    given = asked.Asked(images=tmp_path, out=tmp_path, keep_labels=np.int64(20), overrides={"size": np.int64(32)})
    found = given.wishes()
    assert (type(found["keep_labels"]), found["overrides"]) == (int, {"size": 32})


@pytest.mark.parametrize("sure", [0.0, 0.8])
def test_what_fine_tuning_began_for_stays(sure: float, tmp_path: Path) -> None:
    before = recipes.best(FACTS)
    older = replace(before.distill, self_training=sure, epochs=7, optimizer="adamw", learning_rate=2e-3)
    before = replace(before, distill=older)
    wishes = asked.Asked(images=tmp_path, out=tmp_path, recipe="best", budget=60.0)
    stored = {
        "asked": {**wishes.wishes(), "budget": None}, "understood": {"labeled": FACTS.labeled},
        "recipe": asdict(before),
    }  # fmt: skip
    for begun, kept in (({"pretrain"}, 0.95), ({"pretrain", "finetune"}, sure)):
        found = asked.resolve(wishes, FACTS, stored, begun).distill
        assert (found.self_training, found.epochs) == (kept, recipes.best(FACTS).distill.epochs)
        assert (found.optimizer, found.learning_rate) == (("adamw", 2e-3) if "finetune" in begun else ("muon", 0.02))
    explicit = replace(wishes, overrides={"distill": {"self_training": 0.8}})
    assert asked.resolve(explicit, FACTS, stored, {"pretrain", "finetune"}).distill.self_training == 0.8


@pytest.mark.parametrize("gray", [True, False])
@pytest.mark.parametrize("images", [10, 300, 1200, 60_000])
def test_networks_teach_themselves_long_enough(images: int, gray: bool) -> None:
    facts = Facts(images=images, labeled=21, classes=5, side=28, gray=gray, on_gpu=False, threads=2)
    assert recipes.best(replace(facts, labeled=20)).distill.self_training == (0.95 if gray else 0), "4 a class"
    distill = recipes.best(facts).distill
    assert distill.self_training == 0.95
    assert plan.derive(distill, images, 1).total_steps >= 1000
    assert distill.batch == min(128, recipes.simclrv2(facts).distill.batch)
    on_gpu = replace(facts, on_gpu=True, side=224 if not gray else 28)
    distill = recipes.best(on_gpu).distill
    assert (distill.self_training, distill.batch) == (0.95, recipes.simclrv2(on_gpu).distill.batch)
    assert recipes.simclrv2(facts).distill.self_training == 0


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"epochs": 3}, "self-training wants 1,000 steps and has fewer"),
        ({"epochs": 300}, None),
        ({"epochs": 3, "self_training": 0.0}, None),
        ({"epochs": 3, "teacher_epochs": 2}, "asked in 2 of 3 epochs, then views come again"),
        ({"epochs": 3, "teacher_epochs": 3}, "asked in 3 of 3 epochs, so this changes nothing"),
        ({"epochs": 300, "self_training": 0.9, "label_weight": 0.5}, "label_weight changes nothing"),
    ],
)
def test_what_a_stage_3_will_not_get_is_told(settings: dict[str, float], expected: str | None) -> None:
    recipe = config.override(recipes.best(FACTS), {"distill": settings})
    lines = plan.equations("distill", recipe, plan.derive(recipe.distill, 5000, 1), 1)
    told = [line for line in lines if not line.startswith(("distill: steps", "distill: peak", "distill: batch"))]
    assert len(told) == (expected is not None)
    assert all(str(expected) in line for line in told)
