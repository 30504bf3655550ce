"""Batch norm alone and over two real processes, and the pools, against slow twins and the reference."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import two_ranks
from fewlabels import runtime
from fewlabels.errors import UsageError
from fewlabels.model import layers
from fewlabels.model.layers import BatchNorm, ConvNorm, SelectiveKernel, ShortcutPool, max_pool

SHAPES = [(6, 5), (6, 5, 3, 4)]
STEPS = 3


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """STEPS pairs of x (far from mean 0, to find cancellation) and the weights of its outputs in the loss."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)  # noqa: E731
    return [(draw() * 2 + 7, draw()) for _ in range(STEPS)]


def slow_twin(pairs: list[tuple[Tensor, Tensor]], weight: Tensor, bias: Tensor) -> dict[str, list[Tensor]]:
    """Batch norm by its definition, one channel after another, with autograd through everything."""
    running_mean, running_variance = torch.zeros_like(weight), torch.ones_like(weight)
    found: dict[str, list[Tensor]] = {"y": [], "dx": [], "dweight": [], "dbias": []}
    for x, importance in pairs:
        x, w, b = (t.detach().clone().requires_grad_() for t in (x, weight, bias))
        channels = []
        for c in range(x.shape[1]):
            values = x[:, c]
            mean = values.sum() / values.numel()
            variance = ((values - mean) ** 2).sum() / values.numel()
            channels.append((values - mean) / (variance + 1e-5).sqrt() * w[c] + b[c])
            running_mean[c] = 0.9 * running_mean[c] + 0.1 * mean.detach()
            running_variance[c] = 0.9 * running_variance[c] + 0.1 * variance.detach()
        y = torch.stack(channels, 1)
        (y * importance).mean().backward()
        for name, tensor in zip(found, (y.detach(), x.grad, w.grad, b.grad), strict=True):
            found[name].append(tensor)
    return found | {"running_mean": [running_mean], "running_variance": [running_variance]}


def ours(layer: BatchNorm, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, list[Tensor]]:
    """The same from our layer."""
    found: dict[str, list[Tensor]] = {"y": [], "dx": [], "dweight": [], "dbias": []}
    for x, importance in pairs:
        x = x.clone().requires_grad_()
        layer.zero_grad()
        y = layer(x)
        (y * importance).mean().backward()
        bias = layer.bias.grad.clone() if layer.bias is not None else torch.zeros(layer.weight.shape)
        for name, tensor in zip(found, (y.detach(), x.grad, layer.weight.grad.clone(), bias), strict=True):
            found[name].append(tensor)
    return found | {"running_mean": [layer.running_mean], "running_variance": [layer.running_variance]}


def started(channels: int = 5, dtype: torch.dtype = torch.float64, **kwargs: bool) -> BatchNorm:
    layer = BatchNorm(channels, **kwargs).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 1.5, channels))
        if layer.bias is not None:
            layer.bias.copy_(torch.linspace(-1, 1, channels))
    return layer


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batch_norm_is_its_definition(shape, dtype):
    layer = started(dtype=dtype)
    pairs = inputs(shape)
    twin = slow_twin(pairs, layer.weight.detach().double(), layer.bias.detach().double())
    found = ours(layer, [(x.to(dtype), importance.to(dtype)) for x, importance in pairs])
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for name, tensors in twin.items():
        for ours_, theirs in zip(found[name], tensors, strict=True):
            torch.testing.assert_close(ours_.double(), theirs, rtol=tolerance, atol=tolerance, msg=name)


def test_batch_norm_is_torchs_with_the_variance_corrected():
    layer, torchs = started(), nn.BatchNorm2d(5).double()
    x = inputs((6, 5, 3, 4))[0][0]
    layer(x)
    torchs(x)
    torch.testing.assert_close(layer.running_mean, torchs.running_mean)
    values = 6 * 3 * 4
    corrected = 0.9 + (torchs.running_var - 0.9) * (values - 1) / values
    torch.testing.assert_close(layer.running_variance, corrected, rtol=1e-12, atol=0)
    assert not torch.allclose(layer.running_variance, torchs.running_var, rtol=1e-3)


