"""Whole runs whose batch is beyond the memory: in chunks, and with activations that are computed again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fewlabels as fl
from conftest import same, shapes_images
from fewlabels import checkpoint
from fewlabels.errors import CannotCreate

IMAGES, CLASSES = shapes_images(48)
KNOWN = [int(c) if i < 16 else -1 for i, c in enumerate(CLASSES)]


def weights(run: fl.Run, stage: str) -> dict[str, torch.Tensor]:
    saved, _ = checkpoint.latest(run.path / stage)
    assert saved is not None
    return saved.tensors


def test_a_run_in_chunks_that_goes_on_with_recomputation(tmp_path: Path) -> None:
    wishes = {"recipe": "smoke", "chunk_norm": "batch", "pretrain": {"chunk": 6}}
    one = fl.fit(IMAGES, KNOWN, out=tmp_path / "one", **wishes)
    fl.fit(IMAGES, KNOWN, out=tmp_path / "two", until="pretrain", recompute=True, **wishes)
    two = fl.fit(IMAGES, KNOWN, out=tmp_path / "two", recompute=False, **wishes)  # another answer to the memory
    for stage in ("pretrain", "finetune", "distill"):
        assert same(weights(one, stage), weights(two, stage)), stage
    assert np.array_equal(one.model.predict_proba(IMAGES[:4]), two.model.predict_proba(IMAGES[:4]))
    assert "3 chunks = 16 images // 6" in (one.path / "resolved.json").read_text()
    for other in (
        {**wishes, "pretrain": {"chunk": 8}},
        {**wishes, "chunk_norm": "chunk"},
    ):
        with pytest.raises(CannotCreate, match="chunk"):
            fl.fit(IMAGES, KNOWN, out=tmp_path / "one", **other)
