"""The losses against the paper's formula in plain loops, the reference's arrays, and two real processes."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import two_ranks
from fewlabels import runtime
from fewlabels.errors import UsageError
from fewlabels.model import contrast
from fewlabels.model.losses import contrast_accuracy, distillation_loss, nt_xent, nt_xent_with_queue


def unit(row: Tensor) -> Tensor:
    return row / row.norm()


def slow_nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Equation 1 of the paper, three loops: anchors, candidates, dimensions."""
    z = [unit(row) for row in first] + [unit(row) for row in second]
    n, losses = len(first), []
    for i, anchor in enumerate(z):
        similarity = []
        for other in z:
            similarity.append(sum(a * b for a, b in zip(anchor, other, strict=True)) / temperature)
        positive = similarity[(i + n) % (2 * n)]
        losses.append(-positive + sum(s.exp() for k, s in enumerate(similarity) if k != i).log())
    return sum(losses) / len(losses)


def slow_queue_loss(first, second, first_key, second_key, queue, temperature) -> Tensor:
    """Each anchor: its positive is the other view's key; negatives are the keys of other images, and the queue."""
    losses = []
    for anchors, positives in ((first, second_key), (second, first_key)):
        for i, anchor in enumerate(anchors):
            others = [key for keys in (first_key, second_key) for k, key in enumerate(keys) if k != i]
            score = lambda key, anchor=anchor: (unit(anchor) @ unit(key) / temperature).exp()  # noqa: E731
            denominator = score(positives[i]) + sum(score(key) for key in [*others, *queue])
            losses.append(-(score(positives[i]) / denominator).log())
    return sum(losses) / len(losses)


def projections(*shape: int, seed: int = 0, count: int = 2) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_(requires_grad=True)
        for _ in range(count)
    ]


