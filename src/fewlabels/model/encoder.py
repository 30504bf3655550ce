"""The encoders: every ResNet of the paper, small ones, and any timm model.

Shapes: N images, 3 x H x W pixels in [0, 1] (the method never normalises by mean and std), D features.
Modules are created in the order of the reference's variables (shortcut first), so the k-th convolution and the k-th
batch norm of `modules()` are its `conv2d_k` and `batch_normalization_k`.
Source: google-research/simclr at 383d414, `resnet.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from numbers import Real
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewlabels.errors import UsageError, nearest
from fewlabels.model.layers import BatchNorm, ConvNorm, SelectiveKernel, ShortcutPool, conv, max_pool, recomputed

BLOCKS = {  # depth: residual blocks in each of the four groups
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
STEMS = ("imagenet", "small")
SK_RATIO = 1 / 16  # of every published model with selective kernels


# --- by name -----------------------------------------------------------------------------------------------


def encoder(name: str) -> Encoder:
    """An encoder by its name, with fresh weights; (N, 3, H, W) -> (N, .feature_dim), and `.freeze(block)`.

    name: "resnet50", "resnet18_0.25x", "resnet152_3x_sk", "resnet18_small" (suffixes in this order: width, selective
    kernels, small stem), or "timm:NAME" for any model of timm.
    Raises UsageError for names that are none of these, with the nearest one that is.
    """
    name = str(name)
    if name.startswith("timm:"):
        return TimmEncoder(name.removeprefix("timm:"))
    match = re.fullmatch(r"resnet(\d{2,3})(?:_(\d+(?:\.\d+)?)x)?(_sk)?(_small)?", name, re.ASCII)
    if match is None or int(match[1]) not in BLOCKS:
        endings = ("", "_0.125x", "_0.25x", "_0.5x", "_2x", "_sk", "_2x_sk", "_small")
        names = [f"resnet{depth}{ending}" for depth in BLOCKS for ending in endings]
        raise UsageError(
            f'unknown encoder "{name}"{nearest(name, names)}',
            fix=f"use resnetDEPTH[_WIDTHx][_sk][_small] with depth {_listed(BLOCKS)}, or timm:NAME",
        )
    stem = "small" if match[4] else "imagenet"
    return resnet(int(match[1]), width=float(match[2] or 1), selective_kernel=match[3] is not None, stem=stem)


def resnet(depth: int, *, width: float = 1, selective_kernel: bool = False, stem: str = "imagenet") -> ResNet:
    """A ResNet as in the paper; (N, 3, H, W) float in [0, 1] -> (N, .feature_dim), float32 or higher.

    depth: 18, 34 (basic blocks), 50, 101, 152 or 200 (bottlenecks). width: multiplies all channels; fractions give
    the small networks. selective_kernel: the paper's SK networks, with the stem and shortcuts of ResNet-D.
    stem: "imagenet" (7x7 convolution of stride 2, pool) or "small" (3x3, no pool; for images up to about 64 pixels).
    Raises UsageError for anything else.
    """
    if depth not in list(BLOCKS):
        raise UsageError(f"there is no ResNet of depth {depth!r}", fix=f"use depth {_listed(BLOCKS)}")
    if not (isinstance(width, Real) and 1 / 64 <= width < math.inf):
        raise UsageError(
            f"width = {width!r}, but it multiplies the channels",
            why="below 1/64 the first layer has none left",
            fix="use 1, 2, 3, 0.5, 0.25, 0.125 ...",
        )
    if stem not in STEMS:
        raise UsageError(f'unknown stem "{stem}"{nearest(str(stem), STEMS)}', fix='use "imagenet" or "small"')
    if selective_kernel and depth < 50:
        raise UsageError(
            f"a ResNet of depth {depth} cannot have selective kernels",
            why="they replace the 3x3 convolution of a bottleneck, and basic blocks have no bottleneck",
            fix="use depth 50 or more, or no selective kernels",
        )
    return ResNet(depth, width=width, sk_ratio=SK_RATIO if selective_kernel else 0.0, stem=stem)


def _listed(numbers: Iterable[int]) -> str:
    *most, last = [str(number) for number in numbers]
    return f"{', '.join(most)} or {last}"


class Encoder(nn.Module):
    """What every encoder has: (N, 3, H, W) -> (N, feature_dim), and parts that can be frozen."""

    feature_dim: int
    freezable: tuple[int, ...]  # what freeze accepts
    _frozen = -1
    _recomputes = False

    @property
    def blocks(self) -> list[nn.Module]:
        """The parts that freeze counts, from the images up."""
        raise NotImplementedError

    @property
    def pieces(self) -> list[nn.Module]:
        """The stem and the residual blocks one by one; a timm model is one piece."""
        return [piece for part in self.blocks for piece in (part if isinstance(part, nn.Sequential) else [part])]

    def freeze(self, block: int) -> None:
        """Freeze the parts up to block, and no others: -1 nothing, 0 the stem, 1 to 3 groups, 4 the whole encoder.

        Frozen parts get no gradients, and their batch norm stays in inference mode, whatever train() says. Here we
        leave the reference, whose frozen blocks go on updating batch norm (TF2 always, TF1 unless all are frozen).
        Of a timm model only nothing or all can be frozen. Raises UsageError for other numbers.
        """
        if block not in self.freezable:
            raise UsageError(
                f"cannot freeze {type(self).__name__} up to block {block}", fix=f"use {_listed(self.freezable)}"
            )
        self._frozen = block
        for number, part in enumerate(self.blocks):
            part.requires_grad_(number > block)
        self.train(self.training)

    def recompute(self, *, on: bool) -> None:
        """Whether training keeps only what enters each block, and computes the rest again for the gradient (Chen et
        al. 2016, arXiv 1604.06174). Nothing else changes. Raises UsageError for a timm model that cannot.
        """
        self._recomputes = on

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile every residual block by torch.compile, at its first use; names of tensors stay. Results are close,
        not bit-identical. By blocks, because equal ones share what was compiled and a whole network takes minutes.
        """
        # Blocks share the code of their class: a ResNet has 9 kinds of it, more than torch's limit of 8
        torch._dynamo.config.recompile_limit = 64
        for block in self.pieces:
            block.compile(dynamic=False, backend=backend)

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 - torch's signature
        super().train(mode)
        for part in self.blocks[: self._frozen + 1]:
            part.eval()
        return self


