"""The page in a real headless browser: opens without network and without console errors, filter, axis and hover work."""

import json
import shutil

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
ARGUMENTS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser, comparison, request):
    page = browser.new_page(viewport={"width": getattr(request, "param", 1600), "height": 900})
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on(
        "request",
        lambda sent: None if sent.url.startswith(("file:", "data:", "blob:")) else page.problems.append(sent.url),
    )
    page.goto((comparison / "report.html").as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
    yield page
    page.close()


@pytest.mark.parametrize("page", [400, 1600], indirect=True)
def test_it_opens_quietly_and_fits_the_window(page):
    assert page.problems == []
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    assert page.locator("h2").first.inner_text() == "muon is better than adamw here."
    assert page.evaluate("[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('.main-svg'))")


def test_the_filter_hides_an_optimizer_everywhere(page):
    rows = page.locator("tr[data-group=adamw]:visible")
    shown = "[...document.querySelectorAll('.plot')].map(plot => plot.data.filter(t => t.visible !== false).map(t => t.meta.group)).flat()"
    assert rows.count() > 0
    assert "adamw" in page.evaluate(shown)
    page.locator("#controls input[value=adamw]").uncheck()
    assert rows.count() == 0
    assert set(page.evaluate(shown)) == {"muon"}
    page.locator("#controls input[value=adamw]").check()
    assert rows.count() > 0
    assert page.problems == []


def test_the_axis_switches_to_tokens_and_seconds(page, comparison):
    summary = json.loads((comparison / "comparison_summary.json").read_text())
    tokens = summary["budget"]["updates"] * summary["budget"]["tokens_per_update"]
    last = "Math.max(...document.getElementById('curves').data.map(t => t.x[t.x.length - 1]))"
    assert page.evaluate(last) == summary["budget"]["updates"]
    page.locator("#controls input[value=tokens]").check()
    assert page.evaluate(last) == tokens
    page.locator("#controls input[value=seconds]").check()
    assert page.evaluate(last) == pytest.approx(0.11 * summary["budget"]["updates"])
    assert page.problems == []


def test_hover_shows_the_trial(page):
    plot = page.locator("#sensitivity")
    plot.scroll_into_view_if_needed()
    where = page.evaluate(
        """() => {
          const plot = document.getElementById("sensitivity"), trace = plot.data.find((t) => t.name === "muon");
          const box = plot.getBoundingClientRect(), {xaxis, yaxis} = plot._fullLayout;
          return [box.x + xaxis._offset + xaxis.d2p(trace.x[1]), box.y + yaxis._offset + yaxis.d2p(trace.y[1])];
        }"""
    )
    page.mouse.move(*where, steps=5)
    page.wait_for_selector("#sensitivity .hoverlayer .hovertext", timeout=3000)
    assert "muon" in page.locator("#sensitivity .hoverlayer").text_content()


def test_a_click_on_a_heading_sorts_the_table(page):
    table = page.locator("table.sortable").first
    table.locator("th", has_text="report loss").click()
    losses = [float(text) for text in table.locator("tbody td:nth-child(3)").all_inner_texts()]
    assert losses == sorted(losses)
    table.locator("th", has_text="report loss").click()
    assert [float(text) for text in table.locator("tbody td:nth-child(3)").all_inner_texts()] == sorted(
        losses, reverse=True
    )
