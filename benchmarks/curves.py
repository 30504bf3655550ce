"""Do the fast paths change what is learned? The same small run with all of them on, and with all of them off.

    python -m benchmarks curves --seeds 3 [--data FOLDER] --threads 2

Fast: compiled views, NT-Xent by tiles (in bfloat16 where the step is), bfloat16 autocast, channels_last.
Slow: the plain views, all similarities at once, float32, NCHW. On a machine without fast bfloat16 both are float32.
A seed gives both the same images, labels, first weights and random numbers. Pretraining, then logistic regression on
the frozen features and fine-tuning with LABELS labels, measured on images that no stage saw. Writes
benchmarks/results/curves.json and draws docs/curves.svg. Without --data the digits of scikit-learn.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from benchmarks import workload
from fewlabels import plan, recipes, runtime
from fewlabels.config import Recipe
from fewlabels.data import labels, views
from fewlabels.data.labels import Dataset
from fewlabels.data.loader import Batch
from fewlabels.model import optim
from fewlabels.model.encoder import encoder
from fewlabels.model.heads import Classifier, ProjectionHead
from fewlabels.recipes import Facts
from fewlabels.stages.finetune import Finetune
from fewlabels.stages.pretrain import Pretrain
from fewlabels.use import compare, evaluate

PICTURE = Path(__file__).parents[1] / "docs" / "curves.svg"
STEPS, BATCH = 160, 512  # 1,024 anchors: enough for the loss to be made of tiles
LABELS = 100
CPU = torch.device("cpu")
SLOW = runtime.Precision(None, channels_last=False)
WAYS = ("fast", "slow")
COLOURS = {"fast": "#2b52c8", "slow": "#888888"}
WORDS = {"loss": "loss of the last tenth", "features": "frozen features, % right", "finetuned": "fine-tuned, % right"}


class WholeMatrix(Pretrain):
    """Pretraining with all similarities at once."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        views_of_both = torch.cat([self.view(batch, 0), self.view(batch, 1)])
        first, second = self.head(self.encoder(views_of_both)).chunk(2)
        return {"loss": workload.whole_matrix(first.float(), second.float(), self.temperature)}


def opened(data: Path | None, folder: Path) -> tuple[Dataset, Recipe]:
    """The images, and the recipe that `fewlabels fit` has for them on a CPU."""
    dataset = workload.stored("digits" if data is None else str(data), folder)
    facts = Facts(
        images=len(dataset.train), labeled=LABELS, classes=dataset.num_classes, side=dataset.store.canvas,
        gray=data is None, on_gpu=False, threads=torch.get_num_threads(),
    )  # fmt: skip
    return dataset, recipes.named("digits" if data is None else "best", facts)


