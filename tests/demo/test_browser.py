import shutil

import pytest

from modular_star_encoder.demo.serving import served
from modular_star_encoder.inference import PROFILE_NAME
from modular_star_encoder.search.index import CodeIndex
from tests.demo.conftest import HOSTILE_NAME
from tests.tiny import tiny_profile

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUESTION = "#question textarea, #question input"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright, which drives Chromium, is not installed"
    )
    with playwright.sync_playwright() as driver:
        # Containers run tests as root, where Chromium's sandbox refuses to start; it loads our own page alone.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(index, checkpoint, tmp_path_factory):
    """The page of an index at exits 1 and 4 whose checkpoint has a profile."""
    model = shutil.copytree(checkpoint, tmp_path_factory.mktemp("profiled") / "model")
    tiny_profile(index.settings.checksum).save(model / PROFILE_NAME)
    with served(CodeIndex.open(index.store), checkpoint=str(model)) as address:
        yield address


@pytest.fixture
def page(browser, address):
    """A freshly opened page; `asked_for` has the address of every request, `errors` the page's errors."""
    page = browser.new_page(viewport={"width": 1360, "height": 900})
    page.set_default_timeout(20_000)
    page.asked_for, page.errors = [], []
    page.on("request", lambda request: page.asked_for.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(address)
    page.wait_for_selector(QUESTION)
    yield page
    page.close()


def ask(page, question):
    page.fill(QUESTION, question)
    page.keyboard.press("Enter")
    page.wait_for_selector("#results-1 .mose-hit")


def test_two_exits_answer_the_slider_moves_and_nothing_but_loopback_is_asked(page, address, tmp_path):
    ask(page, "push an item")
    assert page.locator("#results-1 .mose-hit").count() == page.locator("#results-2 .mose-hit").count() == 5
    assert [page.inner_text(f"#results-{side} .mose-asked b") for side in (1, 2)] == ["exit 1", "exit 4"]
    assert page.inner_text("#exit-1 h2") == "Exit 1"
    assert page.locator("#exit-1 .mose-meter b").all_inner_texts() == ["1.2 ms", "101 MB", "1.1 M", "0.111"]
    assert page.locator("#exit-2 .mose-meter b").all_inner_texts() == ["4.9 ms", "104 MB", "4.4 M", "0.444"]
    assert page.locator("#results-1 .mose-code .k").count() > 0
    at_exit_4 = page.locator("#results-2 .mose-place").all_inner_texts()

    slider = page.locator("#exit-1 input[type=range]")
    slider.focus()
    slider.press("ArrowRight")
    page.wait_for_function("document.querySelector('#results-1 .mose-asked b').innerText === 'exit 4'")
    assert page.locator("#results-1 .mose-place").all_inner_texts() == at_exit_4
    page.wait_for_function("document.querySelector('#exit-1 h2').innerText === 'Exit 4'")

    picture = tmp_path / "page.png"
    page.screenshot(path=picture)
    assert picture.stat().st_size > 20_000
    assert (page.errors, len(page.asked_for) > 10) == ([], True)
    assert [url for url in page.asked_for if not url.startswith((address, "data:", "blob:"))] == []


def test_errors_are_sentences_hostile_code_runs_nothing_and_links_open_the_file(page):
    pattern = page.locator("input[placeholder^='all, or'], textarea[placeholder^='all, or']")
    pattern.fill("*.nothing")
    page.fill(QUESTION, "anything")
    page.keyboard.press("Enter")
    page.wait_for_selector("#results-2 .mose-note")
    assert "Nothing was found" in page.inner_text("#results-2")
    assert "Traceback" not in page.inner_text("body")
    page.fill(QUESTION, "")
    page.click("#search")
    page.wait_for_selector("#results-1 >> text=press Enter")

    pattern.fill("")
    ask(page, "render the page of a script")
    assert HOSTILE_NAME in page.inner_text("#results-1")
    assert "{{window.attacked=5}}" in page.inner_text("#results-1")
    assert page.evaluate("window.attacked") is None
    link = page.locator("#results-1 a", has_text=HOSTILE_NAME).first
    with page.context.expect_page() as opened:
        link.click()
    source = opened.value
    assert "<script>window.attacked = 2</script>" in source.inner_text(".hll >> nth=1")
    assert [source.evaluate(f"window.{name}") for name in ("attacked", "opener")] == [None, None]


def test_on_a_phone_nothing_is_wider_than_the_screen_and_the_exits_are_one_below_the_other(page):
    page.set_viewport_size({"width": 390, "height": 844})
    ask(page, "push an item")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    first, second = (page.locator(f"#results-{side}").bounding_box() for side in (1, 2))
    assert second["y"] > first["y"] + first["height"]
    assert min(first["width"], second["width"]) > 300
