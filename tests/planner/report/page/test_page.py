"""The page of an answer: every figure is there, nothing in an answer becomes markup, files are whole."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

import planner
from attention import AttentionConfig
from attention.errors import AttentionPlannerError, ConfigError
from planner.answers.read import Answer, read_answer
from planner.answers.verified import Verified
from planner.cli.main import app
from planner.files import write_whole
from planner.question.space import Space
from planner.report.page.answer import MAXIMUM_BYTES, page_of
from planner.report.page.html import Html, join, tag
from planner.report.text.snippet import snippet
from planner.report.text.times import seconds
from planner.units import format_bytes
from planner.workload import Workload

ROOT = Path(__file__).resolve().parents[4]
EVIL = "</script></style><img src=x onerror=hacked=1>\"'&<b>\u202e"


class Reader(HTMLParser):
    """What a page has: elements, ids, headings, and text but for style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in ("meta", "link", "br"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for one, attributes in self.elements if one == name]


@pytest.fixture(scope="module")
def pages(recommended, verified, tuned) -> dict[str, Reader]:
    answers = {"recommended": Answer(recommended, verified), "tuned": Answer(tuned)}
    return {name: Reader(page_of(answer)) for name, answer in answers.items()}


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"}, prog_name="planner")


# ---- what a page says


def test_a_recommendation_is_said_whole(recommended, verified, pages):
    page = pages["recommended"]
    found, text = recommended, page.text
    for figure in (
        format_bytes(found.memory.upper),
        format_bytes(found.budget),
        seconds(found.seconds),
        f"{found.quality.mass:.1%}",
        f"{found.workload.seq:,}",
        found.on,
        found.calibration,
        found.memory.confidence,
        found.command,
        *found.memory.notes,
        seconds(verified[0].seconds),
        format_bytes(verified[0].allocated),
        "oom: memory ran out",
    ):
        assert " ".join(figure.split()) in text
    for name, version in found.versions.items():
        assert f"{name} {version}" in text
    for pick in (*found.alternatives, *found.pareto):
        assert format_bytes(pick.upper) in text
        assert seconds(pick.seconds) in text
    assert all(step.after in text for step in found.why.steps)
    headings = [attributes["id"] for attributes in page.all("h2")]
    assert headings == [
        f"{key}-heading"
        for key in ("picks", "budget", "why", "pareto", "layout", "measured", "program", "provenance")
    ]


def test_the_budget_is_whole(recommended, pages):
    _, _, after = pages["recommended"].text.partition("Where the budget goes")
    shares = re.findall(r"[\d,.]+ [KMG]?B([\d.]+)%", after.partition("The peak is")[0])
    *parts, whole = map(float, shares)
    assert whole == 100.0
    assert sum(parts) == pytest.approx(100, abs=0.05 * len(parts))
    assert "reserved" in after


def test_what_tuning_found_is_said_whole(tuned, pages):
    text = pages["tuned"].text
    assert f"The fastest of {len(tuned.trials) - 1} that ran" in text
    for figure in (seconds(tuned.best.seconds), tuned.command, tuned.study, tuned.calibration):
        assert figure in text
    assert "1 did not run within the budget" in text
    assert "oom: memory ran out" in text
    assert len(re.findall(r"trial \d+, ", text)) == 2 * 7  # a title of each that ran, in both charts
    assert tuned.storage not in text


def test_launches_are_a_column_where_any_config_has_them(recommended, tuned):
    first, *others = tuned.trials
    counted = tuned.model_copy(update={"trials": (first.model_copy(update={"launches": 12_345}), *others)})
    some = [pick.model_copy(update={"launches": 54_321}) for pick in recommended.alternatives]
    of_picks = recommended.model_copy(update={"alternatives": tuple(some)})
    for answer, tables, figure in ((counted, 1, "12,345"), (of_picks, 2, "54,321")):
        text = Reader(page_of(Answer(answer))).text
        assert text.count("launches") == tables
        assert figure in text
    none = [pick.model_copy(update={"launches": None}) for pick in recommended.alternatives]
    nothing = recommended.model_copy(update={"alternatives": tuple(none), "pareto": ()})
    for answer in (tuned, nothing):
        assert "launches" not in Reader(page_of(Answer(answer))).text


def test_the_program_is_there_to_be_copied(recommended, pages):
    texts = "".join(pages["recommended"].texts)
    assert snippet(recommended.config, recommended.workload) in texts


@pytest.mark.parametrize("name", ["recommended", "tuned"])
def test_a_page_is_sound(name, pages):
    page = pages[name]
    assert not page.open
    assert page.all("html") == [{"lang": "en"}]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    ranks = [int(one[1]) for one, _ in page.elements if re.fullmatch("h[1-6]", one)]
    assert ranks[0] == 1
    assert set(ranks[1:]) == {2}
    links = {attributes["href"] for attributes in page.all("a")}
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert len(page.all("main")) == len(page.all("h1")) == 1
    labelled = {attributes["aria-labelledby"] for attributes in page.all("section")}
    assert labelled <= set(ids)


