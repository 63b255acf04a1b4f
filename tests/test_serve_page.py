"""The page of `moelet serve` in a real Chromium: a prompt typed, tokens seen to arrive, layers switched, two runs side
by side. What needs no browser is tested without: colours, and that nothing a model says can become HTML.
"""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import SHAPES, Server

from moelet import serve

HERE = Path(serve.__file__).parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# what each kind of colour vision makes of linear RGB: Machado, Oliveira and Fernandes 2009, at full severity
VISION = {
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
# OKLab: Ottosson 2020
TO_CONES = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
TO_LAB = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
          [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip


def linear(color: str) -> np.ndarray:
    """Return "#rrggbb" as linear RGB, 0 to 1."""
    values = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def test_colours_are_told_apart_by_every_kind_of_colour_vision() -> None:
    css = (HERE / "page.css").read_text()
    tints = np.array([linear(color) for color in re.findall(r"\.c\d \{ --tint: (#\w+)", css)])
    assert len(tints) == 8
    for name, matrix in VISION.items():
        lab = np.cbrt((tints @ np.transpose(matrix)).clip(0, 1) @ np.transpose(TO_CONES)) @ np.transpose(TO_LAB)
        apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(8, 1)]
        assert apart.min() > 0.1, name  # 0.02 is about the least that is seen at all
    ink = linear(re.findall(r"--on: (#\w+)", css)[0])
    luminance = [0.2126, 0.7152, 0.0722]
    assert ((tints @ luminance + 0.05) / (ink @ luminance + 0.05)).min() > 4.5  # WCAG's AA


def test_nothing_comes_from_outside_or_becomes_html() -> None:
    script, page, css = ((HERE / f"page.{kind}").read_text() for kind in ("js", "html", "css"))
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(|setHTML|srcdoc", script
    )
    assert "style=" not in page and not re.search(r"\son\w+=", page) and page.count("<script") == 1
    assert not [text for text in (script, page, css) if re.search(r"(https?:)?//\w", text.replace("// ", ""))]


# in the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium (chromium, chromium-browser, google-chrome) on this machine")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM)
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, served: Server) -> Iterator[Any]:
    """The page, loaded. At the end: no error was shown in the console, and nothing asked for but from the server."""
    opened, said, asked = browser.new_page(viewport={"width": 1200, "height": 900}), [], []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(served.url)
    opened.wait_for_selector(".pane")
    yield opened
    opened.close()
    assert all(url.startswith((served.url, "data:")) for url in asked) and len(asked) > 3
    assert [
        text for text in said if "status of 413" not in text
    ] == []  # Chromium tells of every answer that is an error


NEW = ".shaded span[data-token]:not(.given)"  # what the model wrote


def write(page: Any, prompt: str, tokens: int, seed: int = 3) -> None:
    page.fill("#prompt", prompt)
    page.fill("#tokens", str(tokens))
    page.fill("#seed", str(seed))
    page.click("#go")


def settle(page: Any) -> None:
    page.wait_for_selector("#go:not([hidden])", timeout=60_000)


def pane(page: Any, name: str) -> Any:
    return page.locator(".pane").filter(has=page.locator("h2", has_text=name))


def shades(page: Any, name: str) -> list[tuple[str, str]]:
    """Return each span's expert and the colour that it is seen in."""
    spans = pane(page, name).locator(NEW)
    pairs = spans.evaluate_all("all => all.map(x => [x.dataset.expert, getComputedStyle(x).backgroundColor])")
    return [tuple(pair) for pair in pairs]


def test_a_prompt_is_typed_and_tokens_arrive(page: Any, served: Server) -> None:
    page.keyboard.type("def run(self):")  # the page opens with the cursor in the prompt
    page.fill("#tokens", "50000")
    page.keyboard.press("Tab")
    page.click("#go")
    tokens = pane(page, "quick").locator(NEW)
    tokens.first.wait_for(state="attached", timeout=30_000)
    before = tokens.count()
    tokens.nth(before + 20).wait_for(state="attached", timeout=30_000)
    given = pane(page, "quick").locator(".shaded .given").all_text_contents()
    assert "".join(given) == "def run(self):" and len(given) > 3
    page.click("#stop")
    settle(page)
    assert "stopped" in pane(page, "quick").locator(".shaded").text_content()
    left = time.monotonic()
    while served.busy() != (0, 0):
        assert time.monotonic() - left < 5


