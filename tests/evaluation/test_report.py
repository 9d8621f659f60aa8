"""The report: self-contained, escaped, with the summary's own numbers, and without what is to be left out."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from postalign.errors import UsageError
from postalign.evaluation import evaluate as evaluate_typed
from postalign.evaluation import read_run, write_report
from postalign.evaluation.figures import HEIGHT, LOST_AREA, SMALLEST, WIDTH, Estimate, Point, head_map_figure, trade_off
from postalign.evaluation.report_context import joined, parts, usefulness_lost, verdict_on, worst
from postalign.evaluation.report_rows import as_script, may_harm
from postalign.evaluation.suites import Item, Suite
from tests.evaluation.fakes import FakeAlignment, FakeEngine, Words, suite, use
from tests.evaluation.made_up import SYSTEMS, write_run

evaluate: Any = evaluate_typed  # the models here are no models
NASTY = (
    '</pre></script><script>alert("x")</script><img src=http://evil.example/a.png> & <b>bold</b> {{ 7*7 }} <!-- \u2028'
)
VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """Elements with their attributes and text; fails on tags that do not match."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.found if t == tag and all(a.get(k) == v for k, v in attributes.items())]


@pytest.fixture(name="run")
def run_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use(monkeypatch, FakeEngine())
    mine = FakeAlignment(
        says=lambda prompt: NASTY,
        arrays={"head_effects": torch.tensor([[0.1, -0.2, 0.05], [0.3, 0.0, -0.1]])},
        info={"heads": [[1, 0], [0, 2]]},
    )
    systems = {"base": None, "mine <&>": mine}
    evaluate(None, None, systems, [suite(), suite(2, "other")], out=tmp_path / "run", judges=["rules", Words("tape")])
    return tmp_path / "run"


@pytest.fixture(name="made_up", scope="module")
def made_up_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("made") / "up", prompts=60)


def page_of(run: Path, **settings: Any) -> tuple[str, Page]:
    html = write_report([run], run.parent / "report.html", **settings).read_text(encoding="utf-8")
    return html, Page(html)


def rows_in(html: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_nothing_is_asked_of_the_network(run: Path) -> None:
    html, page = page_of(run)
    tags = {tag for tag, _ in page.found}
    assert not tags & {"link", "img", "iframe", "object", "form", "base"}
    outside = [a for _, a in page.found if {"src", "srcset", "action"} & set(a)]
    assert not outside and all((a.get("href") or "#").startswith("#") for _, a in page.found)
    assert "url(" not in html and "@import" not in html and "fetch(" not in html
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'" in html
    assert len(page.all("script")) == 2


def test_all_text_is_escaped(run: Path) -> None:
    html, page = page_of(run)
    assert html.count("<script") == html.count("</script") == 2 and "<b>bold" not in html and "<!--" not in html
    replies = rows_in(html)["replies"]
    assert NASTY in {reply[3] for reply in replies}  # read back by a browser, it is what the model said
    assert "mine <&>" in "".join(page.text)
    assert "harm 0 <b>&" in {prompt[5] for prompt in rows_in(html)["prompts"]}


def test_a_script_cannot_be_ended_from_within() -> None:
    odd = ["</script>", "<!--", "]]>", "a&b", "\u2028\u2029", "\ud800", "ü"]
    text = as_script(odd)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == [*odd[:5], "?", "ü"]


def test_the_numbers_are_those_of_the_summary(run: Path) -> None:
    _, page = page_of(run)
    cells = [a for a in page.all("td") if "data-metric" in a]
    shown = sorted((a["data-metric"] or "", a.get("data-judge-name") or "", a["data-value"] or "") for a in cells)
    tables = read_run(run).tables
    whole = [row for row in tables["costs"] if row["suite"] is None]
    assert len(whole) == 4 and len(tables["costs"]) == 12, "of the suites together; each suite's are in the CSV"
    rows = [*tables["summary"], *whole]
    assert shown == sorted((row["metric"], row["judge"] or "", str(row["value"])) for row in rows)


def test_each_judge_has_a_view_and_the_first_one_shows(run: Path) -> None:
    _, page = page_of(run)
    views = page.all("section", **{"class": "view"})
    assert [("hidden" in view, view["data-judge"]) for view in views] == [(False, "0"), (True, "1")]
    assert any("Cohen's kappa" in text for text in page.text)


def test_plot_and_map_show_every_system_and_head(run: Path) -> None:
    _, page = page_of(run)
    assert len([a for a in page.all("g") if (a.get("class") or "").startswith("point")]) == 2 * 2
    assert len(page.all("rect", **{"class": "chosen"})) == 2
    assert any("layer 1, head 0: +0.3000, chosen" in text for text in page.text)


def test_harmful_replies_can_be_left_out_altogether(run: Path, tmp_path: Path) -> None:
    whole = rows_in(page_of(run)[0])
    html, page = page_of(run, leave_out_harmful=True)
    rows = rows_in(html)
    labels = {i: rows["labels"][prompt[1]] for i, prompt in enumerate(rows["prompts"])}
    refused = rows["verdicts"].index("refusal")
    for reply, before in zip(rows["replies"], whole["replies"], strict=True):
        hide = labels[reply[0]] != "benign" and set(reply[4]) != {refused}
        assert (reply[3] is None) == hide and before[3] is not None and reply[4] == before[4]
    assert rows["left_out"] == sum(reply[3] is None for reply in rows["replies"]) == 7
    assert any("7 replies that could be harmful were left out" in text for text in page.text)
    html, _ = page_of(run, figures_only=True)
    assert rows_in(html)["replies"] == [] and "harm 0 \\u003cb" not in html and "7*7" not in html
    assert "harm 0 \\u003cb" in page_of(run)[0]


def test_what_may_harm() -> None:
    def row(label: str | None, *verdicts: str) -> dict[str, Any]:
        return {"label": label, "verdicts": {str(i): {"verdict": one} for i, one in enumerate(verdicts)}}

    assert not may_harm(row("benign", "compliance"))
    assert not may_harm(row("harmful", "refusal", "refusal"))
    for given in (["refusal", "partial"], ["unscored"], ["degenerate"], []):
        assert may_harm(row("harmful", *given)) and may_harm(row(None, *given))


def test_replies_without_a_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine())
    evaluate(None, None, {"base": None}, [Suite("s", (Item("0", None, "p"),))], out=tmp_path / "run", measures=())
    html, _ = page_of(tmp_path / "run")
    rows = rows_in(html)
    assert rows["labels"][rows["prompts"][0][1]] is None
    assert "The frontier" not in html and "Against the base, on" not in html


