"""Stage 3 otherwise: the fine-tuned network teaches itself with the unlabeled images (FixMatch, arXiv 2001.07685).

Not in SimCLRv2, whose teacher is frozen and sees the student's own view. Here the network's moving average names the
class of a weak view (crop and flip); where it is sure, the network learns that class from a strong view of the same
image (that of pretraining), beside the labels. Unlike FixMatch it begins with a pretrained and fine-tuned network, and
its average answers, with averaged batch norm statistics (arXiv 2101.08482), not the network itself. Answers are shifted
until classes come as often as they are expected (arXiv 1911.09785): else a class that few labels tell badly is lost to
another for good (digits, 2 labels a class, one draw in three). They are expected as they come among the labels, and
then more and more as they come among the answers, since labels need not come as the pool does.

B images and L labeled images of this rank, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from fewlabels import runtime
from fewlabels.data.loader import Batch
from fewlabels.model.heads import Classifier
from fewlabels.stages.loop import Stage, follow
from fewlabels.stages.pretrain import View

MOMENTUM = 0.99  # of the moving averages; before 100 steps they are the mean of all
TRUST = 1000.0  # steps of answers that count as much as the labels for how often classes are expected
RAREST = 1e-4  # a class that comes less often is shifted as if it came so often


def expected_classes(labels: npt.NDArray[np.int64], num_classes: int) -> Tensor:
    """(K,) how often each class is expected: as among labels (n,), one more of each, since labels are few."""
    counts = np.bincount(labels, minlength=num_classes) + 1.0
    return torch.tensor(counts / counts.sum(), dtype=torch.float32)


class SelfTrain(Stage):
    """forward(batch) -> cross-entropy of L labeled images + mean over B of that of the sure answers, 0 for the others.

    `average` is the result. labeled: from a step, the labeled images of this and each later step, of this rank.
    threshold: the probability from which an answer counts. expected: (K,) how often classes come at first, in sum 1.
    """

    steps: Tensor  # () int64
    expected: Tensor  # (K,)
    usual: Tensor  # (K,) how often the average names each class

    def __init__(
        self, network: Classifier, *, labeled: Callable[[int], Iterator[Batch]], weak: View, strong: View,
        threshold: float, expected: Tensor,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network = network
        self.average = copy.deepcopy(network).requires_grad_(False)
        self.labeled, self.weak, self.strong, self.threshold = labeled, weak, strong, threshold
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("expected", expected.clone())
        self.register_buffer("usual", expected.clone())
        self._coming: Iterator[Batch] | None = None

    def train(self, mode: bool = True) -> SelfTrain:  # noqa: FBT001, FBT002 - nn.Module's signature
        super().train(mode)
        self.average.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if self._coming is None:
            self._coming = self.labeled(int(self.steps))
        known = next(self._coming)
        count = len(known.ids)
        logits, answers = self.look([self.weak(known, 2), self.strong(batch, 1)], self.weak(batch, 0))
        sure, classes = self.shifted(answers).max(dim=1)  # (B,)
        counted = (sure >= self.threshold).float()
        learned = functional.cross_entropy(logits[count:], classes, reduction="none")
        loss = functional.cross_entropy(logits[:count], known.labels) + (counted * learned).mean()
        agreement = (logits[count:].argmax(dim=1) == classes).float().mean()
        return {"loss": loss, "agreement": agreement, "sure": counted.mean()}

    def look(self, shown: list[Tensor], weak: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (L + B, K) of the network, and of whoever answers (B, K), without a gradient."""
        with torch.no_grad():
            answers = self.average(weak)
        return self.network(torch.cat(shown)).float(), answers

    def shifted(self, answers: Tensor) -> Tensor:
        """Logits (B, K) -> probabilities under which classes come as often as expected."""
        told = runtime.sum_over_ranks(answers.softmax(dim=1).mean(dim=0)) / runtime.world_size()
        if self.training:
            self.usual.lerp_(told.to(self.usual.dtype), self._share().to(self.usual.dtype))
            self.expected.lerp_(self.usual, (1 / (TRUST + self.steps + 1)).to(self.usual.dtype))
        return (answers + (self.expected / self.usual.clamp(min=RAREST)).log()).softmax(dim=1)

    def _share(self) -> Tensor:
        """Of the newest in a moving average: 1, 1/2, ... down to 1 - MOMENTUM."""
        return (1 / (self.steps + 1)).clamp(min=1 - MOMENTUM)

    @torch.no_grad()
    def after_step(self) -> None:
        self.steps += 1
        follow(self.average, self.network, self._share())
