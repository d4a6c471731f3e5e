"""The page in a real browser: it streams, names who answered, keeps chats, and loads nothing from elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine.held import held
from server.family import Running, Start
from server.fields import prompts

from meswitch_cli.server.settings import ServerSettings
from meswitch_cli.server.webpage import FILES

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
#: How long is waited for what must come; a browser on a busy machine takes its time.
PATIENCE_MILLISECONDS = 120_000
#: What a new browser finds as its settings: a text that is drawn may end with its first token.
GREEDY = """if (localStorage.getItem("sampling") === null)
  localStorage.setItem("sampling", JSON.stringify({ temperature: "0", max_tokens: "40" }));"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright.expect.set_options(timeout=PATIENCE_MILLISECONDS)
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def new_page(browser: Any, **options: Any) -> Any:
    """A page of a browser that has seen none; closing its context closes it."""
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE_MILLISECONDS)
    context.add_init_script(GREEDY)
    return context.new_page()


@pytest.fixture
def page(browser: Any, routed: Running) -> Iterator[Any]:
    """The page, opened; a test fails where its console has an error or it asked another host."""
    opened = new_page(browser, viewport={"width": 1200, "height": 800})
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: None if request.url.startswith(routed.url) else complaints.append(request.url))
    opened.goto(routed.url)
    playwright.expect(opened.locator("#experts li")).to_have_count(3)
    yield opened
    opened.context.close()
    assert complaints == []


def ask(page: Any, text: str) -> Any:
    before = page.locator(".message.assistant").count()
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")
    answer = page.locator(".message.assistant").nth(before)
    playwright.expect(answer).not_to_have_class(re.compile("waiting"))
    playwright.expect(answer.locator(".figures")).to_be_attached()  # which is when it has been kept
    return answer


def test_a_routed_answer_says_who_and_how_sure(page: Any) -> None:
    answer = ask(page, prompts("green", 9)[7])
    playwright.expect(answer.locator(".who b")).to_have_text("green")
    playwright.expect(answer.locator(".who")).to_contain_text(re.compile(r"chosen by the router, [\d.]+ % sure"))
    bars = answer.locator(".bars progress")
    playwright.expect(bars).to_have_count(3)
    assert sum(float(bars.nth(i).evaluate("bar => bar.value")) for i in range(3)) == pytest.approx(1, abs=1e-3)
    assert answer.locator(".text").inner_text().strip()
    playwright.expect(page.locator("#prompt")).to_be_focused()
    playwright.expect(page.locator("#summary")).to_have_text("3 experts on base")


def test_a_prompt_of_no_field_shows_no_probabilities(page: Any) -> None:
    """They are among the experts: "no expert's field" above "green 99 %" would say two things."""
    answer = ask(page, "Which river is longer, the Nile or the Amazon?")
    playwright.expect(answer.locator(".who")).to_have_text("baseno expert's field, so the router's fallback answers")
    playwright.expect(answer.locator(".bars")).to_have_count(0)
    assert "%" not in answer.locator(".who").inner_text()


def test_an_expert_is_pinned_with_the_keyboard_alone(page: Any) -> None:
    button = page.locator("#experts .expert", has_text="blue")
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
    playwright.expect(page.locator("#history polyline")).to_have_count(1)
    routed.service.engine.pin_expert("red")
    playwright.expect(page.locator("#experts li", has_text="red")).to_contain_text("kept there")
    routed.service.engine.pin_expert("red", False)


def test_a_stopped_answer_is_kept(page: Any, routed: Running) -> None:
    page.locator("#model").select_option("base")
    page.locator("#prompt").fill("go on and on")
    with held(routed.service.engine, after=20):
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#send")).to_have_text("Stop")
        answer = page.locator(".message.assistant .text")
        playwright.expect(answer).not_to_be_empty()
        page.keyboard.press("Escape")
        playwright.expect(page.locator("#send")).to_have_text("Send")
    kept = answer.inner_text()
    playwright.expect(page.locator(".message.assistant .figures")).to_contain_text("stopped")
    page.reload()
    page.locator("#chats .chat").click()
    assert kept and page.locator(".message.assistant .text").inner_text() == kept
    page.locator("#clear").click()
    playwright.expect(page.locator(".message")).to_have_count(0)


