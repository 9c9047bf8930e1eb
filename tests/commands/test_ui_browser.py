"""`mavis ui` in a browser, with the real SmolLM2: what a visitor does and sees; makes the pictures of docs/images.

Runs where gradio, playwright and a Chromium are (`make test-ui`); `MAVIS_SCREENSHOTS=FOLDER` keeps the pictures.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("gradio", reason="the page needs the extra ui: pip install 'mavis-logits[ui]'")
playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    pytest.skip("no Chromium: apt-get install chromium", allow_module_level=True)

QUESTION = "How do I make good tea?"
DESKTOP, PHONE = (1280, 1220), (390, 844)
ENDED = "#status .done, #status .stopped, #status .failed"
WAIT = 300_000  # ms; an answer on a busy machine
TOKENS = "nodes => nodes.map(node => node.firstChild.textContent).join('')"  # without their cards
SMALL = 200_000  # bytes of a picture


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    from mavis_logits.commands.ui.engine import Engines, known_choices
    from mavis_logits.commands.ui.page import Page
    from mavis_logits.commands.ui.settings import Choice

    own = Choice("smollm2")
    engines = Engines()
    try:
        engines.get(own)
    except ImportError as error:
        pytest.skip(str(error))
    page = Page(engines, known_choices(own), open_choice=True)
    page.launch("127.0.0.1", None)
    yield page
    page.blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


Visit = Callable[..., Any]


@pytest.fixture
def visit(browser: Any, page: Any) -> Iterator[Visit]:
    """Opens the page as another visitor each time."""
    contexts = []

    def opened(size: tuple[int, int] = DESKTOP) -> Any:
        small = size == PHONE
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, has_touch=small, is_mobile=small,
            permissions=["clipboard-read", "clipboard-write"],
        )  # fmt: skip
        contexts.append(context)
        tab = context.new_page()
        tab.failures = []
        tab.on("pageerror", lambda error: tab.failures.append(str(error)))
        tab.hosts = set()
        tab.on("request", lambda request: tab.hosts.add(request.url.split("/")[2]))
        tab.goto(page.url)
        tab.wait_for_selector("#status .ready")
        return tab

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture
def shoot(tmp_path: Path) -> Callable[..., None]:
    folder = Path(os.environ.get("MAVIS_SCREENSHOTS", tmp_path))

    def shot(tab: Any, name: str, **part: Any) -> None:
        path = folder / f"{name}.png"
        tab.wait_for_timeout(500)
        tab.screenshot(path=path, **part)
        assert path.stat().st_size < SMALL

    return shot


def ask(tab: Any, question: str = QUESTION) -> None:
    tab.fill("#prompt textarea", question)
    tab.press("#prompt textarea", "Enter")
    tab.wait_for_selector("#status .busy")


def answered(tab: Any) -> tuple[str, str]:
    """The unsteered and the steered text, once both are there."""
    tab.wait_for_selector(ENDED, timeout=WAIT)
    steered = tab.eval_on_selector_all("#steered .token", TOKENS)
    assert tab.failures == []
    return tab.inner_text("#unsteered .text"), steered


def shift(tab: Any, objective: str, key: str) -> None:
    """Move an objective's slider to an end, by keyboard."""
    labels = tab.locator("[id^=weight-] label:visible, [id^=weight-] .head:visible").all_inner_texts()
    names = [label.split("\n")[0].strip() for label in labels if label.strip()]
    tab.focus(f"#weight-{list(dict.fromkeys(names)).index(objective)} input[type=range]")
    tab.keyboard.press(key)


def number(tab: Any, name: str, value: str) -> None:
    tab.fill(f"#{name} input[type=number]", value)
    tab.keyboard.press("Tab")


def test_a_moved_slider_gives_another_answer(visit: Visit, shoot: Callable[..., None]) -> None:
    tab = visit()
    ask(tab)
    unsteered, funny = answered(tab)
    assert "Done: " in tab.inner_text("#status")
    assert unsteered != funny
    tab.evaluate("window.scrollTo(0, 0)")
    shoot(tab, "ui-humour")
    shift(tab, "humour", "Home")
    shift(tab, "formal", "End")
    tab.click("#send")
    tab.wait_for_selector("#status .busy")
    again, formal = answered(tab)
    assert again == unsteered
    assert len({unsteered, funny, formal}) == 3
    tab.evaluate("window.scrollTo(0, 0)")
    shoot(tab, "ui-formal")
    assert tab.locator("#plot g.latest").count() == 6
    assert tab.hosts == {tab.url.split("/")[2]}  # nothing is loaded from elsewhere

    strengths = "nodes => nodes.map(node => Number(node.style.getPropertyValue('--t')))"
    tilts = tab.eval_on_selector_all("#steered .token", strengths)
    most = f"#steered .token >> nth={tilts.index(max(tilts))}"
    tab.hover(most)
    card = tab.inner_text(f"{most} >> .card")
    assert all(word in card for word in ("before", "after", "helpful", "formal", "step KL"))
    shoot(tab, "ui-token", clip={"x": 400, "y": 400, "width": 880, "height": 820})

    tab.get_by_role("tab", name="History").click()
    tab.click("#history tbody tr:nth-child(2)")
    tab.wait_for_function(f"text => ({TOKENS})([...document.querySelectorAll('#steered .token')]) == text", arg=funny)
    assert answered(tab) == (unsteered, funny)


