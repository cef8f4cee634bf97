"""The page of a study in a real headless browser: opens quietly, filters by group and by name, hovers, zooms, sorts."""

import shutil

import pytest

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)  # fmt: skip
ARGUMENTS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")

SHOWN = """place => document.getElementById(place).data.filter(t => t.visible !== false && t.meta.cell !== undefined).map(t => t.meta.cell)"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS.split())
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Opens the report in a folder at a width; the page collects its console messages and requests as `problems`."""
    pages = []

    def open_(root, width=1600):
        page = browser.new_page(viewport={"width": width, "height": 900})
        pages.append(page)
        page.problems = []
        page.on("console", lambda message: page.problems.append(message.text))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        inside = ("file:", "data:", "blob:")
        page.on("request", lambda sent: None if sent.url.startswith(inside) else page.problems.append(sent.url))
        page.goto((root / "report.html").as_uri())
        page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
        return page

    yield open_
    for page in pages:
        page.close()


@pytest.mark.parametrize("width", [400, 1600])
def test_it_opens_quietly_and_fits_the_window(opened, study, grid, width):
    for root in (study, grid):
        page = opened(root, width)
        assert page.problems == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('.main-svg'))")
        places = page.evaluate(
            "[...document.querySelectorAll('.plot')].map(plot => plot.getBoundingClientRect().width)"
        )
        assert min(places) > 250
        height = page.evaluate("Math.max(...[...document.querySelectorAll('.plot')].map(p => p.getBoundingClientRect().height))")  # fmt: skip
        assert height < 600


def test_a_number_stands_beside_each_name_even_on_a_narrow_screen(opened, grid):
    page = opened(grid, 400)
    box = page.locator("#cells tbody tr").first.locator("td").nth(1).bounding_box()
    assert box["x"] + box["width"] <= 400


def test_the_filter_hides_a_group_everywhere(opened, study):
    page = opened(study)
    rows = page.locator("tr[data-group=adamw]:visible")
    assert rows.count() > 0
    page.locator("#controls input[value=adamw]").uncheck()
    assert rows.count() == 0
    assert set(page.evaluate(SHOWN, "curves")) == {"muon_baseline", "muon_low"}
    assert set(page.evaluate(SHOWN, "pareto")) == {"muon_baseline", "muon_low"}
    page.locator("#controls input[value=adamw]").check()
    assert rows.count() > 0
    assert page.problems == []


def test_the_search_leaves_the_cells_whose_name_has_every_word(opened, grid):
    page = opened(grid)
    wanted = {"lr=0.0625 momentum=0.875 steps=4"}
    page.locator("#search").fill("steps=4 momentum=0.875 LR=0.0625")
    other = '#cells tr[data-cell="lr=0.125 momentum=0.875 steps=4"]'
    page.wait_for_selector(other, state="hidden")
    assert set(page.evaluate(SHOWN, "curves")) == wanted
    assert (
        set(page.locator("#runs tr[data-cell]:visible").evaluate_all("rows => rows.map(r => r.dataset.cell)")) == wanted
    )
    page.locator("#search").fill("")
    page.wait_for_selector(other, state="visible")
    assert len(set(page.evaluate(SHOWN, "curves"))) == 18
    assert page.problems == []


def test_the_axis_switches_to_tokens_and_seconds(opened, study):
    page = opened(study)
    last = "Math.max(...document.getElementById('curves').data.map(t => t.x[t.x.length - 1]))"
    assert page.evaluate(last) == 100
    page.locator("#controls input[value=tokens]").check()
    assert page.evaluate(last) == 204_800
    page.locator("#controls input[value=seconds]").check()
    assert page.evaluate(last) == pytest.approx(11.0)
    assert page.problems == []


def test_hover_names_the_cell_and_dragging_zooms(opened, grid):
    page = opened(grid)
    plot = page.locator("#sensitivity-0")
    plot.scroll_into_view_if_needed()
    where = page.evaluate(
        """() => {
          const plot = document.getElementById("sensitivity-0"), trace = plot.data.find((t) => t.mode === "lines+markers");
          const box = plot.getBoundingClientRect(), {xaxis, yaxis} = plot._fullLayout;
          return [box.x + xaxis._offset + xaxis.d2p(trace.x[1]), box.y + yaxis._offset + yaxis.d2p(trace.y[1])];
        }"""
    )
    page.mouse.move(*where, steps=5)
    page.wait_for_selector("#sensitivity-0 .hoverlayer .hovertext", timeout=3000)
    assert "lr=0.0625" in page.locator("#sensitivity-0 .hoverlayer").text_content()
    curves = page.locator("#curves")
    curves.scroll_into_view_if_needed()
    box = curves.bounding_box()
    ranges = "document.getElementById('curves')._fullLayout.xaxis.range"
    before = page.evaluate(ranges)
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.6 * box["height"], steps=8)
    page.mouse.up()
    page.wait_for_timeout(500)
    after = page.evaluate(ranges)
    assert before[0] < after[0] < after[1] < before[1]
    assert page.problems == []


def test_a_click_on_a_heading_sorts_the_cells(opened, study):
    page = opened(study)
    table = page.locator("#cells table.sortable").first
    table.locator("th", has_text="training").click()
    names = table.locator("tbody tr").evaluate_all("rows => rows.map(row => row.dataset.cell)")
    assert names.index("adam_baseline") < names.index("muon_low") < names.index("muon_baseline")  # 8, 10 and 11 s
