"""TensorFlow's SimCLRv2 checkpoints as our modules: the golden ones, and ones that the tests write themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import reference_weights
import tensorbundle_writer as writer
from fewlabels.errors import DataError, UsageError
from fewlabels.model import reference
from fewlabels.model.encoder import encoder
from fewlabels.model.heads import ProjectionHead
from fewlabels.model.reference import load_reference
from reference_weights import images, relative

NAME = "resnet18_0.125x_small"


def to_theirs(tensor: Tensor) -> np.ndarray:
    """OIHW -> HWIO, (out, in) -> (in, out); float32."""
    order = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[tensor.dim()]
    return np.ascontiguousarray(tensor.detach().permute(order).numpy().astype(np.float32))


def variables(name: str = NAME, *, classes: int = 10, layers: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of a whole model under the names of TensorFlow 1."""
    torch.manual_seed(seed)
    body = encoder(name)
    head = ProjectionHead(body.feature_dim, 16, layers) if layers else None
    linear = torch.nn.Linear(body.feature_dim, classes)
    tensors = reference_weights.tensors_by_name(encoder=body, head=head, linear=linear)
    return {
        key: to_theirs(tensor.detach().abs() + 0.5 if "variance" in key else torch.randn_like(tensor) * 0.1 + 0.2)
        for key, tensor in tensors.items()
    }


def full_names(arrays: Mapping[str, np.ndarray], *, first: int = 0) -> dict[str, str]:
    """The same variables' names in TensorFlow 2, whose Keras may have counted other models before: first."""
    found = {}
    for name in arrays:
        new = re.sub(
            r"base_model/(conv2d|batch_normalization)(?:_(\d+))?/",
            lambda m: f"resnet/x/{'sync_' * (m[1] != 'conv2d')}{m[1]}_{int(m[2] or 0) + first}/",
            name,
        )
        new = new.replace("/conv2d_0/", "/conv2d/").replace("sync_batch_normalization_0/", "sync_batch_normalization/")
        new = re.sub(
            r"head_contrastive/(nl_\d+)/batch_normalization/",
            rf"projection_head/\1/batch_norm_relu_{first + 77}/sync_batch_normalization_{first + 77}/",
            new,
        )
        found[name] = new.replace("head_contrastive/", "projection_head/")
    return found


def assert_weights(found: reference.Reference, arrays: Mapping[str, np.ndarray]) -> None:
    """Every variable of the model is where it belongs, bit for bit."""
    tensors = reference_weights.tensors_by_name(
        encoder=found.encoder,
        head=found.projection_head,
        linear=found.classifier.linear if found.classifier else None,
    )
    assert set(tensors) == {name for name in arrays if not name.startswith(("ema_", "global")) and "Mom" not in name}
    for name, tensor in tensors.items():
        assert np.array_equal(to_theirs(tensor), arrays[name]), name


# --- the reference's own files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "arrays_of", "name"),
    [
        ("ckpt_tf1_r18_w8th_cifar32", "encoder_r18_w8th_cifar32", "resnet18_0.125x_small"),
        ("ckpt_tf2_r18_w8th_cifar32", "encoder_r18_w8th_cifar32", "resnet18_0.125x_small"),
        ("ckpt_tf1_r50_w8th_sk1_im64", "encoder_r50_w8th_sk1_im64", "resnet50_0.125x_sk"),
    ],
)
def test_golden_checkpoints_compute_what_the_reference_computes(golden, folder, arrays_of, name):
    arrays = np.load(golden / f"{arrays_of}.npz")
    found = load_reference(golden / folder)
    assert found.name == name
    assert not any(module is None or module.training for module in found)
    body, head, classifier = (module.double() for module in found)
    x = images(arrays["x"])
    with torch.no_grad():
        features = body(x)
        for tap in range(4):
            assert relative(head(features, upto=tap), arrays[f"eval/proj_{tap}"]) < 1e-6
        assert relative(classifier(x), arrays["eval/logits_sup"]) < 1e-6
    used = {key for key in found.unread if not re.search("Momentum|ema_model", key)}
    assert used <= {"save_counter/.ATTRIBUTES/VARIABLE_VALUE", *(k for k in used if k.startswith("optimizer/"))}


def test_golden_averages_are_other_weights(golden):
    found = load_reference(golden / "ckpt_tf1_r18_w8th_cifar32", ema=True)
    for name, tensor in reference_weights.tensors_by_name(encoder=found.encoder, head=found.projection_head).items():
        expected = reference_weights.deterministic_average(name, tuple(tensor.shape))
        assert torch.equal(tensor.double(), expected), name


