"""The command-line face: one command, one function; what it may be told is its dataclass in commands.py.

torch is imported only by the commands that need it, after the options were read, so that help and usage errors are
immediate. stdout carries the result (--json for machines), stderr everything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

import fewlabels
from fewlabels import config, errors
from fewlabels.commands import Demo, Evaluate, Export, Fit, Import, Predict, Report, Suggest, Use
from fewlabels.errors import CannotCreate, DataError, FewlabelsError, StorageError, UsageError, nearest, printable, tell

FIXES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EIO), "free some space, run the same command again")
FIXES |= dict.fromkeys(errors.CLOSED, "give another path, or give yourself the right to use it")


# --- what the commands do ------------------------------------------------------------------------------------


def _asked(command: Fit, until: str) -> Any:
    from fewlabels import asked

    names = [item.name for item in dataclasses.fields(command) if item.name not in ("options", "json")]
    overrides = {
        name: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
        for name, value in dataclasses.asdict(command.options).items()
    }
    overrides = {name: value for name, value in overrides.items() if value not in (None, {})}
    return asked.on_command_line(**{name: getattr(command, name) for name in names}, until=until, overrides=overrides)


def _fit(command: Fit, until: str = "distill") -> None:
    from fewlabels import pipeline

    _tell(pipeline.run(_asked(command, until)), as_json=command.json)


def _demo(command: Demo) -> None:
    from fewlabels import asked, pipeline

    wishes = asked.on_command_line(
        images="digits", out=command.out, recipe="digits", student=command.student, seed=command.seed, keep_labels="20"
    )
    _tell(pipeline.run(wishes), as_json=command.json)


def _tell(run: Any, *, as_json: bool) -> None:
    from fewlabels import runtime
    from fewlabels.use import evaluate, report

    if not runtime.is_main():
        return
    results = run.metrics
    if as_json:
        print(json.dumps({"run": str(run.path), **results}))
        return
    for row in results["rows"]:
        told = (
            f"not measured: {row['note'] or 'no held-out images'}"
            if row["accuracy"] is None
            else evaluate.percent({"accuracy": row["accuracy"], "interval": (row["low"], row["high"]), "n": row["n"]})
        )
        _say(f"{row['name']:<46} {told}" + ("  cross-validated" if row["cross_validated"] else ""))
    if results["rows"] and results["held_out"] is None:
        print("to measure all of it: give labeled images that no stage sees, with --test or the CSV's column split")
    _say(*filter(None, [report.methods(results)["verdict"]]), f"report: {run.path / 'report.html'}")


def _say(*lines: str) -> None:
    """The result for a person, on stdout; names in it move no cursor."""
    print("\n".join(map(printable, lines)))


def _check(command: Fit) -> None:
    from fewlabels import pipeline, runtime

    found = pipeline.check(_asked(command, "distill"))
    if runtime.is_main():
        _say(*([json.dumps(found)] if command.json else found["lines"]))


def _model(command: Use) -> Any:
    """The model of a command that uses one; that its run has not ended is told."""
    from fewlabels.use import facts, predict

    model = predict.load(command.run, balanced=command.balanced)
    if facts.values(Path(command.run) / "status.json").get("state", "finished") != "finished":
        tell(f"note: {printable(command.run)} is not trained to the end; this is the last model it made")
    return model


def _evaluate(command: Evaluate) -> None:
    from fewlabels.use import evaluate

    model = _model(command)
    measured = evaluate.evaluate_run(model, command.images, command.labels)
    print(json.dumps(measured) if command.json else evaluate.format_table(measured))


def _predict(command: Predict) -> None:
    from fewlabels.use import predict

    if not command.images:
        raise UsageError("no images were given", fix=f"fewlabels predict {command.run} IMAGES")
    images = command.images[0] if len(command.images) == 1 else list(command.images)
    out = "/dev/stdout" if command.out == "-" else command.out
    model = _model(command)
    summary = predict.write_predictions(model, images, out)
    words = f"{summary['predicted']:,} images predicted, {summary['unreadable']:,} unreadable: {out}"
    (tell if _is_stdout(out) else _say)(json.dumps(summary) if command.json else words)
    if not summary["predicted"]:
        raise DataError(
            f"none of the {summary['images']:,} images could be read",
            why=f"the last column of {out} says why of each",
            fix="give pictures",
        )


def _is_stdout(out: str) -> bool:
    """Whether a file is where our output goes, so that nothing else may be written there."""
    with contextlib.suppress(OSError, ValueError):
        return os.path.samestat(os.stat(out), os.fstat(sys.stdout.fileno()))  # noqa: PTH116
    return False


def _export(command: Export) -> None:
    from fewlabels.use import export

    model, run = _model(command), Path(command.run)
    is_model = model.path == run  # `fit` and `import` replace such a folder as a whole
    beside = run.resolve().with_name(f"{run.resolve().name}-export") if is_model else run / "export"
    _say(str(export.export(model, Path(command.out or beside), format=command.format)))


def _report(command: Report) -> None:
    from fewlabels.use import report

    _say(str(report.write(Path(command.run))))


def _suggest(command: Suggest) -> None:
    from fewlabels import checkpoint
    from fewlabels.use import suggest

    out = Path(command.out) if command.out else None
    if out and out.exists():
        raise CannotCreate(f"{out} is there already", why="it may hold labels", fix="give another --out")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    found = suggest.suggest(Path(command.run), command.count, device=command.device)
    if out:
        checkpoint.write_text(out, "\ufeff" + found.table(out.parent))  # by its mark Excel knows UTF-8
    if command.json:
        print(json.dumps({"images": found.images, "out": command.out}))
    elif out:
        _say(f"{len(found.rows):,} images to label: fill in the empty labels of {out}, then give it to fit --labels")
    else:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # it is read as such when it comes back
        print(found.table(), end="")


def _import(command: Import) -> None:
    from fewlabels.use import imported

    done = imported.import_reference(
        command.checkpoint, command.out, ema=command.ema, tap=command.tap, classes=command.classes
    )
    _say(*([json.dumps(imported.facts(*done))] if command.json else imported.told(*done)))


COMMANDS: dict[str, tuple[type, Callable[[Any], None], str]] = {
    "demo": (Demo, _demo, "the whole method on digits in about two minutes"),
    "fit": (Fit, _fit, "images and a few labels -> model, predictions, report"),
    "check": (Fit, _check, "what was understood, what is wrong, what it will cost; changes nothing"),
    "pretrain": (Fit, lambda c: _fit(c, "pretrain"), "stage 1 alone: a big encoder from unlabeled images"),
    "finetune": (Fit, lambda c: _fit(c, "finetune"), "up to stage 2: the few labels"),
    "distill": (Fit, lambda c: _fit(c, "distill"), "up to stage 3: into itself or a small student"),
    "evaluate": (Evaluate, _evaluate, "accuracy with interval, per class, confusion, calibration"),
    "predict": (Predict, _predict, "class and probabilities of new images, as CSV"),
    "suggest": (Suggest, _suggest, "which images to label next, as a labels CSV to fill in"),
    "export": (Export, _export, "an ONNX or torch.export program"),
    "import": (Import, _import, "a published TensorFlow checkpoint as a model folder"),
    "report": (Report, _report, "write report.html again"),
}


def _overview() -> str:
    lines = [
        "fewlabels turns many unlabeled images and a few labels into an accurate, compact classifier.",
        "",
        "usage: fewlabels COMMAND ...          fewlabels COMMAND --help",
        "",
        *(f"  {name:<10} {about}" for name, (_, _, about) in COMMANDS.items()),
        "",
        "first: fewlabels demo      then: fewlabels fit PHOTOS --labels labels.csv --out run",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (docs/reference.md)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))  # noqa: PTH123, SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a class may be called what the terminal has no letters for
    code = _code(list(sys.argv[1:] if arguments is None else arguments))
    _drop_unwritten()
    if code and (runtime := sys.modules.get("fewlabels.runtime")):
        runtime.leave(code)
    return code


def _code(words: list[str]) -> int:
    """The exit code of a command, whose errors are told."""
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except FewlabelsError as error:
        return _complain(error)
    except KeyboardInterrupt:
        tell("stopped")
        return 130
    except BrokenPipeError:  # `fewlabels ... | head` closed our output: that is all right
        return 0
    except OSError as error:
        if error.errno in FIXES:
            return _complain(StorageError(f"{error.filename or 'the disk'}: {error.strerror}", fix=FIXES[error.errno]))
        return _bug()
    except Exception:
        return _bug()


def _drop_unwritten() -> None:
    """What a stream did not take Python would try to write again at the end, and end with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"fewlabels {fewlabels.__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise UsageError(
            f'there is no command "{words[0]}"{nearest(words[0], COMMANDS)}', fix=f"use one of {', '.join(COMMANDS)}"
        )
    kind, function, about = COMMANDS[words[0]]
    about = f"{about[0].upper()}{about[1:]}."
    spoken = io.StringIO()  # tyro repeats our words, which may not be printable
    try:
        with contextlib.redirect_stderr(spoken):
            command: Any = tyro.cli(kind, args=_spelled_out(words[1:]), prog=f"fewlabels {words[0]}", description=about)
    except SystemExit as stop:  # tyro has spoken: help (0) or a usage error (2)
        words_only = re.sub(r"\x1b\[[0-9;]*m", "", spoken.getvalue())  # it colours them where stdout is a terminal
        tell(*map(printable, words_only.split("\n")), end="")
        return int(stop.code or 0)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read by torch when it is imported
    function(command)
    if "torch" in sys.modules:
        from fewlabels import runtime

        runtime.finish()
    return 0


