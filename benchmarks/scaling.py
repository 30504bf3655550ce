"""What the paper's largest run costs on many GPUs, and whether the counting behind that is right.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --memory     only what lies on one of 1, 8 and 64 GPUs, sharded or not

Counted: the real encoder and head run on the meta device as one rank of many; every operation's FLOPs and bytes, what
autograd keeps, and every collective are written down. Predicted: each operation takes the longer of its arithmetic and
its memory traffic; collectives come on top. Checked on 1, 2 and 4 gloo processes of one thread each, with a small
network: the counted collectives against the real ones, and computing + collectives, each measured alone, against the
measured step. On a machine of 2 cores 4 processes share them, so the computing is measured with as many side by side.
Prints tables, writes benchmarks/results/scaling.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from fewlabels import runtime
from fewlabels.model.encoder import Residual, encoder
from fewlabels.model.heads import ProjectionHead
from fewlabels.model.losses import nt_xent
from fewlabels.stages.memory import held
from fewlabels.stages.pretrain import PretrainWithMomentum

# --- what is assumed of the machines ------------------------------------------------------------------------------

PEAK, PEAK_SHARE = 798e12, 0.7  # bf16 FLOP/s of an H100's matmul, and a convolution's share (shared/performance.md 1.2)
BANDWIDTH, BANDWIDTH_SHARE = 3.0e12, 0.92  # bytes/s of its memory, likewise
MEMORY = 75e9  # bytes of 80 GB that can be used
NVLINK, NETWORK = 360e9, 40e9  # bytes/s a GPU: 0.8 of the published 450 GB/s, and of one 400 Gb/s card a GPU
SMALL = 30e-6  # seconds of a small collective on 8 GPUs (20 to 40 us), and more for every doubling of machines:
SMALL_A_DOUBLING = 15e-6
DISK = 1e9  # bytes/s of one file on a shared disk
HASH_AND_SYNC = (0.055 + 0.045) / 2**20 / 100  # seconds a byte, measured (reliability-ux.md I.2)
IMAGE = 3 * 320**2  # bytes of a stored image of the recipe's working size

PAPER, IMAGES, EPOCHS, BATCH, SAVE_EVERY = "resnet152_3x_sk", 1_281_167, 800, 4096, 500
SMALL_NETWORK, SMALL_BATCH, SMALL_SIDE = "resnet18_0.25x_small", 64, 32
STEPS, WORLDS, GPUS = 6, (1, 2, 4), (8, 64, 512)


# --- counting -----------------------------------------------------------------------------------------------------


@dataclass
class Counter(TorchDispatchMode):
    """FLOPs, bytes and roofline seconds of every operation inside the block."""

    flops: float = 0.0
    moved: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.is_view or "empty" in str(function):
            return result
        flops = 0.0
        if function._overloadpacket in flop_registry:
            flops = float(flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=result))
        read = sum(t.nbytes for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        written = sum(t.nbytes for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor))
        if "batch_norm" in str(function):
            read *= 2  # once for the statistics, once to apply them
        self.flops, self.moved = self.flops + flops, self.moved + read + written
        self.seconds += max(flops / (PEAK * PEAK_SHARE), (read + written) / (BANDWIDTH * BANDWIDTH_SHARE))
        return result


@dataclass
class Collectives:
    """The collectives of one step: how many small ones (batch norm, loss), and bytes of each kind."""

    small: int = 0
    bytes: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, tensor: Tensor) -> None:
        self.small += kind != "gradients"
        self.bytes[kind] = self.bytes.get(kind, 0.0) + tensor.nbytes


@contextlib.contextmanager
def one_of_many(world: int) -> Iterator[Collectives]:
    """This process believes to be rank 0 of world; what it would say to the others is counted and not said."""
    said = Collectives()

    def gather(x: Tensor) -> Tensor:
        said.add("gathers", x)
        return torch.cat([x] * world)

    def add_up(x: Tensor) -> Tensor:
        said.add("sums", x)
        return x

    alone = {"world_size": lambda: world, "rank": lambda: 0, "average_gradients": list}
    with patch.multiple(runtime, **alone, gather=gather, sum_over_ranks=add_up):
        yield said


class Pair(nn.Module):
    """Encoder and projection head: (2n, 3, side, side) views -> projections of both views."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.encoder = encoder(name)
        self.head = ProjectionHead(self.encoder.feature_dim)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.head(self.encoder(views).to(views.dtype)).chunk(2)
        return first, second


