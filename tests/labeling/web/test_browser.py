"""The pages in a real browser: everything entered by keys, mouse and finger is what the store holds in the end."""

from __future__ import annotations

import http.server
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rlhf_cli.data.records import Candidates, Message
from rlhf_cli.labeling.label_records import LabelRecord
from rlhf_cli.labeling.session import LabelSession
from rlhf_cli.labeling.session_types import LabelPlan
from rlhf_cli.labeling.web.links import Links
from tests.labeling.web import web_support
from tests.labeling.web.web_support import make_store, numbered_items, served

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATH = next((found for name in BROWSERS if (found := shutil.which(name))), None)
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}}
Tiers = list[set[str]]

pytestmark = pytest.mark.skipif(PATH is None, reason=f"no browser is installed: none of {', '.join(BROWSERS)}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        rules = "MAP rebound.example 127.0.0.1"
        options = ["--no-sandbox", "--disable-gpu", f"--host-resolver-rules={rules}"]
        started = driver.chromium.launch(executable_path=PATH, args=options)
        yield started
        started.close()


@contextmanager
def opened(browser: Browser, link: str, **options: Any) -> Iterator[Page]:
    """A page of its own that has to stay without errors and ask nobody but its server."""
    context = browser.new_context(**DESKTOP | options)
    context.set_default_timeout(8000)
    page = context.new_page()
    trouble: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(link)
    try:
        yield page
    finally:
        context.close()
    own = re.match(r"http://[^/]+/", link)
    assert own is not None
    assert [url for url in asked if not url.startswith((own[0], "blob:"))] == []
    assert trouble == []


def shown_answers(page: Page) -> dict[str, str]:
    """Letter -> text of the answers on the page."""
    return dict(
        page.evaluate(
            "[...document.querySelectorAll('.answer')].map(card => "
            "[card.querySelector('.badge').textContent.toLowerCase(), card.querySelector('.text').textContent])"
        )
    )


def title(page: Page) -> str:
    return page.locator("h1:visible").inner_text().lower()


def wait_for_next(page: Page, before: str) -> None:
    page.wait_for_function(
        "before => !document.body.classList.contains('busy') && "
        "[...document.querySelectorAll('h1')].find(h => h.offsetParent).textContent.toLowerCase() !== before",
        arg=before,
    )


def given(labels: list[LabelRecord], annotator: str) -> dict[str, tuple[str, Tiers]]:
    """Prompt -> what an annotator said of it, by texts."""
    return {
        str(label.prompt): (
            label.outcome,
            [{label.completions[index] for index in tier} for tier in label.tiers],
        )
        for label in labels
        if label.annotator == annotator
    }


def read_labels(store: Path) -> list[LabelRecord]:
    session = LabelSession(store)
    labels = session.labels()
    session.close()
    return labels


def some_tiers(rng: random.Random, letters: list[str]) -> list[list[str]]:
    """An order of the letters with ties."""
    rng.shuffle(letters)
    tiers: list[list[str]] = []
    for letter in letters:
        if tiers and rng.random() < 0.3:
            tiers[-1].append(letter)
        else:
            tiers.append([letter])
    return tiers


def type_tiers(page: Page, tiers: list[list[str]]) -> None:
    for tier in tiers:
        page.keyboard.type("=".join(tier))


def centre(page: Page, selector: str) -> tuple[float, float]:
    box = page.locator(selector).first.bounding_box()
    assert box is not None
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def drag(page: Page, position: int, target: str) -> None:
    """Drag an answer's chip, by what is under the mouse while it moves."""
    x, y = centre(page, f".chip[data-position='{position}']")
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 9, y)
    page.mouse.move(*centre(page, target), steps=2)
    page.mouse.up()


def drag_tiers(page: Page, tiers: list[list[str]]) -> None:
    """Build an order from its worst tier upwards, so that places between and ties are both needed."""
    for tier in reversed(tiers):
        drag(page, "abcd".index(tier[0]), "[data-drop='gap:0']")
        for letter in tier[1:]:
            drag(page, "abcd".index(letter), "[data-drop='tier:0']")


