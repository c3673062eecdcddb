"""The chat page in a real Chromium: talking, editing, stopping; Markdown is never trusted; light, dark and phone."""

import json
import os
import shutil

import pytest

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on PATH")

ANSWER = """**Bold**, `code`, and a [link](javascript:alert(1)).

```python
def f(x): return x
```

| a | b |
|---|---|
| 1 | 2 |

<img src="https://example.org/x.png" onerror="alert(1)"><script>window.owned = true</script>
![picture](https://example.org/y.png)
"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        sandbox = [] if os.getuid() else ["--no-sandbox"]  # Chromium refuses to sandbox root
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, port):
    """The page, opened. Its errors, and requests to other hosts, fail the test."""
    context = browser.new_context(viewport={"width": 1100, "height": 750})
    page, problems = context.new_page(), []

    def read_console(message):
        if message.type == "error" and "the server responded with a status of 400" not in message.text:
            problems.append(message.text)

    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", read_console)
    page.on("request", lambda request: problems.append(request.url) if "127.0.0.1" not in request.url else None)
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("header option", state="attached")
    yield page
    context.close()
    assert problems == []


def ask(page, text, tokens=8):
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill(str(tokens))
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Close").click()
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def test_a_conversation(page):
    ask(page, "First question")
    page.wait_for_selector("text=/8 tokens, .* tokens\\/s/")
    assert "Cut: the limit of tokens" in page.locator("article.answer").inner_text()
    first = page.locator("article.answer .prose").inner_text()
    page.get_by_role("button", name="Retry").click()
    page.wait_for_selector("text=/8 tokens, .* tokens\\/s/")
    assert page.locator("article.answer .prose").inner_text() == first  # at temperature 0
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("Another question")
    page.get_by_role("button", name="Send").first.click()
    page.wait_for_selector("text=/8 tokens, .* tokens\\/s/")
    assert page.locator("article.user .text").all_inner_texts() == ["Another question"]
    page.reload()
    assert page.locator("article.user .text").all_inner_texts() == ["Another question"]
    assert page.locator("article.answer").count() == 1
    page.keyboard.press("Control+Shift+O")
    assert page.locator("article").count() == 0
    page.get_by_role("button", name="Another question", exact=True).click()
    assert page.locator("article").count() == 2
    page.get_by_role("button", name="Delete Another question").click()
    assert page.locator("article").count() == 0


SLOW = """
const plain = window.fetch;
const slow = { async transform(chunk, out) { await new Promise((go) => setTimeout(go, 1000)); out.enqueue(chunk); } };
window.fetch = async (...request) => {
  const answer = await plain(...request);
  return new Response(answer.body.pipeThrough(new TransformStream(slow)), answer);
};
"""


def test_an_answer_is_stopped(page):
    page.add_init_script(SLOW)  # the tiny model would be done before the key is pressed, on a busy machine too
    page.reload()
    page.wait_for_selector("header option", state="attached")
    ask(page, "A long one", tokens=900)
    page.get_by_role("button", name="Stop").wait_for()
    page.keyboard.press("Escape")
    page.wait_for_selector("text=Stopped.")
    page.get_by_role("button", name="Send", exact=True).wait_for()


def test_errors_are_told(page):
    ask(page, "word " * 3000)
    page.wait_for_selector("article.answer .problem")
    assert "context" in page.locator("article.answer .problem").inner_text()


@pytest.fixture
def answered(page):
    """The page with a kept conversation whose answer is ANSWER."""
    messages = [{"role": "user", "content": "<b>Hi</b>"}, {"role": "assistant", "content": ANSWER, "state": "done"}]
    kept = {"id": "kept", "title": "Kept", "changed": 1, "messages": messages}
    page.evaluate("(kept) => localStorage.setItem('rkf.conversation.kept', kept)", json.dumps(kept))
    page.reload()
    page.wait_for_selector("article.answer table")
    return page


def test_markdown_is_not_trusted(answered):
    assert answered.locator("article.user .text").inner_text() == "<b>Hi</b>"
    prose = answered.locator("article.answer .prose")
    assert prose.locator("strong").inner_text() == "Bold"
    assert prose.locator(".hljs-keyword").first.inner_text() == "def"
    assert prose.locator("td").all_inner_texts() == ["1", "2"]
    assert prose.locator("img, script").count() == 0
    assert answered.evaluate("window.owned") is None
    assert prose.locator("a").first.get_attribute("href") is None  # javascript: is dropped
    assert "<script>" in prose.inner_text()  # shown as text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast(answered, scheme):
    answered.emulate_media(color_scheme=scheme)
    text, back = answered.evaluate(
        "() => { const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]; }"
    )
    assert (luminance(text) > luminance(back)) == (scheme == "dark")
    high, low = sorted((luminance(text), luminance(back)), reverse=True)
    assert (high + 0.05) / (low + 0.05) > 7  # WCAG's enhanced contrast


def luminance(colour):
    """The relative luminance of rgb(r, g, b), as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in colour[4:-1].split(",")]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_phone(answered):
    answered.set_viewport_size({"width": 360, "height": 740})
    assert answered.evaluate("document.documentElement.scrollWidth") == 360
    assert not answered.get_by_role("navigation", name="Chats").is_visible()
    answered.get_by_role("button", name="Chats", exact=True).click()
    answered.get_by_role("navigation", name="Chats").get_by_role("button", name="Kept", exact=True).click()
    answered.get_by_label("Message", exact=True).wait_for()


def test_every_control_has_a_name(answered):
    """As a screen reader tells it."""
    answered.get_by_role("button", name="Settings").click()
    unnamed = answered.evaluate(
        """() => [...document.querySelectorAll("button, select, textarea, input")]
          .filter((node) => !(node.innerText || node.getAttribute("aria-label") || node.labels?.length))
          .map((node) => node.outerHTML)"""
    )
    assert unnamed == []
