"""The report: what it says is true, hostile names stay text, missing and broken pieces do not stop it."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewlabels import plan
from fewlabels.errors import DataError, MissingInput
from fewlabels.use import evaluate, facts, figures, report
from fewlabels.use.facts import clean
from sample_run import CLASSES, make_run

LINKS = {"src", "href", "xlink:href", "action", "formaction", "data", "poster", "background", "srcset", "srcdoc"}
FORBIDDEN = {
    "script",
    "iframe",
    "object",
    "embed",
    "form",
    "link",
    "base",
    "foreignobject",
    "audio",
    "video",
    "template",
}
VOID = {"meta", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """What a browser would make of the page: elements, attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.faults: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag in FORBIDDEN:
            self.faults.append(f"<{tag}>")
        for name, value in attributes:
            if name.startswith("on"):
                self.faults.append(f"{name} on <{tag}>")
            if name in LINKS:
                self.links.append(value or "")
            if name == "style" and re.search(
                r"url\s*\(\s*['\"]?(?!#)|expression|@import|javascript", value or "", re.I
            ):
                self.faults.append(f"style {value}")
            if "javascript:" in re.sub(r"\s", "", (value or "").lower()) and name in LINKS:
                self.faults.append(f"{name}={value}")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes another element")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        """All text of the page, with single spaces."""
        return " ".join(" ".join(self.words).split())


def page_of(run: Path) -> Page:
    """The page as parsed; it must be sound, and link to nothing but itself."""
    page = Page(report.write(run).read_text(encoding="utf-8"))
    assert page.faults == []
    assert page.open == []
    assert all(link.startswith(("#", "data:image/png;base64,", "data:image/jpeg;base64,")) for link in page.links)
    return page


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("sample") / "run")


@pytest.fixture
def run(sample: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(sample, tmp_path / "run"))


def change(path: Path, **facts: Any) -> None:
    """Overwrite facts of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | facts), encoding="utf-8")


# --- what it says ---


def test_it_says_what_was_measured(run: Path) -> None:
    page = page_of(run)
    measured = json.loads((run / "results.json").read_text())["measurement"]
    low, high = measured["top1"]["interval"]
    assert f"Your model gets {100 * measured['top1']['accuracy']:.1f} % of 120 held-out images right" in page.text
    assert f"{100 * low:.1f} to {100 * high:.1f} % with 95 % confidence, from 20 labels and 1,200 images" in page.text
    for words in (
        "same network, labels alone", "logistic regression on pixels", "most frequent class", "distilled student",
        "Tap 1 is 3.5 points better than the head's input", "peak lr 1.6 = 0.1 x sqrt(256)", "3 duplicates",
        "2 training images are also held out", "pretrain 1 min 01 s", "torch 2.15.0", "2.8 MB", "3.1 ms",
        "fewlabels fit photos --labels labels.csv --out run", "red square", "CPU, 2 threads",
        f"On average the model is {100 * measured['ece']:.1f} % off",
    ):  # fmt: skip
        assert words in page.text, words
    for row, name in zip(measured["confusion"], CLASSES, strict=True):
        assert f"{name} {' '.join(map(str, row))}" in page.text


def test_every_stage_has_its_words() -> None:
    assert report.STAGES.keys() == set(plan.TRAINED)


def test_it_is_one_small_file_that_needs_no_network(run: Path) -> None:
    page = page_of(run)
    text = (run / "report.html").read_text()
    assert len(text) < 3_000_000
    assert "http://" not in re.sub(r'xmlns(:xlink)?="http://www.w3.org/[^"]*"', "", text)
    assert "https://" not in text
    assert "content=\"default-src 'none'; img-src data:;" in text
    assert page.tags.count("svg") == 4
    assert page.tags.count("img") > 3
    assert [p.name for p in run.glob(".*tmp*")] == []


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    assert report.write(run).read_bytes() == report.write(run).read_bytes()


