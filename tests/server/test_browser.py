"""The pages of `refreekv serve` in a browser, used as a person would: the chat, which is llama.cpp's, and /cache.

Each test is skipped where there is no Chromium, those of the chat also where the build has no chat page (REFREEKV_UI).
The picture of the how-to guide is taken by

    REFREEKV_PICTURES=docs python -m pytest tests/server/test_browser.py -m model -k picture
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import browser
import openai
import pytest
from browser import Browser, Page
from serving import send, serving

from refreekv_cpp.document import FACT, QUESTION, SECRET, write_document

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium")

# where the tests were started; each of them runs in another folder
PICTURES = (folder := os.environ.get("REFREEKV_PICTURES")) and Path(folder).resolve()

QUIET = ["--log-verbosity", "1"]
BOX = "document.querySelector('textarea')"
FRAME = "document.querySelector('iframe').contentDocument"
MOST = 200  # tokens of an answer


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser.browser(tmp_path_factory.mktemp("chromium")) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def client(default_model: Path) -> Iterator[openai.OpenAI]:
    """Of a server whose answers have an end, and are the same each time."""
    options = ["--n-ctx", "4096", "--n-predict", str(MOST), "--temp", "0", "--no-library"]
    with serving(default_model, *options, *QUIET) as client:
        if not has_chat(client):
            pytest.skip("built without REFREEKV_UI")
        yield client


def address(client: openai.OpenAI, path: str = "/") -> str:
    return str(client.base_url).removesuffix("/v1/") + path


def has_chat(client: openai.OpenAI) -> bool:
    request = urllib.request.Request(address(client), headers={"Accept-Encoding": "gzip"})
    try:
        with urllib.request.urlopen(request) as answer:
            return str(answer.url) == address(client)  # else it was sent on to /cache
    except urllib.error.HTTPError as error:
        error.close()
        return False


def document(folder: Path, *, secret: str = SECRET, n_words: int = 700) -> Path:
    path = folder / f"{secret.replace(' ', '-')}.txt"
    text = write_document(n_words, lambda text: len(text.split()), facts=[(0.9, FACT)])
    path.write_text(text.replace(SECRET, secret))
    return path


def button(label: str, within: str = "document") -> str:
    """The last button of this name, as an expression."""
    buttons = f"[...{within}.querySelectorAll('button')]"
    return f"{buttons}.filter(b => b.ariaLabel === {label!r} || b.innerText.trim() === {label!r}).at(-1)"


def messages(who: str, within: str = "document") -> str:
    """What the "User" has written, or the "Assistant", as an expression."""
    return f"[...{within}.querySelectorAll('[aria-label=\"{who} message with actions\"]')]"


def begin(page: Page, text: str, *, box: str = BOX, within: str = "document") -> None:
    """Ask, and wait for the first words of the answer."""
    n_before = page.evaluate(f"{messages('Assistant', within)}.length")
    page.click(box)
    page.type(text)
    page.press("Enter", 13)
    page.wait_for(f"{messages('Assistant', within)}.length > {n_before}")
    page.wait_for(f"{button('Stop', within)} && /tokens/.test({messages('Assistant', within)}.at(-1).innerText)")


def ask(page: Page, text: str, *, within: str = "document") -> str:
    begin(page, text, box=f"{within}.querySelector('textarea')", within=within)
    page.wait_for(f"!{button('Stop', within)}")
    return last(page, within)


def last(page: Page, within: str = "document") -> str:
    """The last answer."""
    return str(page.evaluate(f"{messages('Assistant', within)}.at(-1).innerText"))


@pytest.mark.model
def test_a_conversation(client: openai.OpenAI, chromium: Browser, tmp_path: Path) -> None:
    """Drop a document, ask, stop, ask again, edit, and reload the page."""
    page = chromium.open(address(client))
    page.drop(BOX, document(tmp_path))
    page.wait_for("document.body.innerText.includes('silver-heron.txt')")

    begin(page, "Write a long story about these towns and ships.")
    page.click(button("Stop"))
    page.wait_for(f"!{button('Stop')}")
    assert f"{MOST} tokens" not in last(page)
    wait_until_idle(client, page)

    again = ask(page, QUESTION)
    assert page.evaluate(f"{messages('User')}.length") == 2

    page.click(button("Edit", f"{messages('User')}.at(-1)"))
    page.wait_for("document.activeElement.value?.includes('lighthouse')")
    page.evaluate("document.activeElement.select()")
    page.type("Say hello in five words.")
    page.press("Enter", 13)
    page.wait_for("document.body.innerText.includes('2/2')")
    page.wait_for(f"!{button('Stop')} && /tokens/.test({messages('Assistant')}.at(-1)?.innerText)")
    edited = last(page)
    assert edited != again

    page.reload()
    page.wait_for(f"{messages('Assistant')}.length === 2")
    assert last(page) == edited
    assert page.evaluate(f"{messages('User')}.at(-1).innerText").startswith("Say hello")
    ask(page, QUESTION)
    assert page.evaluate(f"{messages('Assistant')}.length") == 3


def wait_until_idle(client: openai.OpenAI, page: Page) -> None:
    page.wait_for(f"fetch('{address(client, '/slots')}').then(a => a.json()).then(s => !s.some(t => t.is_processing))")


@pytest.mark.model
def test_two_people_at_once(client: openai.OpenAI, chromium: Browser, tmp_path: Path) -> None:
    """Each asks about a document of their own."""
    secrets = ["silver heron", "golden anchor"]
    pages = []
    for secret in secrets:
        page = chromium.open(address(client))
        page.drop(BOX, document(tmp_path, secret=secret, n_words=150))
        page.wait_for(f"document.body.innerText.includes('{secret.replace(' ', '-')}.txt')")
        page.click(BOX)
        page.type(QUESTION)
        pages.append(page)
    for page in pages:
        page.press("Enter", 13)
    for page, mine, other in zip(pages, secrets, reversed(secrets), strict=True):
        page.wait_for(f"{messages('Assistant')}.length && !{button('Stop')}")
        page.wait_for(f"/tokens/.test({messages('Assistant')}.at(-1).innerText)")
        assert mine in last(page)
        assert other not in last(page)


@pytest.mark.model
def test_a_picture_of_both(client: openai.OpenAI, chromium: Browser, tmp_path: Path) -> None:
    page = chromium.open(address(client, "/cache"), height=1180)
    page.wait_for(f"document.querySelector('iframe') && {FRAME}.querySelector('textarea')")
    page.drop(f"{FRAME}.querySelector('textarea')", document(tmp_path))
    page.wait_for(f"{FRAME}.body.innerText.includes('silver-heron.txt')")
    ask(page, QUESTION, within=FRAME)
    page.wait_for("/ instead of /.test(document.body.innerText)")
    page.wait_for("/No request/.test(document.body.innerText)")
    # the bars move to their lengths
    page.wait_for("document.getAnimations().every(animation => animation.playState === 'finished')")
    path = (PICTURES or tmp_path) / "cache-page.png"
    page.picture(path)
    assert path.stat().st_size > 20_000


def test_the_cache_on_a_phone(tiny_model: Path, chromium: Browser) -> None:
    """All of it can be read without scrolling sideways, with small letters and in the dark."""
    with serving(tiny_model, "--n-ctx", "2048", "--threads", "1", *QUIET) as client:
        send(client, "/completion", {"prompt": "x" * 1500, "n_predict": 4, "ignore_eos": True})
        page = chromium.open(address(client, "/cache"), width=360, height=740, phone=True)
        page.wait_for("/% less memory/.test(document.body.innerText)")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate("Math.max(...[...document.querySelectorAll('section')].map(s => s.scrollWidth))") <= 360
        shown = page.text()
        for figure in (
            r"MiB instead of ",
            "On the disk",
            "Layer by layer",
            "tokens of answers a second",
            "once so far",
        ):
            assert figure in shown


def test_several_conversations_on_the_cache_page(tiny_model: Path, chromium: Browser) -> None:
    with serving(tiny_model, "--n-ctx", "2048", "--threads", "1", "--kv-policy", "streaming", *QUIET) as client:
        page = chromium.open(address(client, "/cache"))
        page.wait_for("/Nothing has been read yet/.test(document.body.innerText)")
        assert page.evaluate("document.querySelectorAll('iframe').length") == has_chat(client)
        for slot, char in enumerate("xyz"):
            send(client, "/completion", {"prompt": char * 700, "n_predict": 2, "id_slot": slot, "ignore_eos": True})
        page.wait_for("/^3 conversations with 2,1\\d\\d tokens/m.test(document.body.innerText)")
        assert page.evaluate("document.querySelectorAll('#layers .exact').length") == 4  # a column for each layer
        assert "not in the cache" in page.text()  # a policy without codes
        assert "exact entries for each token" in page.text()
