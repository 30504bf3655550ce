"""Stage 2: the few labels, from the middle of the projection head (SimCLRv2 section 2, "Supervised fine-tuning").

The layers of the head above the tap are dropped, a classifier sits on the tap, and everything is trained (or frozen
below a block) with crop and flip only. Departures from the released code: the kept layer of the head is trained (the
paper's wording; the TensorFlow 1 code forgot it), the classifier never comes from pretraining (the TensorFlow 2 code
leaks labels through it), and frozen blocks use batch norm's running statistics. The classifier starts at zero, as in
the paper, or from logistic regression on the frozen features (arXiv 2202.10054): from zero, the first updates
distort features that 20 labels cannot repair.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fewlabels.data.loader import Batch
from fewlabels.model.heads import Classifier
from fewlabels.stages.loop import Stage
from fewlabels.stages.pretrain import View


class Finetune(Stage):
    """forward(batch) -> cross-entropy of the labeled images. Also the supervised baseline, from random weights."""

    def __init__(self, network: Classifier, *, view: View) -> None:
        super().__init__()
        self.network, self.view = network, view

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.network(self.view(batch, 0)).float()  # (B, K)
        correct = (logits.argmax(dim=1) == batch.labels).float().mean()
        return {"loss": functional.cross_entropy(logits, batch.labels), "accuracy": correct}
