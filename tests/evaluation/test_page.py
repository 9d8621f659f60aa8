"""The report in a browser: it loads from a file with many rows, without a complaint, and its moving parts move."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from postalign.evaluation import write_report
from tests.browser import NAMES, Browser, chromium
from tests.evaluation.made_up import SYSTEMS, write_run

pytestmark = pytest.mark.skipif(chromium() is None, reason=f"no Chromium here (one of {', '.join(NAMES)})")
PROMPTS = 5000  # of four systems: 20,000 replies


@pytest.fixture(name="browser", scope="module")
def browser_fixture() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


@pytest.fixture(name="page", scope="module")
def page_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return write_report([write_run(folder / "run", prompts=60, seeds=2)], folder / "report.html")


@pytest.fixture(name="large", scope="module")
def large_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    return write_report([write_run(folder / "run", prompts=PROMPTS, tables=False)], folder / "report.html")


def choose(browser: Browser, title: str, option: str) -> None:
    """Pick an option of the filter with that title, as a person would."""
    browser.run(
        f"""(() => {{ const label = [...document.querySelectorAll('#filters label')]
          .find((l) => l.firstChild.textContent === '{title}'); const select = label.querySelector('select');
          select.value = [...select.options].find((o) => o.text === '{option}').value;
          select.dispatchEvent(new Event('change')); }})()"""
    )


def found(browser: Browser) -> int:
    return int(browser.run("document.getElementById('found').textContent.split(' ')[0]"))


def test_twenty_thousand_rows_load_without_a_complaint_or_a_request(browser: Browser, large: Path) -> None:
    browser.open(large)
    assert browser.errors == []
    assert browser.requests == [large.resolve().as_uri()]
    assert found(browser) == PROMPTS
    drawn = browser.run("document.querySelectorAll('.prompt').length")
    assert 10 <= drawn <= 100, "the replies are drawn a few at a time"
    browser.run("window.scrollTo(0, document.body.scrollHeight)")
    browser.run("new Promise((done) => setTimeout(done, 300))")
    assert browser.run("document.querySelectorAll('.prompt').length") > drawn


def test_filters(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert found(browser) == 60
    choose(browser, "prompts", "harmful")
    assert found(browser) == 30
    choose(browser, "suite", "ours")
    assert found(browser) == 15
    choose(browser, "system", "steered hard")
    choose(browser, "verdict", "refusal")
    refused = found(browser)
    assert 10 < refused <= 15
    choose(browser, "verdict", "compliance")
    assert found(browser) < 5
    browser.run("[...document.querySelectorAll('#ticks button')].at(-1).click()")
    assert found(browser) == 60
    browser.run(
        "(() => { const box = document.querySelector('input[type=search]'); box.value = 'QUESTION 17 ';"
        " box.dispatchEvent(new Event('input')); return new Promise((done) => setTimeout(done, 400)); })()"
    )
    assert found(browser) == 1
    assert "Question 17 " in browser.run("document.querySelector('.ask').textContent")
    assert browser.errors == []


def test_disagreements_are_one_click_away(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("[...document.querySelectorAll('#ticks input')].at(-1).click()")
    disagree = found(browser)
    assert 0 < disagree < 60
    browser.run("document.querySelector('button.read').click()")
    assert 0 < found(browser) <= disagree
    both = browser.run("document.querySelector('.prompt').textContent")
    assert "partial" in both


def test_harmful_replies_are_folded_and_benign_ones_open_with_the_change_marked(browser: Browser, page: Path) -> None:
    browser.open(page)
    choose(browser, "prompts", "harmful")
    assert browser.run("document.querySelectorAll('.reply pre').length") == 0
    assert browser.run("document.querySelectorAll('.reply details').length") > 0
    browser.run("(() => { document.querySelector('.reply details').open = true; })()")
    browser.run("new Promise((done) => setTimeout(done, 100))")
    assert browser.run("document.querySelectorAll('.reply pre').length") == 1
    choose(browser, "prompts", "benign")
    differ = browser.run(
        """(() => { const bad = [];
          for (const card of document.querySelectorAll('.prompt')) {
            const [base, ...others] = [...card.querySelectorAll('.reply')].slice(0, 4);
            const said = base.querySelector('pre').textContent;
            if (base.querySelector('mark')) bad.push('the base is marked');
            for (const other of others) {
              const pre = other.querySelector('pre'), mark = pre.querySelector('mark');
              if (pre.textContent === said) { if (mark) bad.push('marked without a change'); continue; }
              if (!mark) { bad.push('a change without a mark'); continue; }
              const before = pre.firstChild.textContent;
              if (!said.startsWith(before.trimEnd())) bad.push('the mark comes too late');
              if (said.startsWith(before + mark.textContent + ' ')) bad.push('the mark comes too early');
            } }
          return bad; })()"""
    )
    assert differ == []
    assert browser.run("document.querySelectorAll('mark').length") > 5


def test_seeds_are_compared_with_the_base_of_the_same_seed(browser: Browser, page: Path) -> None:
    browser.open(page)
    heads = browser.run("[...document.querySelector('.prompt').querySelectorAll('h4')].map((h) => h.textContent)")
    assert heads == [f"{name}, seed {seed}" for seed in (0, 1) for name in SYSTEMS]


def test_tables_sort_both_ways(browser: Browser, page: Path) -> None:
    browser.open(page)
    script = (
        "(() => { const table = [...document.querySelectorAll('.view:not([hidden]) table.sortable')].at(-1);"
        " const heads = [...table.tHead.rows[0].cells], at = heads.findIndex((h) => h.textContent === 'compliance');"
        " heads[at].click(); return [...table.tBodies[0].rows].map((r) => Number(r.cells[at].dataset.value)); })()"
    )
    up, down = browser.run(script), browser.run(script)
    assert up == sorted(up) and down == up[::-1] and len(set(up)) > 4


def test_the_judge_can_be_changed(browser: Browser, page: Path) -> None:
    browser.open(page)
    harm = "document.querySelector('.view:not([hidden]) .tile dd').textContent"
    before = browser.run(harm)
    browser.run(
        "(() => { const s = document.getElementById('judge'); s.value = '1'; s.dispatchEvent(new Event('change')); })()"
    )
    assert browser.run(harm) != before
    assert browser.run("document.querySelectorAll('.view:not([hidden])').length") == 1
    assert browser.run("document.getElementById('cells').textContent") == "Every cell, as judged by second"
    assert browser.errors == []


def test_light_and_dark(browser: Browser, page: Path) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    browser.open(page)
    light = browser.run(paper)
    browser.open(page, dark=True)
    dark = browser.run(paper)
    assert light != dark
    for wanted in (light, dark, dark):  # light, dark, and back to what the system has
        browser.run("document.getElementById('theme').click()")
        assert browser.run(paper) == wanted


def test_nothing_is_wider_than_a_phone(browser: Browser, page: Path) -> None:
    browser.open(page, width=390, height=844)
    assert browser.run("document.documentElement.scrollWidth") == 390
    browser.run("document.getElementById('replies').scrollIntoView()")
    assert browser.run("Math.max(...[...document.querySelectorAll('.prompt')].map((p) => p.scrollWidth))") < 390