def _spelled_out(words: list[str]) -> list[str]:
    """--recompute as --recompute True, --no-recompute as --recompute False: tyro wants a value for what may be None."""
    defaults = config.flat(dataclasses.asdict(config.Recipe()))
    flags = {f"--{name}".replace("_", "-") for name, value in defaults.items() if isinstance(value, bool)}
    told = []
    for word, following in zip(words, [*words, ""][1:], strict=True):
        plain = word.replace("_", "-")
        if plain.removeprefix("--no-") != plain and f"--{plain[5:]}" in flags:
            told += [f"--{plain[5:]}", "False"]
        elif plain in flags and following not in ("True", "False", "None"):
            told += [word, "True"]
        else:
            told.append(word)
    return told


def _complain(error: FewlabelsError) -> int:
    """Tell the error once: by the rank that met it first, or by rank 0 where the ranks had not met yet."""
    notes = getattr(error, "__notes__", [])
    if notes or (os.environ.get("RANK", "0") == "0" and not isinstance(error, errors.RankFailed)):
        tell(f"\nerror: {error.text()}", *notes)
    return error.exit_code


def _bug() -> int:
    tell(
        *map(printable, traceback.format_exc().split("\n")),
        f"\nerror: this is a bug in fewlabels {fewlabels.__version__}, not your mistake",
        "fix: report it with the lines above; what was saved is unharmed, the same command goes on from there",
    )
    return 1
