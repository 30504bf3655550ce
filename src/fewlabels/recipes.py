"""Named recipes, each a function of the facts that can be read aloud. `auto` chooses.

A recipe returns numbers as they are asked for; what follows from them (steps, peak learning rate) is in plan.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from fewlabels.config import DistillRecipe, FinetuneRecipe, PretrainRecipe, Recipe
from fewlabels.errors import UsageError, nearest

MANY_LABELS = 80  # a class
SELF_TRAINING_STEPS = 1000  # fewer can lose (Fashion-MNIST, 40 labels, 312 steps: two of three draws)


@dataclass(frozen=True)
class Facts:
    """What a recipe may know: the data and the machine, before anything is decoded."""

    images: int  # training images, labeled or not
    labeled: int
    classes: int
    side: int  # the usual longest side of the images in pixels
    gray: bool  # the three channels are equal
    on_gpu: bool
    threads: int


def digits(facts: Facts) -> Recipe:
    """`fewlabels demo`: scikit-learn's digits, a fixed schedule that two CPU cores finish in about two minutes."""
    return Recipe(
        name="digits",
        encoder="resnet18_0.25x_small",
        size=16,
        kind="glyph",
        pretrain=PretrainRecipe(
            epochs=60, batch=256, optimizer="sgd", learning_rate=0.3, scaling="linear", warmup=0.1,
            weight_decay=1e-4, temperature=0.5, strength=0.5, blur=False,
        ),
        finetune=replace(_finetune(facts), epochs=100),
        distill=DistillRecipe(
            epochs=120, batch=128, optimizer="adamw", learning_rate=2e-3, scaling="none", warmup=0.05,
            weight_decay=1e-4, start="pretrained", self_training=0.95,
        ),
    )  # fmt: skip


def smoke(facts: Facts) -> Recipe:
    """Seconds, for tests: every stage runs, nothing is learned that is worth having."""
    batch = max(2, min(16, facts.images))
    return Recipe(
        name="smoke",
        encoder="resnet18_0.125x_small",
        size=16,
        kind=_kind(facts),
        precision="fp32",
        pretrain=PretrainRecipe(epochs=2, batch=batch, strength=0.5, blur=False, head_out=32),
        finetune=FinetuneRecipe(epochs=4, batch=16, learning_rate=0.02, weight_decay=0.0, warmup=0.0),
        distill=DistillRecipe(epochs=2, batch=batch),
    )


def simclrv2(facts: Facts) -> Recipe:
    """The paper's method and settings, sized for the data.

    Small images take the reference's CIFAR command (temperature 0.5, jitter 0.5, no blur, small stem); photos take
    the ImageNet settings. Batch and epochs are what the data and the machine can carry; the learning rate follows
    the batch by the paper's square root. Gray images have our views: the official ones jitter hue and mirror letters.
    """
    small = facts.side <= 48
    size = _size(facts)
    batch = _batch(facts)
    return Recipe(
        name="simclrv2",
        encoder=_encoder(facts),
        size=size,
        kind="reference" if not facts.gray else _kind(facts),
        # A crop of 40 % of the area has 0.63 of the side: 1.5 x the view's side keeps most crops from being enlarged
        working_size=None if small else min(facts.side, round(1.5 * size)),
        pretrain=PretrainRecipe(
            epochs=800 if facts.on_gpu else 100,
            batch=batch,
            temperature=0.5 if small else 0.1,
            strength=0.5 if small else 1.0,
            blur=not small,
        ),
        finetune=FinetuneRecipe(
            # 60 epochs at 1 % of ImageNet's labels, 30 at 10 %: the fewer labels, the more epochs
            epochs=60 if facts.labeled < 0.05 * facts.images else 30,
            batch=max(2, min(256 if facts.on_gpu else 128, facts.labeled)),
            learning_rate=0.005,
            warmup=0.0,
            weight_decay=0.0,
        ),
        distill=DistillRecipe(epochs=400 if facts.on_gpu else 50, batch=batch, self_temperature=0.1),
    )


