"""Gradient caching: chunk by chunk the loss, gradient and statistics of a graph that is kept in one piece."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fewlabels import runtime
from fewlabels.data.loader import Batch
from fewlabels.model import layers
from fewlabels.model.encoder import encoder
from fewlabels.model.heads import ProjectionHead
from fewlabels.model.layers import BatchNorm
from fewlabels.stages.chunks import Chunks
from fewlabels.stages.pretrain import Pretrain, PretrainWithMomentum

FP32 = runtime.precision(torch.device("cpu"), "fp32")  # float64 here, as the networks are
IMAGES = 13  # in chunks of at most 5: 5, 4 and 4


def view(batch: Batch, number: int) -> Tensor:
    return batch.pixels.double() / 255 + 0.1 * number * batch.pixels.double().cos()


def batch() -> Batch:
    pixels = torch.randint(0, 256, (IMAGES, 3, 8, 8), dtype=torch.uint8)
    rows = torch.arange(IMAGES)
    return Batch(pixels, torch.full((IMAGES, 2), 8), rows, torch.full((IMAGES,), -1), 0)


def stage(kind: str, chunks: Chunks | None, *, dropout: bool = False) -> Pretrain:
    torch.manual_seed(3)
    body = encoder("resnet18_0.125x_small")
    head = ProjectionHead(body.feature_dim, 8, 2)
    if dropout:
        head.layers[0].linear = nn.Sequential(nn.Dropout(0.4), head.layers[0].linear)
    for norm in (m for m in body.modules() if isinstance(m, BatchNorm)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # none at 0, which would switch its branch off
    count = 3 if "three views" in kind else 2
    if "momentum" not in kind:
        made = Pretrain(body, head, view=view, temperature=0.2, num_views=count, chunks=chunks)
    else:
        made = PretrainWithMomentum(
            body, head, view=view, temperature=0.2, momentum=0.9, queue=24, num_views=count, chunks=chunks
        )
        for tensor in made.average.parameters():
            tensor.data.add_(0.01 * torch.randn_like(tensor))
    return made.double().train()


def outcome(made: Pretrain, scalars: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, gradients and buffers by name; and, if there are any, the keys on their way into the memory."""
    found = {"loss": scalars["loss"].detach(), "accuracy": scalars["contrast_accuracy"]}
    found |= {f"gradient {name}": p.grad for name, p in made.named_parameters() if p.grad is not None}
    found |= {name: tensor.clone() for name, tensor in made.named_buffers()}
    return found | ({"keys": made._keys} if isinstance(made, PretrainWithMomentum) else {})


def cached(made: Pretrain, *, prepare: Callable[[nn.Module], None] = lambda module: None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    images = batch()
    prepare(made)
    torch.manual_seed(1)
    return outcome(made, made.backward(images, FP32))


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert any(name.startswith("gradient") and float(t.abs().max()) > 1e-3 for name, t in got.items())
    for name, tensor in expected.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=0, atol=1e-10 * max(1.0, float(tensor.abs().max())), msg=name
        )


def frozen(module: nn.Module) -> None:
    """Batch norm in inference mode: what is left has no statistics of a batch."""
    for norm in (m for m in module.modules() if isinstance(m, BatchNorm)):
        norm.eval()
        norm.running_variance.fill_(0.5)


@pytest.mark.parametrize("kind", ["plain", "three views", "momentum"])
@pytest.mark.parametrize("norm", ["chunk", "batch"])
def test_without_batch_statistics_it_is_the_whole_batch(norm: str, kind: str) -> None:
    whole = cached(stage(kind, None), prepare=frozen)
    assert_close(cached(stage(kind, Chunks(5, norm)), prepare=frozen), whole)


