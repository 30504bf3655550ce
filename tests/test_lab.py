"""The laboratory of experiments and the paper's tables, on drawn pictures and two steps a training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import lab, ladder, paper, pools, pretraining, selftraining, workload
from benchmarks.lab import Body, Lab

from conftest import shapes_images
from fewlabels import runtime
from fewlabels.data.labels import Dataset
from fewlabels.data.loader import Batch
from fewlabels.data.sources import open_source
from fewlabels.errors import UsageError
from fewlabels.model.encoder import encoder
from fewlabels.model.heads import Classifier
from fewlabels.stages.distill import Distill
from fewlabels.stages.finetune import Finetune
from fewlabels.stages.pretrain import Pretrain
from fewlabels.stages.selftrain import SelfTrain
from fewlabels.use import compare, evaluate

TINY = "resnet18_0.125x_small"
SCALE = paper.Scale(0, 0, 0.5, 0.5, (TINY, "resnet18_0.25x_small"), 8)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "MOST_LABEL_STEPS", 2)
    # measured on a busy machine it is now one format, now the other
    monkeypatch.setattr(workload, "precision", lambda _: runtime.Precision(None, channels_last=True))


def laboratory(folder: Path, recipe: str = "best") -> Lab:
    images, classes = shapes_images(200, size=16)
    names = [f"class {k}" for k in classes]
    source = open_source(images[:120], names[:120], test=(images[120:], names[120:]))
    return Lab(source, folder, epochs=0.5, distill_epochs=0.5, recipe=recipe)


def test_everything_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = laboratory(tmp_path)
    network = first.finetuned(Body(TINY), 1, "10%", 0)
    number = first.cell("it", lambda: first.accuracy(network))

    def never(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(workload, "trained", never)
    second = laboratory(tmp_path)
    again = second.finetuned(Body(TINY), 1, "10%", 0)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert second.cell("it", never) == number == second.accuracy(again)
    with pytest.raises(AssertionError, match="trained again"):
        second.finetuned(Body(TINY), 1, "10%", 1)


def test_a_probe_is_where_fine_tuning_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a step the network is the linear form of logistic regression on the tap; from zero it knows nothing."""
    made = laboratory(tmp_path)
    body, few = Body(TINY), made.few("10%", 0)
    see = compare.tapped(*made.pretrained(body))
    known, held = (
        compare.outputs(few, ids, made.setting, lambda view: [see(view)[1]])[0] for ids in (few.labeled, few.held_out)
    )
    fitted = evaluate.logistic_regression(known, few.labels[few.labeled], num_classes=few.num_classes)
    monkeypatch.setattr(workload, "trained", lambda *_: None)
    tuned = made.finetuned(body, 1, "10%", 0).eval()
    (told,) = compare.outputs(few, few.held_out, made.setting, lambda view: [tuned(view)])
    weight, bias = fitted.linear()
    np.testing.assert_allclose(told, held @ weight.T + bias, rtol=1e-4, atol=1e-4)
    blank = made.finetuned(body, 1, "10%", 0, start="zero")
    assert not blank.linear.weight.any()


def test_linear_is_logistic_regression_on_frozen_features(tmp_path: Path) -> None:
    made = laboratory(tmp_path)
    few, network = made.few("10%", 1), made.pretrained(Body(TINY))[0].eval()
    known, held = (
        compare.outputs(few, ids, made.setting, lambda view: [network(view)])[0] for ids in (few.labeled, few.held_out)
    )
    fitted = evaluate.logistic_regression(known, few.labels[few.labeled], num_classes=few.num_classes)
    right = fitted.predict_proba(held).argmax(axis=1) == few.labels[few.held_out]
    assert made.linear(Body(TINY), "10%", 1) == 100 * right.mean()


def test_a_student_takes_as_many_steps_whatever_it_learns_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = laboratory(tmp_path)
    few, teacher = made.few("10%", 0), made.supervised(TINY, "10%", 0)
    steps: list[int] = []
    monkeypatch.setattr(workload, "trained", lambda stage, settings, derived, *_: steps.append(derived.total_steps))
    for name, ids in (("all", few.train), ("labeled", few.labeled)):
        made.distilled(TINY, teacher, name, few, 0, ids=ids)
    batch = min(made.general.distill.batch, len(few.labeled))
    images = [steps[0] * made.general.distill.batch, steps[1] * batch]
    assert images[0] == pytest.approx(images[1], abs=2 * made.general.distill.batch)


