"""report.html: a run folder as one page for a person, without script and without the network.

Reads files only, never the stages, and works with whatever of them is there. Everything a file, a label or a name
says is text to the page: control characters go when it is read, markup is escaped by the template.

Shapes: N held-out images, K classes, M points of the map.
"""

from __future__ import annotations

import base64
import io
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from fewlabels import __version__, checkpoint, plan
from fewlabels.config import flat
from fewlabels.data.pixels import open_store
from fewlabels.errors import DataError, FewlabelsError, MissingInput, counted
from fewlabels.runfolder import duration
from fewlabels.use import figures
from fewlabels.use.facts import Facts, is_number, part, read, short

LARGEST_THUMB = 96  # pixels
MOST_MISTAKES, MOST_CONFUSIONS, MOST_CLASSES, MOST_BAD = 18, 12, 60, 10
MOST_LINES = 60
MACHINE = ("device", "precision", "threads", "ranks", "seed")
LARGEST_TABLE = 20  # classes up to which the confusion matrix is a table that can be read
STAGES = {
    "pretrain": "pretraining", "finetune": "fine-tuning", "distill_self": "teaching itself", "distill": "distilling",
    "supervised": "labels alone",
}  # fmt: skip
OPTIONAL: Facts = {"ece": None, "parameters": None, "megabytes": None, "latency_ms": None, "note": ""}
TAP = re.compile(r"tap(\d+)_logistic")
BASELINE = re.compile(rf"most_frequent|pixels_logistic|supervised|{TAP.pattern}")


def write(run: Path) -> Path:
    """Write RUN/report.html, replacing an older one, and return its path.

    Raises MissingInput if run is no run folder, DataError if results.json is of another version.
    """
    if not any((run / name).is_file() for name in ("resolved.json", "status.json", "results.json")):
        raise MissingInput(
            f"{run} is not a run folder",
            why="it has none of resolved.json, status.json and results.json, from which the report is made",
            fix="give the folder that was --out of `fewlabels fit`",
        )
    try:
        page = render(read(run))
    except FewlabelsError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, jinja2.UndefinedError) as error:
        fix = "run the same fit command again: it measures anew"
        raise DataError(f"a result of {run} is not what it should be: {error!r}", fix=fix) from error
    checkpoint.write_text(run / "report.html", page)
    return run / "report.html"


def render(run: Facts) -> str:
    """The page of what `read` found."""
    results = run["results"]
    tap = part(part(run["resolved"], "recipe"), "finetune").get("tap", 0)  # an older version's results do not say it
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "number": "{:,}".format, "short": short}
    return environment.get_template("report.html.j2").render(
        run=run, version=__version__, progress=progress(run), headline=headline(run),
        methods=methods({"tap": tap, **results}) if results else None, taps=taps(results) if results else "",
        quality=quality(run), mistakes=mistakes(run), map=feature_map(run), curves=curves(run["metrics"]),
        data=data_facts(run), setup=setup(run), commands=commands(run["path"], results or {}),
    )  # fmt: skip


# --- what the page says ------------------------------------------------------------------------------------------


def progress(run: Facts) -> Facts:
    """Whether the run is finished, and in words what is missing."""
    state = run["status"].get("state", "")
    missing = []
    for stage in part(run["resolved"], "derived") or plan.STAGES:
        records = run["metrics"].get(stage)
        if not records:
            missing.append(f"{STAGES[stage]} has not begun")
        elif records[-1]["step"] < records[-1]["total_steps"]:
            missing.append(f"{STAGES[stage]} is at step {records[-1]['step']:,} of {records[-1]['total_steps']:,}")
    if state == "finished" or (not state and run["results"]):
        missing = []
    elif not missing:
        missing = ["the evaluation is not done"]
    return {"state": state or "unknown", "missing": missing, "reason": run["status"].get("reason", "")}


