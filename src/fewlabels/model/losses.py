"""The losses of pretraining and distillation, as the paper writes them.

Shapes: n images on this rank, N = n times the ranks, d projections, Q keys in the queue, B images, K classes.
All compute in float32 (float64 for float64 tensors), under autocast too; only the products of NT-Xent's similarities
take bf16 operands there, from a temperature of contrast.FLOOR_BF16 on.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fewlabels import runtime
from fewlabels.errors import UsageError
from fewlabels.model.contrast import contrast, nearest_own_share
from fewlabels.model.layers import at_least_float32, full_precision


def nt_xent(first: Tensor, second: Tensor, temperature: float = 0.1, *, normalize: bool = True) -> Tensor:
    """NT-Xent, the contrastive loss of pretraining (paper eq. 1): its mean over the anchors.

    first, second: (n, d) projections of the two views of this rank's images, row i of both the same image; they are
    l2-normalised here, unless normalize=False (the reference's `hidden_norm`). Every rank must bring the same n.
    Returns a scalar: the mean over this rank's 2n anchors, each against all 2N - 1 other projections of all ranks. The
    mean over ranks is the loss of the whole batch, and runtime.average_gradients makes the gradients those of that
    mean, if every rank calls backward. One image alone has loss 0. Memory is O(N d): see contrast.py.
    The reference optimises the sum of the two views' means, which is twice this.
    Raises UsageError for shapes that differ and temperatures that are not above 0.
    """
    anchors = _projections(first, second, temperature, normalize=normalize)  # (2n, d)
    everyone = runtime.gather(anchors.detach())  # (2N, d)
    return contrast(anchors, everyone, temperature, unit=normalize, symmetric=True)


def nt_xent_with_queue(
    first: Tensor, second: Tensor, first_key: Tensor, second_key: Tensor, queue: Tensor, temperature: float = 0.1
) -> Tensor:
    """NT-Xent against the keys of a momentum encoder and a queue of earlier keys (the paper's memory extension).

    first, second: (n, d) projections with gradients. first_key, second_key: (n, d) projections of the same views by
    the momentum encoder. queue: (Q, d), the same on every rank, Q may be 0. Keys and queue get no gradient; all are
    l2-normalised here. The positive of first[i] is second_key[i], and the other way round; its negatives are all keys
    of other images in the batch, of all ranks and both views, and the queue. Its own view's key is left out.
    The paper does not say more than "contrasting examples are from the momentum encoder, from current and past
    batches"; the rest is our reading. Returns a scalar that means what nt_xent's does. Errors as in nt_xent.
    """
    anchors = _projections(first, second, temperature)  # (2n, d)
    if first_key.shape != first.shape or queue.shape[1:] != first.shape[1:]:
        raise UsageError(
            f"keys of shape {tuple(first_key.shape)} and a queue of {tuple(queue.shape)} "
            f"for projections of shape {tuple(first.shape)}",
            fix="keys are (n, d) like the projections, the queue is (Q, d)",
        )
    with torch.no_grad():
        keys = runtime.gather(_projections(first_key, second_key, temperature))  # (2N, d)
        keys = torch.cat([keys, _normalized(queue)])  # (2N + Q, d)
    return contrast(anchors, keys, temperature, unit=True, symmetric=False)


@torch.no_grad()
def contrast_accuracy(first: Tensor, second: Tensor) -> Tensor:
    """The share of this rank's first views whose most similar second view, of all ranks, is their own; a scalar.

    first, second: (n, d) as in nt_xent. N-way, as the reference's `contrast_acc`: chance is 1/N.
    """
    anchors = _projections(first, second, 1.0)
    with full_precision(anchors):
        n = len(first)
        candidates = runtime.gather(anchors[n:])  # (N, d)
        return nearest_own_share(anchors[:n], candidates, runtime.rank() * n)


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *,
    scale_by_temperature_squared: bool = False,
) -> Tensor:  # fmt: skip
    """Cross-entropy of the student to the teacher's softened labels (paper eq. 2), mean over the batch; a scalar.

    student_logits, teacher_logits: (B, K); no gradient goes to the teacher. Both are divided by the temperature.
    scale_by_temperature_squared: the form of the reference's notebook. Off by default: eq. 2 has no such factor, and
    at temperature 0.1 it would make weight decay 100 times stronger relative to the loss.
    Raises UsageError for shapes that differ and temperatures that are not above 0.
    """
    _check_temperature(temperature)
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        raise UsageError(
            f"student logits of shape {tuple(student_logits.shape)}, teacher logits of {tuple(teacher_logits.shape)}",
            fix="both must be (images, classes), with the same classes in the same order",
        )
    with full_precision(student_logits):
        student = at_least_float32(student_logits) / temperature
        teacher = (at_least_float32(teacher_logits.detach()) / temperature).softmax(1)
        loss = F.cross_entropy(student, teacher.to(student.dtype))
    return loss * temperature**2 if scale_by_temperature_squared else loss


def _projections(first: Tensor, second: Tensor, temperature: float, *, normalize: bool = True) -> Tensor:
    """(n, d) and (n, d), checked -> (2n, d) rows, of length 1 if normalize."""
    _check_temperature(temperature)
    if first.shape != second.shape or first.dim() != 2 or len(first) == 0:
        raise UsageError(
            f"projections of shape {tuple(first.shape)} and {tuple(second.shape)}",
            why="row i of both must be two views of the same image",
            fix="give two tensors of the same shape (images, projections)",
        )
    both = torch.cat([first, second])
    return _normalized(both) if normalize else at_least_float32(both)


def _normalized(x: Tensor) -> Tensor:
    """Rows of length 1. The floor is on the squared length, as in tf.math.l2_normalize; F.normalize's is another."""
    with full_precision(x):
        x = at_least_float32(x)
        return x / x.square().sum(1, keepdim=True).clamp(min=1e-12).sqrt()


def _check_temperature(temperature: float) -> None:
    if getattr(temperature, "requires_grad", False):
        raise UsageError("the temperature requires a gradient", why="it is not learned here", fix="pass float(...)")
    if not 0 < temperature < math.inf:
        raise UsageError(
            f"temperature = {temperature}", why="similarities are divided by it", fix="use a number above 0, e.g. 0.1"
        )
