"""The loop: a resumed stage is the unbroken one bit for bit, and nothing that is not finite is ever saved."""

from __future__ import annotations

import copy
import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import same, shapes_images
from fewlabels import checkpoint, runtime
from fewlabels.config import Schedule
from fewlabels.data import labels, pixels, sources, views
from fewlabels.data.loader import Batch, Order, training_batches
from fewlabels.errors import DataError, Diverged
from fewlabels.model import optim
from fewlabels.model.encoder import encoder
from fewlabels.model.heads import Classifier, ProjectionHead
from fewlabels.model.losses import distillation_loss, nt_xent
from fewlabels.runfolder import Interrupts, RunFolder
from fewlabels.stages import loop, runner
from fewlabels.stages.distill import Distill
from fewlabels.stages.finetune import Finetune
from fewlabels.stages.loop import Listeners, Stage, TrainState
from fewlabels.stages.pretrain import Pretrain, PretrainWithMomentum
from fewlabels.stages.runner import Job, Workplace
from fewlabels.stages.selftrain import SelfTrain

CPU = torch.device("cpu")
FP32 = runtime.precision(CPU, "fp32")
STEPS = 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> labels.Dataset:
    images, classes = shapes_images(48)
    folder = tmp_path_factory.mktemp("store")
    source = sources.open_source(images, [str(c) if i < 16 else None for i, c in enumerate(classes)])
    store, kept, _ = pixels.build(
        source, folder / "data", working_size=None, max_bad_share=0.05, threads=2, bad_csv=folder / "bad.csv"
    )
    return labels.assemble(source, store, kept)


def two_views(batch: Batch, number: int) -> Tensor:
    return views.pretrain(
        batch.pixels, batch.extent, batch.ids, size=16, epoch=batch.epoch, seed=1, view=number, blur=False
    )


def crop(batch: Batch, number: int) -> Tensor:
    return views.finetune(batch.pixels, batch.extent, batch.ids, size=16, epoch=batch.epoch, seed=2, view=number)


def networks(seed: int = 0) -> tuple[object, ProjectionHead]:
    torch.manual_seed(seed)
    body = encoder("resnet18_0.125x_small")
    return body, ProjectionHead(body.feature_dim, 16)


def classifier(seed: int) -> Classifier:
    body, head = networks(seed)
    made = Classifier(body, head, tap=1, num_classes=4)
    torch.nn.init.normal_(made.linear.weight)
    return made


def build(name: str) -> Stage:
    body, head = networks()
    if name == "dropout":
        return with_dropout()
    if name == "pretrain":
        return Pretrain(body, head, view=two_views, temperature=0.2)
    if name == "momentum":
        return PretrainWithMomentum(body, head, view=two_views, temperature=0.2, momentum=0.9, queue=24)
    if name == "finetune":
        return Finetune(classifier(0), view=crop)
    if name == "selftrain":
        return SelfTrain(
            classifier(5),
            labeled=lambda _: iter(()),
            weak=crop,
            strong=two_views,
            threshold=0.5,
            expected=torch.full((4,), 0.25),
        )
    return Distill(classifier(5), classifier(6), view=crop, temperature=0.5, label_weight=0.3)


def with_dropout() -> Stage:
    """A network that draws from torch's own generator, as timm's with stochastic depth do."""
    network = classifier(0)
    network.head.append(nn.Dropout(0.3))
    return Finetune(network, view=crop)


def labeled_images(dataset: labels.Dataset, first: int) -> Iterator[Batch]:
    return training_batches(dataset, Order(dataset.labeled, 6, 7), first_step=first, last_step=1000, device=CPU)


def job(name: str, dataset: labels.Dataset, optimizer: str) -> Job:
    schedule = Schedule(epochs=3, batch=16, optimizer=optimizer, learning_rate=0.05, scaling="none", warmup=0.2)
    ids = dataset.labeled if name in ("finetune", "dropout") else dataset.train
    stage = build(name)
    if isinstance(stage, SelfTrain):
        stage.labeled = functools.partial(labeled_images, dataset)
    return Job(name=name, stage=stage, schedule=schedule, ids=ids, seed=3, identity={})


