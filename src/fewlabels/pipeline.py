"""The three stages as one run folder: pretrain -> finetune -> distill -> what came of it.

A finished stage is skipped, a broken one goes on from its last checkpoint; the same command does both.
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewlabels import agreement, checkpoint, identity, plan, runtime, watch
from fewlabels.asked import Asked, begun_stages, of_run, parse_budget, same_plan
from fewlabels.data.places import at_home
from fewlabels.data.source import Source
from fewlabels.errors import DataError, FewlabelsError, MissingInput, RankFailed, RunAgain, Stopped, UsageError
from fewlabels.model.encoder import encoder as build_encoder
from fewlabels.model.heads import Classifier
from fewlabels.prepare import open_images, prepare, write_resolved
from fewlabels.prepared import Prepared
from fewlabels.runfolder import Interrupts, RunFolder, duration, read_json, say
from fewlabels.use import artefact, compare, facts, report, suggest
from fewlabels.use.artefact import Card
from fewlabels.use.predict import Model, load
from fewlabels.worker import Worker


@dataclass(frozen=True)
class Run:
    """A run folder and what is in it."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(at_home(self.path)))

    @property
    def model(self) -> Model:
        """The deployable classifier."""
        return load(self.path)

    @property
    def metrics(self) -> dict[str, Any]:
        """results.json: the table of methods, and the final model's measurements on held-out images."""
        found = read_json(self.path / "results.json")
        if not self.path.is_dir():
            raise MissingInput(f"{self.path} is not there", fix="give the run folder, as in out=RUN")
        if found is None:
            raise RunAgain(f"{self.path} has no results yet", fix="run the same command again to finish it")
        return found

    def report(self) -> Path:
        """Write report.html anew and return its path."""
        return report.write(self.path)

    def suggest(self, count: int = 20) -> list[str]:
        """Names of the images to label next, best first."""
        return suggest.suggest(self.path, count).images


def fit(
    images: Any, labels: Any = None, *, out: str | Path, recipe: str = "auto", test: Any = None,
    student: str | None = None, budget: str | float | None = None, seed: int | None = 0, device: str = "auto",
    keep_labels: str | int | None = None, max_bad: float = 0.05, until: str = "distill", **overrides: Any,
) -> Run:  # fmt: skip
    """Pretrain, fine-tune and distill on images, in the run folder `out`; call it again to resume.

    A run that has begun keeps what is left out: recipe, student, budget, overrides, keep_labels where
    labels are left out too, and a seed that is None.

    images: folder, labels CSV, tar, parquet, npz, URL of shards, numpy uint8 (N, H, W[, 3]) or list of paths.
    labels: CSV path or one label an image; -1, None or "" = unlabeled. Without labels only stage 1 runs.
    test: held-out images with labels, in any of these forms; never seen by any stage.
    student: the encoder to deploy ("resnet18_0.25x", "timm:NAME"); None = the same network.
    budget: "30m", "2h" or minutes: the schedule is fitted to the measured speed.
    keep_labels: "1%" or a number: use only so many of the labels, chosen evenly over classes by the seed.
    max_bad: the share of unreadable images that stops the run before training.
    until: "pretrain", "finetune" or "distill": the last stage to run.
    overrides: recipe values, e.g. size=64, pretrain={"epochs": 20}.
    Raises a FewlabelsError for every fault a user can mend.
    """
    asked = Asked(
        images=images, labels=labels, out=out, recipe=str(recipe), test=test,  # type: ignore[arg-type]
        student=student, budget=parse_budget(budget), device=str(device), keep_labels=keep_labels, max_bad=max_bad,
        seed=int(seed) if seed is not None and hasattr(seed, "__index__") else seed, until=until, overrides=overrides,
    )  # fmt: skip
    return run(asked)


@torch.inference_mode(mode=False)  # which also lets gradients flow, whatever the caller has turned off
def run(asked: Asked) -> Run:
    """Do what was asked, from wherever the run folder stands."""
    if asked.until not in plan.STAGES:
        raise UsageError(f'until "{asked.until}" is not a stage', fix=f"use one of {', '.join(plan.STAGES)}")
    device = runtime.start(asked.device)
    with watch.ranks() as ranks, Interrupts().watching() as interrupts:
        source, folder = _images(asked), RunFolder(asked.out)

        def record(error: Exception) -> None:
            stopped = isinstance(error, Stopped) or (isinstance(error, RankFailed) and error.stopped)
            what = error.what if isinstance(error, FewlabelsError) else f"{type(error).__name__}: {error}"
            folder.status("stopped" if stopped else "failed", reason=what)

        with folder.locked():
            agreement.on_folder(folder)
            asked = of_run(asked, folder)
            folder.rests = bool(begun_stages(folder)) or folder.results_file.exists()
            with ranks.recording(record), interrupts.naming():
                folder.status("running", "prepare")
                prepared = prepare(asked, source, folder, device)
                del source  # the paths of ten million files are 1 GB
                _run_stages(asked, prepared, interrupts)
    return Run(asked.out)


