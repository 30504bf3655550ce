"""Every command and Python block of the README and the docs runs, in the order in which a reader would type them."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tensorbundle_writer as writer
from conftest import shapes_images
from fewlabels import cli, plan
from model.test_reference import variables

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "docs/tutorial.md", "docs/how-to.md"]
LINKED = ["reference", "method", "results", "older-results", "scaling", "performance", "LOG"]
SYNSETS = [f"n{k:08d}" for k in range(4)]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages speak of: photos, also packed, a labels CSV, new pictures, published checkpoints."""
    images, classes = shapes_images(40, size=16)
    for folder in ("photos", "new-photos", "folder"):
        (tmp_path / folder).mkdir()
    lines = ["image,label"]
    for i, (image, label) in enumerate(zip(images, classes, strict=True)):
        name = f"photos/{i:02d}.png" if i < 32 else f"{('new-photos', 'folder')[i % 2]}/{i}.png"
        Image.fromarray(image).save(tmp_path / name)
        lines.append(f"{name},class {label}" if i < 12 else f"{name},")
    (tmp_path / "labels.csv").write_text(
        "\n".join(line for line in lines if "new" not in line and "folder" not in line)
    )
    (tmp_path / "shards").mkdir()
    for number in (0, 1):
        with tarfile.open(tmp_path / f"shards/photos-00{number}.tar", "w") as archive:
            for i in range(16 * number, 16 * number + 16):
                archive.add(tmp_path / f"photos/{i:02d}.png", f"{i:02d}.png")
    Image.fromarray(images[0]).save(tmp_path / "new.jpg")
    (tmp_path / "1percent.txt").write_text("\n".join(f"{synset}_7.JPEG" for synset in SYNSETS))
    arrays = variables(classes=4) | {"global_step": np.int64(751)}
    for folder in ("r50_1x_sk0", "finetuned_1pct/r50_1x_sk0"):
        writer.write(tmp_path / folder / "model.ckpt-751", arrays)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "CPU_MINUTES", 0.1)  # `auto` takes seconds in place of up to an hour
    return tmp_path


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))])
def test_fences_begin_lines_and_are_balanced(page: str) -> None:
    """A block that was wrapped into a paragraph swallowed the next heading, and its commands ran nowhere."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    fences = [line for line in lines if "```" in line]
    assert [line for line in fences if not re.fullmatch(r"```\w*", line)] == []
    assert all(line == "```" for line in fences[1::2]) and len(fences) % 2 == 0


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(desk: Path, page: str) -> None:
    ran, scope = 0, {}
    if page == "docs/how-to.md":  # it goes on from the README's run
        assert cli.main(["fit", "photos/", "--labels", "labels.csv", "--out", "run"]) == 0
    for language, text in blocks(page):
        if language == "text":
            continue
        if language == "python":
            exec(compile(text, page, "exec"), scope)
            ran += 1
            continue
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["fewlabels"]:
                assert cli.main(words[1:]) == 0, line
                ran += 1
            elif words[:1] == ["make"]:
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
            else:
                assert not words or words[:2] == ["pip", "install"], f"{page}: nothing runs {line!r}"
    assert ran >= 4


def test_the_reference_is_made_from_the_code() -> None:
    spec = importlib.util.spec_from_file_location("reference_page", ROOT / "docs" / "reference.py")
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), "run: python docs/reference.py"


@pytest.mark.parametrize("page", [*PAGES, *(f"docs/{name}.md" for name in LINKED)])
def test_names_and_links_are_true(page: str) -> None:
    """Files that a page links to or names are there, and so are the functions beside them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link
    for file, names in re.findall(r"`((?:data|model|stages|use)/\w+\.py)(?:: ([\w., ]+))?", text):
        code = (ROOT / "src" / "fewlabels" / file).read_text(encoding="utf-8")
        for name in re.findall(r"\w+", names):
            assert re.search(rf"\b(def|class) {name}\b", code) or name in ("k", "x", "upto"), f"{file}: {name}"


@pytest.mark.parametrize("page", PAGES)
def test_inline_commands_and_options_exist(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    commands = set(re.findall(r"`fewlabels (\w+)", prose))
    assert commands <= set(cli.COMMANDS)
    helps = ""
    for command in cli.COMMANDS:
        assert cli.main([command, "--help"]) == 0
        helps += capsys.readouterr().out
    foreign = {"--nproc-per-node", "--max-restarts", "--seeds"}  # torchrun's, and the benchmark's
    for option in set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text)) - foreign:
        assert option in helps or option.replace("_", "-") in helps, option
