"""A trained model in use: class names, probabilities and features for images of any source.

Images pass in chunks: decoded by threads, brought to the working size they were trained at, viewed, classified.
Memory is bounded by the chunk, however many images there are and however large they are.

Shapes: N images, B images of one chunk, K classes, D features, S side of the view.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fewlabels import checkpoint, runtime
from fewlabels.data import decode, views
from fewlabels.data.parts import Part
from fewlabels.data.places import real
from fewlabels.data.shards import ENDINGS as SHARDS
from fewlabels.data.source import Source, unlabeled
from fewlabels.data.sources import open_source
from fewlabels.data.streamed import pixel_hash
from fewlabels.data.tables import cell
from fewlabels.errors import CannotCreate, DataError, MissingInput, UsageError, printable
from fewlabels.model.heads import Classifier
from fewlabels.use import artefact
from fewlabels.use.artefact import Card

CHUNK = 64
BEGINS = b"image,label,confidence,"  # a table of predictions


@dataclass(frozen=True)
class Prediction:
    """What the model says about one image: probabilities (K,), or None with the reason in `error`.

    Both are empty for an image that was not asked for. digest: the SHA-256 of its pixels, where that was asked for.
    """

    name: str
    probabilities: npt.NDArray[np.float32] | None
    error: str = ""
    digest: bytes = b""


class Model:
    """A trained classifier: `fl.load(folder)` or `run.model`.

    Wherever images are taken: a path or a list of paths, a folder, CSV, parquet or npz file, uint8 arrays
    (N, H, W[, 1 or 3]) or one image (H, W[, 1 or 3]), a PIL image or a list of them, or an opened source.
    """

    def __init__(self, network: Classifier, card: Card, *, path: Path | None = None, device: str = "auto") -> None:
        self.card, self.path = card, path
        self.device = runtime.device(device)
        self.network = network.eval().to(self.device)

    def __repr__(self) -> str:
        return (
            f"Model({self.card.encoder}, {self.card.num_classes} classes, {self.size} px, {self.path or 'in memory'})"
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; column i of the probabilities is classes[i]."""
        return self.card.classes

    @property
    def size(self) -> int:
        """Side of the view that the network sees, in pixels."""
        return self.card.size

    @property
    def metrics(self) -> dict[str, Any] | None:
        """What was measured on the run's held-out images, None if there were none."""
        return self.card.metrics

    def predict(self, images: Any) -> npt.NDArray[np.str_]:
        """Class names, (N,) str. Raises DataError naming the images that cannot be read."""
        names = np.asarray(self.classes)
        return names[self.predict_proba(images).argmax(axis=1)]  # type: ignore[no-any-return]

    def predict_proba(self, images: Any) -> npt.NDArray[np.float32]:
        """Probabilities (N, K) float32, rows sum to 1: softmax(logits / temperature). Raises like `predict`."""
        self.check_classifies()
        return self._all(images, self._probabilities)

    def features(self, images: Any) -> npt.NDArray[np.float32]:
        """Output of the encoder, (N, D) float32. Raises like `predict`."""
        return self._all(images, self._features)

    def each(self, images: Any, *, keep: Sequence[bool] | None = None, digests: bool = False) -> Iterator[Prediction]:
        """One Prediction an image, in order, in bounded memory. Images with keep[i] False are not even decoded."""
        self.check_classifies()
        return self._stream(as_source(images), self._probabilities, keep, digests=digests)

    # --- inside ---

    def check_classifies(self) -> None:
        """Raise UsageError for an encoder without a classifier."""
        if not self.card.classes:
            fix = "fewlabels finetune IMAGES --labels CSV --pretrained THIS --out RUN"
            if self.path and (self.path.parent / "resolved.json").is_file():  # RUN/model, and no imported one
                fix = f"fewlabels fit --labels CSV --out {shlex.quote(str(self.path.parent))}"
            raise UsageError(
                f"{self.path or 'this model'} is an encoder without a classifier",
                why="it was pretrained without labels, or imported as such: it gives features and no classes",
                fix=fix,
            )

    def _probabilities(self, view: Tensor) -> Tensor:
        return torch.softmax(self.network(view).float() / self.card.temperature, dim=1)  # (B, K)

    def _features(self, view: Tensor) -> Tensor:
        features: Tensor = self.network.encoder(view)  # (B, D)
        return features.float()

    def _all(self, images: Any, function: Callable[[Tensor], Tensor]) -> npt.NDArray[np.float32]:
        found = list(self._stream(as_source(images), function))
        rows = [one.probabilities for one in found if one.probabilities is not None]
        if faults := [f"{one.name}: {one.error}" for one in found if one.probabilities is None]:
            raise DataError(
                f"{len(faults):,} of {len(found):,} images cannot be read",
                details=faults,
                why="there would be fewer predictions than images",
                fix="leave these out, or use `fewlabels predict`, which keeps a row with the reason for each",
            )
        return np.stack(rows)

    def _stream(
        self, source: Source, function: Callable[[Tensor], Tensor], keep: Sequence[bool] | None = None, *,
        digests: bool = False,
    ) -> Iterator[Prediction]:  # fmt: skip
        """What function makes of each image, in the place of its probabilities."""
        wanted = itertools.repeat(True) if keep is None else iter(keep)
        entries = zip(source.names, source.payloads(), wanted, strict=False)
        with ThreadPoolExecutor(runtime.threads(), thread_name_prefix="decode") as pool:
            while chunk := list(itertools.islice(entries, CHUNK)):
                decoded = list(pool.map(self._decode, [p if k else None for _, p, k in chunk]))
                rows = self._rows(decoded, function)
                for (name, _, _), image, row in zip(chunk, decoded, rows, strict=True):
                    digest = pixel_hash(image) if digests and isinstance(image, np.ndarray) else b""
                    yield Prediction(name, row, image if isinstance(image, str) else "", digest)

    def _decode(self, payload: Any) -> npt.NDArray[np.uint8] | str | None:
        """(H, W, 3) uint8 no larger than in training, or the reason why not; None stays None."""
        if payload is None:
            return None
        try:
            return decode.decode(payload, self.card.longest_side)
        except decode.BadPicture as error:
            return str(error)

    def _rows(
        self, decoded: Sequence[npt.NDArray[np.uint8] | str | None], function: Callable[[Tensor], Tensor]
    ) -> list[npt.NDArray[np.float32] | None]:
        """One output row an image; images of one shape are viewed together."""
        shapes: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(decoded):
            if isinstance(image, np.ndarray):
                shapes.setdefault(image.shape, []).append(index)
        rows: list[npt.NDArray[np.float32] | None] = [None] * len(decoded)
        if not shapes:
            return rows
        order, parts = [], []
        for indices in shapes.values():
            stacked = np.stack([decoded[i] for i in indices])  # type: ignore[misc]  # (B, H, W, 3)
            pixels = torch.from_numpy(stacked).permute(0, 3, 1, 2).to(self.device)
            parts.append(views.evaluate_image(pixels, size=self.card.size, kind=self.card.kind))  # (B, 3, S, S)
            order += indices
        with torch.inference_mode():
            outputs = function(torch.cat(parts)).cpu().numpy()
        for index, row in zip(order, outputs, strict=True):
            rows[index] = row
        return rows


