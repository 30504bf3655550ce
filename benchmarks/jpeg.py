"""From the bytes of a JPEG to two 224 px training views on one core: ours against lightly and torchvision.

    python -m benchmarks jpeg --peers lightly torchvision --threads 1

Photos of 500 x 375 and about 88 KB, as ImageNet's are, made here from smooth colours and grain. Ours as a streamed
store does it from the second pass on: decoded, scaled to the working size, the file seen to be the one that was
compared with the hash of what was checked, two views compiled;
also from a tar in place of a folder, with a working size of 512, at which nothing is scaled, and with photos decoded
once (a pixel store). Peers decode once and make both views from that. Then decoding alone. The process is kept on as
many cores as there are threads.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import harness
from fewlabels import runtime
from fewlabels.data import decode, pixels, views
from fewlabels.data.sources import open_source

SIZE, PHOTOS, ROUNDS = 224, 32, 9
WIDTH, HEIGHT, QUALITY = 500, 375, 89
SCALED, WHOLE = 256, 512  # working sizes: the default, and one at which these photos stay as they are


def photo(seed: int) -> bytes:
    """A JPEG of smooth colours with grain in brightness and, less, in colour."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    grain = rng.normal(0, 14, (HEIGHT, WIDTH, 1)) + rng.normal(0, 5, (HEIGHT, WIDTH, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def ours(folder: Path, store: str, working_size: int, photos: str = "photos") -> Callable[[], Any]:
    """Read from a store of the photos in folder, and both views; other random numbers in each call."""
    built, _, _ = pixels.build(
        open_source(folder / photos), folder / f"{store}-{working_size}-{photos}", working_size=working_size,
        bad_csv=folder / "bad.csv", threads=torch.get_num_threads(), store=store,
    )  # fmt: skip
    ids, epoch = np.arange(PHOTOS), 0

    def work() -> list[torch.Tensor]:
        nonlocal epoch
        epoch += 1
        runtime.keep_freed_memory()
        canvas, extent = built.read(ids)
        settings = {"size": SIZE, "epoch": epoch, "seed": 0}
        return [views.pretrain(canvas, extent, torch.from_numpy(ids), view=n, **settings) for n in (0, 1)]

    return work


def by_pillow(raw: bytes) -> Image.Image:
    """What peers' data sets do with a file (torchvision's ImageFolder)."""
    return Image.open(io.BytesIO(raw)).convert("RGB")


def by_torchvision(raw: bytes) -> torch.Tensor:
    """uint8 (3, H, W)."""
    io_module = importlib.import_module("torchvision.io")
    return io_module.decode_jpeg(torch.frombuffer(bytearray(raw), dtype=torch.uint8))  # type: ignore[no-any-return]


def lightly(photos: list[bytes]) -> Callable[[], Any]:
    """lightly's transform, which makes both views of a PIL image."""
    module = importlib.import_module("lightly.transforms.simclr_transform")
    transform = module.SimCLRTransform(input_size=SIZE, cj_strength=1.0, gaussian_blur=0.5, normalize=None)

    def work() -> list[torch.Tensor]:
        harness.usual_malloc()
        return [torch.stack(view) for view in zip(*(transform(by_pillow(p)) for p in photos), strict=True)]

    return work


def torchvision(photos: list[bytes]) -> Callable[[], Any]:
    """The same operations from torchvision v2, on its own decoder's tensors."""
    t = importlib.import_module("torchvision.transforms.v2")
    steps = [
        t.RandomResizedCrop(SIZE, scale=(0.08, 1.0), antialias=True), t.RandomHorizontalFlip(),
        t.RandomApply([t.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8), t.RandomGrayscale(0.2),
        t.RandomApply([t.GaussianBlur(SIZE // 20 * 2 + 1, (0.1, 2.0))], p=0.5), t.ToDtype(torch.float32, scale=True),
    ]  # fmt: skip
    transform = t.Compose(steps)

    def work() -> list[torch.Tensor]:
        harness.usual_malloc()
        pairs = [(transform(image), transform(image)) for image in map(by_torchvision, photos)]
        return [torch.stack(view) for view in zip(*pairs, strict=True)]

    return work


def decoders() -> dict[str, Callable[[bytes], Any]]:
    """Bytes to RGB pixels in memory."""
    found: dict[str, Callable[[bytes], Any]] = {
        "ours": decode.decode,
        f"ours, to {SCALED} px": functools.partial(decode.decode, canvas=SCALED),
        "Pillow": lambda raw: np.asarray(by_pillow(raw)),
        f"Pillow, to {SCALED} px": lambda raw: np.asarray(
            by_pillow(raw).resize(decode.fitted(HEIGHT, WIDTH, SCALED)[::-1], Image.Resampling.BICUBIC)
        ),
        "torchvision": by_torchvision,
    }
    if importlib.util.find_spec("simplejpeg"):
        found["simplejpeg"] = importlib.import_module("simplejpeg").decode_jpeg
    return found


def run(*, peers: list[str]) -> dict[str, Any]:
    """The suite."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: torch.get_num_threads()])
    photos = [photo(seed) for seed in range(PHOTOS)]
    kilobytes = sum(map(len, photos)) / PHOTOS / 1000
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "photos").mkdir()
        for number, raw in enumerate(photos):
            (folder / "photos" / f"{number:03d}.jpg").write_bytes(raw)
        with tarfile.open(folder / "photos.tar", "w") as archive:
            archive.add(folder / "photos", ".")
        calls = {
            "ours": ours(folder, "streamed", SCALED),
            "ours, from a tar": ours(folder, "streamed", SCALED, "photos.tar"),
            f"ours, working size {WHOLE}": ours(folder, "streamed", WHOLE),
            "ours, decoded once": ours(folder, "pixels", SCALED),
        } | {name: globals()[name](photos) for name in peers if name in ("lightly", "torchvision")}
        title = f"two views of {SIZE} px of {PHOTOS} JPEGs of {WIDTH} x {HEIGHT}, {kilobytes:.0f} KB"
        found = {"views": harness.table(title, harness.side_by_side(calls, rounds=ROUNDS))}
    for name, row in found["views"]["rows"].items():
        row["pairs_per_second"] = 1000 * PHOTOS / row["ms"]
        print(f"  {name:<28} {row['pairs_per_second']:10,.0f} pairs/s")
    alone = {name: (lambda work=work: [work(raw) for raw in photos]) for name, work in decoders().items()}
    found["decoding"] = harness.table(f"the same JPEGs decoded, {PHOTOS}", harness.side_by_side(alone, rounds=ROUNDS))
    return found