def bodies(page: Any) -> list[dict[str, Any]]:
    """What is sent from now on to be answered, filled as it goes."""
    sent: list[dict[str, Any]] = []
    page.on("request", lambda request: "completions" in request.url and sent.append(json.loads(request.post_data)))
    return sent


def choose(page: Any, **settings: str) -> None:
    if page.locator("#settings").get_attribute("open") is None:
        page.locator("#settings summary").click()
    for name, value in settings.items():
        page.locator(f"#{name}").fill(value)


def short(page: Any) -> None:
    """A few tokens an answer, always the same."""
    choose(page, max_tokens="6", temperature="0")


def test_settings_are_sent_and_kept(page: Any) -> None:
    choose(page, max_tokens="", temperature="")
    sent = bodies(page)
    ask(page, prompts("red", 9)[2])
    assert not {"temperature", "top_p", "max_tokens", "seed"} & sent[0].keys()
    assert [turn["role"] for turn in sent[0]["messages"]] == ["user"]
    short(page)
    page.locator("#system").fill("Answer in verse.")
    page.locator("#top_p").fill("7")  # beyond its range: not sent
    page.reload()
    playwright.expect(page.locator("#changed")).to_have_text("4 changed")
    answer = ask(page, prompts("red", 9)[3])
    assert (sent[1]["max_tokens"], sent[1]["temperature"]) == (6, 0) and "top_p" not in sent[1]
    assert sent[1]["messages"][0] == {"role": "system", "content": "Answer in verse."}
    playwright.expect(answer.locator(".figures")).to_have_text(re.compile(r"^6 tokens, \d+\.\d tokens/s$"))


def test_again_and_edit(page: Any) -> None:
    short(page)
    ask(page, prompts("red", 9)[2])
    ask(page, prompts("red", 9)[4])
    sent = bodies(page)
    answers = page.locator(".message.assistant")
    page.locator(".message .tools button", has_text="Again").click()
    playwright.expect(answers.last.locator(".figures")).to_contain_text("6 tokens")
    assert answers.count() == 2 and [turn["role"] for turn in sent[0]["messages"]] == ["user", "assistant", "user"]
    page.locator(".message.user").first.locator("button", has_text="Edit").click()
    playwright.expect(page.locator("#prompt")).to_have_value(prompts("red", 9)[2])
    playwright.expect(page.locator("#replacing")).to_be_visible()
    page.locator("#prompt").fill(prompts("blue", 9)[2])
    page.keyboard.press("Enter")
    playwright.expect(answers.locator(".figures")).to_have_text([re.compile("6 tokens")])
    assert sent[1]["messages"] == [{"role": "user", "content": prompts("blue", 9)[2]}]
    playwright.expect(page.locator(".message.user .text")).to_have_text([prompts("blue", 9)[2]])


def test_two_experts_side_by_side_go_on_apart(page: Any) -> None:
    short(page)
    page.locator("#model").select_option("red")
    page.locator("#beside").select_option("blue")
    page.locator("#prompt").fill(prompts("red", 9)[2])
    page.keyboard.press("Enter")
    beside = page.locator(".answers.beside .message")
    playwright.expect(beside.locator(".figures")).to_have_text([re.compile(r"\d tokens")] * 2)
    playwright.expect(beside.locator(".who b")).to_have_text(["red", "blue"])
    sent = bodies(page)
    page.locator("#prompt").fill("and then?")
    page.keyboard.press("Enter")
    playwright.expect(beside.locator(".figures")).to_have_text([re.compile(r"\d tokens")] * 4)
    said = {body["model"]: body["messages"][1]["content"] for body in sent}
    assert set(said) == {"red", "blue"} and said["red"] != said["blue"]


