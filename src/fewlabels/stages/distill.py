"""Stage 3: the fine-tuned network teaches a student, with the unlabeled images again (SimCLRv2 section 2, eq. 2 and 3).

The teacher is frozen, in inference mode, and sees exactly the view that the student sees. The student is the same
network (self-distillation) or a smaller one that is deployed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fewlabels import runtime
from fewlabels.data.loader import Batch
from fewlabels.model.heads import Classifier
from fewlabels.model.losses import distillation_loss
from fewlabels.stages.answers import Answers
from fewlabels.stages.loop import Stage
from fewlabels.stages.pretrain import View


class Distill(Stage):
    """forward(batch) -> (1 - label_weight) x distillation loss + label_weight x cross-entropy of the labeled images.

    answers: where the teacher is asked for some epochs of views only; those of `view` must then come again.
    """

    frozen = ("teacher.",)

    def __init__(
        self, teacher: Classifier, student: Classifier, *, view: View, temperature: float, label_weight: float = 0.0,
        answers: Answers | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.answers = answers
        self.teacher = teacher.requires_grad_(False).eval()
        self.student = student
        self.view, self.temperature, self.label_weight = view, temperature, label_weight

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        view = self.view(batch, 0)
        with torch.no_grad():
            taught = self.answers(batch, lambda rows: self.teacher(view[rows])) if self.answers else self.teacher(view)
        logits = self.student(view)  # (B, K), as taught
        # Unscaled, the paper's 0.1 has ten times the gradient at the same rate: it diverged (docs/method.md)
        loss = distillation_loss(logits, taught, self.temperature, scale_by_temperature_squared=True)
        if self.label_weight:
            labeled = label_loss(logits.float(), batch.labels)
            loss = (1 - self.label_weight) * loss + self.label_weight * labeled
        return {"loss": loss, "agreement": (logits.argmax(dim=1) == taught.argmax(dim=1)).float().mean()}

    def before_save(self) -> None:
        if self.answers:
            self.answers.sync()


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over this rank's labeled images, so scaled that its mean over ranks is the global mean.

    logits (B, K), labels (B,) with -1 = unlabeled. 0 if no rank has a label in this batch.
    """
    total = functional.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    count = runtime.sum_over_ranks((labels >= 0).sum().to(total.dtype))
    return total * runtime.world_size() / count.clamp(min=1)
