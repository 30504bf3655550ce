"""What docs/scaling.md counts on the meta device is what a real pass does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fewlabels.model.layers import BatchNorm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import scaling


def test_a_pass_of_many_has_one_collective_a_batch_norm_and_direction() -> None:
    counted = scaling.count("resnet18_0.25x_small", world=4, views=8, side=32)
    norms = sum(isinstance(part, BatchNorm) for part in scaling.Pair("resnet18_0.25x_small").modules())
    assert counted["collectives"] == 2 * norms
    assert scaling.count("resnet18_0.25x_small", world=1, views=8, side=32)["collectives"] == 0


def test_flops_are_those_of_the_literature() -> None:
    """ResNet-50 at 224 px: 4.09 G multiplications and additions forward, twice that backward but for the images."""
    counted = scaling.count("resnet50", world=1, views=2)
    head = 2 * 2048 * 2048 + 2048 * 128
    assert counted["forward_flops"] == pytest.approx(2 * (4.09e9 + head), rel=0.01)
    assert counted["flops"] == pytest.approx(3 * counted["forward_flops"], rel=0.03)


def test_what_is_kept_is_what_autograd_keeps() -> None:
    """On the CPU, in bytes: the same hooks on real tensors."""
    counted = scaling.count("resnet18_0.25x_small", world=1, views=8, side=32)
    network = scaling.Pair("resnet18_0.25x_small").to(torch.bfloat16)
    own = {p.data_ptr() for p in [*network.parameters(), *network.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = network(torch.rand(8, 3, 32, 32, dtype=torch.bfloat16))
    assert sum(kept.values()) / 8 == pytest.approx(counted["kept_bytes"], rel=0.02)
    del held


def test_the_largest_network_is_the_papers() -> None:
    counted = scaling.count(scaling.PAPER, world=8, views=2)
    assert counted["parameters"] == pytest.approx(795e6 + 2 * 6144**2 + 6144 * 128, rel=0.001)
    few, many = (scaling.predict(counted, gpus, scaling.memory(counted)) for gpus in (64, 512))
    assert few["network_share"] > many["network_share"]


def test_sharding_divides_all_but_the_copies_and_what_is_on_its_way() -> None:
    counted = {"kept_bytes": 342e6, "block_inputs_bytes": 79e6, "largest_block_bytes": 0.0}
    alone, whole, shared = (scaling.memory(counted, *how, shard=how == (8,)) for how in ((1,), (64,), (8,)))
    weights = 4 * (795e6 + 2 * 6144**2 + 6144 * 128)
    assert alone["state_total"] == pytest.approx(4.5 * weights, rel=0.001)  # weights, average, gradients, momentum
    assert whole["state_total"] == pytest.approx(5.5 * weights, rel=0.001)  # and the all-reduce
    # The first block of group 4, but for its small layers: shortcut, 1x1, both branches of 3x3, 1x1
    largest = 4 * (3072 * 6144 + 3072 * 1536 + 1536 * 3072 * 9 + 1536 * 6144)
    assert shared["state_total"] == pytest.approx(0.5 * weights + 4 * weights / 8 + 4 * largest, rel=0.03)
