"""What the tests of the pages do with a browser: open, read, drag, and watch what is asked of whom."""

from __future__ import annotations

import http.server
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cli.labeling.label_records import LabelRecord
from rlhf_cli.labeling.session.session import LabelSession
from rlhf_cli.labeling.web.tokens import ServerLinks
from tests.loopback import serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATH = next((found for name in BROWSERS if (found := shutil.which(name))), None)
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}}
PATIENCE = 60_000
"""Milliseconds until a page that never changes fails its test: long, since tests share the machine with others."""
Tiers = list[set[str]]


@contextmanager
def opened(browser: Browser, link: str, **options: Any) -> Iterator[Page]:
    """A page of its own that has to stay without errors and ask nobody but its server."""
    context = browser.new_context(**DESKTOP | options)
    context.set_default_timeout(PATIENCE)
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


def shown_completions(page: Page) -> dict[str, str]:
    """Letter -> text of the answers on the page."""
    return dict(
        page.evaluate(
            "[...document.querySelectorAll('.completion')].map(card => "
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


def center(page: Page, selector: str) -> tuple[float, float]:
    box = page.locator(selector).first.bounding_box()
    assert box is not None
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def drag(page: Page, position: int, target: str) -> None:
    """Drag an answer's chip, by what is under the mouse while it moves."""
    x, y = center(page, f".chip[data-position='{position}']")
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 9, y)
    page.mouse.move(*center(page, target), steps=2)
    page.mouse.up()


def finger_drag(page: Page, source: str, target: str) -> None:
    fingers = page.context.new_cdp_session(page)
    x, y = center(page, source)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        at = [{"x": left, "y": top} for left, top in points]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": at})

    touch("touchStart", (x, y))
    touch("touchMove", (x + 12, y - 4))
    touch("touchMove", center(page, target))
    touch("touchEnd")


def reach(page: Page, selector: str) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(80):
        if page.evaluate("what => document.activeElement.matches(what)", selector):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{selector} cannot be reached with Tab")


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
def stranger(links: ServerLinks) -> Iterator[str]:
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

    with serving(Site) as address:
        yield f"{address}/"
