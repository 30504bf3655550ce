"""The projection head with its taps, and the classifier on one of them.

Shapes: N images, D features of the encoder, F features at a tap, K classes.
Source: google-research/simclr at 383d414, `model_util.py: projection_head, supervised_head`.
"""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor, nn

from fewlabels.errors import UsageError
from fewlabels.model.encoder import Encoder
from fewlabels.model.layers import BatchNorm, at_least_float32, full_precision


class ProjectionLayer(nn.Module):
    """Linear without bias, batch norm, ReLU; the last layer of a head has neither ReLU nor the batch norm's shift."""

    def __init__(self, features_in: int, features: int, *, last: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(features_in, features, bias=False)
        nn.init.normal_(self.linear.weight, std=0.01)
        self.norm = BatchNorm(features, bias=not last)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x))
        return y if self.last else nnf.relu_(y)


class ProjectionHead(nn.Module):
    """Features to projections: (N, in_features) -> (N, out_features).

    Hidden layers are as wide as the features. Paper: 3 layers, 128 projections. `layers` are the modules in order.
    """

    def __init__(self, in_features: int, out_features: int = 128, layers: int = 3) -> None:
        super().__init__()
        if layers < 1:
            raise UsageError(f"a projection head of {layers} layers", fix="use at least 1 layer (the paper: 3)")
        self.in_features, self.out_features = in_features, out_features
        self.layers = nn.ModuleList(ProjectionLayer(in_features, in_features, last=False) for _ in range(layers - 1))
        self.layers.append(ProjectionLayer(in_features, out_features, last=True))

    def forward(self, x: Tensor, upto: int | None = None) -> Tensor:
        """upto: None for all layers, k for the output of layer k (1 is the first layer's, 0 is x itself)."""
        for layer in list(self.layers)[: self._tap(upto)]:
            x = layer(x)
        return x

    def width(self, upto: int | None = None) -> int:
        """The number of features of forward(x, upto)."""
        return self.out_features if self._tap(upto) == len(self.layers) else self.in_features

    def _tap(self, upto: int | None) -> int:
        count = len(self.layers)
        tap = count if upto is None else upto
        if not 0 <= tap <= count:
            raise UsageError(
                f"tap {upto} of a projection head with {count} layers",
                fix=f"use 0 (the features) to {count} (the projections); the paper fine-tunes from 1",
            )
        return tap


class Classifier(nn.Module):
    """Encoder, the first `tap` layers of the projection head, and a linear layer, at zero at first.

    (N, 3, H, W) -> logits (N, num_classes). The modules are shared with encoder and head, not copied; the layers above
    the tap are dropped. tap=1 is the paper's choice for few labels, and then fine-tuning trains that layer too (as in
    the paper and TF2; the TF1 code leaves it as it was). head may be None when tap is 0.
    """

    def __init__(self, encoder: Encoder, head: ProjectionHead | None, *, tap: int, num_classes: int) -> None:
        super().__init__()
        if head is None and tap != 0:
            raise UsageError(f"tap {tap} without a projection head", fix="give the head, or tap=0")
        if num_classes < 1:
            raise UsageError(f"a classifier of {num_classes} classes", fix="give at least one class")
        width = encoder.feature_dim if head is None else head.width(tap)
        self.encoder = encoder
        self.head = nn.Sequential() if head is None else nn.Sequential(*list(head.layers)[:tap])
        self.tap = tap
        self.linear = nn.Linear(width, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, F): what the linear layer sees, float32 or higher."""
        return at_least_float32(self.head(self.encoder(x)))

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        with full_precision(features):
            return self.linear(features)  # type: ignore[no-any-return]