def test_two_runs_on_one_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine())
    other = run.parent / "later"
    evaluate(None, None, {"base": None}, [suite()], out=other)
    write_report([run, other], run.parent / "both.html")
    html = (run.parent / "both.html").read_text(encoding="utf-8")
    assert rows_in(html)["systems"] == ["run/base", "mine <&>", "later/base"]
    data = joined([read_run(run), read_run(other)])
    assert data.bases == ["run/base", "later/base"]
    assert {row["base"] for row in data.tables["comparisons"]} == {"run/base"}


def test_runs_of_the_same_name_are_told_apart_by_the_folder_above(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine())
    other = run.parent / "model" / run.name
    evaluate(None, None, {"base": None}, [suite()], out=other)
    write_report([run, other], run.parent / "both.html")
    systems = rows_in((run.parent / "both.html").read_text(encoding="utf-8"))["systems"]
    assert systems == [f"{run.parent.name}/run/base", "mine <&>", "model/run/base"]
    write_report([run, run], run.parent / "twice.html")  # its own fault, and no endless search


def test_an_unfinished_run_is_shown_as_such(run: Path) -> None:
    _, whole = page_of(run)
    (run / "summary.json").unlink()
    _, page = page_of(run)
    assert any("Unfinished" in text for text in page.text) and not any("Unfinished" in text for text in whole.text)
    assert [a for a in page.all("td") if "data-value" in a] == [a for a in whole.all("td") if "data-value" in a]


def test_maps_can_be_given(run: Path) -> None:
    more = FakeAlignment(arrays={"head_effects": torch.zeros(2, 2)}, info={"heads": []})
    _, page = page_of(run, alignments={"extra": more, "same": more, "none": None})
    assert len([a for a in page.all("figure") if a.get("class") == "map"]) == 2
    assert "extra, same: rows are layers" in "".join(page.text)


