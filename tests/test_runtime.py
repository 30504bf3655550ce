"""The number format: measured once, decided by a clear difference only, and kept by a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fewlabels as fl
from conftest import shapes_images
from fewlabels import runtime
from fewlabels.errors import UsageError
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
    monkeypatch.setattr(runtime, "_seconds_per_convolution", lambda form, device: measured[form])
    assert runtime.precision(CPU) == expected
    monkeypatch.setattr(runtime, "_has_bf16", lambda device: False)
    assert runtime.precision(CPU) == USUAL


def test_every_format_can_be_measured() -> None:
    for form in (USUAL, Precision(None, False), Precision(torch.bfloat16, True), Precision(torch.bfloat16, False)):
        assert 0 < runtime._seconds_per_convolution(form, CPU) < 10


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
