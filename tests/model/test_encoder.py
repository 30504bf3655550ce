"""The encoders against the arrays of the unmodified reference, and what they promise besides."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from fewlabels.errors import UsageError
from fewlabels.model.encoder import ResNet, TimmEncoder, encoder, resnet
from fewlabels.model.heads import Classifier, ProjectionHead
from fewlabels.model.layers import BatchNorm
from reference_weights import fill, images, relative, tensors_by_name
from small_model import count_parameters

CASES = {  # golden file: depth, sk_ratio, stem
    "r18_w8th_cifar32": (18, 0.0, "small"),
    "r18_w8th_im64": (18, 0.0, "imagenet"),
    "r50_w8th_sk0_cifar32": (50, 0.0, "small"),
    "r50_w8th_sk0_im64": (50, 0.0, "imagenet"),
    "r50_w8th_sk0_im75": (50, 0.0, "imagenet"),
    "r50_w8th_sk1_cifar32": (50, 1 / 16, "small"),
    "r50_w8th_sk1_im64": (50, 1 / 16, "imagenet"),
    "r50_w8th_skr75_im75": (50, 0.75, "imagenet"),
}
FULL = {
    "full_r18_1x_cifar32": (18, 0.0, "small"),
    "full_r50_1x_sk0_im64": (50, 0.0, "imagenet"),
    "full_r50_1x_sk1_im64": (50, 1 / 16, "imagenet"),
}
ENDPOINTS = ["initial_conv", "initial_max_pool", *(f"block_group{k}" for k in (1, 2, 3, 4)), "final_avg_pool"]
EXACT = 1e-6  # the arrays are float64 results stored as float32


def network(depth: int, sk_ratio: float, stem: str, *, width: float) -> tuple[ResNet, ProjectionHead, dict]:
    """Encoder, head and their tensors by TensorFlow name, float64."""
    net = ResNet(depth, width=width, sk_ratio=sk_ratio, stem=stem).double()
    head = ProjectionHead(net.feature_dim, 16).double()
    return net, head, tensors_by_name(encoder=net, head=head)


def endpoints(net, x):
    """The reference's named outputs, on the way of forward itself; "initial_conv" is the stem before its batch norm."""
    last = [part for part in net.stem.modules() if isinstance(part, nn.Conv2d)][-1]
    found, hooks = {}, []
    parts = [last, net.stem, *(list(group)[-1] for group in net.blocks[1:])]
    for name, part in zip(ENDPOINTS[:-1], parts, strict=True):
        hooks.append(part.register_forward_hook(lambda _, __, output, name=name: found.update({name: output})))
    found[ENDPOINTS[-1]] = net(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_endpoint_is_the_references(golden, case):
    arrays = np.load(golden / f"encoder_{case}.npz")
    net, head, tensors = network(*CASES[case], width=1 / 8)
    fill(tensors, {name: arrays[f"w/{name}"] for name in tensors})
    x = images(arrays["x"])
    for mode in ("eval", "train"):
        net.train(mode == "train")
        head.train(mode == "train")
        found = endpoints(net, x)
        assert list(found) == ENDPOINTS
        assert {name: relative(found[name], arrays[f"{mode}/{name}"]) < EXACT for name in ENDPOINTS} == dict.fromkeys(
            ENDPOINTS, True
        )
        for tap in range(4):
            assert relative(head(found["final_avg_pool"], upto=tap), arrays[f"{mode}/proj_{tap}"]) < EXACT
        if mode == "eval":
            assert torch.equal(net(x), found["final_avg_pool"])


@pytest.mark.parametrize("case", CASES)
def test_running_statistics_after_one_training_step_are_the_references(golden, case):
    arrays = np.load(golden / f"encoder_{case}.npz")
    net, head, tensors = network(*CASES[case], width=1 / 8)
    fill(tensors, {name: arrays[f"w/{name}"] for name in tensors})
    head(net(images(arrays["x"])))
    moved = [name for name in tensors if "moving" in name]
    assert len(moved) == 2 * sum(isinstance(part, BatchNorm) for part in [*net.modules(), *head.modules()])
    assert max(relative(tensors[name], arrays[f"w_after_train_forward/{name}"]) for name in moved) < EXACT


@pytest.mark.parametrize("case", CASES)
def test_the_whole_model_on_two_views_is_the_references(golden, case):
    """Both views in one batch, and the supervised head on the encoder's output, as the reference pretrains."""
    arrays = np.load(golden / f"encoder_{case}.npz")
    net, head, tensors = network(*CASES[case], width=1 / 8)
    model = Classifier(net, None, tap=0, num_classes=10).double()
    tensors |= tensors_by_name(encoder=net, linear=model.linear)
    fill(tensors, {name: arrays[f"w/{name}"] for name in tensors})
    views = torch.cat(images(arrays["x6"]).split(3, dim=1))
    features = net(views)
    assert relative(head(features), arrays["train_2view/proj_head_output"]) < EXACT
    assert relative(model.linear(features), arrays["train_2view/logits_sup"]) < EXACT
    fill(tensors, {name: arrays[f"w/{name}"] for name in tensors})
    for mode in ("eval", "train"):
        assert relative(model.train(mode == "train")(images(arrays["x"])), arrays[f"{mode}/logits_sup"]) < EXACT


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("case", FULL)
def test_full_width_is_the_references(golden, case, mode):
    arrays = np.load(golden / f"encoder_{case}.npz")
    net, head, tensors = network(*FULL[case], width=1)
    model = Classifier(net, None, tap=0, num_classes=10).double()
    fill(tensors | tensors_by_name(encoder=net, linear=model.linear))
    for module in (net, head):
        module.train(mode == "train")
    with torch.no_grad():
        found = endpoints(net, images(arrays["x"]))
        features = found["final_avg_pool"]
        assert relative(features, arrays[f"{mode}/final_avg_pool"]) < EXACT
        assert relative(model.linear(features), arrays[f"{mode}/logits_sup"]) < EXACT
        for tap in (1, 2, 3):
            assert relative(head(features, upto=tap), arrays[f"{mode}/proj_{tap}"]) < EXACT
    for name in ENDPOINTS:
        mean_and_std = np.array([found[name].mean(), found[name].std(correction=0)])
        np.testing.assert_allclose(mean_and_std, arrays[f"{mode}_stat/{name}"], rtol=1e-6)


def test_creation_order_and_shapes_are_the_references(golden):
    for file, kwargs in (("r50_1x_sk0", {}), ("r50_1x_sk1", {"selective_kernel": True})):
        lines = [line.split("\t") for line in (golden / f"variables_tf1_{file}.txt").read_text().splitlines()]
        theirs = {name: json.loads(shape) for name, shape, *_ in lines if name.startswith("base_model/")}
        with torch.device("meta"):
            ours = tensors_by_name(encoder=resnet(50, **kwargs))
        # The text lists TensorFlow shapes: HWIO
        shapes = {n: list(t.permute(2, 3, 1, 0).shape if t.dim() == 4 else t.shape) for n, t in ours.items()}
        assert shapes == theirs


def test_parameter_counts_are_the_papers(golden):
    for row in json.loads((golden / "param_counts.json").read_text()):
        with torch.device("meta"):
            net = resnet(
                row["depth"],
                width=row["width"],
                selective_kernel=row["sk"] > 0,
                stem="small" if row["size"] <= 32 else "imagenet",
            )
            head = ProjectionHead(net.feature_dim)
        convs = sum(isinstance(part, nn.Conv2d) for part in net.modules())
        norms = sum(isinstance(part, BatchNorm) for part in net.modules())
        ours = {
            "base_trainable": count_parameters(net),
            "base_all": sum(t.numel() for t in net.state_dict().values()),
            "proj_trainable": count_parameters(head),
            "proj_all": sum(t.numel() for t in head.state_dict().values()),
            "n_conv": convs,
            "n_bn": norms,
        }
        assert ours == {key: row[key] for key in ours}, row


def test_kernels_start_as_the_references_and_branches_at_zero(golden):
    theirs = json.loads((golden / "init_stats_r50_1x_sk1.json").read_text())
    net = resnet(50, selective_kernel=True)
    tensors = tensors_by_name(encoder=net)
    large = [name for name in theirs if name in tensors and tensors[name].numel() > 20_000]
    assert len(large) > 30
    for name in large:
        tensor = tensors[name]
        std = tensor.std().item()
        assert std * tensor[0].numel() ** 0.5 == pytest.approx(1, abs=0.02), name
        assert std == pytest.approx(theirs[name]["std"], rel=0.04), name
        assert tensor.abs().max().item() / std < 2.35, name  # an uncut normal distribution would reach 4
    zero = [part for part in net.modules() if isinstance(part, BatchNorm) and not part.weight.any()]
    assert len(zero) == 16  # one in each bottleneck


@pytest.mark.parametrize(
    ("name", "feature_dim", "kernel"),
    [
        ("resnet18", 512, 7),
        ("resnet18_0.25x", 128, 7),
        ("resnet18_0.125x_small", 64, 3),
        ("resnet50_0.25x_sk", 512, 3),
        ("resnet50_0.25x_sk_small", 512, 3),
    ],
)
def test_names(name, feature_dim, kernel):
    net = encoder(name)
    assert net.feature_dim == feature_dim
    assert net.stem.conv.kernel_size == (kernel, kernel)
    features = net(torch.rand(2, 3, 40, 33))
    assert features.shape == (2, feature_dim)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet5O", 'did you mean "resnet50"'),
        ("resnet17", "18, 34, 50, 101, 152 or 200"),
        ("Resnet50_2x", 'did you mean "resnet50_2x"'),
        ("resnet18_sk", "basic blocks have no bottleneck"),
        ("resnet18_0.01x", "width = 0.01"),
        ("timm:resnet1O", "did you mean"),
        ("timm:resnet18.nothing", "what follows the dot"),
        ("timm:resnet18.hf-hub:evil/model", "what follows the dot"),
        ("timm:local-dir:/tmp", "timm has no model"),
        (f"resnet{'9' * 5000}", "unknown encoder"),  # more digits than Python makes a number of
        ("resnet\u0661\u0668", "unknown encoder"),
    ],
)
def test_names_that_are_none(name, says):
    with pytest.raises(UsageError, match=says):
        encoder(name)