@pytest.mark.parametrize("name", paper.TABLES)
def test_every_table(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = paper.TABLES[name](paper.Tables(laboratory(tmp_path), SCALE, draws=2))
    columns = [list(row) for row in rows.values()]
    assert columns == [columns[0]] * len(rows)
    for title, row in rows.items():
        if "correlation" not in title and "gain" not in title:
            assert all(0 <= value <= 100 for values in row.values() for value in values)
            assert {len(values) for values in row.values()} <= {1, 2}
    paper.told("made", rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == len(rows) + 2


def test_the_table_of_self_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network for every row that has one, by the stage that the row is named after; all kept."""
    train, trained = workload.trained, []
    monkeypatch.setattr(workload, "trained", lambda stage, *rest: (trained.append(type(stage)), train(stage, *rest)))
    rows = selftraining.Comparison(laboratory(tmp_path), Body(TINY), 2).rows([12], selftraining.WAYS)
    assert set(rows) == set(selftraining.WAYS)
    assert Counter(trained) == {  # from labels alone, then one fine-tuning for five rows
        Pretrain: 1, Finetune: 4, Distill: 2, SelfTrain: 2, selftraining.Unshifted: 2, selftraining.FixMatch: 2,
    }  # fmt: skip
    again = selftraining.Comparison(laboratory(tmp_path), Body(TINY), 2).rows([12], ["fine-tuned"])
    assert again == {"fine-tuned": rows["fine-tuned"]}
    for row in rows.values():
        assert len(row["12 labels"]) == 2
        assert all(0 <= value <= 100 for value in row["12 labels"])


def test_balanced_rows_are_the_same_networks_with_other_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is divided by the shares of labels that come equally often is as it was; of others the rare gain."""
    made = laboratory(tmp_path)
    comparison = selftraining.Comparison(made, Body(TINY), 1)
    even, uneven = made.few(20, 0), pools.as_they_come(made.dataset, 20, 0)
    first = comparison.rows([20], ["fine-tuned"])["fine-tuned"]
    monkeypatch.setattr(workload, "trained", lambda *_: pytest.fail("trained again"))
    assert comparison.rows([20], ["fine-tuned"], balanced=True) == {"fine-tuned, balanced": first}
    counts = [np.bincount(some.labels[some.labeled], minlength=even.num_classes) for some in (even, uneven)]
    assert len(set(counts[0])) == 1 < len(set(counts[1])) and counts[1].min() >= 1
    np.testing.assert_array_equal(uneven.labels[uneven.held_out], made.dataset.labels[made.dataset.held_out])
    network = comparison._teacher(20, 0).eval()
    monkeypatch.setitem(made._draws, ("20", 0), uneven)
    shares = counts[1] / counts[1].sum()
    (logits,) = compare.outputs(made.dataset, made.dataset.held_out, made.setting, lambda view: [network(view)])
    right = (torch.from_numpy(logits).softmax(dim=1).numpy() / shares).argmax(axis=1) == made.truth
    assert comparison._right("fine-tuned", 20, 0, balanced=True) == 100 * right.mean()


def test_nothing_is_shifted_where_answers_count_as_they_are() -> None:
    answers = torch.tensor([[2.0, 0.0], [3.0, 0.0]])
    nothing: Any = None
    shifted = []
    for kind in (SelfTrain, selftraining.Unshifted, selftraining.FixMatch):
        stage = kind(
            Classifier(encoder(TINY), None, tap=0, num_classes=2), labeled=nothing, weak=nothing, strong=nothing,
            threshold=0.5, expected=torch.tensor([0.5, 0.5]),
        )  # fmt: skip
        shifted.append(stage.train().shifted(answers))
    assert shifted[0].mean(dim=0)[1] > 1.2 * shifted[1].mean(dim=0)[1], "the rare class comes more often"
    for plain in shifted[1:]:
        torch.testing.assert_close(plain, answers.softmax(dim=1))


def test_numbers_of_other_settings_are_not_taken_for_these(tmp_path: Path) -> None:
    made = laboratory(tmp_path)
    laboratory(tmp_path)
    for other in ({"recipe": "simclrv2"}, {"epochs": 1.0}):
        source = open_source(*shapes_images(200, size=16))
        with pytest.raises(UsageError, match="other settings"):
            Lab(source, tmp_path, **{"epochs": made.epochs, "distill_epochs": 0.5, **other})


def test_values_of_the_recipe_can_be_changed(tmp_path: Path) -> None:
    changes = ["resolution=0.5", "finetune.smallest_crop=0.3", "finetune.start=zero", "pretrain.blur=true"]
    source = open_source(*shapes_images(200, size=16))
    found = Lab(source, tmp_path, epochs=0.5, distill_epochs=0.25, changes=changes).recipe(20)
    assert (found.resolution, found.finetune.smallest_crop, found.finetune.start) == (0.5, 0.3, "zero")
    assert (found.pretrain.blur, found.pretrain.epochs, found.distill.epochs) == (True, 0.5, 0.25)


def test_the_ladder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labs = {name: laboratory(tmp_path / name, name) for name in (ladder.FAITHFUL, ladder.OURS)}
    spread = []
    propagated = compare.propagated

    def noted(few: Dataset, *more: Any) -> Any:
        spread.append(len(few.labeled))
        return propagated(few, *more)

    monkeypatch.setattr(compare, "propagated", noted)
    rows = ladder.climbed(labs, Body(TINY), 2, [12, 60], [12], fixmatch=True)
    assert spread == [12, 12], "up to 10 labels a class, in each draw, and only ours"
    stage_3 = {"simclrv2: distilled into itself", "best: distilled into itself", "best: self-trained"}
    stage_3 |= {selftraining.FIXMATCH}
    assert stage_3 < set(rows)
    for name, row in rows.items():
        assert list(row) == (["12 labels"] if name in stage_3 else ["12 labels", "60 labels"])
        assert all(0 <= value <= 100 for values in row.values() for value in values)


def test_ways_to_pretrain(tmp_path: Path) -> None:
    made = laboratory(tmp_path)
    seen = {}
    names = [
        "NT-Xent", "decoupled, 4 views of 64", "coding rate, 4 views of 64", "4 views of 64", "gray",
        "gray as photos, 4 views of 64", "4 views of 64, crops from 0.25, keys of momentum 0.99",
        "2 views and 4 small ones of 64, crops from 0.25", "4 views of 64 of 3/4 the side, crops from 0.25",
    ]  # fmt: skip
    for name in names:
        trial = pretraining.Trial(made, name, 0)
        assert set(trial.numbers([12])) == {f"12, tap {tap}" for tap in pretraining.TAPS}
        seen[name] = next(trial.features()[0].parameters())
    assert len({tuple(weights.flatten().tolist()) for weights in seen.values()}) == len(names)
    costs = [pretraining.WAYS[name].cost for name in names[-4:]]
    assert costs == pytest.approx([4, 4 + 4 / 3, 2 + 4 / 4, 4 * 9 / 16])


def test_mixed_images_have_a_part_of_another_one() -> None:
    ids = torch.arange(6)
    batch = Batch(pixels=torch.zeros(6), extent=torch.zeros(6), ids=ids, labels=ids, epoch=3)
    plain = torch.eye(6).reshape(6, 6, 1, 1)
    made = lab.mixed(lambda *_: plain)(batch, 0)
    assert torch.equal(made, lab.mixed(lambda *_: plain)(batch, 0)), "the same view again"
    assert made.sum(dim=1) == pytest.approx(torch.ones(6, 1, 1))
    assert (made.diagonal().flatten() < 0.999).sum() >= 3, "each has another one in it"


def test_decoupled_is_nt_xent_without_the_positive_below() -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 5, 8, dtype=torch.float64)
    rows = torch.nn.functional.normalize(z.flatten(0, 1).float(), dim=1)
    losses = []
    for i in range(10):
        own = rows[i] @ rows[(i + 5) % 10] / 0.3
        others = torch.stack([rows[i] @ rows[j] / 0.3 for j in range(10) if j % 5 != i % 5])
        losses.append(others.exp().sum().log() - own)
    torch.testing.assert_close(pretraining.decoupled(z, 0.3), torch.stack(losses).mean())


def test_a_long_tail_and_labels_that_come_the_other_way_round(tmp_path: Path) -> None:
    whole = laboratory(tmp_path).dataset  # 30 training images of each of 4 classes
    long = pools.long_tailed(whole)
    images = np.bincount(long.labels[long.labeled])
    assert sorted(images) == [2, 4, 11, 30]
    assert np.array_equal(long.held_out, whole.held_out)
    few = pools.most_of_the_rarest(long, 6, 0)
    known = np.bincount(few.labels[few.labeled], minlength=4)
    assert [known[k] for k in np.argsort(images)] == [2, 2, 1, 1], "3 would be due where only 2 are"
    assert np.array_equal(few.held_out, whole.held_out)
    assert np.array_equal(few.labels[few.labeled], long.labels[few.labeled])
    assert not np.array_equal(few.labeled, pools.most_of_the_rarest(long, 6, 1).labeled)


def test_a_pool_with_foreign_images(tmp_path: Path) -> None:
    whole = laboratory(tmp_path).dataset
    pure, foreign = (pools.some_classes(whole, foreign=there) for there in (False, True))
    assert np.array_equal(pure.train, whole.labeled[whole.labels[whole.labeled] < 3])
    assert np.array_equal(foreign.train, whole.train)
    for made in (pure, foreign):
        assert made.classes == whole.classes[:3]
        assert np.array_equal(made.labeled, pure.train)
        assert np.array_equal(made.held_out, whole.held_out[whole.labels[whole.held_out] < 3])


def test_images_of_parquet_and_idx(tmp_path: Path) -> None:
    source = lab.images("digits", train=0, test=0)
    assert len(source.names) == 1797
    if lab.FASHION.exists():
        source = lab.images("fashion", train=50, test=20)
        assert sorted(source.splits) == ["test"] * 20 + ["train"] * 50
        assert set(source.labels) <= {str(k) for k in range(10)}
    shared = Path(__file__).parents[2] / "shared" / "data" / "cifar10-jpeg"
    if shared.exists():
        source = lab.images(str(shared), train=30, test=10)
        again = lab.images(str(shared), train=20, test=10)
        assert len(source.names) == 40
        assert list(again.labels[:20]) == list(source.labels[:20])


def test_a_spread_needs_two_values() -> None:
    assert lab.mean_and_spread([50.0]) == "50.0"
    assert lab.mean_and_spread([50.0, 52.0]) == f"51.0 ({np.std([50, 52], ddof=1):.1f})"