@pytest.mark.parametrize("name", ["recommended", "tuned"])
def test_a_page_needs_nothing_else(name, pages):
    page = pages[name]
    for _, attributes in page.elements:
        for where in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert (attributes.get(where) or "#")[0] == "#" or attributes[where] == "data:,"
        assert not any(given.startswith("on") or given == "style" for given in attributes)
    (policy,) = (each["content"] for each in page.all("meta") if "http-equiv" in each)
    assert policy.startswith("default-src 'none'; style-src 'sha256-")


@pytest.mark.parametrize("name", ["recommended", "tuned"])
def test_every_mark_of_a_chart_can_be_reached_and_says_what_it_is(name, pages):
    page = pages[name]
    marks = [each for each in page.all("g") if each.get("class") == "point"]
    assert len(marks) >= 6
    assert all(mark["tabindex"] == "0" and mark["role"] == "img" and mark["aria-label"] for mark in marks)
    charts = [each for each in page.all("svg") if "points" in (each.get("class") or "")]
    assert all(chart["aria-label"] for chart in charts)
    for svg in page.all("svg"):
        assert svg.get("aria-label") or svg.get("aria-hidden") == "true"
    assert page.all("table")
    assert len(page.all("details")) == 1


def test_the_same_answer_is_the_same_page(recommended):
    answer = Answer(recommended)
    assert page_of(answer) == page_of(answer)
    assert len(page_of(answer)) < 200_000


# ---- answers of every kind


@pytest.mark.parametrize(
    "asked",
    [
        {"variants": ("dense",)},
        {"variants": ("dilated",), "branches": (2,)},
        {"variants": ("adaptive",), "block_sizes": (64,)},
        {"patterns": ("dilated_sparse",), "variants": ("block_sparse",), "branches": (1,)},
    ],
    ids=lambda asked: asked["variants"][0],
)
def test_every_kind_of_attention_has_a_page(asked):
    found = planner.recommend(
        "500MB", 1000, space=Space(**asked), trials=0, gpu="cpu", layers=None, min_mass=None
    )
    page = Reader(page_of(Answer(found)))
    assert asked["variants"][0] in page.text
    if found.config.variant == "adaptive":
        assert "chosen at run time" in page.text.replace("chosenat", "chosen at")
    else:
        assert [each for each in page.all("svg") if each.get("class") == "matrix"]


def test_a_layout_that_is_too_long_for_a_picture_says_so(recommended):
    long = recommended.model_copy(update={"workload": Workload(seq=1 << 40)})
    assert "No picture: a layout is pictured over at most" in Reader(page_of(Answer(long))).text


# ---- hostile answers


def poisoned(value):
    """The same with hostile text wherever text may be anything."""
    if isinstance(value, dict):
        return {name: poisoned(one) for name, one in value.items()}
    if isinstance(value, list):
        return [poisoned(one) for one in value]
    return value + EVIL if isinstance(value, str) and value not in KNOWN else value


KNOWN = {
    "dense", "dilated", "block_sparse", "adaptive", "local_window", "global_local", "dilated_sparse", "auto",
    "refuse", "zero", "sdpa", "flex", "on", "off", "float16", "bfloat16", "float32", "float64", "inference",
    "training", "speed", "seq", "quality", "fastest", "balanced", "widest", "", "cpu", "ok", "oom",
    "block", "token",
}  # list of words  # fmt: skip


def test_nothing_that_an_answer_says_becomes_markup(recommended, verified, tuned, pages):
    ran = tuple(Verified(**poisoned(one.model_dump(mode="json"))) for one in verified)
    for name, answer in {
        "recommended": Answer(type(recommended)(**poisoned(recommended.model_dump(mode="json"))), ran),
        "tuned": Answer(type(tuned)(**poisoned(tuned.model_dump(mode="json")))),
    }.items():
        page = Reader(page_of(answer))
        assert page.text.count("<img src=x onerror=hacked=1>") > 5
        known = [(one, sorted(attributes)) for one, attributes in pages[name].elements]
        assert [(one, sorted(attributes)) for one, attributes in page.elements] == known


@pytest.mark.parametrize("figure", [0, -1, 10**18, 10**300])
def test_figures_that_cannot_be_are_shown_all_the_same(figure, recommended, tuned):
    def wrong(value):
        if isinstance(value, dict):
            return {
                name: wrong(one) if name not in ("config", "workload") else one for name, one in value.items()
            }
        if isinstance(value, list):
            return [wrong(one) for one in value]
        if type(value) is int and value != 1:
            return figure
        return float(figure) if type(value) is float else value

    for found in (recommended, tuned):
        data = wrong(found.model_dump(mode="json"))
        assert Reader(page_of(Answer(type(found)(**data)))).text


