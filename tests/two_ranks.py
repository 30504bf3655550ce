"""Runs a test file as several real gloo processes: `python FILE FOLDER` under the variables that torchrun would set."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

WORLD = 2


def results(file: str, folder: Path, world: int = WORLD) -> list[dict[str, Any]]:
    """What each rank's `if __name__ == "__main__"` block of file saved as FOLDER/RANK.pt, in rank order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    shared["PYTHONFAULTHANDLER"] = "1"  # a native crash says where
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [sys.executable, file, str(folder)],
            env={**os.environ, **shared, "PYTHONPATH": paths, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in ranks]
        ended = [process.returncode for process in ranks]
        # all of them: the first to complain is seldom the one that failed
        assert not any(ended), "\n".join(
            f"rank {rank} ended with {ended[rank]}:\n{outputs[rank]}" for rank in range(world)
        )
    finally:
        for process in ranks:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()  # or a later test is blamed for it
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
