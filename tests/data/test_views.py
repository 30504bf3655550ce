"""Views against the reference's arrays and samples; purity; extents; the exported evaluation."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewlabels.data import colour, views
from fewlabels.errors import DataError, UsageError

KINDS = ["photo", "gray", "glyph", "reference", "reference_tf1"]
EXTENTS = torch.tensor([[40, 44], [17, 44], [40, 9], [23, 31], [5, 5], [40, 40], [12, 30], [1, 1]])
SIZE = 24
CLOSE = 5e-5  # between the compiled and the plain path, on noise; the issue asks for 5e-4


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    """(8, 3, 40, 44) smooth coloured images, black outside their extents."""
    coarse = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, size=(40, 44), mode="bilinear").mul(255).to(torch.uint8)
    return images * inside()


def inside() -> torch.Tensor:
    """(8, 1, 40, 44) bool, the pixels within EXTENTS."""
    rows = torch.arange(40)[:, None] < EXTENTS[:, 0, None, None]
    columns = torch.arange(44)[None] < EXTENTS[:, 1, None, None]
    return (rows & columns)[:, None]


def assert_is(made: torch.Tensor, plain: torch.Tensor, atol: float = 0.0) -> None:
    """The plain path gives what its parts give, to atol; the compiled one is close to that."""
    torch.testing.assert_close(made, plain, atol=atol if views.PLAIN else CLOSE, rtol=0)


def make(function: str, pixels: torch.Tensor, extent: torch.Tensor, ids: torch.Tensor, **changes) -> torch.Tensor:
    arguments = {"size": SIZE, "kind": "photo", "epoch": 3, "seed": 1, "view": 0, **changes}
    if function == "evaluate":
        return views.evaluate(pixels, extent, size=arguments["size"], kind=arguments["kind"])
    return getattr(views, function)(pixels, extent, ids, **arguments)


@pytest.fixture(params=["compiled", "plain"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file holds for both paths."""
    if request.param == "compiled" and views.compiled() is None:
        pytest.skip("numba is not there")
    monkeypatch.setattr(views, "PLAIN", request.param == "plain")


CASES = [(function, kind) for function in ("pretrain", "finetune", "evaluate") for kind in KINDS]
both = pytest.mark.parametrize(("function", "kind"), CASES)


@both
def test_shape_type_and_range(pixels: torch.Tensor, function: str, kind: str) -> None:
    before = pixels.clone()
    made = make(function, pixels, EXTENTS, torch.arange(8), kind=kind)
    assert made.shape == (8, 3, SIZE, SIZE)
    assert made.dtype == torch.float32
    assert made.is_contiguous()
    assert made.min() >= 0
    assert made.max() <= 1
    assert torch.equal(pixels, before)


@both
def test_a_view_does_not_depend_on_its_batch(pixels: torch.Tensor, function: str, kind: str) -> None:
    ids = torch.tensor([5, 9, 2**40, 0, 7, 11, 3, 8])
    whole = make(function, pixels, EXTENTS, ids, kind=kind)
    order = torch.tensor([3, 0, 7, 6, 5, 1])
    part = make(function, pixels[order], EXTENTS[order], ids[order], kind=kind)
    torch.testing.assert_close(part, whole[order], atol=1e-6, rtol=0)
    again = make(function, pixels, EXTENTS, ids, kind=kind)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_is_the_same_to_the_last_bit_in_a_batch_of_any_size(pixels: torch.Tensor, kind: str) -> None:
    ids = torch.arange(17 * 18)
    images, extent = pixels[ids % 8], EXTENTS[ids % 8]
    functions = ["draw_placement", "draw_paint", *([] if views.PLAIN else ["pretrain", "finetune"])]  # BLAS differs
    key = {"epoch": 0, "seed": 0, "view": 0}

    def made(function: str, part: slice) -> list[torch.Tensor]:
        if function == "draw_paint":
            return list(vars(views.draw_paint(ids[part], **key)).values())
        if function == "draw_placement":
            found = vars(views.draw_placement(extent[part], ids[part], kind=kind, **key)).values()
            return [tensor for tensor in found if tensor is not None]
        return [make(function, images[part], extent[part], ids[part], kind=kind)]

    for function in functions:
        whole = made(function, slice(None))
        for count in range(1, 18):
            parts = [made(function, slice(i, i + count)) for i in range(0, 153 if count > 5 else 40, count)]
            for one, pieces in zip(whole, zip(*parts, strict=True), strict=True):
                again = torch.cat(pieces)
                assert torch.equal(again, one[: len(again)])


