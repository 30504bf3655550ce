"""Weights under the names of the reference's TensorFlow variables, put into our modules by their order of creation."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fewlabels.model.layers import BatchNorm

BN_NAMES = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_variance": "moving_variance",
}


def tensors_by_name(*, encoder: nn.Module, head: nn.Module | None = None, linear: nn.Module | None = None) -> dict:
    """TensorFlow variable name -> our parameter or buffer (not a copy)."""
    found: dict[str, Tensor] = {}
    convs = [part for part in encoder.modules() if isinstance(part, nn.Conv2d)]
    norms = [part for part in encoder.modules() if isinstance(part, BatchNorm)]
    for k, conv in enumerate(convs):
        found[f"base_model/conv2d{f'_{k}' if k else ''}/kernel"] = conv.weight
    for k, norm in enumerate(norms):
        found |= _norm(f"base_model/batch_normalization{f'_{k}' if k else ''}", norm)
    for j, layer in enumerate(head.layers if head is not None else []):
        found[f"head_contrastive/nl_{j}/dense/kernel"] = layer.linear.weight
        found |= _norm(f"head_contrastive/nl_{j}/batch_normalization", layer.norm)
    if linear is not None:
        found["head_supervised/linear_layer/dense/kernel"] = linear.weight
        found["head_supervised/linear_layer/dense/bias"] = linear.bias
    return found


def _norm(prefix: str, norm: BatchNorm) -> dict[str, Tensor]:
    parts = {theirs: getattr(norm, ours) for ours, theirs in BN_NAMES.items()}
    return {f"{prefix}/{name}": tensor for name, tensor in parts.items() if tensor is not None}


def to_ours(array: np.ndarray) -> Tensor:
    """conv HWIO -> OIHW, dense (in, out) -> (out, in), vectors as they are; float64."""
    order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]
    return torch.from_numpy(np.ascontiguousarray(array.transpose(order)).astype(np.float64))


def fill(tensors: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray] | None = None) -> None:
    """Copy arrays by name into tensors, every one of them; without arrays, the README's deterministic weights."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            value = to_ours(arrays[name]) if arrays is not None else deterministic(name, tuple(tensor.shape))
            assert value.shape == tensor.shape, name
            tensor.copy_(value)


def deterministic_average(name: str, shape: tuple[int, ...]) -> Tensor:
    """The moving average of a variable: the same with another seed."""
    return deterministic(name, shape, seed=f"ema:{name}")


def deterministic(name: str, shape: tuple[int, ...], *, seed: str = "") -> Tensor:
    """`det_weight` of golden/README.md, for our shape of the variable."""
    theirs = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[len(shape)]
    shape = tuple(shape[axis] for axis in theirs)
    random = np.random.RandomState(zlib.crc32((seed or name).encode()))
    kind = name.split("/")[-1]
    if kind == "kernel":
        array = random.standard_normal(shape) * np.sqrt(1 / np.prod(shape[:-1]))
    elif kind in ("gamma", "moving_variance"):
        array = random.uniform(0.5, 1.5, shape)
    else:
        array = random.standard_normal(shape) * 0.1
    return to_ours(array.astype(np.float32))


def images(array: np.ndarray) -> Tensor:
    """(N, H, W, C) -> (N, C, H, W) float64."""
    return torch.from_numpy(array).permute(0, 3, 1, 2).double()


def relative(ours: Tensor, theirs: np.ndarray) -> float:
    """Largest difference relative to the largest value; 4-D theirs is channels-last."""
    if theirs.ndim == 4:
        theirs = theirs.transpose(0, 3, 1, 2)
    assert tuple(ours.shape) == theirs.shape
    difference = np.abs(ours.detach().double().numpy() - theirs).max()
    return float(difference / max(np.abs(theirs).max(), 1e-30))