def headline(run: Facts) -> Facts:
    """The sentence on top, the one under it, and the remark that must not be overlooked."""
    results, understood = run["results"], part(run["resolved"], "understood")
    if not results:
        images, known = understood.get("train"), understood.get("labeled")
        source = f"{images:,} images and {known:,} labels" if is_number(images) and is_number(known) else ""
        return {"title": "This run has no results yet", "under": source, "remark": ""}
    source = f"{counted(results['labels_used'], 'label')} and {counted(results['images_used'], 'image')}"
    row = next((r for r in results["rows"] if r["key"] == results["final"]), None)
    if row and row["accuracy"] is not None and not row.get("cross_validated"):
        n, split = row["n"], (results["held_out"] or {}).get("split", "test")
        remark = "" if n >= 100 else f"{n:,} images are few: look at the interval, not at the number."
        if split == "val":
            remark = f"These are the validation images, since there are no test images. {remark}".strip()
        return {
            "title": f"Your model gets {percent(row['accuracy'])} of {counted(n, 'held-out image')} right",
            "under": f"{_range(row)} with 95 % confidence, from {source}.",
            "remark": remark,
        }
    if not results["labels_used"] and results["final"] == "pretrain":
        return {
            "title": f"Pretrained on {counted(results['images_used'], 'image')}, no labels yet",
            "under": "Give some labels to the same command, and it goes on from here.",
            "remark": "",
        }
    tap = part(part(run["resolved"], "recipe"), "finetune").get("tap", 0)
    rows = {r["key"]: r for r in results["rows"] if r["accuracy"] is not None}
    row = row if row and row["accuracy"] is not None else rows.get(f"tap{tap}_logistic") or rows.get("tap0_logistic")
    remark = "There are no held-out images, so the model itself could not be judged. Give labeled images with --test."
    if row is None:
        return {"title": "Your model is trained, but not measured", "under": f"From {source}.", "remark": remark}
    if not row.get("cross_validated"):
        return {
            "title": f"Its features get {percent(row['accuracy'])} of {counted(row['n'], 'held-out image')} right",
            "under": f"{_range(row)} with 95 % confidence: {row['name']}; from {source}.",
            "remark": "It has no classifier of its own yet: `fewlabels fit` with the same --out goes on from here.",
        }
    return {
        "title": f"About {percent(row['accuracy'])} right, judged on its own labels",
        "under": f"{_range(row)}: {row['name']}, cross-validated on {counted(row['n'], 'label')}; from {source}.",
        "remark": remark,
    }


def methods(results: Facts) -> Facts:
    """The table of the method against its baselines, and what it says in words."""
    rows = [
        {
            **OPTIONAL,
            **row,
            "is_final": row["key"] == results["final"],
            "is_baseline": bool(BASELINE.fullmatch(row["key"])),
            "range": _range(row),
        }
        for row in results["rows"]
    ]
    return {
        "rows": rows,
        "verdict": verdict(rows, results.get("tap", 0)),
        "costs": any(row["parameters"] is not None for row in rows),
        "cross_validated": any(row.get("cross_validated") for row in rows),
    }


def verdict(rows: Sequence[Facts], tap: int) -> str:
    """The model, or where it could not be judged its features, against the best cheap baseline, also when that wins."""
    judged = [row for row in rows if row["accuracy"] is not None]
    final, who = next((row for row in judged if row["is_final"]), None), "the model"
    rivals = [row for row in judged if row["is_baseline"]]
    if final is None:
        told = {row["key"]: row for row in judged}  # not the best of all taps: chosen after looking, it would flatter
        tap = tap if f"tap{tap}_logistic" in told else 0
        who, final = f"logistic regression on its features (tap {tap})", told.get(f"tap{tap}_logistic")
        unknown = next((row["note"] for row in rows if TAP.fullmatch(row["key"]) and row["note"]), "")
        if final is None and unknown:
            return f"Its features are not measured: {unknown}. Held-out images can measure them."
        rivals = [row for row in rivals if not TAP.fullmatch(row["key"])]
    if final is None or not rivals:
        return ""
    best = max(rivals, key=lambda row: row["accuracy"])
    points = 100 * (final["accuracy"] - best["accuracy"])
    overlap = final["low"] <= best["high"] and best["low"] <= final["high"]
    beaten = f'"{best["name"]}" ({percent(best["accuracy"])})'
    if points > 0.05:
        doubt = "The intervals overlap, so part of it may be chance." if overlap else "The intervals do not touch."
        return f"{who.capitalize()} is {points:.1f} points better than the best cheap baseline, {beaten}. {doubt}"
    if points > -0.05:
        return f"{who.capitalize()} is only as good as a cheap baseline, {beaten}. Here the long way did not pay."
    doubt = (
        "The intervals overlap, so it may be chance, but there is no sign that the long way paid."
        if overlap
        else "The intervals do not touch: use the baseline, or train longer and on more images."
    )
    return f"A cheap baseline wins: {beaten} is {-points:.1f} points better than {who}. {doubt}"


