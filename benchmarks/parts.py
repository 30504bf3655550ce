"""Where the time of a training step goes, measured inside one process by hooks and not as a difference of two runs.

A step goes from the request of its batch to the request of the next one. Its moments, in their order:

    batch asked for, batch there, [view begun, view there] twice, encoder begun, encoder done, head done, loss done,
    loss's backward begun, head's backward begun, encoder's backward begun, optimizer begun, optimizer done

What lies between optimizer and next request is the log and the loop. On a GPU moments are events on the device's own
stream, so that parts are what the device spends, the waiting for the host included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks import harness
from fewlabels.data.loader import Batch
from fewlabels.stages.loop import TrainState
from fewlabels.stages.pretrain import Pretrain

SPANS = {  # part: (from, to) of every piece of it
    "loader": [("asked", "there")],
    "encoder": [("encoder", "encoded"), ("encoder back", "optimizer")],
    "head": [("encoded", "projected"), ("head back", "encoder back")],
    "loss": [("projected", "lost"), ("loss back", "head back")],
    "optimizer": [("optimizer", "updated")],
}


class Parts:
    """Hooks on a pretraining stage and its optimizer; `watched` marks its batches. `shares` and `seconds` tell."""

    def __init__(self, state: TrainState) -> None:
        self.steps: list[dict[str, Any]] = []
        self.views: list[list[Any]] = []  # of every step: begun, there, begun, there
        stage = state.stage
        assert isinstance(stage, Pretrain)
        make = stage.view

        def view(batch: Batch, number: int) -> Tensor:
            self.views[-1].append(harness.moment())
            made = make(batch, number)
            self.views[-1].append(harness.moment())
            return made

        stage.view = view
        stage.encoder.register_forward_pre_hook(lambda *_: self._mark("encoder"))
        stage.encoder.register_forward_hook(lambda *_: self._mark("encoded"))
        stage.encoder.register_full_backward_pre_hook(lambda *_: self._mark("encoder back"))
        stage.head.register_forward_hook(lambda *_: self._mark("projected"))
        stage.head.register_full_backward_pre_hook(lambda *_: self._mark("head back"))
        stage.register_forward_hook(self._after_loss)
        state.optimizer.register_step_pre_hook(lambda *_: self._mark("optimizer"))
        state.optimizer.register_step_post_hook(lambda *_: self._mark("updated"))

    def _mark(self, name: str) -> None:
        self.steps[-1][name] = harness.moment()

    def _after_loss(self, _module: Any, _inputs: Any, scalars: dict[str, Tensor]) -> None:
        self._mark("lost")
        scalars["loss"].register_hook(lambda _: self._mark("loss back"))

    def watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; a new step begins whenever one is asked for."""
        source = iter(batches)
        while True:
            self.steps.append({})
            self.views.append([])
            self._mark("asked")
            batch = next(source, None)
            if batch is None:
                return
            self._mark("there")
            yield batch

    def seconds(self, *, skip: int) -> dict[str, float]:
        """Median seconds of every part and of the whole "step", without the first steps and the last."""
        rows = []
        for step, pieces, after in list(zip(self.steps, self.views, self.steps[1:], strict=False))[skip:]:
            row = {
                part: sum(harness.elapsed(step[first], step[last]) for first, last in spans)
                for part, spans in SPANS.items()
            }
            row["views"] = sum(harness.elapsed(*pieces[k : k + 2]) for k in range(0, len(pieces), 2))
            row["step"] = harness.elapsed(step["asked"], after["asked"])
            row["rest"] = row["step"] - sum(value for part, value in row.items() if part != "step")
            rows.append(row)
        return {part: float(np.median([row[part] for row in rows])) for part in rows[0]}

    def told(self, title: str, *, skip: int) -> dict[str, float]:
        """Print the parts with their shares of the step; returns the shares, and "beside the encoder" of them all."""
        seconds = self.seconds(skip=skip)
        print(f"\n{title}: {1000 * seconds['step']:.1f} ms a step")
        shares = {part: value / seconds["step"] for part, value in seconds.items()}
        shares["beside the encoder"] = 1 - shares["encoder"]
        for part, share in shares.items():
            if part != "step":
                print(f"  {part:<28} {100 * share:6.1f} %")
        return shares