# --- loading -----------------------------------------------------------------------------------------------


def load(run_or_model_dir: str | os.PathLike[str], *, device: str = "auto", balanced: bool = False) -> Model:
    """The model of a run folder (RUN/model) or of a model folder. device: "auto", "cpu", "cuda" or "cuda:N".

    balanced: as if classes came equally often: probabilities are divided by the shares that classes had among the
    labels of training (Saerens et al. 2002; logit adjustment, arXiv 2007.07314), so that rare ones are named more often
    and the accuracy of a class, in the mean over classes, is higher. The accuracy on images that come as the labels did
    is lower. A class without labels stays as it is. Raises MissingInput where there is no model, DataError where it is
    damaged, UsageError for balanced where it does not say how its labels came.
    """
    folder = artefact.place(Path(run_or_model_dir))
    model = Model(*artefact.read(folder), path=folder, device=device)
    return _balanced(model) if balanced else model


def _balanced(model: Model) -> Model:
    """model after its classifier was changed; its card knows no labels, so that nothing balances it again."""
    model.check_classifies()
    counts = torch.tensor(model.card.labels_a_class, dtype=torch.float32, device=model.device)  # (K,)
    if not counts.any():
        raise UsageError(
            f"{model.path} does not say how often it learned each class",
            why="an older version wrote it, or it learned without labels, or from so few (up to 10 a class) that they "
            "were spread over the images that are like them",
            fix="leave out balanced; for a run of an older version repeat its command, which writes the model anew",
        )
    counts[counts == 0] = counts.max()
    model.network.linear.bias.sub_(model.card.temperature * (counts / counts.sum()).log())
    model.card = dataclasses.replace(model.card, labels_a_class=(), metrics=None, balanced=True)
    return model