def count(name: str, *, world: int, views: int = 4, side: int = 224) -> dict[str, Any]:
    """One rank's forward and backward pass on the meta device, in bf16: all numbers a view, parameters in all."""
    with torch.device("meta"):
        network = Pair(name).to(torch.bfloat16)
        images = torch.empty(views, 3, side, side, dtype=torch.bfloat16)
    own = {p.untyped_storage()._cdata for p in [*network.parameters(), *network.buffers()]}
    kept: dict[int, int] = {}
    blocks: list[tuple[int, int]] = []  # what enters each residual block, and what was kept before it
    inside: list[int] = []  # what each residual block keeps

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    def enter(_part: nn.Module, inputs: tuple[Tensor]) -> None:
        blocks.append((inputs[0].nbytes, sum(kept.values())))

    def leave(*_: Any) -> None:
        inside.append(sum(kept.values()) - blocks[-1][1])

    for part in network.modules():
        if isinstance(part, Residual):
            part.register_forward_pre_hook(enter)
            part.register_forward_hook(leave)
    forward, backward = Counter(), Counter()
    with one_of_many(world) if world > 1 else contextlib.nullcontext(Collectives()) as said:
        with forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            first, second = network(images)
        with backward:
            (first.sum() + second.sum()).backward()
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "forward_flops": forward.flops / views, "flops": (forward.flops + backward.flops) / views,
        "bytes": (forward.moved + backward.moved) / views,
        "forward_seconds": forward.seconds / views, "seconds": (forward.seconds + backward.seconds) / views,
        "kept_bytes": sum(kept.values()) / views, "block_inputs_bytes": sum(size for size, _ in blocks) / views,
        "largest_block_bytes": max(inside) / views,
        "collectives": said.small, "collective_bytes": said.bytes,
    }  # fmt: skip


# --- the paper's run ------------------------------------------------------------------------------------------------


def memory(counted: dict[str, Any], gpus: int = 8, *, shard: bool = False) -> dict[str, Any]:
    """Bytes on one of so many GPUs in the paper's pretraining, and how many views fit beside them."""
    with torch.device("meta"):
        pair = Pair(PAPER)
        stage = PretrainWithMomentum(
            pair.encoder, pair.head, view=lambda *_: torch.empty(0), temperature=0.1, momentum=0.999, queue=0
        )
    state = held(stage, "lars", ranks=gpus, shard=shard, bf16=True)
    state = {name: size for name, size in state.items() if size}
    left = MEMORY - sum(state.values())
    return {
        "state": state, "state_total": sum(state.values()),
        "views_eager": int(left / counted["kept_bytes"]),
        "views_blocks_recomputed": int(left / (counted["block_inputs_bytes"] + counted["largest_block_bytes"])),
    }  # fmt: skip


def predict(counted: dict[str, Any], gpus: int, fits: dict[str, Any]) -> dict[str, Any]:
    """Seconds of one step on so many H100s, part by part, and days of the run."""
    machines, views = gpus / 8, 2 * BATCH / gpus
    gradients = 4 * counted["parameters"]
    network = views * (counted["seconds"] + counted["forward_seconds"])  # and the momentum encoder's forward pass
    reduce = 2 * gradients * 7 / 8 / NVLINK + (2 * gradients / 8 / NETWORK if machines > 1 else 0.0)
    together = 5 * gradients / (BANDWIDTH * BANDWIDTH_SHARE)  # into one piece, divided, and back
    # forward and backward, and forward through the momentum encoder
    small = 1.5 * counted["collectives"] * (SMALL + SMALL_A_DOUBLING * np.log2(machines))
    loss = 16 * BATCH**2 * 128 / gpus / (PEAK * PEAK_SHARE)
    optimizer = 24 * counted["parameters"] / (BANDWIDTH * BANDWIDTH_SHARE)
    saved = 12 * counted["parameters"]
    parts = {
        "network": network, "batch norm's and the loss's collectives": small, "gradients": reduce + together,
        "loss": loss, "optimizer": optimizer, "checkpoints": saved * (1 / DISK + HASH_AND_SYNC) / SAVE_EVERY,
    }  # fmt: skip
    step, steps = float(sum(parts.values())), IMAGES * EPOCHS // BATCH + 1
    return {
        "gpus": gpus, "views_a_gpu": views, "parts_ms": {name: 1e3 * float(value) for name, value in parts.items()},
        "step_ms": 1e3 * step, "days": steps * step / 86400, "network_share": network / step,
        "largest_other": max(list(parts)[1:], key=lambda name: parts[name]),
        "reading_gb_a_second": BATCH * IMAGE / step / 1e9,
        "fits": "yes" if views <= fits["views_eager"]
        else "with blocks recomputed" if views <= fits["views_blocks_recomputed"] else "no",
    }  # fmt: skip