def test_mistakes_are_the_surest_ones_with_their_pictures(run: Path) -> None:
    arrays = np.load(run / "evaluation.npz")
    shares, labels = arrays["probabilities"], arrays["labels"]
    wrong = [(-row.max(), CLASSES[label], CLASSES[row.argmax()]) for row, label in zip(shares, labels, strict=True)
             if row.argmax() != label]  # fmt: skip
    confidence, truth, guess = sorted(wrong)[0]
    shown = report.mistakes(report.read(run))
    first = {name: shown[0][name] for name in ("true", "predicted")}
    assert first == {"true": truth, "predicted": guess}
    assert shown[0]["confidence"] == pytest.approx(-confidence)
    assert len(shown) == min(len(wrong), 18)
    assert f"{truth} , not {guess} {-100 * confidence:.1f} % sure" in page_of(run).text


def test_the_remark_is_honest_when_a_baseline_wins(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())

    def verdict(final: float, baseline: float, n: int) -> str:
        rows = []
        for key, accuracy in (("most_frequent", 0.1), ("tap1_logistic", baseline), ("distill", final)):
            low, high = evaluate.wilson_interval(round(accuracy * n), n)
            numbers = {"accuracy": accuracy, "low": low, "high": high, "n": n}
            rows.append({"key": key, "name": key, "cross_validated": False, **numbers})
        return str(report.methods(results | {"rows": rows})["verdict"])

    wins = verdict(0.9, 0.8, 1000)
    assert "10.0 points better than the best cheap baseline" in wins and "do not touch" in wins
    assert "overlap, so part of it may be chance" in verdict(0.82, 0.8, 100)
    assert "only as good as a cheap baseline" in verdict(0.8, 0.8, 100)
    close = verdict(0.8, 0.82, 100)
    assert 'A cheap baseline wins: "tap1_logistic" (82.0 %) is 2.0 points better' in close and "may be chance" in close
    assert "use the baseline, or train longer" in verdict(0.7, 0.9, 1000)
    for apart, says in (
        (0.0, "only as good as"),
        (0.17, 'A cheap baseline wins: "pixels" (95.0 %) is 17.0 points better'),
    ):
        rows = [
            {"key": key, "name": name, "accuracy": share, "low": share, "high": share, "cross_validated": True, "n": 99}
            for key, name, share in (("pixels_logistic", "pixels", 0.95), ("tap0_logistic", "tap 0", 0.95 - apart))
        ]
        rows.append({**rows[0], "key": "distill", "accuracy": None, "low": None, "high": None, "n": 0})
        assert says in (told := str(report.methods(results | {"rows": rows})["verdict"])), "nothing is held out"
    assert "than logistic regression on its features (tap 0)" in told
    low, high = evaluate.wilson_interval(96, 120)
    results["rows"].append(
        {"key": "tap4_logistic", "name": "the winner", "accuracy": 1.0, "low": low, "high": high, "n": 120}
    )
    (run / "results.json").write_text(json.dumps(results))
    assert 'A cheap baseline wins: "the winner" (100.0 %)' in page_of(run).text


# --- missing pieces ---


