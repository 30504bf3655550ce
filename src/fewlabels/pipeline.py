"""The three stages as one run folder: pretrain -> finetune -> distill -> what came of it.

A finished stage is skipped, a broken one goes on from its last checkpoint; the same command does both. The only file
that knows all three stages.
"""

from __future__ import annotations

import copy
import functools
import resource
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fewlabels import plan, runtime
from fewlabels.data import views
from fewlabels.data.loader import Batch
from fewlabels.errors import DataError, FewlabelsError, RunAgain, Stopped, UsageError
from fewlabels.model.encoder import encoder as build_encoder
from fewlabels.model.heads import Classifier, ProjectionHead
from fewlabels.prepare import (
    Asked,
    Prepared,
    begun_stages,
    check_resumable,
    explain,
    identity,
    open_images,
    parse_budget,
    prepare,
    same_wishes,
    stages_to_run,
    write_resolved,
)
from fewlabels.runfolder import Interrupts, RunFolder, duration, read_json, say
from fewlabels.stages import runner
from fewlabels.stages.distill import Distill
from fewlabels.stages.finetune import Finetune
from fewlabels.stages.loop import Stage
from fewlabels.stages.pretrain import Pretrain, PretrainWithMomentum, View
from fewlabels.stages.runner import Job, Workplace
from fewlabels.use import artefact, compare, evaluate, report
from fewlabels.use.artefact import Card
from fewlabels.use.predict import Model, load

T = TypeVar("T", bound=nn.Module)

# Independent streams of random numbers, so that no stage sees another's views
STREAMS = {"pretrain": 1, "finetune": 2, "distill": 3, "supervised": 4, "distill_self": 5}


@dataclass(frozen=True)
class Run:
    """A run folder and what is in it."""

    path: Path

    @property
    def model(self) -> Model:
        """The deployable classifier."""
        return load(self.path)

    @property
    def metrics(self) -> dict[str, Any]:
        """results.json: the table of methods, and the final model's measurements on held-out images."""
        found = read_json(self.path / "results.json")
        if found is None:
            raise RunAgain(f"{self.path} has no results yet", fix="run the same command again to finish it")
        return found

    def report(self) -> Path:
        """Write report.html anew and return its path."""
        return report.write(self.path)


def fit(
    images: Any, labels: Any = None, *, out: str | Path, recipe: str = "auto", test: Any = None,
    student: str | None = None, budget: str | float | None = None, seed: int = 0, device: str = "auto",
    keep_labels: str | int | None = None, max_bad: float = 0.05, until: str = "distill", **overrides: Any,
) -> Run:  # fmt: skip
    """Pretrain, fine-tune and distill on images, in the run folder `out`; call it again to resume.

    images: folder, labels CSV, parquet, npz, numpy uint8 (N, H, W[, 3]) or list of paths.
    labels: CSV path or one label an image; -1, None or "" = unlabeled. Without labels only stage 1 runs.
    test: held-out images with labels, in any of these forms; never seen by any stage.
    student: the encoder to deploy ("resnet18_0.25x", "timm:NAME"); None = the same network.
    budget: "30m", "2h" or minutes: the schedule is fitted to the measured speed.
    keep_labels: "1%" or a number: use only so many of the labels, chosen evenly over classes by the seed.
    max_bad: the share of unreadable images that stops the run before training.
    until: "pretrain", "finetune" or "distill": the last stage to run.
    overrides: recipe values, e.g. size=64, pretrain={"epochs": 20}.
    Raises a FewlabelsError for every fault a user can mend.
    """
    asked = Asked(
        images=images, labels=labels, out=Path(out), recipe=recipe, test=test, student=student,
        budget=parse_budget(budget), seed=seed, device=device, keep_labels=keep_labels, max_bad=max_bad,
        until=until, overrides=overrides,
    )  # fmt: skip
    return run(asked)