def pretrained(way: str, dataset: Dataset, recipe: Recipe, seed: int) -> tuple[Pretrain, list[float]]:
    """The stage after STEPS steps, and the loss of each."""
    settings, precision = recipe.pretrain, workload.precision(CPU) if way == "fast" else SLOW
    torch.manual_seed(seed)
    body = encoder(recipe.encoder)
    head = ProjectionHead(body.feature_dim, settings.head_out, settings.head_layers)
    view = workload.viewer(
        views.pretrain, precision, size=recipe.size, seed=seed, kind=recipe.kind, strength=settings.strength,
        blur=settings.blur,
    )  # fmt: skip
    stage = (Pretrain if way == "fast" else WholeMatrix)(body, head, view=view, temperature=settings.temperature)
    batch = min(BATCH, len(dataset.train))
    peak = optim.peak_learning_rate(settings.learning_rate, batch, settings.scaling)
    schedule = plan.Derived(len(dataset.train), batch, STEPS, STEPS // 10, peak)
    return stage, workload.trained(stage, settings, schedule, precision, dataset, dataset.train, seed)


def scored(stage: Pretrain, way: str, dataset: Dataset, recipe: Recipe, seed: int) -> dict[str, float]:
    """% right of held-out images: logistic regression on the frozen features, and after fine-tuning."""
    precision = workload.precision(CPU) if way == "fast" else SLOW
    setting = compare.Setting(recipe.size, recipe.kind, CPU, precision)
    few = labels.keep_labels(dataset, LABELS, seed)
    truth = dataset.labels[dataset.held_out]
    stage.eval()
    known, unknown = (
        compare.outputs(dataset, ids, setting, lambda view: [stage.encoder(view)])[0]
        for ids in (few.labeled, dataset.held_out)
    )
    fitted = evaluate.logistic_regression(known, few.labels[few.labeled], num_classes=dataset.num_classes)
    found = {"features": 100 * float((fitted.predict_proba(unknown).argmax(1) == truth).mean())}
    tap, settings = recipe.finetune.tap, recipe.finetune
    network = Classifier(stage.encoder, stage.head if tap else None, tap=tap, num_classes=dataset.num_classes)
    view = workload.viewer(views.finetune, precision, size=recipe.size, seed=seed, kind=recipe.kind)
    tuning = Finetune(network, view=view)
    workload.trained(tuning, settings, plan.derive(settings, len(few.labeled), 1), precision, few, few.labeled, seed)
    network.eval()
    (logits,) = compare.outputs(dataset, dataset.held_out, setting, lambda view: [network(view)])
    return found | {"finetuned": 100 * float((logits.argmax(1) == truth).mean())}


def table(found: dict[str, Any], title: str) -> dict[str, Any]:
    """Print both ways side by side, with the 95 % interval of their difference: Student's, paired by seed."""
    print(f"\n| {title} | fast, mean | sd | slow, mean | sd | fast - slow | 95 % interval | within noise |")
    print("|---|---|---|---|---|---|---|---|")
    verdicts = {}
    for key, words in WORDS.items():
        fast, slow = (np.array(found[way][key]) for way in WAYS)
        apart, few = fast - slow, len(fast) < 2
        half = float("nan") if few else stats.t.ppf(0.975, len(fast) - 1) * apart.std(ddof=1) / len(fast) ** 0.5
        mean = float(apart.mean())
        columns = [f"{x.mean():.3f} | {0.0 if few else x.std(ddof=1):.3f}" for x in (fast, slow)]
        within = bool(abs(mean) <= half)
        print(
            f"| {words} | {columns[0]} | {columns[1]} | {mean:+.3f} | {mean - half:+.3f} to {mean + half:+.3f} "
            f"| {'yes' if within else 'no'} |"
        )
        verdicts[key] = {"difference": mean, "half_interval": float(half), "within_noise": within}
    print(f"seconds of all runs: fast {sum(found['fast']['seconds']):.0f}, slow {sum(found['slow']['seconds']):.0f}")
    return verdicts


def draw(found: dict[str, Any], title: str) -> None:
    """docs/curves.svg: every seed a line of losses, and a dot for each accuracy."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for way in WAYS:
        for number, losses in enumerate(found[way]["losses"]):
            left.plot(losses, color=COLOURS[way], linewidth=1, alpha=0.7, label=None if number else way)
    left.set_xlabel("step")
    left.set_ylabel("NT-Xent")
    left.legend(frameon=False)
    for place, key in enumerate(("features", "finetuned")):
        for shift, way in ((-0.12, "fast"), (0.12, "slow")):
            values = found[way][key]
            right.plot([place + shift] * len(values), values, "o", color=COLOURS[way], alpha=0.7)
            right.plot([place + shift - 0.08, place + shift + 0.08], [statistics.mean(values)] * 2, color=COLOURS[way])
    right.set_xticks([0, 1], ["frozen features", "fine-tuned"])
    right.set_xlim(-0.5, 1.5)
    right.set_ylabel(f"% right of held-out images, {LABELS} labels")
    figure.suptitle(title, fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, metadata={"Date": None})


def run(*, data: Path | None, seeds: int) -> dict[str, Any]:
    """All runs of both ways."""
    found: dict[str, Any] = {way: {key: [] for key in ("losses", "seconds", *WORDS)} for way in WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        dataset, recipe = opened(data, Path(temporary) / "run")
        form = workload.precision(CPU)
        layout = "channels_last" if form.channels_last else "NCHW"
        fast = f"{form.name}, {layout}, compiled views, loss by tiles"
        for seed in range(seeds):
            for way in WAYS if seed % 2 else WAYS[::-1]:
                began = time.perf_counter()
                with workload.plain_views(way == "slow"):
                    stage, losses = pretrained(way, dataset, recipe, seed)
                    result = scored(stage, way, dataset, recipe, seed)
                result["loss"] = statistics.mean(losses[-max(1, STEPS // 10) :])
                for key, value in {**result, "losses": losses, "seconds": time.perf_counter() - began}.items():
                    found[way][key].append(value)
                print(f"seed {seed}, {way}: " + ", ".join(f"{WORDS[key]} {result[key]:.2f}" for key in WORDS))
    name = "digits" if data is None else data.name
    title = f"{name}, {recipe.encoder}, {seeds} seeds of {STEPS} steps. fast: {fast}"
    verdicts = table(found, name)
    draw(found, title)
    return {"title": title, "verdicts": verdicts, **found}
