"""The page in a real browser: it streams, names who answered, pins, polls, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meswitch_cli.server.settings import ServerSettings

from .conftest import Family, Running, Start, start
from .test_routing import prompts, router, trained  # noqa: F401 - fixtures

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def routed(family: Family, router: Any) -> Iterator[Running]:  # noqa: F811
    server = start(family, router=router)
    yield server
    server.stop()


@pytest.fixture
def page(browser: Any, routed: Running) -> Iterator[Any]:
    """The page, opened; a test fails where its console has an error or it asked another host."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: None if request.url.startswith(routed.url) else complaints.append(request.url))
    opened.goto(routed.url)
    playwright.expect(opened.locator("#experts li")).to_have_count(3)
    yield opened
    context.close()
    assert complaints == []


def ask(page: Any, text: str) -> Any:
    before = page.locator(".message.assistant").count()
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")
    answer = page.locator(".message.assistant").nth(before)
    playwright.expect(answer).not_to_have_class(re.compile("waiting"), timeout=30_000)
    return answer


def test_a_routed_answer_says_who_and_how_sure(page: Any) -> None:
    answer = ask(page, prompts("green", 9)[7])
    playwright.expect(answer.locator(".who b")).to_have_text("green")
    playwright.expect(answer.locator(".who")).to_contain_text(re.compile(r"chosen by the router, \d+ % sure"))
    bars = answer.locator(".bars progress")
    playwright.expect(bars).to_have_count(3)
    assert sum(float(bars.nth(i).evaluate("bar => bar.value")) for i in range(3)) == pytest.approx(1, abs=1e-3)
    assert answer.locator(".text").inner_text().strip()
    playwright.expect(page.locator("#prompt")).to_be_focused()
    playwright.expect(page.locator("#summary")).to_have_text("3 experts on base")


def test_an_expert_is_pinned_with_the_keyboard_alone(page: Any) -> None:
    button = page.locator("#experts button", has_text="blue")
    button.focus()
    page.keyboard.press("Enter")
    playwright.expect(button).to_have_attribute("aria-pressed", "true")
    playwright.expect(page.locator("#model")).to_have_value("blue")
    answer = ask(page, prompts("red", 9)[7])
    playwright.expect(button).to_have_attribute("aria-pressed", "true")
    playwright.expect(answer.locator(".who")).to_have_text("bluepinned by you")
    playwright.expect(answer.locator(".bars")).to_have_count(0)
    button.click()
    playwright.expect(page.locator("#model")).to_have_value("auto")


def test_load_and_residency_are_live(page: Any, routed: Running) -> None:
    playwright.expect(page.locator("#slots")).to_have_text("3/3")
    playwright.expect(page.locator("#experts li").first).to_contain_text("on the device, slot")
    before = routed.get("/v1/status").json()["completion_tokens"]
    ask(page, prompts("red", 9)[1])
    assert routed.get("/v1/status").json()["completion_tokens"] > before
    playwright.expect(page.locator("#history polyline")).to_have_count(1, timeout=10_000)
    routed.service.engine.pin_expert("red")
    playwright.expect(page.locator("#experts li", has_text="red")).to_contain_text("kept there", timeout=10_000)
    routed.service.engine.pin_expert("red", False)


def test_a_stream_can_be_stopped(page: Any, routed: Running) -> None:
    page.locator("#model").select_option("base")
    page.locator("#prompt").fill("go on and on")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#send")).to_have_text("Stop")
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#send")).to_have_text("Send", timeout=10_000)
    page.locator("#clear").click()
    playwright.expect(page.locator(".message")).to_have_count(0)


def test_what_a_model_says_is_text(page: Any) -> None:
    """Whatever is typed or generated, it is shown, not run."""
    answer = ask(page, "<img src=x onerror=alert(1)><script>alert(2)</script>")
    assert answer.count() == 1
    assert page.locator(".message img, .message script").count() == 0
    assert "<script>" in page.locator(".message.user .text").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser: Any, routed: Running, scheme: str, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 640}, color_scheme=scheme, has_touch=True)
    page = context.new_page()
    page.goto(routed.url)
    ask(page, prompts("blue", 9)[7])
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    playwright.expect(page.locator("#panel")).to_be_hidden()
    page.locator("#toggle").tap()
    playwright.expect(page.locator("#panel")).to_be_visible()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(value) for value in re.findall(r"\d+", ground)[:3]) / 3
    assert (light > 128) == (scheme == "light")
    context.close()


def test_the_page_asks_for_a_key_and_uses_it(browser: Any, start_server: Start) -> None:
    server = start_server(settings=ServerSettings(api_keys=("secret",)))
    page = browser.new_page()
    page.goto(server.url)
    playwright.expect(page.locator("#summary")).to_contain_text("API key is needed")
    page.locator("#key").fill("secret")
    page.locator("#key").press("Tab")
    playwright.expect(page.locator("#experts li")).to_have_count(3, timeout=10_000)
    page.close()


def test_its_policy_lets_nothing_else_in(routed: Running) -> None:
    for path in ("/", "/page/style.css", "/page/chat.js", "/favicon.ico"):
        response = routed.get(path)
        assert response.status_code == 200 and "default-src 'none'" in response.headers["content-security-policy"]
        assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?https?://", response.text)