def test_chats_survive_a_reload_and_can_be_exported_and_deleted(page: Any) -> None:
    short(page)
    ask(page, prompts("red", 9)[2])
    page.locator("#clear").click()
    ask(page, prompts("green", 9)[2])
    page.reload()
    chats = page.locator("#chats .chat")
    playwright.expect(chats).to_have_text([prompts("green", 9)[2], prompts("red", 9)[2]])
    chats.last.click()
    playwright.expect(page.locator(".message.user .text")).to_have_text([prompts("red", 9)[2]])
    playwright.expect(page.locator(".message.assistant .who b")).to_have_text(["red"])
    with page.expect_download() as download:
        page.locator("#export").click()
    exported = json.loads(Path(download.value.path()).read_text())
    assert [chat["turns"][0]["content"] for chat in exported] == [prompts("green", 9)[2], prompts("red", 9)[2]]
    page.locator("#chats li").last.locator("button", has_text="×").click()
    playwright.expect(chats).to_have_count(1)
    playwright.expect(page.locator(".message")).to_have_count(0)
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("#forget").click()
    playwright.expect(chats).to_have_count(0)
    page.reload()
    playwright.expect(page.locator("#chats-note")).to_have_text("Chats stay in this browser.")


MARKDOWN = {
    "a **b *c* d** `e*f*` ~~g~~": "<p>a <strong>b <em>c</em> d</strong> <code>e*f*</code> <del>g</del></p>",
    "# One\n\ntwo\nthree\n\n---": "<h3>One</h3><p>two\nthree</p><hr>",
    "- a\n- b\n  - c\n- d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>",
    "3. a\n4. b\n\nc": '<ol start="3"><li>a</li><li>b</li></ol><p>c</p>',
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "|a|b|\n|-|:-:|\n|1|2|": (
        '<div class="table"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
        "<tbody><tr><td>1</td><td>2</td></tr></tbody></table></div>"
    ),
    "[x](https://a.example/b_(c)) [y](javascript:alert)": (
        '<p><a href="https://a.example/b_(c)" target="_blank" rel="noopener noreferrer nofollow">x</a> '
        "[y](javascript:alert)</p>"
    ),
    "see https://a.example/b.": (
        '<p>see <a href="https://a.example/b" target="_blank" rel="noopener noreferrer nofollow">'
        "https://a.example/b</a>.</p>"
    ),
    "snake_case_name 2 * 3 * 4": "<p>snake_case_name 2 * 3 * 4</p>",
    "<b>&amp;<script>x</script>": "<p>&lt;b&gt;&amp;amp;&lt;script&gt;x&lt;/script&gt;</p>",
}


@pytest.mark.parametrize("text", list(MARKDOWN))
def test_markdown(page: Any, text: str) -> None:
    assert page.evaluate(_RENDER, text) == MARKDOWN[text]


def test_a_code_block_is_text_that_can_be_copied(page: Any) -> None:
    made = page.evaluate(_RENDER, "```python\nif a < b:\n\n    **c**\n```\nafter")
    assert '<pre tabindex="0"><code>if a &lt; b:\n\n    **c**</code></pre></div><p>after</p>' in made
    assert "<span>python</span>" in made and "<button" in made
    open_ended = page.evaluate(_RENDER, "```\nstill being written")
    assert "<code>still being written</code>" in open_ended


def test_markdown_of_any_kind_takes_no_time(page: Any) -> None:
    clock = page.context.new_cdp_session(page)
    clock.send("Performance.enable")

    def computed() -> float:
        """Seconds that the page's thread has been on a core, whatever else the machine does."""
        metrics = clock.send("Performance.getMetrics")["metrics"]
        return float(next(metric["value"] for metric in metrics if metric["name"] == "ThreadTime"))

    for text in ("*" * 50_000, "[" * 50_000, "> " * 5_000, "`a" * 9_000, "**a " * 4_500, "- " * 5_000, "|-" * 9_000):
        before = computed()
        page.evaluate(_RENDER_ONLY, text)
        assert computed() - before < 3, text[:10]


_RENDER_ONLY = """async text => {
  const { render } = await import("/page/markdown.js");
  render(text);
}"""
_OVERHANG = """async () => {
  const { render } = await import("/page/markdown.js");
  const code = "```\\n" + "a long line of code ".repeat(20) + "\\n```\\n";
  const wide = code + "|" + " column |".repeat(30) + "\\n" + "|-".repeat(30) + "|\\n";
  document.querySelector(".message.assistant .text").replaceChildren(render(wide));
  const messages = document.querySelector("#messages");
  return messages.scrollWidth - messages.clientWidth;
}"""
_RENDER = """async text => {
  const { render } = await import("/page/markdown.js");
  const box = document.createElement("div");
  box.append(render(text));
  return box.innerHTML;
}"""


