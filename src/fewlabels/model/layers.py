"""Layers whose details decide whether the network is the paper's: batch norm over all ranks, TensorFlow's padding.

Shapes: N images, C channels, H x W pixels, R ranks, M = values per channel (N, or N*H*W).
Source: google-research/simclr at 383d414, `resnet.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewlabels import runtime
from fewlabels.errors import UsageError

DECAY = 0.9  # of the running statistics (reference `BATCH_NORM_DECAY`)
EPSILON = 1e-5

_still = False  # while something is computed a second time: no running statistics move


class BatchNorm(nn.Module):
    """Batch norm of (N, C) or (N, C, H, W) whose statistics are those of the whole batch, over all ranks.

    As the reference, and unlike torch.nn.BatchNorm2d, the running variance takes the biased variance. Ranks may
    hold different numbers of images. Statistics are float32 or higher under autocast too.

    zero_scale: start with scale 0, so that a residual branch starts as the identity.
    bias: False leaves out the shift (the last layer of the projection head).
    """

    running_mean: Tensor  # (C,)
    running_variance: Tensor  # (C,)
    _use = "own"  # see `statistics`
    _kept: tuple[Tensor, Tensor]  # mean and biased variance (C,) of the batch

    def __init__(self, channels: int, *, zero_scale: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels) if zero_scale else torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_variance, self.weight, self.bias, eps=EPSILON)
        if self._use == "given":
            return _GlobalBatchNorm.apply(x, self.weight, self.bias, *self._kept)[0]  # type: ignore[no-any-return]
        return self._alone(x) if runtime.world_size() == 1 and self._use == "own" else self._together(x)

    def _alone(self, x: Tensor) -> Tensor:
        """The fused kernel, made to keep the biased variance.

        The kernel does v <- decay*v + (1-decay) * var * M/(M-1). Fed v*M/(M-1) instead, its result times (M-1)/M is
        decay*v + (1-decay)*var. It works on a copy, because it saves its statistics for backward, which refuses
        tensors changed in between.
        """
        count = x.numel() // x.shape[1]  # M
        if count < 2:
            raise UsageError(
                "batch norm got a batch with one value per channel",
                why="the variance of one value is 0, so every feature would become 0",
                fix="train with at least 2 images in a batch",
            )
        mean = self.running_mean.clone() if _still else self.running_mean
        variance = self.running_variance * (count / (count - 1))
        y = F.batch_norm(x, mean, variance, self.weight, self.bias, True, 1 - DECAY, EPSILON)
        if not _still:
            self.running_variance.copy_(variance * ((count - 1) / count))
        return y

    def _together(self, x: Tensor) -> Tensor:
        y, mean, variance = _GlobalBatchNorm.apply(x, self.weight, self.bias, None, None)
        if self._use == "keep":
            self._kept = mean, variance
        if not _still:
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), 1 - DECAY)
            self.running_variance.lerp_(variance.to(self.running_variance.dtype), 1 - DECAY)
        return y  # type: ignore[no-any-return]


@contextlib.contextmanager
def statistics(module: nn.Module, use: str) -> Iterator[None]:
    """In the block, how the training batch norms of module get their statistics: "own", of what they are shown; "keep",
    the same, and they remember them; "given", the remembered ones, and no running statistics move.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, BatchNorm)]
    for norm in norms:
        norm._use = use
    try:
        yield
    finally:
        for norm in norms:
            norm._use = "own"