def test_layers_change_the_colours(page: Any, served: Server) -> None:
    write(page, "import os", 30)
    settle(page)
    told = served.complete(
        model="quick", prompt="import os", max_tokens=30, temperature=0.8, top_k=50, seed=3, routing=True
    )
    seen = []
    for layer in range(2):
        page.locator("#layers button").nth(layer).click()
        seen.append(shades(page, "quick"))
        token_ids = pane(page, "quick").locator(NEW)
        first = {str(token["experts"][layer][0][0]) for token in told["moelet"]["tokens"]}
        assert {expert for expert, _ in seen[-1]} == first and token_ids.count() >= 30
        legend = pane(page, "quick").locator(".load button")
        colors = legend.locator("b").evaluate_all("all => all.map(x => getComputedStyle(x).backgroundColor)")
        assert all(color == colors[int(expert)] for expert, color in seen[-1])
        loads = [float(text) for text in legend.locator("em").all_text_contents()]
        counts = [0] * SHAPES["quick"].get("n_experts", 4)
        for token in [*told["moelet"]["prompt"], *told["moelet"]["tokens"]]:
            for expert, _ in token["experts"][layer]:
                counts[expert] += 1
        assert loads == pytest.approx([4 * count / sum(counts) for count in counts], abs=0.006)
    assert len({color for _, color in seen[0]}) > 1
    assert [color for _, color in seen[0]] != [color for _, color in seen[1]]


def test_pointing_and_arrow_keys_tell_of_alternatives(page: Any) -> None:
    write(page, "x = ", 12)
    settle(page)
    text = pane(page, "plain").locator(".shaded")
    text.locator("span[data-token]").nth(6).hover()
    card = page.locator("#card")
    assert card.is_visible() and card.locator(".row").count() in (8, 9) and card.locator(".chosen").count() == 1
    shares = [float(p.removesuffix(" %")) for p in card.locator(".row em").all_text_contents()]
    assert shares[:8] == sorted(shares[:8], reverse=True) and sum(shares[:8]) <= 101
    page.mouse.move(5, 5)
    assert not card.is_visible()
    text.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowRight"):
        page.keyboard.press(key)
    assert card.is_visible() and text.locator(".current").first.get_attribute("data-token") == "1"
    page.keyboard.press("Escape")
    assert not card.is_visible()
    expert = pane(page, "plain").locator(".load button").nth(1)
    expert.click()
    assert expert.get_attribute("aria-pressed") == "true"
    others = text.locator("span[data-token].dim")
    assert 0 < others.count() < text.locator("span[data-token]").count()


def test_two_runs_side_by_side(page: Any) -> None:
    write(page, "class A", 25)
    settle(page)
    texts = [pane(page, name).locator(".shaded").text_content() for name in SHAPES]
    assert all(text.startswith("class A") and len(text) > 20 for text in texts) and texts[0] != texts[1]
    page.get_by_role("radio", name="plain").click()
    assert pane(page, "plain").is_visible() and not pane(page, "quick").is_visible()
    write(page, "def f", 5)
    settle(page)
    assert pane(page, "plain").locator(".shaded").text_content().startswith("def f")
    assert pane(page, "quick").locator(".shaded").text_content() == texts[0]
    page.get_by_role("radio", name="side by side").click()
    assert pane(page, "quick").is_visible()


EVIL = '<img src=x onerror="window.harmed=1"><script>window.harmed=2</script>&amp;\n"\u202e'


def test_what_a_model_says_is_text(page: Any) -> None:
    token = {
        "id": 9,
        "text": EVIL,
        "piece": EVIL,
        "p": 0.5,
        "likely": [[9, EVIL, 0.5]],
        "experts": [[[0, 1.0]], [[1, 1.0]]],
    }
    choice = {"index": 0, "text": EVIL, "moelet": {"prompt": [], "tokens": [token], "ended": "stop"}}
    answer = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/completions", lambda route: route.fulfill(content_type="text/event-stream", body=answer))
    write(page, "x", 5)
    settle(page)
    shown = pane(page, "quick").locator(".shaded")
    assert EVIL in shown.text_content()
    shown.locator("span").first.hover()
    assert "<img" in page.locator("#card").text_content()
    assert page.locator("img, .pane script").count() == 0 and page.evaluate("window.harmed") is None


def test_a_refusal_is_told(page: Any) -> None:
    write(page, "word " * 300, 5)
    settle(page)
    assert "context is 64" in page.locator("#told").text_content()


def test_the_token_of_the_address_is_sent_and_hidden(browser: Any, served: Server) -> None:
    page, keys = browser.new_page(), []
    page.on("request", lambda request: keys.append((request.url, request.headers.get("authorization"))))
    page.goto(f"{served.url}/#token=0123456789abcdef")
    page.wait_for_selector(".pane")
    assert (f"{served.url}/v1/models", "Bearer 0123456789abcdef") in keys
    assert not [url for url, _ in keys if "0123456789" in url] and "0123456789" not in page.url
    page.close()