def train(
    work: Job,
    state: TrainState,
    dataset: labels.Dataset,
    *,
    until: int = STEPS,
    save: Callable[[TrainState], None] | None = None,
    stop_after: int | None = None,
    save_every: int = 10**9,
) -> list[float]:
    losses: list[float] = []
    listeners = Listeners(
        on_log=lambda step, values: losses.append(values["loss"]),
        on_eval=lambda state: None,
        on_save=save or (lambda state: None),
        should_stop=lambda: state.step == stop_after,
    )
    plan = loop.Plan(until, work.derived.learning_rate, log_every=1, eval_every=0, save_every=save_every)
    batches = training_batches(dataset, work.order(), first_step=state.step, last_step=until, device=CPU)
    loop.train(state, batches, plan, listeners, FP32)
    return losses


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw", "muon"])
@pytest.mark.parametrize("name", ["pretrain", "momentum", "finetune", "distill", "selftrain", "dropout"])
def test_stopped_saved_and_resumed_equals_unbroken(
    name: str, optimizer: str, dataset: labels.Dataset, tmp_path: Path
) -> None:
    whole = job(name, dataset, optimizer)
    unbroken = whole.state()
    expected = train(whole, unbroken, dataset)

    def save(state: TrainState) -> None:
        checkpoint.save(tmp_path, state.step, state.tensors(), {})

    first = job(name, dataset, optimizer)
    got = train(first, first.state(), dataset, save=save, stop_after=None, until=2)
    second = job(name, dataset, optimizer)
    state = second.state()
    saved, _ = checkpoint.latest(tmp_path)
    assert saved is not None
    state.load(saved.step, saved.tensors)
    got += train(second, state, dataset)
    assert got == expected
    assert same(state.tensors(), unbroken.tensors())
    assert expected[0] != expected[-1]


