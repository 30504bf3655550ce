"""A stage of which each rank keeps a part: weights, gradients, optimizer state and moving average (runtime.shard).

Training works on a sharded copy. What the rest of the program sees is the stage itself: without memory meanwhile, and
whole again at the end. Files hold whole tensors, so any number of ranks, sharded or not, goes on from them.
"""

from __future__ import annotations

import copy

import torch

from fewlabels import runtime
from fewlabels.model.encoder import Encoder
from fewlabels.model.heads import Classifier, ProjectionHead
from fewlabels.stages.loop import Stage


def share_out(stage: Stage) -> Stage:
    """A sharded copy of stage, whose own parameters give their memory back.

    The encoder is gathered piece by piece, a head or the layers above the encoder in one. What the stage only reads
    is shared, not copied, and stays whole: ranks may ask a teacher at different times (answers.py).
    """
    frozen = [part for name, part in stage.named_children() if f"{name}.".startswith(stage.frozen)]
    copied = copy.deepcopy(stage, {id(part): part for part in frozen})
    read = {id(inner) for part in frozen for inner in part.modules()}
    for part in reversed(list(copied.modules())):  # inner ones first
        if isinstance(part, Encoder | ProjectionHead | Classifier) and id(part) not in read:
            for piece in part.pieces if isinstance(part, Encoder) else ():
                runtime.shard(piece)
            runtime.shard(part)
    trained = stage.trained()
    for parameter in (p for name, p in stage.named_parameters() if name in trained):
        parameter.untyped_storage().resize_(0)
    return copied


@torch.no_grad()
def collect(stage: Stage, trained: Stage) -> None:
    """stage <- what its sharded copy has learned, one tensor at a time. Nothing to do where there is no copy."""
    if trained is stage:
        return
    ours = stage.trained()
    for name, tensor in trained.trained().items():
        storage = ours[name].untyped_storage()
        storage.resize_(max(storage.nbytes(), tensor.numel() * tensor.element_size()))
        ours[name].copy_(runtime.whole(tensor))