class Labeller:
    """Somebody at the page who remembers what they said."""

    def __init__(self, page: Page, name: str, enter: Callable[[Page, list[list[str]]], None]) -> None:
        self.page, self.name, self.enter = page, name, enter
        self.rng = random.Random(name)
        self.said: dict[str, tuple[str, Tiers]] = {}

    def prompt(self) -> str:
        return self.page.locator("#prompt").inner_text()

    def rank(self, submit: Callable[[], None]) -> None:
        before, prompt, texts = title(self.page), self.prompt(), shown_answers(self.page)
        tiers = some_tiers(self.rng, list(texts))
        self.enter(self.page, tiers)
        submit()
        wait_for_next(self.page, before)
        self.said[prompt] = ("ranked", [{texts[letter] for letter in tier} for tier in tiers])

    def pass_on(self, how: str, act: Callable[[], None]) -> None:
        before, prompt = title(self.page), self.prompt()
        act()
        wait_for_next(self.page, before)
        self.said[prompt] = (how, [])


def test_twenty_items_by_keys_and_by_mouse_come_out_as_they_were_entered(browser: Browser, tmp_path: Path) -> None:
    plan = LabelPlan(overlap=2, set_aside_after=3, guidelines="# Be fair\n\n- ties are fine")
    store = make_store(tmp_path / "labels.sqlite", numbered_items(20), plan)
    with served(store, ["Ada", "Ben"]) as links:
        with opened(browser, links.annotators["Ada"]) as page:
            page.wait_for_selector("#help-dialog[open]")  # the guidelines, before the first label
            assert "Be fair" in page.locator("#guidelines").inner_text()
            page.keyboard.press("Escape")
            ada = by_keys(page)
            assert page.locator("#message-title").inner_text() == "Nothing is left for you"
        with opened(browser, links.annotators["Ben"]) as page:
            page.locator("#help-close").click()
            ben = by_mouse(page)
    labels = read_labels(store)
    assert given(labels, "Ada") == ada
    assert given(labels, "Ben") == ben
    assert len(ada) == len(ben) == 20
    assert [label.reason for label in labels if label.outcome == "flagged"] == ["cut <b>off</b>"]
    assert [label.note for label in labels if label.note] == ["a note\nof s and u"]


def by_keys(page: Page) -> dict[str, tuple[str, Tiers]]:
    keys = page.keyboard
    ada = Labeller(page, "Ada", type_tiers)

    def enter() -> None:
        keys.press("Enter")

    for _ in range(4):
        ada.rank(enter)
    ada.pass_on("skipped", lambda: keys.press("s"))
    ada.rank(enter)
    # Goes back twice, over the skip, and says something else.
    for _ in range(2):
        before = title(page)
        keys.press("u")
        wait_for_next(page, before)
    assert ada.said[ada.prompt()] == ("skipped", [])
    ada.rank(enter)
    assert page.locator(".pool .chip").count() == 0  # the one after it has what it was given before
    for _ in range(4):
        keys.press("Backspace")
    ada.rank(enter)
    # What was begun is there again after going back in the middle of it.
    keys.type("c=a")
    before = title(page)
    keys.press("u")
    wait_for_next(page, before)
    last = title(page)
    keys.press("Enter")
    wait_for_next(page, last)
    assert title(page) == before
    assert page.locator(".tier .chip").count() == 2
    keys.press("Backspace")
    keys.press("Backspace")
    # Reloads half way.
    keys.type("b=d")
    page.locator("#saved", has_text="draft saved").wait_for()
    before, texts = title(page), shown_answers(page)
    page.reload()
    page.wait_for_selector("#task:visible")
    assert title(page) == before
    assert page.locator(".tier").all_inner_texts()[0].split()[:2] == ["1", "B"]
    keys.type("zaqc")  # z and q are no answers
    prompt = ada.prompt()
    keys.press("Enter")
    wait_for_next(page, before)
    ada.said[prompt] = ("ranked", [{texts["b"], texts["d"]}, {texts["a"]}, {texts["c"]}])
    # Not whole: says so and stays.
    before = title(page)
    keys.type("ca")
    keys.press("Enter")
    assert page.locator("#problem").inner_text() == "B, D have no place yet."
    assert title(page) == before
    keys.press("Backspace")
    keys.press("Backspace")
    # A note, in which letters are letters.
    keys.press("n")
    keys.type("a note\nof s and u")
    keys.press("Escape")
    while page.locator("#task").is_visible():
        ada.rank(enter)
    return ada.said