def gradients(loss: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize(("n", "d", "temperature"), [(5, 3, 0.1), (4, 6, 1.0), (2, 2, 0.5)])
def test_nt_xent_is_the_papers_formula(n, d, temperature):
    views = projections(n, d)
    ours, theirs = nt_xent(*views, temperature), slow_nt_xent(*views, temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(ours, views), gradients(theirs, views), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", range(8))
def test_nt_xent_is_half_of_the_references(golden, case):
    arrays = np.load(golden / "ntxent.npz")
    hidden = torch.from_numpy(arrays[f"case{case}/hidden"]).double().requires_grad_()
    first, second = hidden.chunk(2)
    normalize = bool(arrays[f"case{case}/hidden_norm"])
    loss = nt_xent(first, second, float(arrays[f"case{case}/temperature"]), normalize=normalize)
    assert 2 * loss.item() == pytest.approx(float(arrays[f"case{case}/loss"]), rel=1e-6, abs=1e-5)
    (gradient,) = gradients(loss, [hidden])
    theirs = arrays[f"case{case}/grad"]
    np.testing.assert_allclose(2 * gradient.numpy(), theirs, rtol=0, atol=2e-5 * max(abs(theirs).max(), 1e-6))
    accuracy = float(arrays[f"case{case}/contrast_acc"])
    assert not normalize or contrast_accuracy(first, second).item() == pytest.approx(accuracy)


def test_nt_xent_of_one_image_is_zero():
    views = projections(1, 4)
    loss = nt_xent(*views)
    assert loss.item() == 0
    assert max(float(g.abs().max()) for g in gradients(loss, views)) < 1e-14


def test_nt_xent_is_float32_under_autocast_but_for_its_products():
    views = [view.detach().float().requires_grad_() for view in projections(6, 16)]
    cold = contrast.FLOOR_BF16 / 2  # bf16 products would be too coarse
    plain = nt_xent(*views, cold)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(*views, cold)
        warm = nt_xent(*views, 0.1)
        lengths = nt_xent(*views, 0.1, normalize=False)
        keys = nt_xent_with_queue(*views, *views, torch.eye(3, 16), cold)
        from_bf16 = nt_xent(*[view.bfloat16() for view in views], cold)
    assert torch.equal(loss, plain)
    assert not torch.equal(warm, nt_xent(*views, 0.1))
    assert torch.equal(lengths, nt_xent(*views, 0.1, normalize=False))
    assert torch.equal(keys, nt_xent_with_queue(*views, *views, torch.eye(3, 16), cold))
    assert from_bf16.dtype == warm.dtype == torch.float32
    assert from_bf16.item() == pytest.approx(plain.item(), rel=0.05)


@pytest.mark.parametrize("state", ["random", "clusters", "learned"])
@pytest.mark.parametrize("temperature", [1.0, 0.1, contrast.FLOOR_BF16])
def test_bf16_products_move_the_loss_by_a_ten_thousandth(state, temperature):
    torch.manual_seed(0)
    own = torch.randn(700, 128)
    if state == "clusters":
        own = own + torch.randn(20, 128)[torch.arange(700) % 20]
    noise = {"random": 3.0, "clusters": 0.3, "learned": 0.2}[state]
    views = [own + noise * torch.randn(700, 128) for _ in range(2)]
    exact = [view.double().requires_grad_() for view in views]
    rough = [view.requires_grad_() for view in views]
    wanted = nt_xent(*exact, temperature)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nt_xent(*rough, temperature)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-5)
    slopes = [torch.cat(gradients(loss, given)) for loss, given in ((found, rough), (wanted, exact))]
    assert (slopes[0] - slopes[1]).norm() < 1e-2 * slopes[1].norm()


@pytest.mark.parametrize("rows", [0, 7])
def test_queue_loss_is_its_definition(rows):
    views = projections(4, 5)
    keys = projections(4, 5, seed=1)
    queue = projections(rows, 5, seed=2)[0]
    ours = nt_xent_with_queue(*views, *keys, queue, 0.2)
    theirs = slow_queue_loss(*views, *keys, queue, 0.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(ours, views), gradients(theirs, views), rtol=1e-10, atol=1e-12)
    ours = nt_xent_with_queue(*views, *keys, queue, 0.2)
    assert torch.autograd.grad(ours, [*keys, queue, *views], allow_unused=True)[:3] == (None, None, None)


def test_queue_loss_without_a_queue_and_own_keys_has_the_value_of_nt_xent():
    views = projections(4, 5)
    empty = torch.empty(0, 5, dtype=torch.float64)
    torch.testing.assert_close(nt_xent_with_queue(*views, *views, empty, 0.1), nt_xent(*views, 0.1))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 2.0, 4.0])
def test_distillation_is_the_references(golden, temperature):
    arrays = np.load(golden / "losses.npz")
    case = f"kd_T{temperature}"
    student = torch.from_numpy(arrays[f"{case}/student"]).requires_grad_()
    teacher = torch.from_numpy(arrays[f"{case}/teacher"]).requires_grad_()
    loss = distillation_loss(student, teacher, temperature)
    assert loss.item() == pytest.approx(float(arrays[f"{case}/loss_paper_noT2"]), rel=1e-6)
    scaled = distillation_loss(student, teacher, temperature, scale_by_temperature_squared=True)
    assert scaled.item() == pytest.approx(float(arrays[f"{case}/loss_colab_T2"]), rel=1e-6)
    gradient, none = torch.autograd.grad(scaled, [student, teacher], allow_unused=True)
    assert none is None
    np.testing.assert_allclose(gradient.numpy(), arrays[f"{case}/grad_colab_T2"], rtol=1e-4, atol=1e-7)


def test_distillation_is_equation_2():
    student, teacher = projections(3, 4)
    temperature, total = 0.7, 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        labels = [math.exp(x / temperature) / sum(math.exp(y / temperature) for y in t) for x in t]
        predicted = [math.exp(x / temperature) / sum(math.exp(y / temperature) for y in s) for x in s]
        total -= sum(p * math.log(q) for p, q in zip(labels, predicted, strict=True))
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(total / 3, rel=1e-12)