# --- what the network is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "sk"), [(d, sk) for d in (18, 34, 50, 101, 152, 200) for sk in ("", "_sk") if d >= 50 or not sk]
)
@pytest.mark.parametrize("width", [0.125, 0.5, 1, 2, 3])
@pytest.mark.parametrize("stem", ["", "_small"])
def test_the_network_is_found_out_from_the_shapes(depth, width, sk, stem):
    name = f"resnet{depth}{'' if width == 1 else f'_{width:g}x'}{sk}{stem}"
    with torch.device("meta"):
        network = encoder(name)
    shapes = {key: tuple(to_shape(tensor)) for key, tensor in reference._tensors(network, None, None)}
    assert reference._encoder_name(shapes, Path("x")) == name


def to_shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.permute({4: (2, 3, 1, 0), 2: (1, 0)}.get(tensor.dim(), (0,))).shape)


@pytest.mark.parametrize("name", [NAME, "resnet34_0.125x", "resnet50_0.125x_sk_small", "resnet50_0.125x"])
def test_every_variable_goes_where_it_belongs(tmp_path, name):
    arrays = variables(name)
    found = load_reference(writer.write(tmp_path / "model.ckpt-3", arrays | {"global_step": np.int64(3)}))
    assert (found.name, found.step, found.tensorflow, found.unread) == (name, 3, 1, ())
    assert_weights(found, arrays)


@pytest.mark.parametrize("first", [0, 53])
@pytest.mark.parametrize("positional", [False, True])
def test_tensorflow_2_is_read_by_the_variables_own_names(tmp_path, first, positional):
    """Keys are places in a graph of objects, or in a SavedModel's list; Keras counts on from models made before."""
    arrays = variables()
    names = full_names(arrays, first=first)
    shuffled = np.random.default_rng(1).permutation(sorted(arrays))
    ending = ".ATTRIBUTES/VARIABLE_VALUE"
    keys = {n: f"variables/{k}/{ending}" if positional else f"model/{n}/{ending}" for k, n in enumerate(shuffled)}
    graph = writer.graph({keys[n]: names[n] for n in arrays})
    bundle = {keys[n]: array for n, array in arrays.items()} | {"_CHECKPOINTABLE_OBJECT_GRAPH": graph}
    found = load_reference(writer.write(tmp_path / "variables" / "variables", bundle).parent.parent)
    assert (found.name, found.step, found.tensorflow, found.unread) == (NAME, None, 2, ())
    assert_weights(found, arrays)


def test_averages_on_request_and_unread_variables_by_name(tmp_path):
    arrays, averages = variables(), variables(seed=1)
    extra = {f"ema_model/{n}": a for n, a in averages.items() if "supervised" not in n}
    extra |= {"base_model/conv2d/kernel/Momentum": arrays["base_model/conv2d/kernel"], "memory": np.zeros((4, 4))}
    prefix = writer.write(tmp_path / "m", {**arrays, **extra})
    assert set(load_reference(prefix).unread) == set(extra)
    averaged = load_reference(prefix, ema=True)
    assert_weights(averaged, averages | {n: a for n, a in arrays.items() if "supervised" in n})
    with pytest.raises(UsageError, match="no moving averages"):
        load_reference(writer.write(tmp_path / "plain", arrays), ema=True)


def test_without_head_or_classifier(tmp_path):
    found = load_reference(writer.write(tmp_path / "v1", variables(layers=0)))
    assert found.projection_head is None
    assert found.classifier is not None
    arrays = {n: a for n, a in variables().items() if "supervised" not in n}
    body, head, classifier = load_reference(writer.write(tmp_path / "pretrained", arrays))
    assert classifier is None
    assert head(body(torch.rand(2, 3, 32, 32))).shape == (2, 16)


# --- where the classifier sits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "step", "tap", "why"),
    [
        ("finetuned_1pct/r50_1x_sk0", 5, 1, "finetuned_1pct"),
        ("finetuned_10pct/r50_1x_sk0", 5, 1, "finetuned_10pct"),
        ("finetuned_100pct/r50_1x_sk0", 5, 0, "finetuned_100pct"),
        ("pretrained/r50_1x_sk0", 5, 0, "pretrained"),
        ("supervised/r50_1x_sk0", 5, 0, "supervised"),
        ("distill_1pct/r152_3x_sk1/r152_3x_sk1", 5, 0, "distill_1pct"),
        ("pretrained_models/m", 5, 0, "nothing in the file tells"),
        ("pretrained/fewer_labels", 751, 1, "751 steps"),
        ("mine", 751, 1, "751 steps"),
        ("mine", 3754, 1, "3,754 steps"),
        ("mine", 37535, 0, "37,535 steps"),
        ("mine", 250228, 0, "250,228 steps"),
        ("mine", 5, 0, "nothing in the file tells"),
    ],
)
def test_the_tap_of_published_models_is_known(tmp_path, folder, step, tap, why):
    found = load_reference(
        writer.write(tmp_path / folder / f"model.ckpt-{step}", variables() | {"global_step": np.int64(step)}).parent
    )
    assert found.tap == found.classifier.tap == tap
    assert why in found.why