def test_without_held_out_images_it_says_so(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    for row in results["rows"]:
        if row["key"].endswith("logistic"):
            row["cross_validated"] = True
        else:
            row |= {"accuracy": None, "low": None, "high": None, "ece": None, "n": 0}
    change(run / "results.json", rows=results["rows"], held_out=None, measurement=None)
    np.savez(
        run / "evaluation.npz", ids=np.zeros(0, int), labels=np.zeros(0, int), probabilities=np.zeros((0, 4)),
        map=np.random.default_rng(0).normal(size=(20, 2)), map_labels=np.full(20, -1),
    )  # fmt: skip
    text = page_of(run).text
    assert "About 81.5 % right, judged on its own labels" in text
    better = next(row for row in results["rows"] if row["key"] == "tap2_logistic")
    better |= {"accuracy": 0.9, "low": 0.85, "high": 0.93}  # chosen after looking, it would be the verdict
    change(run / "results.json", rows=results["rows"])
    text = page_of(run).text
    assert "About 81.5 % right, judged on its own labels" in text
    assert "Logistic regression on its features (tap 1) is 5.5 points better" in text
    for row in results["rows"]:
        if row["key"].startswith("tap"):
            row |= {"accuracy": None, "low": None, "high": None, "n": 0, "note": "they have learned these labels"}
    verdict = report.methods({**results, "tap": 1})["verdict"]
    assert verdict == "Its features are not measured: they have learned these labels. Held-out images can measure them."
    assert "There are no held-out images, so the model itself could not be judged" in text
    assert "not measured" in text
    assert "surest mistakes" not in text


def test_few_and_validation_images_are_remarked_on(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    rows = [row | {"n": 12} for row in results["rows"]]
    change(run / "results.json", rows=rows, held_out={"n": 12, "split": "val"})
    text = page_of(run).text
    assert "These are the validation images" in text
    assert "12 images are few" in text


def test_an_unfinished_run_says_which_stage_is_missing(run: Path) -> None:
    for name in ("results.json", "evaluation.npz"):
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["stage"] == "pretrain"] + lines[120:125]
    (run / "metrics.jsonl").write_text("".join(kept) + '{"stage": "finetune", "st')
    change(run / "status.json", state="stopped", reason="stopped by Ctrl-C")
    text = page_of(run).text
    assert "This run has no results yet" in text
    assert "not finished (state: stopped). stopped by Ctrl-C" in text
    assert "fine-tuning is at step 20 of 60" in text and "distilling has not begun" in text
    assert "pretraining is" not in text and "pretraining has" not in text
    assert "How it learned" in text


def test_results_of_before_are_called_so_while_it_is_trained_anew(run: Path) -> None:
    """After `rm -rf RUN/finetune ...`, whose new training was stopped."""
    title = report.headline(facts.read(run))["title"]
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["stage"] == "pretrain"))
    assert "Not trained to the end" not in page_of(run).text, "nothing of the new training has begun"
    change(run / "status.json", state="stopped", reason="stopped by Ctrl-C")
    assert f"Not trained to the end; so far: {title}" in page_of(run).text