@both
def test_chunks_of_a_batch_change_nothing(
    pixels: torch.Tensor, function: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, extent, ids = pixels.repeat(3, 1, 1, 1), EXTENTS.repeat(3, 1), torch.arange(24)
    whole = make(function, images, extent, ids, kind=kind)
    monkeypatch.setattr(views, "CHUNK_BYTES", 1)  # four images at a time
    torch.testing.assert_close(make(function, images, extent, ids, kind=kind), whole, atol=1e-6, rtol=0)


@both
def test_autocast_changes_nothing(pixels: torch.Tensor, function: str, kind: str) -> None:
    plain = make(function, pixels, EXTENTS, torch.arange(8), kind=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(make(function, pixels, EXTENTS, torch.arange(8), kind=kind), plain)


@both
def test_what_lies_outside_the_extent_never_shows(pixels: torch.Tensor, function: str, kind: str) -> None:
    garbage = torch.where(inside(), pixels, 255)
    for epoch in range(4):
        clean = make(function, pixels, EXTENTS, torch.arange(8), kind=kind, epoch=epoch)
        assert torch.equal(make(function, garbage, EXTENTS, torch.arange(8), kind=kind, epoch=epoch), clean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", ["pretrain", "finetune"])
def test_every_part_of_the_key_makes_another_view(pixels: torch.Tensor, function: str, kind: str) -> None:
    images, extent, ids = pixels[:1].expand(6, -1, -1, -1), EXTENTS[:1].expand(6, -1), torch.arange(6)
    first = make(function, images, extent, ids, kind=kind)
    others = [{"epoch": 4}, {"seed": 2}, {"view": 1}]
    made = [make(function, images, extent, ids, kind=kind, **change) for change in others]
    made.append(make(function, images, extent, ids + 6, kind=kind))
    for i, one in enumerate([first, *made]):
        for other in [first, *made][:i]:
            assert ((one - other).abs().amax((1, 2, 3)) > 0.02).all()
    assert all((first[i] - first[j]).abs().max() > 0.02 for i in range(6) for j in range(i))


# --- the compiled path ---------------------------------------------------------------------------------------------

# (height, width, size): as large, larger, smaller, much smaller, a thin strip, one pixel
SHAPES = [(32, 32, 32), (96, 80, 96), (120, 150, 112), (40, 44, 24), (300, 200, 32), (2000, 9, 20), (16, 16, 224)]
SHAPES += [(1, 1, 8)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width", "size"), SHAPES)
def test_the_compiled_views_are_the_plain_ones(
    kind: str, height: int, width: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = torch.Generator().manual_seed(height)
    # Noise is the worst case
    images = torch.randint(0, 256, (12, 3, height, width), dtype=torch.uint8, generator=numbers)
    extent = torch.stack([torch.randint(1, side + 1, (12,), generator=numbers) for side in (height, width)], dim=1)
    for function in ("pretrain", "finetune", "evaluate"):
        made = make(function, images, extent, torch.arange(12), kind=kind, size=size)
        with monkeypatch.context() as patch:
            patch.setattr(views, "PLAIN", not views.PLAIN)
            twin = make(function, images, extent, torch.arange(12), kind=kind, size=size)
        torch.testing.assert_close(made, twin, atol=CLOSE, rtol=0)


def test_threads_and_memory_layout_change_nothing(pixels: torch.Tensor) -> None:
    spread = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    expected = make("pretrain", pixels, EXTENTS, torch.arange(8))
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made = make("pretrain", spread, EXTENTS, torch.arange(8))
            torch.testing.assert_close(made, expected, atol=1e-6 if views.PLAIN else 0, rtol=0)
    finally:
        torch.set_num_threads(before)


def test_without_numba_the_plain_path_runs(monkeypatch: pytest.MonkeyPatch, pixels: torch.Tensor) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fewlabels.data.fused", None)  # importing it fails, as without numba
        views.compiled.cache_clear()
        assert views.compiled() is None
        patch.setattr(views, "PLAIN", False)
        made = make("pretrain", pixels, EXTENTS, torch.arange(8))
    views.compiled.cache_clear()
    torch.testing.assert_close(made, make("pretrain", pixels, EXTENTS, torch.arange(8)), atol=CLOSE, rtol=0)


# --- drawing ---------------------------------------------------------------------------------------------------


def ks_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Largest distance between two empirical distribution functions."""
    points = np.union1d(first, second)
    steps = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (first, second)]
    return float(np.abs(steps[0] - steps[1]).max())


@pytest.mark.parametrize("shape", ["375x500", "500x375", "32x32", "400x400"])
def test_random_crops_are_distributed_as_the_references(golden: Path, shape: str) -> None:
    expected = np.load(golden / "augment_tf2.npz")[f"random_crop_boxes_yxhw/{shape}"].astype(np.float64)
    height, width = map(int, shape.split("x"))
    extent = torch.tensor([[height, width]]).expand(len(expected), 2)
    ids = torch.arange(len(expected))
    made = views.draw_placement(extent, ids, epoch=0, seed=0, view=0, kind="reference").box.double().numpy()

    def measures(boxes: np.ndarray) -> dict[str, np.ndarray]:
        y, x, h, w = boxes.T
        below, beside = y / np.maximum(height - h, 1), x / np.maximum(width - w, 1)
        return {"y": y, "x": x, "h": h, "w": w, "area": h * w, "aspect": w / h, "below": below, "beside": beside}

    # alpha = 1e-4 for two samples of one distribution (conservative here, because sides are whole numbers)
    threshold = (np.log(2 / 1e-4) / 2) ** 0.5 * (2 / len(expected)) ** 0.5
    found, wanted = measures(made), measures(expected)
    for name in found:
        assert ks_distance(found[name], wanted[name]) < threshold, name
    assert found["area"].min() >= 0.1 * height * width
    # The quirk: no crop but a full-size one touches the far border
    assert not ((made[:, 0] + made[:, 2] == height) & (made[:, 2] < height)).any()


def test_photo_crops_reach_every_border_and_stay_inside() -> None:
    extent = torch.tensor([[32, 32], [20, 50], [50, 20], [3, 7], [1, 1], [10, 300]]).repeat_interleave(1500, 0)
    box = views.draw_placement(extent, torch.arange(9000), epoch=0, seed=0, view=0, kind="photo").box
    corner, sides = box[:, :2], box[:, 2:]
    assert torch.equal(box, box.round())
    assert (corner >= 0).all()
    assert (sides >= 1).all()
    assert (corner + sides <= extent).all()
    touching = (corner + sides == extent) & (sides < extent)
    assert (touching[:1500].float().mean(0) > 0.03).all()


@pytest.mark.parametrize("smallest", [0.08, 0.25, 0.5])
@pytest.mark.parametrize("ratio", [1, 2.2, 2.6, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_views_keep_the_shape_of_what_long_images_show(kind: str, ratio: float, smallest: float) -> None:
    short, long, count = 60, round(60 * ratio), 400
    ask = {"epoch": 0, "seed": 0, "view": 0, "kind": kind, "smallest_crop": smallest}
    for sides in ([short, long], [long, short]):
        extent = torch.tensor([sides]).expand(count, 2)
        box = views.draw_placement(extent, torch.arange(count), **ask).box
        whole = (box[:, 2:] == extent).all(1)
        rows, columns = box[:, 2:].unbind(1)
        assert (box[:, :2] + box[:, 2:] <= extent).all()
        if views.KINDS[kind].warp:
            assert whole.all()
            continue
        # A side is rounded to whole pixels: half of one more or less
        kept = ((columns + 0.5) / rows >= views.ASPECT[0]) & ((columns - 0.5) / rows <= views.ASPECT[1])
        if views.KINDS[kind].official:  # as the reference, which falls back to the whole
            assert (kept | whole).all()
            assert bool(whole.all()) == (ratio * 0.75 * max(smallest, views.AREA_KEPT) > 1)
            continue
        assert kept.all()
        if ratio * 0.75 * max(smallest, views.AREA_KEPT) > 1:  # no crop is large enough: the largest of such a shape
            largest = min(sides), int(min(sides) * 4 / 3)
            assert {tuple(sorted(one)) for one in box[:, 2:].int().tolist()} == {largest}
            place, room = box[:, :2].sum(1), long - max(largest)  # anywhere along the image
            assert place.min() < 0.1 * room
            assert place.max() > 0.9 * room


def test_a_view_of_a_panorama_shows_a_circle_as_one() -> None:
    rows, columns = torch.meshgrid(torch.arange(60), torch.arange(240), indexing="ij")
    disc = (rows - 30).square() + (columns % 60 - 30).square() < 20**2  # four of them
    pixels = torch.where(disc, 255, 0).to(torch.uint8).expand(64, 3, 60, 240)
    for images in (pixels, pixels.mT.contiguous()):
        extent, ids = torch.tensor([images.shape[2:]]).expand(64, 2), torch.arange(64)
        seen = views.finetune(images, extent, ids, size=60, epoch=0, seed=0, smallest_crop=0.5)[:, 0] > 0.5
        across, down = (seen.int().diff(dim=dim).abs().sum().item() for dim in (2, 1))  # edges of the discs
        assert 0.7 < across / down < 1.4  # squashed to a quarter 4, or a quarter


@pytest.mark.parametrize("smallest", [0.25, 0.6, 1.0])
def test_crops_are_as_large_as_asked(smallest: float) -> None:
    extent = torch.tensor([[64, 64], [60, 80]]).repeat_interleave(2000, 0)
    ask = {"epoch": 0, "seed": 0, "view": 0, "kind": "photo"}
    box = views.draw_placement(extent, torch.arange(4000), smallest_crop=smallest, **ask).box
    share = box[:, 2:].prod(1) / extent.prod(1)
    assert share.min() >= smallest
    assert share.max() <= 1
    usual = views.draw_placement(extent, torch.arange(4000), **ask).box[:, 2:].prod(1) / extent.prod(1)
    assert share.mean() > usual.mean() + 0.05
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    made, wide = (
        views.pretrain(pixels, extent[:2], torch.arange(2), size=32, epoch=0, seed=0, view=0, smallest_crop=crop)
        for crop in (0.08, smallest)
    )
    assert not torch.equal(made, wide)


@pytest.mark.parametrize("smallest", [0.0, 0.07, 1.01, float("nan")])
def test_impossible_smallest_crops_are_refused(smallest: float) -> None:
    extent = torch.tensor([[64, 64]])
    with pytest.raises(UsageError, match="smallest crop"):
        views.draw_placement(extent, torch.arange(1), epoch=0, seed=0, view=0, smallest_crop=smallest)


def test_paint_has_the_stated_probabilities_and_ranges() -> None:
    paint = views.draw_paint(torch.arange(12_000), epoch=0, seed=0, view=0, strength=0.5)
    for chosen, share in ((paint.jitter, 0.8), (paint.gray, 0.2), (paint.blur, 0.5)):
        assert abs(chosen.double().mean().item() - share) < 0.018
    low = torch.tensor([0.6, 0.6, 0.6, -0.1])
    high = torch.tensor([1.4, 1.4, 1.4, 0.1])
    torch.testing.assert_close(paint.factors.amin(0), low, atol=1e-3, rtol=0)
    torch.testing.assert_close(paint.factors.amax(0), high, atol=1e-3, rtol=0)
    torch.testing.assert_close(paint.factors.mean(0), (low + high) / 2, atol=1e-2, rtol=0)
    assert 0.1 <= paint.sigma.min() < 0.101 < 1.999 < paint.sigma.max() <= 2.0
    codes = (paint.order * torch.tensor([64, 16, 4, 1])).sum(1)
    counts = codes.bincount()[codes.unique()]
    assert len(counts) == 24
    assert (counts - 500).abs().max() < 90  # standard deviation 22
    flips = [
        views.draw_placement(torch.full((12_000, 2), 8), torch.arange(12_000), epoch=0, seed=0, view=view).flip
        for view in (0, 1)
    ]
    # Placement and paint, and the two views, are independent
    together = torch.corrcoef(torch.stack([*flips, paint.jitter, paint.gray, paint.blur]).double())
    assert (together - torch.eye(5)).abs().max() < 4.5 / 12_000**0.5
    assert abs(flips[0].double().mean().item() - 0.5) < 0.018


def test_glyph_warps_stay_within_their_limits() -> None:
    extent, ids = torch.full((5000, 2), 8), torch.arange(5000)
    for amount in (1.0, 0.5):
        drawn = views.draw_placement(extent, ids, epoch=0, seed=0, view=0, kind="glyph", amount=amount)
        assert not drawn.flip.any()
        linear = drawn.affine[:, :, :2].double()
        area = torch.linalg.det(linear)
        assert 1 - 0.4 * amount - 1e-3 < area.min() < 1 - 0.39 * amount
        assert 0.99 < area.max() < 1 + 1e-3
        angle = torch.rad2deg(torch.atan2(linear[:, 1, 0], linear[:, 0, 0])).abs().max()
        assert 14.9 * amount < angle < 15.01 * amount
        # Rotated back, what remains is [[across, down * shear], [0, down]]
        upright = torch.linalg.qr(linear).R
        upright = upright * torch.diagonal(upright, dim1=1, dim2=2).sign()[:, :, None]
        shear = torch.rad2deg(torch.atan(upright[:, 0, 1] / upright[:, 1, 1])).abs().max()
        assert 9.9 * amount < shear < 10.01 * amount
        stretch = upright[:, 0, 0] / upright[:, 1, 1]
        assert 1.19**amount < stretch.max() < 1.201**amount


# --- the official form -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "kind"), [("tf2", "reference"), ("tf1", "reference_tf1")])
def test_evaluation_equals_the_reference(golden: Path, version: str, kind: str) -> None:
    arrays = dict(np.load(golden / "augment_tf2.npz")) | dict(np.load(golden / "augment_tf1.npz"))
    shapes = [key.split("/")[1] for key in arrays if key.startswith("eval_u8/")]
    assert len(shapes) == 7
    for shape in shapes:
        image = torch.from_numpy(arrays[f"eval_u8/{shape}"]).permute(2, 0, 1)[None]
        for size in (32, 48):
            extent = torch.tensor([image.shape[2:]])
            made = views.evaluate(image, extent, size=size, kind=kind, crop=0.875)
            expected = arrays[f"{version}_preprocess_for_eval_crop/{shape}/to{size}"]
            np.testing.assert_allclose(made[0].permute(1, 2, 0).numpy(), expected, atol=3e-6)
        assert torch.equal(made, views.evaluate(image, extent, size=48, kind=kind))


def test_the_official_chain_is_its_parts_in_order(pixels: torch.Tensor) -> None:
    """pretrain(kind="reference") against the parts that other tests hold against the reference, image by image."""
    size, ids = 40, torch.arange(100, 140)
    images, extent = pixels[:1].expand(40, -1, -1, -1), EXTENTS[:1].expand(40, -1)
    made = views.pretrain(images, extent, ids, size=size, epoch=0, seed=0, view=1, kind="reference")
    placement = views.draw_placement(extent, ids, epoch=0, seed=0, view=1, kind="reference")
    paint = views.draw_paint(ids, epoch=0, seed=0, view=1)
    assert paint.gray.any()
    assert (~paint.jitter).any()
    for i in range(40):
        box = placement.box[i : i + 1]
        still = torch.tensor([False])
        image = views.place(images[:1], views.Placement(box, still), size=size, kind="reference")
        image = image.flip(3) if placement.flip[i] else image
        if paint.jitter[i]:
            for number in paint.order[i].tolist():
                image = colour.JITTER[number](image, paint.factors[i : i + 1, number]).clamp(0, 1)
        if paint.gray[i]:
            image = colour.grayscale(image)
        image = image.clamp(0, 1)
        if paint.blur[i]:
            image = colour.blur(image, paint.sigma[i : i + 1], radius=2, dark_border=True)
        assert_is(made[i : i + 1], image.clamp(0, 1), atol=2e-6)


def test_shared_blur_sigma_is_one_for_the_batch(pixels: torch.Tensor) -> None:
    images, extent, ids = pixels[:1].expand(16, -1, -1, -1), EXTENTS[:1].expand(16, -1), torch.arange(16)
    key = {"epoch": 0, "seed": 0, "view": 0}
    made = views.pretrain(images, extent, ids, size=40, kind="reference", shared_blur_sigma=True, **key)
    placement = views.draw_placement(extent, ids, kind="reference", **key)
    paint = views.draw_paint(ids, **key)
    paint = replace(paint, sigma=paint.sigma[0].repeat(16))
    placed = views.place(images, placement, size=40, kind="reference")
    assert_is(made, views.paint(placed, paint, kind="reference"))
    other = views.pretrain(images, extent, ids, size=40, kind="reference", **key)
    assert (made - other).abs().max() > 0.01


# --- our kinds -------------------------------------------------------------------------------------------------


def test_photo_evaluation_equals_pillow() -> None:
    image = torch.randint(0, 256, (1, 3, 120, 160), dtype=torch.uint8)
    made = views.evaluate(image, torch.tensor([[100, 131]]), size=40)
    side, y, x = 88, 6, 22  # round half to even of 87.5; (100 - 88 + 1) // 2; (131 - 88 + 1) // 2
    for channel in range(3):
        picture = Image.fromarray(image[0, channel].float().div(255).numpy()).crop((x, y, x + side, y + side))
        expected = np.asarray(picture.resize((40, 40), Image.Resampling.BICUBIC)).clip(0, 1)
        np.testing.assert_allclose(made[0, channel].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_small_images_of_the_right_size_are_evaluated_as_they_are(kind: str) -> None:
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    made = views.evaluate(image, torch.full((2, 2), 32), size=32, kind=kind)
    torch.testing.assert_close(made, image / 255, atol=1e-6, rtol=0)


def test_gray_images_stay_gray_and_glyphs_are_not_mirrored() -> None:
    ramp = torch.linspace(0, 255, 40).to(torch.uint8).expand(64, 3, 40, 40)  # brighter to the right
    extent, ids = torch.full((64, 2), 40), torch.arange(64)
    for kind in ("gray", "glyph"):
        made = views.pretrain(ramp, extent, ids, size=SIZE, epoch=0, seed=0, view=0, kind=kind)
        torch.testing.assert_close(made[:, 0], made[:, 2], atol=1e-6, rtol=0)
        rising = made[:, 0, :, -4:].mean((1, 2)) > made[:, 0, :, :4].mean((1, 2))
        assert rising.all() if kind == "glyph" else 10 < rising.sum() < 54


@pytest.mark.parametrize("kind", KINDS)
def test_finetune_is_the_placement_alone(pixels: torch.Tensor, kind: str) -> None:
    key, ids = {"epoch": 3, "seed": 1, "view": 0}, torch.arange(8)
    amount = 0.5 if kind == "glyph" else 1.0
    placement = views.draw_placement(EXTENTS, ids, kind=kind, amount=amount, **key)
    placed = views.place(pixels, placement, size=SIZE, kind=kind)
    made = views.finetune(pixels, EXTENTS, ids, size=SIZE, kind=kind, **key)
    assert_is(made, placed.clamp(0, 1))
    gentle = views.draw_placement(EXTENTS, ids, kind=kind, amount=amount, smallest_crop=0.7, **key)
    made = views.finetune(pixels, EXTENTS, ids, size=SIZE, kind=kind, smallest_crop=0.7, **key)
    assert_is(made, views.place(pixels, gentle, size=SIZE, kind=kind).clamp(0, 1))


def test_blur_and_strength_can_be_turned_off(pixels: torch.Tensor) -> None:
    ids, key = torch.arange(8), {"size": SIZE, "epoch": 3, "seed": 1, "view": 0, "kind": "gray"}
    plain = views.pretrain(pixels, EXTENTS, ids, strength=0.0, blur=False, **key)
    torch.testing.assert_close(plain, views.finetune(pixels, EXTENTS, ids, **key), atol=1e-6, rtol=0)
    blurred = views.pretrain(pixels, EXTENTS, ids, strength=0.0, blur=True, **key)
    assert 0 < ((blurred - plain).abs().amax((1, 2, 3)) > 1e-3).sum() < 8


# --- the exported evaluation -----------------------------------------------------------------------------------


class Evaluation(torch.nn.Module):
    def __init__(self, size: int, kind: str) -> None:
        super().__init__()
        self.size, self.kind = size, kind

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return views.evaluate_image(pixels, size=self.size, kind=self.kind)


@pytest.mark.parametrize(("kind", "size"), [("photo", 48), ("photo", 20), ("glyph", 20), ("reference", 48)])
def test_the_exported_evaluation_takes_any_shape(kind: str, size: int) -> None:
    free = torch.export.Dim.DYNAMIC
    example = torch.zeros(2, 3, 40, 50, dtype=torch.uint8)
    exported = torch.export.export(
        Evaluation(size, kind), (example,), dynamic_shapes=({0: free, 2: free, 3: free},)
    ).module()
    for count, height, width in ((3, 37, 91), (2, 2, 2), (3, 61, 33), (2, 201, 3), (5, 48, 48)):
        images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)
        expected = views.evaluate(images, torch.tensor([[height, width]]).expand(count, 2), size=size, kind=kind)
        torch.testing.assert_close(exported(images), expected, atol=2e-6, rtol=0)
        torch.testing.assert_close(Evaluation(size, kind)(images), expected, atol=2e-6, rtol=0)


def test_a_process_that_compiles_makes_the_views_of_one_that_loads_them(tmp_path: Path) -> None:
    """To the last bit, or a run that is killed in its first process would go on as another one."""
    if views.PLAIN:
        pytest.skip("nothing is compiled")
    program = """
import hashlib, torch
from fewlabels.data import fused, views
pixels = torch.arange(8 * 3 * 40 * 40).mul(7919).remainder(256).byte().view(8, 3, 40, 40)
made = [
    views.pretrain(pixels, torch.full((8, 2), 40), torch.arange(8), size=size, epoch=1, seed=3, view=0, kind=kind)
    for kind in views.KINDS for size in (24, 64)
]
print(fused._views.stats.cache_misses.total(), *[hashlib.sha256(view.numpy().tobytes()).hexdigest() for view in made])
"""
    surroundings = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    told = [
        subprocess.run([sys.executable, "-c", program], env=surroundings, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    (compiled, *cold), (loaded, *warm) = (one.stdout.split() for one in told)
    assert (compiled, loaded) == ("1", "0")
    assert cold == warm


# --- messages --------------------------------------------------------------------------------------------------


def test_defaults_of_torch_change_nothing(pixels: torch.Tensor) -> None:
    made, ids = [], torch.arange(8)
    for kind, device in ((torch.float32, "cpu"), (torch.float64, "meta")):
        torch.set_default_dtype(kind)
        try:
            with torch.device(device):
                made.append(make("pretrain", pixels, EXTENTS, ids))
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*made)


def test_wrong_arguments_are_refused(pixels: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=r'unknown kind of views "foto".*did you mean "photo"') as caught:
        views.evaluate(pixels, EXTENTS, size=SIZE, kind="foto")
    assert "photo, gray, glyph, reference" in caught.value.fix
    with pytest.raises(UsageError, match="unknown kind"):
        views.evaluate_image(pixels, size=SIZE, kind="")
    with pytest.raises(UsageError, match="views of 0 px"):
        views.evaluate(pixels, EXTENTS, size=0)
    for strength in (-0.1, 1.3, float("nan")):
        with pytest.raises(UsageError, match=r"strength .* is out of range"):
            make("pretrain", pixels, EXTENTS, torch.arange(8), strength=strength)
    for wrong in (pixels.float(), pixels[:, :1], pixels[0], pixels[:0]):
        with pytest.raises(DataError, match="pixels are torch"):
            views.evaluate(wrong, EXTENTS, size=SIZE)
    with pytest.raises(DataError, match=r"extents are torch.int64 of shape \(7, 2\) for 8 images"):
        views.evaluate(pixels, EXTENTS[:7], size=SIZE)
    for kind in (torch.float32, torch.bool):  # a mask would be taken for images of one pixel
        with pytest.raises(DataError, match="extents are torch"):
            views.evaluate(pixels, EXTENTS.to(kind), size=SIZE)
    with pytest.raises(UsageError, match="out of range"):
        make("pretrain", pixels, EXTENTS, torch.arange(8), view=0.5)
    for outside in (EXTENTS * 100, EXTENTS * 0):  # compiled views would read and write outside of the image
        with pytest.raises(DataError, match="extents are not all between 1 and the canvas"):
            views.evaluate(pixels, outside, size=SIZE)
    for crop in (0.0, 1.5, float("nan")):
        with pytest.raises(UsageError, match=r"crop of .* is out of range"):
            views.evaluate(pixels, EXTENTS, size=SIZE, crop=crop)
    for ids in (torch.arange(1), torch.arange(9), torch.arange(8).int(), torch.arange(8)[:, None]):
        for name in ("pretrain", "finetune"):
            with pytest.raises(DataError, match=r"ids are torch.int.* for 8 images"):
                make(name, pixels, EXTENTS, ids)