class _GlobalBatchNorm(torch.autograd.Function):
    """Batch norm with one collective forward and one backward.

    forward(x, weight (C,), bias (C,) | None, mean, variance) -> y like x; mean and biased variance (C,), those given or
    else those over all ranks.
    The gradient of x is exact for the sum of all ranks' losses; where statistics are given, the two means in it are
    over x on all ranks all the same. Those of weight and bias are this rank's share of it:
    runtime.average_gradients joins them, as it does for every other parameter.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if mean is None or variance is None:
            mean, variance, total = _global_statistics(x)
        else:
            total = mean.new_full((), x.numel() // x.shape[1] * runtime.world_size())
        scale = torch.rsqrt(variance + EPSILON)  # (C,)
        ctx.save_for_backward(x, weight, mean, scale, total)
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(mean, variance)
        # The inference kernel is the fused form of (x - mean) * scale * weight + bias, in any pair of dtypes.
        return F.batch_norm(x, mean, variance, weight, bias, eps=EPSILON), mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, total = ctx.saved_tensors
        axes, shape = _axes(x)
        dy = gradients[0].to(mean.dtype)
        normal = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)  # like x
        sums = torch.stack([dy.sum(axes), (dy * normal).sum(axes)])  # (2, C), this rank's
        d_bias, d_weight = sums.to(weight.dtype).clone()
        sums = runtime.sum_over_ranks(sums) / total
        dx = (dy - sums[0].view(shape) - normal * sums[1].view(shape)) * (scale * weight).view(shape)
        return dx.to(x.dtype), d_weight, d_bias if ctx.has_bias else None, None, None


def _axes(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes that batch norm averages over, and the shape that spreads (C,) over x."""
    return (0, *range(2, x.dim())), (1, -1, *([1] * (x.dim() - 2)))


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance (C,) of x over all ranks, and the number of values per channel over all ranks.

    Chan, Golub & LeVeque 1979: exact where E[x^2] - E[x]^2 would cancel in float32.
    """
    axes, shape = _axes(x)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    count = x.numel() // x.shape[1]
    mean = x.sum(axes) / max(count, 1)  # a rank may be out of images
    spread = (x - mean.view(shape)).square_().sum(axes)  # sum of squared deviations, (C,)
    own = torch.cat([mean, spread, mean.new_full((1,), count)])
    parts = runtime.gather(own[None])  # (R, 2C + 1)
    means, spreads = parts[:, :-1].chunk(2, dim=1)
    counts = parts[:, -1:]  # (R, 1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    spread = (spreads + (means - mean).square() * counts).sum(0)
    return mean, spread / total, total


def recomputed(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """part(x), of which only x is kept: backward computes the rest again. part draws no random numbers."""
    kept: Tensor = checkpoint(
        part, x, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (contextlib.nullcontext(), _stand())
    )
    return kept


@contextlib.contextmanager
def _stand() -> Iterator[None]:
    global _still  # noqa: PLW0603 - backward computes in a thread of its own, while the one that asked for it waits
    _still = True
    try:
        yield
    finally:
        _still = False


def full_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The block computes in the dtype of its tensors even under autocast.

    bf16 keeps 3 digits: a logit of 20 moves by 0.06, which a distillation temperature of 0.1 makes 0.6.
    Outside autocast nothing is done, so that an exported graph has no trace of it.
    """
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def max_pool(x: Tensor) -> Tensor:
    """3x3 max-pool of stride 2 with TensorFlow's SAME padding: (N, C, H, W) -> (N, C, ceil(H/2), ceil(W/2)).

    An even side is padded only at its end, which ceil_mode does without a copy; an odd one on both. Torchvision's
    padding of 1 on both sides moves every window by one pixel (features change by 0.2-4 %, method.md 0.2).
    """
    height, width = x.shape[2:]
    return F.max_pool2d(x, 3, 2, padding=(height % 2, width % 2), ceil_mode=True)


class ShortcutPool(nn.Module):
    """The 2x2 average pool before the shortcut convolution of ResNet-D.

    stride 2: one zero row and column at the end of odd sides, counted in the average.
    stride 1: TensorFlow's SAME, where the padding is not counted: at the end, the last row and column repeat.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, 1)
        height, width = x.shape[2:]
        if height % 2 or width % 2:
            x = F.pad(x, (0, width % 2, 0, height % 2))
        return F.avg_pool2d(x, 2, 2)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, and ReLU unless relu=False; the padding is symmetric, (kernel-1)//2.

    The reference's explicit padding of strided convolutions is the same for odd kernels.
    """

    def __init__(
        self, channels_in: int, channels: int, *, kernel: int = 1, stride: int = 1, relu: bool = True,
        zero_scale: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        # oneDNN's gradient of a strided 1x1 kernel writes beyond its buffer in channels_last below 16 channels (its
        # issue 6035; torch 2.14: segmentation faults on 2 threads). Every n-th pixel at stride 1 is the same product.
        self.skip = stride if kernel == 1 and channels_in < 16 else 1
        self.conv = conv(channels_in, channels, kernel=kernel, stride=stride // self.skip)
        self.norm = BatchNorm(channels, zero_scale=zero_scale)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x[:, :, :: self.skip, :: self.skip] if self.skip > 1 else x))
        # in place: batch norm needs its input in backward, not its output
        return F.relu_(y) if self.relu else y


def conv(channels_in: int, channels: int, *, kernel: int = 1, stride: int = 1) -> nn.Conv2d:
    """A bias-free convolution with the reference's start: fan-in variance scaling of scale 1 (not He's 2).

    A normal distribution cut at two standard deviations, widened so that the cut one has std 1/sqrt(fan_in).
    """
    layer = nn.Conv2d(channels_in, channels, kernel, stride=stride, padding=(kernel - 1) // 2, bias=False)
    sigma = (channels_in * kernel * kernel) ** -0.5 / 0.87962566103423978
    nn.init.trunc_normal_(layer.weight, std=sigma, a=-2 * sigma, b=2 * sigma)
    return layer


class SelectiveKernel(nn.Module):
    """Two 3x3 branches, mixed per channel by what the whole image shows (Li et al. 2019, as in the reference).

    (N, channels_in, H, W) -> (N, channels, H/stride, W/stride). ratio: width of the mixing layer, at least 32.
    Both branches are plain 3x3 and run as one convolution.
    """

    def __init__(self, channels_in: int, channels: int, *, stride: int, ratio: float) -> None:
        super().__init__()
        middle = max(int(channels * ratio), 32)
        self.branches = ConvNorm(channels_in, 2 * channels, kernel=3, stride=stride)
        self.squeeze = ConvNorm(channels, middle)
        self.mix = conv(middle, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branches(x)  # (N, 2C, H, W)
        first, second = y.chunk(2, dim=1)
        summary = torch.add(*y.mean((2, 3), keepdim=True).chunk(2, dim=1))  # (N, C, 1, 1)
        preference = self.mix(self.squeeze(summary))  # (N, 2C, 1, 1)
        of_first, of_second = preference.chunk(2, dim=1)
        # The softmax over two is a sigmoid of their difference, which autocast leaves in y's dtype.
        return torch.lerp(second, first, torch.sigmoid(of_first - of_second))
