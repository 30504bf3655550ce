"""Checkpoints: what is written is read, and damage is never used."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
import tempfile
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


def test_a_newer_format_is_refused_and_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.save(tmp_path, 1, TENSORS, {})
    (path / "manifest.json").unlink()
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 99)
    checkpoint.write_manifest(path)
    monkeypatch.undo()
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


def test_a_failing_disk_is_told_even_if_it_cannot_say_how_much_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", failing)
    with pytest.raises(StorageError, match="writing failed"):
        checkpoint.save(tmp_path, 1, TENSORS, {})


def test_a_process_that_dies_and_a_disk_that_fails_at_every_operation_of_a_save() -> None:
    script = Path(__file__).parent / "faults" / "storage.py"
    done = subprocess.run(
        [sys.executable, str(script), "--only", "checkpoint"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    injected = [int(line.split(": ")[1].split()[0]) for line in done.stdout.splitlines() if "faults injected" in line]
    assert injected[0] >= 20 and injected[1] == 3 * injected[0], "the operations were not reached"


def test_the_draft_of_a_killed_process_goes_with_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".step-00000017.draft").mkdir()
    (tmp_path / ".step-00000017.draft" / "tensors.safetensors").write_bytes(b"torn")
    checkpoint.save(tmp_path, 20, TENSORS, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]


def test_folders_change_places_in_one_step_where_the_system_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader finds the old folder or the new one at every moment, never neither."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    if not checkpoint._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot swap two names in one step")
    for name in ("a", "b"):
        (tmp_path / name).rmdir()
    for step in (1, 2):
        with checkpoint.publish(tmp_path / "model") as draft:
            (draft / "text").write_text(str(step))
            if step == 2:
                monkeypatch.setattr(Path, "rename", None)  # two renames would leave a gap
    assert (tmp_path / "model" / "text").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# What damage, or somebody who means harm, makes of a manifest; each must be refused in words, none may be a traceback
FORMAT_1 = '{"format_version": 1, "files": %s}'
MANIFESTS = [
    "", "[]", "null", "7", "[" * 100_000, '{"files": {}}', '{"format_version": 1}', FORMAT_1 % "[]", FORMAT_1 % "{}",
    '{"format_version": "x", "files": {}}', '{"format_version": 1e999, "files": {}}',
    FORMAT_1 % '{"values.json": 3}', FORMAT_1 % '{"values.json": {"bytds": 1, "sha256": ""}}',
    FORMAT_1 % '{"\\u0000": {"bytes": 1, "sha256": ""}}', FORMAT_1 % '{"../../x": {"bytes": 1, "sha256": ""}}',
    FORMAT_1 % ('{"%s": {"bytes": 1, "sha256": ""}}' % ("n" * 5000)),
]  # fmt: skip


@pytest.mark.parametrize("text", MANIFESTS, ids=range(len(MANIFESTS)))
def test_no_manifest_is_a_traceback(tmp_path: Path, text: str) -> None:
    checkpoint.save(tmp_path, 1, TENSORS, {})
    newest = checkpoint.save(tmp_path, 2, TENSORS, {})
    (newest / "manifest.json").write_text(text)
    saved, passed_over = checkpoint.latest(tmp_path)
    assert saved is not None
    assert (saved.step, len(passed_over)) == (1, 1)


def test_a_flipped_bit_in_the_version_is_damage_and_an_older_manifest_is_none(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, TENSORS, {})
    file = checkpoint.save(tmp_path, 2, TENSORS, {}) / "manifest.json"
    whole = file.read_text()
    file.write_text(whole.replace('"format_version": 1', '"format_version": 3'))
    saved, passed_over = checkpoint.latest(tmp_path)
    assert saved is not None
    assert (saved.step, len(passed_over)) == (1, 1)
    manifest = json.loads(whole)
    del manifest["sha256"]
    file.write_text(json.dumps(manifest))
    saved, passed_over = checkpoint.latest(tmp_path)
    assert saved is not None
    assert (saved.step, passed_over) == (2, [])


def test_a_glance_reads_plain_values_and_passes_over_what_is_broken(tmp_path: Path) -> None:
    assert checkpoint.glance(tmp_path / "none") is None
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"w": torch.zeros(3)}, {"identity": step})
    assert checkpoint.glance(tmp_path) == {"identity": 2, "step": 2}
    values = tmp_path / "step-00000002" / "values.json"
    whole = values.read_text()
    for damaged in ("{", whole.replace("identity", "idenpity"), whole.replace("2", "3")):
        values.write_text(damaged)
        assert checkpoint.glance(tmp_path) == {"identity": 1, "step": 1}
    values.write_text(whole)
    (values.parent / "manifest.json").unlink()
    assert checkpoint.glance(tmp_path) == {"identity": 1, "step": 1}


def test_what_is_saved_after_damage_stays(tmp_path: Path) -> None:
    """Both checkpoints are damaged, so the stage begins anew: what it saves is kept, and what is of no use goes."""
    for step in (475, 500):
        (checkpoint.save(tmp_path, step, TENSORS, {}) / "manifest.json").write_text("{")
    assert checkpoint.latest(tmp_path)[0] is None
    for step in (25, 50, 75):
        checkpoint.save(tmp_path, step, TENSORS, {})
        saved, passed_over = checkpoint.latest(tmp_path)
        assert saved is not None
        assert (saved.step, passed_over) == (step, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000050", "step-00000075"]


def test_neither_a_pipe_nor_a_device_nor_an_endless_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(checkpoint.MOST_TEXT + 1)
    for name in ("pipe", "zeros", "large"):
        with pytest.raises(ValueError, match="not a plain file"):
            checkpoint.read_text(tmp_path / name)
        for step in (1, 2):
            newest = checkpoint.save(tmp_path / f"stage-{name}", step, TENSORS, {})
        (newest / "manifest.json").unlink()
        (newest / "manifest.json").symlink_to(tmp_path / name)
        saved, passed_over = checkpoint.latest(tmp_path / f"stage-{name}")
        assert saved is not None
        assert (saved.step, len(passed_over)) == (1, 1)


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    checkpoint.write_text(pipe, "told")
    assert os.read(reader, 100) == b"told"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(StorageError, match="full"):
        checkpoint.write_text(Path("/dev/full"), "told")
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def test_a_file_below_dev_is_replaced_and_standard_output_is_not(tmp_path: Path) -> None:
    """/dev/shm is a disk like any other, and a run may lie there; /dev/stdout may lead to a file that is open."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else tmp_path) as name:
        file = Path(name) / "status.json"
        checkpoint.write_text(file, "before")
        inode = file.stat().st_ino
        checkpoint.write_text(file, "after")
        assert file.read_text() == "after"
        assert file.stat().st_ino != inode
    code = (
        "from pathlib import Path; from fewlabels import checkpoint; checkpoint.write_text(Path('/dev/stdout'), 'told')"
    )
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "told"
    assert Path("/dev/stdout").is_symlink()


def test_a_flipped_bit_in_sealed_json_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    contents = {"kept": [0, 1, 2], "names": ["\udcff", "é"]}
    checkpoint.write_sealed(file, contents)
    assert checkpoint.read_sealed(file) == contents
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            found = checkpoint.read_sealed(file)
        except checkpoint.UNREADABLE:
            continue
        assert found == contents, "only what JSON does not mind, such as the case of an escape"