def as_source(images: Any) -> Source:
    """images in any form a person has them, as a source."""
    if isinstance(images, Source):
        return images
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, np.ndarray):
        if images.ndim == 3 and images.shape[-1] == 4:
            raise UsageError(
                f"an array of shape {images.shape} is a picture with an alpha channel, or gray ones of four pixels",
                fix="give images[..., :3]; or the gray ones as (N, H, W, 1)",
            )
        is_one = images.ndim == 2 or (images.ndim == 3 and images.shape[-1] in (1, 3))  # no gray ones are so narrow
        return open_source(images[None] if is_one else images)
    if isinstance(images, list | tuple) and any(isinstance(image, Image.Image | np.ndarray) for image in images):
        return _in_memory(images)
    return open_source(images)


def _in_memory(images: Sequence[Any]) -> Source:
    """A source of PIL images and arrays (H, W[, 1 or 3]) uint8 of any sizes."""
    for index, image in enumerate(images):
        is_pixels = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size > 0
        is_pixels = is_pixels and image.ndim > 1 and image.shape[2:] in ((), (1,), (3,))
        if not (is_pixels or isinstance(image, Image.Image)):
            found = f"{image.dtype} array {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
            raise DataError(
                f"image {index} of the list is of the wrong kind: {found}",
                why="a list in memory holds PIL images or uint8 arrays (H, W) or (H, W, 1 or 3)",
                fix="convert it: np.uint8 with values 0 to 255",
            )
    count = len(images)
    names = tuple(f"image-{index:06d}" for index in range(count))
    return unlabeled(f"{count:,} images", names, Pictures(tuple(images)))


@dataclass(frozen=True)
class Pictures(Part):
    """PIL images and arrays as a part of a source."""

    images: Sequence[Image.Image | npt.NDArray[np.uint8]]

    def __len__(self) -> int:
        return len(self.images)

    def at(self, row: int) -> decode.Payload:
        """One image."""
        return self.images[row]

    def stamps(self) -> Iterator[bytes]:
        """None: predictions are not resumed."""
        return iter(())


# --- predictions as a table --------------------------------------------------------------------------------


def write_predictions(model: Model, images: Any, out_csv: str | os.PathLike[str]) -> dict[str, Any]:
    """Write image,label,confidence,p:CLASS...,error to out_csv, one row an image, by one rename at the end.

    An image that cannot be read keeps its row with the reason in the last column. Cells that a spreadsheet would
    run as a formula get a leading apostrophe. Returns {"out", "images", "predicted",
    "unreadable", "counts": {class: n}}.
    """
    out = Path(out_csv)
    source, counts, unreadable = _pictures(images, out), dict.fromkeys(model.classes, 0), 0
    with checkpoint.storage_errors(out):
        if str(out.absolute().parent) not in checkpoint.STREAMS and out.is_file() and not _is_ours(out):
            why = "it does not begin as a table of predictions does, which would be replaced"
            raise CannotCreate(f"{out} is there already", why=why, fix="give another file for the predictions")
        out.parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.text_file(out) as file:
        writer, names = csv.writer(file), [f"p:{name}" for name in map(printable, model.classes)]
        writer.writerow(["image", "label", "confidence", *names, "error"])
        for prediction in model.each(source):
            row = prediction.probabilities
            if row is None:
                unreadable += 1
                writer.writerow([cell(prediction.name), "", "", *[""] * len(names), cell(prediction.error)])
                continue
            numbers, best = [f"{p:.6f}" for p in row], int(row.argmax())
            writer.writerow([cell(prediction.name), cell(model.classes[best]), numbers[best], *numbers, ""])
            counts[model.classes[best]] += 1
    done = sum(counts.values())
    return {"out": str(out), "images": done + unreadable, "predicted": done, "unreadable": unreadable, "counts": counts}


def _pictures(images: Any, out: Path) -> Source:
    """images as a source. Raises UsageError or MissingInput for a list or an out that cannot be meant."""
    if isinstance(images, str | os.PathLike) and real(str(images)) == real(str(out)):
        raise UsageError(f"{out} are the images themselves", fix="give another file for the predictions")
    source = as_source(images)
    listed = [image for image in images if isinstance(image, str)] if isinstance(images, list) else []
    if missing := [path for path in listed if not os.path.lexists(path)]:
        raise MissingInput(f"{len(missing):,} of the pictures are not there", details=missing, fix="correct the paths")
    if other := [path for path in listed if os.path.isdir(path) or path.lower().endswith((".csv", *SHARDS))]:  # noqa: PTH112
        raise UsageError("several images must be pictures", details=other, fix="give a folder or a table alone")
    if out.is_dir():
        raise UsageError(f"{out} is a folder", fix=f"give a file name, such as {out / 'predictions.csv'}")
    return source


def _is_ours(table: Path) -> bool:
    with table.open("rb") as file:
        return file.read(len(BEGINS)) in (b"", BEGINS)
