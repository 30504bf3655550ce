"""Which images a run is of, and which of them a model has learned: what may be held out, and what not.

Shapes: N images of a run, L images of which something was learned.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fewlabels.data import pixels
from fewlabels.data.labels import TEST, VAL, Dataset, read_images
from fewlabels.data.parts import UNREADABLE
from fewlabels.errors import FewlabelsError, MissingInput
from fewlabels.runfolder import RunFolder
from fewlabels.use import artefact

Keys = npt.NDArray[np.void]  # 32 bytes each: the SHA-256 of an image's pixels


def open_run(run: Path) -> tuple[Dataset, bool]:
    """The run's images with all that it knows of them, and whether its test images came by themselves."""
    folder = RunFolder(run)
    resolved = folder.resolved()
    if resolved is None or not folder.images_file.is_file():
        raise MissingInput(
            f"{run} does not say which images it is of",
            why="it is a model's folder, or a run of an older fewlabels",
            fix="give the folder that was --out of `fewlabels fit`, or run that command again",
        )
    dataset = read_images(folder.images_file, pixels.open_store(folder.data), resolved["understood"])
    return dataset, resolved.get("tested_apart", "test" in resolved["inputs"])


def without_learned(dataset: Dataset, model: Path) -> Dataset:
    """dataset, whose held-out images do not count where a given model has learned their labels; its notes say so."""
    trained_on, learned_from, whole = by(model, dataset.store.canvas)
    held = np.isin(dataset.splits, (VAL, TEST)) & (dataset.labels >= 0)  # (N,)
    keys = dataset.store.hashes.view("V32")[:, 0]
    seen, taught = held & np.isin(keys, trained_on), held & np.isin(keys, learned_from)
    counted = {
        f"held-out images that do not count, since {model} has learned their labels": taught.sum(),
        f"held-out images that {model} was trained on without their labels": (seen & ~taught).sum(),
    }
    notes = [*dataset.notes, *(f"{words}: {count:,}" for words, count in counted.items() if count)]
    notes += [f"{model} does not say whether it knows more of the held-out images"] if held.any() and not whole else []
    return replace(dataset, labels=np.where(taught, -1, dataset.labels), notes=tuple(notes))


def by(model: Path, canvas: int) -> tuple[Keys, Keys, bool]:
    """Keys (L,) of the images that the run of a model folder, and those that it began with, trained on; (L,) those
    whose labels they learned; and whether no other image, kept at this canvas, can be one of them.
    """
    seen, taught, runs, whole = [np.zeros(0, "V32")], [np.zeros(0, "V32")], list[Path](), True
    while whole and model not in runs:
        runs.append(model)
        try:
            dataset, _ = open_run(model.parent)
            given = (RunFolder(model.parent).resolved() or {})["recipe"].get("pretrained")
            keys, classes = dataset.store.hashes.view("V32")[:, 0], artefact.read_card(model).classes
        except (FewlabelsError, *UNREADABLE):
            whole = False
        else:
            seen.append(keys[dataset.train])
            taught += [keys[dataset.labeled]] if classes else []  # without any it has only pretrained
            whole, model = dataset.store.canvas == canvas, Path(given or model)
    return np.concatenate(seen), np.concatenate(taught), whole
