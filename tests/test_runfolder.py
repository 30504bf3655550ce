"""What a signal does to a run: which exit code it ends with, and which rank it stops."""

from __future__ import annotations

import os
import signal

import pytest

from fewlabels import runtime
from fewlabels.errors import Stopped
from fewlabels.runfolder import Interrupts


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_signal_outside_of_training_stops_at_once(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, Interrupts().watching():
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) is before


def test_while_training_it_only_raises_a_flag() -> None:
    with Interrupts().watching() as interrupts:
        interrupts.patient = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.pending()


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
