"""The page: self-contained, escaped, folded where it must be, and with the summary's own numbers."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from postalign.errors import UsageError
from postalign.evaluation import evaluate, write_report
from postalign.evaluation.figures import HEIGHT, WIDTH, Estimate, Point, head_map_figure, trade_off
from tests.evaluation.fakes import FakeAlignment, FakeEngine, suite, use

NASTY = '</pre></section><script>alert("x")</script><img src=http://evil.example/a.png> & <b>bold</b> {{ 7*7 }}'
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
    evaluate(None, None, {"base": None, "mine <&>": mine}, [suite(), suite(2, "other")], out=tmp_path / "run")  # type: ignore[arg-type]
    return tmp_path / "run"


def page_of(run: Path, **settings: Any) -> tuple[str, Page]:
    html = write_report([run], run.parent / "report.html", **settings).read_text(encoding="utf-8")
    return html, Page(html)


def test_nothing_is_asked_of_the_network(run: Path) -> None:
    html, page = page_of(run)
    tags = {tag for tag, _ in page.found}
    assert not tags & {"script", "link", "img", "iframe", "object", "form", "base"}
    assert not [a for _, a in page.found if {"src", "href", "srcset", "action"} & set(a)]
    assert "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html


def test_all_text_is_escaped(run: Path) -> None:
    html, page = page_of(run)
    assert "<script" not in html and "<b>bold" not in html
    assert NASTY in page.text  # read back by a browser, it is what the model said
    assert "harm 0 <b>&" in page.text
    assert "mine <&>" in "".join(page.text)
    assert "49" not in html.split("{{ 7*7 }}")[0][-50:]


def test_harmful_replies_are_folded_and_benign_ones_are_open(run: Path) -> None:
    _, page = page_of(run)
    harmful = [a for a in page.all("details") if "harmful" in (a["class"] or "")]
    benign = [a for a in page.all("details") if "benign" in (a["class"] or "")]
    assert len(harmful) == len(benign) == 7
    assert not any("open" in a for a in harmful)
    assert all("open" in a for a in benign)


def test_replies_without_a_label_are_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from postalign.evaluation.suites import Item, Suite

    use(monkeypatch, FakeEngine())
    evaluate(None, None, {"base": None}, [Suite("s", (Item("0", None, "p"),))], out=tmp_path / "run", measures=())  # type: ignore[arg-type]
    html, page = page_of(tmp_path / "run")
    assert [("open" in a) for a in page.all("details")] == [False]
    assert "trade-off" not in html.lower()


def test_the_numbers_are_those_of_the_summary(run: Path) -> None:
    _, page = page_of(run)
    shown = sorted((a["data-metric"] or "", a["data-value"] or "") for a in page.all("td") if "data-metric" in a)
    summary = json.loads((run / "summary.json").read_text())
    assert shown == sorted((row["metric"], str(row["value"])) for row in summary)


def test_plot_and_map_show_every_system_and_head(run: Path) -> None:
    _, page = page_of(run)
    assert len([a for a in page.all("g") if (a.get("class") or "").startswith("point")]) == 2
    assert len(page.all("rect", **{"class": "chosen"})) == 2
    assert any("layer 1, head 0: +0.3000, chosen" in text for text in page.text)


def test_two_runs_on_one_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeEngine())
    other = run.parent / "later"
    evaluate(None, None, {"base": None}, [suite()], out=other)  # type: ignore[arg-type]
    write_report([run, other], run.parent / "both.html")
    text = "".join(Page((run.parent / "both.html").read_text()).text)
    assert "run/base" in text and "later/base" in text


def test_an_unfinished_run_is_shown_as_such(run: Path) -> None:
    _, whole = page_of(run)
    (run / "summary.json").unlink()
    _, page = page_of(run)
    assert any("Unfinished" in text for text in page.text)
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
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="no rows yet"):
        write_report([tmp_path], tmp_path / "r.html")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        write_report([tmp_path], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


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


def test_a_map_of_zeros_and_of_a_large_model() -> None:
    assert head_map_figure("m", [[0.0, 0.0]], []).largest == 0.0
    large = head_map_figure("m", [[0.1] * 64] * 80, [(79, 63)])
    assert len(large.cells) == 5120 and large.size[0] < 700 and large.size[1] < 700
    assert sum(cell.chosen for cell in large.cells) == 1