@torch.inference_mode(mode=False)
def check(asked: Asked) -> dict[str, Any]:
    """What a run would understand, do and cost, found out in a temporary folder beside --out; changes nothing.

    Returns lines (text), understood, seconds (for each stage, measured), disk_mb and memory_mb (of this process), and
    largest_batch (for each stage: asked, fits, with_recompute; measured, where it can be).
    """
    device = runtime.start(asked.device)
    with watch.ranks(), Interrupts("while it looked; nothing was changed").watching() as interrupts:
        source = _images(asked)
        with _scratch(asked.out) as folder:
            return _found_out(asked, prepare(asked, source, folder, device), interrupts)


def _images(asked: Asked) -> Source:
    """The images, the same for every rank."""
    agreement.on_wishes(asked)
    source = open_images(asked)
    agreement.on_source(source)
    return source


@contextmanager
def _scratch(out: Path) -> Iterator[RunFolder]:
    """One folder for all ranks, gone at the end. It is where the run would be: /tmp may be small."""
    place = next(p for p in out.absolute().parents if p.is_dir())
    main = runtime.is_main()
    with tempfile.TemporaryDirectory(prefix=".fewlabels-check-", dir=place) if main else nullcontext("") as name:
        folder = RunFolder(Path(runtime.from_main(name)))
        with folder.locked():
            agreement.on_folder(folder)
            yield folder
        runtime.barrier()  # no rank reads in it any more


def _found_out(asked: Asked, prepared: Prepared, interrupts: Interrupts) -> dict[str, Any]:
    """What `check` returns."""
    folder = prepared.folder
    _wanted_stages(asked, prepared)
    worker = Worker(prepared, interrupts)
    worker.try_networks()
    held = worker.held()
    largest = _largest_batches(prepared, worker, interrupts)
    prepared, sums = _fit_schedule(prepared, asked, worker)
    per_step = worker.seconds_per_step()
    seconds = plan.cost(prepared.recipe, prepared.images, per_step, runtime.world_size())
    store = sum(file.stat().st_size for file in folder.data.rglob("*")) / 1e6
    found = prepared.reasons + sums + prepared.equations
    bad = (folder.path / "bad_images.csv").read_text(encoding="utf-8").splitlines()[1:]
    weights = 4e-6 * sum(p.numel() for p in build_encoder(prepared.recipe.encoder).parameters())
    disk = store + weights * 3 * 2 * len(seconds)  # weights and two slots of the optimizer, two checkpoints a stage
    if "distill" in seconds and prepared.recipe.distill.replays:
        rows = prepared.recipe.distill.teacher_epochs * prepared.images["distill"]
        disk += 4e-6 * rows * prepared.dataset.num_classes  # while a stage runs, the teacher's answers
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    known = prepared.dataset.understood
    classes = ", ".join(f"{name} {count:,}" for name, count in [*known.classes.items()][:50])
    lines = [known.line(), *([f"labels: {classes}"] if classes else []), *known.notes]
    lines += [] if known.held_out else ["no labeled image is held out, so networks will not be measured (see --test)"]
    lines += [f"unreadable: {line}" for line in bad[:20]] + found
    lines += [
        f"{name}: largest batch that fits: about {batch['fits']:,} (asked {batch['asked']:,})"
        + (f", about {batch['with_recompute']:,} with --recompute" if "with_recompute" in batch else "")
        for name, batch in largest.items()
    ]
    lines += [
        f"{name}: {sum(parts.values()) / 1e6:,.0f} MB a process whatever the batch" for name, parts in held.items()
    ]
    lines += [f"{name}: about {duration(value)} at the measured speed" for name, value in seconds.items()]
    if begun := sorted(begun_stages(RunFolder(asked.out))):
        keeps = f"has begun: there {', '.join(begun)} keep their plan; these are figures of a new run"
        others = identity.other_images(asked.out, prepared.dataset)
        lines.append(f"{asked.out} {'is a run of other images: give another --out' if others else keeps}")
    lines += [f"about {duration(sum(seconds.values()))} in all, {memory:,.0f} MB of memory, {disk:,.0f} MB of disk"]
    return {
        "lines": lines, "understood": asdict(prepared.dataset.understood), "seconds": seconds, "disk_mb": disk,
        "memory_mb": memory, "largest_batch": largest,
    }  # fmt: skip