@pytest.mark.parametrize("kind", ["plain", "three views", "momentum", "momentum, three views"])
def test_with_the_chunks_own_statistics_it_is_a_graph_of_all_chunks(kind: str) -> None:
    """Dropout draws the same in both passes, running statistics move once."""
    chunks = Chunks(5, "chunk")
    got = cached(stage(kind, chunks, dropout=True))
    torch.manual_seed(0)
    images = batch()
    twin = stage(kind, None, dropout=True)
    start = {name: b.clone() for name, b in twin.named_buffers() if "running" in name}
    moved = {name: torch.zeros_like(b) for name, b in start.items()}
    torch.manual_seed(1)
    looked = []
    seeds = torch.randint(1 << 62, (3,)).tolist()
    for chunk, seed in zip(chunks.split(images), seeds, strict=True):
        torch.manual_seed(seed)
        for name, buffer in start.items():
            owner, _, its = name.rpartition(".")
            setattr(twin.get_submodule(owner), its, buffer.clone())  # not in place: the graph holds the others
        looked.append(twin.look(chunk))
        for name in start:
            moved[name] += twin.get_buffer(name) * len(chunk.ids) / IMAGES
    by_view = zip(*(projections.chunk(twin.num_views) for projections, _ in looked), strict=True)
    keys = None
    if "momentum" in kind:
        key_parts = zip(*(k.chunk(twin.num_views) for _, k in looked), strict=True)
        keys = torch.cat([part for parts in key_parts for part in parts])
    scalars = twin.compare(torch.cat([part for parts in by_view for part in parts]), keys)
    scalars["loss"].backward()
    expected = outcome(twin, scalars) | moved
    assert_close(got, expected)
    assert any(not torch.equal(got[name], start[name]) for name in moved)


def chunk_means(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    """Batch norm in one piece over the whole batch, whose gradient subtracts the means over a chunk's rows."""
    of_image = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    rows = torch.cat([of_image, of_image])  # (2B,) the chunk of every view

    def alone(self: BatchNorm, x: Tensor) -> Tensor:
        axes = [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(x.detach(), axes, correction=0, keepdim=True)
        self.running_mean.lerp_(mean.flatten(), 1 - layers.DECAY)
        self.running_variance.lerp_(variance.flatten(), 1 - layers.DECAY)
        normal = (x - mean) / (variance + layers.EPSILON).sqrt()
        fixed = normal.detach()

        def subtract(g: Tensor) -> Tensor:
            out = g.clone()
            for number in range(len(sizes)):
                mine = rows == number
                part, n = g[mine], fixed[mine]
                out[mine] -= part.mean(axes, keepdim=True) + n * (part * n).mean(axes, keepdim=True)
            return out

        if normal.requires_grad:
            normal.register_hook(subtract)
        shape = [1, -1] + [1] * (x.dim() - 2)
        y = normal * self.weight.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)

    monkeypatch.setattr(BatchNorm, "_alone", alone)


@pytest.mark.parametrize("kind", ["plain", "momentum"])
def test_with_the_batchs_statistics_only_two_means_of_the_gradient_differ(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = cached(stage(kind, Chunks(5, "batch")))
    whole = cached(stage(kind, None))
    assert_close(
        {n: t for n, t in got.items() if "gradient" not in n} | {"gradient": torch.ones(())},
        {n: t for n, t in whole.items() if "gradient" not in n} | {"gradient": torch.ones(())},
    )
    gradients = [torch.cat([t.flatten() for n, t in found.items() if "gradient" in n]) for found in (got, whole)]
    assert 0.5 < float(torch.cosine_similarity(*gradients, dim=0)) < 0.9999  # chunks of 4 and 5 images
    chunk_means(monkeypatch, [5, 4, 4])
    assert_close(got, cached(stage(kind, None)))


def test_chunks_are_few_and_equal() -> None:
    assert [len(c.ids) for c in Chunks(5).split(batch())] == [5, 4, 4]
    assert [len(c.ids) for c in Chunks(6).split(batch())] == [5, 4, 4]
    assert len(Chunks(13).split(batch())) == 1
    assert torch.equal(torch.cat([c.ids for c in Chunks(2).split(batch())]), torch.arange(IMAGES))