def run(asked: Asked) -> Run:
    """Do what was asked, from wherever the run folder stands."""
    if asked.until not in plan.STAGES:
        raise UsageError(f'until "{asked.until}" is not a stage', fix=f"use one of {', '.join(plan.STAGES)}")
    device = runtime.start(asked.device)
    source = open_images(asked)
    folder = RunFolder(asked.out)
    with Interrupts().watching() as interrupts, folder.locked():
        try:
            folder.status("running", "prepare")
            _run_stages(asked, folder, prepare(asked, source, folder, device), interrupts)
        except Stopped as stop:
            folder.status("stopped", reason=stop.what)
            raise
        except FewlabelsError as error:
            folder.status("failed", reason=error.what)
            raise
    return Run(asked.out)


def check(asked: Asked) -> dict[str, Any]:
    """What a run would understand, do and cost, found out in a temporary folder; changes nothing.

    Returns lines (text), understood, seconds (for each stage, measured), disk_mb and memory_mb (of this process).
    """
    device = runtime.start(asked.device)
    source = open_images(asked)
    with tempfile.TemporaryDirectory(prefix="fewlabels-check-") as temporary, Interrupts().watching() as interrupts:
        folder = RunFolder(Path(temporary))
        prepared = prepare(asked, source, folder, device)
        Worker(prepared, interrupts).try_networks()
        prepared, sums = _fit_schedule(prepared, asked, Worker(prepared, interrupts))
        per_step = Worker(prepared, interrupts).seconds_per_step()
        seconds = plan.cost(prepared.recipe, prepared.images, per_step, runtime.world_size())
        store = sum(file.stat().st_size for file in folder.data.rglob("*")) / 1e6
        found = explain(prepared, sums)
        bad = (folder.path / "bad_images.csv").read_text(encoding="utf-8").splitlines()[1:]
    weights = 4e-6 * sum(p.numel() for p in build_encoder(prepared.recipe.encoder).parameters())
    disk = store + weights * 3 * 2 * len(seconds)  # weights and two slots of the optimizer, two checkpoints a stage
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    lines = [prepared.dataset.understood.line(), *prepared.dataset.understood.notes]
    lines += [f"unreadable: {line}" for line in bad[:20]] + found
    lines += [f"{name}: about {duration(value)} at the measured speed" for name, value in seconds.items()]
    lines += [f"about {duration(sum(seconds.values()))} in all, {memory:,.0f} MB of memory, {disk:,.0f} MB of disk"]
    return {
        "lines": lines, "understood": prepared.dataset.understood.as_dict(), "seconds": seconds, "disk_mb": disk,
        "memory_mb": memory,
    }  # fmt: skip


def _run_stages(asked: Asked, folder: RunFolder, prepared: Prepared, interrupts: Interrupts) -> None:
    stages = stages_to_run(prepared)
    if asked.until not in stages:
        if asked.until != "distill":
            raise DataError(f"{asked.until} needs labels and there are none", fix="give labels with --labels")
        say("  note: no labels: only pretraining runs; give labels later with the same --out")
    stages = stages[: stages.index(asked.until) + 1] if asked.until in stages else stages
    Worker(prepared, interrupts).try_networks()
    known = folder.resolved()
    fresh = known is None or not same_wishes(known, asked, len(prepared.dataset.labeled))
    sums: list[str] = known["budget"] if known and not fresh else []
    if fresh:
        prepared, sums = _fit_schedule(prepared, asked, Worker(prepared, interrupts))
    check_resumable(prepared)
    write_resolved(prepared, asked, sums)
    worker = Worker(prepared, interrupts)
    for stage in stages:
        getattr(worker, stage)()
    if "finetune" in stages:
        worker.supervised()
    folder.status("running", "report")
    with runtime.main_first():
        later = set(plan.STAGES[plan.STAGES.index(stages[-1]) + 1 :]) & begun_stages(folder)
        # `fewlabels pretrain` on a finished run must not replace its results by those of less
        if runtime.is_main() and not (later and (folder.path / "results.json").exists()):
            _publish(prepared, worker, stages[-1])
    say(f"report: {folder.report}")