def best(facts: Facts) -> Recipe:
    """Ours: the paper's method with settings that measured better at few labels and small budgets.

    Photos are seen in four views of crops from a quarter of the area on, small ones at three quarters of the side, and
    learn by Muon, in stage 3 too: CIFAR-10 (JPEG), 40, 250 and 4,000 labels, 50, 61 and 70 % by frozen features after
    15 epochs on a GPU where the paper's settings have 35, 46 and 56. (Above 48 px not measured on a GPU.) Drawings
    prefer two views, SGD and a temperature of 0.5.

    Where features are good (evaluate.too_weak) the network then teaches itself, a thousand steps if there is time: on
    digits with 20 labels 97.7 % where distillation had 90.2. Photos with up to 4 labels a class distill: there it can
    be sure of wrong answers. docs/LOG.md has the figures of each choice.
    """
    base = simclrv2(facts)
    pretrain = replace(base.pretrain, warmup=0.1, strength=0.5, blur=base.size > 48)
    batch = base.distill.batch if facts.on_gpu else min(128, base.distill.batch)
    distill = replace(
        base.distill, optimizer="adamw", learning_rate=2e-3, scaling="none", self_temperature=1.0, start="pretrained",
        self_training=0.95 if _kind(facts) == "glyph" or facts.labeled > 4 * facts.classes else 0.0, batch=batch,
        epochs=max(base.distill.epochs, math.ceil(SELF_TRAINING_STEPS * batch / max(1, facts.images))),
    )  # fmt: skip
    if _kind(facts) == "glyph":
        pretrain = replace(pretrain, optimizer="sgd", learning_rate=0.3, scaling="linear", temperature=0.5)
    else:
        base = replace(base, resolution=0.75 if base.size <= 48 else 1.0)
        batch = max(2, pretrain.batch // 2 if facts.on_gpu else min(64, pretrain.batch))
        pretrain = replace(
            pretrain, optimizer="muon", learning_rate=_muon_rate(batch), scaling="none", temperature=0.2, views=4,
            batch=batch, smallest_crop=0.25,
            epochs=round(pretrain.epochs * 2 / 4 / base.resolution**2),  # for as many pixels
        )  # fmt: skip
        distill = replace(distill, optimizer="muon", learning_rate=_muon_rate(distill.batch))
    return replace(base, name="best", kind=_kind(facts), pretrain=pretrain, finetune=_finetune(facts), distill=distill)


def auto(facts: Facts) -> Recipe:
    """`best`, sized for the images, the labels and the machine. On a CPU its schedule is cut to an hour (plan.py)."""
    return replace(best(facts), name="auto")


def paper_imagenet(network: str, facts: Facts) -> Recipe:
    """The paper's own settings for ImageNet: 800 epochs at batch 4096 and 224 px on 128
    TPU cores, and what it says of 1 %, 10 % and all of the labels.

    Views have TensorFlow 1's form. The student of --student is taught by the big network after that was distilled into
    itself, as the paper's best small models were.
    """
    labels, plain = facts.labeled / max(1, facts.images), "_" not in network
    return Recipe(
        name=f"paper_imagenet_{network}",
        encoder=f"resnet{network}",
        size=224,
        kind="reference_tf1",
        working_size=320,
        # The paper's memory holds 3 % of an epoch's keys. It reaches over the epoch's edge: one of as many keys as
        # there are images (9,469) held their own for 35 % of them, a sixteenth for 3 %
        pretrain=PretrainRecipe(epochs=800, batch=4096, momentum=0.999, queue=min(65536, facts.images // 16)),
        finetune=FinetuneRecipe(
            epochs=60 if labels < 0.05 else 30, batch=1024, learning_rate=0.005 if plain else 0.002, warmup=0.0,
            weight_decay=0.0, tap=0 if labels > 0.5 else 1,
        ),
        distill=DistillRecipe(epochs=400, batch=4096, self_temperature=0.1),
    )  # fmt: skip


# The 13 architectures of the paper's Table 1
_TABLE_1 = [f"{d}{w}{sk}" for d in (50, 101, 152) for w in ("", "_2x") for sk in ("", "_sk")] + ["152_3x_sk"]
RECIPES: dict[str, Callable[[Facts], Recipe]] = {r.__name__: r for r in (auto, best, simclrv2, digits, smoke)}
RECIPES |= {f"paper_imagenet_{network}": functools.partial(paper_imagenet, network) for network in _TABLE_1}


def named(name: str, facts: Facts) -> Recipe:
    """The recipe called name, for these facts."""
    if name not in RECIPES:
        raise UsageError(
            f'there is no recipe "{name}"{nearest(name, RECIPES)}',
            fix=f"use one of {', '.join(n for n in RECIPES if not n.startswith('paper_'))}, paper_imagenet_*, "
            "or the path of a .toml file",
        )
    return RECIPES[name](facts)


# --- choices that several recipes share -----------------------------------------------------------------------


def _kind(facts: Facts) -> str:
    if not facts.gray:
        return "photo"
    return "glyph" if facts.side <= 32 else "gray"


def _size(facts: Facts) -> int:
    """Side of the views: the image's own up to 48 px; then what a machine can afford."""
    if facts.side <= 12:
        return 16
    if facts.side <= 48:
        return facts.side
    return min(224 if facts.on_gpu else 64, facts.side)


def _encoder(facts: Facts) -> str:
    if facts.on_gpu:
        return "resnet50" if facts.side > 48 else "resnet18_small"
    return "resnet18_0.5x" if facts.side > 48 else "resnet18_0.25x_small"


def _batch(facts: Facts) -> int:
    """A power of two, at most a quarter of the images and what the machine carries."""
    # 1,024 images are 2,048 views: of 224 px they are too much for a ResNet-50 on an 80 GB card (an estimate)
    most = 1024 if facts.on_gpu and facts.side <= 48 else 256
    batch = 8
    while batch * 2 <= min(most, facts.images // 4):
        batch *= 2
    return max(2, min(batch, facts.images))


def _muon_rate(batch: int) -> float:
    return 0.05 if batch >= 512 else 0.02


def _finetune(facts: Facts) -> FinetuneRecipe:
    """At least 200 updates, so that 20 labels get as much training as 400, and 30 epochs where labels are many.

    Few labels must not undo what pretraining learned: the classifier starts from the probe, and the rate is low and
    grows with the root of the labels a class. Crops from half the area on show things about as large as evaluation
    does. Many labels of photos have Muon. (docs/LOG.md.)
    """
    batch = max(2, min(64, facts.labeled or 2))
    a_class = facts.labeled / max(1, facts.classes)
    many = _kind(facts) != "glyph" and a_class >= MANY_LABELS
    rate = 0.005 if many else round(min(1e-3, max(1e-4, 5e-5 * a_class**0.5)), 6)
    return FinetuneRecipe(
        epochs=max(30.0, round(200 * batch / max(1, facts.labeled))),
        batch=batch, optimizer="muon" if many else "adamw", learning_rate=rate,
        scaling="none", warmup=0.1, weight_decay=1e-4, tap=1, start="probe", smallest_crop=0.5,
    )  # fmt: skip