def taps(results: Facts) -> str:
    """Whether the middle of the head beats its input, by logistic regression on each layer."""
    rows = [row for row in results["rows"] if TAP.fullmatch(row["key"]) and row["accuracy"] is not None]
    if len(rows) < 2:
        return ""
    best, points = max(rows, key=lambda row: row["accuracy"]), [100 * row["accuracy"] for row in rows]
    if best is rows[0]:
        return "The head's input is the best place to start from here."
    number, gain = TAP.sub(r"\1", best["key"]), max(points) - points[0]
    return f"Tap {number} is {gain:.1f} points better than the head's input (tap 0)."


def quality(run: Facts) -> Facts | None:
    """Calibration, confusions and classes of the deployed model."""
    results = run["results"]
    measured = results and results.get("measurement")
    if not measured:
        return None
    classes = results["classes"]
    matrix = np.asarray(measured["confusion"], dtype=np.int64)  # (K, K)
    totals = np.maximum(matrix.sum(axis=1), 1)
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSIONS]
    pairs = [(int(t), int(p)) for t, p in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[t, p]]
    surer = sum(b["n"] * (b["confidence"] - b["accuracy"]) for b in measured["reliability"] if b["n"])
    per_class = sorted(measured["per_class"], key=lambda row: (row["recall"] is None, row["recall"]))
    return {
        "measured": measured,
        "reliability": figures.reliability(measured["reliability"]),
        "habit": "surer than it should be" if surer > 0 else "less sure than it could be",
        "classes": classes,
        "table": [
            [{"n": int(n), "share": f"{n / totals[t]:.3f}", "is_right": t == p} for p, n in enumerate(row)]
            for t, row in enumerate(matrix)
        ]
        if len(classes) <= LARGEST_TABLE
        else None,
        "picture": figures.confusion(matrix) if len(classes) > LARGEST_TABLE else None,
        "pairs": [(classes[t], classes[p], int(wrong[t, p]), int(totals[t])) for t, p in pairs],
        "per_class": per_class[:MOST_CLASSES],
        "left_out": max(0, len(per_class) - MOST_CLASSES),
    }


def mistakes(run: Facts) -> list[Facts]:
    """The wrong predictions that the model is surest of, with thumbnails where the pixels are there."""
    arrays = run["arrays"]
    if not arrays or not len(arrays["probabilities"]):
        return []
    classes, labels, probabilities = run["results"]["classes"], arrays["labels"], arrays["probabilities"]
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero((predicted != labels) & (labels >= 0))
    shown = wrong[np.argsort(-confidence[wrong], kind="stable")][:MOST_MISTAKES]
    pictures = thumbnails(run["folder"] / "data", arrays["ids"][shown])
    return [
        {
            "picture": picture,
            "true": classes[labels[row]],
            "predicted": classes[predicted[row]],
            "confidence": float(confidence[row]),
        }
        for row, picture in zip(shown, pictures, strict=True)
    ]