def test_a_damaged_checkpoint_is_passed_over_in_true_words(
    dataset: labels.Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = job("finetune", dataset, "sgd")
    at = Workplace(RunFolder(tmp_path), dataset, CPU, FP32, Interrupts())
    values = {"surroundings": runner._surroundings(work, at), "seconds": 3.0}
    paths = [checkpoint.save(at.folder.stage("finetune"), n, work.state().tensors(), values) for n in (1, 2)]
    for path, words, step in zip(paths[::-1], ("that of step 1 is used", "finetune begins anew"), (1, 0), strict=True):
        (path / checkpoint.VALUES).write_text("")
        state = work.state()
        assert runner._resume(work, at, state) == 3.0 * step
        assert state.step == step
        last = capsys.readouterr().err.splitlines()[-1]
        assert path.name in last
        assert words in last


@pytest.mark.parametrize(
    ("step", "of", "step_now"),
    [(9, 9, 6), (5, 5, 6), (8, 9, 5), (2, 12, 1), (4, 6, 4), (6, None, 6), (7, None, 6), (5, None, 5)],
)
def test_a_stage_stands_where_it_stood_in_its_schedule(
    dataset: labels.Dataset, tmp_path: Path, step: int, of: int | None, step_now: int
) -> None:
    """Another number of processes has other batches, so other steps; without their number it is an older version's."""
    work = job("finetune", dataset, "sgd")
    work = replace(work, schedule=replace(work.schedule, epochs=5.5))
    assert work.derived.total_steps == 6
    at = Workplace(RunFolder(tmp_path), dataset, CPU, FP32, Interrupts())
    values = {"surroundings": runner._surroundings(work, at), "seconds": 3.0}
    values |= {} if of is None else {"total_steps": of}
    checkpoint.save(at.folder.stage("finetune"), step, work.state().tensors(), values)
    state = work.state()
    runner._resume(work, at, state)
    assert state.step == step_now


def test_a_stop_saves_first(dataset: labels.Dataset) -> None:
    work = job("finetune", dataset, "sgd")
    state, saved = work.state(), []
    losses = train(work, state, dataset, save=lambda s: saved.append(s.step), stop_after=3)
    assert (len(losses), saved) == (3, [3])


def test_the_teacher_is_frozen_in_inference_mode_and_never_saved(dataset: labels.Dataset) -> None:
    work = job("distill", dataset, "sgd")
    before = copy.deepcopy(work.stage.teacher.state_dict())  # type: ignore[union-attr]
    state = work.state()
    train(work, state, dataset, until=3)
    assert same(before, work.stage.teacher.state_dict())  # type: ignore[union-attr]
    assert not any("teacher" in name for name in state.tensors())
    work.stage.train()
    assert not any(module.training for module in work.stage.teacher.modules())  # type: ignore[union-attr]
    assert work.stage.student.training  # type: ignore[union-attr]


@pytest.mark.parametrize("place", ["input", "gradient", "weight"])
def test_not_finite_stops_before_anything_is_saved(
    place: str, dataset: labels.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = job("pretrain", dataset, "sgd")
    state, saved = work.state(), list[int]()
    view, parameter = work.stage.view, list(work.stage.parameters())[-1]
    if place == "input":
        monkeypatch.setattr(work.stage, "view", lambda *a: view(*a) * (float("nan") if state.step == 2 else 1))
    if place == "gradient":
        parameter.register_hook(lambda gradient: gradient * (float("inf") if state.step == 2 else 1))
    if place == "weight":
        monkeypatch.setattr(
            work.stage, "after_step", lambda: parameter.data.mul_(float("nan") if state.step == 2 else 1)
        )
    with pytest.raises(Diverged) as raised:
        train(work, state, dataset, save=lambda state: saved.append(state.step), save_every=2)
    assert saved == [2]
    assert raised.value.exit_code == 70
    assert raised.value.step == 3
    assert raised.value.what.startswith({
        "input": "the loss is nan at step 3", "gradient": "1 gradients are not finite at step 3: head",
        "weight": "1 tensors are not finite after step 3: stage.head",
    }[place])  # fmt: skip
    assert (state.step == 3) == (place == "weight"), "the update before which it was found was not made"


def test_where_no_loss_is_read_the_first_bad_one_is_found_later(
    dataset: labels.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_stop_if_not_finite", lambda *a: None)  # as on CUDA
    work = job("pretrain", dataset, "sgd")
    state, saved, view = work.state(), list[int](), work.stage.view
    monkeypatch.setattr(work.stage, "view", lambda *a: view(*a) * (float("nan") if state.step == 3 else 1))
    with pytest.raises(Diverged, match="the loss is nan at step 4") as raised:
        train(work, state, dataset, save=lambda state: saved.append(state.step), save_every=2)
    assert (state.step, raised.value.step, saved) == (4, 4, [2])
    with pytest.raises(Diverged, match="the loss is nan at step 4"):
        state = (again := job("pretrain", dataset, "sgd")).state()
        monkeypatch.setattr(again.stage, "view", lambda *a: view(*a) * (float("nan") if state.step == 3 else 1))
        train(again, state, dataset, save_every=6)
    assert state.step == 6


def test_pretraining_is_nt_xent_of_two_views_in_one_forward(dataset: labels.Dataset) -> None:
    work = job("pretrain", dataset, "sgd")
    batch = next(iter(training_batches(dataset, work.order(), first_step=0, last_step=1, device=CPU)))
    got = work.stage(batch)["loss"]
    body, head = networks()
    projections = head(body(torch.cat([two_views(batch, 0), two_views(batch, 1)])))
    assert got.item() == nt_xent(projections[:16], projections[16:], 0.2).item()


def test_self_training_counts_sure_answers_only(dataset: labels.Dataset) -> None:
    """The loss by hand from weak and strong views, and what moves: the network by its gradient, the average after."""
    for share in (0.0, 0.5, 1.0):
        work = job("selftrain", dataset, "sgd")
        stage = work.stage.train()
        assert isinstance(stage, SelfTrain)
        (batch,) = training_batches(dataset, work.order(), first_step=0, last_step=1, device=CPU)
        known = next(labeled_images(dataset, 0))
        twin = copy.deepcopy(stage.network).train()
        logits = twin(torch.cat([crop(known, 2), two_views(batch, 1)]))
        stage.expected.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
        told = copy.deepcopy(stage.network).eval()(crop(batch, 0)).softmax(dim=1).detach()
        often = (1000 * stage.expected + told.mean(dim=0)) / 1001
        answers = nn.functional.normalize(told * often / told.mean(dim=0), p=1, dim=1)
        sure = answers.max(dim=1).values
        stage.threshold = float(sure.quantile(share)) + 1e-6
        counted = sure >= stage.threshold
        learned = nn.functional.cross_entropy(logits[6:], answers.argmax(dim=1), reduction="none")
        expected = nn.functional.cross_entropy(logits[:6], known.labels) + (counted * learned).sum() / len(batch.ids)
        found = stage(batch)
        torch.testing.assert_close(stage.expected, often)
        torch.testing.assert_close(found["loss"], expected)
        assert found["sure"] == counted.float().mean()
        assert counted.sum() == {0.0: 15, 0.5: 8, 1.0: 0}[share]
        found["loss"].backward()
        assert all(p.grad is None for p in stage.average.parameters())
        before = stage.average.linear.weight.clone()
        with torch.no_grad():
            stage.network.linear.weight.add_(1.0)
        stage.after_step()  # the mean of both
        torch.testing.assert_close(stage.average.linear.weight, before + 0.5)
        assert not stage.average.training


def test_distillation_weighs_labels_and_sees_one_view(dataset: labels.Dataset) -> None:
    stage = build("distill").train()
    work = job("distill", dataset, "sgd")
    batch = next(iter(training_batches(dataset, work.order(), first_step=0, last_step=1, device=CPU)))
    assert 0 < (batch.labels >= 0).sum() < 16
    got = stage(batch)["loss"].item()
    teacher, student = classifier(5).eval(), classifier(6).train()
    view = crop(batch, 0)
    taught, logits = teacher(view), student(view)
    known = batch.labels >= 0
    labeled = torch.nn.functional.cross_entropy(logits[known], batch.labels[known])
    expected = 0.7 * 0.5**2 * distillation_loss(logits, taught, 0.5) + 0.3 * labeled  # the notebook's T squared
    assert got == pytest.approx(expected.item(), rel=1e-6)


def test_momentum_moves_the_average_and_fills_the_memory(dataset: labels.Dataset) -> None:
    work = job("momentum", dataset, "sgd")
    stage = work.stage
    assert isinstance(stage, PretrainWithMomentum)
    before = {name: t.clone() for name, t in stage.average.state_dict().items()}
    state = work.state()
    train(work, state, dataset, until=2)  # the first update has learning rate 0: see the warm-up
    name = (
        "encoder.group1.0.conv1.weight"
        if "encoder.group1.0.conv1.weight" in before
        else next(key for key in before if key.endswith("linear.weight"))
    )
    live = stage.state_dict()[name.replace("encoder.", "encoder.", 1)]
    average = stage.average.state_dict()[name]
    assert not torch.equal(average, before[name])
    assert torch.allclose(average, 0.9 * before[name] + 0.1 * live, atol=1e-6)
    assert int(stage.next_row) == 0  # two batches of 32 keys, of which the last 24 fill the memory
    assert torch.allclose(stage.queue.norm(dim=1), torch.ones(24), atol=1e-5)


def test_no_two_steps_seeds_or_stages_drop_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, whose generator takes 32 bits of a seed. A stage's seed has its number above these."""
    drawn: list[float] = []

    def drawing(state: SimpleNamespace, *_: object) -> dict[str, Tensor]:
        drawn.append(torch.rand(()).item())
        state.step += 1
        return {"loss": torch.zeros(())}

    monkeypatch.setattr(loop, "step", drawing)
    quiet = Listeners(lambda *_: None, lambda _: None, lambda _: None, lambda: False)
    for seed in (0, 1, 256, 1 << 32, 2 << 32):
        state = SimpleNamespace(stage=nn.Module(), step=0, tensors=dict)
        loop.train(state, range(5), loop.Plan(5, lambda _: 0.1, 1, 0, 9, seed), quiet, FP32)  # type: ignore[arg-type]
    assert len(drawn) == len(set(drawn)) == 25


def test_a_stage_says_that_it_waited_for_images() -> None:
    streamed, stored = (SimpleNamespace(store=SimpleNamespace(streamed=kind)) for kind in (True, False))
    assert runner._waited(4.9, 100.0, streamed) == ""  # type: ignore[arg-type]
    assert runner._waited(0.9, 1.0, streamed) == ""  # type: ignore[arg-type] - less than a second is not worth a word
    assert "waited 12% of it for images: decoding" in runner._waited(12.0, 100.0, streamed)  # type: ignore[arg-type]
    assert "disk" in runner._waited(12.0, 100.0, stored)  # type: ignore[arg-type]


def test_waiting_is_counted_and_the_step_is_not(
    dataset: labels.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*asked: Any, **how: Any) -> Iterator[Batch]:
        for batch in training_batches(*asked, **how):
            time.sleep(0.05)
            yield batch

    def slower(batch: Batch, number: int) -> Tensor:
        time.sleep(0.1)
        return crop(batch, number)

    monkeypatch.setattr(runner, "training_batches", slow)
    work, at = job("finetune", dataset, "sgd"), Workplace(RunFolder(tmp_path), dataset, CPU, FP32, Interrupts())
    work.stage.view = slower
    runner.run(work, at)
    status, steps = json.loads(at.folder.status_file.read_text()), work.derived.total_steps
    waited, seconds = status["waited"]["finetune"], status["seconds"]["finetune"]
    assert steps * 0.05 <= waited <= seconds - steps * 0.1


def test_training_learns_what_can_be_seen(dataset: labels.Dataset) -> None:
    network = classifier(0)
    schedule = Schedule(epochs=30, batch=16, optimizer="adamw", learning_rate=3e-3, scaling="none")
    work = Job(
        name="finetune", stage=Finetune(network, view=crop), schedule=schedule, ids=dataset.labeled, seed=0, identity={}
    )
    losses = train(work, work.state(), dataset, until=work.derived.total_steps)
    assert np.mean(losses[-3:]) < 0.3 * np.mean(losses[:3])


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "muon"])
def test_buffers_come_back_in_the_layout_of_their_parameters(name: str) -> None:
    """Files keep no layout, and a contiguous buffer beside a channels_last kernel is slow."""

    def fresh() -> TrainState:
        stage = Stage()
        stage.conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        return TrainState(stage, optim.optimizer(name, stage, lr=0.1))

    state = fresh()
    state.stage.conv(torch.rand(2, 4, 5, 5)).sum().backward()
    state.optimizer.step()
    saved = {key: tensor.contiguous().clone() for key, tensor in state.tensors().items()}
    resumed = fresh()
    resumed.load(1, saved)
    weight = resumed.stage.conv.weight
    buffers = [t for t in resumed.optimizer.state[weight].values() if t.shape == weight.shape]
    assert buffers
    assert all(buffer.stride() == weight.stride() for buffer in buffers)
    assert same(resumed.tensors(), saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("stage.network.linear.bias"),
        lambda t: t.update({"optimizer.99.momentum": torch.ones(1)}),
        lambda t: t.update({"optimizer.0.momentum": torch.ones(7)}),
    ],
)
def test_tensors_of_another_network_are_refused(
    dataset: labels.Dataset, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any]
) -> None:
    at = Workplace(RunFolder(tmp_path / "my run"), dataset, CPU, FP32, Interrupts())
    work = job("finetune", dataset, "lars")
    tensors = work.state().tensors()
    change(tensors)
    checkpoint.save(at.folder.stage("finetune"), 1, tensors, {"surroundings": {}, "seconds": 0.0})
    with pytest.raises(DataError, match="of another network") as refused:
        runner._resume(work, at, work.state())
    assert f"rm -r '{at.folder.stage('finetune')}' to do" in refused.value.fix