def test_wrong_arguments():
    with pytest.raises(UsageError, match='unknown stem "tiny"'):
        resnet(18, stem="tiny")
    for depth in (19, "50", [50], None):
        with pytest.raises(UsageError, match="no ResNet of depth"):
            resnet(depth)
    for width in ("2", None):
        with pytest.raises(UsageError, match="width = "):
            resnet(50, width=width)
    assert resnet(18, width=np.int64(1)).feature_dim == 512
    for name in (None, 3):
        with pytest.raises(UsageError, match="unknown encoder"):
            encoder(name)


@pytest.mark.parametrize("block", [-1, 0, 2, 4])
def test_frozen_parts_do_not_move(block):
    net = resnet(18, width=1 / 8, stem="small")
    net.freeze(block)
    net.train()
    before = [{name: t.clone() for name, t in part.state_dict().items()} for part in net.blocks]
    features = net(torch.rand(4, 3, 16, 16))
    if block < 4:
        features.sum().backward()
    for number, part in enumerate(net.blocks):
        frozen = number <= block
        assert all(p.requires_grad != frozen and (p.grad is None) == frozen for p in part.parameters())
        moved = [name for name, t in part.state_dict().items() if not torch.equal(t, before[number][name])]
        assert bool(moved) != frozen
        assert part.training != frozen
    assert net.training