def test_distillation_is_float32_under_autocast():
    student, teacher = (logits.detach().float() for logits in projections(3, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distillation_loss(student, teacher, 0.1)
        rounded = distillation_loss(student.bfloat16(), teacher.bfloat16(), 0.1)
    assert torch.equal(loss, distillation_loss(student, teacher, 0.1))
    assert rounded.dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_wrong_temperature(temperature):
    for loss in (
        lambda: nt_xent(*projections(4, 3), temperature),
        lambda: nt_xent_with_queue(*projections(4, 3, count=4), torch.empty(0, 3), temperature),
        lambda: distillation_loss(*projections(4, 3), temperature),
    ):
        with pytest.raises(UsageError, match="temperature"):
            loss()


def test_what_has_no_gradient_is_not_silently_constant():
    first, second = projections(4, 3)
    with pytest.raises(UsageError, match="second derivative"):
        torch.autograd.grad(nt_xent(first, second), first, create_graph=True)
    with pytest.raises(UsageError, match="the temperature requires a gradient"):
        nt_xent(first, second, torch.nn.Parameter(torch.tensor(0.1)))


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda: nt_xent(torch.rand(4, 3), torch.rand(5, 3)), r"\(4, 3\) and \(5, 3\)"),
        (lambda: nt_xent(torch.rand(0, 3), torch.rand(0, 3)), r"\(0, 3\)"),
        (lambda: nt_xent(torch.rand(4), torch.rand(4)), "same shape"),
        (lambda: nt_xent_with_queue(*[torch.rand(4, 3)] * 4, torch.rand(7, 2)), r"queue of \(7, 2\)"),
        (lambda: nt_xent_with_queue(*[torch.rand(4, 3)] * 2, *[torch.rand(5, 3)] * 2, torch.rand(7, 3)), "keys of"),
        (lambda: distillation_loss(torch.rand(4, 3), torch.rand(4, 2)), "same classes"),
    ],
)
def test_wrong_shapes(loss, says):
    with pytest.raises(UsageError, match=says):
        loss()


# --- tiles -------------------------------------------------------------------------------------------------


def dense(first: Tensor, second: Tensor, temperature: float, *, normalize: bool = True) -> Tensor:
    """The whole matrix at once, by torch's own cross-entropy."""
    z = torch.cat([first, second])
    z = torch.nn.functional.normalize(z, dim=1) if normalize else z
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


