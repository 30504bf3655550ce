"""Sharded ranks are ranks that each hold everything: the same steps, the same files, and runs go on from either.

Run as a script it is one rank's part of that; see two_ranks.py.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import two_ranks
from conftest import shapes_images
from fewlabels import checkpoint, config, plan, runtime
from fewlabels.config import Schedule
from fewlabels.data.loader import Batch
from fewlabels.errors import Diverged, RunAgain, UsageError
from fewlabels.model import muon
from fewlabels.model.encoder import encoder
from fewlabels.model.heads import ProjectionHead
from fewlabels.model.optim import LARS
from fewlabels.stages import loop, sharded
from fewlabels.stages.pretrain import Pretrain
from fewlabels.stages.runner import Job
from fewlabels.stages.selftrain import SelfTrain
from test_two_ranks import build, strong
from test_world_sizes import STOPPED, train

STAGES = {
    "sk": "lars", "float32": "lars", "recompute": "muon", "momentum": "lars", "batch": "lars", "finetune": "sgd",
    "distill": "adamw", "selftrain": "muon",
}  # fmt: skip
# In float32 the numbers of a rank depend on the order of sums, and drift apart: one step, to 1e-5
STEPS = dict.fromkeys(STAGES, 3) | {"sk": 6, "float32": 1}
BODIES = {"sk": "resnet50_0.125x_sk_small", "float32": "resnet18_0.125x_small"}
PLAIN = runtime.Precision(None, channels_last=True)
AS_ON_A_CPU, AS_ON_GPUS = (muon.MOST_NUMBERS[kind] for kind in ("cpu", "cuda"))


# --- the ranks' part -------------------------------------------------------------------------------------------------


def build_pretrain(name: str, dtype: torch.dtype) -> Pretrain:
    torch.manual_seed(0)
    body = encoder(name)
    return Pretrain(body, ProjectionHead(body.feature_dim, 16), view=lambda *how: strong(*how).to(dtype))


def trained(name: str, *, shard: bool) -> tuple[loop.TrainState, Job, list[float]]:
    """STEPS of a stage on this rank's half of 16 images, in float64 but for one."""
    dtype = torch.float32 if name == "float32" else torch.float64
    stage = (build_pretrain(BODIES[name], dtype) if name in BODIES else build(name)).to(dtype)
    if name == "finetune":
        stage.network.encoder.freeze(1)  # type: ignore[operator, union-attr]
    PLAIN.layout(stage)
    muon.MOST_NUMBERS["cpu"] = AS_ON_GPUS if name == "selftrain" else AS_ON_A_CPU
    schedule = Schedule(epochs=9, batch=16, optimizer=STAGES[name], learning_rate=0.1, scaling="none", warmup=0.0)
    job = Job(name=name, stage=stage, schedule=schedule, ids=torch.arange(16).numpy(), seed=3, identity={}, shard=shard)
    state = job.state()
    state.stage.train()
    images, classes = shapes_images(16)
    rows = torch.arange(8) + 8 * runtime.rank()
    batch = Batch(
        torch.from_numpy(images).permute(0, 3, 1, 2)[rows], torch.full((8, 2), 16), rows,
        torch.from_numpy(classes)[rows], 0,
    )  # fmt: skip
    if isinstance(state.stage, SelfTrain):
        state.stage.labeled = lambda _: itertools.repeat(batch.pick(torch.arange(2), 0))
    losses = []
    for _ in range(STEPS[name]):
        torch.manual_seed(state.step)
        losses.append(float(torch.as_tensor(loop.step(state, batch, 0.1, PLAIN)["loss"])))
    return state, job, losses


def both_ways(name: str) -> dict[str, Any]:
    """What a stage comes to with everything on both ranks, and sharded."""
    ordinary, job, losses = trained(name, shard=False)
    kept = sum(p.numel() for p in job.stage.parameters() if p.requires_grad)
    state, job, sharded_losses = trained(name, shard=True)
    held = sum(runtime.part(p).numel() for p in state.stage.parameters() if p.requires_grad)
    emptied = sum(p.untyped_storage().nbytes() for p in job.stage.parameters() if p.requires_grad)
    whole = {name: runtime.whole(tensor) for name, tensor in state.tensors().items()}
    sharded.collect(job.stage, state.stage)
    return {
        "losses": (losses, sharded_losses), "tensors": (ordinary.tensors(), whole), "held": held / kept,
        "emptied": emptied, "collected": (ordinary.stage.trained(), job.stage.trained()),
    }  # fmt: skip


def lars() -> tuple[list[Tensor], list[Tensor]]:
    """Weights after three steps of LARS, whole on each rank and sharded: odd shapes, none or tiny gradients."""
    shapes = [(7, 3, 3, 3), (1, 40), (5,), (2, 6), (3, 9)]
    ends: list[list[Tensor]] = []
    for shard in (False, True):
        torch.manual_seed(5)
        module = nn.ParameterList(torch.randn(shape) for shape in shapes)
        if shard:
            runtime.shard(module)
        optimizer = LARS([{"params": list(module), "weight_decay": 0.0}], lr=1.0, trust=0.02)
        for _ in range(3):
            for weight, size in zip(module, (1.0, 3.0, 1e-6, 0.0, 1e-24), strict=True):
                weight.grad = torch.zeros_like(weight)
                runtime.fill(weight.grad, size * torch.randn(weight.shape))
            optimizer.step()
        ends.append([runtime.whole(weight.detach()) for weight in module])
        for weight, found in zip(module, ends[-1], strict=True):  # odd numbers of rows, and a rank without any
            kept = runtime.whole_on_main(weight.detach())
            assert torch.equal(kept, found if runtime.is_main() else runtime.part(weight.detach()))
    return ends[0], ends[1]