def _largest_batches(prepared: Prepared, worker: Worker, interrupts: Interrupts) -> dict[str, dict[str, int]]:
    """For each stage the batch asked for, the largest that fits, and the largest with recompute where that may be."""
    fits = worker.largest_batches()
    found = {name: {"asked": prepared.derived(name).batch, "fits": n} for name, n in fits.items()}
    if prepared.recipe.recompute:
        return found
    again = Worker(replace(prepared, recipe=replace(prepared.recipe, recompute=True)), interrupts)
    try:
        again.held()
    except UsageError:  # a timm model that cannot
        return found
    for name, images in again.largest_batches().items():
        found[name]["with_recompute"] = images
    return found


def _run_stages(asked: Asked, prepared: Prepared, interrupts: Interrupts) -> None:
    folder = prepared.folder
    agreement.on_plan(prepared)
    stages = _wanted_stages(asked, prepared)
    worker = Worker(prepared, interrupts)
    worker.try_networks()
    prepared, sums = _as_before(asked, prepared, stages, worker)
    identity.check_folder(prepared)
    folder.rests = False
    folder.status("running", "prepare")
    for line in prepared.reasons + sums + prepared.equations:
        say(f"  {line}")
    write_resolved(prepared, asked, sums)
    worker.follow(prepared)
    guarded = not asked.names("distill", "self_training") and not prepared.learned_before
    tuned = "finetune" in runtime.from_main(begun_stages(folder))
    if "finetune" in stages and guarded and prepared.self_trains and not tuned:
        prepared = replace(prepared, too_weak=worker.too_weak())
        write_resolved(prepared, asked, sums)
        worker.follow(prepared)
    for stage in stages:
        getattr(worker, stage)()
    if "finetune" in stages and prepared.dataset.understood.held_out:  # else nothing tells what it has learned
        worker.supervised()
    folder.status("running", "report")
    with runtime.main_first():
        later = [s for s in plan.STAGES[plan.STAGES.index(stages[-1]) + 1 :] if s in begun_stages(folder)]
        final = read_json(folder.results_file) if later else None
        if runtime.is_main():
            # `fewlabels pretrain` on a finished run must not replace its results by those of less
            if final and final.get("final") in later:
                folder.status("finished")
            else:
                _publish(prepared, worker, stages[-1])
            if later and (final or {}).get("final") != later[-1]:
                folder.status("stopped", reason=f"{later[-1]} has begun; `fewlabels fit` goes on with it")


def _wanted_stages(asked: Asked, prepared: Prepared) -> list[str]:
    """The stages that can run, up to the one asked for. What they have too few of is told before the first begins."""
    stages = prepared.stages
    if asked.until == "pretrain" and asked.until not in stages:
        raise UsageError("pretraining was asked for, and a model that takes its place", fix="leave out --pretrained")
    if asked.until not in (*stages, "distill"):
        raise DataError(f"{asked.until} needs labels and there are none", fix="give labels with --labels")
    if asked.until not in stages:
        say("  note: no labels: only pretraining runs; give labels later with the same --out")
    stages = [s for s in stages if plan.STAGES.index(s) <= plan.STAGES.index(asked.until)]
    for stage in stages:
        if (images := prepared.images[stage]) < prepared.needed:
            raise (DataError if images < 2 else UsageError)(
                f"{stage} needs at least {prepared.needed} {'labeled ' * (stage == 'finetune')}images, not {images}",
                why="every process learns from some, and batch norm needs two",
                fix="give more of them, or fewer processes",
            )
    return stages


def _as_before(asked: Asked, prepared: Prepared, stages: list[str], worker: Worker) -> tuple[Prepared, list[str]]:
    """The plan that the run folder has for these wishes, else a new one; and the sums behind its schedule."""
    known, begun = runtime.from_main((prepared.folder.resolved(), begun_stages(prepared.folder)))
    if known and asked.budget not in (None, known["asked"]["budget"]) and begun >= set(stages):
        say("  note: every stage has begun already, and keeps its length: --budget changes nothing")
    if known and "finetune" in begun and not asked.names("distill", "self_training"):
        prepared = replace(prepared, too_weak=known["too_weak"])  # fine-tuning began as was decided then
        worker.follow(prepared)
    kept = known["budget"] if known and same_plan(known, asked, prepared.facts, begun) else None
    return _fit_schedule(prepared, asked, worker) if kept is None else (prepared, kept)