def test_the_page_fits_a_phone(visit: Visit, shoot: Callable[..., None]) -> None:
    tab = visit(PHONE)
    widths = "[document.documentElement.scrollWidth, window.innerWidth]"
    assert tab.evaluate(widths) == [390, 390]
    for name, key in (("ui-phone-humour", None), ("ui-phone-formal", "End")):
        if key:
            shift(tab, "humour", "Home")
            shift(tab, "formal", key)
        ask(tab)
        answered(tab)
        tab.evaluate("window.scrollTo(0, document.querySelector('#status').offsetTop - 10)")
        shoot(tab, name)
    for part in ("History", "Code", "Model", "Trade-off"):
        tab.get_by_role("tab", name=part).click()
        tab.wait_for_timeout(300)
        assert tab.evaluate(widths) == [390, 390], part
    tab.tap("#steered .token >> nth=2")
    box = tab.locator("#steered .token >> nth=2 >> .card").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    assert tab.evaluate(widths) == [390, 390]


def test_escape_stops_an_answer_and_the_next_one_goes_on(visit: Visit, page: Any) -> None:
    tab = visit()
    number(tab, "length", "400")
    ask(tab)
    tab.wait_for_selector("#steered .token", timeout=WAIT)
    (both,) = page.running.values()
    both = list(both)
    tab.keyboard.press("Escape")
    _, text = answered(tab)
    assert "Stopped: " in tab.inner_text("#status")
    assert text
    assert page.running == {}
    assert all(answer.state != "writing" and len(answer.ids) < 400 for answer in both)
    number(tab, "length", "8")
    ask(tab)
    answered(tab)
    assert "Done: 8 tokens" in tab.inner_text("#status")


def test_two_visitors_at_once_get_their_own(visit: Visit) -> None:
    """Each gets what the copied curl command, run alone afterwards, gives."""
    tabs = [visit(), visit()]
    for tab, name in zip(tabs, ("#preset-0", "#preset-1"), strict=True):
        number(tab, "length", "16")
        tab.click(name)
    tab_questions = (QUESTION, "Tell me about the moon.")
    for tab, question in zip(tabs, tab_questions, strict=True):
        ask(tab, question)
    texts = [answered(tab)[1] for tab in tabs]
    assert texts[0] != texts[1]
    for tab, text in zip(tabs, texts, strict=True):
        tab.get_by_role("tab", name="Code").click()
        tab.bring_to_front()
        tab.click("#copy-curl")
        tab.wait_for_function("document.querySelector('#copy-curl').textContent == 'Copied'")
        copied = tab.evaluate("navigator.clipboard.readText()")
        done = subprocess.run(["bash", "-c", copied], capture_output=True, text=True, check=True, timeout=WAIT / 1000)
        assert text.strip()[:30] in done.stdout, done


def test_a_third_visitor_waits_is_told_so_and_may_stop(visit: Visit) -> None:
    tabs = [visit() for _ in range(3)]
    for tab in tabs[:2]:
        number(tab, "length", "400")
        ask(tab)
        tab.wait_for_selector("#steered .token", timeout=WAIT)
    ask(tabs[2])
    assert "Waiting for a turn" in tabs[2].inner_text("#status")
    tabs[2].click("#stop")
    for tab in tabs[:2]:
        tab.click("#stop")
        answered(tab)
    tabs[2].wait_for_selector("#status .stopped", timeout=WAIT)
    assert "Stopped before it began" in tabs[2].inner_text("#status")


def test_a_closed_tab_ends_its_answer(visit: Visit, page: Any) -> None:
    tab = visit()
    number(tab, "length", "400")
    ask(tab)
    tab.wait_for_selector("#steered .token", timeout=WAIT)
    (both,) = page.running.values()
    both = list(both)
    tab.close()
    end = time.monotonic() + 60
    while any(answer.state == "writing" for answer in both) and time.monotonic() < end:
        time.sleep(0.2)
    assert [answer.state for answer in both] == ["stopped", "stopped"]
    assert all(len(answer.ids) < 400 for answer in both)


def test_what_is_wrong_is_told_on_the_page(visit: Visit, capfd: pytest.CaptureFixture[str]) -> None:
    tab = visit()
    tab.click("#send")
    tab.wait_for_selector("#status .failed")
    assert "no question yet" in tab.inner_text("#status")
    tab.fill("#seed input", "-4")
    tab.keyboard.press("Tab")
    tab.fill("#prompt textarea", QUESTION)
    tab.press("#prompt textarea", "Enter")
    tab.wait_for_function("document.querySelector('#status').textContent.includes('seed')")
    assert "got -4" in tab.inner_text("#status")
    tab.get_by_role("tab", name="Model").click()
    tab.fill("#values input", "./nowhere")
    tab.keyboard.press("Enter")
    tab.click("#load")
    tab.wait_for_function(
        "document.querySelector('#status').textContent.includes('goes on with smollm2')", timeout=WAIT
    )
    assert "nowhere" in tab.inner_text("#status .failed")
    assert "Traceback" not in capfd.readouterr().err


def test_other_value_functions_bring_other_sliders(visit: Visit) -> None:
    tab = visit()
    tab.get_by_role("tab", name="Model").click()
    tab.fill("#values input", "model_cards/smollm2-135m-policy-helpful")
    tab.keyboard.press("Enter")
    tab.click("#load")
    tab.wait_for_function("document.querySelector('#status').textContent.includes('policy-helpful')", timeout=WAIT)
    tab.wait_for_selector("#status .ready", timeout=WAIT)
    assert tab.locator("[id^=weight-]:visible").count() == 1
    assert tab.locator("#presets button:visible").all_inner_texts() == ["none"]
    number(tab, "length", "8")
    ask(tab)
    unsteered, steered = answered(tab)
    assert "Done: " in tab.inner_text("#status")
    assert unsteered
    assert steered