@pytest.mark.parametrize("tile", [3, 8, 64])
@pytest.mark.parametrize("temperature", [0.001, 0.02, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_tiles_of_any_size_are_the_whole_matrix(monkeypatch, tile, temperature, normalize):
    """Both ways, on and off the fast one, with a last tile that is not full; safe where exp would overflow."""
    monkeypatch.setattr(contrast, "TILE", tile)
    views = projections(19, 6)
    ours, theirs = (loss(*views, temperature, normalize=normalize) for loss in (nt_xent, dense))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients(ours, views), gradients(theirs, views), rtol=1e-8, atol=1e-11 / temperature)
    keys, queue = projections(19, 6, seed=1), projections(7, 6, seed=2)[0]
    ours = nt_xent_with_queue(*views, *keys, queue, 0.2)
    theirs = slow_queue_loss(*views, *keys, queue, 0.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients(ours, views), gradients(theirs, views), rtol=1e-9, atol=1e-11)


def test_float32_tiles_are_close_to_float64():
    views = [view.detach().float().requires_grad_() for view in projections(1500, 32)]
    exact = [view.detach().double().requires_grad_() for view in views]
    ours, theirs = nt_xent(*views), dense(*exact, 0.1)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for found, wanted in zip(gradients(ours, views), gradients(theirs, exact), strict=True):
        assert (found - wanted).abs().max() < 2e-6 * wanted.abs().max()


def test_kernels_are_launched_on_the_device_of_the_projections(monkeypatch):
    """Triton takes the current device, which need not be theirs."""
    entered: list[torch.device] = []
    during: list[list[torch.device]] = []

    class Noted(torch.cuda.device_of):
        def __init__(self, rows: Tensor) -> None:
            super().__init__(rows)
            self.of = rows.device

        def __enter__(self) -> None:
            entered.append(self.of)
            super().__enter__()

        def __exit__(self, *raised: Any) -> None:
            entered.pop()
            super().__exit__(*raised)

    def kernel(plain):
        return lambda rows, *rest: during.append([*entered]) or plain(rows, *rest, rows.dtype)

    kernels = SimpleNamespace(row_sums=kernel(contrast._row_sums), row_gradient=kernel(contrast._row_gradient))
    views = [view.detach().float().requires_grad_() for view in projections(5, 3)]
    expected = gradients(nt_xent(*views), views)
    monkeypatch.setattr(torch.cuda, "device_of", Noted)
    monkeypatch.setattr(contrast, "compiled", lambda *_: kernels)
    torch.testing.assert_close(gradients(nt_xent(*views), views), expected)
    assert during == [[torch.device("cpu")]] * 2


def test_a_loss_that_is_scaled_scales_its_gradients():
    views = projections(5, 3)
    torch.testing.assert_close(
        gradients(3 * nt_xent(*views), views), tuple(3 * g for g in gradients(nt_xent(*views), views))
    )


# --- ranks -------------------------------------------------------------------------------------------------


def own_part(folder: Path) -> None:
    """What one rank computes: its loss on its half of the images, and the averaged gradient of a shared layer."""
    runtime.start("cpu")
    own = slice(4 * runtime.rank(), 4 * runtime.rank() + 4)
    found: dict[str, Tensor] = {}
    for name in ("nt_xent", "queue"):
        layer = shared_layer()
        tensors = [view[own] for view in projections(8, 6, count=4)]
        with torch.no_grad():
            keys = [layer(t) for t in tensors[2:]]
        views = [layer(t) for t in tensors[:2]]
        loss = nt_xent(*views) if name == "nt_xent" else nt_xent_with_queue(*views, *keys, memory())
        loss.backward()
        runtime.average_gradients(layer.parameters())
        found |= {f"{name} loss": loss.detach(), f"{name} gradient": layer.weight.grad}
        found["accuracy"] = contrast_accuracy(*views)
    torch.save(found, folder / f"{runtime.rank()}.pt")
    runtime.finish()


def shared_layer() -> torch.nn.Linear:
    layer = torch.nn.Linear(6, 5, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(projections(5, 6, seed=5)[0])
    return layer


def memory() -> Tensor:
    return projections(9, 5, seed=6)[0].detach()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_ranks.results(__file__, tmp_path_factory.mktemp("losses"))


def test_two_ranks_are_one_process(ranks):
    for name in ("nt_xent", "queue"):
        layer = shared_layer()
        views = [layer(t) for t in projections(8, 6, count=4)]
        keys = [view.detach() for view in views[2:]]
        views, slow = views[:2], slow_nt_xent if name == "nt_xent" else slow_queue_loss
        loss = slow(*views, *([] if name == "nt_xent" else [*keys, memory()]), 0.1)
        loss.backward()
        mean = sum(part[f"{name} loss"] for part in ranks) / 2
        torch.testing.assert_close(mean, loss.detach(), rtol=1e-10, atol=0)
        assert ranks[0][f"{name} loss"] != ranks[1][f"{name} loss"]
        for part in ranks:
            torch.testing.assert_close(part[f"{name} gradient"], layer.weight.grad, rtol=1e-9, atol=1e-10)
        accuracy = sum(part["accuracy"] for part in ranks) / 2
        torch.testing.assert_close(accuracy, contrast_accuracy(*views))


if __name__ == "__main__":
    own_part(Path(sys.argv[1]))


def test_products_are_torchs_where_onednns_are_not_to_be_had(monkeypatch):
    def changed(*_):
        raise RuntimeError("_linear_pointwise() expected at most 5 arguments")

    x, y = torch.rand(5, 3), torch.rand(4, 3)
    contrast._has_onednn.cache_clear()
    torch.testing.assert_close(contrast._product(x, y), x @ y.T)
    contrast._has_onednn.cache_clear()
    monkeypatch.setattr(contrast, "_onednn", changed)
    assert torch.equal(contrast._product(x, y), x @ y.T)
    contrast._has_onednn.cache_clear()
