"""Blocks compiled by torch.compile: the same names, and what they compute is close to what they compute otherwise."""

from __future__ import annotations

import copy

import pytest
import torch

from fewlabels import runtime
from fewlabels.data.loader import Batch
from fewlabels.model.encoder import encoder
from fewlabels.use import compare


@pytest.mark.filterwarnings("ignore:.*of a Tensor that is not a leaf")  # torch's own capture looks at it
@pytest.mark.parametrize("name", ["resnet18_0.125x_small", "resnet50_0.125x_sk"])
def test_compiled_blocks_train_as_others(name: str) -> None:
    """By the backend that captures graphs and gradients and leaves the kernels alone: the others take minutes."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    plain = encoder(name)
    compiled = copy.deepcopy(plain)
    compiled.compile_blocks("aot_eager")
    images = torch.rand(2, 4, 3, 32, 32)
    for views in images:
        for body in (plain, compiled):
            body.zero_grad(set_to_none=True)
            (body(views) * torch.linspace(-1, 1, body.feature_dim)).sum().backward()
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counted >= 5, "nothing was compiled"
    torch._dynamo.reset()
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    for (tensor_name, wanted), found in zip(plain.state_dict().items(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=tensor_name)
    for wanted_parameter, found_parameter in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(found_parameter.grad, wanted_parameter.grad, rtol=1e-4, atol=1e-5)
    assert copy.deepcopy(compiled)(images[0]).shape == (4, plain.feature_dim)  # a copy is not compiled, and works


@pytest.mark.filterwarnings("ignore:.*of a Tensor that is not a leaf")
def test_evaluation_compiles_nothing_and_leaves_training_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network = encoder("resnet18_0.125x_small").eval()
    network.compile_blocks("aot_eager")

    def batches(_: object, ids: list[int], **__: object) -> list[Batch]:
        sizes = torch.full((1, 2), 16), torch.zeros(1, dtype=torch.long)
        made = [Batch(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), sizes[0], sizes[1], sizes[1], 0)]
        return made * len(ids)

    monkeypatch.setattr(compare, "in_order", batches)
    setting = compare.Setting(16, "photo", torch.device("cpu"), runtime.Precision(None, channels_last=True))
    assert compare.outputs(None, [], setting, lambda view: [network(view)]) == []  # type: ignore[arg-type]
    (found,) = compare.outputs(None, [0, 1], setting, lambda view: [network(view)])  # type: ignore[arg-type]
    assert found.shape == (2, network.feature_dim)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    network(torch.zeros(1, 3, 16, 16))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
