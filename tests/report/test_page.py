"""report.html in a real Chromium: it loads clean, sorts, fits a phone, prints, and runs nothing that a row brings."""

import base64
import html.parser
import re
import shutil
from collections.abc import Iterator

import pytest
from tests.report.reports import HOSTILE, rich

from luthier.report.page import page
from luthier.report.word_difference import marked


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium with its driver (Debian: apt install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    except Exception as error:
        pytest.skip(f"Chromium does not start here: {error}")
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page(rich()), encoding="utf-8")
    found.get(file.as_uri())
    yield found
    found.quit()


def show(browser, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme_feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme_feature)


def test_it_loads_without_a_word_on_the_console_and_runs_no_script_of_a_row(browser) -> None:
    assert browser.get_log("browser") == []
    assert browser.title == "both: 8 tunings compared"
    assert browser.execute_script("return document.scripts.length") == 1
    assert browser.execute_script("return document.images.length") == 0
    asked = "return performance.getEntriesByType('resource').filter((one) => !one.name.startsWith('data:')).length"
    assert browser.execute_script(asked) == 0, "the page must need nothing from elsewhere"
    assert HOSTILE in browser.execute_script("return document.querySelector('.answer').textContent")


def test_a_column_sorts_by_its_numbers_with_the_keyboard_too(browser) -> None:
    from selenium.webdriver.common.keys import Keys

    def column(place: int) -> list[str]:
        rows = "[...document.querySelectorAll('table.tunings tbody tr')]"
        return browser.execute_script(f"return {rows}.map((row) => row.cells[{place}].dataset.value)")

    heads = browser.find_elements("css selector", "table.tunings thead th")
    trained = next(place for place, head in enumerate(heads) if head.text.startswith("trained"))
    button = heads[trained].find_element("css selector", "button")
    for way, order in (("descending", -1), ("ascending", 1)):
        button.send_keys(Keys.ENTER)
        assert heads[trained].get_attribute("aria-sort") == way
        numbers = [float(one) for one in column(trained) if one]
        assert numbers == sorted(numbers, key=lambda one: order * one) and len(numbers) == 8
        assert column(trained)[-1] == "", "the humans have no such number and stay last"
    heads[0].find_element("css selector", "button").click()
    assert column(0) == sorted(column(0), key=str.lower, reverse=True)
    assert heads[trained].get_attribute("aria-sort") is None


@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_is_wider_than_the_screen(browser, width: int) -> None:
    show(browser, width)
    browser.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # What is wide scrolls in a box of its own, which the keyboard reaches.
    wide = "return [...document.querySelectorAll('body *')].filter((one) => one.getBoundingClientRect().right > innerWidth + 1"
    assert (
        browser.execute_script(f"{wide} && !one.closest('.scroll, pre')).map((one) => one.outerHTML.slice(0, 90))")
        == []
    )
    boxes = "return [...document.querySelectorAll('.scroll')].every((one) => one.tabIndex === 0 && one.ariaLabel)"
    assert browser.execute_script(boxes)


def test_every_chart_says_its_numbers_and_tells_tunings_apart_without_colour(browser) -> None:
    charts = browser.find_elements("css selector", "svg.chart")
    assert len(charts) == 2 + 4 + 3  # metrics, costs, curves
    for chart in charts:
        assert chart.get_attribute("role") == "img"
        label = chart.get_attribute("aria-label")
        assert all(name in label for name in ("r2", "r8", "r64", "houlsby", "full"))
        assert chart.find_element("css selector", "desc").get_attribute("textContent") in label
    for legend in browser.find_elements("css selector", ".legend"):
        drawn = [one.get_attribute("innerHTML") for one in legend.find_elements("css selector", ".sample")]
        assert len({re.sub(r"\bs\d ", "", one) for one in drawn}) == len(drawn) >= 6


def test_the_heat_map_says_in_words_what_it_shades(browser) -> None:
    cells = browser.find_elements("css selector", "table.forgetting td")
    assert cells
    for cell in cells:
        lost = "lost" in cell.get_attribute("class")
        if "\u25bc" in cell.text:
            assert lost
        if "\u25b2" in cell.text:
            assert not lost
        assert " to " in cell.text and "\u2192" in cell.text
    assert {"\u25bc"} <= set("".join(cell.text for cell in cells)), "more loss is worse, less accuracy too"