def test_the_tap_decides_what_the_classifier_sees(tmp_path):
    prefix = writer.write(tmp_path / "m", variables())
    x = torch.rand(2, 3, 32, 32)
    for tap in (0, 1, 2):
        body, head, classifier = load_reference(prefix, tap=tap)
        with torch.no_grad():
            assert torch.equal(classifier(x), classifier.linear(head(body(x), upto=tap)))
    with pytest.raises(UsageError, match="tap 3 has 16") as caught:
        load_reference(prefix, tap=3)
    assert "0 or 1 or 2" in caught.value.fix


def test_a_classifier_on_the_projections_is_known_by_its_width(tmp_path):
    arrays = variables() | {"head_supervised/linear_layer/dense/kernel": np.ones((16, 10), np.float32)}
    found = load_reference(writer.write(tmp_path / "m", arrays))
    assert (found.tap, found.why) == (3, "the only layer with 16 features")


def test_what_the_optimizer_trained_tells_the_tap(tmp_path):
    arrays = variables()
    slot = {"head_contrastive/nl_0/dense/kernel/Momentum": arrays["head_contrastive/nl_0/dense/kernel"]}
    assert load_reference(writer.write(tmp_path / "supervised" / "m", arrays | slot)).tap == 1


# --- what is refused -------------------------------------------------------------------------------------------


def test_all_faults_of_a_file_are_told_at_once(tmp_path):
    arrays = variables()
    del arrays["base_model/batch_normalization_3/beta"]
    arrays["base_model/conv2d_7/kernel"] = np.zeros((3, 3, 8, 8), np.float32)
    with pytest.raises(DataError) as caught:
        load_reference(writer.write(tmp_path / "m", arrays))
    assert set(caught.value.details) == {
        "norm/3/beta is missing",
        "base_model/conv2d_7/kernel is (3, 3, 8, 8), the network has (3, 3, 8, 16)",
    }
    assert caught.value.exit_code == 65


def test_values_that_are_not_finite_are_refused(tmp_path):
    arrays = variables()
    arrays["base_model/conv2d_2/kernel"][0, 0, 0, 0] = np.nan
    arrays["base_model/batch_normalization_1/gamma"][1] = np.inf
    with pytest.raises(DataError) as caught:
        load_reference(writer.write(tmp_path / "m", arrays))
    assert [detail.split()[0] for detail in caught.value.details] == [
        "base_model/conv2d_2/kernel",
        "base_model/batch_normalization_1/gamma",
    ]


@pytest.mark.parametrize(
    "arrays",
    [
        {"weights": np.zeros(3, np.float32)},
        {f"base_model/conv2d_{k}/kernel": np.zeros((3, 3, 8, 8), np.float32) for k in range(9)},
        {f"base_model/conv2d_{k}/kernel": np.float32(0) for k in range(9)},
        {"base_model/conv2d/kernel": np.zeros((3, 3, 3, 1 << 16), np.float32)},
    ],
)
def test_other_models_are_refused(tmp_path, arrays):
    with pytest.raises(DataError, match="not a SimCLRv2 model"):
        load_reference(writer.write(tmp_path / "m", arrays))


@pytest.mark.parametrize("hidden", [0, 1])
def test_a_small_file_cannot_claim_a_big_network(tmp_path, hidden):
    """30 kB that speak of a ResNet-18 of width 4,000 must not cost its terabytes, whatever the other shapes are."""
    arrays = {name: np.zeros((hidden,) * array.ndim, np.float32) for name, array in variables().items()}
    for k in range(21):
        side = 1 if k in (1, 6, 11, 16) else 3
        arrays[f"base_model/conv2d{f'_{k}' if k else ''}/kernel"] = np.zeros((side, side, hidden, hidden), np.float32)
    arrays["base_model/conv2d/kernel"] = np.zeros((3, 3, hidden, 256_000 if not hidden else 2048), np.float32)
    with pytest.raises(DataError, match="not a SimCLRv2 model"):
        load_reference(writer.write(tmp_path / "m", arrays))


@pytest.mark.parametrize("shape", [(), (64,), (64, 10, 1), (0, 10), (64, 0)])
def test_a_classifier_of_no_shape_is_refused(tmp_path, shape):
    arrays = variables() | {"head_supervised/linear_layer/dense/kernel": np.zeros(shape, np.float32)}
    with pytest.raises(DataError, match="not a SimCLRv2 model"):
        load_reference(writer.write(tmp_path / "m", arrays))


def test_names_of_golden_variables_are_all_understood(golden):
    """Both versions' lists of variables lead to the same plain names."""
    for model in ("r18_cifar", "r50_1x_sk0", "r50_1x_sk1"):
        plain = []
        for version in (1, 2):
            lines = (golden / f"variables_tf{version}_{model}.txt").read_text().splitlines()
            names = [line.split("\t")[0].removesuffix(":0") for line in lines]
            plain.append(set(reference._plain({name: name for name in names})))
        assert plain[0] - {"step"} == plain[1] - {"step"}
