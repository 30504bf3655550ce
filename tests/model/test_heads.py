"""The projection head, its taps, and the classifier, against the reference's fine-tuning."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fewlabels.errors import UsageError
from fewlabels.model.encoder import encoder, resnet
from fewlabels.model.heads import Classifier, ProjectionHead
from reference_weights import deterministic, fill, images, relative, tensors_by_name
from small_model import count_parameters


@pytest.mark.parametrize("tap", [0, 1, 2, 3])
def test_logits_at_each_tap_are_the_references(golden, tap):
    weights = np.load(golden / "encoder_r18_w8th_cifar32.npz")
    arrays = np.load(golden / "finetune_forward_r18_w8th_cifar32.npz")
    selector = -1 if tap == 3 else tap
    net = resnet(18, width=1 / 8, stem="small")
    head = ProjectionHead(net.feature_dim, 16)
    model = Classifier(net, head, tap=tap, num_classes=10).double()
    tensors = tensors_by_name(encoder=net, head=head.double(), linear=model.linear)
    kernel = "head_supervised/linear_layer/dense/kernel"
    stored = {name: weights[f"w/{name}"] for name in tensors if name != kernel}
    fill({name: tensor for name, tensor in tensors.items() if name != kernel}, stored)
    with torch.no_grad():
        model.linear.weight.copy_(deterministic(kernel, tuple(model.linear.weight.shape)))
    for mode in ("eval", "train"):
        logits = model.train(mode == "train")(images(arrays["x"]))
        assert relative(logits, arrays[f"sel{selector}/{mode}/logits_sup"]) < 1e-6


def test_taps_are_the_layers_one_after_another():
    head = ProjectionHead(6, 4).eval()
    x = torch.randn(5, 6)
    assert head(x, upto=0) is x
    found = x
    for tap in (1, 2, 3):
        found = head.layers[tap - 1](found)
        assert torch.equal(head(x, upto=tap), found)
        assert found.shape == (5, head.width(tap))
    assert torch.equal(head(x), found)
    assert [head.width(tap) for tap in (0, 1, 2, 3, None)] == [6, 6, 6, 4, 4]


def test_only_the_last_layer_has_neither_relu_nor_shift():
    head = ProjectionHead(6, 4)
    assert [layer.norm.bias is None for layer in head.layers] == [False, False, True]
    assert all(layer.linear.bias is None for layer in head.layers)
    x = torch.randn(50, 6)
    assert [bool((head(x, upto=tap) < 0).any()) for tap in (1, 2, 3)] == [False, False, True]


def test_weights_start_small_and_the_classifier_at_zero():
    head = ProjectionHead(512)
    for layer in head.layers:
        assert layer.linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert head.layers[0].linear.weight.abs().max() > 0.03  # not cut off at two sigma
    model = Classifier(resnet(18, width=1 / 8, stem="small"), None, tap=0, num_classes=3)
    assert not model(torch.rand(2, 3, 8, 8)).any()


def test_classifier_shares_what_it_keeps_and_drops_the_rest():
    net, head = resnet(18, width=1 / 8, stem="small"), ProjectionHead(64, 16)
    model = Classifier(net, head, tap=1, num_classes=3)
    assert model.encoder is net
    assert list(model.head) == [head.layers[0]]
    assert count_parameters(model) == count_parameters(net) + count_parameters(head.layers[0]) + 64 * 3 + 3
    whole = Classifier(net, head, tap=3, num_classes=3)
    assert whole.linear.in_features == 16
    x = torch.rand(2, 3, 8, 8)
    model.eval()
    torch.testing.assert_close(model.features(x), head.eval()(net(x), upto=1))
    nn.init.normal_(model.linear.weight)
    torch.testing.assert_close(model(x), model.features(x) @ model.linear.weight.T)
    again = Classifier(encoder("resnet18_0.125x_small"), ProjectionHead(64), tap=1, num_classes=3)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval()(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_logits_are_float32_under_autocast():
    model = Classifier(resnet(18, width=1 / 8, stem="small"), ProjectionHead(64), tap=1, num_classes=3).eval()
    nn.init.normal_(model.linear.weight)
    x = torch.rand(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, logits = model.features(x), model(x)
    assert features.dtype == logits.dtype == torch.float32
    assert torch.equal(logits, model.linear(features))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda net, head: ProjectionHead(8, layers=0), "at least 1 layer"),
        (lambda net, head: head(torch.rand(2, 64), upto=4), "tap 4 of a projection head with 3 layers"),
        (lambda net, head: head.width(-1), r"use 0 \(the features\) to 3"),
        (lambda net, head: Classifier(net, head, tap=4, num_classes=3), "tap 4"),
        (lambda net, head: Classifier(net, None, tap=1, num_classes=3), "without a projection head"),
        (lambda net, head: Classifier(net, head, tap=1, num_classes=0), "0 classes"),
    ],
)
def test_wrong_arguments(make, says):
    with pytest.raises(UsageError, match=says):
        make(resnet(18, width=1 / 8), ProjectionHead(64))