def _fit_schedule(prepared: Prepared, asked: Asked, worker: Worker) -> tuple[Prepared, list[str]]:
    """The schedule within asked.budget; without one, `auto` on a CPU stays within an hour. And the sums behind it."""
    cut_only = asked.budget is None
    if cut_only and not (asked.recipe == "auto" and prepared.device.type == "cpu"):
        return prepared, []
    seconds = (plan.CPU_MINUTES * 60 if asked.budget is None else asked.budget) - prepared.seconds
    if seconds <= 0:
        raise UsageError(f"reading the images took {duration(prepared.seconds)}, all of the budget", fix="give more")
    per_step = worker.seconds_per_step()
    needed = sum(plan.cost(prepared.recipe, prepared.images, per_step, runtime.world_size()).values())
    if cut_only and needed < plan.TRAINING_SHARE * seconds:
        return prepared, []
    if cut_only:
        say(f"  the full schedule would take {duration(needed)} here; `auto` on a CPU keeps to an hour (see --budget)")
    recipe, sums = plan.fit_budget(
        prepared.recipe, prepared.images, seconds, per_step, runtime.world_size(),
        kept=[stage for stage in per_step if "epochs" in asked.overrides.get(stage, {})],
        begun=begun_stages(prepared.folder),
    )  # fmt: skip
    return replace(prepared, recipe=recipe), sums


def _publish(prepared: Prepared, worker: Worker, final: str) -> None:
    """The table, the artefact and the report, from trained networks."""
    recipe, path = prepared.recipe, prepared.folder.path
    pretrained = worker.pretrain()
    results, arrays = compare.compare(
        prepared.dataset, (pretrained.encoder, pretrained.head), worker.classifiers, final, prepared.setting
    )
    compare.write(path, results, arrays)
    if final in worker.classifiers:
        student = recipe.distill.student if final == "distill" else None
        card = Card(
            encoder=student or recipe.encoder,
            stem=None,
            tap=recipe.finetune.tap if final == "finetune" else 0,
            head_layers=recipe.pretrain.head_layers,
            head_out=recipe.pretrain.head_out,
            classes=prepared.dataset.classes,
            size=recipe.size,
            kind=recipe.kind,
            canvas=prepared.dataset.store.canvas,
            temperature=results["temperature"],
            metrics=results["measurement"],
            training={
                "recipe": recipe.name, "images": len(prepared.dataset.train), "labels": len(prepared.dataset.labeled),
                "seed": prepared.seed,
            },
        )  # fmt: skip
        artefact.save(prepared.folder.model, worker.classifiers[final], card)
    prepared.folder.status("finished")
    report.write(path)