def test_what_a_model_says_is_text(page: Any) -> None:
    """Whatever is typed or generated, it is shown, not run."""
    answer = ask(page, "<img src=x onerror=alert(1)><script>alert(2)</script>")
    assert answer.count() == 1
    assert page.locator(".message img, .message script").count() == 0
    assert "<script>" in page.locator(".message.user .text").inner_text()


@pytest.mark.parametrize("width", [360, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(browser: Any, routed: Running, scheme: str, width: int) -> None:
    page = new_page(browser, viewport={"width": width, "height": 640}, color_scheme=scheme, has_touch=True)
    page.goto(routed.url)
    ask(page, prompts("blue", 9)[7])
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    right = "(at) => Math.round(document.querySelector(at).getBoundingClientRect().right)"
    model, beside, compose = (page.evaluate(right, at) for at in ("#model", "#beside", ".compose"))
    assert model < beside == compose  # nothing empty stands beside the two
    assert page.evaluate(_OVERHANG) <= 0  # a wide block of code scrolls by itself; the answer keeps the screen's width
    page.locator("#chats-toggle").tap()
    playwright.expect(page.locator("#chats-panel")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    playwright.expect(page.locator("#panel")).to_be_hidden()
    page.locator("#toggle").tap()
    playwright.expect(page.locator("#panel")).to_be_visible()
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(value) for value in re.findall(r"\d+", ground)[:3]) / 3
    assert (light > 128) == (scheme == "light")
    page.context.close()


def test_the_page_asks_for_a_key_and_uses_it(browser: Any, start_server: Start) -> None:
    server = start_server(settings=ServerSettings(api_keys=("secret",)))
    page = new_page(browser)
    page.goto(server.url)
    playwright.expect(page.locator("#summary")).to_contain_text("API key is needed")
    page.locator("#key").fill("secret")
    page.locator("#key").press("Tab")
    playwright.expect(page.locator("#experts li")).to_have_count(3)
    page.context.close()


def test_experts_are_unloaded_and_loaded_with_an_admin_key(
    browser: Any, start_server: Start, experts_dir: Path
) -> None:
    settings = ServerSettings(admin_keys=("admin",), api_keys=("user",), experts_dir=experts_dir)
    server = start_server(settings=settings)
    page = new_page(browser)
    page.on("dialog", lambda dialog: dialog.accept())
    page.goto(server.url)
    page.locator("#key").fill("user")
    page.locator("#key").press("Tab")
    experts = page.locator("#experts li")
    playwright.expect(experts).to_have_count(3)
    page.locator("#changing").check()
    red = page.locator("#experts li", has_text="red")
    red.locator("button", has_text="Unload").click()
    playwright.expect(page.locator("#change-problem")).to_contain_text("admin key")
    page.locator("#key").fill("admin")
    page.locator("#key").press("Tab")
    red.locator("button", has_text="Keep").click()
    playwright.expect(red).to_contain_text("kept there")
    red.locator("button", has_text="Let go").click()
    playwright.expect(red).not_to_contain_text("kept there")
    red.locator("button", has_text="Unload").click()
    playwright.expect(experts).to_have_count(2)
    page.locator("#load-name").fill("crimson")
    page.locator("#load-path").fill("red")
    page.locator("#load-form button").click()
    playwright.expect(experts).to_have_count(3)
    playwright.expect(page.locator("#experts li", has_text="crimson")).to_be_visible()
    playwright.expect(page.locator("#change-problem")).to_be_empty()
    page.context.close()


def test_its_policy_lets_nothing_else_in(routed: Running) -> None:
    assert "/page/main.js" in FILES
    for path in FILES:
        response = routed.get(path)
        assert response.status_code == 200 and "default-src 'none'" in response.headers["content-security-policy"]
        assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?https?://", response.text)