def luminance(colour: str) -> float:
    parts = [int(one) / 255 for one in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_dark_and_light_differ_and_both_can_be_read(browser) -> None:
    style = "const all = getComputedStyle(document.querySelector(arguments[0])); return [all.color, all.backgroundColor, all.fill]"
    papers = set()
    for scheme in ("light", "dark"):
        show(browser, 1280, scheme)
        ink, paper, _ = browser.execute_script(style, "body")
        papers.add(paper)
        assert contrast(ink, paper) > 7
        assert contrast(browser.execute_script(style, ".dim")[0], paper) > 4.5
        assert contrast(browser.execute_script(style, "ins")[0], paper) > 4.5
        for place in range(6):
            assert contrast(browser.execute_script(style, f".bar.s{place}")[2], paper) > 3, (scheme, place)
        for cell in browser.find_elements("css selector", "[class*=strength]"):
            shade = cell.value_of_css_property("background-color").replace("rgba", "rgb")
            assert contrast(cell.value_of_css_property("color"), shade) > 4.5
    assert len(papers) == 2


def test_examples_are_chosen_one_by_one_and_what_is_lacking_is_shown_when_asked(browser) -> None:
    visible = "return [...document.querySelectorAll('#side-by-side > article')].map((one) => !one.hidden)"
    assert browser.execute_script(visible) == [True, False, False]
    buttons = browser.find_elements("css selector", ".chooser button")
    browser.execute_script("arguments[0].click()", buttons[1])
    assert browser.execute_script(visible) == [False, True, False]
    lacking = "return getComputedStyle(document.querySelector('#side-by-side del')).display"
    assert browser.execute_script(lacking) == "none"
    browser.execute_script("document.querySelector('#lacking').click()")
    assert browser.execute_script(lacking) == "inline"


def test_it_prints(browser) -> None:
    done = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    assert base64.b64decode(done["data"]).startswith(b"%PDF-")


class Text(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)


def test_without_a_browser_too_no_row_becomes_markup() -> None:
    reader = Text()
    reader.feed(page(rich()))
    assert reader.tags.count("script") == 1 and "img" not in reader.tags
    assert "taken'</script>" not in page(rich())


def test_a_section_without_data_is_absent() -> None:
    bare = rich(("zero_shot", "one_shot")).model_copy(
        update={"retention": [], "audit": [], "examples": [], "regressions": [], "comparisons": [], "human": {}}
    )
    shown = page(bare)
    for heading in ("Learning", "Forgetting", "Warnings", "Side by side", "Worst rows", "Pairs", "Disk", "The mixture"):
        assert f">{heading}" not in shown, heading
        assert f">{heading}" in page(rich()) or heading == "Pairs"


@pytest.mark.parametrize(
    ("answer", "references", "written"),
    [
        ("The cat sat.", ["the cat lay"], "The cat <ins>sat.</ins> <del>lay</del>"),
        ("b c", ["x y z", "a b c d"], "<del>a</del> b c <del>d</del>"),
        ("<b>", ["&"], "<ins>&lt;b&gt;</ins> <del>&amp;</del>"),
        ("", ["gone"], "<del>gone</del>"),
        ("free", [], "free"),
        ("a x a", ["a a"], "a <ins>x</ins> a"),
        ("one two", ["one two"], "one two"),
    ],
)
def test_words_that_differ_are_marked(answer: str, references: list[str], written: str) -> None:
    assert marked(answer, references) == written


def test_ten_thousand_words_are_marked() -> None:
    words = " ".join(f"w{n % 999}" for n in range(10_000))
    assert marked(words, [words]) == words


def test_the_memory_chart_says_what_was_planned_and_measured() -> None:
    planned = {"weights": 500_000_000, "gradients": 0, "activations": 250_000_000}
    report = rich()
    one = report.tunings["r8"].model_copy(update={"planned": planned})
    drawn = page(report.model_copy(update={"tunings": {**report.tunings, "r8": one}}))
    assert "r8 weights 500.0 MB, activations 250.0 MB; measured 1.0 GB" in drawn
    assert "Memory by part" not in page(report)
