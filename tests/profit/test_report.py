"""The report page: complete on a full run, a sentence where something is missing, one-line errors, no injection."""

from __future__ import annotations

import ast
import json
import math
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest

from profit.errors import ProfitError
from profit.report import write_report
from tests.profit.report_sample import sample_results

VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture
def results(rng) -> dict:
    return sample_results(rng.initial_seed(), blocks=1)


class Page(HTMLParser):
    """Parsed page: elements as (tag, attributes), text; fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def write(run: Path, results: dict) -> Page:
    (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    path = write_report(run)
    assert path == run / "report.html"
    assert not list(run.glob("*.tmp"))
    return Page(path.read_text(encoding="utf-8"))


def test_full_page_is_self_contained_and_complete(tmp_path, rng):
    results = sample_results(rng.initial_seed())
    assert len(results["layers"]) == 53
    page = write(tmp_path, results)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(html.encode()) < 3_000_000
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    assert not {"script", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"] for _, a in page.elements if "href" in a]
    assert all(link == "data:," or link.removeprefix("#") in ids for link in links)
    assert all(name in ids for name in re.findall(r"url\(#([^)]+)\)", html))
    for phase in results["phases"]:
        assert f"{phase['name']} " in page.text and f"{phase['accuracy']:.2f}" in page.text
    for layer in results["layers"]:
        assert page.texts.count(layer["name"]) >= 2  # table and histogram, and the AIWQ chart where it is ranked
    run = results["run"]
    for expected in ("98.33 %", "98.61 %", "99.17 %", "\u22120.84 points", "W4A4", "4 min 33 s", run["git_commit"],
                     run["command"], "torch 2.15.0", "weight_bits: 4", "2026-01-31 12:34 UTC", "finished"):  # fmt: skip
        assert expected in page.text


def test_page_can_be_read_without_seeing_it(tmp_path, results):
    page = write(tmp_path, results)
    assert page.all("html")[0]["lang"] == "en"
    drawings = page.all("svg")
    assert len(drawings) == 4 + len(results["layers"])
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 20 for svg in drawings)
    assert len(page.all("figcaption")) == len(page.all("figure")) == len(drawings)
    assert all(th.get("scope") in ("col", "row") for th in page.all("th"))
    regions = [div for div in page.all("div") if "scroll" in div.get("class", "")]
    assert regions and all(div["tabindex"] == "0" and div["aria-label"] for div in regions)


def test_same_results_same_file(tmp_path, results):
    write(tmp_path, results)
    first = (tmp_path / "report.html").read_bytes()
    write(tmp_path, results)
    assert (tmp_path / "report.html").read_bytes() == first


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>$x_{2}$\x00\x1b{{ 7*7 }}"


def test_names_are_text_never_markup(tmp_path, results):
    def poison(value):
        if isinstance(value, dict):
            return {(k if k in KEYS else HOSTILE + k): poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return HOSTILE + value if isinstance(value, str) else value

    KEYS = _keys({k: v for k, v in results.items() if k not in ("weights", "recipe")})
    KEYS |= {"edges", "counts", "grid", "code_counts", "recipe", "weights"}
    KEYS -= set(results["run"]["versions"]) | set(results["aiwq"]["scores"])
    page = write(tmp_path, poison(results))
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert "<script>alert(1)</script>" in page.text and "{{ 7*7 }}" in page.text


def _keys(value) -> set:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (set(value) if isinstance(value, dict) else set()).union(*(_keys(child) for child in children))


def _interrupted(r):
    r["run"]["finished"] = False
    r["phases"] = r["phases"][:3]


def _without_aiwq(r):
    r["aiwq"] = None
    for layer in r["layers"]:
        layer.update(aiwq=None, rank=None, frozen_stage=None)


def _not_a_number(r):
    for row in [*r["phases"], *(row for phase in r["phases"] for row in phase["history"])]:
        row.update(accuracy=math.nan, accuracy_ema=None, train_loss=math.inf, test_loss=math.nan)
    r["final"] = dict.fromkeys(r["final"], math.nan)
    for size in r["sizes"]:
        size["accuracy"] = math.nan


def _at_the_ends_of_the_scales(r):
    for row in [*r["phases"], *(row for phase in r["phases"] for row in phase["history"])]:
        row.update(accuracy=100.0, accuracy_ema=0.0, lr=0.0, test_loss=0.0, train_loss=0.0)
    for layer in r["layers"]:
        layer["aiwq"] = 0.0


def _float_only(r):
    for layer in r["layers"]:
        layer.update(weight_bits=None, act_bits=None, A_x=None, C_x=None, A_w=None, C_w=None)
    for entry in r["weights"].values():
        entry.update(grid=[], code_counts=[])


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        (_interrupted, ["interrupted", "after 3 phases, the last one a8.train"]),
        (lambda r: r.update(phases=[], run={**r["run"], "finished": False}),
         ["No phase has ended yet", "No epoch was recorded", "before the first phase ended"]),
        (lambda r: [phase.update(history=[]) for phase in r["phases"]], ["No epoch was recorded"]),
        (_without_aiwq, ["AIWQ was not measured"]),
        (_not_a_number, ["No phase has a measured accuracy", "NaN", "not measured", "No accuracy was measured"]),
        (_float_only, ["float"]),
        (lambda r: r.update(layers=[], weights={}), ["No layer was recorded", "No weight histograms were recorded"]),
        (lambda r: r.update(sizes=[], recipe={}), ["No model sizes were recorded", "The recipe was not recorded"]),
        (lambda r: [r.pop(key) for key in list(r) if key != "schema"],
         ["No phase has ended yet", "AIWQ was not measured", "No layer was recorded", "not recorded", "interrupted"]),
        (_at_the_ends_of_the_scales, ["100.00", "AIWQ was not measured"]),
    ],
)  # fmt: skip
def test_missing_parts_become_sentences(tmp_path, results, change, sentences):
    change(results)
    text = write(tmp_path, results).text
    for sentence in sentences:
        assert sentence in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[1]", "expected a mapping at the top level, found [1]"),
        (b"{}", "schema is null, this version reads schema 1"),
        (b'{"schema": 2}', "schema is 2"),
        (b'{"schema": 1, "phases": "all"}', 'phases: expected a list, found "all"'),
        (b'{"schema": 1, "phases": [{}, {"accuracy": "high"}]}', 'phases[1].accuracy: expected a number, found "high"'),
        (b'{"schema": 1, "final": {"accuracy": true}}', "final.accuracy: expected a number, found true"),
        (b'{"schema": 1, "run": []}', "run: expected a mapping, found []"),
        (b'{"schema": 1, "weights": {"a": {"edges": [0], "counts": [1]}}}', "weights.a: 1 counts need 2 edges"),
        (b'{"schema": 1, "weights": {"a": {"grid": [NaN]}}}', "weights.a: every edge"),
    ],
)
def test_bad_results_are_refused_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(ProfitError) as error:
        write_report(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_page_that_cannot_be_written_says_so_and_leaves_nothing(tmp_path, results):
    (tmp_path / "report.html").mkdir()
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ProfitError, match="report.html cannot be written"):
        write_report(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]


def test_drawing_libraries_are_imported_where_they_are_used():
    """`import profit.report` works, and is quick, without matplotlib and jinja2."""
    sources = sorted((resources.files("profit") / "report").iterdir(), key=str)
    for source in (path for path in sources if path.name.endswith(".py")):
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"matplotlib", "jinja2", "yaml"} & {name.split(".")[0] for name in names}, source.name