# --- the network -------------------------------------------------------------------------------------------


class ResNet(Encoder):
    """Stem, four groups of residual blocks, mean over the pixels. Made by `resnet`, which checks its arguments.

    sk_ratio: 0 for plain networks, else the width ratio of the selective kernels.
    """

    freezable = (-1, 0, 1, 2, 3, 4)

    def __init__(self, depth: int, *, width: float, sk_ratio: float, stem: str) -> None:
        super().__init__()
        channels = round(64 * width)
        self.stem = Stem(channels, resnet_d=sk_ratio > 0, small=stem == "small")
        groups = []
        for number, count in enumerate(BLOCKS[depth]):
            filters, stride = round(64 * width) * 2**number, 2 if number else 1
            group, channels = _group(
                channels, filters, count=count, stride=stride, bottleneck=depth >= 50, sk_ratio=sk_ratio
            )
            groups.append(group)
        self.group1, self.group2, self.group3, self.group4 = groups
        self.feature_dim = channels

    @property
    def blocks(self) -> list[nn.Module]:
        """[stem, group1, group2, group3, group4]: the parts that `freeze` counts."""
        return [self.stem, self.group1, self.group2, self.group3, self.group4]

    def forward(self, x: Tensor) -> Tensor:
        for part in self.pieces:
            again = self._recomputes and part.training and torch.is_grad_enabled()
            x = recomputed(part, x) if again else part(x)
        return x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))  # bf16 features would keep 3 digits


