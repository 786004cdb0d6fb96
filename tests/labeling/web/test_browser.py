"""The pages in a real browser: hostile texts, keyboard alone, a phone, a server that dies, other web sites."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rlhf_cli.data.records import Candidates, Message
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.web.tokens import ServerLinks
from tests.labeling.web import web_support
from tests.labeling.web.browser_support import (
    finger_drag,
    opened,
    reach,
    read_labels,
    shown_completions,
    stranger,
    wait_for_next,
    watch_answers,
)
from tests.labeling.web.web_support import make_store, numbered_items, served

if TYPE_CHECKING:
    from playwright.sync_api import Browser

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
            shown = sorted(shown_completions(page).values())
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
            comment = page.locator("#comments li").first
            comment.wait_for()
            assert HOSTILE[2] + "ESC[31m"[:7] in comment.inner_text()
            assert page.locator("#people th").first.inner_text() == name
            assert page.locator("main img, main script, main style, main a, main i, main u").count() == 0
            assert page.evaluate("window.hacked") is None


def test_strengths_marks_and_every_control_can_be_reached_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    plan = LabelPlan(criteria=("helpful", "honest"), strengths=True)
    store = make_store(tmp_path / "labels.sqlite", numbered_items(3, answers=2), plan)
    with served(store, ["Ada"]) as links, opened(browser, links.annotators["Ada"]) as page:
        page.wait_for_selector("#task:visible")
        texts = shown_completions(page)
        keys = page.keyboard
        keys.press("Enter")
        assert page.locator("#problem").inner_text() == "A, B have no place yet."
        keys.type("5432")  # the marks of both, from the first open one on
        keys.type("ba")
        keys.press("Enter")
        assert page.locator("#problem").inner_text() == "Choose how much better the first answer is."
        keys.press("3")
        keys.press("Enter")
        wait_for_next(page, "task 1")
        # The second task with Tab, arrows and the space bar alone.
        second = shown_completions(page)
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


@pytest.mark.parametrize("width", [360, 1280])
def test_that_an_answer_was_cut_off_is_seen_where_it_begins(browser: Browser, tmp_path: Path, width: int) -> None:
    long = "Add water, a little flour and wait. " * 60
    items = [Candidates("Why?", (f"1 {long}", "2 Let it rise."), cut_off=(64, None))]
    with (
        served(make_store(tmp_path / "labels.sqlite", items), ["Ada"]) as links,
        opened(browser, links.annotators["Ada"], viewport={"width": width, "height": 800}) as page,
    ):
        page.wait_for_selector("#task:visible")
        cards = page.locator(".completion")
        whole, cut = cards.filter(has_text="2 Let it rise."), cards.filter(has_text="1 Add water")
        assert whole.locator(".ending").count() == 0
        assert cut.locator(".ending").inner_text() == "cut off at the limit of 64 tokens"
        boxes = [cut.locator(one).bounding_box() for one in (".badge", ".ending", ".rank", ".text")]
        badge, ending, rank, text = (box for box in boxes if box is not None)
        assert badge["x"] + badge["width"] <= ending["x"]
        assert ending["x"] + ending["width"] <= rank["x"]
        assert rank["x"] + rank["width"] <= width
        assert ending["y"] + ending["height"] <= text["y"]


def test_time_counts_until_a_minute_after_the_last_act(browser: Browser, tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels.sqlite", numbered_items(1))
    with served(store, ["Ada"]) as links:
        context = browser.new_context()
        page = context.new_page()
        sent: list[Any] = []
        page.on("request", lambda asked: sent.append(asked.post_data_json) if "submit" in asked.url else None)
        page.clock.install()
        page.goto(links.annotators["Ada"])
        page.wait_for_selector("#task:visible")
        page.keyboard.press("a")
        page.clock.run_for(20_000)
        page.keyboard.press("b")
        page.clock.run_for(600_000)  # somebody went to lunch
        page.keyboard.type("cd")
        page.keyboard.press("Enter")
        page.wait_for_selector("#message:visible")
        context.close()
    assert 80 <= sent[0]["active_seconds"] < 95


def test_a_phone_ranks_by_tapping_and_by_dragging_with_a_finger(browser: Browser, tmp_path: Path) -> None:
    wide = "unbroken" * 60
    store = make_store(tmp_path / "labels.sqlite", [Candidates(wide, (wide, "b", "c\n" * 80, "d"))])
    phone: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with served(store, ["Ada"]) as links, opened(browser, links.annotators["Ada"], **phone) as page:
        page.wait_for_selector("#task:visible")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        texts = list(shown_completions(page).values())
        page.locator(".pool .chip[data-position='2']").tap()
        page.locator("#tie").tap()
        page.locator(".pool .chip[data-position='0']").tap()
        page.locator("#completion-1 .badge").tap()
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


def start(store: Path, port: int) -> tuple[subprocess.Popen[str], ServerLinks]:
    command = [sys.executable, web_support.__file__, str(store), "--port", str(port), "Ada"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."})
    assert process.stdout is not None
    return process, ServerLinks(**json.loads(process.stdout.readline()))


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
        page.locator("#statistics", has_text="0 of 2").wait_for()
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
