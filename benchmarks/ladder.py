"""What our recipe is worth beside the paper's, rung by rung, at the same network and the same compute:

    python -m benchmarks.ladder --data FOLDER --labels 40 250 4000 --out runs/ladder

Two pretrainings of one network on the same images for as many views: with the settings of `--recipe simclrv2` and with
those of `--recipe best`. On each logistic regression on frozen features, fine-tuning, distillation into itself; on ours
labels are spread first where they are very few, and self-training is tried too, for as many passes through the network.
--fixmatch: and FixMatch from random weights, for as many passes as pretraining and self-training together.
Draws of labels are the same in all rows. Numbers are % of held-out images right after the last step. The last row is
the same network with all labels.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import harness, lab
from benchmarks.lab import Body, Lab
from benchmarks.paper import Rows, told
from benchmarks.selftraining import ALONE, DISTILLED, FIXMATCH, PIXELS, PROBED, SELF_TRAINED, TUNED, Comparison

FAITHFUL, OURS = "simclrv2", "best"
RUNGS = [PROBED, TUNED]


def climbed(
    labs: dict[str, Lab], body: Body, draws: int, amounts: list[int], again: list[int], *, fixmatch: bool
) -> Rows:
    """Every rung, each a number a draw of labels. again: those of the amounts for which stage 3 is tried."""
    rows: Rows = {}
    if FAITHFUL in labs:  # the labels alone with our optimiser, where it is the better one
        rows |= Comparison(labs.get(OURS, labs[FAITHFUL]), body, draws).rows(amounts, [PIXELS, ALONE])
    for name, laboratory in labs.items():
        way = Comparison(laboratory, body, draws, propagates=name == OURS)
        if name == OURS and fixmatch:  # in our settings: our strong view, our optimiser
            rows |= way.rows(again, [FIXMATCH])
        found = way.rows(amounts, RUNGS) | way.rows(again, [DISTILLED, SELF_TRAINED] if name == OURS else [DISTILLED])
        rows |= {f"{name}: {rung}": row for rung, row in found.items()}
    if OURS not in labs:
        return rows
    ours = labs[OURS]
    ceiling = ours.cell(f"all labels, {body}", lambda: ours.accuracy(ours.finetuned(body, 1, "100%", 0)))
    return rows | {f"{OURS}: fine-tuned, all labels": {f"{a} labels": [ceiling] for a in amounts}}


def main() -> None:
    """Make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, fashion, or a folder with train and test.parquet")
    parser.add_argument("--labels", type=int, nargs="+", default=[40, 250, 4000])
    parser.add_argument("--stage-3", type=int, nargs="*", help="for these of them; default all")
    parser.add_argument("--recipes", nargs="+", choices=(FAITHFUL, OURS), default=(FAITHFUL, OURS), help="only these")
    parser.add_argument("--encoder", default="resnet18_0.25x_small")
    parser.add_argument("--train", type=int, default=10_000, help="training images")
    parser.add_argument("--epochs", type=float, default=40.0, help="of pretraining")
    parser.add_argument("--again", type=float, default=6.0, help="epochs of self-training")
    parser.add_argument("--set", nargs="+", default=[], help="recipe values, as finetune.smallest_crop=0.08")
    parser.add_argument("--gpu-settings", action="store_true", help="those of a GPU, on a CPU too")
    parser.add_argument("--fixmatch", action="store_true", help="it takes most of the time")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/ladder"))
    asked = parser.parse_args()
    source = lab.images(asked.data, train=asked.train, test=10_000)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    labs = {
        name: Lab(
            source, asked.out / name, epochs=asked.epochs, distill_epochs=asked.again, recipe=name, device=device,
            changes=asked.set, on_gpu=asked.gpu_settings or None,
        )
        for name in asked.recipes
    }  # fmt: skip
    again = asked.labels if asked.stage_3 is None else asked.stage_3
    rows = climbed(labs, Body(asked.encoder), asked.draws, asked.labels, again, fixmatch=asked.fixmatch)
    told(f"{Path(asked.data).name}, {asked.encoder}", rows)
    if len(labs) == 1:
        return  # half a table
    words = {name: str(value) for name, value in vars(asked).items()}
    harness.keep(f"ladder-{Path(asked.data).name}", {"asked": words, "rows": rows})


if __name__ == "__main__":
    main()
