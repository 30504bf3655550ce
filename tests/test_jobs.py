"""The job files of docs/jobs are run as they are, with two processes: stopped in the middle, and on to the end.

Slurm's own commands are stand-ins: srun runs what it is given, scontrol names this machine and notes a requeue.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import fewlabels
import many_ranks
from conftest import shapes_images

JOBS = Path(__file__).resolve().parents[1] / "docs" / "jobs"
OPTIONS = "--recipe smoke --pretrain.epochs 60"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
echo $$ > "$DESK/pid"
exec "$@"
"""
SCONTROL = """#!/bin/bash
case $1 in show) echo 127.0.0.1 ;; requeue) echo "$2" >> "$DESK/requeued" ;; esac
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the jobs are bash scripts")


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """Images, labels, and a folder of commands that stand in for Slurm's, torchrun's and python3's."""
    images, classes = shapes_images(32, size=16)
    lines = ["image,label"]
    (tmp_path / "photos").mkdir()
    for i, (image, label) in enumerate(zip(images, classes, strict=True)):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i}.png")
        lines.append(f"photos/{i}.png,{label if i < 8 else ''}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    commands = tmp_path / "bin"
    commands.mkdir()
    torchrun = f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    python = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", torchrun), ("python3", python)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return tmp_path


def begin(desk: Path, words: list[str]) -> subprocess.Popen[str]:
    """The job, in a process group of its own."""
    return subprocess.Popen(
        words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, cwd=desk,
        env={
            **os.environ, "PATH": f"{desk / 'bin'}:{os.environ['PATH']}", "DESK": str(desk), "GPUS": "2",
            "IMAGES": str(desk / "photos"), "LABELS": str(desk / "labels.csv"), "OUT": str(desk / "run"),
            "OPTIONS": OPTIONS, "PORT": str(many_ranks.free_port()), "SLURM_JOB_NODELIST": "here",
            "SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(fewlabels.__file__).parents[1]),
        },
    )  # fmt: skip


def until_it_trains(desk: Path, job: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if (desk / "run" / "metrics.jsonl").exists():
            return
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.1)
    raise AssertionError("it does not train")


def state(desk: Path) -> str:
    return str(json.loads((desk / "run" / "status.json").read_text())["state"])


def finish(job: subprocess.Popen[str], timeout: float = 120) -> str:
    try:
        return job.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise


def test_slurm(desk: Path) -> None:
    words = ["bash", str(JOBS / "slurm.sh"), *OPTIONS.split()]
    job = begin(desk, words)
    until_it_trains(desk, job)
    os.kill(int((desk / "pid").read_text()), signal.SIGTERM)  # what --signal=TERM@120 does
    output = finish(job)
    assert job.returncode == 0, output
    assert state(desk) == "stopped", output
    assert (desk / "requeued").read_text().split() == ["7"]
    job = begin(desk, words)
    output = finish(job)
    assert job.returncode == 0, output
    assert "going on from step" in output
    assert state(desk) == "finished"
    assert (desk / "requeued").read_text().split() == ["7"], "a finished run is not to be started again"


def test_kubernetes(desk: Path) -> None:
    yaml = pytest.importorskip("yaml")
    pod = yaml.safe_load((JOBS / "kubernetes.yaml").read_text())["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    words = [*container["command"], *container["args"]]
    job = begin(desk, words)
    until_it_trains(desk, job)
    os.kill(job.pid, signal.SIGTERM)  # what an eviction does
    output = finish(job)
    assert job.returncode == 75, output
    assert state(desk) == "stopped"
    job = begin(desk, words)
    output = finish(job)
    assert job.returncode == 0, output
    assert "going on from step" in output
    assert state(desk) == "finished"
