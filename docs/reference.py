"""docs/reference.md from the code: `python docs/reference.py` writes it, a test compares it with what is there.

Nothing in it is written twice: options come from the dataclasses, the rest from docstrings.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fewlabels as fl
from fewlabels import cli, commands, config, errors, recipes

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Reference

Made from the code by `python docs/reference.py`. How to do things is in [how-to.md](how-to.md), a first walk in
[tutorial.md](tutorial.md), the method in [method.md](method.md).
"""


def _cell(text: Any) -> str:
    """text in a cell of a table: one line, no bar."""
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|")


def _default(value: Any) -> str:
    if value in (None, "", dataclasses.MISSING):
        return ""
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value}`"


def _explained(module: Any) -> dict[tuple[str, str], str]:
    """The text under every field of every dataclass in a module's source, by (class, field)."""
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            for item, after in zip(node.body, node.body[1:], strict=False):
                if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr):
                    found[node.name, ast.unparse(item.target)] = ast.literal_eval(after.value)
    return found


def _commands() -> Iterator[str]:
    """Every command; those that take the same options have one table."""
    told, tables = _explained(commands), {}
    for name, (kind, _, about) in cli.COMMANDS.items():
        tables.setdefault(kind, []).append(f"* `fewlabels {name}`: {about}")
    for kind, lines in tables.items():
        yield "\n".join(lines) + "\n\n| option | default | |\n|---|---|---|"
        for item in sorted(dataclasses.fields(kind), key=lambda item: "Positional" not in str(item.type)):
            if item.name == "options":
                yield "| any value of the recipe, see below | as the recipe says | `--size 96 --pretrain.epochs 200` |"
                continue
            positional = "Positional" in str(item.type)
            option = f"`{item.name.upper()}`" if positional else f"`--{item.name.replace('_', '-')}`"
            option += "".join(f", `{short}`" for short in re.findall(r"aliases=\[['\"](-\w)['\"]\]", str(item.type)))
            about = next(told[k.__name__, item.name] for k in kind.__mro__ if (k.__name__, item.name) in told)
            yield f"| {option} | {_default(item.default)} | {_cell(about)} |"
        yield ""


def _values() -> Iterator[str]:
    """Every value of a recipe with what is allowed."""
    yield (
        '"Default" is what a recipe has that does not say it. Without `--recipe` it is `auto`, which says most of '
        "them by your images,\nlabels and machine: `RUN/recipe.toml` and `fewlabels check` show what came out."
    )
    for prefix, kind in [("", config.Recipe), *((f"{name}.", kind) for name, kind in config.SECTIONS.items())]:
        yield f"\n{(inspect.getdoc(kind) or '').splitlines()[0]}\n\n| value | default | |\n|---|---|---|"
        for item in dataclasses.fields(kind):
            if "about" in item.metadata:
                limits = "" if "choices" in item.metadata else config._allowed(item.metadata)
                about = item.metadata["about"] + (f" ({limits})" if limits else "")
                yield f"| `{prefix}{item.name}` | {_default(item.default)} | {_cell(about)} |"


def _recipes() -> Iterator[str]:
    for name, recipe in recipes.RECIPES.items():
        if not name.startswith("paper_"):
            yield f"* `{name}`: {_cell(inspect.getdoc(recipe))}"
    paper = [name for name in recipes.RECIPES if name.startswith("paper_")]
    yield f"* {', '.join(f'`{name}`' for name in paper)}: {_cell(inspect.getdoc(recipes.paper_imagenet))}"


def _exit_codes() -> Iterator[str]:
    yield "| code | Python | |\n|---|---|---|\n| 0 | | done |\n| 1 | any other exception | a bug of ours |"
    for kind in sorted(errors.FewlabelsError.__subclasses__(), key=lambda kind: kind.exit_code):
        if kind.exit_code > 1:
            yield f"| {kind.exit_code} | `{kind.__name__}` | {_cell(inspect.getdoc(kind))} |"
    yield f"| 75, 130, 143 | `Stopped` | {_cell(inspect.getdoc(errors.Stopped))} |"


def _signature(value: Any) -> str:
    # annotations are texts, and shown with quotes; defaults keep theirs
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(value))).removesuffix(" -> None")


def _python() -> Iterator[str]:
    """The promised names: signature and docstring, and those of their own public methods."""
    for name in fl._HOMES:
        value = getattr(fl, name)
        if inspect.ismodule(value):
            members = [(f"{name}.{part}", getattr(value, part)) for part in ("pretrain", "finetune", "evaluate")]
        else:
            public = vars(value) if inspect.isclass(value) and value not in (fl.LARS, fl.ProjectionHead) else {}
            methods = {part: method for part, method in public.items() if not part.startswith("_")}
            members = [(name, value)] + [
                (f"{name}.{part}", method.fget if isinstance(method, property) else method)
                for part, method in methods.items()
                if inspect.isfunction(method) or isinstance(method, property)
            ]
        for full, member in members:
            text = (inspect.getdoc(member) or "").strip()
            yield f"\n`fl.{full}{_signature(member)}`\n\n```text\n{text}\n```"


def page() -> str:
    """The whole page."""
    parts = {
        "Commands": _commands(), "Values of a recipe": _values(), "Recipes": _recipes(), "Exit codes": _exit_codes(),
        "Python": _python(),
    }  # fmt: skip
    return HEAD + "".join(f"\n## {title}\n\n" + "\n".join(lines).strip("\n") + "\n" for title, lines in parts.items())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