def by_mouse(page: Page) -> dict[str, tuple[str, Tiers]]:
    ben = Labeller(page, "Ben", drag_tiers)

    def submit() -> None:
        page.locator("#submit").click()

    ben.rank(submit)
    ben.pass_on("skipped", lambda: page.locator("#skip").click())

    def flag() -> None:
        page.locator("#flag").click()
        page.locator("#reason").fill("cut <b>off</b>")
        page.locator("#flag-send").click()

    ben.pass_on("flagged", flag)
    ben.rank(submit)
    before = title(page)
    page.locator("#undo").click()
    wait_for_next(page, before)
    for position in range(4):
        drag(page, position, "#pool")
    ben.rank(submit)
    while page.locator("#task").is_visible():
        ben.rank(submit)
    return ben.said


HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>",
    "\x1b[31mred\x1b]0;title\x07 \u202egnp.exe\u202c \u2066hidden\u2069 \u200bzero\r\nnext\x00",
    "</div></main><style>body { display: none }</style><a href='javascript:alert(1)'>click</a>",
    "```python\nprint('<b>code</b>')\n```\nafter {{ 7 * 7 }}",
)


def test_hostile_texts_show_as_text_and_do_nothing(browser: Browser, tmp_path: Path) -> None:
    prompt = (Message("<i>user</i>\u202e", HOSTILE[0]), Message("assistant", HOSTILE[1]), Message("user", HOSTILE[2]))
    plan = LabelPlan(guidelines=f"# {HOSTILE[0]}\n\n- {HOSTILE[1]}\n\n{HOSTILE[2]}")
    store = make_store(tmp_path / "labels.sqlite", [Candidates(prompt, HOSTILE)], plan)
    name = "<u>Eve</u> & 'co'"
    with served(store, [name]) as links:
        with opened(browser, links.annotators[name]) as page:
            page.wait_for_selector("#help-dialog[open]")
            assert HOSTILE[0] in page.locator("#guidelines").inner_text()
            page.keyboard.press("Escape")
            shown = sorted(shown_answers(page).values())
            visible = "ESC[31mredESC]0;titleBEL U+202Egnp.exeU+202C U+2066hiddenU+2069 U+200Bzero\nnextNUL"
            assert shown == sorted((HOSTILE[0], visible, HOSTILE[2], HOSTILE[3]))
            assert page.locator("#who").inner_text() == name
            assert page.locator(".role").first.inner_text() == "<i>user</i>U+202E"
            assert page.locator("main img, main script, main style, main a, main i, main u").count() == 0
            page.keyboard.press("f")
            page.locator("#reason").fill(HOSTILE[2] + HOSTILE[1][:5])
            page.keyboard.press("Enter")
            page.wait_for_selector("#message:visible")
            assert page.evaluate("window.hacked") is None
        with opened(browser, links.administrator) as page:
            remark = page.locator("#remarks li").first
            remark.wait_for()
            assert HOSTILE[2] + "ESC[31m"[:7] in remark.inner_text()
            assert page.locator("#people th").first.inner_text() == name
            assert page.locator("main img, main script, main style, main a, main i, main u").count() == 0
            assert page.evaluate("window.hacked") is None


