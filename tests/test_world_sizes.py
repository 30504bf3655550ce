"""One, two and four processes are one run: the same images in every step, the same losses, also over a resume.

Run as a script it is one rank's part of that; see two_ranks.py.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import two_ranks
from conftest import shapes_images
from fewlabels import runtime
from fewlabels.config import Schedule
from fewlabels.data import labels, pixels, sources, views
from fewlabels.data.loader import Batch
from fewlabels.errors import Stopped
from fewlabels.model.encoder import encoder
from fewlabels.model.heads import ProjectionHead
from fewlabels.runfolder import Interrupts, RunFolder
from fewlabels.stages.pretrain import Pretrain
from fewlabels.stages.runner import Job, Workplace, run

BATCH, EPOCHS = 8, 3  # of 20 images: 2 steps an epoch, so that every permutation leaves some out
STOPPED = 3


def train(folder: Path, *, stop: bool = False, shard: bool = False, count: int = 20) -> dict[str, Any]:
    """A short pretraining in folder, from wherever that stands; the ids of every step and the losses."""
    images, classes = shapes_images(count)
    source = sources.open_source(images, [None] * len(classes))
    with runtime.main_first():
        if runtime.is_main() and not (folder / "data").exists():
            folder.mkdir(parents=True)
            pixels.build(
                source, folder / "data", working_size=None, max_bad_share=0, threads=1, bad_csv=folder / "bad.csv"
            )
    store = pixels.open_store(folder / "data")
    dataset = labels.assemble(source, store, torch.arange(len(images)).numpy())
    interrupts, seen = Interrupts(), []

    def view(batch: Batch, number: int) -> torch.Tensor:
        if number == 0:
            seen.append(runtime.gather(batch.ids).tolist())
            interrupts.received = 15 if stop and len(seen) == STOPPED else None
        made = views.pretrain(
            batch.pixels, batch.extent, batch.ids, size=16, epoch=batch.epoch, seed=1, view=number, blur=False
        )
        return made.double()

    torch.manual_seed(0)
    body = encoder("resnet18_0.125x_small")
    stage = Pretrain(body, ProjectionHead(body.feature_dim, 16), view=view, temperature=0.2).double()
    schedule = Schedule(epochs=EPOCHS, batch=BATCH, learning_rate=0.5, scaling="none", warmup=0.0)
    job = Job(name="pretrain", stage=stage, schedule=schedule, ids=dataset.train, seed=3, identity={}, shard=shard)
    cpu = torch.device("cpu")
    at = Workplace(RunFolder(folder), dataset, cpu, runtime.precision(cpu, "fp32"), interrupts)
    try:
        run(job, at)
        assert not stop
    except Stopped:
        assert stop
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"ids": seen, "losses": [line["loss"] for line in lines]}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders in which 1, 2 and 4 processes trained `part` up to step STOPPED; 2 and 4 also what told.json says."""
    found = {world: tmp_path_factory.mktemp(f"world{world}") for world in (1, 2, 4)}
    train(found[1] / "part", stop=True)
    for world in (2, 4):
        shutil.copytree(found[world // 2] / "part", found[world] / "from-fewer")
        told = two_ranks.results(__file__, found[world], world)
        assert all(rank["same"] for rank in told)
    return found


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "told.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_is_one(world: int, begun: dict[int, Path], alone: dict[str, Any]) -> None:
    together = told(begun[world])["whole"]
    assert len(alone["ids"]) == 8  # 20 x 3 // 8 + 1
    assert together["ids"] == alone["ids"]
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_one_image_for_each_process_is_enough(world: int, begun: dict[int, Path], tmp_path: Path) -> None:
    """Batch norm's statistics are those of all of them."""
    assert told(begun[world])["one-each"] == pytest.approx(train(tmp_path / "run", count=world)["losses"], rel=1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_a_resume_on_more_processes_keeps_the_order(world: int, begun: dict[int, Path], alone: dict[str, Any]) -> None:
    """1 -> 2 and 2 -> 4 processes in the middle of the second epoch."""
    resumed = told(begun[world])["from-fewer"]
    assert resumed["ids"] == alone["ids"][STOPPED:]
    assert resumed["losses"] == pytest.approx(alone["losses"], rel=1e-5)  # those before the stop too


def test_a_resume_on_fewer_processes_keeps_the_order(begun: dict[int, Path], alone: dict[str, Any]) -> None:
    """4 -> 1."""
    resumed = train(begun[4] / "part")
    assert resumed["ids"] == alone["ids"][STOPPED:]
    assert resumed["losses"] == pytest.approx(alone["losses"], rel=1e-5)


if __name__ == "__main__":
    runtime.start("cpu")
    place = Path(sys.argv[1])
    mine = {"whole": train(place / "whole"), "from-fewer": train(place / "from-fewer")}
    mine["one-each"] = train(place / "one-each", count=runtime.world_size())["losses"]
    train(place / "part", stop=True)
    if runtime.is_main():
        (place / "told.json").write_text(json.dumps(mine))
    same = [mine["whole"]["ids"]] * runtime.world_size() == runtime.from_all(mine["whole"]["ids"])
    torch.save({"same": same}, place / f"{runtime.rank()}.pt")
    runtime.finish()
