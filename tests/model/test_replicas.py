"""The reference's arrays of 2 and 4 replicas, through as many real processes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import two_ranks
from fewlabels import runtime
from fewlabels.model.layers import BatchNorm
from fewlabels.model.losses import nt_xent


def own_part(folder: Path) -> None:
    """What one rank computes of its own rows: loss and gradient, and a step of global batch norm."""
    runtime.start("cpu")
    arrays, rank = np.load(folder / "arrays.npz"), runtime.rank()
    hidden = torch.from_numpy(arrays["hidden"][rank]).double().requires_grad_()  # (2n, d)
    loss = nt_xent(*hidden.chunk(2), float(arrays["temperature"]))
    loss.backward()
    norm = BatchNorm(5).double()
    y = norm(torch.from_numpy(arrays["x"][rank]).permute(0, 3, 1, 2).double())
    found = {
        "loss": loss.detach(), "gradient": hidden.grad, "y": y.detach(), "moving_mean": norm.running_mean,
        "moving_variance": norm.running_variance,
    }  # fmt: skip
    torch.save(found, folder / f"{rank}.pt")
    runtime.finish()


@pytest.mark.parametrize("replicas", [2, 4])
def test_replicas_are_the_references(golden: Path, tmp_path: Path, replicas: int) -> None:
    arrays, case = np.load(golden / "multi_replica.npz"), f"R{replicas}"
    np.savez(
        tmp_path / "arrays.npz", hidden=arrays[f"{case}/hidden"], temperature=arrays[f"{case}/temperature"],
        x=arrays[f"{case}/syncbn/x"],
    )  # fmt: skip
    ranks = two_ranks.results(__file__, tmp_path, replicas)
    losses = [2 * float(rank["loss"]) for rank in ranks]
    np.testing.assert_allclose(losses, arrays[f"{case}/loss_per_replica"], rtol=1e-6)
    assert np.mean(losses) == pytest.approx(float(arrays[f"{case}/single_replica_loss"]), rel=1e-6)
    theirs = arrays[f"{case}/grad_of_loss_over_R"]
    gradients = np.stack([2 * rank["gradient"].numpy() / replicas for rank in ranks])
    np.testing.assert_allclose(gradients, theirs, rtol=0, atol=1e-5 * abs(theirs).max())
    outputs = np.stack([rank["y"].permute(0, 2, 3, 1).numpy() for rank in ranks])
    np.testing.assert_allclose(outputs, arrays[f"{case}/syncbn/y"], rtol=1e-5, atol=1e-5)
    for name in ("moving_mean", "moving_variance"):
        for rank in ranks:
            np.testing.assert_allclose(rank[name].numpy(), arrays[f"{case}/syncbn/{name}"], rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    own_part(Path(sys.argv[1]))