# --- checked on real processes ---------------------------------------------------------------------------------------


def step_on(network: Pair, batch: int) -> None:
    """What `fewlabels fit` does between batch and optimizer, on this rank's share."""
    network.zero_grad(set_to_none=True)
    first, second = network(torch.rand(2 * batch, 3, SMALL_SIDE, SMALL_SIDE))
    nt_xent(first, second).backward()
    runtime.average_gradients(network.parameters())


def share_of(network: Pair, world: int) -> None:
    """The same with the batch norm of many ranks, and nobody to wait for."""
    with one_of_many(world):
        step_on(network, SMALL_BATCH // world)


def seconds(work: Any, times: int = STEPS) -> float:
    """The least of several calls, after one that is not counted."""
    found = []
    for _ in range(times + 1):
        runtime.barrier()
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found[1:])


def one_rank(place: Path) -> None:
    """This rank's part of the measurement; rank 0 writes what came of it."""
    torch.set_num_threads(1)
    runtime.start("cpu")
    torch.manual_seed(0)
    network, world = Pair(SMALL_NETWORK), runtime.world_size()
    size = sum(p.numel() for p in network.parameters())
    found = {"step": seconds(lambda: step_on(network, SMALL_BATCH // world)), "parameters": size}
    if world > 1:
        found["share"] = seconds(partial(share_of, network, world))
        found["small"] = seconds(lambda: [runtime.gather(torch.zeros(1, 129)) for _ in range(50)]) / 50
        found["gradients"] = seconds(lambda: runtime.sum_over_ranks(torch.zeros(size)))
        said = 0

        def counting(function: Any) -> Any:
            def call(x: Tensor) -> Tensor:
                nonlocal said
                said += 1
                return function(x)  # type: ignore[no-any-return]

            return call

        with patch.multiple(runtime, gather=counting(runtime.gather), sum_over_ranks=counting(runtime.sum_over_ranks)):
            step_on(network, SMALL_BATCH // world)
        found["collectives"] = said
    if runtime.is_main():
        place.write_text(json.dumps(found))
    runtime.finish()


def measured(world: int, place: Path) -> dict[str, Any]:
    """What rank 0 of so many processes measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank-part", str(place)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    assert [rank.wait(300) for rank in ranks] == [0] * world
    return json.loads(place.read_text())  # type: ignore[no-any-return]


def check(place: Path) -> list[dict[str, Any]]:
    """Counted against real collectives, predicted against measured steps."""
    rows = []
    for world in WORLDS:
        here = measured(world, place)
        counted = count(SMALL_NETWORK, world=world, views=2 * SMALL_BATCH // world, side=SMALL_SIDE)["collectives"]
        said = counted + 2 * (world > 1)  # of the loss: projections, and log-sums for the backward pass
        compute = here.get("share", here["step"])
        talk = said * here.get("small", 0.0) + here.get("gradients", 0.0)
        rows.append(
            {
                "processes": world, "collectives_counted": said, "collectives_real": here.get("collectives", 0),
                "compute_ms": 1e3 * compute, "talk_ms": 1e3 * talk, "predicted_ms": 1e3 * (compute + talk),
                "measured_ms": 1e3 * here["step"],
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Count, predict, check, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank-part", type=Path)
    parser.add_argument("--memory", action="store_true")
    asked = parser.parse_args()
    if asked.rank_part:
        one_rank(asked.rank_part)
        return
    if asked.memory:
        tell_shares()
        return
    counted = {"of many": count(PAPER, world=8), "alone": count(PAPER, world=1)}
    fits = memory(counted["of many"])
    tell_memory(counted["of many"], fits)
    talk = counted["of many"]["collectives"]
    found: dict[str, Any] = {"counted": counted, "memory": fits, "predicted": {}}
    for title, network in (
        ("as it is", counted["of many"]),
        ("with the kernels of one process in batch norm", counted["alone"] | {"collectives": talk}),
    ):
        found["predicted"][title] = [predict(network, gpus, fits) for gpus in GPUS]
        print(f"\n{PAPER}, batch {BATCH}, {EPOCHS} epochs of ImageNet on H100s, {title}: predicted, not measured")
        for row in found["predicted"][title]:
            tell_prediction(row)
    harness.RESULTS.mkdir(exist_ok=True)
    place = harness.RESULTS / ".scaling-part.json"
    try:
        found["check"] = check(place)
    finally:
        place.unlink(missing_ok=True)
    print(
        f"\n{SMALL_NETWORK}, batch {SMALL_BATCH}, {SMALL_SIDE} px, gloo, 1 thread a process, {runtime.threads()} cores"
    )
    for row in found["check"]:
        tell_check(row)
    harness.keep("scaling", found)


def tell_memory(counted: dict[str, Any], fits: dict[str, Any]) -> None:
    """Print what lies on one GPU."""
    print(f"{PAPER} with its head: {counted['parameters'] / 1e6:,.1f} M parameters; on one GPU:")
    for name, size in fits["state"].items():
        print(f"  {name:<42} {size / 1e9:6.2f} GB")
    print(f"  kept for the backward pass, a view {counted['kept_bytes'] / 1e6:15,.0f} MB")
    print(f"  only what enters each residual block {counted['block_inputs_bytes'] / 1e6:13,.0f} MB")
    print(f"  views within {MEMORY / 1e9:.0f} GB: {fits['views_eager']}, with blocks computed again ", end="")
    print(f"{fits['views_blocks_recomputed']}; {counted['flops'] / 1e9:,.0f} GFLOP and ", end="")
    print(f"{counted['bytes'] / 1e6:,.0f} MB moved a view, {counted['collectives']} small collectives a step")


def tell_shares() -> None:
    """Print what lies on one GPU, sharded or not, as the table of docs/scaling.md."""
    counted = count(PAPER, world=8)
    names = list(memory(counted, shard=True)["state"] | memory(counted)["state"])
    print("| GPUs | sharded | " + " | ".join(names) + " | in all, GB | views | views with --recompute |")
    for gpus, shard in ((1, False), (8, False), (8, True), (64, False), (64, True)):
        found = memory(counted, gpus, shard=shard)
        sizes = [f"{found['state'].get(name, 0) / 1e9:.2f}" for name in names]
        print(f"| {gpus} | {'yes' if shard else 'no'} | " + " | ".join(sizes), end="")
        print(f" | {found['state_total'] / 1e9:.1f} | {found['views_eager']} | {found['views_blocks_recomputed']} |")


def tell_prediction(row: dict[str, Any]) -> None:
    """Print one prediction."""
    parts = ", ".join(f"{name} {value:,.1f}" for name, value in row["parts_ms"].items())
    print(f"  {row['gpus']:>3} GPUs: {row['step_ms']:,.0f} ms a step ({parts}); {row['days']:.2f} days; ", end="")
    print(f"{row['views_a_gpu']:.0f} views a GPU fit: {row['fits']}; {row['reading_gb_a_second']:.2f} GB/s read")


def tell_check(row: dict[str, Any]) -> None:
    """Print one row of the check."""
    print(f"  {row['processes']} processes: {row['collectives_counted']} collectives counted, ", end="")
    print(f"{row['collectives_real']} real; {row['predicted_ms']:.0f} ms predicted, {row['measured_ms']:.0f} measured")


if __name__ == "__main__":
    main()
