"""LARS, Muon, their groups and the learning-rate curve against numpy and the reference; whole training steps too."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fewlabels.config import Schedule
from fewlabels.errors import UsageError
from fewlabels.model import muon, optim
from fewlabels.model.encoder import encoder, resnet
from fewlabels.model.heads import Classifier, ProjectionHead
from fewlabels.model.layers import BatchNorm
from fewlabels.model.losses import nt_xent
from fewlabels.model.muon import Muon
from fewlabels.model.optim import LARS
from reference_weights import fill, images, relative, tensors_by_name, to_ours

ALONE = ("batch_normalization", "bias", "head_supervised")  # the reference's exclusion, by name


def numpy_lars(w, g, v, *, lr, momentum=0.9, decay=0.0, trust=0.001, adapt=True):
    """Method.md 4.1 in numpy: new w and v."""
    g = g + decay * w
    rate = lr
    if adapt and np.linalg.norm(w) > 0 and np.linalg.norm(g) > 0:
        rate = lr * trust * np.linalg.norm(w) / np.linalg.norm(g)
    v = momentum * v + rate * g
    return w - v, v


@pytest.fixture(params=[optim._update_one_by_one, optim._update_together], ids=["one by one", "together"])
def both_ways(request, monkeypatch):
    """Runs a test with the CPU's and with the GPU's code; both run on either."""
    monkeypatch.setattr(optim, "_update_one_by_one", request.param)


def test_lars_is_ten_lines_of_numpy(both_ways):
    random = np.random.default_rng(0)
    values = [random.normal(size=shape) for shape in ((3, 4), (5,), (2, 3, 3, 3), (4, 4))]
    values[3][:] = 0  # no length: not adapted
    settings = [{"decay": 0.1, "adapt": True}, {"decay": 0.0, "adapt": False}]
    which = [0, 1, 0, 0]
    parameters = [nn.Parameter(torch.from_numpy(value.copy())) for value in values]
    optimizer = LARS(
        [
            {"params": [parameters[i] for i in (0, 2, 3)], "weight_decay": 0.1},
            {"params": [parameters[1]], "adapt": False},
        ],
        lr=1.0,
        momentum=0.8,
        trust=0.02,
    )
    buffers = [np.zeros_like(value) for value in values]
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = lr = 0.5 * (step + 1)
        for i, parameter in enumerate(parameters):
            gradient = random.normal(size=values[i].shape) * (0 if i == 2 and step == 1 else 1)
            parameter.grad = torch.from_numpy(gradient.copy())
            values[i], buffers[i] = numpy_lars(
                values[i], gradient, buffers[i], lr=lr, momentum=0.8, trust=0.02, **settings[which[i]]
            )
        before = [parameter.grad.clone() for parameter in parameters]
        optimizer.step()
        for i, parameter in enumerate(parameters):
            np.testing.assert_allclose(parameter.detach().numpy(), values[i], rtol=1e-12)
            np.testing.assert_allclose(optimizer.state[parameter]["momentum"].numpy(), buffers[i], rtol=1e-12)
            assert torch.equal(parameter.grad, before[i])  # gradients are only read


@pytest.mark.parametrize("variant", ["default", "big_lr_wd", "wd0"])
def test_lars_is_the_references(golden, both_ways, variant):
    arrays = np.load(golden / "lars.npz")
    settings = json.loads(str(arrays["variants_json"]))[variant]
    names = [str(name) for name in arrays["names"]]
    parameters = {name: nn.Parameter(torch.from_numpy(arrays[f"init/{name}"].copy())) for name in names}
    alone = [name for name in names if any(part in name for part in ALONE)]
    decay = settings.get("weight_decay", 0.0)
    optimizer = LARS(
        [
            {"params": [parameters[name] for name in names if name not in alone], "weight_decay": decay},
            {"params": [parameters[name] for name in alone], "adapt": False},
        ],
        lr=settings["learning_rate"],
        momentum=settings.get("momentum", 0.9),
    )
    assert len(alone) == 5
    for step in range(5):
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(arrays[f"grad{step}/{name}"].copy())
        optimizer.step()
        for name, parameter in parameters.items():
            theirs = arrays[f"{variant}/param_after{step}/{name}"]
            assert relative(parameter.flatten(), theirs.flatten()) < 2e-6, (name, step)
            theirs = arrays[f"{variant}/momentum_after{step}/{name}"]
            assert relative(optimizer.state[parameter]["momentum"].flatten(), theirs.flatten()) < 2e-6, (name, step)


def test_lars_goes_on_from_its_state():
    def trained(steps: list[int], optimizer: LARS, parameter: nn.Parameter) -> Tensor:
        for step in steps:
            parameter.grad = torch.full_like(parameter, 1.0 + step) * torch.arange(72.0).view_as(parameter)
            optimizer.step()
        return parameter.detach().clone()

    def fresh() -> tuple[LARS, nn.Parameter]:
        start = torch.linspace(-1, 1, 72).view(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
        parameter = nn.Parameter(start)
        return LARS([parameter], lr=2.0, weight_decay=0.01), parameter

    unbroken = trained([0, 1, 2, 3], *fresh())
    optimizer, parameter = fresh()
    middle = trained([0, 1], optimizer, parameter)
    saved = {key: value.contiguous() for key, value in optimizer.state_dict()["state"][0].items()}
    resumed, parameter = fresh()
    with torch.no_grad():
        parameter.copy_(middle)
    resumed.load_state_dict({**resumed.state_dict(), "state": {0: saved}})
    assert torch.equal(trained([2, 3], resumed, parameter), unbroken)


def test_lars_skips_what_has_no_gradient_and_gives_the_closures_loss():
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    optimizer = LARS(parameters, lr=1.0)
    assert optimizer.step(lambda: (parameters[0].sum() * 2).backward() or 6.0) == 6.0
    assert not torch.equal(parameters[0], torch.ones(3))
    assert torch.equal(parameters[1], torch.ones(3))
    assert parameters[1] not in optimizer.state


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(kind, {"lr": -1.0}) for kind in (LARS, Muon)]
    + [(kind, {"lr": 1.0, "momentum": 1.0}) for kind in (LARS, Muon)]
    + [(kind, {"lr": 1.0, "weight_decay": -1.0}) for kind in (LARS, Muon)]
    + [(LARS, {"lr": 1.0, "trust": 0}), (Muon, {"lr": float("nan")})],
)
def test_values_out_of_range_are_refused(kind, settings):
    with pytest.raises(UsageError, match=f"{kind.__name__} cannot") as refused:
        kind([nn.Parameter(torch.ones(3, 3))], **settings)
    assert f"{list(settings)[-1]} = " in str(refused.value)
    optimizer = kind([nn.Parameter(torch.ones(3, 3))], lr=1.0)
    with pytest.raises(UsageError):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 3))], **settings})
    assert len(optimizer.param_groups) == 1


# --- Muon --------------------------------------------------------------------------------------------------


def numpy_muon(w, g, v, *, lr, momentum=0.95, decay=0.0):
    """New w and v of a kernel, with a singular value decomposition in place of the matrix products."""
    v = momentum * v + (1 - momentum) * g
    u, values, vt = np.linalg.svd((momentum * v + (1 - momentum) * g).reshape(len(w), -1), full_matrices=False)
    values = values / (np.sqrt((values**2).sum()) + 1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    update = (u * values) @ vt
    return (1 - lr * decay) * w - lr * 0.2 * np.sqrt(max(update.shape)) * update.reshape(w.shape), v


@pytest.mark.parametrize("alike", [1, 3], ids=["one by one", "by shape"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_is_ten_lines_of_numpy_and_adamw(both_rounds, layout, alike, monkeypatch):
    random = np.random.default_rng(0)
    values = [random.normal(size=shape) for shape in ((4, 2, 3, 3), (64, 3, 3, 3), (5, 9), (7,), *[(4, 2, 3, 3)] * 2)]
    parameters = [nn.Parameter(torch.from_numpy(value.copy())) for value in values]
    for parameter in (parameters[n] for n in (0, 1, 4, 5)):
        parameter.data = parameter.data.contiguous(memory_format=layout)
    kernels = [n for n in range(6) if n != 3]
    groups = [
        {"params": [parameters[n] for n in kernels], "weight_decay": 0.1},
        {"params": [parameters[3]], "adapt": False},
    ]
    sizes = []
    steps = Muon._step_of_kernels
    monkeypatch.setattr(Muon, "_step_of_kernels", lambda *a: sizes.append(len(a[1])) or steps(*a))
    monkeypatch.setitem(muon.MOST_NUMBERS, "cpu", muon.MOST_NUMBERS["cuda"] if alike > 1 else 1)
    optimizer = Muon(groups, lr=1.0)
    twin = nn.Parameter(parameters[3].detach().clone())
    adamw = torch.optim.AdamW([twin], lr=1.0, weight_decay=0.0)
    buffers = [np.zeros_like(value) for value in values]
    for step in range(4):
        for group in optimizer.param_groups + adamw.param_groups:
            group["lr"] = lr = 0.5 * (step + 1)
        for i, parameter in enumerate(parameters):
            gradient = random.normal(size=values[i].shape) * (0 if i == 1 and step == 0 else 1)
            parameter.grad = torch.empty_like(parameter).copy_(torch.from_numpy(gradient))
            if i != 3:
                values[i], buffers[i] = numpy_muon(values[i], gradient, buffers[i], lr=lr, decay=0.1)
        twin.grad = parameters[3].grad.clone()
        before = [parameter.grad.clone() for parameter in parameters]
        optimizer.step()
        adamw.step()
        for i, parameter in enumerate(parameters):
            assert torch.equal(parameter.grad, before[i])  # gradients are only read
            if i != 3:
                np.testing.assert_allclose(parameter.detach().numpy(), values[i], rtol=1e-9, atol=1e-12)
                found = optimizer.state[parameter]["momentum"].numpy()
                np.testing.assert_allclose(found, buffers[i], rtol=1e-12, atol=1e-15)
        assert torch.equal(parameters[3], twin)
    assert max(sizes) == alike


@pytest.fixture(params=["_rounds", "_rounds_of_squares"])
def both_rounds(request, monkeypatch):
    """Runs a test with the CPU's and with the GPU's code; both run on either."""
    monkeypatch.setattr(muon, "_rounds_of_squares", getattr(muon, request.param))


def test_squares_take_the_same_rounds():
    random = torch.Generator().manual_seed(0)
    for shape, alike in (((16, 144), 1.0), ((64, 576), 1e-3), ((8, 8), 1e-3), ((3, 6, 9), 1.0)):
        x = torch.randn(shape, generator=random)
        x[1:] = x[0] + alike * x[1:]  # rows nearly alike: singular values of all sizes
        x /= x.norm()
        expected = muon._rounds(x.double())
        assert (muon._rounds_of_squares(x) - expected).abs().max() < 1e-4
        assert (muon._rounds_of_squares(x.double()) - expected).abs().max() < 1e-11


@pytest.mark.parametrize("shape", [(16, 144), (144, 16), (32, 32), (1, 5)])
def test_orthogonal_steps_are_as_long_in_all_directions(both_rounds, shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    values = torch.linalg.svdvals(muon.orthogonal(matrix))
    told = torch.linalg.svdvals(matrix)
    large = told > 0.01 * torch.linalg.vector_norm(told)
    assert large.sum() >= min(shape) - 2
    assert values[large].min() > 0.6
    assert values.max() < 1.3
    assert not muon.orthogonal(torch.zeros(shape)).any()
    several = torch.stack([matrix, torch.zeros(shape), 1e6 * matrix.flip(0)])  # each one by its own length
    found = muon.orthogonal(several)
    for one, alone in zip(found, several, strict=True):
        torch.testing.assert_close(one, muon.orthogonal(alone), rtol=1e-4, atol=1e-5)


def test_muon_takes_the_same_step_on_any_number_of_threads(monkeypatch):
    before, ends, used = torch.get_num_threads(), [], []

    def fails() -> None:
        raise FloatingPointError("in a thread")

    try:
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            weights = [nn.Parameter(torch.randn(64, 32, 3, 3)) for _ in range(6)]
            weights.append(nn.Parameter(torch.randn(6, 9)))
            monkeypatch.setattr(muon, "LARGE_SIDE", 1024 if threads > 2 else 32)
            optimizer = Muon(weights, lr=0.02)
            for _ in range(2):
                for weight in weights:
                    weight.grad = torch.randn_like(weight)
                optimizer.step()
            ends.append(torch.cat([weight.detach().flatten() for weight in weights]))
            used.append(torch.get_num_threads())
        told = []
        with pytest.raises(FloatingPointError):
            muon._side_by_side([fails, lambda: told.append(torch.get_num_threads())])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(ends[0], ends[1])
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-4, atol=1e-6)  # large ones: all threads on each
    assert used == [1, 3, 2], "the rest of the step has all threads"
    assert told == [1], "the others are done when one's error comes, each on one thread"


def test_kernels_that_step_together_have_a_limit(monkeypatch):
    monkeypatch.setitem(muon.MOST_NUMBERS, "cpu", 20)
    small, large, other = [torch.zeros(2, 5)] * 5, [torch.zeros(4, 9)] * 2, [torch.zeros(5, 2)]
    buckets = muon._by_shape([*small[:3], *large, *other, *small[3:]])
    assert [(len(bucket), tuple(bucket[0].shape)) for bucket in buckets] == [
        (2, (2, 5)), (2, (2, 5)), (1, (2, 5)), (1, (4, 9)), (1, (4, 9)), (1, (5, 2)),
    ]  # fmt: skip


def test_muon_skips_what_has_no_gradient_and_gives_the_closures_loss():
    parameters = [nn.Parameter(torch.ones(3, 3)) for _ in range(3)]
    optimizer = Muon([{"params": parameters[:2]}, {"params": parameters[2:], "adapt": False}], lr=1.0)
    assert optimizer.step(lambda: (parameters[0].sum() * 2).backward() or 6.0) == 6.0
    assert not torch.equal(parameters[0], torch.ones(3, 3))
    for other in parameters[1:]:
        assert torch.equal(other, torch.ones(3, 3))
        assert other not in optimizer.state


# --- groups ------------------------------------------------------------------------------------------------


def roles(module: nn.Module) -> dict[str, set[str]]:
    """Parameter names by the role of their module: the slow twin of parameter_groups."""
    found: dict[str, set[str]] = {"kernel": set(), "alone": set(), "linear": set()}
    for path, part in module.named_modules():
        for name, _ in part.named_parameters(prefix=path, recurse=False):
            if path == "classifier.linear":
                found["linear"].add(name)
            elif isinstance(part, BatchNorm | nn.BatchNorm2d):
                found["alone"].add(name)
            else:
                assert isinstance(part, nn.Conv2d | nn.Linear)
                found["alone" if name.endswith("bias") else "kernel"].add(name)
    return found


@pytest.mark.parametrize("name", ["resnet18_0.125x", "resnet50_0.125x_sk", "timm:mobilenetv3_small_050"])
def test_groups_are_by_role(name):
    net = encoder(name)
    stage = nn.ModuleDict({"classifier": Classifier(net, ProjectionHead(net.feature_dim), tap=2, num_classes=3)})
    role = roles(stage)
    kernels, alone = optim.parameter_groups(stage, weight_decay=0.5)
    assert set(kernels["names"]) == role["kernel"]
    assert set(alone["names"]) == role["alone"] | role["linear"]
    assert (kernels["weight_decay"], kernels["adapt"]) == (0.5, True)
    assert (alone["weight_decay"], alone["adapt"]) == (0.0, False)
    by_name = dict(stage.named_parameters())
    for group in (kernels, alone):
        assert all(by_name[n] is p for n, p in zip(group["names"], group["params"], strict=True))


def test_frozen_parameters_are_in_no_group():
    net = resnet(18, width=1 / 8)
    net.freeze(2)
    names = [name for group in optim.parameter_groups(net, weight_decay=0.0) for name in group["names"]]
    assert {name.split(".")[0] for name in names} == {"group3", "group4"}
    net.freeze(4)
    assert optim.parameter_groups(net, weight_decay=0.0) == []
    with pytest.raises(UsageError, match="nothing to train"):
        optim.optimizer("lars", net, lr=1.0)


def choices(knob):
    """What a recipe may say."""
    return next(field.metadata["choices"] for field in dataclasses.fields(Schedule) if field.name == knob)


def test_optimizers_by_name():
    net = resnet(18, width=1 / 8)
    kinds = {"lars": LARS, "sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "muon": Muon}
    assert set(kinds) == set(choices("optimizer"))
    for name, kind in kinds.items():
        found = optim.optimizer(name, net, lr=2.0, weight_decay=0.1)
        assert type(found) is kind
        assert [(group["weight_decay"], group["lr"]) for group in found.param_groups] == [(0.1, 2.0), (0.0, 2.0)]
        assert name != "sgd" or all(group["nesterov"] and group["momentum"] == 0.9 for group in found.param_groups)
        net(torch.rand(2, 3, 32, 32)).sum().backward()
        found.step()


# --- the learning rate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(7))
def test_learning_rate_is_the_references(golden, case):
    arrays = np.load(golden / "lr_schedule.npz")
    asked = json.loads(str(arrays[f"s{case}/config_json"]))
    total = optim.total_steps(asked["n"], asked["epochs"], asked["bs"])
    warm = optim.warmup_steps(asked["n"], asked["warm"], asked["bs"])
    assert (total, warm) == (int(arrays[f"s{case}/total_steps"]), int(arrays[f"s{case}/warmup_steps"]))
    peak = optim.peak_learning_rate(asked["lr"], asked["bs"], asked["scaling"])
    for step, theirs in zip(arrays[f"s{case}/steps"], arrays[f"s{case}/lr"], strict=True):
        ours = optim.learning_rate(int(step), peak=peak, warmup_steps=warm, total_steps=total)
        assert ours == pytest.approx(float(theirs), rel=0, abs=2e-7 * peak)


def test_learning_rate_at_the_corners():
    rate = lambda step, warm, total: optim.learning_rate(step, peak=2.0, warmup_steps=warm, total_steps=total)  # noqa: E731
    assert [rate(step, 4, 12) for step in (0, 2, 4, 8, 12, 99)] == pytest.approx([0, 1, 2, 1, 0, 0])
    assert rate(0, 0, 10) == 2.0
    assert rate(5, 5, 5) == 2.0  # a schedule that is all warm-up
    assert optim.peak_learning_rate(0.1, 4096, "sqrt") == pytest.approx(6.4)
    assert optim.peak_learning_rate(1.0, 512, "linear") == pytest.approx(2.0)
    assert optim.peak_learning_rate(0.3, 512, "none") == 0.3
    assert optim.total_steps(1_281_167, 800, 4096) == 250_228  # the step number of the published checkpoints
    assert optim.total_steps(100, 2.5, 10) == 26
    for scaling in choices("scaling"):
        assert optim.peak_learning_rate(0.3, 256, scaling) == pytest.approx(0.3 * (16 if scaling == "sqrt" else 1))


# --- whole training steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "depth", "sk", "stem"),
    [("r18_w8th_cifar32", 18, False, "small"), ("r50_w8th_sk1_im64", 50, True, "imagenet")],
)
def test_four_training_steps_are_the_references(golden, case, depth, sk, stem):
    """Encoder, head, linear probe on both views, NT-Xent, LARS and schedule together, in float64."""
    arrays = np.load(golden / f"trainsteps_{case}.npz")
    asked = json.loads(str(arrays["hparams_json"]))
    net = resnet(depth, width=1 / 8, selective_kernel=sk, stem=stem)
    head = ProjectionHead(net.feature_dim, asked["proj_out_dim"], asked["proj_layers"])
    probe = Classifier(net, None, tap=0, num_classes=asked["num_classes"])
    stage = nn.ModuleDict({"probe": probe, "head": head}).double()
    tensors = tensors_by_name(encoder=net, head=head, linear=probe.linear)
    start = arrays if "w0/base_model/conv2d/kernel" in arrays.files else np.load(golden / f"encoder_{case}.npz")
    fill(tensors, {name: start[f"{'w0' if start is arrays else 'w'}/{name}"] for name in tensors})
    optimizer = optim.optimizer("lars", stage, lr=0.0, weight_decay=asked["weight_decay"])
    n, batch = asked["num_examples"], asked["batch"]
    warm = optim.warmup_steps(n, asked["warmup_epochs"], batch)
    total = optim.total_steps(n, asked["train_epochs"], batch)
    peak = optim.peak_learning_rate(asked["learning_rate"], batch, asked["scaling"])
    for step in range(4):
        rate = optim.learning_rate(step, peak=peak, warmup_steps=warm, total_steps=total)
        assert rate == pytest.approx(float(arrays[f"step{step}/lr"]), rel=1e-7)
        features = net(torch.cat(images(arrays[f"step{step}/x6"]).split(3, dim=1)))
        contrast = 2 * nt_xent(*head(features).chunk(2), asked["temperature"])  # the reference optimises twice ours
        labels = torch.from_numpy(arrays[f"step{step}/labels"]).double().repeat(2, 1)
        supervised = nn.functional.cross_entropy(probe.linear(features.detach()), labels)
        decay = asked["weight_decay"] * 0.5 * probe.linear.weight.square().sum()
        assert contrast.item() == pytest.approx(float(arrays[f"step{step}/con_loss"]), rel=2e-6)
        assert supervised.item() == pytest.approx(float(arrays[f"step{step}/sup_loss"]), rel=2e-6)
        assert decay.item() == pytest.approx(float(arrays[f"step{step}/weight_decay"]), rel=1e-6)
        optimizer.zero_grad()
        (contrast + supervised + decay).backward()
        if step == 0:
            for name in (name for name in tensors if "moving" not in name):
                theirs = to_ours(arrays[f"step0/grad/{name}"])
                assert (tensors[name].grad - theirs).abs().max() < 1e-6 * theirs.abs().max().clamp(min=1e-6), name
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    for name, tensor in tensors.items():
        theirs = to_ours(arrays[f"w_final/{name}"])
        assert (tensor - theirs).abs().max() < 3e-6 * theirs.abs().max(), name
