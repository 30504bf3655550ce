"""The number format: measured once, decided by a clear difference only, and kept by a run that goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import fewlabels as fl
import many_ranks
from conftest import shapes_images
from fewlabels import runtime
from fewlabels.errors import RunAgain, UsageError
from fewlabels.runtime import Precision

CPU = torch.device("cpu")
USUAL = Precision(None, channels_last=True)


@pytest.mark.parametrize(
    ("seconds", "expected"),  # of float32 and bf16, each in channels_last and not
    [
        ((1.0, 1.0, 0.5, 0.7), Precision(torch.bfloat16, channels_last=True)),
        ((1.0, 1.0, 0.5, 0.45), Precision(torch.bfloat16, channels_last=True)),
        ((1.0, 1.0, 0.7, 0.5), Precision(torch.bfloat16, channels_last=False)),
        ((1.0, 0.6, 3.0, 3.0), Precision(None, channels_last=False)),
        ((1.0, 0.9, 0.85, 3.0), USUAL),
        ((1.0, 2.0, 2.0, 2.0), USUAL),
    ],
)
def test_only_a_clear_difference_decides(
    seconds: tuple[float, ...], expected: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {
        Precision(None, True): seconds[0], Precision(None, False): seconds[1],
        Precision(torch.bfloat16, True): seconds[2], Precision(torch.bfloat16, False): seconds[3],
    }  # fmt: skip
    monkeypatch.setattr(runtime, "_has_bf16", lambda device: True)
    monkeypatch.setattr(runtime, "_seconds_per_convolution", lambda form: measured[form])
    assert runtime.precision(CPU) == expected
    monkeypatch.setattr(runtime, "_has_bf16", lambda device: False)
    assert runtime.precision(CPU) == USUAL


@pytest.mark.parametrize("there", [False, True])
def test_a_gpu_that_has_bf16_computes_in_it(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: there and not including_emulation)
    monkeypatch.delattr(runtime, "_seconds_per_convolution")  # the CPU would be measured
    found = runtime.precision(torch.device("cuda"))
    assert found == Precision(torch.bfloat16 if there else None, channels_last=True)


def test_every_format_can_be_measured() -> None:
    for form in (USUAL, Precision(None, False), Precision(torch.bfloat16, True), Precision(torch.bfloat16, False)):
        assert 0 < runtime._seconds_per_convolution(form) < 10


def test_what_was_asked_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(runtime, "_fastest")
    assert runtime.precision(CPU, "fp32") == USUAL
    assert runtime.precision(CPU, "bf16") == Precision(torch.bfloat16, channels_last=True)
    with pytest.raises(UsageError, match="fp8"):
        runtime.precision(CPU, "fp8")


def test_a_run_that_goes_on_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = shapes_images(32)
    wishes = {"recipe": "smoke", "precision": "auto", "until": "pretrain"}
    answers = [Precision(torch.bfloat16, channels_last=False), USUAL]
    monkeypatch.setattr(runtime, "_fastest", lambda device: answers.pop(0))
    for _ in range(2):
        run = fl.fit(images, out=tmp_path / "run", **wishes)
        resolved = json.loads((run.path / "resolved.json").read_text())
        assert (resolved["precision"], resolved["channels_last"]) == ("bf16", False)
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_idle_threads_spin_briefly_unless_the_user_says_how(given: dict[str, str], wanted: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    program = "import fewlabels, os, sys; print(os.environ.get('GOMP_SPINCOUNT')); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], env=kept | given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == wanted


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as Linux tells it")
def test_freed_memory_stays_for_the_next_step() -> None:
    """In a process of its own: of 64 MB in pieces too small to be mapped, glibc gives back what is freed at the end."""
    program = """
import sys, torch
from fewlabels import runtime
if sys.argv[1] == "keep":
    runtime.keep_freed_memory()
page = 4096
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * page
before = resident()
pieces = [torch.ones(25_000) for _ in range(640)]
del pieces
print(resident() - before)
"""
    found = {}
    for how in ("keep", "usual"):
        done = subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True)
        found[how] = int(done.stdout)
    if found["usual"] > 32e6:
        pytest.skip("this malloc keeps what is freed by itself")
    assert found["keep"] > 60e6


@pytest.mark.parametrize(("name", "rank", "there"), [("auto", 5, 4), ("cuda", 1, 1), ("cuda:3", 0, 3)])
def test_more_processes_than_gpus(name: str, rank: int, there: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    with pytest.raises(UsageError, match=rf'there is no "cuda:{max(rank, there)}"') as refused:
        runtime.device(name)
    assert f"torch sees {there}" in str(refused.value.fix)


def test_one_gpu_is_not_shared_by_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for processes in ("1", "2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert runtime.device("cuda") == runtime.device("cuda:1") == torch.device("cuda:1")
        if processes == "1":
            assert runtime.device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(UsageError, match='"cuda:0" is one GPU for 2 processes'):
        runtime.device("cuda:0")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_comes_is_not_waited_for_long(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    port = many_ranks.free_port()
    for name, value in many_ranks.variables(rank, 2, port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime, "JOINING", timedelta(seconds=2))
    # as under torchrun, whose agent holds the store: it is there, but the other process is not
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    agent = torch.distributed.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    with pytest.raises(RunAgain, match="not all of the 2 processes came"):
        runtime.start("cpu")
    del agent


def test_without_a_store_to_meet_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in many_ranks.variables(1, 2, many_ranks.free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runtime, "JOINING", timedelta(seconds=2))
    with pytest.raises(RunAgain, match="not all of the 2 processes came"):
        runtime.start("cpu")


def test_a_world_that_nobody_started_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError) as refused:
        runtime.start("cpu")
    assert "unset WORLD_SIZE" in refused.value.fix


def test_gradients_of_two_kinds_are_averaged_in_one_order_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kinds stood in a set, whose order is that of addresses: ranks could have added one kind to another."""
    weights = [torch.nn.Parameter(torch.ones(2, dtype=kind)) for kind in (torch.float64, torch.float32, torch.float64)]
    for i, weight in enumerate(weights):
        weight.grad = torch.full_like(weight, i + 1.0)
    sent = []

    def all_reduce(flat: torch.Tensor) -> None:
        sent.append(flat.tolist())
        flat.mul_(4)  # the other rank's are three times as large

    monkeypatch.setattr(runtime, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    runtime.average_gradients(weights)
    assert sent == [[1.0, 1.0, 2.0, 2.0, 3.0, 3.0]]
    assert [weight.grad.tolist() for weight in weights] == [[2.0 * i] * 2 for i in (1, 2, 3)]
