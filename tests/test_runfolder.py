"""What a signal does to a run: which exit code it ends with, and which rank it stops. And folders of strange origin."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import sys
import weakref
from pathlib import Path
from types import FrameType

import pytest

from fewlabels import checkpoint, runtime
from fewlabels.errors import CannotCreate, DataError, Stopped
from fewlabels.runfolder import Interrupts, RunFolder, metrics

BEGUN = {
    "format_version": checkpoint.FORMAT_VERSION,
    "asked": {"recipe": "smoke"},
    "recipe": {},
    "understood": {"labeled": 4},
    "precision": "fp32",
}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_signal_outside_of_training_stops_at_once(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, Interrupts().watching():
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) is before


def test_what_a_signal_cut_short_may_call_it_by_another_name() -> None:
    with pytest.raises(Stopped, match="SIGUSR1") as stopped, Interrupts().watching():
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        except BaseException as error:
            raise ImportError("cannot import name") from error  # so do packages that import something optional
    assert stopped.value.exit_code == 75


def test_what_swallows_any_exception_does_not_swallow_a_signal() -> None:
    reached = False
    with pytest.raises(Stopped), Interrupts().watching():
        with contextlib.suppress(Exception):  # as matplotlib does while it draws
            os.kill(os.getpid(), signal.SIGTERM)
        reached = True
    assert not reached


class Finalized:
    """Python prints what its finalizer raises, and goes on."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_in_a_finalizer_stops_at_the_end_of_the_block() -> None:
    with pytest.raises(Stopped) as stopped, Interrupts().watching() as interrupts:
        Finalized()
        assert interrupts.received
    assert stopped.value.exit_code == 143


def test_a_signal_in_the_callback_of_a_weak_reference_prints_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    kept: weakref.WeakKeyDictionary[Interrupts, int] = weakref.WeakKeyDictionary()
    callback = kept._remove.__code__  # type: ignore[attr-defined]
    with pytest.raises(Stopped), Interrupts().watching() as interrupts:
        key = Interrupts()
        kept[key] = 1

        def at_the_callback(frame: FrameType, event: str, _: object) -> None:
            if event == "call" and frame.f_code is callback:
                interrupts._handle(signal.SIGTERM, frame)

        sys.setprofile(at_the_callback)
        del key
        sys.setprofile(None)
        assert interrupts.received
    assert not kept
    assert not capfd.readouterr().err


def test_while_training_it_only_raises_a_flag() -> None:
    flagged = None
    with pytest.raises(Stopped), Interrupts().watching() as interrupts:
        interrupts.patient = True
        os.kill(os.getpid(), signal.SIGTERM)
        flagged = interrupts.received
    assert flagged


def test_another_rank_waits_for_rank_0_and_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "is_main", lambda: False)
    waited = False
    with pytest.raises(Stopped) as stopped, Interrupts().watching():
        os.kill(os.getpid(), signal.SIGTERM)
        waited = True
        raise RuntimeError("Connection reset by peer")  # what gloo says when rank 0 has gone
    assert waited
    assert stopped.value.exit_code == 143
    with pytest.raises(RuntimeError, match="another reason"), Interrupts().watching():
        raise RuntimeError("another reason")


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "bad_images.csv", "distill/teacher-logits-16.f32"])
def test_a_run_does_not_write_through_a_link(tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    run = RunFolder(tmp_path / "run")
    with run.locked():
        run.status("finished")
    link = run.path / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    for target in (precious, tmp_path / "new"):
        link.symlink_to(target)
        with pytest.raises(CannotCreate, match=r"links, pipes or devices|other things"), run.locked():
            pass
        link.unlink()
    assert precious.read_text() == "precious" and not (tmp_path / "new").exists()


def test_a_folder_of_a_run_may_lie_elsewhere(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with run.locked():
        run.status("finished")
    (tmp_path / "large").mkdir()
    (run.path / "pretrain").symlink_to(tmp_path / "large")
    with run.locked():
        pass


@pytest.mark.parametrize(
    "changes",
    [{"asked": 1}, {"asked": {}}, {"recipe": []}, {"understood": {}}, {"precision": 3}, {"inputs": 2}]
    + [
        {"asked": BEGUN["asked"] | wish}
        for wish in ({"seed": "5"}, {"overrides": [1]}, {"student": 3}, {"budget": "1h"})
    ],
)
def test_facts_of_strange_kinds_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    run = RunFolder(tmp_path)
    run.resolved_file.write_text(json.dumps(BEGUN))
    wishes = {"overrides": {}, "seed": 0} | BEGUN["asked"]
    assert run.resolved() == BEGUN | {"asked": wishes, "inputs": {}, "budget": [], "too_weak": ""}
    run.resolved_file.write_text(json.dumps(BEGUN | changes))
    with pytest.raises(DataError, match="does not say what was begun"):
        run.resolved()


@pytest.mark.parametrize("text", ["", "[7]", "null", "[" * 100_000, '"x"', "\udcff"])
def test_what_is_no_json_of_facts_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "resolved.json").write_bytes(os.fsencode(text))
    with pytest.raises(DataError, match="not readable"):
        RunFolder(tmp_path).resolved()


@pytest.mark.parametrize(
    ("text", "kept"),
    [('{"seconds": {"pretrain": 2.5}}', {"pretrain": 2.5}), ('{"seconds": []}', {}), ("[7]", {}), ("", {})],
)
def test_a_status_that_cannot_be_read_stops_no_run(tmp_path: Path, text: str, kept: dict[str, float]) -> None:
    run = RunFolder(tmp_path)
    run.status_file.write_text(text)
    run.status("running", "finetune", seconds={"finetune": 1.0})
    found = json.loads(run.status_file.read_text())
    assert (found["state"], found["seconds"]) == ("running", kept | {"finetune": 1.0})


def test_odd_bytes_in_a_path_come_back_from_json(tmp_path: Path) -> None:
    path = os.fsdecode(b"photos\xe9\xff \xc3\xa9")
    checkpoint.write_json(tmp_path / "resolved.json", BEGUN | {"inputs": {"images": path}})
    found = RunFolder(tmp_path).resolved()
    assert found is not None and found["inputs"]["images"] == path


def test_a_damaged_line_of_the_log_is_left_out(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (1, 2, 3, 4):
        run.log("pretrain", step, 4, {"loss": 1.0})
    lines = run.metrics_file.read_bytes().splitlines(keepends=True)
    lines[0] = lines[0].replace(b"pre", b"p\xf2e")
    lines[1] = lines[1].replace(b'"step"', b'"stfp"')
    lines[2] = lines[2][:20]  # torn, with the next line behind it
    run.metrics_file.write_bytes(b"".join([*lines, b"3\n", lines[3]]))
    run.cut_metrics("finetune", 0)
    assert [record["step"] for record in metrics(tmp_path) if record["stage"] == "pretrain"] == [4]


def test_a_disk_that_keeps_no_locks_is_told_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunFolder(tmp_path / "run").locked():
        assert (tmp_path / "run").is_dir()
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().err


def test_what_cuts_rank_0_short_reaches_the_others_with_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(runtime, "from_main", told.append)
    with pytest.raises(Stopped), Interrupts().watching(), runtime.main_first():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert told[0][1] == 75  # type: ignore[index]
