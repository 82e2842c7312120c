"""The page of a report in a real browser: both languages, both sets of colours, on a phone, and without scripts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from experiment import report
from tests.unit.experiment.folders import make_folder, make_plan, write_kv

ENGLISH, CHINESE = "At concurrency 2 vLLM made 2.00 times", "并发 2 时"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = make_folder(tmp_path_factory.mktemp("run"), make_plan(levels=[1, 2], repeats=2))
    write_kv(folder)
    report.write(folder)
    return (folder / "report.html").as_uri()


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Any]:
    pages = []

    def one(**options: Any) -> Page:
        page = browser.new_context(offline=True, **options).new_page()
        page.goto(address)
        pages.append(page)
        return page

    yield one
    for page in pages:
        page.context.close()


def background(page: Page) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


@pytest.mark.parametrize(("locale", "shown", "hidden"), [("en-GB", ENGLISH, CHINESE), ("zh-CN", CHINESE, ENGLISH)])
def test_a_reader_meets_the_language_of_the_browser(visit: Any, locale: str, shown: str, hidden: str) -> None:
    page = visit(locale=locale)
    expect(page.get_by_text(shown).first).to_be_visible()
    expect(page.get_by_text(hidden).first).to_be_hidden()


def test_the_language_can_be_switched_without_scripts(visit: Any) -> None:
    page = visit(locale="zh-CN", java_script_enabled=False)
    expect(page.get_by_text(ENGLISH).first).to_be_visible()
    page.get_by_text("中文", exact=True).click()
    expect(page.get_by_text(CHINESE).first).to_be_visible()
    expect(page.get_by_text(ENGLISH).first).to_be_hidden()


def test_colours_follow_the_system_until_they_are_chosen(visit: Any) -> None:
    page = visit(color_scheme="dark")
    dark = background(page)
    page.get_by_text("☀").click()
    light = background(page)
    assert dark != light == background(visit(color_scheme="light"))
    page.get_by_text("☾").click()
    assert background(page) == dark


@pytest.mark.parametrize("locale", ["en-GB", "zh-CN"])
@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_no_width_of_a_screen_scrolls_sideways(visit: Any, width: int, locale: str) -> None:
    page = visit(viewport={"width": width, "height": 800}, locale=locale)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    charts = page.locator("main:visible figure svg:visible")
    assert charts.count() >= 11
    for place in range(charts.count()):
        box = charts.nth(place).bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> str:
    names = ("sequential", "batch", "batch-static", "continuous")
    targets = [{"name": name, "kind": "hf"} for name in names] + [{"name": "vllm", "kind": "vllm"}]
    plan = make_plan(targets=targets, levels=[1, 16], repeats=2)
    folder = make_folder(tmp_path_factory.mktemp("five"), plan, speed=lambda cell: 0.01 + 0.007 * cell.index)
    report.write(folder)
    return (folder / "report.html").as_uri()


@pytest.mark.parametrize("locale", ["en-GB", "zh-CN"])
def test_the_tables_of_five_servers_fit_on_a_screen_and_lie_apart_on_paper(
    browser: Browser, five: str, locale: str
) -> None:
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 800}, locale=locale)
    page = context.new_page()
    page.goto(five)
    boxes = page.locator("main:visible .levels > div")
    assert boxes.count() == 2
    assert boxes.evaluate_all("all => all.map((one) => one.scrollWidth - one.clientWidth)") == [0, 0]
    page.set_viewport_size({"width": 760, "height": 800})
    page.emulate_media(media="print")
    tables = page.locator("main:visible .levels table").evaluate_all(
        "all => all.map((one) => one.getBoundingClientRect()).map((box) => [box.left, box.right, box.top, box.bottom])"
    )
    (_, _, _, end), (_, _, start, _) = tables
    assert end <= start
    assert all(left >= 0 and right <= 760 for left, right, _, _ in tables)
    context.close()


def test_all_cells_are_printed(visit: Any, tmp_path: Path) -> None:
    page = visit()
    assert page.locator("main[lang=en] details[open]").count() == 0
    page.pdf(path=tmp_path / "report.pdf")
    assert page.locator("main[lang=en] details[open]").count() == 1
