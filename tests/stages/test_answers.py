"""A teacher that is asked for some epochs only: the same training as with the teacher asked in all, broken or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fewlabels as fl
from conftest import same, shapes_images
from fewlabels import checkpoint, runtime
from fewlabels.config import DistillRecipe
from fewlabels.data import labels, pixels, sources, views
from fewlabels.data.loader import Batch, training_batches
from fewlabels.model.encoder import encoder
from fewlabels.model.heads import Classifier
from fewlabels.stages import loop
from fewlabels.stages.answers import Answers
from fewlabels.stages.distill import Distill
from fewlabels.stages.loop import Listeners, TrainState
from fewlabels.stages.runner import Job

CPU = torch.device("cpu")
FP32 = runtime.precision(CPU, "fp32")
EPOCHS, ASKED = 6, 2  # 2 steps an epoch of 20 of the 48 images: 8 are left out of each


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> labels.Dataset:
    images, classes = shapes_images(50)
    folder = tmp_path_factory.mktemp("store")
    splits = ["test" if i % 25 == 3 else "train" for i in range(50)]  # so that rows of the store are not 0, 1, 2, ...
    source = sources.open_source(images, [str(c) for c in classes])
    source = sources.replace(source, splits=tuple(splits))
    store, kept, _ = pixels.build(
        source, folder / "data", working_size=None, max_bad_share=0.05, threads=2, bad_csv=folder / "bad.csv"
    )
    return labels.assemble(source, store, kept)


class Counted(Classifier):
    """A classifier that counts the images it is shown."""

    shown = 0

    def forward(self, x: Tensor) -> Tensor:
        self.shown += len(x)
        return super().forward(x)


def classifier(seed: int) -> Counted:
    torch.manual_seed(seed)
    made = Counted(encoder("resnet18_0.125x_small"), None, tap=0, num_classes=4)
    torch.nn.init.normal_(made.linear.weight)
    return made


def crop(batch: Batch, number: int) -> Tensor:
    epoch = batch.epoch % ASKED
    return views.finetune(batch.pixels, batch.extent, batch.ids, size=16, epoch=epoch, seed=2, view=number)


def work(dataset: labels.Dataset) -> Job:
    stage = Distill(classifier(5), classifier(6), view=crop, temperature=0.5)
    schedule = DistillRecipe(epochs=EPOCHS, batch=20, optimizer="sgd", learning_rate=0.05, scaling="none", warmup=0.2)
    return Job(name="distill", stage=stage, schedule=schedule, ids=dataset.train, seed=3, identity={})


def answers(job: Job, folder: Path) -> Answers:
    return Answers(folder, job.order(), ASKED, 4)


def train(job: Job, state: TrainState, dataset: labels.Dataset, folder: Path, *, until: int = 2 * EPOCHS) -> None:
    def save(state: TrainState) -> None:
        state.stage.before_save()
        checkpoint.save(folder, state.step, state.tensors(), {})

    listeners = Listeners(
        on_log=lambda step, values: None, on_eval=lambda state: None, on_save=save, should_stop=lambda: False
    )
    plan = loop.Plan(until, job.derived.learning_rate, log_every=10**9, eval_every=0, save_every=10**9)
    batches = training_batches(dataset, job.order(), first_step=state.step, last_step=until, device=CPU)
    loop.train(state, batches, plan, listeners, FP32)


def begin(dataset: labels.Dataset, folder: Path, until: int) -> None:
    job = work(dataset)
    job.stage.answers = answers(job, folder)
    train(job, job.state(), dataset, folder, until=until)


def go_on(dataset: labels.Dataset, folder: Path) -> TrainState:
    job = work(dataset)
    state = job.state()
    saved, _ = checkpoint.latest(folder)
    assert saved is not None
    state.load(saved.step, saved.tensors)
    job.stage.answers = answers(job, folder)
    train(job, state, dataset, folder)
    return state


def test_it_is_the_teacher_asked_every_time(dataset: labels.Dataset, tmp_path: Path) -> None:
    assert dataset.train[-1] > len(dataset.train)
    online, replayed = work(dataset), work(dataset)
    replayed.stage.answers = answers(replayed, tmp_path / "b")
    states = online.state(), replayed.state()
    train(online, states[0], dataset, tmp_path / "a")
    train(replayed, states[1], dataset, tmp_path / "b")
    for name, tensor in states[0].tensors().items():
        torch.testing.assert_close(states[1].tensors()[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    assert online.stage.teacher.shown == 2 * EPOCHS * 20
    missing = replayed.stage.teacher.shown - 2 * ASKED * 20  # images that an asked epoch had left out
    assert 0 < missing <= 8 * (EPOCHS - ASKED)


@pytest.mark.parametrize("broken_at", [1, 3, 4, 7])
def test_broken_and_resumed_it_is_the_same_bit_for_bit(dataset: labels.Dataset, tmp_path: Path, broken_at: int) -> None:
    whole = work(dataset)
    whole.stage.answers = answers(whole, tmp_path / "whole")
    unbroken = whole.state()
    train(whole, unbroken, dataset, tmp_path / "whole")
    begin(dataset, tmp_path / "run", broken_at)
    assert same(go_on(dataset, tmp_path / "run").tensors(), unbroken.tensors())


@pytest.mark.parametrize("broken_at", [1, 7])
def test_a_lost_file_only_costs_time(dataset: labels.Dataset, tmp_path: Path, broken_at: int) -> None:
    online = work(dataset)
    expected = online.state()
    train(online, expected, dataset, tmp_path / "a")
    begin(dataset, tmp_path / "b", broken_at)
    next((tmp_path / "b").glob("teacher-logits*")).unlink()
    state = go_on(dataset, tmp_path / "b")
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(state.tensors()[name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_answers_of_another_batch_are_not_read(dataset: labels.Dataset, tmp_path: Path) -> None:
    """The batch follows the number of ranks: other images were left out, and their rows hold no answer."""
    begin(dataset, tmp_path, ASKED * 2)
    job = work(dataset)
    other = replace(job, schedule=replace(job.schedule, batch=18))
    assert not answers(job, tmp_path).lost
    assert answers(other, tmp_path).lost
    assert answers(job, tmp_path).lost, "the other batch has passed by rows of this one's"


def test_in_a_whole_run(tmp_path: Path) -> None:
    images, classes = shapes_images(64, size=16)
    known = [int(c) if i < 16 else -1 for i, c in enumerate(classes)]
    run = fl.fit(
        images, known, test=(images[40:], classes[40:]), out=tmp_path / "run", recipe="smoke",
        student="resnet18_0.25x_small", distill={"epochs": 6, "teacher_epochs": 2},
    )  # fmt: skip
    assert np.isfinite(run.model.predict_proba(images[:4])).all()
    assert not list(run.path.rglob("teacher-logits*"))
    assert "asked in 2 of 6 epochs" in (run.path / "resolved.json").read_text()
