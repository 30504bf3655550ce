"""Activations computed again: the same gradients and statistics, with less kept between forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from conftest import same
from fewlabels.errors import UsageError
from fewlabels.model.encoder import Encoder, Residual, Stem, encoder

NAMES = ["resnet18_0.125x_small", "resnet34_0.25x", "resnet50_0.25x_sk"]


def trained(body: Encoder, images: Tensor) -> tuple[dict[str, Tensor], int]:
    """Gradients and buffers after one backward; and the bytes of activations that were kept until then."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in body.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    for part in body.modules():
        if isinstance(part, Residual | Stem) and part.training:  # what enters a block is kept outside of autograd
            part.register_forward_pre_hook(lambda _, arguments: (pack(arguments[0]), None)[1])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        features = body(images)
        size = sum(kept.values())  # what backward packs while it computes again is not counted
        (features * torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)).sum().backward()
    return {n: p.grad for n, p in body.named_parameters() if p.grad is not None} | dict(body.named_buffers()), size


@pytest.mark.parametrize("frozen", [-1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_to_the_last_digits_with_less_kept(name: str, frozen: int) -> None:
    plain = encoder(name).double()
    for p in plain.parameters():
        nn.init.uniform_(p, -0.1, 0.2)
    plain.train().freeze(frozen)
    again = copy.deepcopy(plain)
    again.recompute(on=True)
    assert list(again.state_dict()) == list(plain.state_dict())
    images = torch.rand(4, 3, 40, 40, dtype=torch.float64)
    expected, whole = trained(plain, images)
    got, less = trained(again, images)
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-12, atol=1e-12, msg=key)
    assert less < 0.5 * whole, (less, whole)


def test_nothing_is_recomputed_where_nothing_is_learned() -> None:
    plain = encoder(NAMES[0])
    again = copy.deepcopy(plain)
    again.recompute(on=True)
    images = torch.rand(4, 3, 16, 16)
    assert torch.equal(again.eval()(images), plain.eval()(images))
    with torch.no_grad():
        assert torch.equal(again.train()(images), plain.train()(images))
    assert same(again.state_dict(), plain.state_dict())


def test_of_timm_only_models_without_batch_norm() -> None:
    encoder("timm:vit_tiny_patch16_224").recompute(on=True)
    with pytest.raises(UsageError, match="count every batch twice"):
        encoder("timm:resnet18").recompute(on=True)
