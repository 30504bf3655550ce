"""The largest batch: what small steps say about a large one, against the large one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import shapes_images
from fewlabels import runtime
from fewlabels.config import PretrainRecipe
from fewlabels.data import labels, pixels, sources
from fewlabels.data.loader import Batch
from fewlabels.errors import UsageError
from fewlabels.model.encoder import encoder
from fewlabels.model.heads import ProjectionHead
from fewlabels.runfolder import Interrupts, RunFolder
from fewlabels.stages import memory, runner
from fewlabels.stages.chunks import Chunks
from fewlabels.stages.pretrain import Pretrain
from fewlabels.stages.runner import Job, Workplace

CPU = torch.device("cpu")
IMAGES = 256

pytestmark = pytest.mark.skipif(not memory._can_measure(CPU), reason="this system does not tell a process's peak")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return place_in(tmp_path_factory.mktemp("run"))


def place_in(folder: Path) -> Workplace:
    images, _ = shapes_images(IMAGES, size=32)
    source = sources.open_source(images)
    store, kept, _ = pixels.build(
        source, folder / "data", working_size=None, max_bad_share=0.05, threads=1, bad_csv=folder / "bad.csv"
    )
    dataset = labels.assemble(source, store, kept)
    return Workplace(RunFolder(folder), dataset, CPU, runtime.precision(CPU, "fp32"), Interrupts())


def view(batch: Batch, number: int) -> torch.Tensor:
    return (batch.pixels.float() / 255 + 0.1 * number).contiguous(memory_format=torch.channels_last)


def job(place: Workplace, batch: int, *, chunk: int = 0, recompute: bool = False) -> Job:
    torch.manual_seed(0)
    body = encoder("resnet18_0.25x_small").to(memory_format=torch.channels_last)
    body.recompute(on=recompute)
    stage = Pretrain(
        body, ProjectionHead(body.feature_dim, 32), view=view, temperature=0.2, chunks=Chunks(chunk) if chunk else None
    )
    schedule = PretrainRecipe(epochs=9, batch=batch, chunk=chunk)
    return Job(name="pretrain", stage=stage, schedule=schedule, ids=place.dataset.train, seed=0, identity={})


def said_and_was(*, recompute: bool) -> tuple[float, float, float]:
    """Bytes at the peak of a step of all images: foreseen from a quarter of them, measured, and before it."""
    with tempfile.TemporaryDirectory() as temporary:
        place = place_in(Path(temporary))
        needed = memory.need(job(place, IMAGES // 4, recompute=recompute), place)
        assert needed is not None
        large = job(place, IMAGES, recompute=recompute)
        state = large.state()
        state.stage.train()
        with memory._exact_peaks():
            memory._forget_peak(CPU)
            resting = memory._peak(CPU)
            peak = memory._peak_of_a_step(large, place, state, IMAGES)
    fixed, image = needed
    return fixed + image * IMAGES, peak, resting


def image_of(*, chunk: int = 0, recompute: bool = False) -> float:
    """Bytes that one more image of a step needs."""
    with tempfile.TemporaryDirectory() as temporary:
        place = place_in(Path(temporary))
        needed = memory.need(job(place, 128, chunk=chunk, recompute=recompute), place)
    assert needed is not None
    return needed[1]


def alone(measurement: str) -> list[float]:
    """What it returns in a process of its own: what other tests leave in theirs may be given back meanwhile."""
    program = f"import json, test_memory; print(json.dumps(test_memory.{measurement}))"
    paths = os.pathsep.join([*map(str, (Path(__file__).parent, Path(__file__).parents[1])), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    print(f"{measurement}: {done.stdout.strip()} bytes")
    return list(np.ravel(json.loads(done.stdout)))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_batch_four_times_as_large_needs_what_was_said(recompute: bool) -> None:
    said, peak, resting = alone(f"said_and_was(recompute={recompute})")
    assert said == pytest.approx(peak, rel=0.25)
    assert said - resting == pytest.approx(peak - resting, rel=0.25)  # what grows, without what rests


def test_chunks_and_recomputation_need_less_for_an_image() -> None:
    plain, chunked, again = (alone(f"image_of({how})")[0] for how in ("", "chunk=16", "recompute=True"))
    assert chunked < 0.3 * plain
    assert again < 0.7 * plain


def test_the_largest_batch_fills_the_room(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "need", lambda job, at: (100.0, 8.0))
    for room, largest in ((1000.0, 100), (120.0, 1), (50.0, 0), (1e9, IMAGES)):
        monkeypatch.setattr(memory, "_room", lambda device, room=room: room)
        assert memory.largest_batch(job(place, 64), place) == largest
    monkeypatch.undo()
    few = replace(job(place, 64), ids=place.dataset.train[:6])
    assert memory.largest_batch(few, place) is None
    monkeypatch.setattr(memory, "_can_measure", lambda device: False)
    assert memory.largest_batch(job(place, 64), place) is None


@pytest.mark.parametrize("way", [runner.run, runner.seconds_per_step])
def test_too_little_memory_says_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[Job, Workplace], object]
) -> None:
    place = place_in(tmp_path)
    work, shown = job(place, 64), list[int]()
    states, coming = made_by(Job, "state", monkeypatch), made_by(runner, "training_batches", monkeypatch)

    def full(batch: Batch, number: int) -> torch.Tensor:
        shown.append(number)
        if len(shown) == 3:  # of the second step
            assert states[0].optimizer.state
            raise torch.OutOfMemoryError("of 80 GiB")
        return view(batch, number)

    def room(device: torch.device) -> float:
        assert len(states) == 1, "nothing was measured yet"
        assert not states[0].optimizer.state
        assert coming[0].gi_frame is None, "closed"
        return 1e12

    work.stage.view = full
    monkeypatch.setattr(memory, "_room", room)
    with pytest.raises(UsageError) as raised:
        way(work, place)
    assert raised.value.why == f"the largest batch that fits: about {IMAGES}"
    assert "--recompute" in raised.value.fix
    assert "smaller --pretrain.batch or --size or --pretrain.chunk" in raised.value.fix


def made_by(home: object, name: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What calls of home.name return from now on."""
    made, real = [], getattr(home, name)
    monkeypatch.setattr(home, name, lambda *asked, **how: made.append(real(*asked, **how)) or made[-1])
    return made


def test_no_batch_fits_where_none_can_be_measured(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("of 80 GiB")

    monkeypatch.setattr(memory, "need", no_room)
    assert memory.largest_batch(job(place, 64), place) == 0


def test_room_is_within_the_machine() -> None:
    assert 1e8 < memory._room(CPU) <= memory._kilobytes(Path("/proc/meminfo"), "MemTotal") * 1.1