def told_by_all() -> str:
    """What this rank says when the other holds a number that is not finite."""
    state, _, _ = trained("distill", shard=True)
    if runtime.rank() == 1:
        runtime.part(state.stage.get_parameter("student.linear.weight").detach())[0] = torch.nan
    try:
        loop.check_finite(state)
    except Diverged as error:
        return error.what
    return ""


def two_disks(place: Path) -> str:
    """What is said where one rank's disk does not have the checkpoint that the other's has."""
    older = place / f"older-{runtime.rank()}"
    shutil.copytree(place / "stopped", older)
    if runtime.rank() == 1:
        shutil.rmtree(older / "pretrain")
    try:
        train(older, shard=True)
    except RunAgain as error:
        return error.what
    return ""


# --- tests -----------------------------------------------------------------------------------------------------------


def saved(folder: Path) -> checkpoint.Saved:
    found, _ = checkpoint.latest(folder / "pretrain")
    assert found is not None
    return found


def as_one(found: dict[str, Any], folder: Path, alone: dict[str, Any], whole: Path) -> None:
    """The losses of all steps and the last file are those of one process."""
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    close(saved(folder).tensors, saved(whole).tensors)


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Same names, shapes and dtypes, and numbers that agree to tolerance of the largest."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        atol = tolerance * max(1e-3, float(tensor.abs().max())) if tensor.numel() else 0.0
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two sharded ones, whole and stopped; one stopped by one process is gone on with."""
    found = tmp_path_factory.mktemp("sharded")
    (found / "alone.json").write_text(json.dumps(train(found / "alone")))
    train(found / "resumed", stop=True)
    two_ranks.results(__file__, found)
    return found


@pytest.fixture(scope="module")
def told(place: Path) -> dict[str, Any]:
    return {name: json.loads((place / f"{name}.json").read_text()) for name in ("alone", "sharded", "resumed")}


@pytest.fixture(scope="module")
def ranks(place: Path) -> list[dict[str, Any]]:
    return [torch.load(place / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", ["sharded", "resumed"])
def test_a_sharded_run_is_the_run_of_one_process(name: str, place: Path, told: dict[str, Any]) -> None:
    """Of two ranks from the beginning, and of two that go on where one process stopped."""
    assert len(told["alone"]["losses"]) == 8
    as_one(told[name], place / name, told["alone"], place / "alone")


def test_one_process_goes_on_from_sharded_ranks(
    place: Path, told: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / "stopped"
    assert saved(folder).step == STOPPED
    assert saved(folder).values["surroundings"]["sharded"]
    as_one(train(folder), folder, told["alone"], place / "alone")
    assert "sharded True -> None" in capsys.readouterr().err


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_and_optimizer_comes_to_the_same(name: str, ranks: list[dict[str, Any]]) -> None:
    """As two ranks that each hold everything."""
    tolerance = 1e-5 if name == "float32" else 1e-9
    for rank in ranks:
        ordinary, losses = rank[name]["losses"]
        assert losses == pytest.approx(ordinary, rel=tolerance)
        assert len(set(losses)) == STEPS[name]
        close(rank[name]["tensors"][1], rank[name]["tensors"][0], tolerance)
        close(rank[name]["collected"][1], rank[name]["collected"][0], tolerance)


@pytest.mark.parametrize("name", STAGES)
def test_a_rank_holds_its_half(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank[name]["held"] == pytest.approx(0.5, abs=0.01)
        assert rank[name]["emptied"] == 0
    assert sum(rank[name]["held"] for rank in ranks) == pytest.approx(1)


def test_lars_takes_the_norms_of_whole_tensors(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for whole, parts in zip(*rank["lars"], strict=True):
            torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)


def test_all_ranks_stop_at_a_number_that_one_holds(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["told"] == ranks[1]["told"] == "1 tensors are not finite after step 3: stage.student.linear.weight"


def test_a_process_alone_and_compiled_blocks_are_told_why() -> None:
    recipe = config.override(config.Recipe(), {"shard": True})
    derived = plan.derive(recipe.pretrain, 1000, 1)
    assert "pretrain: shard changes nothing: one process has all of it" in plan.equations(
        "pretrain", recipe, derived, 1
    )
    many = plan.equations("pretrain", recipe, derived, 8)
    assert any("keeps 1/8 of weights" in line for line in many)
    assert not any("shard changes nothing" in line for line in many)
    with pytest.raises(UsageError, match="cannot be used") as raised:
        config.override(config.Recipe(), {"shard": True, "compile": True})
    assert "shard and compile" in raised.value.details[0]


def test_ranks_that_find_different_checkpoints_do_not_go_on(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["apart"] == ranks[1]["apart"]
    assert ranks[0]["apart"].startswith(
        f"the processes found different checkpoints of pretrain: of the steps [0, {STOPPED}]"
    )


def one_rank(place: Path) -> None:
    """What this rank does; rank 0 writes what the runs told."""
    for name in ("sharded", "resumed"):
        found = train(place / name, shard=True)
        if runtime.is_main():
            (place / f"{name}.json").write_text(json.dumps(found))
    train(place / "stopped", shard=True, stop=True)
    mine = {name: both_ways(name) for name in STAGES} | {
        "lars": lars(),
        "told": told_by_all(),
        "apart": two_disks(place),
    }
    torch.save(mine, place / f"{runtime.rank()}.pt")


if __name__ == "__main__":
    runtime.start("cpu")
    torch.set_num_threads(1)
    one_rank(Path(sys.argv[1]))
    runtime.finish()