def test_freezing_can_be_undone_and_is_checked():
    net = resnet(18, width=1 / 8)
    net.freeze(4)
    net.freeze(-1)
    net.train()
    assert all(p.requires_grad for p in net.parameters())
    assert all(part.training for part in net.modules())
    with pytest.raises(UsageError, match="block 5"):
        net.freeze(5)


@pytest.mark.parametrize("kwargs", [{"selective_kernel": False}, {"selective_kernel": True}])
def test_bf16_channels_last_is_close_and_keeps_the_layout(kwargs):
    net = resnet(50, width=1 / 8, **kwargs).eval()
    x = torch.rand(4, 3, 64, 64)
    exact = net(x)
    net = net.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = endpoints(net, x.contiguous(memory_format=torch.channels_last))
    for name in ENDPOINTS[:-1]:
        assert found[name].dtype == torch.bfloat16
        assert found[name].is_contiguous(memory_format=torch.channels_last)
    features = found["final_avg_pool"]
    assert features.dtype == torch.float32
    assert (features - exact).abs().max() < 0.03 * exact.abs().max()


def test_exports_with_any_number_of_images():
    net = resnet(50, width=1 / 8, selective_kernel=True).eval()
    x = torch.rand(3, 3, 33, 33)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("images", min=1)},))
    torch.testing.assert_close(program.module()(x[:2]), net(x[:2]))


def test_timm_encoder():
    net = encoder("timm:mobilenetv3_small_050")
    assert isinstance(net, TimmEncoder)
    assert net.eval()(torch.rand(2, 3, 32, 32)).shape == (2, net.feature_dim)
    net.freeze(4)
    net.train()
    assert not any(part.training for part in net.model.modules())
    assert not any(p.requires_grad for p in net.parameters())
    with pytest.raises(UsageError, match="-1 or 4"):
        net.freeze(2)


def test_the_narrowest_stem_has_a_channel():
    assert encoder("resnet50_0.02x_sk").eval()(torch.rand(1, 3, 32, 32)).shape[0] == 1
