"""The page in a real Chromium, opened from disk: nothing leaves the machine, charts are drawn, controls work."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pages import HOSTILE, largest_page, make_contents
from steer2edit.method.theorems import magnitudes
from steer2edit.report.html.contents import Contents
from steer2edit.report.html.render import page_of

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no `chromium` on the PATH; on Debian: apt-get install chromium"),
]
# Main-thread seconds, without the time that other processes took the machine for.
OPENS_IN = 2.0


@dataclass
class Tab:
    """An open page, and what it said and asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    seconds: float = 0.0


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    with playwright.sync_playwright() as running:
        # Debian's Chromium starts as root without its sandbox alone, as in a container; the page is our own.
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


Open = Callable[..., Tab]


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """open_page(text, width=…, scheme=…) opens a page from disk; afterwards nothing may have gone wrong in it."""
    tabs: list[Tab] = []

    def opened(text: str, width: int = 1280, scheme: str = "light") -> Tab:
        path = tmp_path / "report.html"
        path.write_text(text, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab = Tab(context.new_page())
        tabs.append(tab)
        tab.page.set_default_timeout(60_000)
        tab.page.on("console", lambda message: tab.said.append(message.text))
        tab.page.on("pageerror", lambda error: tab.said.append(str(error)))
        tab.page.on("request", lambda request: tab.asked.append(request.url))
        clock = context.new_cdp_session(tab.page)
        clock.send("Performance.enable", {"timeDomain": "threadTicks"})
        tab.page.goto(path.as_uri())
        tab.page.wait_for_selector("html[data-ready]")
        measured = {row["name"]: row["value"] for row in clock.send("Performance.getMetrics")["metrics"]}
        tab.seconds = measured["TaskDuration"]
        return tab

    yield opened
    for tab in tabs:
        assert tab.said == []
        outside = [url for url in tab.asked if not url.startswith(("file:", "data:", "blob:"))]
        assert outside == []
        assert [url for url in tab.asked if url.startswith("file:")] == [(tmp_path / "report.html").as_uri()]


@pytest.fixture(scope="module")
def contents() -> Contents:
    return make_contents(24, 60)


@pytest.fixture(scope="module")
def text(contents: Contents) -> str:
    return page_of(contents)


def _chart(tab: Tab, name: str) -> Any:
    """A chart, once it is drawn: the page draws it when it comes into the window."""
    chart = tab.page.locator(f"#{name}")
    chart.scroll_into_view_if_needed()
    tab.page.wait_for_selector(f"#{name} .main-svg")
    return chart


CHARTS = ("trade-off-chart", "map-attn", "map-mlp", "layers-mlp", "lambda-mlp", "g-attn", "g-mlp")


def test_every_chart_is_drawn_with_the_runs_numbers(open_page: Open, text: str, contents: Contents) -> None:
    tab = open_page(text)
    for name in CHARTS:
        if name in ("map-mlp", "layers-mlp", "lambda-mlp") and not tab.page.locator(f"#{name}").count():
            assert contents.edit is not None
            assert not contents.edit.summary()["mlp"]["edited"]
            continue
        _chart(tab, name)
    drawn = tab.page.evaluate(
        """byId("trade-off-chart").data.flatMap((trace) =>
          (trace.customdata || []).map((id, i) => [id, trace.x[i], trace.y[i]]))"""
    )
    assert contents.study is not None
    attribute = contents.recipe.behaviour.attribute.name
    expected = {t.candidate.id: [t.mean("utility_loss"), t.mean(attribute)] for t in contents.study.trials}
    assert {id: [x, y] for id, x, y in drawn} == expected
    assert contents.edit is not None
    z = tab.page.evaluate("byId('map-attn').data[0].z")
    edited = sum(value is not None for row in z for value in row)
    assert edited == contents.edit.summary()["attn"]["edited"]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_the_page_fits_its_window_in_both_schemes(open_page: Open, text: str, width: int, scheme: str) -> None:
    tab = open_page(text, width, scheme)
    for name in CHARTS:
        if tab.page.locator(f"#{name}").count():
            _chart(tab, name)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    red, green, blue = _colour(tab, "body", "backgroundColor")
    assert (red + green + blue < 150) == (scheme == "dark")


def _colour(tab: Tab, where: str, what: str) -> tuple[int, int, int]:
    value = tab.page.evaluate(f"getComputedStyle(document.querySelector('{where}')).{what}")
    red, green, blue = (int(part) for part in value[value.index("(") + 1 : value.index(")")].split(",")[:3])
    return red, green, blue


def _open_trials(tab: Tab) -> None:
    """Opens the table of all trials, which is filled when the browser reports that it was opened: a moment later."""
    tab.page.locator("#all-trials summary").click()
    tab.page.wait_for_selector("#trials-table tbody tr")


def test_the_switch_turns_the_theme_and_its_charts(open_page: Open, text: str) -> None:
    tab = open_page(text)
    _chart(tab, "trade-off-chart")
    switch = tab.page.locator("#theme")
    ink = "byId('trade-off-chart').layout.font.color"
    light = tab.page.evaluate(ink)
    for name, dark in (("light", False), ("dark", True), ("system", False)):
        switch.click()
        assert switch.inner_text() == f"Theme: {name}"
        assert (sum(_colour(tab, "body", "backgroundColor")) < 150) == dark
        assert (tab.page.evaluate(ink) != light) == dark


def _survivors(contents: Contents, block: str, rho: float, alpha: float) -> int:
    assert contents.edit is not None
    g = torch.cat([s.g for s in contents.edit.sites.values() if s.site.block == block])
    return int((magnitudes(g, rho, alpha) != 0).sum())


def test_the_sliders_count_is_the_theorems(open_page: Open, text: str, contents: Contents) -> None:
    tab = open_page(text)
    assert contents.edit is not None
    config, summary = contents.edit.config, contents.edit.summary()
    counts = {block: tab.page.locator(f"#survivors-{block}") for block in ("attn", "mlp")}
    for block, count in counts.items():
        assert count.get_attribute("data-count") == str(summary[block]["edited"])
        if config[f"rho_{block}"] is None:
            tab.page.locator(f"#off-{block}").uncheck()
    g = torch.cat([s.g for s in contents.edit.sites.values() if s.site.block == "mlp"]).abs()
    exact = [float(value) for value in g[:12]]  # where |g| is ρα, or differs from it in the last bit
    tried = [(0.3, 0.3), (0.05, 0.9), (1e-6, 0.5), (0.7, 0.0), (3.0, 0.1), (5.0, 0.99)]
    tried += [(value / 0.7, 0.7) for value in exact] + [(value / 0.3, 0.3) for value in exact]
    for rho, alpha in tried:
        tab.page.locator("#alpha").fill(repr(alpha))
        for block, count in counts.items():
            tab.page.locator(f"#rho-{block}").fill(repr(rho))
            assert count.get_attribute("data-count") == str(_survivors(contents, block, rho, alpha)), (rho, alpha)
            assert count.get_attribute("data-exact") == "true"


def test_a_slider_sets_its_number(open_page: Open, text: str, contents: Contents) -> None:
    tab = open_page(text)
    slider = tab.page.get_by_label("α (from dense to sparse), slider")
    slider.focus()
    slider.press("End")
    alpha = float(tab.page.locator("#alpha").input_value())
    assert alpha == 0.99
    rho = float(tab.page.locator("#rho-attn").input_value())
    count = tab.page.locator("#survivors-attn").get_attribute("data-count")
    assert count == str(_survivors(contents, "attn", rho, alpha))


def test_the_filters_show_the_rows_that_fit(open_page: Open, text: str, contents: Contents) -> None:
    tab = open_page(text)
    page, rows = tab.page, contents.answers
    name = contents.recipe.behaviour.attribute.name
    count = page.locator("#count")
    assert count.get_attribute("data-rows") == "60"
    assert page.locator("#rows article").count() == 20
    page.locator("#next").click()
    assert count.inner_text() == "21–40 of 60 prompts"
    page.locator("#judged").select_option(f"1 {name}")
    wanted = [row for row in rows if row["labels"]["edit"][name] == 1.0]
    assert count.get_attribute("data-rows") == str(len(wanted))
    shown = page.locator("#rows article .prompt .answer").all_inner_texts()
    assert shown == [row["prompt"] for row in wanted[:20]]
    page.locator("#judged").select_option(f"changed {name}")
    changed = [row for row in rows if row["labels"]["edit"][name] != row["labels"]["base"][name]]
    assert count.get_attribute("data-rows") == str(len(changed))
    page.locator("#judged").select_option("")
    words = " ".join(rows[7]["edit"].split()[3:8])
    page.locator("#query").fill(words.upper())
    assert count.get_attribute("data-rows") == "1"
    assert page.locator("#rows article .prompt .answer").inner_text() == rows[7]["prompt"]
    page.locator("#query").fill("no such words")
    assert count.inner_text() == "No prompt fits."


def test_the_difference_to_the_original_can_be_put_together_again(
    open_page: Open, text: str, contents: Contents
) -> None:
    tab = open_page(text)
    tab.page.locator("#diff").check()
    row = contents.answers[0]
    cards = tab.page.locator("#rows article").first.locator(".card")
    parts = cards.last.evaluate(
        "(card) => [...card.querySelector('.answer').childNodes].map((part) => [part.tagName, part.textContent])"
    )
    assert "".join(text for tag, text in parts if tag in ("SPAN", "DEL")) == row["base"]
    assert "".join(text for tag, text in parts if tag in ("SPAN", "INS")) == row["edit"]
    assert {"INS", "DEL"} <= {tag for tag, _ in parts}
    assert cards.first.locator("ins, del").count() == 0


def test_a_point_opens_its_answers(open_page: Open, text: str, contents: Contents) -> None:
    tab = open_page(text)
    assert contents.study is not None
    trial = contents.study.trials[-1].candidate.id
    _chart(tab, "trade-off-chart")
    place = tab.page.evaluate(
        """(id) => {
          const chart = byId("trade-off-chart");
          const trace = chart.data.find((some) => (some.customdata || []).includes(id));
          const i = trace.customdata.indexOf(id);
          const box = chart.querySelector(".nsewdrag").getBoundingClientRect();
          const { xaxis, yaxis } = chart._fullLayout;
          return [box.left + xaxis.d2p(trace.x[i]), box.top + yaxis.d2p(trace.y[i])];
        }""",
        trial,
    )
    tab.page.mouse.move(*place)
    tab.page.wait_for_selector(".hoverlayer .hovertext")
    hover = tab.page.locator(".hoverlayer .hovertext").first.text_content()
    assert "ρ_attn" in hover
    assert "KL per token" in hover
    tab.page.mouse.click(*place)
    tab.page.wait_for_function("byId('split').value === 'validation'")
    shown = tab.page.locator("#trial").input_value()
    answers = {row["answers"][shown] for row in contents.tried_answers}
    assert tab.page.locator("#rows .card:last-child .answer").first.inner_text() in answers


def test_the_table_of_all_trials_opens_their_answers_too(open_page: Open, text: str, contents: Contents) -> None:
    tab = open_page(text)
    _open_trials(tab)
    assert contents.study is not None
    rows = tab.page.locator("#trials-table tbody tr")
    assert rows.count() == len(contents.study.trials)
    tab.page.locator("#trials-table").get_by_role("button", name="KL per token").click()
    column = tab.page.locator("#trials-table td:nth-last-child(2)").all_inner_texts()
    numbers = [float(value) for value in column]
    assert numbers == sorted(numbers, reverse=True)
    rows.nth(3).get_by_role("button", name="Answers of").click()
    tab.page.wait_for_function("byId('split').value === 'validation'")


def test_a_keyboard_reaches_everything(open_page: Open, text: str) -> None:
    tab = open_page(text)
    tab.page.keyboard.press("Tab")
    assert tab.page.evaluate("document.activeElement.className") == "skip"
    tab.page.keyboard.press("Enter")
    assert tab.page.evaluate("document.activeElement.id") == "main"
    unnamed = tab.page.evaluate(
        """() => [...document.querySelectorAll("input, select, button")].filter((control) =>
          !(control.labels && control.labels.length)
          && !control.getAttribute("aria-label") && !control.textContent.trim()
        ).map((control) => control.outerHTML)"""
    )
    assert unnamed == []


def test_hostile_text_is_text(open_page: Open) -> None:
    hostile = make_contents(answer=lambda draw: HOSTILE, kind=HOSTILE, system=HOSTILE)
    tab = open_page(page_of(hostile))
    _chart(tab, "trade-off-chart")
    tab.page.locator("#diff").check()
    _open_trials(tab)
    tab.page.locator("#split").select_option("validation")
    tab.page.wait_for_function("byId('count').dataset.rows === '10'")
    shown = tab.page.locator("#rows .answer").first.text_content()
    assert shown is not None
    for part in ("<script>document.title='owned'</script>", "<img src=x", "␛[31mred", "‹U+202E›gnirts", "{{ 7 * 7 }}"):
        assert part in shown
    assert tab.page.title() == "tiny · Steer2Edit"
    assert tab.page.locator("#rows script, #rows img, #rows b, #rows a, #trade-off-chart a").count() == 0
    tab.page.evaluate(
        """() => {
          const chart = byId("trade-off-chart");
          const curveNumber = chart.data.findIndex((trace) => trace.name === "system prompt");
          Plotly.Fx.hover(chart, [{ curveNumber, pointNumber: 0 }]);
        }"""
    )
    hover = tab.page.locator(".hoverlayer .hovertext").first.text_content()
    assert hover is not None
    assert "<script>" in hover
    assert tab.page.title() == "tiny · Steer2Edit"


def test_an_answer_of_a_hundred_thousand_characters_opens_on_demand(open_page: Open) -> None:
    long = make_contents(12, 3, answer=lambda draw: "<i>x</i>" * 12_500)
    tab = open_page(page_of(long), width=390)
    button = tab.page.get_by_role("button", name="Show all 100,000 characters").first
    box = tab.page.locator("#rows .answer").first
    assert len(box.inner_text()) < 2_000
    button.click()
    assert len(box.text_content() or "") == 100_000
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_several_samples_stand_below_each_other(open_page: Open) -> None:
    tab = open_page(page_of(make_contents(12, 3, samples=3)))
    assert tab.page.locator("#rows article").first.locator(".card").first.locator(".answer").count() == 3


def test_a_run_with_nothing_opens_without_an_error(open_page: Open, contents: Contents) -> None:
    tab = open_page(page_of(Contents(contents.recipe, {"stages": {}}, contents.stages)))
    assert tab.page.locator("main > section").count() == 1


@pytest.mark.slow
def test_the_largest_run_opens_at_once(open_page: Open) -> None:
    tab = open_page(largest_page())
    assert tab.seconds <= OPENS_IN
    assert tab.page.locator("#count").get_attribute("data-rows") == "400"
    _open_trials(tab)
    assert tab.page.locator("#trials-table tbody tr").count() == 500
    tab.page.locator("#split").select_option("validation")
    tab.page.wait_for_function("byId('split').value === 'validation' && byId('trial').options.length > 10")