def test_strengths_marks_and_every_control_can_be_reached_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    plan = LabelPlan(criteria=("helpful", "honest"), strengths=True)
    store = make_store(tmp_path / "labels.sqlite", numbered_items(3, answers=2), plan)
    with served(store, ["Ada"]) as links, opened(browser, links.annotators["Ada"]) as page:
        page.wait_for_selector("#task:visible")
        texts = shown_answers(page)
        keys = page.keyboard
        keys.press("Enter")
        assert page.locator("#problem").inner_text() == "A, B have no place yet."
        keys.type("5432")  # the marks of both, from the first open one on
        keys.type("ba")
        keys.press("Enter")
        assert page.locator("#problem").inner_text() == "How much better is it?"
        keys.press("3")
        keys.press("Enter")
        wait_for_next(page, "task 1")
        # The second task with Tab, arrows and the space bar alone.
        second = shown_answers(page)
        reach(page, ".pool .chip[data-position='1']")
        keys.press("Space")
        reach(page, ".pool .chip[data-position='0']")
        keys.press("Space")  # b, then a
        reach(page, ".tier .chip[data-position='0']")
        keys.press("ArrowUp")  # a tie
        keys.press("ArrowUp")  # a is first
        assert page.evaluate("document.activeElement.dataset.position") == "0"
        for group in ("helpful-0", "honest-0", "helpful-1", "honest-1", "strength"):
            reach(page, f"input[name='{group}']")
            keys.press("Space")
        reach(page, "#submit")
        keys.press("Enter")
        wait_for_next(page, "task 2")
        assert page.evaluate("document.activeElement.id") == "task-title"
    labels = {label.completions[0][7]: label for label in read_labels(store)}
    one, two = (labels[texts["a"][7]], labels[second["a"][7]])
    assert [one.completions[tier[0]] for tier in one.tiers] == [texts["b"], texts["a"]]
    assert one.strength == 3
    in_order = [list(texts.values()).index(text) for text in one.completions]
    assert {name: [marks[in_order.index(place)] for place in (0, 1)] for name, marks in one.marks.items()} == {
        "helpful": [5, 3],
        "honest": [4, 2],
    }
    assert [two.completions[tier[0]] for tier in two.tiers] == [second["a"], second["b"]]
    assert two.strength == 1


def reach(page: Page, selector: str) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(80):
        if page.evaluate("what => document.activeElement.matches(what)", selector):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{selector} cannot be reached with Tab")


def test_a_phone_ranks_by_tapping_and_by_dragging_with_a_finger(browser: Browser, tmp_path: Path) -> None:
    wide = "unbroken" * 60
    store = make_store(tmp_path / "labels.sqlite", [Candidates(wide, (wide, "b", "c\n" * 80, "d"))])
    phone: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with served(store, ["Ada"]) as links, opened(browser, links.annotators["Ada"], **phone) as page:
        page.wait_for_selector("#task:visible")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        texts = list(shown_answers(page).values())
        page.locator(".pool .chip[data-position='2']").tap()
        page.locator("#tie").tap()
        page.locator(".pool .chip[data-position='0']").tap()
        page.locator("#answer-1 .rank").tap()
        finger_drag(page, ".chip[data-position='3']", "[data-drop='gap:0']")
        page.locator("#submit").tap()
        page.wait_for_selector("#message:visible")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
    (label,) = read_labels(store)
    assert [{label.completions[index] for index in tier} for tier in label.tiers] == [
        {texts[3]},
        {texts[2], texts[0]},
        {texts[1]},
    ]


def finger_drag(page: Page, source: str, target: str) -> None:
    fingers = page.context.new_cdp_session(page)
    x, y = centre(page, source)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        at = [{"x": left, "y": top} for left, top in points]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": at})

    touch("touchStart", (x, y))
    touch("touchMove", (x + 12, y - 4))
    touch("touchMove", centre(page, target))
    touch("touchEnd")