def thumbnails(store: Path, ids: np.ndarray) -> list[Facts | None]:
    """Images as data URIs of at most LARGEST_THUMB pixels; None where they cannot be read."""
    try:
        pixels, extents = open_store(store).read(ids.astype(np.int64))
    except (FewlabelsError, OSError, IndexError, ValueError):
        return [None] * len(ids)
    found: list[Facts | None] = []
    for image, (height, width) in zip(pixels.numpy(), extents.tolist(), strict=True):
        picture = Image.fromarray(np.ascontiguousarray(image[:, :height, :width].transpose(1, 2, 0)))
        is_small = max(height, width) <= LARGEST_THUMB // 2
        picture.thumbnail((LARGEST_THUMB, LARGEST_THUMB), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG" if is_small else "JPEG", **({} if is_small else {"quality": 82}))
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        found.append({"uri": f"data:image/{'png' if is_small else 'jpeg'};base64,{data}", "is_small": is_small})
    return found


def feature_map(run: Facts) -> Markup | None:
    """The 2-D map, if there is one."""
    arrays = run["arrays"]
    if not arrays or len(arrays["map"]) < 2:
        return None
    return figures.feature_map(arrays["map"], arrays["map_labels"], run["results"]["classes"])


def curves(metrics: Mapping[str, Sequence[Facts]]) -> Facts:
    """Loss of each stage, and the online probes."""
    losses: dict[str, dict[str, list[float]]] = {}
    probes: dict[str, tuple[list[float], list[float]]] = {}
    for stage, records in list(metrics.items())[:6]:
        logged = [r for r in records if is_number(r.get("loss"))]
        if len(logged) > 1:
            curve = {"step": [r["step"] for r in logged], "loss": [r["loss"] for r in logged]}
            losses[STAGES.get(stage, short(stage, 24))] = curve
        for key, name in (("knn", "nearest neighbours"), ("linear", "logistic regression")):
            probed = [r for r in records if is_number(r.get(key))]
            if stage == "pretrain" and probed:
                probes[name] = ([r["step"] for r in probed], [r[key] for r in probed])
    return {"losses": figures.losses(losses) if losses else None, "probes": figures.probes(probes) if probes else None}


def data_facts(run: Facts) -> Facts:
    """What was understood of the images and labels."""
    understood = part(run["resolved"], "understood")
    rows = [(name, count) for name, count in part(understood, "classes").items() if is_number(count)]
    return {
        "line": str(understood.get("line", "")),
        "classes": rows[:MOST_CLASSES],
        "most": max([count for _, count in rows], default=1) or 1,
        "left_out": max(0, len(rows) - MOST_CLASSES),
        "notes": texts(understood, "notes"),
        "bad": run["bad"][:MOST_BAD],
        "num_bad": len(run["bad"]),
    }


def setup(run: Facts) -> Facts:
    """How it was run: reasons, equations, machine, versions, times, the recipe, the command."""
    resolved, model = run["resolved"], run["model"]
    rows = [(name, str(resolved[name])) for name in MACHINE if resolved.get(name) is not None]
    versions = part(resolved, "versions").items()
    seconds = [(name, value) for name, value in part(run["status"], "seconds").items() if is_number(value)]
    rows += [("versions", ", ".join(f"{name} {value}" for name, value in versions))] if versions else []
    rows += [("time", ", ".join(f"{name} {duration(value)}" for name, value in seconds))] if seconds else []
    if model.get("encoder"):
        rows.append(("network", f"{model['encoder']}, {model.get('size')} pixels, in model/"))
    return {
        "why": texts(resolved, "why"),
        "equations": texts(resolved, "equations"),
        "rows": rows,
        "recipe": [(name, str(value)) for name, value in flat(part(resolved, "recipe")).items()][:150],
        "command": str(resolved.get("command") or ""),
    }


def texts(facts: Facts, name: str) -> list[str]:
    """A list of texts in facts, at most MOST_LINES of them; [] if it is not there."""
    found = facts.get(name)
    return [str(line) for line in found[:MOST_LINES]] if isinstance(found, list) else []


def commands(run: str, results: Facts) -> list[tuple[str, str]]:
    """What to do next: why, and the command."""
    folder = shlex.quote(run)
    if results.get("final") == "pretrain" and results["labels_used"]:
        return [("Teach it the classes", f"fewlabels fit --out {folder}")]
    if results.get("final") == "pretrain":
        return [
            ("Find out which images to label", f"fewlabels suggest {folder} -n 20 --out next.csv"),
            ("Teach it their classes", f"fewlabels fit --out {folder} --labels next.csv"),
        ]
    return [
        ("Label new images", f"fewlabels predict {folder} NEW_IMAGES --out predictions.csv"),
        ("Measure it on labeled images of yours", f"fewlabels evaluate {folder} LABELED_IMAGES"),
        ("Take it elsewhere", f"fewlabels export {folder} --format onnx"),
    ]


# --- small things ------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """0.881 -> "88.1 %"."""
    return f"{100 * share:.1f} %"


def _range(row: Facts) -> str:
    if row.get("low") is None or row.get("high") is None:
        return ""
    return f"{100 * row['low']:.1f} to {percent(row['high'])}"