class Stem(nn.Module):
    """(N, 3, H, W) -> (N, channels, H/4, W/4), or (N, channels, H, W) when small.

    resnet_d: three 3x3 convolutions in place of the 7x7 one, the first two of half the channels. A small stem is one
    3x3 convolution whatever resnet_d is, as in the reference.
    """

    def __init__(self, channels: int, *, resnet_d: bool, small: bool) -> None:
        super().__init__()
        self.small = small
        self.first = nn.Sequential()
        if small:
            self.conv = conv(3, channels, kernel=3)
        elif resnet_d:
            half = max(1, channels // 2)
            self.first.extend([ConvNorm(3, half, kernel=3, stride=2), ConvNorm(half, half, kernel=3)])
            self.conv = conv(half, channels, kernel=3)
        else:
            self.conv = conv(3, channels, kernel=7, stride=2)
        self.norm = BatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.norm(self.conv(self.first(x))))
        return x if self.small else max_pool(x)


class Residual(nn.Module):
    """relu(branch(x) + shortcut(x))."""

    def __init__(self, shortcut: nn.Module, branch: nn.Sequential) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        # in place: the branch ends in batch norm, which does not need its output in backward
        return F.relu_(self.branch(x).add_(shortcut))


def _group(
    channels: int, filters: int, *, count: int, stride: int, bottleneck: bool, sk_ratio: float
) -> tuple[nn.Sequential, int]:
    """Residual blocks, and the channels that come out of them.

    A block is two 3x3 convolutions, or a bottleneck: 1x1, 3x3 (or selective kernel) and 1x1 to four times the filters.
    The stride is in its first 3x3 convolution. The first block projects its input, in group 1 too.
    """
    blocks, out = nn.Sequential(), 4 * filters if bottleneck else filters
    outer = 1 if bottleneck else 3  # kernel of a block's first and last convolution
    for index in range(count):
        step = 1 if index else stride
        shortcut: nn.Module = nn.Identity()
        if index == 0 and sk_ratio:
            shortcut = nn.Sequential(ShortcutPool(stride), ConvNorm(channels, out, relu=False))
        elif index == 0:
            shortcut = ConvNorm(channels, out, stride=stride, relu=False)
        branch = nn.Sequential(ConvNorm(channels, filters, kernel=outer, stride=1 if bottleneck else step))
        if sk_ratio:
            branch.append(SelectiveKernel(filters, filters, stride=step, ratio=sk_ratio))
        elif bottleneck:
            branch.append(ConvNorm(filters, filters, kernel=3, stride=step))
        branch.append(ConvNorm(filters, out, kernel=outer, relu=False, zero_scale=True))
        blocks.append(Residual(shortcut, branch))
        channels = out
    return blocks, channels


# --- timm --------------------------------------------------------------------------------------------------


class TimmEncoder(Encoder):
    """A timm model without its classifier and with fresh weights, as an encoder.

    Images come in [0, 1] as everywhere; a model that wants them normalised learns it in its first layer.
    Its batch norms normalise by one rank's images; running statistics are the mean of all ranks' after every step.
    """

    freezable = (-1, 4)

    def __init__(self, name: str) -> None:
        # 2.0 s, more than torch itself: only those pay who ask for a timm model
        import timm

        super().__init__()
        if not timm.is_model(name):
            raise UsageError(
                f'timm has no model "{name}"{nearest(name, timm.list_models())}',
                fix='see timm.list_models("*resnet*") for names',
            )
        try:
            self.model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
        except (RuntimeError, ValueError) as error:  # what follows a dot names weights, which are not loaded
            raise UsageError(f'timm cannot make "{name}": {error}', fix="leave out what follows the dot") from error
        self.feature_dim = int(getattr(self.model, "head_hidden_size", None) or self.model.num_features)  # type: ignore[arg-type]

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.model]

    def recompute(self, *, on: bool) -> None:
        norms = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in self.model.modules())
        try:
            if norms and on:
                raise AssertionError("its batch norms would count every batch twice")
            self.model.set_grad_checkpointing(on)  # type: ignore[operator]
        except (AssertionError, AttributeError) as error:
            raise UsageError(
                f"{type(self.model).__name__} of timm cannot compute its activations again: {error}",
                fix="leave out recompute, or choose another network",
            ) from error

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)  # type: ignore[no-any-return]
