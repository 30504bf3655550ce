"""Checkpoints: what is written is read, and damage is never used."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import same
from fewlabels import checkpoint
from fewlabels.errors import DataError, StorageError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "c": torch.zeros(0, 4)}


def test_round_trip_and_rotation(tmp_path: Path) -> None:
    for step in (1, 20, 300):
        checkpoint.save(tmp_path, step, {"x": torch.full((3,), float(step))}, {"seconds": step * 2})
    saved, passed_over = checkpoint.latest(tmp_path)
    assert saved is not None
    assert (saved.step, saved.values["seconds"], passed_over) == (300, 600, [])
    assert torch.equal(saved.tensors["x"], torch.full((3,), 300.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000300"]


def test_every_dtype_and_shape_survives(tmp_path: Path) -> None:
    tensors = TENSORS | {
        "half": torch.randn(3).bfloat16(),
        "last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    checkpoint.save(tmp_path, 1, tensors, {})
    saved, _ = checkpoint.latest(tmp_path)
    assert saved is not None
    assert same(saved.tensors, tensors)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "values"])
def test_damage_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    checkpoint.save(tmp_path, 1, TENSORS, {})
    newest = checkpoint.save(tmp_path, 2, TENSORS, {})
    file = newest / {"manifest": "manifest.json", "values": "values.json"}.get(damage, "tensors.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[:-3])
    else:
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    saved, passed_over = checkpoint.latest(tmp_path)
    assert saved is not None
    assert saved.step == 1
    assert "step-00000002" in passed_over[0]


def test_500_single_bit_flips_are_all_seen(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, TENSORS, {"identity": {"seed": 1}})
    generator = torch.Generator().manual_seed(0)
    for file in (path / "tensors.safetensors", path / "values.json"):
        original = file.read_bytes()
        for _ in range(250):
            bit = int(torch.randint(len(original) * 8, (), generator=generator))
            content = bytearray(original)
            content[bit // 8] ^= 1 << bit % 8
            file.write_bytes(content)
            with pytest.raises(DataError):
                checkpoint.read(path)
        file.write_bytes(original)
    assert checkpoint.read(path).step == 1


def test_a_newer_format_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, TENSORS, {})
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["format_version"] = 99
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="newer fewlabels"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failing_disk_leaves_the_old_one_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    checkpoint.save(tmp_path, 1, TENSORS, {})
    real, calls = os.fsync, [0]

    def failing(handle: int) -> None:
        calls[0] += 1
        if calls[0] == 1:
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", failing)
    for first_failing in range(4):  # each fsync before the rename: two files, the manifest, the folder
        calls[0] = -first_failing
        with pytest.raises(StorageError) as raised:
            checkpoint.save(tmp_path, 2, TENSORS, {})
        assert raised.value.exit_code == 74
        saved, _ = checkpoint.latest(tmp_path)
        assert saved is not None
        assert saved.step == 1
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_too_little_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match="MB are free"):
        checkpoint.save(tmp_path, 1, TENSORS, {})


CRASH = """
import os, shutil, sys, torch
from pathlib import Path
from fewlabels import checkpoint
folder, stop = Path(sys.argv[1]), int(sys.argv[2])
for crash_at in range(stop):
    pid = os.fork()
    if pid == 0:
        count = [0]
        def counted(real):
            def call(*args, **kwargs):
                if count[0] == crash_at:
                    os._exit(9)
                count[0] += 1
                return real(*args, **kwargs)
            return call
        for name in ("fsync", "rename", "replace", "mkdir", "open"):
            setattr(os, name, counted(getattr(os, name)))
        checkpoint.save(folder, 2, {"x": torch.full((4,), 2.0)}, {})
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    saved, passed_over = checkpoint.latest(folder)
    assert saved is not None and not passed_over, (crash_at, passed_over)
    assert float(saved.tensors["x"][0]) == saved.step
    print(crash_at, os.waitstatus_to_exitcode(status), saved.step)
    shutil.rmtree(folder)
    checkpoint.save(folder, 1, {"x": torch.full((4,), 1.0)}, {})
"""


def test_a_process_killed_at_any_io_operation_of_a_save(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"x": torch.full((4,), 1.0)}, {})
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(tmp_path), "14"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    outcomes = [line.split() for line in done.stdout.splitlines()]
    assert sum(code == "9" for _, code, _ in outcomes) >= 5, "the crash points were not reached"
    assert {step for *_, step in outcomes} == {"1", "2"}, "killed before and after the rename"


def test_a_glance_reads_plain_values_and_passes_over_what_is_broken(tmp_path: Path) -> None:
    assert checkpoint.glance(tmp_path / "none") is None
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"w": torch.zeros(3)}, {"identity": step})
    assert checkpoint.glance(tmp_path) == {"identity": 2, "step": 2}
    (tmp_path / "step-00000002" / "values.json").write_text("{")
    assert checkpoint.glance(tmp_path) == {"identity": 1, "step": 1}