def test_a_page_that_nobody_could_open_is_refused(recommended):
    with pytest.raises(ConfigError, match="the page would take"):
        page_of(Answer(recommended.model_copy(update={"on": "x" * MAXIMUM_BYTES})))


# ---- markup


def test_markup_is_made_by_tags_and_all_else_is_escaped():
    assert tag("p", "a < b", tag("br"), 3, None, class_='x"y', hidden=True, data_name=None, id=False) == (
        '<p class="x&quot;y" hidden>a &lt; b<br>3</p>'
    )
    assert join(["<", Html("<br>"), "&"]) == "&lt;<br>&amp;"
    assert (
        tag("text", text_anchor="end", viewBox="0 0 1 1")
        == '<text text-anchor="end" viewBox="0 0 1 1"></text>'
    )


# ---- the command


def test_a_recommendation_becomes_a_file(recommended, verified, tmp_path):
    kept, out = tmp_path / "answer.json", tmp_path / "page.html"
    data = recommended.model_dump(mode="json") | {
        "verified": [one.model_dump(mode="json") for one in verified]
    }
    kept.write_text(json.dumps(data))
    out.write_text("what was there")
    result = run("report", str(kept), "--out", str(out))
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == f"planner: the report was written to {out}\n"
    assert out.read_text(encoding="utf-8") == page_of(Answer(recommended, verified))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer.json", "page.html"]


def test_what_tuning_printed_and_what_it_kept_have_the_same_page(tuned, tmp_path):
    kept, out, stored = tmp_path / "tuned.json", tmp_path / "a.html", tmp_path / "b.html"
    kept.write_text(tuned.to_json())
    assert run("report", str(kept), "--out", str(out)).exit_code == 0
    asked = ("--storage", tuned.storage, "--study", tuned.study)
    assert run("report", *asked, "--out", str(stored)).exit_code == 0
    assert out.read_text() == stored.read_text()


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("\xff", "is no JSON"),
        ("[]", "no recommendation and nothing that tuning found"),
        ("3", "no recommendation"),
        ('"best trials config pareto"', "no recommendation"),
        (AttentionConfig(variant="dense").to_json(), "no recommendation"),
        ('{"config": {}, "pareto": []}', "Recommendation: "),
        ('{"best": 1, "trials": 2}', "Tuned: "),
    ],
)
def test_a_file_of_something_else_is_refused(text, said, tmp_path):
    kept, out = tmp_path / "a.json", tmp_path / "a.html"
    kept.write_text(text, encoding="latin-1")
    result = run("report", str(kept), "--out", str(out))
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"planner: error: {kept}")
    assert said in line
    assert not out.exists()


@pytest.mark.parametrize("wrong", [3, [3], [{"role": 1}], {"a": 1}])
def test_measurements_that_are_none_are_refused(wrong, recommended, tmp_path):
    kept = tmp_path / "a.json"
    kept.write_text(json.dumps(recommended.model_dump(mode="json") | {"verified": wrong}))
    with pytest.raises(ConfigError, match=r"a\.json: "):
        read_answer(kept)


@pytest.mark.parametrize(
    "asked, said",
    [
        ("", "name one answer"),
        ("a.json --storage b", "name one answer"),
        ("--storage b", "name one answer"),
        ("a.json --study c", "name one answer"),
        ("none.json", "none.json cannot be read: No such file"),
        (".", "cannot be read: Is a directory"),
        ("--storage none.journal --study x", "there is no such file"),
        ("--storage sqlite:///none.db --study x", "there is no such file"),
        ("--storage nonsense://x --study x", "cannot be used"),
    ],
)
def test_a_wrong_request_is_one_line(asked, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("report", *asked.split())
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert said in line
    assert not list(tmp_path.iterdir())


def test_a_study_that_is_not_there_is_named(tuned):
    result = run("report", "--storage", tuned.storage, "--study", "other")
    assert result.exit_code == 2
    assert "no study is called 'other'" in result.stderr


def test_where_no_file_can_be_none_is_left_in_part(recommended, tmp_path):
    (tmp_path / "folder").mkdir()
    for path, why in (
        (tmp_path / "none" / "a.html", "No such file"),
        (tmp_path / "folder", "Is a directory"),
    ):
        with pytest.raises(AttentionPlannerError, match=f"--out .* cannot be written: {why}"):
            write_whole(path, b"data", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_it_imports_neither_torch_nor_rich_nor_matplotlib(recommended, tmp_path):
    kept = tmp_path / "answer.json"
    kept.write_text(recommended.to_json())
    code = (
        "import sys; sys.modules['torch'] = sys.modules['rich'] = sys.modules['matplotlib'] = None\n"
        "from planner.cli.main import app\n"
        "try: app(['report', sys.argv[1], '--out', sys.argv[2]])\n"
        "except SystemExit as end: assert end.code == 0\n"
    )
    command = [sys.executable, "-c", code, str(kept), str(tmp_path / "a.html")]
    subprocess.run(command, cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
