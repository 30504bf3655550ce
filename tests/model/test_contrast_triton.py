"""The GPU's tiles of NT-Xent against a softmax over the whole matrix, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fewlabels.model import contrast
from fewlabels.model.losses import nt_xent, nt_xent_with_queue

pytest.importorskip("triton")  # there is none for Windows and macOS
from triton.runtime.errors import OutOfResources

from fewlabels.model import contrast_triton

# Pairs, projections, temperature: one block and several, whole and not, log-sums that would overflow without a peak
CASES = [(1, 3, 0.5), (5, 16, 0.1), (70, 20, 0.1), (129, 130, 0.02), (40, 300, 1.0)]
EXACT, HALF = 2e-5, 2e-2  # relative errors of float32 and of bf16 operands


@pytest.mark.parametrize(("error", "found"), [
    (None, True), (OutOfResources(81_920, 65_536, "shared memory"), False), (OSError("no compiler"), False),
])  # fmt: skip
def test_where_tiles_do_not_fit_the_plain_ones_are_used(
    error: Exception | None, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a T4 only the gradient's do not, and only in float32: what a step asks for is tried before."""
    zeros, asked = torch.zeros, []

    def gradient(rows: torch.Tensor, *_: Any) -> None:
        asked.append((rows.shape[1], rows.dtype))
        if error is not None:
            raise error

    kernels = SimpleNamespace(row_sums=lambda rows, *_: rows[:, 0], row_gradient=gradient)
    monkeypatch.setattr(importlib, "import_module", lambda _: kernels)
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    contrast.compiled.cache_clear()
    try:
        assert (contrast.compiled("cuda", 128, torch.float32) is kernels) == found
        assert asked == [(128, torch.float32)]
        assert contrast.compiled("cpu", 128, torch.float32) is None
    finally:
        contrast.compiled.cache_clear()


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("width", [128, 500])
def test_the_kernels_compile_for_a_gpu(half: bool, width: int, kernels: list[Any]) -> None:
    rows = torch.zeros(300, width, dtype=torch.bfloat16 if half else torch.float32)
    sums = contrast_triton.row_sums(rows, rows, 0.1, 0)
    contrast_triton.row_gradient(rows, rows, sums, sums, 0.1, 0)
    contrast_triton.row_gradient(rows, rows, sums, None, 0.1, 0)
    assert [kernel.metadata.name for kernel in kernels] == ["_row_sums", "_row_gradient", "_row_gradient"]
    for kernel in kernels:
        assert kernel.asm["cubin"][:4] == b"\x7fELF"
        assert kernel.metadata.shared <= 227 * 1024  # bytes that a Hopper multiprocessor gives one program


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Relative errors of loss and gradients by case: what main() finds, in a process where Triton may interpret."""
    found = tmp_path_factory.mktemp("triton") / "errors.json"
    environment = os.environ | {"TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"}
    program = [sys.executable, str(Path(__file__)), str(found)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(found.read_text())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_are_those_of_the_whole_matrix(errors: dict[str, list[float]], case: Any) -> None:
    assert max(errors[f"{case}"]) < EXACT


@pytest.mark.parametrize("queue", [0, 37])
def test_with_keys_and_a_queue(errors: dict[str, list[float]], queue: int) -> None:
    assert max(errors[f"queue {queue}"]) < EXACT


@pytest.mark.parametrize("own", [0, 24])
def test_the_rows_of_one_rank_of_several(errors: dict[str, list[float]], own: int) -> None:
    assert max(errors[f"rank at {own}"]) < EXACT


def test_half_precision_operands_are_close(errors: dict[str, list[float]]) -> None:
    assert max(errors["half"]) < HALF


def test_the_same_bits_again(errors: dict[str, list[float]]) -> None:
    assert errors["again"] == [0.0, 0.0, 0.0]


def whole(first: torch.Tensor, second: torch.Tensor, temperature: float, keys: Any = None) -> torch.Tensor:
    """NT-Xent in float64, every similarity at once. keys: first and second keys and the queue, without gradients."""
    unit = [torch.nn.functional.normalize(x.double(), dim=1) for x in (first, second, *(keys or ()))]
    anchors = torch.cat(unit[:2])
    candidates = torch.cat(unit[2:]) if keys else anchors
    logits = anchors @ candidates.T / temperature
    logits = logits.masked_fill(torch.eye(*logits.shape, dtype=torch.bool), -torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(anchors)).roll(len(first)))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-3)).item()


def compare(loss: Any, twin: Any, first: torch.Tensor, second: torch.Tensor) -> list[float]:
    """Relative errors of the loss and of both gradients."""
    both = []
    for function in (loss, twin):
        inputs = [x.clone().requires_grad_() for x in (first, second)]
        value = function(*inputs)
        value.backward()
        both.append([value.detach(), *(x.grad for x in inputs)])
    return [relative(a, b) for a, b in zip(*both, strict=True)]


def of_a_rank(rows: torch.Tensor, own: int, count: int, operands: torch.dtype = torch.float32) -> list[float]:
    """Log-sums and gradient of the anchors from own on among the rows of several ranks, against plain sums."""
    anchors = rows[own : own + count]
    logits = anchors.double() @ rows.double().T / 0.1
    places = own + torch.arange(count)
    logits[torch.arange(count), places] = logits[torch.arange(count), places.roll(count // 2)] = -torch.inf
    everyone = (rows.double() @ rows.double().T / 0.1).logsumexp(1).float()
    given, candidates = anchors.to(operands), rows.to(operands)
    sums = contrast_triton.row_sums(given, candidates, 0.1, own)
    weights = (logits - everyone[own : own + count, None]).exp() + (logits - everyone).exp()
    found = contrast_triton.row_gradient(given, candidates, everyone[own : own + count], everyone, 0.1, own)
    return [relative(sums, logits.logsumexp(1)), relative(found, weights @ rows.double())]


def main(found: Path) -> None:
    """Compare, and write down the errors."""
    torch.manual_seed(0)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    contrast.compiled = lambda *_: contrast_triton  # type: ignore[assignment]
    errors: dict[str, list[float]] = {}
    for count, width, temperature in CASES:
        views = torch.randn(count, width), torch.randn(count, width)
        errors[f"{(count, width, temperature)}"] = compare(
            lambda a, b, t=temperature: nt_xent(a, b, t), lambda a, b, t=temperature: whole(a, b, t), *views
        )
    views = torch.randn(33, 24), torch.randn(33, 24)
    for queue in (0, 37):
        keys = torch.randn(33, 24), torch.randn(33, 24), torch.randn(queue, 24)
        errors[f"queue {queue}"] = compare(
            lambda a, b, k=keys: nt_xent_with_queue(a, b, *k, 0.1),
            lambda a, b, k=keys: whole(a, b, 0.1, (k[0], k[1], k[2])), *views,
        )  # fmt: skip
    rows = torch.nn.functional.normalize(torch.randn(72, 24), dim=1)
    for own in (0, 24):
        errors[f"rank at {own}"] = of_a_rank(rows, own, 24)

    # The interpreter computes in numpy, which knows no bf16: float16 goes the same way
    errors["half"] = of_a_rank(rows, 24, 24, torch.bfloat16 if torch.cuda.is_available() else torch.float16)
    losses = [lambda a, b: nt_xent(a, b, 0.1)] * 2
    errors["again"] = compare(*losses, *views)
    found.write_text(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
