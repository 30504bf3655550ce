"""Builds the networks of a run and trains its stages, each from wherever the run folder stands.

The only file that knows all three stages.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fewlabels import checkpoint, identity, plan, runtime
from fewlabels.data import views
from fewlabels.data.labels import Dataset
from fewlabels.data.loader import Batch, Order, training_batches
from fewlabels.errors import UsageError
from fewlabels.model.encoder import Encoder
from fewlabels.model.encoder import encoder as build_encoder
from fewlabels.model.heads import Classifier, ProjectionHead
from fewlabels.prepared import Prepared
from fewlabels.runfolder import Interrupts, say
from fewlabels.stages import memory, runner
from fewlabels.stages.answers import Answers
from fewlabels.stages.chunks import Chunks
from fewlabels.stages.distill import Distill
from fewlabels.stages.finetune import Finetune
from fewlabels.stages.loop import Stage
from fewlabels.stages.pretrain import Pretrain, PretrainWithMomentum, View
from fewlabels.stages.runner import Job, Workplace
from fewlabels.stages.selftrain import SelfTrain, expected_classes
from fewlabels.use import artefact, compare, evaluate, propagate

T = TypeVar("T", bound=nn.Module)


class Pretrained(NamedTuple):
    """What fine-tuning and distillation begin with."""

    encoder: Encoder
    head: ProjectionHead | None


# Independent streams of random numbers, so that no stage sees another's views
STREAMS = {"pretrain": 1, "finetune": 2, "distill": 3, "supervised": 4, "distill_self": 5, "labeled": 6}


class Worker:
    """Builds the networks of a run and trains each stage, resuming what is there. A stage runs once, then is kept."""

    def __init__(self, prepared: Prepared, interrupts: Interrupts) -> None:
        self.device, self.dataset = prepared.device, prepared.dataset
        self.follow(prepared)
        self.workplace = Workplace(prepared.folder, prepared.dataset, prepared.device, prepared.precision, interrupts)
        self.pretrained: Pretrained | None = None
        self.classifiers: dict[str, Classifier] = {}

    def follow(self, prepared: Prepared) -> None:
        """From now on do as this recipe says."""
        self.prepared, self.recipe = prepared, prepared.recipe

    # --- networks ---

    def _seeded(self, stage: str, build: Callable[[], T]) -> T:
        """build() with initial weights that depend on the seed and the stage only."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.prepared.seed * 1000 + STREAMS[stage])
            module = build()
        encoders = [part for part in module.modules() if isinstance(part, Encoder)]
        for network in encoders if self.recipe.recompute else ():
            network.recompute(on=True)
        self.prepared.precision.layout(module.to(self.device))
        for network in encoders if self.recipe.compile else ():
            network.compile_blocks()
        return module

    def _view(self, stage: str, *, strong: bool = False) -> View:
        """The views of a stage, weak or strong, as a function of a batch and the view's number."""
        recipe, seed = self.recipe, self.prepared.seed + (STREAMS[stage] << 32)
        make: Callable[..., Tensor] = functools.partial(
            views.finetune, size=recipe.size, seed=seed, kind=recipe.kind, smallest_crop=recipe.finetune.smallest_crop
        )
        if strong:
            settings = recipe.pretrain
            make = functools.partial(
                views.pretrain, size=recipe.pretrain_size if stage == "pretrain" else recipe.size, seed=seed,
                kind=recipe.kind, strength=settings.strength, blur=settings.blur, smallest_crop=settings.smallest_crop,
            )  # fmt: skip
        layout = torch.channels_last if self.prepared.precision.channels_last else torch.contiguous_format

        replays = plan.TRAINED[stage] == "distill" and recipe.distill.replays
        again = recipe.distill.teacher_epochs if replays else 0

        def view(batch: Batch, number: int) -> Tensor:
            epoch = batch.epoch % again if again else batch.epoch
            made = make(batch.pixels, batch.extent, batch.ids, epoch=epoch, view=number)
            return made.contiguous(memory_format=layout)

        return view

    def _pretrain_stage(self) -> Pretrain:
        settings = self.recipe.pretrain

        def build() -> Pretrain:
            network = build_encoder(self.recipe.encoder)
            head = ProjectionHead(network.feature_dim, settings.head_out, settings.head_layers)
            chunks = Chunks(settings.chunk, self.recipe.chunk_norm) if settings.chunk else None
            kind = functools.partial(PretrainWithMomentum, momentum=settings.momentum, queue=settings.queue)
            return (kind if settings.momentum else Pretrain)(
                network, head, view=self._view("pretrain", strong=True), temperature=settings.temperature,
                num_views=settings.views, chunks=chunks,
            )  # fmt: skip

        return self._seeded("pretrain", build)

    def _outline(self) -> Pretrained:
        """Networks like those that pretraining will give, for trying and timing."""
        if self.recipe.pretrained is not None:
            return self.pretrain()
        stage = self._pretrain_stage()
        return Pretrained(stage.encoder, stage.head)

    def _teacher(self, stage: str, pretrained: Pretrained) -> Classifier:
        """A copy of the encoder and the kept layers of the head, with a classifier at zero."""
        tap, classes = self.recipe.finetune.tap, self.dataset.num_classes

        def build() -> Classifier:
            encoder, head = copy.deepcopy(pretrained.encoder), copy.deepcopy(pretrained.head)
            return Classifier(encoder, head if tap else None, tap=tap, num_classes=classes)

        return self._seeded(stage, build)

    def _student(self, stage: str, name: str | None, pretrained: Pretrained) -> Classifier:
        """The student: an encoder with a classifier on it, no projection head."""
        same = name is None or name == self.recipe.encoder

        def build() -> Classifier:
            if same and self.recipe.distill.start == "pretrained":
                network = copy.deepcopy(pretrained.encoder)
                network.freeze(-1)  # a given model that teaches is frozen
            else:
                network = build_encoder(name or self.recipe.encoder)
            return Classifier(network, None, tap=0, num_classes=self.dataset.num_classes)

        return self._seeded(stage, build)

    def try_networks(self) -> None:
        """Build every network and show it two images: a wrong one is found before the hours of training."""
        outline = self._outline()
        size, big = self.recipe.size, self.recipe.encoder
        networks: list[tuple[str, nn.Module, int]] = [
            (big, outline.encoder, side) for side in (size, self.recipe.pretrain_size)
        ]
        if self.dataset.num_classes:
            teacher = self._teacher("finetune", outline)
            teacher.encoder.freeze(self.recipe.finetune.freeze_below)
            networks += [(s or big, self._student(n, s, outline), size) for n, s in self._students()]
        for name, network, side in networks:
            images = torch.zeros(2, 3, side, side, device=self.device)
            try:
                with torch.no_grad():
                    network.eval()(images)
            except (RuntimeError, ValueError, AssertionError) as error:
                raise UsageError(
                    f"{name} cannot look at images of {side} px: {error}",
                    fix="choose another network, or the size that it was made for with --size",
                ) from error

    # --- stages ---

    def pretrain(self) -> Pretrained:
        """Stage 1 on all training images, or the model that was given in its place."""
        if self.pretrained is None and self.recipe.pretrained is not None:
            classifier, head, _ = artefact.read_whole(Path(self.recipe.pretrained))
            for module in filter(None, (classifier, head)):
                self.prepared.precision.layout(module.to(self.device).requires_grad_(True))
            self.pretrained = Pretrained(classifier.encoder, head)
            if not len(self.dataset.labeled):
                self.classifiers["finetune"] = classifier
        elif self.pretrained is None:
            stage = self._pretrain_stage()
            runner.run(self._job("pretrain", stage), self.workplace)
            self.pretrained = Pretrained(stage.encoder, stage.head)
        return self.pretrained

    def finetune(self) -> Classifier:
        """Stage 2 on the labels, very few of them spread first; without any, a given model's own classifier."""
        self.pretrain()
        if "finetune" not in self.classifiers:
            stage = self._fresh_finetune("finetune", self.pretrain())
            job, at = self._job("finetune", stage), self.workplace
            if self.recipe.finetune.start == "probe":
                job, at = self._from_probe(job, stage.network)
            runner.run(job, at)
            self.classifiers["finetune"] = stage.network
        return self.classifiers["finetune"]

    def _from_probe(self, job: Job, network: Classifier) -> tuple[Job, Workplace]:
        """The job on labels that are spread, if they are to be, its network set to their probe if it is at step 0."""
        saved, _ = checkpoint.latest(self.prepared.folder.stage("finetune"))  # none where all are damaged: begin anew
        done = runtime.from_main(runner.reached(saved, total := job.derived.total_steps))
        if done >= total:
            return job, self.workplace
        dataset = self._spread()
        if not done:
            self._start_from_probe(network, dataset)
        if dataset is not self.dataset:  # as many steps of as many images
            ids, batch = dataset.labeled, job.derived.batch
            schedule = replace(job.schedule, batch=batch, epochs=(total - 0.5) * batch / len(ids))
            job = replace(job, ids=ids, schedule=schedule)
        return job, replace(self.workplace, dataset=dataset)

    def too_weak(self) -> str:
        """Why the pretrained features are too weak for self-training; "" where they are not. Rank 0's count."""
        known = compare.known_features(self.dataset, self.pretrain().encoder, self.prepared.setting)
        why = runtime.from_main(evaluate.too_weak(*known))
        if why:
            say(f"  {why}")
        return why

    def _spread(self) -> Dataset:
        """The images with very few labels spread over the neighbour graph; with more as they are."""
        if not self.prepared.spreads:
            return self.dataset
        spread = compare.propagated(self.dataset, *self.pretrain(), self.prepared.setting)
        say(f"  labels are spread over the neighbour graph: {len(spread.labeled):,} images are learned, no more steps")
        return spread

    def _start_from_probe(self, network: Classifier, dataset: Dataset) -> None:
        """Set the linear layer to the logistic regression on what it sees before fine-tuning; rank 0's counts."""
        network.eval()
        ids = evaluate.sampled(dataset.labeled, evaluate.FITTED_IMAGES)
        strength = 0.1 if dataset is self.dataset else propagate.STRENGTH
        (features,) = compare.outputs(dataset, ids, self.prepared.setting, lambda view: [network.features(view)])
        known, classes = dataset.labels[ids], dataset.num_classes
        fitted = evaluate.logistic_regression(features, known, num_classes=classes, strength=strength)
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

    def names(self) -> dict[str, str]:
        """What the results call the networks."""
        itself = compare.SELF_TRAINED if self.prepared.self_trains else compare.NAMES["distill_self"]
        return compare.NAMES | {name: itself for name, student in self._students() if student is None}

    def _self_train(self, name: str, teacher: Classifier) -> SelfTrain:
        """A copy of the fine-tuned network that goes on learning from labels and its own answers."""
        ids, ranks = self.dataset.labeled, runtime.world_size()
        batch = plan.beside(self.prepared.derived("distill").batch, len(ids), ranks)
        order = Order(ids, batch, self.prepared.seed + (STREAMS["labeled"] << 32))

        def labeled(first: int) -> Iterator[Batch]:
            return training_batches(self.dataset, order, first_step=first, last_step=sys.maxsize, device=self.device)

        expected = expected_classes(self.dataset.labels[ids], self.dataset.num_classes).to(self.device)
        network = self._seeded(name, lambda: copy.deepcopy(teacher))
        network.encoder.freeze(-1)  # all of it learns, as from a frozen teacher
        return SelfTrain(
            network, labeled=labeled, weak=self._view(name), strong=self._view(name, strong=True),
            threshold=self.recipe.distill.self_training, expected=expected,
        )  # fmt: skip

    def _third(
        self, name: str, student: str | None, teacher: Classifier, pretrained: Pretrained
    ) -> Distill | SelfTrain:
        """Stage 3 before anything is learned: a network taught by its teacher, or by itself."""
        if student is None and self.prepared.self_trains:
            return self._self_train(name, teacher)
        settings = self.recipe.distill
        return Distill(
            teacher, self._student(name, student, pretrained), view=self._view(name),
            temperature=settings.temperature if student else settings.self_temperature,
            label_weight=settings.label_weight,
        )  # fmt: skip

    def _distill(self, name: str, teacher: Classifier, student: str | None) -> Classifier:
        stage, epochs = self._third(name, student, teacher, self.pretrain()), self.recipe.distill.teacher_epochs
        job, answers = self._job(name, stage), None
        if isinstance(stage, Distill) and self.recipe.distill.replays:
            folder, classes = self.prepared.folder.stage(name), self.dataset.num_classes
            stage.answers = answers = Answers(folder, job.order(), epochs, classes)
        runner.run(job, self.workplace)
        if answers:
            answers.remove()
        self.classifiers[name] = stage.student if isinstance(stage, Distill) else stage.average
        return self.classifiers[name]

    def supervised(self) -> None:
        """The baseline: the same network from random weights, on the labels alone."""
        fresh = self._pretrain_stage()
        stage = self._fresh_finetune("supervised", Pretrained(fresh.encoder, fresh.head))
        runner.run(self._job("supervised", stage), self.workplace)
        self.classifiers["supervised"] = stage.network

    # --- training ---

    def _job(self, name: str, stage: Stage) -> Job:
        """What running this stage means: its images, its schedule, and whose result it is."""
        return Job(
            name=name, stage=stage, schedule=self.prepared.schedule(name), ids=self.prepared.ids(name),
            seed=self.prepared.seed + (STREAMS[name] << 32), identity=identity.of(self.prepared, name),
            scores=self._feature_scores if name == "pretrain" and len(self.dataset.labeled) else None,
            shard=self.recipe.shard,
        )  # fmt: skip

    def _feature_scores(self, stage: Stage) -> dict[str, float]:
        """kNN and linear accuracy on frozen features of labeled training images, left out in turn."""
        assert isinstance(stage, Pretrain)
        return compare.feature_scores(self.dataset, stage.encoder, self.prepared.setting)

    def _throwaways(self) -> Iterator[Job]:
        """Every stage that will run, one after the other, on networks that may be spoiled."""
        if not self.recipe.pretrained:
            yield self._job("pretrain", self._pretrain_stage())
        if self.dataset.num_classes:
            outline = self._outline()
            enough = len(self.dataset.labeled) >= self.prepared.needed
            for name in ("finetune", *["supervised"] * bool(self.dataset.understood.held_out)) if enough else ():
                yield self._job(name, self._fresh_finetune(name, outline))
            for name, student in self._students():
                if enough or student or not self.prepared.self_trains:
                    teacher = self._teacher("finetune", outline)
                    yield self._job(name, self._third(name, student, teacher, outline))
                    del teacher

    def _fresh_finetune(self, name: str, pretrained: Pretrained) -> Finetune:
        """Stage 2 before anything is learned, or the baseline as if it began there."""
        network = self._teacher(name, pretrained)
        network.encoder.freeze(self.recipe.finetune.freeze_below if name == "finetune" else -1)
        return Finetune(network, view=self._view(name))

    def seconds_per_step(self) -> dict[str, float]:
        """Measured seconds a step of every stage; rank 0's word counts."""
        return runtime.from_main({j.name: runner.seconds_per_step(j, self.workplace) for j in self._throwaways()})

    def held(self) -> dict[str, dict[str, int]]:
        """Bytes that a process holds at the peak of a step whatever the batch, for every stage, by what they are."""
        bf16 = self.prepared.precision.autocast is not None
        held = functools.partial(memory.held, ranks=runtime.world_size(), bf16=bf16)
        return {j.name: held(j.stage, j.schedule.optimizer, shard=j.sharded) for j in self._throwaways()}

    def largest_batches(self) -> dict[str, int]:
        """About the largest batch of every stage that the memory holds, where that can be measured."""
        found = {job.name: memory.largest_batch(job, self.workplace) for job in self._throwaways()}
        return {name: images for name, images in found.items() if images is not None}