def _fit_schedule(prepared: Prepared, asked: Asked, worker: Worker) -> tuple[Prepared, list[str]]:
    """The schedule within asked.budget; without one, `auto` on a CPU stays within an hour. And the sums behind it."""
    cut_only = asked.budget is None
    if cut_only and not (asked.recipe == "auto" and prepared.device.type == "cpu"):
        return prepared, []
    # Nobody asked for that hour, so reading the images is not counted to it
    seconds = plan.CPU_MINUTES * 60.0 if asked.budget is None else asked.budget - prepared.seconds
    if seconds <= 0:
        raise UsageError(f"reading the images took {duration(prepared.seconds)}, all of the budget", fix="give more")
    per_step = worker.seconds_per_step()
    folder, ranks = prepared.folder, runtime.world_size()
    saved = {name: checkpoint.glance(folder.stage(name)) or {} for name in per_step}
    done = {name: int(values.get("step", 0)) for name, values in saved.items()}
    done, begun = runtime.from_main((done, begun_stages(folder)))
    needed = sum(plan.cost(prepared.recipe, prepared.images, per_step, ranks, done).values())
    if cut_only and needed < plan.TRAINING_SHARE * seconds:
        return prepared, []
    if cut_only:
        say(f"  the full schedule would take {duration(needed)} here; `auto` on a CPU keeps to an hour (see --budget)")
    recipe, sums = plan.fit_budget(
        prepared.recipe, prepared.images, seconds, per_step, ranks, done=done,
        longest={s: getattr(prepared.recipe, s).epochs for s in plan.MOST_EPOCHS} if cut_only else plan.MOST_EPOCHS,
        kept=begun | {stage for stage in per_step if "epochs" in asked.overrides.get(stage, {})},
    )  # fmt: skip
    return replace(prepared, recipe=recipe), sums


def _publish(prepared: Prepared, worker: Worker, final: str) -> None:
    """The table, the artefact and the report, from trained networks."""
    recipe, path = prepared.recipe, prepared.folder.path
    layout = prepared.precision.channels_last
    setting = replace(prepared.setting, precision=runtime.Precision(None, layout))  # that of `predict`, not of training
    results, arrays = compare.compare(
        prepared.dataset, worker.pretrain(), worker.classifiers, final, setting, worker.names(),
        spread=prepared.spreads, learned_before=prepared.learned_before,
    )  # fmt: skip
    compare.write(path, results | {"tap": recipe.finetune.tap}, arrays)
    classifier, head = worker.classifiers.get(final), None
    if classifier is None:  # that of pretraining is a model too: it has features, and --pretrained can begin with it
        classifier, head = Classifier(worker.pretrain().encoder, None, tap=0, num_classes=1), worker.pretrain().head
    student = recipe.distill.student if final == "distill" else None
    card = Card(
        encoder=student or recipe.encoder,
        tap=classifier.tap,
        head_layers=recipe.pretrain.head_layers,
        head_out=recipe.pretrain.head_out,
        whole_head=head is not None,
        classes=prepared.dataset.classes if head is None else (),
        size=recipe.size,
        kind=recipe.kind,
        canvas=prepared.dataset.store.canvas,
        temperature=results["temperature"],
        # Where labels were spread it learned classes as often as the graph gave them
        labels_a_class=() if head or prepared.spreads else tuple(prepared.dataset.labels_a_class.tolist()),
        metrics=results["measurement"],
        training={
            "recipe": recipe.name, "images": len(prepared.dataset.train), "labels": len(prepared.dataset.labeled),
            "seed": prepared.seed,
        },
    )  # fmt: skip
    weights = prepared.folder.model / artefact.WEIGHTS
    before = checkpoint.file_digest(weights) if (path / "export").is_dir() and weights.is_file() else ""
    artefact.save(prepared.folder.model, classifier, card, head)
    if before and checkpoint.file_digest(weights) != before:
        say(f"  note: {path / 'export'} is of an older model: `fewlabels export {path}` writes it anew")
    prepared.folder.status("finished")
    checkpoint.write_text(prepared.folder.report, report.render(facts.read(path)))