def test_batch_norm_without_shift_and_with_zero_scale():
    pairs = inputs((6, 5))
    layer = started(bias=False)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    twin = slow_twin(pairs, layer.weight.detach(), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(ours(layer, pairs)["dx"], twin["dx"])
    assert not BatchNorm(5, zero_scale=True)(pairs[0][0].float()).any()


def test_inference_uses_the_running_statistics_and_leaves_them():
    layer = started().eval()
    layer.running_mean.fill_(2.0)
    layer.running_variance.fill_(4.0)
    x = inputs((6, 5))[0][0]
    torch.testing.assert_close(layer(x), (x - 2) / (4 + 1e-5) ** 0.5 * layer.weight + layer.bias)
    assert torch.equal(layer.running_mean, torch.full((5,), 2.0, dtype=torch.float64))


def test_two_forwards_before_one_backward():
    layer = started()
    (first, _), (second, _), _ = inputs((6, 5, 3, 4))
    first = first.requires_grad_()
    together = (layer(first) ** 3).sum() + (layer(second) ** 3).sum()
    together.backward()
    with_both = first.grad.clone()
    first.grad = None
    (started()(first) ** 3).sum().backward()
    torch.testing.assert_close(first.grad, with_both)


def test_one_image_cannot_be_normalised():
    with pytest.raises(UsageError, match="at least 2 images"):
        BatchNorm(5)(torch.rand(1, 5))
    BatchNorm(5)(torch.rand(1, 5, 2, 1))  # two values per channel


# --- two processes -----------------------------------------------------------------------------------------

UNEVEN = (4, 2)  # images of each rank


def shares(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[list[tuple[Tensor, Tensor]]]:
    """inputs(shape), cut for each rank; the loss weights undo that the loss is a mean over unequal shares."""
    cut: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for x, importance in inputs(shape, dtype):
        for rank, (own, own_importance) in enumerate(
            zip(x.split(list(UNEVEN)), importance.split(list(UNEVEN)), strict=True)
        ):
            # mean over ranks of means over shares = mean over all, once each share is weighted by its size
            cut[rank].append((own, own_importance * (2 * UNEVEN[rank] / sum(UNEVEN))))
    return cut


def own_part(folder: Path) -> None:
    """What one rank computes."""
    runtime.start("cpu")
    rank = runtime.rank()
    found: dict[str, object] = {"world": runtime.world_size()}
    for shape in SHAPES:
        for dtype in (torch.float64, torch.float32):
            layer = started(dtype=dtype)
            results = {name: [] for name in ("y", "dx", "dweight", "dbias")}
            for pair in shares(shape, dtype)[rank]:
                part = ours(layer, [pair])
                runtime.average_gradients(layer.parameters())
                part |= {"dweight": [layer.weight.grad.clone()], "dbias": [layer.bias.grad.clone()]}
                for name in results:
                    results[name] += part[name]
            results |= {"running_mean": [layer.running_mean], "running_variance": [layer.running_variance]}
            found[f"{len(shape)}-{dtype}"] = results
    plain = started(bias=False)
    found["no shift"] = ours(plain, shares((6, 5))[rank])["y"]
    half = started(dtype=torch.float32)(shares((6, 5, 3, 4), torch.bfloat16)[rank][0][0])
    found["bf16"] = half.detach()
    empty = started()(inputs((6, 5))[0][0] if rank == 0 else torch.empty(0, 5, dtype=torch.float64))
    found["empty share"] = empty.detach()
    torch.save(found, folder / f"{rank}.pt")
    runtime.finish()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return two_ranks.results(__file__, tmp_path_factory.mktemp("batch_norm"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_ranks_are_one_process(ranks, shape, dtype):
    assert [part["world"] for part in ranks] == [2, 2]
    alone = started()
    twin = slow_twin(inputs(shape), alone.weight.detach(), alone.bias.detach())
    parts = [part[f"{len(shape)}-{dtype}"] for part in ranks]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for name, theirs in twin.items():
        for step, tensor in enumerate(theirs):
            if name == "y":
                found = torch.cat([part[name][step] for part in parts])
            elif name == "dx":
                # each rank's gradient is of its own loss; the mean over ranks is half of their sum
                found = torch.cat([part[name][step] for part in parts]) / 2
            else:
                assert torch.equal(parts[0][name][step], parts[1][name][step])
                found = parts[0][name][step]
            torch.testing.assert_close(found.double(), tensor, rtol=tolerance, atol=tolerance, msg=f"{name} {step}")


def test_two_ranks_without_shift_in_bf16_and_with_an_empty_share(ranks):
    twin = slow_twin(inputs((6, 5)), started().weight.detach(), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(torch.cat([part["no shift"][0] for part in ranks]), twin["y"][0])
    half = torch.cat([part["bf16"] for part in ranks])
    assert half.dtype == torch.bfloat16
    rounded = [(x.double(), importance.double()) for x, importance in inputs((6, 5, 3, 4), torch.bfloat16)]
    twin = slow_twin(rounded, started().weight.detach(), started().bias.detach())
    torch.testing.assert_close(half.double(), twin["y"][0], rtol=2**-8, atol=2**-8)
    twin = slow_twin(inputs((6, 5)), started().weight.detach(), started().bias.detach())
    torch.testing.assert_close(ranks[0]["empty share"], twin["y"][0])
    assert ranks[1]["empty share"].shape == (0, 5)


@pytest.mark.parametrize("replicas", [2, 4])
def test_global_statistics_are_the_references(golden, monkeypatch, replicas):
    arrays = np.load(golden / "multi_replica.npz")
    shares = torch.from_numpy(arrays[f"R{replicas}/syncbn/x"]).permute(0, 1, 4, 2, 3).double()  # (R, n, C, H, W)
    sent: list[Tensor] = []
    monkeypatch.setattr(runtime, "world_size", lambda: replicas)
    monkeypatch.setattr(runtime, "gather", lambda x: sent.append(x) or x)
    for share in shares:
        layers._global_statistics(share)
    everything = torch.cat(sent)
    monkeypatch.setattr(runtime, "gather", lambda x: everything)
    for rank, share in enumerate(shares):
        layer = BatchNorm(5).double()
        y = torch.from_numpy(arrays[f"R{replicas}/syncbn/y"][rank]).permute(0, 3, 1, 2).double()
        torch.testing.assert_close(layer(share), y, rtol=1e-5, atol=1e-5)
        for ours_, theirs in ((layer.running_mean, "moving_mean"), (layer.running_variance, "moving_variance")):
            theirs = torch.from_numpy(arrays[f"R{replicas}/syncbn/{theirs}"]).double()
            torch.testing.assert_close(ours_, theirs, rtol=1e-5, atol=1e-6)


# --- pools and selective kernels ---------------------------------------------------------------------------


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """TensorFlow's SAME: ceil(size/stride) windows, the padding split with the larger half at the end."""
    count = -(-size // stride)
    before = max((count - 1) * stride + window - size, 0) // 2
    return [i * stride - before for i in range(count)]


def slow_pool(x: Tensor, window: int, stride: int, reduce) -> Tensor:
    rows, columns = (window_starts(size, window, stride) for size in x.shape[2:])
    out = torch.empty(*x.shape[:2], len(rows), len(columns), dtype=x.dtype)
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            real = x[:, :, max(top, 0) : top + window, max(left, 0) : left + window]
            out[:, :, i, j] = reduce(real)
    return out


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (8, 5), (5, 8), (2, 1), (1, 3)])
def test_max_pool_is_same(size):
    x = torch.randn(2, 3, *size)
    assert torch.equal(max_pool(x), slow_pool(x, 3, 2, lambda real: real.amax((2, 3))))


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (8, 5), (1, 3)])
def test_shortcut_pools(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    # stride 1: SAME, the mean over real pixels; stride 2: the padding counts as zeros
    torch.testing.assert_close(ShortcutPool(1)(x), slow_pool(x, 2, 1, lambda real: real.mean((2, 3))))
    torch.testing.assert_close(ShortcutPool(2)(x), slow_pool(x, 2, 2, lambda real: real.sum((2, 3)) / 4))


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (8, 16), (12, 9)])
def test_a_narrow_strided_shortcut_has_the_gradient_of_float64(channels, side):
    layer = ConvNorm(channels, 2 * channels, stride=2).to(memory_format=torch.channels_last)
    x = torch.randn(9, channels, side, side).to(memory_format=torch.channels_last)
    twin = nn.functional.conv2d(x.double(), (weight := layer.conv.weight.detach().double().requires_grad_()), stride=2)
    pull = torch.randn_like(twin)
    (twin * pull).sum().backward()
    layer.norm, layer.relu, before = nn.Identity(), False, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(20):  # with torch's own stride: a segmentation fault, or a heap that is broken later
            layer.zero_grad()
            found = layer(x)
            (found * pull.float()).sum().backward()
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found.double(), twin.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.conv.weight.grad.double(), weight.grad, atol=1e-4, rtol=1e-5)


def test_selective_kernel_mixes_two_branches_by_a_softmax():
    unit = SelectiveKernel(6, 40, stride=2, ratio=0.75).double()
    assert SelectiveKernel(6, 40, stride=1, ratio=1 / 16).squeeze.conv.out_channels == 32
    assert unit.squeeze.conv.out_channels == 30 + 2  # at least 32
    assert SelectiveKernel(6, 64, stride=1, ratio=0.75).squeeze.conv.out_channels == 48
    x = torch.randn(3, 6, 7, 7, dtype=torch.float64)
    y = unit.branches(x)
    first, second = y[:, :40], y[:, 40:]
    preference = unit.mix(unit.squeeze((first + second).mean((2, 3), keepdim=True)))
    shares_ = torch.stack([preference[:, :40], preference[:, 40:]]).softmax(0)
    torch.testing.assert_close(unit(x), shares_[0] * first + shares_[1] * second)


if __name__ == "__main__":
    own_part(Path(sys.argv[1]))