def test_an_answer_outlives_a_server_that_was_killed_and_is_stored_once(browser: Browser, tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels.sqlite", numbered_items(3))
    first = start(store, 0)
    port = int(first[1].address.rpartition(":")[2])
    second = None
    try:
        context = browser.new_context()
        page = context.new_page()
        page.goto(first[1].annotators["Ada"])
        page.wait_for_selector("#task:visible")
        page.keyboard.type("ab")
        page.locator("#saved", has_text="draft saved").wait_for()
        first[0].send_signal(signal.SIGKILL)
        first[0].wait()
        page.keyboard.type("cd")
        page.keyboard.press("Enter")
        page.wait_for_selector("#lost:visible")
        assert "Not saved yet" in page.locator("#lost").inner_text()
        second = start(store, port)
        wait_for_next(page, "task 1")
        assert page.locator("#lost").is_hidden()
        context.close()
        second[0].send_signal(signal.SIGTERM)
        assert second[0].wait(10) == 0
    finally:
        for process, _ in filter(None, (first, second)):
            process.kill()
            process.wait()
    (label,) = read_labels(store)
    assert label.tiers == tuple((index,) for index in label.shown)


def start(store: Path, port: int) -> tuple[subprocess.Popen[str], Links]:
    command = [sys.executable, web_support.__file__, str(store), "--port", str(port), "Ada"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."})
    assert process.stdout is not None
    return process, Links(**json.loads(process.stdout.readline()))


def test_the_administrator_sees_it_live_and_lets_people_in(browser: Browser, tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels.sqlite", numbered_items(2), LabelPlan(overlap=2))
    with served(store, []) as links, opened(browser, links.administrator) as page:
        for name in ("Ada", "Ben"):
            page.locator("#name").fill(name)
            page.locator("#add").click()
            page.locator("#people th", has_text=name).wait_for()
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.get_by_label("Copy the link of Ada").click()
        page.locator("#people button", has_text="Copied").wait_for()
        link = page.evaluate("navigator.clipboard.readText()")
        assert link.startswith(links.address + "/#1.")
        page.locator("#name").focus()
        with opened(browser, link) as other:
            other.wait_for_selector("#task:visible")
            other.keyboard.type("abcd")
            other.keyboard.press("Enter")
            wait_for_next(other, "task 1")
        page.locator("#figures", has_text="0 of 2").wait_for()
        page.locator("#people tr", has_text=re.compile(r"Ada\s*1\s*0\s*0")).wait_for()
        with page.expect_download() as saved:
            page.locator("#download").click()
        rows = [json.loads(line) for line in Path(saved.value.path()).read_text().splitlines()]
        assert [(row["annotator"], row["outcome"]) for row in rows] == [("Ada", "ranked")]


def test_pages_of_others_cannot_use_ours(browser: Browser, tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels.sqlite", numbered_items(2))
    with served(store, ["Ada"]) as links, stranger(links) as address:
        own = links.address
        context = browser.new_context()
        page = context.new_page()
        watched = watch_answers(page)
        page.goto(address)
        page.wait_for_function("window.done === true")
        page.wait_for_timeout(300)
        answers = watched()
        assert answers[("GET", f"{own}/api/session")] == 403
        assert answers[("POST", f"{own}/api/next")] == 403
        assert answers[("GET", f"{own}/")] == 403  # in a frame
        assert answers[("GET", f"{own}/assets/label.js")] == 403
        port = own.rpartition(":")[2]
        response = page.goto(f"http://rebound.example:{port}/")
        assert response is not None
        assert (response.status, "Host" in response.text()) == (403, True)
        page.goto(f"{own}/")
        page.wait_for_selector("#message:visible")
        assert page.locator("#message-title").inner_text() == "Open your own link"
        page.goto(f"{own}/#1.wrong")
        page.locator("#message-title", has_text="This link does not work").wait_for()
        context.close()


def watch_answers(page: Page) -> Callable[[], dict[tuple[str, str], int]]:
    """Tells (method, URL) -> status of everything the page asks for, also of what the browser keeps from it."""
    asked: dict[str, tuple[str, str]] = {}
    statuses: dict[str, int] = {}
    network = page.context.new_cdp_session(page)

    def sent(event: dict[str, Any]) -> None:
        asked[event["requestId"]] = (event["request"]["method"], event["request"]["url"])

    network.on("Network.requestWillBeSent", sent)
    network.on(
        "Network.responseReceivedExtraInfo", lambda event: statuses.update({event["requestId"]: event["statusCode"]})
    )
    network.send("Network.enable")
    return lambda: {asked[number]: status for number, status in statuses.items() if number in asked}


@contextmanager
def stranger(links: Links) -> Iterator[str]:
    """A web site of somebody else's, on this machine but by another name, that tries what it can."""
    page = f"""<!doctype html><iframe src="{links.address}/"></iframe><script type="module">
    const quiet = () => null;
    await fetch("{links.address}/api/session", {{mode: "no-cors"}}).catch(quiet);
    await fetch("{links.address}/api/next", {{mode: "no-cors", method: "POST", body: "{{}}"}}).catch(quiet);
    await import("{links.address}/assets/label.js").catch(quiet);
    window.done = true;
    </script>""".encode()

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