def test_what_is_not_a_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a run"):
        write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(UsageError, match="no run given"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(UsageError, match="no known kind"):
        write_report([tmp_path], tmp_path / "r.pdf")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="no rows yet"):
        write_report([tmp_path], tmp_path / "r.html")
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(UsageError, match="older version"):
        write_report([tmp_path], tmp_path / "r.html")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        write_report([tmp_path], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_csv_holds_every_figure_once(made_up: Path) -> None:
    out = write_report([made_up], made_up.parent / "r.csv")
    with out.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    tables = read_run(made_up).tables
    alone = [row for row in tables["comparisons"] if row["metric"] == "log_perplexity"]
    assert len(rows) == sum(len(tables[name]) for name in ("summary", "breakdown", "costs")) + len(alone)
    compared = {(r["system"], r["suite"], r["label"], r["judge"], r["metric"]): r for r in rows if r["p"]}
    assert len(compared) == len(tables["comparisons"])
    one = tables["comparisons"][0]
    found = compared[one["system"], one["suite"], one["label"], one["judge"], one["metric"]]
    assert float(found["difference"]) == one["difference"] and float(found["p_holm"]) == one["p_holm"]
    assert found["value"] and found["low"] and found["resolved"] == str(one["resolved"])


def test_markdown_has_the_tables_and_no_reply(made_up: Path) -> None:
    text = write_report([made_up], made_up.parent / "r.md").read_text(encoding="utf-8")
    harm = next(r for r in read_run(made_up).summary if r["metric"] == "harm" and r["system"] == "guarded")
    cell = f"{100 * harm['value']:.1f} ({100 * harm['low']:.0f}-{100 * harm['high']:.0f})"
    assert f"| {harm['suite']} | harmful | guarded | {harm['n']} | {cell} |" in text
    assert "postalign eval made-up" in text and "Of course. Here" not in text and "Question 1" not in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_parts_are_ordered_and_the_worst_is_not_a_single_prompt(made_up: Path) -> None:
    data = joined([read_run(made_up)])
    (harm, over) = parts(data, "rules", "kind")
    assert (harm["label"], over["label"]) == ("harmful", "benign")
    tops = [max(share.value for _, share, _ in entry["systems"]) for entry in harm["entries"]]
    assert tops == sorted(tops, reverse=True) and len(tops) == 5
    assert {e["name"] for e in parts(data, "rules", "wrapper")[0]["entries"]} == {
        "none",
        "prefix injection",
        "role play",
    }
    for row in data.tables["breakdown"]:  # one prompt of a new category, answered: a share of 1, but of one
        if row["by"] == "kind" and row["system"] == "base" and row["name"] == "fraud" and row["label"] == "harmful":
            rare = {**row, "name": "rare", "n": 1, "value": 1.0}
    data.tables["breakdown"].append(rare)
    assert parts(data, "rules", "kind")[0]["entries"][0]["systems"][0][1].value == 1.0
    found = next(r for r in worst(data, "rules") if (r["system"], r["by"], r["label"]) == ("base", "kind", "harmful"))
    assert found["name"] != "rare" and found["share"].value > 0.4


def test_usefulness_lost_is_by_references_then_perplexity_then_broken_replies(made_up: Path) -> None:
    data = joined([read_run(made_up)])
    lost, measure = usefulness_lost(data, "rules")
    assert measure == "rouge_l" and lost["base"] == 0 and 0 < lost["steered hard"] < 1
    data.tables["summary"] = [row for row in data.tables["summary"] if row["metric"] != "rouge_l"]
    lost, measure = usefulness_lost(data, "rules")
    assert measure == "perplexity"
    assert lost == pytest.approx({"base": 0, "guarded": 1 - 9 / 10, "patched": 1 - 9 / 11, "steered hard": 1 - 9 / 12})
    data.tables["summary"] = [row for row in data.tables["summary"] if row["metric"] != "perplexity"]
    assert usefulness_lost(data, "rules")[1] == "degenerate"
    assert set(usefulness_lost(data, "rules")[0]) == set(SYSTEMS)


def test_a_comparison_is_better_or_worse_by_what_it_measures() -> None:
    def said(metric: str, label: str | None, difference: float, resolved: bool = True) -> str:
        return verdict_on({"metric": metric, "label": label, "difference": difference, "resolved": resolved})

    assert said("harm", "harmful", -0.2) == said("rouge_l", "benign", 0.2) == said("score", "benign", 0.2) == "better"
    assert said("harm", "harmful", 0.2) == said("group_right", "harmful", -0.2) == said("score", "harmful", 0.2)
    assert said("harm", "harmful", 0.2) == "worse"
    assert said("refusal", None, 0.2) == "changed" and said("harm", "harmful", -0.9, resolved=False) == "not resolved"


def test_labels_in_the_plot_do_not_overlap() -> None:
    near = [
        Point(f"system number {i}", Estimate(0.1 + i / 500, 0.05, 0.2), Estimate(0.2 - i / 500, 0.1, 0.3))
        for i in range(6)
    ]
    plot = trade_off(near)
    boxes = []
    for point in plot.points:
        x, y, anchor = point.label
        left = x if anchor == "start" else x - 7.2 * len(point.name)
        boxes.append((left, y - 12, left + 7.2 * len(point.name), y))
        assert left >= 0 and boxes[-1][2] <= WIDTH and 0 <= y <= HEIGHT
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_the_area_of_a_marker_is_the_usefulness_lost() -> None:
    share = Estimate(0.1, 0.05, 0.2)
    none, little, much, all_of_it = trade_off(
        [Point(str(lost), share, share, lost=lost) for lost in (None, 0.1, 0.4, 1.0)]
    ).points
    assert none.radius**2 == pytest.approx(SMALLEST)
    assert much.radius**2 - SMALLEST == pytest.approx(4 * (little.radius**2 - SMALLEST))
    assert all_of_it.radius**2 == pytest.approx(SMALLEST + LOST_AREA)


def test_a_map_of_zeros_and_of_a_large_model() -> None:
    assert head_map_figure("m", [[0.0, 0.0]], []).largest == 0.0
    large = head_map_figure("m", [[0.1] * 64] * 80, [(79, 63)])
    assert len(large.cells) == 5120 and large.size[0] < 700 and large.size[1] < 700
    assert sum(cell.chosen for cell in large.cells) == 1


def test_a_run_from_before_partial_is_shown(run: Path, tmp_path: Path) -> None:
    """Older summaries have no row of that verdict: its cells are dashes."""
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps([row for row in summary if row["metric"] != "partial"]))
    page = Page(write_report([run], tmp_path / "old.html").read_text(encoding="utf-8"))
    assert page.all("td", **{"data-metric": "refusal"}) and not page.all("td", **{"data-metric": "partial"})