class Worker:
    """Builds the networks of a run and trains each stage, resuming what is there. A stage runs once, then is kept."""

    def __init__(self, prepared: Prepared, interrupts: Interrupts) -> None:
        self.prepared = prepared
        self.recipe, self.device, self.dataset = prepared.recipe, prepared.device, prepared.dataset
        self.workplace = Workplace(prepared.folder, prepared.dataset, prepared.device, prepared.precision, interrupts)
        self.pretrained: Pretrain | None = None
        self.classifiers: dict[str, Classifier] = {}

    # --- networks ---

    def _seeded(self, stage: str, build: Callable[[], T]) -> T:
        """build() with initial weights that depend on the seed and the stage only."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.prepared.seed * 1000 + STREAMS[stage])
            module = build()
        self.prepared.precision.layout(module.to(self.device))
        return module

    def _view(self, stage: str) -> View:
        """The views of a stage, as a function of a batch and the view's number."""
        recipe, seed = self.recipe, self.prepared.seed + (STREAMS[stage] << 32)
        make: Callable[..., Tensor] = functools.partial(views.finetune, size=recipe.size, seed=seed, kind=recipe.kind)
        if stage == "pretrain":
            settings = recipe.pretrain
            make = functools.partial(
                views.pretrain, size=recipe.size, seed=seed, kind=recipe.kind, strength=settings.strength,
                blur=settings.blur,
            )  # fmt: skip
        layout = torch.channels_last if self.prepared.precision.channels_last else torch.contiguous_format

        def view(batch: Batch, number: int) -> Tensor:
            made = make(batch.pixels, batch.extent, batch.ids, epoch=batch.epoch, view=number)
            return made.contiguous(memory_format=layout)

        return view

    def _pretrain_stage(self) -> Pretrain:
        settings = self.recipe.pretrain

        def build() -> Pretrain:
            network = build_encoder(self.recipe.encoder)
            head = ProjectionHead(network.feature_dim, settings.head_out, settings.head_layers)
            view = self._view("pretrain")
            if not settings.momentum:
                return Pretrain(network, head, view=view, temperature=settings.temperature)
            return PretrainWithMomentum(
                network, head, view=view, temperature=settings.temperature, momentum=settings.momentum,
                queue=settings.queue,
            )  # fmt: skip

        return self._seeded("pretrain", build)

    def _teacher(self, stage: str, pretrained: Pretrain) -> Classifier:
        """A copy of the encoder and the kept layers of the head, with a classifier at zero."""
        tap, classes = self.recipe.finetune.tap, self.dataset.num_classes

        def build() -> Classifier:
            encoder, head = copy.deepcopy(pretrained.encoder), copy.deepcopy(pretrained.head)
            return Classifier(encoder, head if tap else None, tap=tap, num_classes=classes)

        return self._seeded(stage, build)

    def _student(self, stage: str, name: str | None, pretrained: Pretrain) -> Classifier:
        """The student: an encoder with a classifier on it, no projection head."""
        same = name is None or name == self.recipe.encoder

        def build() -> Classifier:
            if same and self.recipe.distill.start == "pretrained":
                network = copy.deepcopy(pretrained.encoder)
            else:
                network = build_encoder(name or self.recipe.encoder)
            return Classifier(network, None, tap=0, num_classes=self.dataset.num_classes)

        return self._seeded(stage, build)

    def try_networks(self) -> None:
        """Build every network and show it two images: a wrong one is found before the hours of training."""
        stage = self._pretrain_stage()
        networks: list[tuple[str, nn.Module]] = [(self.recipe.encoder, stage.encoder)]
        if len(self.dataset.labeled):
            teacher = self._teacher("finetune", stage)
            teacher.encoder.freeze(self.recipe.finetune.freeze_below)
            networks += [(s or self.recipe.encoder, self._student(n, s, stage)) for n, s in self._students()]
        images = torch.zeros(2, 3, self.recipe.size, self.recipe.size, device=self.device)
        for name, network in networks:
            try:
                with torch.no_grad():
                    network.eval()(images)
            except (RuntimeError, ValueError, AssertionError) as error:
                raise UsageError(
                    f"{name} cannot look at images of {self.recipe.size} px: {error}",
                    fix="choose another network, or the size that it was made for with --size",
                ) from error

    # --- stages ---

    def pretrain(self) -> Pretrain:
        """Stage 1 on all training images."""
        if self.pretrained is None:
            stage = self._pretrain_stage()
            self._train("pretrain", stage)
            self.pretrained = stage
        return self.pretrained

    def finetune(self) -> Classifier:
        """Stage 2 on the labeled training images."""
        if "finetune" not in self.classifiers:
            network = self._teacher("finetune", self.pretrain())
            network.encoder.freeze(self.recipe.finetune.freeze_below)
            if self.recipe.finetune.start == "probe" and "finetune" not in begun_stages(self.prepared.folder):
                self._start_from_probe(network)
            stage = Finetune(network, view=self._view("finetune"))
            self._train("finetune", stage)
            self.classifiers["finetune"] = network
        return self.classifiers["finetune"]

    def _start_from_probe(self, network: Classifier) -> None:
        """Set the linear layer to the logistic regression on what it sees before fine-tuning; rank 0's counts."""
        network.eval()
        ids = self.dataset.labeled
        (features,) = compare.outputs(self.dataset, ids, self.prepared.setting, lambda view: [network.features(view)])
        fitted = evaluate.logistic_regression(features, self.dataset.labels[ids], num_classes=self.dataset.num_classes)
        weight, bias = runtime.from_main(fitted.linear())
        with torch.no_grad():
            network.linear.weight.copy_(torch.from_numpy(weight))
            network.linear.bias.copy_(torch.from_numpy(bias))

    def distill(self) -> Classifier:
        """Stage 3 on all training images: into the same network, and from there into a smaller one if asked."""
        teacher = self.finetune()
        for name, student in self._students():
            teacher = self._distill(name, teacher, student)
        return teacher

    def _students(self) -> list[tuple[str, str | None]]:
        """(name, encoder) of every network that is taught, one after the other; None = like the teacher."""
        last = ("distill", self.recipe.distill.student)
        return [("distill_self", None), last] if last[1] and self.recipe.distill.self_first else [last]

    def _distill(self, name: str, teacher: Classifier, student: str | None) -> Classifier:
        if name not in self.classifiers:
            network, settings = self._student(name, student, self.pretrain()), self.recipe.distill
            stage = Distill(
                teacher, network, view=self._view(name), temperature=settings.temperature,
                label_weight=settings.label_weight,
            )  # fmt: skip
            self._train(name, stage)
            self.classifiers[name] = network
        return self.classifiers[name]

    def supervised(self) -> Classifier:
        """The baseline: the same network from random weights, on the labels alone."""
        if "supervised" not in self.classifiers:
            network = self._teacher("supervised", self._pretrain_stage())
            stage = Finetune(network, view=self._view("supervised"))
            self._train("supervised", stage)
            self.classifiers["supervised"] = network
        return self.classifiers["supervised"]

    # --- training ---

    def _job(self, name: str, stage: Stage) -> Job:
        """What running this stage means: its images, its schedule, and whose result it is."""
        kind = "distill" if name == "distill_self" else name
        labeled_only = name in ("finetune", "supervised")
        if name == "supervised":
            schedule = plan.baseline(self.recipe.finetune, len(self.dataset.labeled), runtime.world_size())
        else:
            schedule = getattr(self.recipe, kind)
        return Job(
            name=name,
            stage=stage,
            schedule=schedule,
            ids=self.dataset.labeled if labeled_only else self.dataset.train,
            seed=self.prepared.seed + (STREAMS[name] << 32),
            identity=identity(self.prepared, name),
            scores=self._feature_scores if name == "pretrain" and len(self.dataset.labeled) else None,
        )

    def _train(self, name: str, stage: Stage) -> None:
        runner.run(self._job(name, stage), self.workplace)

    def _feature_scores(self, stage: Stage) -> dict[str, float]:
        """kNN and linear accuracy on frozen features of labeled training images, left out in turn."""
        assert isinstance(stage, Pretrain)
        return compare.feature_scores(self.dataset, stage.encoder, self.prepared.setting)

    def seconds_per_step(self) -> dict[str, float]:
        """Measured seconds a step of every stage, on throwaway networks; rank 0's word counts."""
        stage = self._pretrain_stage()
        throwaways: dict[str, Stage] = {"pretrain": stage}
        if len(self.dataset.labeled) >= 2 * runtime.world_size():
            teacher = self._teacher("finetune", stage)
            throwaways["finetune"] = Finetune(self._teacher("finetune", stage), view=self._view("finetune"))
            for name, student in self._students():
                network = self._student(name, student, stage)
                throwaways[name] = Distill(teacher, network, view=self._view(name), temperature=1.0)
        measured = {
            name: runner.seconds_per_step(self._job(name, throwaway), self.workplace)
            for name, throwaway in throwaways.items()
        }
        return runtime.from_main(measured)
