"""What is asked changes while people label, and requests fail for good: nobody is trapped, nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.session import LabelSession
from tests.labeling.web.browser_support import DESKTOP, PATIENCE, read_labels, shown_completions, wait_for_next
from tests.labeling.web.web_support import Client, make_store, numbered_items, served, whole_answer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

TWO = numbered_items(2, answers=2)


def ask_for(store: Path, **plan: Any) -> LabelPlan:
    """Change what is asked, as another process does."""
    session, changed = LabelSession(store), LabelPlan(**plan)
    session.prepare(changed, TWO)
    session.close()
    return changed


def begun(browser: Browser, link: str) -> Page:
    page = browser.new_context(**DESKTOP).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(link)
    page.wait_for_selector("#task:visible")
    return page


def test_an_answer_under_another_plan_is_refused_with_a_status_and_a_code_of_its_own(tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels.sqlite", TWO)
    with served(store, ["Ada"]) as links:
        client = Client(links)
        task = client.task_of("Ada")
        body = whole_answer(task, "one") | {"plan": task["plan"]}
        ask_for(store, guidelines="Prefer what is true.")
        status, _, said = client.ask("POST", "/api/submit", token=client.of("Ada"), body=body)
        assert (status, json.loads(said)["code"]) == (412, "plan_changed")
        body["plan"] = client.task_of("Ada")["plan"]
        assert client.ask("POST", "/api/submit", token=client.of("Ada"), body=body)[0] == 200


def test_guidelines_and_criteria_that_change_are_shown_and_what_was_entered_stays(
    browser: Browser, tmp_path: Path
) -> None:
    store = make_store(tmp_path / "labels.sqlite", TWO, LabelPlan(criteria=("kind",)))
    with served(store, ["Ada"]) as links:
        page = begun(browser, links.annotators["Ada"])
        texts = shown_completions(page)
        page.keyboard.type("ba51")
        page.locator("#note").fill("a note")
        page.locator("#saved", has_text="draft saved").wait_for()
        changed = ask_for(store, criteria=("kind", "honest"), guidelines="Prefer what is true.")
        page.locator("#submit").click()
        page.wait_for_selector("#help-dialog[open]")
        assert page.locator("#help-news").inner_text() == "The instructions have changed."
        assert page.locator("#guidelines").inner_text() == "Prefer what is true."
        page.keyboard.press("Escape")
        assert page.locator("#problem").inner_text() == "The instructions have changed."
        page.keyboard.type("42")  # only what is new
        page.keyboard.press("Enter")
        wait_for_next(page, "task 1")
        # What is asked for less is noticed with the draft.
        page.keyboard.type("ab51")
        page.locator("#saved", has_text="draft saved").wait_for()
        ask_for(store, strengths=True)
        page.keyboard.type("5")
        page.locator("#problem", has_text="The instructions have changed.").wait_for()
        assert page.locator("#completions fieldset").count() == 0
        page.keyboard.type("2")
        page.keyboard.press("Enter")
        page.wait_for_selector("#message:visible")
        page.context.close()
    first, second = sorted(read_labels(store), key=lambda label: label.guidelines is None)
    assert first.guidelines == changed.guidelines_hash
    assert (first.note, first.completions[first.tiers[0][0]]) == ("a note", texts["b"])
    marks = {name: [given[index] for index in first.shown] for name, given in first.marks.items()}
    assert marks == {"kind": [5, 1], "honest": [4, 2]}
    assert (second.strength, second.marks) == (2, {})


def test_the_next_task_brings_what_is_asked_by_then(browser: Browser, tmp_path: Path) -> None:
    store = make_store(tmp_path / "labels.sqlite", TWO)
    with served(store, ["Ada"]) as links:
        page = begun(browser, links.annotators["Ada"])
        assert page.locator("#skip-means").text_content() == "skip; nobody else gets this task"
        ask_for(store, criteria=("honest",), set_aside_after=2)
        page.keyboard.press("s")
        wait_for_next(page, "task 1")
        assert page.locator("#completions fieldset").count() == 2
        assert page.locator("#problem").inner_text() == "The instructions have changed."
        assert page.locator("#skip-means").text_content() == "skip; others may still get this task"
        page.context.close()


@pytest.mark.parametrize("status", [500, 503])
def test_only_what_passes_is_sent_again_by_itself(browser: Browser, tmp_path: Path, status: int) -> None:
    store = make_store(tmp_path / "labels.sqlite", TWO)
    with served(store, ["Ada"]) as links:
        page = begun(browser, links.annotators["Ada"])
        keys: list[str] = []

        def fail(route: Any) -> None:
            keys.append(route.request.post_data_json["key"])
            if len(keys) == 1 or status == 500:
                route.fulfill(status=status, json={"error": "a bug of ours", "hint": None})
            else:
                route.continue_()

        page.route("**/api/submit", fail)
        page.keyboard.type("ba")
        page.keyboard.press("Enter")
        if status == 500:
            page.locator("#problem", has_text="Not saved: the server failed: a bug of ours.").wait_for()
            page.wait_for_timeout(1500)
            assert len(keys) == 1
            assert page.locator("#lost").is_hidden()
            assert page.locator(".tier").count() == 2
            page.unroute("**/api/submit")
            page.keyboard.press("Enter")
        wait_for_next(page, "task 1")
        page.context.close()
    (label,) = read_labels(store)
    assert label.tiers == ((label.shown[1],), (label.shown[0],))
    assert len(set(keys)) == 1