def test_a_run_without_labels_is_not_called_unfinished(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    results |= {"rows": [], "measurement": None, "held_out": None, "labels_used": 0, "final": "pretrain"}
    (run / "results.json").write_text(json.dumps(results))
    text = page_of(run).text
    assert "Pretrained on 1,200 images, no labels yet" in text
    assert "not finished" not in text


@pytest.mark.parametrize("kept", ["resolved.json", "status.json", "results.json"])
def test_any_one_file_is_enough(run: Path, kept: str) -> None:
    for path in run.iterdir():
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page_of(run)


def test_a_run_that_only_pretrained_may_lack_its_results(run: Path) -> None:
    """Its map has images, and none of them a class."""
    with np.load(run / "evaluation.npz") as file:
        arrays = {name: file[name] for name in file}
    arrays |= {"probabilities": arrays["probabilities"][:0, :0], "map_labels": arrays["map_labels"] * 0 - 1}
    np.savez(run / "evaluation.npz", **(arrays | {"labels": arrays["labels"] * 0 - 1}))
    (run / "results.json").write_text("{")
    assert "This run has no results yet" in page_of(run).text


@pytest.mark.parametrize(
    "junk", [b"", b"[7]", b"\xff\xfe\x00junk\n" + b"[" * 100_000, b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"]
)
@pytest.mark.parametrize("name", ["resolved.json", "status.json", "metrics.jsonl", "evaluation.npz", "bad_images.csv"])
def test_broken_files_are_left_out(run: Path, name: str, junk: bytes) -> None:
    (run / name).write_bytes(junk)
    page_of(run)


def test_strange_kinds_in_known_places_do_not_stop_it(run: Path) -> None:
    (run / "resolved.json").write_text(
        '{"format_version": 1, "understood": [1], "recipe": 3, "versions": "x", "equations": "no", "why": {"a": 1}, '
        '"seed": [1]}'
    )
    (run / "status.json").write_text('{"state": 3, "seconds": {"pretrain": "long"}, "reason": null}')
    (run / "metrics.jsonl").write_text('{"stage":"pretrain","step":1,"total_steps":9,"loss":"x"}\n7\n{"stage":1}\n' * 3)
    page_of(run)


def test_arrays_that_do_not_fit_and_a_missing_store_are_left_out(run: Path) -> None:
    shutil.rmtree(run / "data")
    assert "no picture" in page_of(run).text
    arrays = dict(np.load(run / "evaluation.npz"))
    for name, value in (("labels", np.full(120, 99)), ("probabilities", np.zeros((120, 3))), ("map", np.zeros((3, 3)))):
        np.savez(run / "evaluation.npz", **(arrays | {name: value}))
        assert "surest mistakes" not in page_of(run).text
    np.savez(run / "evaluation.npz", **(arrays | {"ids": np.array([{"a": 1}] * 120, dtype=object)}))
    assert "surest mistakes" not in page_of(run).text


def test_no_run_folder_is_a_clear_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(MissingInput, match="is not a run folder"):
            report.write(folder)


@pytest.mark.parametrize("name", ["results.json", "resolved.json"])
@pytest.mark.parametrize("version", [None, 0, 2, "1", True])
def test_files_of_no_format_that_is_known_are_refused_in_words(run: Path, name: str, version: object) -> None:
    change(run / name, format_version=version)
    with pytest.raises(DataError, match=rf"{name} (is in|says) file format {version!r}") as refusal:
        report.write(run)
    assert "fix:" in str(refusal.value)


def test_a_thousand_classes_stay_a_small_page(tmp_path: Path) -> None:
    names = tuple(f"class number {i}" for i in range(1000))
    run = make_run(tmp_path / "run", count=1500, classes=names, skill=4.0)
    page = page_of(run)
    assert (run / "report.html").stat().st_size < 3_000_000
    assert "940 better classes are not shown" in page.text


# --- injection ---

PAYLOADS = [
    "<script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</svg><script>alert(1)</script>",
    "</text></g></svg><img src=x onerror=alert(1)>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)' autofocus='",
    "javascript:alert(1)",
    "<a href=javascript:alert(1)>x</a>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<base href=//evil.example>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "--><script>alert(1)</script><!--",
    "]]><script>alert(1)</script>",
    "<![CDATA[<script>alert(1)</script>]]>",
    "{{ 7919 * 7907 }}{% for x in (1,) %}{% endfor %}",
    "{{ self.__init__.__globals__ }}",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "<style>*{background:url(//evil.example)}</style>",
    "red;background:url(//evil.example)",
    "<object data=//evil.example></object>",
    "<form action=//evil.example><input name=x></form>",
    r"$\frac{1}{0}$ $x^2$ \undefined{",
    "\x00<scr\x00ipt>alert(1)</scr\x00ipt>",
    "\u202egnp.exe\u2066<b>\u2028</b>",
    "\ud800<script>",
    "<math><mtext></math><script>alert(1)</script>",
    "${7919*7907} #{7919*7907} <%= 7919*7907 %>",
]


def test_there_are_many_payloads() -> None:
    assert len(set(PAYLOADS)) >= 20


def _shown(payload: str) -> str:
    """What a person should read: the payload as it is, but for what clean() drops, with single spaces."""
    return " ".join(str(clean(payload)).split())


@pytest.mark.parametrize("payload", PAYLOADS)
def test_names_and_facts_stay_text_wherever_they_come_from(run: Path, payload: str) -> None:
    results = json.loads((run / "results.json").read_text())
    classes = [payload, *CLASSES[1:]]
    for row, name in zip(results["measurement"]["per_class"], classes, strict=True):
        row["name"] = name
    results["rows"][1] |= {"name": payload, "note": payload}
    results |= {"classes": classes, "rows": results["rows"]}
    results["measurement"]["classes"] = classes
    (run / "results.json").write_text(json.dumps(results))
    resolved = json.loads((run / "resolved.json").read_text())
    resolved |= {"command": payload, "equations": [payload], "why": [payload], "device": payload, "seed": payload}
    resolved |= {"versions": {payload: payload}, "recipe": {payload: {payload: payload}}}
    resolved["understood"] |= {"line": payload, "notes": [payload], "classes": {payload: 5, "b": 15}}
    (run / "resolved.json").write_text(json.dumps(resolved))
    change(run / "status.json", state=payload, reason=payload, seconds={payload: 3.0})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            "".join(json.dumps({"stage": payload, "step": i, "total_steps": 3, "loss": 1.0}) + "\n" for i in (1, 2))
        )
    with (run / "bad_images.csv").open("w", newline="", errors="replace") as file:
        csv.writer(file).writerows([["image", "reason"], [payload.replace("\0", ""), payload.replace("\0", "")]])
    (run / "model").mkdir()
    (run / "model" / "model.json").write_text(json.dumps({"encoder": payload, "size": payload}))
    evil = run.with_name(re.sub(r"[/\0]|[\ud800-\udfff]", "_", payload)[:80])
    run.rename(evil)

    page = page_of(evil)
    raw = (evil / "report.html").read_text(encoding="utf-8")
    assert page.text.count(_shown(payload)) >= 8
    if "<" in _shown(payload):
        assert _shown(payload) not in raw
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", raw)
    assert str(7919 * 7907) not in raw  # nothing was evaluated


@pytest.mark.parametrize("payload", PAYLOADS)
def test_figures_show_names_as_text(payload: str) -> None:
    name = clean(payload)
    svg = figures.feature_map(np.eye(3)[:, :2], np.array([0, 1, 1]), [name, "b"])
    page = Page(f"<div>{svg}</div>")
    assert page.faults == []
    shown = name if len(name) <= 26 else name[:23] + "..."
    assert " ".join(shown.split()) in page.text
    assert set(page.tags) <= {"div", "svg", "g", "defs", "path", "use", "text", "clippath", "rect", "image"}


def test_figures_of_one_page_do_not_share_ids(run: Path) -> None:
    report.write(run)
    ids = re.findall(r'\bid="([^"]+)"', (run / "report.html").read_text())
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', (run / "report.html").read_text())
    assert set(used) <= set(ids)


def test_a_browser_draws_it_without_an_error(run: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *quiet, "--dump-dom",
         "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", report.write(run).resolve().as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "held-out images right" in done.stdout
    assert "CONSOLE" not in done.stderr  # what the page's own policy refuses is said there


def test_a_word_in_place_of_a_number_is_said_to_be_so(run: Path) -> None:
    change(run / "results.json", labels_used="abc")
    with pytest.raises(DataError, match="not what it should be"):
        report.write(run)


@pytest.mark.parametrize("name", ["rows", "classes", "final", "labels_used", "images_used"])
def test_damaged_results_are_said_to_be_so(run: Path, name: str) -> None:
    file = run / "results.json"
    file.write_text(file.read_text().replace(f'"{name}"', f'"x{name}"'))
    with pytest.raises(DataError, match="not what it should be"):
        report.write(run)


def test_a_run_from_a_model_does_not_wait_for_pretraining(run: Path) -> None:
    change(run / "resolved.json", derived={"finetune": {}, "distill": {}})
    change(run / "status.json", state="stopped")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [json.dumps(line) + "\n" for line in lines if line["stage"] == "finetune"]
    (run / "metrics.jsonl").write_text("".join(kept))
    assert report.progress(facts.read(run))["missing"] == ["distilling has not begun"]
